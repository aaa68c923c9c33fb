"""Speed of raycurv beside kronfluence's, phase by phase, and beside what the machine allows.

    a shape ─► prepared once ─┬► raycurv_speed.py      a fresh process each, in turn,  ─┐
                              └► kronfluence_speed.py  of the same interpreter         ─┴► medians

Both take the empirical Fisher of one model on one data set, full-rank IHVPs, λ = 0.1 · mean(Λ) and
the same batches and threads. Writes ``results/DATE-speed.md``, explained in README.md.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean, median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import tyro
from agreement import pearson
from floor import Rates, count
from numpy.typing import NDArray
from result_file import command_line, loads, processor, source_state, table, write_figures
from shapes import SHAPES, prepare

HERE = Path(__file__).parent
TARGET = 0.9999  # Pearson of scores
PHASES = ("covariance", "eigendecomposition", "lambda", "pairwise", "self")
MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """Measures raycurv and kronfluence in turn, on the shapes of shapes.py."""

    kronfluence_python: Path
    """Interpreter of the environment that both run in (see README.md)."""
    bergson_python: Path | None = None
    """The same of bergson, which then takes part in float32, on shapes a, b and c."""
    shapes: tuple[str, ...] = tuple(SHAPES)
    """Which of the shapes a to e."""
    repeats: int = 5
    """Runs of each side; medians are shown."""
    large_repeats: int = 3
    """The same for the large shapes."""
    large: tuple[str, ...] = ("c",)
    """Which those are."""
    ours: tuple[str, ...] = ("float32", "together")
    """Modes of raycurv: float32, bfloat16, together (float32, both kinds of scores in one job)."""
    theirs: tuple[str, ...] = ("float32", "medium", "amp", "bf16")
    """Modes of kronfluence: float32, medium, amp, bf16."""
    large_modes: bool = True
    """Whether other modes than float32, and float64, run on the large shapes, too."""
    fast_repeats: int = 1
    """Runs of modes other than float32."""
    reference: bool = True
    """Also score in float64, which says how far each mode may be trusted."""
    floor: bool = True
    """Also count and measure the floors of shapes a, b and c."""
    threads: int = 2
    """Threads of torch, on both sides."""
    keep: Path | None = None
    """Directory for the runs themselves: those that are there already are not made again."""
    results: Path = HERE / "results"
    """Directory of the result file."""
    figures: Path | None = None
    """JSON file for the figures that targets are judged by."""
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    """Of the result file."""


@dataclass(frozen=True)
class Side:
    """One side in one mode."""

    name: str
    mode: str

    def __str__(self) -> str:
        return f"{self.name} {self.mode}"


@dataclass
class Runs:
    """What the runs of a side gave."""

    said: list[dict[str, Any]] = field(default_factory=list)
    scores: NDArray[Any] | None = None
    own: NDArray[Any] | None = None

    def cost(self, phase: str, what: str) -> float:
        """The median of a phase; 0 for one that the side does not have."""
        return median(run["phases"].get(phase, {}).get(what, 0) for run in self.said)

    def total(self, what: str) -> float:
        """The median of the sums of all phases."""
        return median(sum(p[what] for p in run["phases"].values()) for run in self.said)

    @property
    def peak(self) -> float:
        """Bytes at most."""
        return median(max(p["peak"] for p in run["phases"].values()) for run in self.said)

    @property
    def held(self) -> float:
        """Bytes before the first phase."""
        return median(run["held"] for run in self.said)


def run_side(settings: Settings, side: Side, shape: str, place: Path, runs: Runs) -> None:
    """One run in a fresh process.

    Raises:
        SystemExit: it failed; its own message is on the terminal.
    """
    out = place / f"{side.name}-{side.mode}-{len(runs.said)}.npz"
    said = out.with_suffix(".json")
    job = {
        "shape": shape,
        "place": str(place),
        "mode": side.mode,
        "threads": settings.threads,
        "out": str(out),
    }
    pythons = {"bergson": settings.bergson_python}
    python = pythons.get(side.name, settings.kronfluence_python)
    script = HERE / f"{side.name}_speed.py"
    environment = os.environ | {"OMP_NUM_THREADS": str(settings.threads)}
    environment.pop("PYTHONPATH", None)
    job_file = place / f"{side.name}-{side.mode}.job.json"
    job_file.write_text(json.dumps(job))
    if not said.is_file():
        ran = subprocess.run([python, script, job_file], env=environment, check=False)
        if ran.returncode:
            raise SystemExit(f"{side}, shape {shape}: failed; for its environment see README.md.")
    runs.said.append(json.loads(said.read_text()))
    found = np.load(out)
    runs.scores, runs.own = found["scores"], found["self"]
    print(f"{shape} {side}: {runs.total('cpu'):.1f} s", flush=True)


def measure(settings: Settings, shape: str, place: Path) -> dict[str, Runs]:
    """All runs of a shape, both sides in turn."""
    all_modes = settings.large_modes or shape not in settings.large
    exact = ("float32", "together")  # the same arithmetic
    sides = [Side("raycurv", mode) for mode in settings.ours if all_modes or mode in exact]
    sides += [Side("kronfluence", mode) for mode in settings.theirs if all_modes or mode in exact]
    if settings.bergson_python and SHAPES[shape].network == "llama":
        sides.append(Side("bergson", "float32"))
    # Alternately, so that what else the machine does falls on both.
    sides.sort(key=lambda side: side.mode != "float32")
    runs = {str(side): Runs() for side in sides}
    repeats = settings.large_repeats if shape in settings.large else settings.repeats
    for number in range(max(repeats, settings.fast_repeats)):
        for side in sides if number % 2 == 0 else sides[::-1]:
            if number < (repeats if side.mode == "float32" else settings.fast_repeats):
                run_side(settings, side, shape, place, runs[str(side)])
    if settings.reference and all_modes:
        side = Side("raycurv", "float64")
        run_side(settings, side, shape, place, runs.setdefault(str(side), Runs()))
    return runs


def agreement(runs: Runs, reference: Runs) -> tuple[float, float]:
    """Pearson of pairwise scores and of self-influence."""
    pairs = ((runs.scores, reference.scores), (runs.own, reference.own))
    both = [pearson(*(torch.tensor(x).flatten() for x in pair)) for pair in pairs]
    return both[0], both[1]


def phase_lines(ours: Runs, theirs: Runs, name: str = "kronfluence") -> list[str]:
    """Phases of two sides."""
    rows = []
    for phase in (*PHASES, "load", "total"):
        cells = []
        for what in ("cpu", "wall"):
            if phase == "total":
                a, b = ours.total(what), theirs.total(what)
            else:
                a, b = ours.cost(phase, what), theirs.cost(phase, what)
            cells += [f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}" if b else ""]
        rows.append([phase, *cells])
    titles = ["CPU s, raycurv", name, "ratio", "wall s, raycurv", name, "ratio"]
    return table(["phase", *titles], rows)


def mode_lines(runs: dict[str, Runs]) -> list[str]:
    """Every side and mode: cost, memory, agreement with the reference."""
    reference = runs.get("raycurv float64")
    rows = []
    for name, made in runs.items():
        cells = ["", ""]
        if reference is not None and made is not reference:
            cells = [f"{1 - p:.1e}" for p in agreement(made, reference)]
        rows.append(
            [
                name,
                str(len(made.said)),
                f"{made.total('cpu'):.2f}",
                f"{made.peak / MIB:,.0f}",
                f"{(made.peak - made.held) / MIB:,.0f}",
                *cells,
            ]
        )
    titles = ["runs", "CPU s", "peak MiB", "above imports", "1 - Pearson, scores", "self"]
    return table(["side and mode", *titles], rows)


def fastest(runs: dict[str, Runs], side: str) -> tuple[str, Runs]:
    """The mode of a side that takes least among those that agree with float64, or, where that was
    not run, with the other side's float32."""
    other = "kronfluence" if side == "raycurv" else "raycurv"
    reference = runs.get("raycurv float64", runs[f"{other} float32"])
    found = [
        (made.total("cpu"), name)
        for name, made in runs.items()
        if name.startswith(side)
        and made is not reference
        and min(agreement(made, reference)) >= TARGET
    ]
    name = min(found)[1]
    return name, runs[name]


