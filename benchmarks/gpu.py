"""Proves and measures raycurv on a GPU, in one command and less than eight minutes.

    python benchmarks/gpu.py --out DIR                          on a machine with a GPU
    python benchmarks/gpu.py --out DIR --device cpu --small     all of it anywhere, in seconds

Writes DIR/gpu.json and DIR/gpu.md anew with every number that arrives, so that whatever ends it
early loses nothing. Needs neither Ray nor a network. A part is a process of its own: what it breaks
(a GPU's context, say) is broken for no other, its settings and peaks are its own, and it is ended
when the time is over. A part that would not fit into the time left is skipped, and says so; so is
one whose packages are not installed. This file itself needs nothing but Python.

The exit code is 1 when a part failed or lacked a package, and 0 when parts were left out for time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

# Whether it is installed or not, raycurv is this checkout's.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from result_file import processor, source_state, table

# What is imported, and the package that brings it.
_MATHEMATICS = ("torch", "numpy")
_JOBS = (
    *_MATHEMATICS, "pyarrow", "safetensors", "transformers", "threadpoolctl", "rich", "tyro",
    "docstring_parser", "typeguard",
)  # fmt: skip

PUBLISHED = (
    "For comparison, published, one H200, the same workload in float32: kronfluence 69 s to fit "
    "and 16 s to score, 13 GB; bergson 0.26.1 113 s, 18 GB."
)
# Decoder layers of the Qwen2.5-0.5B shape, and fewer where the time is short.
LAYERS = (24, 12, 6)
# Of a fit and a scoring of that shape in one mode, until one was measured: for each layer, beside.
_LAYER_SECONDS, _MODEL_SECONDS = 9.0, 30.0
# What parts import, for a process that they are forked from.
_PREPARED = ("gpu_kernels", "gpu_links", "gpu_fits", "transformers.models.qwen2.modeling_qwen2")
# Between the end of a part and that of the time: for what it takes to end it.
_MARGIN = 3.0


@dataclass(frozen=True)
class Part:
    """A part of the run.

    Attributes:
        name: of it.
        title: for the result file.
        function: ``module:name``, called with a :class:`Place` and a :class:`Notes`.
        seconds: it is not begun with less time left.
        most: seconds after which it is ended, to leave time for others; ``None`` for the rest.
        needs: modules that it imports.
        mode: of arithmetic, for a part that there is one of for each.
    """

    name: str
    title: str
    function: str
    seconds: float
    most: float | None = None
    needs: tuple[str, ...] = _JOBS
    mode: str = ""


@dataclass(frozen=True)
class Place:
    """Where a part works.

    Attributes:
        device: ``cuda`` or ``cpu``.
        small: with sizes that mean nothing.
        seconds: left when it began, at most.
        directory: for files, shared with the other parts.
        mode: of arithmetic.
        layers: of the model, for a part that fits one.
    """

    device: str
    small: bool
    seconds: float
    directory: str
    mode: str = ""
    layers: int = 0


class Notes:
    """What a part has to say, which goes to the result files at once."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def row(self, table: str, **found: Any) -> None:
        """One row of a table: column -> value."""
        self._pipe.send(("row", (table, found)))

    def at(self, text: str) -> None:
        """What it is doing, in case it is ended there."""
        self._pipe.send(("at", text))


PARTS = (
    Part("machine", "Machine", "gpu_kernels:machine", 10, 60, _MATHEMATICS),
    Part("stages", "Stages on the device", "gpu_fits:stages", 60, 120),
    Part("links", "Links between processes", "gpu_links:links", 30, 60, _MATHEMATICS),
    Part("float32", "Qwen2.5-0.5B shape, float32", "gpu_fits:shape", 60, 330, mode="float32"),
    Part("throughput", "Covariance throughput", "gpu_kernels:throughput", 20, 40, _MATHEMATICS),
    Part("eigh", "Eigendecompositions", "gpu_kernels:decompositions", 20, 75, _MATHEMATICS),
    Part("tf32", "Qwen2.5-0.5B shape, float32 with tf32", "gpu_fits:shape", 60, mode="tf32"),
    Part("bfloat16", "Qwen2.5-0.5B shape, bfloat16", "gpu_fits:shape", 60, mode="bfloat16"),
)

