"""A timeline as lanes, one an actor: what it did when, and how long it waited.

Seconds count from the first row of the whole timeline.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pyarrow as pa

from raycurv.driver.timeline_table import DIRECTORY
from raycurv.errors import UserError
from raycurv.files.store import Store
from raycurv.files.tables import TIMELINE, read_directory
from raycurv.stages.spans import actor_order

Interval = tuple[float, float]


@dataclass(frozen=True)
class Bar:
    """One operation.

    Attributes:
        operation: what.
        start, end: seconds.
        microbatch: which, -1 for none.
        transport: seconds of it.
        note: more about it.
    """

    operation: str
    start: float
    end: float
    microbatch: int = -1
    transport: float = 0.0
    note: str = ""


@dataclass
class Lane:
    """What one actor did, in the order of time; or some of the tasks, which do not overlap.

    Attributes:
        name: of the actor.
        task: whether these are tasks.
        bars: its operations.
        lost: when it died, and at what.
        rebuilt: from its death until it was there again.
    """

    name: str
    task: bool = False
    bars: list[Bar] = field(default_factory=list)
    lost: list[Bar] = field(default_factory=list)
    rebuilt: list[Bar] = field(default_factory=list)


@dataclass(frozen=True)
class Stretch:
    """A time in which a phase went on."""

    phase: str
    start: float
    end: float


@dataclass(frozen=True)
class Share:
    """Where an actor's time went, in seconds; of tasks, of all together.

    Attributes:
        actor: its name; ``tasks``.
        compute: in operations, less transport.
        transport: taking in and giving out tensors.
        rebuilding: from its death until it worked again.
        waiting: the rest.
        lost: how often it died.
        lanes: how many there are of it at a time.
    """

    actor: str
    compute: float
    transport: float
    rebuilding: float
    waiting: float
    lost: int
    lanes: int = 1

    @property
    def busy(self) -> float:
        """Compute and transport, as a share of all its seconds."""
        worked = self.compute + self.transport
        return worked / max(worked + self.rebuilding + self.waiting, 1e-9)


@dataclass(frozen=True)
class Lanes:
    """What is to be seen of a timeline.

    Attributes:
        lanes: actors in their order, tasks below.
        stretches: of phases, in the order of time.
        window: the times that are shown; several where phases were chosen.
    """

    lanes: tuple[Lane, ...]
    stretches: tuple[Stretch, ...]
    window: tuple[Interval, ...]

    @property
    def start(self) -> float:
        """Of what is shown."""
        return self.window[0][0]

    @property
    def end(self) -> float:
        """Of what is shown."""
        return self.window[-1][1]

    def shares(self, window: Sequence[Interval] | None = None) -> list[Share]:
        """Where the time of every actor went, that of all tasks in one.

        Args:
            window: in these times; in all that is shown by default.
        """
        window = self.window if window is None else window
        actors = [_share(lane, window) for lane in self.lanes if not lane.task]
        tasks = [_share(lane, window) for lane in self.lanes if lane.task]
        if tasks:
            total = {name: sum(getattr(s, name) for s in tasks) for name in _SECONDS}
            lost = sum(s.lost for s in tasks)
            actors.append(Share("tasks", **total, lost=lost, lanes=len(tasks)))
        return actors

    def phases(self) -> dict[str, list[Interval]]:
        """Phase -> when it went on, within what is shown."""
        found: dict[str, list[Interval]] = {}
        for one in self.stretches:
            found.setdefault(one.phase, []).append((one.start, one.end))
        cut = {phase: _common(union(times), self.window) for phase, times in found.items()}
        return {phase: times for phase, times in cut.items() if times}


_SECONDS = ("compute", "transport", "rebuilding", "waiting")


def read_lanes(
    store: Store,
    phases: Sequence[str] = (),
    start: float | None = None,
    end: float | None = None,
) -> Lanes:
    """The lanes of a run directory's timeline.

    Args:
        store: of the run.
        phases: only these; all by default.
        start, end: only what goes on between these seconds.

    Raises:
        UserError: there is no timeline, no such phase, or nothing in that time.
        DamagedFile: a file of the timeline is not whole.
    """
    table = read_directory(store, DIRECTORY, TIMELINE)
    if not len(table):
        raise UserError(
            store.path(DIRECTORY), "the timeline of a run", "none",
            "Give the --out of a fit or a scoring that has begun to compute.",
        )  # fmt: skip
    rows = _rows(table)
    stretches = _stretches(rows)
    known = list(dict.fromkeys(one.phase for one in stretches))
    for phase in phases:
        if phase not in known:
            raise UserError("--phase", f"one of {', '.join(map(repr, known))}", repr(phase), "")
    last = max(row["end"] for row in rows)
    limits = (0.0 if start is None else start, last if end is None else end)
    shown = [one for one in stretches if not phases or one.phase in phases]
    if phases:
        rows = [row for row in rows if row["phase"] in phases]
        window = _common(union((one.start, one.end) for one in shown), [limits])
    else:
        window = _common([(0.0, last)], [limits])
    rows = [row for row in rows if row["end"] >= limits[0] and row["start"] <= limits[1]]
    if not rows or not window:
        raise UserError(
            "--from, --to", f"a time in which something was done, up to {last:.1f} s",
            f"{limits[0]:g} s to {limits[1]:g} s", "",
        )  # fmt: skip
    shown = [one for one in shown if one.end >= limits[0] and one.start <= limits[1]]
    return Lanes(tuple(_lanes(rows)), tuple(shown), tuple(window))


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    wanted = ["phase", "actor", "operation", "microbatch", "transport", "note"]
    rows: list[dict[str, Any]] = table.select(wanted).to_pylist()
    times = [table[name].cast(pa.int64()).to_numpy() / 1e6 for name in ("start", "end")]
    first = float(times[0].min())
    for row, start, end in zip(rows, *times, strict=True):
        row["start"], row["end"] = float(start) - first, float(end) - first
    return rows


def _stretches(rows: Sequence[dict[str, Any]]) -> list[Stretch]:
    """Rows are written at a phase's end and at its commits: so those of one stand together."""
    found = []
    for phase, group in groupby(rows, key=lambda row: row["phase"]):
        mine = list(group)
        if phase:
            start, end = min(row["start"] for row in mine), max(row["end"] for row in mine)
            found.append(Stretch(phase, start, end))
    return sorted(found, key=lambda one: one.start)