def floor_lines(shape: str, ours: Runs, rates: Rates) -> list[str]:
    """Phases over their floors."""
    rows = []
    for phase, work in count(SHAPES[shape]).items():
        least, took = rates.seconds(work), ours.cost(phase, "cpu")
        rows.append(
            [
                phase,
                f"{work.flops / 1e9:,.0f}",
                f"{work.elements * 4 / 1e9:.1f}",
                f"{least:.2f}",
                f"{took:.2f}",
                f"{took / least:.2f}",
            ]
        )
    titles = ["GFLOP", "GB", "floor, CPU s", "raycurv, CPU s", "over floor"]
    return table(["phase", *titles], rows)


def summary_lines(settings: Settings, found: dict[str, dict[str, Runs]]) -> list[str]:
    """All shapes in one table, and geometric means."""
    rows, ratios, best = [], [], []
    for shape, runs in found.items():
        ours, theirs = runs["raycurv float32"], runs["kronfluence float32"]
        ratios.append(ours.total("cpu") / theirs.total("cpu"))
        worst = max(PHASES, key=lambda p: ours.cost(p, "cpu") / theirs.cost(p, "cpu"))
        cells = [
            f"{ratios[-1]:.2f}",
            f"{ours.total('wall') / theirs.total('wall'):.2f}",
            f"{ours.cost(worst, 'cpu') / theirs.cost(worst, 'cpu'):.2f} ({worst})",
            f"{ours.peak / theirs.peak:.2f}",
            f"{1 - min(agreement(ours, theirs)):.1e}",
        ]
        if settings.reference:
            (mine, a), (other, b) = fastest(runs, "raycurv"), fastest(runs, "kronfluence")
            best.append(a.total("cpu") / b.total("cpu"))
            cells += [f"{best[-1]:.2f} ({mine.split()[1]} against {other.split()[1]})"]
        rows.append([f"({shape}) {SHAPES[shape].title}", *cells])
    titles = ["CPU", "wall", "worst phase", "peak memory", "1 - Pearson"]
    means = ["geometric mean", f"{geometric_mean(ratios):.2f}", "", "", "", ""]
    if settings.reference:
        titles.append("fastest modes, CPU")
        means.append(f"{geometric_mean(best):.2f}")
    return table(["raycurv / kronfluence", *titles], [*rows, means])