Outcome = Literal["done", "failed", "stopped", "skipped", "lacking"]


@dataclass
class Found:
    """What became of a part.

    Attributes:
        title: of the part.
        outcome: ``stopped`` when the time was over, ``lacking`` without a package that it needs.
        reason: of any outcome but ``done``.
        seconds: that it took.
        layers: of the model that it fitted, if it did.
        tables: title -> rows, in the order in which they were found.
    """

    title: str
    outcome: Outcome = "skipped"
    reason: str = "not begun yet"
    seconds: float = 0.0
    layers: int = 0
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


class Run:
    """All parts, one after the other, and the two result files.

    Args:
        out: their directory.
        device: ``cuda`` or ``cpu``.
        small: with sizes that mean nothing.
        seconds: for everything.
        parts: the most valuable first.
        work: where the files of fits go while they run; by default where temporary files do.
    """

    def __init__(
        self,
        out: Path,
        device: str,
        small: bool,
        seconds: float,
        parts: Sequence[Part] = PARTS,
        work: Path | None = None,
    ) -> None:
        self._out, self._device, self._small, self._parts = out, device, small, parts
        self._began, self._seconds, self._work = time.monotonic(), seconds, work
        # Forked, a part has what was imported before; what torch knows of a GPU does not bear it.
        self._context: Any = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
        self.found = {part.name: Found(part.title) for part in parts}
        self._source = source_state()

    @property
    def left(self) -> float:
        """Seconds."""
        return self._seconds - (time.monotonic() - self._began)

    def go(self) -> int:
        """Run all parts; gives the exit code."""
        self._out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="raycurv-gpu-", dir=self._work) as directory:
            for part in self._parts:
                self._one(part, directory)
                found = self.found[part.name]
                print(f"{part.name}: {found.outcome}, {found.seconds:.1f} s {found.reason}")
                sys.stdout.flush()
        self._write()
        bad = {"failed", "lacking"}
        return 1 if any(found.outcome in bad for found in self.found.values()) else 0

    def _one(self, part: Part, directory: str) -> None:
        found = self.found[part.name]
        lacking = _absent(part.needs)
        if lacking:
            found.outcome, found.reason = "lacking", _lacking(lacking)
            self._write()
            return
        machine = self.found.get("machine", found)
        if machine.outcome == "failed":
            found.reason = f"there is nothing to run on: {machine.reason}"
            self._write()
            return
        left, wanted = self.left - _MARGIN, part.seconds
        if self._small:
            wanted = min(wanted, 1.0)
        elif part.mode:
            found.layers, wanted = self._layers(left)
        if left < wanted:
            found.reason = f"{max(left, 0):.0f} s were left, and it takes {wanted:.0f} s"
            self._write()
            return
        place = Place(
            self._device, self._small, min(left, part.most or left), directory, part.mode,
            found.layers,
        )  # fmt: skip
        self._follow(part, place)
        self._write()

    def _layers(self, left: float) -> tuple[int, float]:
        """How many layers fit into the time, or the fewest, and the seconds that these take."""
        each = [
            (found.seconds - _MODEL_SECONDS / 2) / found.layers
            for found in self.found.values()
            if found.layers and found.outcome in ("done", "stopped") and found.seconds
        ]
        slowest = max(each, default=_LAYER_SECONDS)
        takes = [(layers, _MODEL_SECONDS + slowest * layers) for layers in LAYERS]
        return next((one for one in takes if one[1] <= left), takes[-1])

    def _follow(self, part: Part, place: Place) -> None:
        """Run a part in a process of its own, and write down what it says."""
        found = self.found[part.name]
        found.outcome, found.reason = "stopped", "begun, and the run ended before it"
        self._write()
        mine, its = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_work, args=(part, place, its))
        began = time.monotonic()
        process.start()
        its.close()
        at = "beginning"
        while True:
            rest = began + place.seconds - time.monotonic()
            if rest <= 0 or not mine.poll(rest):
                found.outcome = "stopped"
                found.reason = f"the time was over ({place.seconds:.0f} s), at: {at}"
                break
            try:
                kind, content = mine.recv()
            except EOFError:
                process.join(_MARGIN)
                found.outcome = "failed"
                found.reason = f"its process ended ({process.exitcode}) at: {at}"
                break
            found.seconds = round(time.monotonic() - began, 3)
            if kind == "row":
                table, row = content
                found.tables.setdefault(table, []).append(row)
                self._write()
            elif kind == "at":
                at = content
            else:
                found.outcome, found.reason = kind, content
                break
        found.seconds = round(time.monotonic() - began, 3)
        process.join(_MARGIN if found.outcome == "done" else 0)
        # Its own processes, too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()

    def _write(self) -> None:
        said = {
            "device": self._device,
            "small": self._small,
            "date": time.strftime("%Y-%m-%d"),
            "source": self._source,
            "processor": processor(),
            "budget_seconds": self._seconds,
            "seconds": round(self._seconds - self.left, 3),
            "published": PUBLISHED,
            "parts": {name: asdict(found) for name, found in self.found.items()},
        }
        for name, text in (
            ("gpu.json", json.dumps(said, indent=1) + "\n"),
            ("gpu.md", "\n".join(self._lines()) + "\n"),
        ):
            part = self._out / f"{name}.part"
            part.write_text(text)
            part.replace(self._out / name)

    def _lines(self) -> list[str]:
        small = ", at sizes that mean nothing" if self._small else ""
        lines = [
            f"# raycurv on {self._device}{small}",
            "",
            f"{time.strftime('%Y-%m-%d')}; {self._seconds - self.left:.0f} s of at most "
            f"{self._seconds:.0f} s; {processor()}; raycurv {self._source}.",
            "",
            PUBLISHED,
        ]
        for found in self.found.values():
            told = f": {found.reason}" if found.reason else ""
            layers = f", {found.layers} layers of {LAYERS[0]}" if found.layers else ""
            lines += ["", f"## {found.title}", ""]
            lines += [f"**{found.outcome}**, {found.seconds:.1f} s{layers}{told}".rstrip()]
            for title, rows in found.tables.items():
                lines += ["", f"{title}:", "", *_table(rows)]
        return lines


