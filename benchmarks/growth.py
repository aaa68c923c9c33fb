"""How time and memory grow: with tokens, examples, queries, rank, parameters and stages.

    fit, queries and scoring of a small model, one size at a time, each in a process of its own
    exponent = the slope of log(seconds or bytes) over log(size)
                                             ─► results/DATE-growth.md, two pictures beside it

Seconds are processor seconds of the passes themselves; what starting takes is left out, and so are
the eigendecompositions, which do not depend on the data. Memory is the highest of a phase less what
the process held before the first: what the libraries take does not grow.

Tokens grow in two ways, which are measured apart: with more examples of one length, where all work
is linear in the tokens, and with longer examples, where attention's grows with the square.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import numpy as np
import torch
import tyro
from clock import Clock, resident
from result_file import command_line, processor, source_state, table, write_figures

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MB = 1e6
LAYERS = 4
# What a job is like unless one of these is varied.
USUAL: dict[str, int] = {
    "width": 192, "tokens": 64, "examples": 32, "queries": 8, "rank": 16, "stages": 1,
}  # fmt: skip
BATCH_TOKENS = 1024
PHASES = ("fit", "queries", "scores")
# Seconds of all phases from which one run is enough: a warm start no longer shows.
LONG = 5.0
# Of one phase: what is measured, and how it is named.
TIME, MEMORY = "seconds", "memory"


@dataclass(frozen=True)
class Axis:
    """One size that is varied.

    Attributes:
        key: which.
        sizes: its values.
        phases: those that may depend on it.
        title: what it is called.
        unit: what one step of ``value`` is.
    """

    key: str
    sizes: tuple[int, ...]
    phases: tuple[str, ...]
    title: str
    unit: str

    def value(self, size: int) -> int:
        """What time is held against: tokens in all for examples, weights for a width."""
        if self.key == "examples":
            return size * USUAL["tokens"]
        if self.key == "width":
            return block_weights(size)
        return size

    def named(self, size: int) -> dict[str, str]:
        """The first columns of its row, the last of them the value."""
        own = {self.key: str(size)} if self.value(size) != size else {}
        return own | {self.unit: f"{self.value(size):,}"}


AXES = (
    Axis("examples", (16, 32, 64, 128, 256), ("fit", "scores"), "more examples", "tokens in all"),
    Axis("tokens", (32, 64, 128, 256, 512), PHASES, "longer examples", "tokens of an example"),
    Axis("queries", (8, 32, 128), ("queries", "scores"), "queries", "queries"),
    Axis("rank", (4, 16, 64), ("queries", "scores"), "rank", "rank"),
    Axis("width", (96, 192, 384), PHASES, "parameters", "weights of blocks"),
    Axis("stages", (1, 2, 4), PHASES, "stages in one process", "stages"),
)


@dataclass(frozen=True)
class Settings:
    """Measures fits and scorings of growing sizes."""

    axes: tuple[str, ...] = tuple(axis.key for axis in AXES)
    """Which sizes are varied."""
    repeats: int = 2
    """Runs of each in its process, of which the least counts; one of those that take long."""
    results: Path = RESULTS
    """Directory of the result file and its pictures."""
    figures: Path | None = None
    """JSON file for the figures that targets are judged by."""
    child: str = ""
    """For the processes that this one starts: what to measure, as JSON."""


def feed_forward(width: int) -> int:
    """Of the network of a width."""
    return width * 8 // 3


def block_weights(width: int) -> int:
    """Weights with curvature: four projections and three matrices of the feed-forward a layer."""
    return LAYERS * (4 * width**2 + 3 * width * feed_forward(width))


# One size, in a process of its own


def measure(place: Path, sizes: dict[str, int], repeats: int) -> dict[str, dict[str, float]]:
    """Of each phase processor seconds of its passes, and bytes above what was held before."""
    # Libraries that a job loads when it needs them would count as memory of the first phase.
    # pandas is what pyarrow looks for.
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import raycurv
    from raycurv.stages import pool
    from raycurv.stages.heap import give_back

    taken: list[float] = []
    inner = pool.timed

    def timed(actor: str, method: str, call: Any, args: Any) -> Any:
        started = time.process_time()
        found = inner(actor, method, call, args)
        if method in ("forward", "turn", "backward"):
            taken.append(time.process_time() - started)
        return found

    pool.timed = timed
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)

    def texts(count: int, prefix: str) -> list[dict[str, Any]]:
        ids = rng.integers(0, 250, (count, sizes["tokens"]))
        return [{"id": f"{prefix}{n}", "input_ids": row.tolist()} for n, row in enumerate(ids)]

    here: dict[str, Any] = {
        "address": "none", "quiet": True, "stages": sizes["stages"], "batch_tokens": BATCH_TOKENS,
    }  # fmt: skip
    model = str(place / f"model-{sizes['width']}")
    train, asked = texts(sizes["examples"], "train "), texts(sizes["queries"], "query ")
    held = resident()
    runs = []
    with TemporaryDirectory() as directory:
        for number in range(repeats):
            out, found, clock = Path(directory) / str(number), {}, Clock()
            for phase in PHASES:
                taken.clear()
                give_back()
                clock.begin(phase)
                if phase == "fit":
                    run = raycurv.fit(model, train, out / "run", **here)
                elif phase == "queries":
                    run.ihvp(asked, out / "ihvp", rank=sizes["rank"], **here)
                else:
                    run.influence(asked, train, out / "scores", rank=sizes["rank"], **here)
                clock.end()
                found[phase] = {TIME: sum(taken), MEMORY: clock.phases[phase].peak - held}
            runs.append(found)
            if sum(found[phase][TIME] for phase in PHASES) > LONG:
                break
    least = {p: {what: min(r[p][what] for r in runs) for what in (TIME, MEMORY)} for p in PHASES}
    # A scoring begins with the queries' products, as the phase before made them.
    least["scores"][TIME] -= least["queries"][TIME]
    return least


def in_child(place: Path, sizes: dict[str, int], repeats: int) -> dict[str, dict[str, float]]:
    """The same in a process of its own, on one thread.

    Raises:
        SystemExit: it failed; with its message.
    """
    told = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps([str(place), sizes, repeats])],
        capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if told.returncode:
        raise SystemExit(told.stderr)
    found: dict[str, dict[str, float]] = json.loads(told.stdout.splitlines()[-1])
    return found


def make_models(place: Path, widths: Sequence[int]) -> None:
    """Llama-shaped, random weights, bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for width in widths:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256, hidden_size=width, intermediate_size=feed_forward(width),
            num_hidden_layers=LAYERS, num_attention_heads=width // 32,
            num_key_value_heads=width // 32, max_position_embeddings=1024,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(place / f"model-{width}")