def _lanes(rows: Sequence[dict[str, Any]]) -> list[Lane]:
    lanes: dict[str, Lane] = {}
    tasks: list[Bar] = []
    lost_tasks: list[Bar] = []
    for row in sorted(rows, key=lambda row: (row["start"], row["end"])):
        bar = Bar(
            row["operation"], row["start"], row["end"], row["microbatch"], row["transport"],
            row["note"],
        )  # fmt: skip
        if row["actor"] == "task":
            (lost_tasks if bar.operation == "lost" else tasks).append(bar)
            continue
        lane = lanes.setdefault(row["actor"], Lane(row["actor"]))
        where = {"lost": lane.lost, "rebuild": lane.rebuilt}.get(bar.operation, lane.bars)
        where.append(bar)
    packed = _packed(tasks) or ([Lane("task 1", task=True)] if lost_tasks else [])
    for bar in lost_tasks:
        packed[0].lost.append(bar)
    return [lanes[name] for name in sorted(lanes, key=actor_order)] + packed


def _packed(tasks: Sequence[Bar]) -> list[Lane]:
    """Tasks in as few lanes as there are at a time."""
    lanes: list[Lane] = []
    free: list[tuple[float, int]] = []
    for bar in tasks:
        if free and free[0][0] <= bar.start:
            _, number = heapq.heappop(free)
        else:
            number = len(lanes)
            lanes.append(Lane(f"task {number + 1}", task=True))
        lanes[number].bars.append(bar)
        heapq.heappush(free, (bar.end, number))
    return lanes


def _share(lane: Lane, window: Sequence[Interval]) -> Share:
    compute = transport = 0.0
    for bar in lane.bars:
        inside = length(_common([(bar.start, bar.end)], window))
        part = inside / (bar.end - bar.start) if bar.end > bar.start else 0.0
        compute += inside - bar.transport * part
        transport += bar.transport * part
    busy = _common(union((bar.start, bar.end) for bar in lane.bars), window)
    down = _common(union((bar.start, bar.end) for bar in lane.rebuilt), window)
    # What a new actor loads is part of its rebuilding, and counts as work.
    rebuilding = length(down) - length(_common(busy, down))
    waiting = length(window) - length(busy) - rebuilding
    died = sum(any(a <= bar.start <= b for a, b in window) for bar in lane.lost)
    return Share(lane.name, compute, transport, rebuilding, max(0.0, waiting), died)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times without overlaps, ascending."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _common(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """Times in both; each ascending, without overlaps."""
    found, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            found.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(intervals: Sequence[Interval]) -> float:
    """Seconds of times that do not overlap."""
    return sum(end - start for start, end in intervals)
