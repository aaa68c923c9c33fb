"""What Ray adds to the work: processor seconds of the same fit in one process and on actors.

    fit of n and of m examples, in this process and on 2 and 8 stages of a Ray of its own
    (m - n) examples' processor seconds, driver and daemons apart    ─► results/DATE-overhead.md

Differences of two fits leave out what starting takes: processes, imports, loading.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import llama_checkpoint
import pytest
import ray
import tyro

import raycurv
from raycurv.onray.ray_pool import OnRay
from raycurv.stages.pool import InProcess

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Settings:
    """Fits the same model in one process and on actors, and compares processor seconds."""

    place: Path
    """Directory for the model and the runs; its contents are replaced."""
    few: int = 16
    """n."""
    many: int = 80
    """m."""
    tokens: int = 256
    """Tokens of an example; four make a microbatch."""
    layers: int = 8
    """Layers of the model."""
    width: int = 256
    """Of its hidden states."""
    repeats: int = 3
    """Alternating runs, of which medians are taken."""


@dataclass(frozen=True)
class Taken:
    """Processor seconds while stages were there.

    Attributes:
        driver: of this process.
        all: of this process and all that descend from it.
        stages: how long an operation of a stage took, median.
    """

    driver: float
    all: float
    operation: float


def processes() -> dict[int, tuple[int, float]]:
    """Every process: its parent, and its processor seconds with those of children that ended."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            found[int(entry.name)] = int(fields[1]), sum(map(int, fields[11:15])) / TICKS
    return found


def seconds() -> tuple[float, float]:
    """Processor seconds of this process, and of it with all that descend from it."""
    there = processes()
    mine = {os.getpid()}
    while more := {pid for pid, (parent, _) in there.items() if parent in mine} - mine:
        mine |= more
    times = os.times()
    return times.user + times.system, sum(there[pid][1] for pid in mine)


@contextmanager
def measured(pool: type, found: list[tuple[float, float]]) -> Iterator[None]:
    """Note processor seconds when stages have been built and before they go."""
    start, stop = pool.start, pool.stop

    def started(self: Any, *args: Any, **how: Any) -> None:
        start(self, *args, **how)
        found.append(seconds())

    def stopped(self: Any) -> None:
        if self.stages:
            found.append(seconds())
        stop(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "start", started)
        patch.setattr(pool, "stop", stopped)
        yield


def fit(settings: Settings, examples: int, address: str, stages: int) -> Taken:
    """A fit of so many examples."""
    place, out = settings.place, settings.place / "run"
    shutil.rmtree(out, ignore_errors=True)
    rows = (place / "model" / "train.jsonl").read_text().splitlines(keepends=True)
    data = place / "rows.jsonl"
    data.write_text("".join(rows[:examples]))
    found: list[tuple[float, float]] = []
    with measured(InProcess if address == "none" else OnRay, found):
        raycurv.fit(
            str(place / "model"), str(data), out, address=address, stages=stages, quiet=True,
            batch_tokens=4 * settings.tokens, commit_seconds=1e6, fisher="empirical",
            method="kfac", force=True,
        )  # fmt: skip
    # The first start or stop finds nothing to stop.
    (driver, all_), (driver_end, all_end) = found[0], found[-1]
    rows_ = raycurv.open(out)
    assert rows_ is not None
    table = [
        (row["end"] - row["start"]).total_seconds()
        for row in _timeline(out)
        if row["operation"] in ("forward", "turn", "backward")
    ]
    return Taken(driver_end - driver, all_end - all_, statistics.median(table))


def _timeline(out: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return [
        row
        for file in sorted((out / "tables" / "timeline").glob("*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]


def difference(settings: Settings, address: str, stages: int) -> Taken:
    """What the examples beyond the first few take."""
    few = fit(settings, settings.few, address, stages)
    many = fit(settings, settings.many, address, stages)
    return Taken(many.driver - few.driver, many.all - few.all, many.operation)


def main(settings: Settings) -> None:
    """Make the model, fit, compare, report."""
    shutil.rmtree(settings.place, ignore_errors=True)
    os.environ |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    os.environ.pop("RAY_ADDRESS", None)
    import torch

    torch.set_num_threads(1)
    llama_checkpoint.main(
        llama_checkpoint.Settings(
            out=settings.place / "model", width=settings.width, ff=688, heads=4, kv_heads=2,
            layers=settings.layers, vocab=2000, dtype="float32", examples=settings.many,
            tokens=settings.tokens,
        )
    )  # fmt: skip
    ways = [("none", 2), ("local", 2), ("none", 8), ("local", 8)]
    taken: dict[tuple[str, int], list[Taken]] = {way: [] for way in ways}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, logging_level="error",
        log_to_driver=False,
    )  # fmt: skip
    began = time.monotonic()
    for _ in range(settings.repeats):
        for way in ways:
            taken[way].append(difference(settings, *way))
            print(way, taken[way][-1], flush=True)
    ray.shutdown()
    lines = [
        f"# What Ray adds, {date.today()}",
        "",
        "    python benchmarks/ray_overhead.py --place PLACE",
        "",
        f"- K-FAC's pass over {settings.many - settings.few} examples of {settings.tokens} tokens, "
        f"a Llama-shaped model of {settings.layers} layers of {settings.width}, float32, "
        f"one thread a process, {os.cpu_count()} cores; medians of {settings.repeats} alternating "
        f"runs, {(time.monotonic() - began) / 60:.0f} minutes",
        "- processor seconds of all processes (driver, actors, Ray's daemons), and of the driver",
        "",
        "| stages | an operation | in one process | on actors | ratio | driver | its share |",
        "|---|---|---|---|---|---|---|",
    ]
    for stages in (2, 8):
        alone = statistics.median(t.all for t in taken["none", stages])
        there = taken["local", stages]
        on_ray = statistics.median(t.all for t in there)
        driver = statistics.median(t.driver for t in there)
        operation = statistics.median(t.operation for t in taken["none", stages])
        lines.append(
            f"| {stages} | {1000 * operation:.0f} ms | {alone:.2f} s | {on_ray:.2f} s | "
            f"{on_ray / alone:.3f} | {driver:.2f} s | {driver / on_ray:.1%} |"
        )
    text = "\n".join([*lines, ""])
    (ROOT / "benchmarks" / "results" / f"{date.today()}-overhead.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Settings))
