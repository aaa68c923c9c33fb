"""How time and memory grow: with tokens, examples, queries, rank, parameters and stages.

    fit and scoring of a small model, one size at a time, each in a process of its own
    seconds = constant + factor · size ^ exponent       ─► results/DATE-growth.md, DATE-growth.png

Seconds are processor seconds of the passes themselves; what starting takes is left out.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import tyro

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# What a job is like unless one of these is varied.
USUAL: dict[str, int] = {
    "width": 192, "tokens": 128, "examples": 64, "queries": 8, "rank": 16, "stages": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """One size that is varied.

    Attributes:
        key: which.
        sizes: its values.
        measured: which of what is measured should grow with it.
        size: what a value means, for the exponent.
    """

    key: str
    sizes: tuple[int, ...]
    measured: tuple[str, ...]
    unit: str


AXES = (
    Axis("examples", (32, 64, 128, 256), ("fit", "scores"), "training examples"),
    Axis("tokens", (64, 128, 256, 512), ("fit", "scores"), "tokens an example"),
    Axis("queries", (4, 16, 64), ("queries", "scores"), "queries"),
    Axis("rank", (4, 16, 64), ("queries", "scores"), "rank"),
    Axis("width", (96, 192, 384), ("fit", "scores"), "parameters"),
    Axis("stages", (1, 2, 4), ("fit", "scores"), "stages"),
)


@dataclass(frozen=True)
class Settings:
    """Measures fits and scorings of growing sizes."""

    place: Path
    """Directory for models and runs; its contents are replaced."""
    repeats: int = 2
    """Runs of each, of which the fastest counts."""
    child: str = ""
    """For the processes that this one starts: the sizes, as JSON."""


def measure(place: Path, sizes: dict[str, int]) -> dict[str, float]:
    """Processor seconds of a fit's passes, of the queries and of the scores, and memory."""
    import raycurv
    from raycurv.stages import pool

    taken: dict[str, float] = {}
    inner = pool.timed

    def timed(actor: str, method: str, call: Any, args: Any) -> Any:
        started = time.process_time()
        found = inner(actor, method, call, args)
        taken[method] = taken.get(method, 0.0) + time.process_time() - started
        return found

    pool.timed = timed
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)

    def texts(count: int, prefix: str) -> list[dict[str, Any]]:
        ids = rng.integers(0, 250, (count, sizes["tokens"]))
        return [{"id": f"{prefix}{n}", "input_ids": row.tolist()} for n, row in enumerate(ids)]

    here: dict[str, Any] = {
        "address": "none", "quiet": True, "stages": sizes["stages"], "batch_tokens": 2048,
    }  # fmt: skip
    model = str(place / f"model-{sizes['width']}")
    train = texts(sizes["examples"], "train ")
    run = raycurv.fit(model, train, place / "run", **here)
    passes = ("forward", "turn", "backward")
    found = {"fit": sum(taken.get(m, 0.0) for m in passes)}
    fitted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    taken.clear()
    asked = texts(sizes["queries"], "query ")
    run.ihvp(asked, place / "ihvp", rank=sizes["rank"], **here)
    found["queries"] = sum(taken.get(m, 0.0) for m in passes)
    taken.clear()
    run.influence(asked, train, place / "scores", rank=sizes["rank"], **here)
    found["scores"] = sum(taken.get(m, 0.0) for m in passes) - found["queries"]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found | {"MB of the fit": fitted, "MB": memory}