def _work(part: Part, place: Place, pipe: Connection) -> None:
    """What a part's process does."""
    os.setpgid(0, 0)
    os.environ["HF_HUB_OFFLINE"] = "1"
    before = set(sys.modules)  # a fork has what its parent had
    try:
        module, _, name = part.function.partition(":")
        getattr(importlib.import_module(module), name)(place, Notes(pipe))
        assert "ray" not in sys.modules.keys() - before, "Ray was imported"
    except BaseException as error:
        traceback.print_exc()
        pipe.send(("failed", f"{type(error).__name__}: {error}"))
    else:
        pipe.send(("done", ""))


def _absent(modules: Sequence[str]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def _prepare() -> None:
    """Import what parts will, which takes longer than a small one: with one thread, since others
    would be missing in a fork."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in _PREPARED:
        importlib.import_module(name)
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(threads))


def _lacking(modules: Sequence[str]) -> str:
    names = " ".join(modules).replace("_", "-")
    return (
        f"not installed: {names}. Where there is a network, pip download them as wheels; here, "
        f"pip install --no-index --no-deps --target SITE those, and PYTHONPATH=SITE."
    )


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A Markdown table of rows, whose columns are all that any of them has."""
    header = list(dict.fromkeys(column for row in rows for column in row))
    return table(header, [[_cell(row.get(column)) for column in header] for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the result files")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try all of it")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--work", type=Path, help="for files of 20 GB while it runs")
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="only these")
    chosen = parser.parse_args(arguments)
    parts = [part for part in PARTS if part.name in chosen.parts]
    if chosen.device == "cpu" and not _absent(_JOBS):
        _prepare()
    return Run(
        chosen.out, chosen.device, chosen.small, 60 * chosen.minutes, parts, chosen.work
    ).go()


if __name__ == "__main__":
    sys.exit(main())
