"""A timeline in the Trace Event format, which ui.perfetto.dev and chrome://tracing open.

    phases     a process, a thread a phase
    a node     a process, a thread an actor, a counter of each actor's memory

Operations are complete events; losses and rebuildings are instant events of their actor.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raycurv.jobs.timeline.lanes import Lanes
from raycurv.stages.spans import Span


def write_trace(lanes: Lanes, path: str) -> None:
    """Write :func:`trace_events` as JSON, compressed where ``path`` ends in .gz."""
    trace = {"displayTimeUnit": "ms", "traceEvents": trace_events(lanes)}
    text = json.dumps(trace, ensure_ascii=False, separators=(",", ":")).encode()
    Path(path).write_bytes(gzip.compress(text, mtime=0) if path.endswith(".gz") else text)


def trace_events(lanes: Lanes) -> list[dict[str, Any]]:
    """The events, with times in whole microseconds from the first operation of the timeline.

    Operations are those that the lanes show, whole even where the window cuts them.
    """
    # Process and thread -> numbers. None is used twice: viewers take a thread of its process'
    # number for the main one.
    numbers: dict[tuple[str, ...], int] = {}
    events = []
    for process, thread, event in (*_phases(lanes), *_operations(lanes)):
        for kind, track in (("process_name", (process,)), ("thread_name", (process, thread))):
            if track not in numbers:
                numbers[track] = len(numbers) + 1
                named = {"ph": "M", "name": kind, "args": {"name": track[-1]}}
                events.append(named | {"pid": numbers[process,], "tid": numbers[track]})
        events.append(event | {"pid": numbers[process,], "tid": numbers[process, thread]})
    return events


def _phases(lanes: Lanes) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for phase, times in lanes.phases.items():
        for start, end in times:
            yield "phases", phase, _event("X", phase, start, end=end, cat="phase")


def _operations(lanes: Lanes) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for lane in lanes.lanes:
        for span in lane.work:
            said = {"transport_seconds": span.transport, "memory_bytes": span.memory}
            said |= {"process": span.pid} | _about(span)
            cat = "task" if lane.task else "stage"
            event = _event("X", span.operation, span.start, end=span.end, cat=cat, args=said)
            yield span.node, lane.name, event
            memory = {"bytes": span.memory}
            event = _event("C", f"memory of {lane.name}", span.end, args=memory)
            yield span.node, lane.name, event
        for span in lane.failures:
            # The driver tells of failures: they belong where the actor was.
            before = [work.node for work in lane.work if work.start <= span.start]
            node = (before or [span.node])[-1]
            said = {"seconds": span.end - span.start} | _about(span)
            event = _event("i", span.operation, span.start, s="t", cat="failure", args=said)
            yield node, lane.name, event


def _about(span: Span) -> dict[str, Any]:
    about = {"microbatch": span.microbatch} if span.microbatch >= 0 else {}
    return about | ({"note": span.note} if span.note else {})


def _event(
    kind: str, name: str, at: float, end: float | None = None, **more: Any
) -> dict[str, Any]:
    """An event of the format's ``ph``: at a second, and of some length if it has an end."""
    start = round(1e6 * at)
    length = {} if end is None else {"dur": round(1e6 * end) - start}
    return {"ph": kind, "name": name, "ts": start} | length | more