def child(place: Path, sizes: dict[str, int]) -> dict[str, float]:
    """The same in a process of its own."""
    work = place / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    for model in place.glob("model-*"):
        (work / model.name).symlink_to(model)
    told = subprocess.run(
        [sys.executable, __file__, "--place", str(work), "--child", json.dumps(sizes)],
        capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if told.returncode:
        raise SystemExit(told.stderr)
    found: dict[str, float] = json.loads(told.stdout.splitlines()[-1])
    return found


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """p of ``c + f · size^p`` with c and f at least 0, by least squares on a grid of p."""
    from scipy.optimize import nnls

    x, y = np.array(sizes) / max(sizes), np.array(seconds)
    best = (np.inf, 0.0)
    for p in np.arange(0.0, 3.001, 0.01):
        columns = np.stack([np.ones_like(x), x**p], axis=1) / y[:, None]
        _, rest = nnls(columns, np.ones_like(y))
        best = min(best, (rest, p))
    return float(best[1])


def make_models(place: Path) -> None:
    """Llama-shaped, four layers, random weights, bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    widths = {USUAL["width"], *(s for a in AXES if a.key == "width" for s in a.sizes)}
    for width in sorted(widths):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256, hidden_size=width, intermediate_size=width * 8 // 3,
            num_hidden_layers=4, num_attention_heads=width // 32,
            num_key_value_heads=width // 32, max_position_embeddings=1024,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(place / f"model-{width}")


def main(settings: Settings) -> None:
    if settings.child:
        print(json.dumps(measure(settings.place, json.loads(settings.child))))
        return
    started = time.perf_counter()
    shutil.rmtree(settings.place, ignore_errors=True)
    settings.place.mkdir(parents=True)
    make_models(settings.place)
    found: dict[tuple[str, int], dict[str, float]] = {}
    for axis in AXES:
        for size in axis.sizes:
            runs = [
                child(settings.place, USUAL | {axis.key: size}) for _ in range(settings.repeats)
            ]
            found[axis.key, size] = {key: min(run[key] for run in runs) for key in runs[0]}
            print(axis.key, size, found[axis.key, size], flush=True)
    shutil.rmtree(settings.place, ignore_errors=True)
    write(found, time.perf_counter() - started, settings)


def write(
    found: dict[tuple[str, int], dict[str, float]], seconds: float, settings: Settings
) -> None:
    """The tables and the picture."""
    lines = [
        f"# How time and memory grow, {date.today()}",
        "",
        "    python benchmarks/growth.py --place PLACE",
        "",
        f"- torch {torch.__version__}, one thread, float32; a Llama-shaped model of 4 layers, "
        + ", ".join(f"{key} {value}" for key, value in USUAL.items()),
        f"- processor seconds of the passes, the least of {settings.repeats} runs; memory of the "
        f"process at its highest; {seconds:.0f} s in all",
    ]
    for axis in AXES:
        lines += [
            "", f"## {axis.unit}", "",
            "| " + axis.unit + " | fit, s | queries, s | scores, s | memory of the fit, MB | MB |",
            "|---|---|---|---|---|---|",
        ]  # fmt: skip
        values = [float(s**2 if axis.key == "width" else s) for s in axis.sizes]
        for size in axis.sizes:
            one = found[axis.key, size]
            lines.append(
                f"| {size} | {one['fit']:.2f} | {one['queries']:.2f} | {one['scores']:.2f} | "
                f"{one['MB of the fit']:.0f} | {one['MB']:.0f} |"
            )
        fits = [
            f"{name} {exponent(values, [found[axis.key, s][name] for s in axis.sizes]):.2f}"
            for name in axis.measured
        ]
        what = "width², as parameters" if axis.key == "width" else axis.unit
        lines += ["", f"Exponents in {what}: {', '.join(fits)}."]
    picture(found)
    name = f"{date.today()}-growth"
    lines += ["", f"![seconds against sizes]({name}.png)"]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def picture(found: dict[tuple[str, int], dict[str, float]]) -> None:
    """Seconds against each size, both axes logarithmic."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6.4), layout="constrained")
    for plot, axis in zip(axes.flat, AXES, strict=True):
        for name, marker in (("fit", "o"), ("queries", "s"), ("scores", "^")):
            seconds = [found[axis.key, size][name] for size in axis.sizes]
            plot.plot(axis.sizes, seconds, marker=marker, label=name)
        plot.set_xscale("log", base=2)
        plot.set_yscale("log", base=2)
        plot.set_xticks(axis.sizes, [str(s) for s in axis.sizes])
        plot.set_xlabel("width" if axis.key == "width" else axis.unit)
        plot.set_ylabel("processor seconds")
        plot.grid(True, which="major", alpha=0.3)
    axes.flat[0].legend()
    figure.savefig(RESULTS / f"{date.today()}-growth.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Settings))