# What was found


@dataclass(frozen=True)
class Curve:
    """One phase's seconds or bytes along an axis."""

    values: tuple[int, ...]
    taken: tuple[float, ...]

    @property
    def exponent(self) -> float:
        """p of ``taken ∝ value^p``: least squares on logarithms."""
        x, y = np.log(self.values), np.log(np.maximum(self.taken, 1e-9))
        return float(np.polyfit(x, y, 1)[0])

    @property
    def last(self) -> float:
        """The same of the two largest sizes, where what is constant counts least."""
        return Curve(self.values[-2:], self.taken[-2:]).exponent


# What was measured at a size: phase -> seconds, memory.
Measured = dict[str, dict[str, float]]


def curve(axis: Axis, found: dict[int, Measured], phase: str, what: str) -> Curve:
    """Of a phase along an axis."""
    return Curve(
        tuple(map(axis.value, axis.sizes)), tuple(found[size][phase][what] for size in axis.sizes)
    )


def axis_lines(axis: Axis, found: dict[int, Measured]) -> list[str]:
    """The table of one axis, its exponents below."""
    titles = [f"{phase}, {unit}" for unit in ("CPU s", "MB") for phase in PHASES]
    rows = []
    for size in axis.sizes:
        one = found[size]
        seconds = [f"{one[phase][TIME]:.2f}" for phase in PHASES]
        memory = [f"{one[phase][MEMORY] / MB:.0f}" for phase in PHASES]
        rows.append([*axis.named(size).values(), *seconds, *memory])
    for name in ("exponent", "of the last two"):
        cells = []
        for what in (TIME, MEMORY):
            for phase in PHASES:
                made = curve(axis, found, phase, what)
                slope = made.exponent if name == "exponent" else made.last
                cells.append(f"{slope:.2f}" if phase in axis.phases else "")
        rows.append([name, *[""] * (len(axis.named(size)) - 1), *cells])
    header = [*axis.named(size), *titles]
    return [f"## {axis.title.capitalize()}", "", *table(header, rows), ""]


