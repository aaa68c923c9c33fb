"""EK-FAC and influence of a model of ten billion parameters on one small machine, measured.

    checkpoint of random weights ─► fit.py, swept ─► influence.py ─► results/DATE-ten-billion.md

With ``--experts`` the model is a mixture of experts, and the record DATE-ten-billion-experts.md.

What is finished is not done again: the checkpoint, the fit and the scores each continue where they
stopped, and a step whose measurement lies in PLACE is taken from there (a step that was stopped and
went on is measured from where it went on; delete the directory to measure it whole).
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

import footprint
import llama_checkpoint
import numpy as np
import ray
import torch
import transformers
import tyro

import raycurv

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# The target: all processes together.
MOST_MEMORY = 16 * 2**30


@dataclass(frozen=True)
class Settings:
    """Fits and scores a Llama- or Mixtral-shaped model, one layer in memory at a time, and measures
    it."""

    place: Path
    """Directory for the checkpoint, the run and the scores: about 55 GB with the defaults."""
    width: int = 4096
    """Size of the hidden state."""
    ff: int = 14336
    """Size of the hidden layer of an MLP, or of an expert."""
    experts: int = 0
    """Experts of a layer, of which a token meets two; 0 for one MLP."""
    layers: int = 46
    """Decoder layers, one a stage."""
    heads: int = 32
    """Attention heads."""
    kv_heads: int = 8
    """Key-value heads."""
    examples: int = 16
    """Training examples of the fit."""
    scored: int = 8
    """Training examples that are scored."""
    tokens: int = 64
    """Tokens of an example."""
    max_factor_dim: int = 2048
    """Widest tile."""
    rank: int = 32
    """Of IHVPs."""


def steps(settings: Settings) -> dict[str, list[str]]:
    """The commands, by name."""
    place = settings.place
    how = ["--schedule", "swept", "--batch-tokens", "1024"]
    fit = [
        "--model", f"{place}/model", "--data", f"{place}/model/train.jsonl", "--out",
        f"{place}/run", *how, "--max-factor-dim", str(settings.max_factor_dim), "--dtype",
        "bfloat16", "--store-dtype", "bfloat16",
    ]  # fmt: skip
    influence = [
        "--run", f"{place}/run", "--queries", f"{place}/model/queries.jsonl", "--train",
        f"{place}/model/train.jsonl", "--max-examples", str(settings.scored), "--out",
        f"{place}/scores", "--rank", str(settings.rank), *how,
    ]  # fmt: skip
    return {
        "fit": [sys.executable, "jobs/fit.py", *fit],
        "influence": [sys.executable, "jobs/influence.py", *influence],
    }


def taken(settings: Settings, name: str, command: list[str]) -> dict[str, Any]:
    """What a step took, measured now or before."""
    directory = settings.place / ("run" if name == "fit" else "scores")
    file, run = settings.place / f"{name}.json", [command[0], str(ROOT / command[1]), *command[2:]]
    return footprint.measured(file, run, [directory], True, OMP_WAIT_POLICY="PASSIVE")


def report(settings: Settings, parameters: int, steps_taken: dict[str, dict[str, Any]]) -> str:
    """The record, as Markdown."""
    run = raycurv.open(settings.place / "run")
    blocks, examples = run.blocks(), run.examples()
    scores = raycurv.open_scores(settings.place / "scores")
    trace = sum(blocks["trace"].to_pylist())
    norms = examples["gradient_sq_norm"].to_numpy().astype(float).mean()
    matrix, queries, train = scores.matrix()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    lines = [
        f"# EK-FAC of {parameters / 1e9:.2f} billion parameters, {date.today()}",
        "",
        f"    python benchmarks/ten_billion.py {_flags(settings)}".rstrip(),
        "",
        f"- raycurv at {commit}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Ray {ray.__version__}",
        f"- machine: {_processor()}, {os.cpu_count()} cores, no GPU",
        f"- model: {parameters:,} parameters in bfloat16, random; {len(blocks):,} blocks (all "
        f"linear layers{_experts(settings)} of all {settings.layers} decoder layers), a stage for "
        "each layer",
        f"- fit: {len(examples)} examples of {settings.tokens} tokens; influence: {len(queries)} "
        f"queries, {len(train)} training examples, rank {settings.rank}, damping 0.1",
        "",
        "| job | wall | CPU | memory of all processes | of that /dev/shm | PSS | directory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, said in steps_taken.items():
        (directory,) = said["directories"].values()
        lines.append(
            f"| {name} | {said['seconds'] / 60:.1f} min | {said['cpu_seconds'] / 60:.1f} min | "
            f"{said['memory_bytes'] / 2**30:.2f} GiB | {said['shared_bytes'] / 2**20:.0f} MiB | "
            f"{said['pss_bytes'] / 2**30:.2f} GiB | {directory['peak'] / 1e9:.1f} GB |"
        )
    most = max(said["memory_bytes"] for said in steps_taken.values())
    lines += [
        "",
        f"Target: at most {MOST_MEMORY / 2**30:.0f} GiB in all: "
        f"**{'reached' if most <= MOST_MEMORY else 'missed'}** ({most / 2**30:.2f} GiB).",
        "",
        "| phase | seconds |",
        "|---|---|",
        *(f"| fit: {k} | {v:,.0f} |" for k, v in run.manifest.seconds.items()),
        *(f"| influence: {k} | {v:,.0f} |" for k, v in scores.manifest.seconds.items()),
        "",
        f"ΣΛ over all blocks {trace:.6g}, mean squared gradient norm {norms:.6g} (both of "
        f"gradients turned into the stored bases): ratio {trace / norms:.6f}.",
        "",
        f"Scores: {matrix.size}, {int(np.isfinite(matrix).sum())} of them finite, from "
        f"{matrix.min():.4g} to {matrix.max():.4g}.",
        "",
    ]
    return "\n".join(lines)


def _experts(settings: Settings) -> str:
    if not settings.experts:
        return ""
    return f", {settings.experts} experts, each a block a matrix, and routers"


def _flags(settings: Settings) -> str:
    given = [("place", "PLACE")]
    for field in fields(settings):
        if field.name != "place" and getattr(settings, field.name) != field.default:
            given.append((field.name, str(getattr(settings, field.name))))
    return shlex.join(part for n, v in given for part in (f"--{n.replace('_', '-')}", v))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "a processor without a name"


def main(settings: Settings) -> None:
    """Make, fit, score, report."""
    settings.place.mkdir(parents=True, exist_ok=True)
    shape = llama_checkpoint.Settings(
        out=settings.place / "model", width=settings.width, ff=settings.ff, heads=settings.heads,
        kv_heads=settings.kv_heads, layers=settings.layers, experts=settings.experts, vocab=300,
        examples=settings.examples, tokens=settings.tokens,
    )  # fmt: skip
    parameters = sum(tensor.numel for tensor in llama_checkpoint.plan_tensors(shape))
    llama_checkpoint.main(shape)
    found = {name: taken(settings, name, command) for name, command in steps(settings).items()}
    text = report(settings, parameters, found)
    kind = "ten-billion-experts" if settings.experts else "ten-billion"
    file = RESULTS / f"{date.today()}-{kind}.md"
    file.write_text(text)
    print(text)
    print(file)


if __name__ == "__main__":
    main(tyro.cli(Settings))
