"""What scoring takes as the training examples grow a hundredfold: the memory, not the disk.

a small model ─► fit ─► influence on n and on 100 n training examples ─► results/DATE-scoring.md

The fit has examples of its own: what it has read already, scoring would not read.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import footprint
import llama_checkpoint
import torch
import tyro
from result_file import command_line, write_figures

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# How the scores are made: in the process itself and on two actors, resident and swept.
WAYS: dict[str, list[str]] = {
    "pipelined, one process": ["--address", "none"],
    "swept, one process": ["--address", "none", "--schedule", "swept"],
    "pipelined, 2 actors": ["--address", "local", "--stages", "2"],
}


@dataclass(frozen=True)
class Settings:
    """Scores n and 100 n training examples, and measures the memory of both."""

    place: Path
    """Directory for the model, the run and the scores; its contents are replaced."""
    examples: int = 1100
    """n."""
    tokens: int = 8
    """Tokens of an example."""
    queries: int = 4
    """Queries."""
    results: Path = RESULTS
    """Directory of the result file."""
    figures: Path | None = None
    """JSON file for the figures that targets are judged by."""


def main(settings: Settings) -> None:
    """Make, fit, score, report."""
    place, many = settings.place, 100 * settings.examples
    shutil.rmtree(place, ignore_errors=True)
    shape = llama_checkpoint.Settings(
        out=place / "model", width=64, ff=128, heads=4, kv_heads=2, layers=2, vocab=300,
        dtype="float32", examples=many, tokens=settings.tokens, queries=settings.queries,
    )  # fmt: skip
    llama_checkpoint.main(shape)
    texts = (place / "model" / "train.jsonl").read_text().splitlines(keepends=True)
    few = place / "model" / "few.jsonl"
    few.write_text("".join(texts[: settings.examples]))
    fitted = place / "model" / "fitted.jsonl"
    fitted.write_text("".join(texts[-settings.examples :]))
    environment = dict(os.environ) | {"OMP_WAIT_POLICY": "PASSIVE"}

    def job(name: str, *flags: str) -> footprint.Footprint:
        command = [sys.executable, f"jobs/{name}.py", *flags, "--batch-tokens", "512"]
        found = footprint.measure(command, env=environment, cwd=ROOT, log=place / "log.txt")
        if found.returncode:
            raise SystemExit((place / "log.txt").read_text())
        return found

    model, run = str(place / "model"), str(place / "run")
    job("fit", "--model", model, "--data", str(fitted), "--out", run, "--address", "none")
    rows = []
    for way, flags in WAYS.items():
        took = []
        for number, train in ((settings.examples, few), (many, place / "model" / "train.jsonl")):
            out = str(place / f"scores-{len(rows)}-{number}")
            queries = f"{model}/queries.jsonl"
            took.append(
                job(
                    "influence", "--run", run, "--queries", queries, "--train", str(train),
                    "--out", out, "--rank", "8", *flags,
                )
            )  # fmt: skip
        rows.append((way, *took))
    ratios = {way: b.memory_bytes / a.memory_bytes for way, a, b in rows}
    write_figures(settings.figures, {"few": settings.examples, "many": many, "ratios": ratios})
    lines = [
        f"# Memory of scoring, {date.today()}",
        "",
        f"    {command_line('scoring_memory.py', settings, Settings(Path()))}",
        "",
        f"- torch {torch.__version__}, {os.cpu_count()} cores; {settings.queries} queries, rank 8, "
        f"examples of {settings.tokens} tokens, a Llama-shaped model of 2 layers of 64",
        "- memory: of all processes together, anonymous and /dev/shm, at its highest",
        "",
        f"| schedule | {settings.examples:,} examples | {many:,} examples | ratio | seconds |",
        "|---|---|---|---|---|",
        *(
            f"| {way} | {a.memory_bytes / 1e6:,.0f} MB | {b.memory_bytes / 1e6:,.0f} MB | "
            f"{b.memory_bytes / a.memory_bytes:.3f} | {a.seconds:.0f}, {b.seconds:.0f} |"
            for way, a, b in rows
        ),
        "",
    ]
    settings.results.mkdir(parents=True, exist_ok=True)
    file = settings.results / f"{date.today()}-scoring.md"
    file.write_text("\n".join(lines))
    print("\n".join(lines))
    print(file)


if __name__ == "__main__":
    main(tyro.cli(Settings))
