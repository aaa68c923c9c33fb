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
            yield "phases", phase, _complete(phase, "phase", start, end)


def _operations(lanes: Lanes) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for lane in lanes.lanes:
        for span in lane.work:
            said: dict[str, Any] = {
                "transport_seconds": span.transport,
                "memory_bytes": span.memory,
            }
            said |= {"process": span.pid, "note": span.note, "microbatch": span.microbatch}
            kind = "task" if lane.task else "stage"
            event = _complete(span.operation, kind, span.start, span.end)
            yield span.node, lane.name, event | {"args": said}
            counter: dict[str, Any] = {
                "ph": "C",
                "name": f"memory of {lane.name}",
                "ts": _micro(span.end),
            }
            yield span.node, lane.name, counter | {"args": {"bytes": span.memory}}
        for span in lane.failures:
            # The driver tells of failures: they belong where the actor was.
            before = [work.node for work in lane.work if work.start <= span.start]
            node = (before or [span.node])[-1]
            said = {"note": span.note, "microbatch": span.microbatch}
            said |= {"seconds": span.end - span.start}
            event = {"ph": "i", "s": "t", "cat": "failure", "name": span.operation, "args": said}
            yield node, lane.name, event | {"ts": _micro(span.start)}


def _complete(name: str, kind: str, start: float, end: float) -> dict[str, Any]:
    at = _micro(start)
    return {"ph": "X", "cat": kind, "name": name, "ts": at, "dur": _micro(end) - at}


def _micro(seconds: float) -> int:
    return round(1e6 * seconds)
