"""The timeline of a run as lanes, one an actor, and where the time of each went.

Seconds count from the first operation of the whole timeline.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import pyarrow as pa

from raycurv.driver.timeline_table import DIRECTORY
from raycurv.errors import UserError
from raycurv.files.store import Store
from raycurv.files.tables import TIMELINE, read_directory
from raycurv.progress.streams import printable
from raycurv.stages.spans import Span, actor_order

Interval = tuple[float, float]
_FILLED = ("phase", "actor", "operation", "start", "end", "transport")
SECONDS = ("compute", "transport", "rebuilding", "waiting")


@dataclass
class Lane:
    """One actor, or tasks that do not overlap.

    Attributes:
        name: of the actor; ``task 1`` and so on of tasks.
        work: what it did, in the order of time.
        failures: where it was lost and rebuilt, likewise.
    """

    name: str
    task: bool = False
    work: list[Span] = field(default_factory=list)
    failures: list[Span] = field(default_factory=list)


@dataclass(frozen=True)
class Share:
    """Where an actor's time went, in seconds; of tasks, of all together.

    Attributes:
        actor: its name; ``tasks`` for all tasks.
        compute: in operations, less transport.
        transport: taking in and giving out tensors.
        rebuilding: from its death until it worked again.
        waiting: the rest.
        lost: how often it died.
        at_a_time: how many of it there are: of tasks, how many lanes.
    """

    actor: str
    compute: float
    transport: float
    rebuilding: float
    waiting: float
    lost: int
    at_a_time: int = 1

    @property
    def busy(self) -> float:
        """Compute and transport, as a share of all its seconds."""
        worked = self.compute + self.transport
        return worked / max(worked + self.rebuilding + self.waiting, 1e-9)


@dataclass(frozen=True)
class Lanes:
    """The part of a timeline that is to be seen.

    Attributes:
        lanes: actors in their order, tasks below.
        phases: phase -> when it went on, in the order of time.
        window: the times that are shown; several where phases were chosen.
    """

    lanes: tuple[Lane, ...]
    phases: dict[str, list[Interval]]
    window: list[Interval]

    @property
    def start(self) -> float:
        """Where what is shown begins."""
        return self.window[0][0]

    @property
    def end(self) -> float:
        """Where what is shown ends."""
        return self.window[-1][1]

    def shares(self, window: Sequence[Interval] | None = None) -> list[Share]:
        """Where the time of every actor went, that of all tasks in one; within a window, or in all
        that is shown."""
        window = self.window if window is None else window
        actors = [_share(lane, window) for lane in self.lanes if not lane.task]
        tasks = [_share(lane, window) for lane in self.lanes if lane.task]
        if tasks:
            total = {name: sum(getattr(s, name) for s in tasks) for name in SECONDS}
            lost = sum(s.lost for s in tasks)
            actors.append(Share("tasks", **total, lost=lost, at_a_time=len(tasks)))
        return actors


def read_lanes(
    store: Store, phases: Sequence[str] = (), start: float | None = None, end: float | None = None
) -> Lanes:
    """The lanes of a run directory's timeline.

    Args:
        phases: only these; all by default.
        start, end: only what goes on between these seconds.

    Raises:
        UserError: there is no timeline, no such phase, or nothing in that time.
        DamagedFile: a file of the timeline is not whole.
    """
    table = read_directory(store, DIRECTORY, TIMELINE, needed=True, filled=_FILLED)
    if not len(table):
        raise UserError(
            store.path(DIRECTORY), "the timeline of a run", "none",
            "Give the --out of a fit or a scoring that has begun to compute.",
        )  # fmt: skip
    rows = _rows(table)
    known = _stretches(rows)
    for phase in phases:
        if phase not in known:
            raise UserError("--phase", f"one of {', '.join(map(repr, known))}", repr(phase), "")
    last = max(span.end for _, span in rows)
    low, high = 0.0 if start is None else start, last if end is None else end
    window = cut([(0.0, last)], [(low, high)])
    if phases:
        known = {phase: times for phase, times in known.items() if phase in phases}
        rows = [row for row in rows if row[0] in phases]
        window = cut(union(time for times in known.values() for time in times), window)
    spans = [span for _, span in rows if span.end >= low and span.start <= high]
    if not spans or not window:
        raise UserError(
            "--from, --to", f"a time in which something was done, up to {last:.1f} s",
            f"{low:g} s to {high:g} s", "",
        )  # fmt: skip
    shown = {phase: cut(times, window) for phase, times in known.items()}
    return Lanes(_lanes(spans), {phase: t for phase, t in shown.items() if t}, window)


def _rows(table: pa.Table) -> list[tuple[str, Span]]:
    """Phase and span of each row."""
    times = {name: table[name].cast(pa.int64()) for name in ("start", "end")}
    rows = pa.table({name: table[name] for name in TIMELINE.names} | times).to_pylist()
    first = min(row["start"] for row in rows)
    for row in rows:
        row |= {name: (row[name] - first) / 1e6 for name in times}
    for row in rows:
        # Texts from the file are shown in a terminal, a picture and a page.
        row |= {name: printable(text) for name, text in row.items() if isinstance(text, str)}
    return [(row.pop("phase"), Span(**row)) for row in rows]


def _stretches(rows: Sequence[tuple[str, Span]]) -> dict[str, list[Interval]]:
    """When each phase went on: its rows are written at its end and at its commits, and so stand
    together."""
    stretches = []
    for phase, group in groupby(rows, key=lambda row: row[0]):
        mine = [span for _, span in group]
        if phase:
            stretches.append((min(s.start for s in mine), max(s.end for s in mine), phase))
    found: dict[str, list[Interval]] = {}
    for start, end, phase in sorted(stretches):
        found.setdefault(phase, []).append((start, end))
    return {phase: union(times) for phase, times in found.items()}


def _lanes(spans: Sequence[Span]) -> tuple[Lane, ...]:
    """A lane an actor, and as few of tasks as there are at a time: lost ones are in the first."""
    lanes: dict[str, Lane] = {}
    free: list[tuple[float, str]] = []
    count = 0
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        name, task = span.actor, span.actor == "task"
        if task and span.failure:
            name = "task 1"
        elif task:
            if free and free[0][0] <= span.start:
                _, name = heapq.heappop(free)
            else:
                count += 1
                name = f"task {count}"
            heapq.heappush(free, (span.end, name))
        lane = lanes.setdefault(name, Lane(name, task))
        (lane.failures if span.failure else lane.work).append(span)
    return tuple(sorted(lanes.values(), key=lambda lane: (lane.task, actor_order(lane.name))))


def _share(lane: Lane, window: Sequence[Interval]) -> Share:
    compute = transport = 0.0
    shown = []
    for place, (start, end) in _parts([(span.start, span.end) for span in lane.work], window):
        span = lane.work[place]
        carried = span.transport * (end - start) / (span.end - span.start)
        compute += end - start - carried
        transport += carried
        shown.append((start, end))
    rebuilt = [(s.start, s.end) for s in lane.failures if s.operation == "rebuild"]
    busy, down = union(shown), cut(union(rebuilt), window)
    # What a new actor loads is part of its rebuilding, and counts as work.
    rebuilding = _length(down) - _length(cut(busy, down))
    waiting = max(0.0, _length(window) - _length(busy) - rebuilding)
    lost = [span.start for span in lane.failures if span.operation == "lost"]
    died = sum(any(a <= time <= b for a, b in window) for time in lost)
    return Share(lane.name, compute, transport, rebuilding, waiting, died)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times without overlaps, ascending."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def cut(times: Sequence[Interval], window: Sequence[Interval]) -> list[Interval]:
    """What of some times lies in a window; both ascending, without overlaps."""
    return [part for _, part in _parts(times, window)]


def _parts(times: Sequence[Interval], window: Sequence[Interval]) -> Iterator[tuple[int, Interval]]:
    """As :func:`cut`, each part with the place in ``times`` of what it is a part of."""
    i = j = 0
    while i < len(times) and j < len(window):
        start, end = max(times[i][0], window[j][0]), min(times[i][1], window[j][1])
        if start < end:
            yield i, (start, end)
        if times[i][1] < window[j][1]:
            i += 1
        else:
            j += 1


def _length(times: Sequence[Interval]) -> float:
    """Seconds of times that do not overlap."""
    return sum(end - start for start, end in times)