def picture(axes: Sequence[Axis], found: dict[str, dict[int, Measured]], what: str) -> Any:
    """Seconds or bytes against each size, logarithmic, with the lines that were fitted."""
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = -(-len(axes) // 3)
    figure, plots = pyplot.subplots(
        rows, 3, figsize=(12, 3.6 * rows), layout="constrained", squeeze=False
    )
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for plot in plots.flat[len(axes) :]:
        plot.set_visible(False)
    for plot, axis in zip(plots.flat, axes, strict=False):
        for colour, (phase, marker) in enumerate(zip(PHASES, "os^", strict=True)):
            if phase not in axis.phases:
                continue
            made = curve(axis, found[axis.key], phase, what)
            x = np.array(made.values, dtype=float)
            y = np.array(made.taken) / (MB if what == MEMORY else 1)
            shift = np.mean(np.log(np.maximum(y, 1e-9)) - made.exponent * np.log(x))
            label = f"{phase}: size^{made.exponent:.2f}"
            plot.plot(x, y, marker, color=f"C{colour}", label=label)
            plot.plot(x, np.exp(shift) * x**made.exponent, "--", color=f"C{colour}", linewidth=1)
        plot.set_xscale("log")
        plot.set_yscale("log")
        sizes = [axis.value(size) for size in axis.sizes]
        plot.set_xticks(sizes, [f"{s:,}" if s < 1e5 else f"{s / 1e6:.1f} M" for s in sizes])
        plot.xaxis.set_minor_formatter(NullFormatter())
        plot.xaxis.set_tick_params(which="minor", length=0)
        low, high = plot.get_ylim()
        middle = (low * high) ** 0.5
        if high < 4 * low:  # what hardly grows should look so
            plot.set_ylim(middle / 2, middle * 2)
        low, high = plot.get_ylim()
        steps = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 7)
        ticks = [step * 10.0**k for k in range(-3, 6) for step in steps]
        plot.set_yticks([t for t in ticks if low <= t <= high])
        plot.yaxis.set_major_formatter(plain)
        plot.yaxis.set_minor_formatter(NullFormatter())
        plot.yaxis.set_tick_params(which="minor", length=0)
        plot.set_title(axis.title, fontsize=11)
        plot.set_xlabel(axis.unit)
        plot.set_ylabel("processor seconds" if what == TIME else "MB above imports")
        plot.grid(True, which="major", alpha=0.3)
        plot.legend(fontsize=9)
    return figure


def write(settings: Settings, found: dict[str, dict[int, Measured]], facts: list[str]) -> None:
    """The tables, the pictures and the figures."""
    name = f"{date.today()}-growth"
    axes = [axis for axis in AXES if axis.key in found]
    lines = [
        f"# How time and memory grow, {date.today()}",
        "",
        f"    {command_line('growth.py', settings, Settings())}",
        "",
        *facts,
        "",
    ]
    for axis in axes:
        lines += axis_lines(axis, found[axis.key])
    settings.results.mkdir(parents=True, exist_ok=True)
    for what in (TIME, MEMORY):
        figure = picture(axes, found, what)
        figure.savefig(settings.results / f"{name}-{what}.png", dpi=110)
        lines += [f"![{what} against sizes]({name}-{what}.png)", ""]
    (settings.results / f"{name}.md").write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))
    exponents = {
        axis.key: {
            what: {p: curve(axis, found[axis.key], p, what).exponent for p in axis.phases}
            for what in (TIME, MEMORY)
        }
        for axis in axes
    }
    write_figures(settings.figures, {"exponents": exponents})


def main(settings: Settings) -> None:
    """Measure every size, print and write the report."""
    if settings.child:
        place, sizes, repeats = json.loads(settings.child)
        print(json.dumps(measure(Path(place), sizes, repeats)))
        return
    started, state = time.perf_counter(), source_state()
    chosen = [axis for axis in AXES if axis.key in settings.axes]
    found: dict[str, dict[int, Measured]] = {}
    known: dict[str, Measured] = {}  # where two axes meet, one measurement serves both
    with TemporaryDirectory() as directory:
        place = Path(directory)
        widths = {USUAL["width"], *(s for a in chosen if a.key == "width" for s in a.sizes)}
        make_models(place, sorted(widths))
        for axis in chosen:
            for size in axis.sizes:
                sizes = USUAL | {axis.key: size}
                key = json.dumps(sizes)
                if key not in known:
                    known[key] = in_child(place, sizes, settings.repeats)
                one = found.setdefault(axis.key, {})[size] = known[key]
                said = ", ".join(f"{p} {one[p][TIME]:.2f} s" for p in PHASES)
                print(f"{axis.key} {size}: {said}", flush=True)
    usual = ", ".join(f"{key} {value}" for key, value in USUAL.items())
    facts = [
        f"- torch {torch.__version__}; {processor()}, one thread",
        f"- raycurv's source: {state}",
        f"- float32; a Llama-shaped model of {LAYERS} layers; {usual} unless varied; "
        f"microbatches of {BATCH_TOKENS} tokens",
        f"- processor seconds of the passes, and a phase's peak memory less what was held before "
        f"the first; the least of {settings.repeats} runs",
        "- exponent: the slope of a line through all points on logarithmic axes, over the column "
        "before the seconds",
        f"- {time.perf_counter() - started:.0f} s in all",
    ]
    write(replace(settings, child=""), found, facts)


if __name__ == "__main__":
    main(tyro.cli(Settings))