def figures(runs: dict[str, Runs], floors: dict[str, float], referred: bool) -> dict[str, Any]:
    """What targets of a shape are judged by."""
    sides = {
        name: {
            "cpu": made.total("cpu"),
            "phases": {phase: made.cost(phase, "cpu") for phase in PHASES},
            "peak": made.peak,
        }
        for name, made in runs.items()
    }
    found = {"sides": sides, "over floor": floors}
    if {"raycurv float32", "kronfluence float32"} <= runs.keys():
        found["Pearson"] = min(agreement(runs["raycurv float32"], runs["kronfluence float32"]))
    if referred:
        found["fastest"] = {side: fastest(runs, side)[0] for side in ("raycurv", "kronfluence")}
    return found


def main(settings: Settings) -> None:
    """Measure all shapes and write the report."""
    state, before = source_state(), loads()
    torch.set_num_threads(settings.threads)
    found: dict[str, dict[str, Runs]] = {}
    judged: dict[str, dict[str, Any]] = {}
    floors: list[str] = []
    rates = Rates()
    for shape in settings.shapes:
        with TemporaryDirectory() as directory:
            place = (settings.keep or Path(directory)) / shape
            if not (place / "examples.npz").is_file():
                place.mkdir(parents=True, exist_ok=True)
                prepare(SHAPES[shape], place)
            found[shape] = measure(settings, shape, place)
        over: dict[str, float] = {}
        if settings.floor and SHAPES[shape].network == "llama":
            ours = found[shape]["raycurv float32"]
            lines = floor_lines(shape, ours, rates)
            floors += [f"### ({shape})", "", *lines, ""]
            works = count(SHAPES[shape]).items()
            over = {phase: ours.cost(phase, "cpu") / rates.seconds(work) for phase, work in works}
        judged[shape] = figures(found[shape], over, settings.reference)
    write_figures(settings.figures, {"threads": settings.threads, "shapes": judged})
    versions = [runs.said[0]["versions"] for runs in next(iter(found.values())).values()]
    lines = [
        f"# Speed of raycurv and kronfluence, {settings.date}",
        "",
        f"    {command_line('speed.py', settings, Settings(Path()))}",
        "",
        f"- versions: {'; '.join(sorted({json.dumps(v)[1:-1] for v in versions}))}, Python "
        f"{platform.python_version()}",
        f"- raycurv's source: {state}",
        f"- machine: {processor()}; {settings.threads} threads; load average before {before}, "
        f"after {loads()}",
        "- ratios are raycurv's over kronfluence's: below 1 raycurv takes less",
        "",
        *summary_lines(settings, found),
        "",
    ]
    for shape, runs in found.items():
        lines += [f"## ({shape}) {SHAPES[shape].title}", "", "float32 against float32:", ""]
        lines += [*phase_lines(runs["raycurv float32"], runs["kronfluence float32"]), ""]
        if bergson := runs.get("bergson float32"):
            lines += [*phase_lines(runs["raycurv float32"], bergson, "bergson"), ""]
            both = agreement(runs["raycurv float32"], bergson)
            said = ", ".join(f"{1 - p:.1e}" for p in both)
            lines += [f"1 - Pearson of scores and of self with bergson's: {said}", ""]
        lines += [*mode_lines(runs), ""]
    if floors:
        lines += ["## Over the floor (float32)", "", *floors]
    settings.results.mkdir(parents=True, exist_ok=True)
    path = settings.results / f"{settings.date}-speed.md"
    path.write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Settings))
