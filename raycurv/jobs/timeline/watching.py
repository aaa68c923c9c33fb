"""The job of timeline.py: who waits for whom, as tables, a trace and a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from raycurv.files.single_file import check_single_file
from raycurv.files.store import open_store
from raycurv.jobs.timeline.lanes import SECONDS, Interval, Lanes, Share, read_lanes, union
from raycurv.jobs.timeline.picture import figure_class, save_picture
from raycurv.jobs.timeline.timeline_settings import TimelineSettings
from raycurv.jobs.timeline.trace_events import write_trace
from raycurv.progress.streams import printable, results

# A time without any operation that is worth a word: seconds, and a share of all that is shown.
_PAUSE_SECONDS, _PAUSE_SHARE = 30.0, 0.2


def show_timeline(settings: TimelineSettings) -> dict[str, Any]:
    """Print what the actors of a run did, write the trace and the picture; gives the same numbers
    for the last line.

    Raises:
        UserError: a mistake in the settings, or no timeline.
    """
    settings.check()
    if settings.trace is not None:
        check_single_file("--trace", settings.trace, ".json", ".json.gz")
    if settings.picture is not None:
        check_single_file("--picture", settings.picture, ".png", ".svg")
        figure_class()
    store = open_store(settings.run, "--run")
    lanes = read_lanes(store, settings.phase, settings.start, settings.to)
    console = Console(file=results(), highlight=False, markup=False)
    shares = lanes.shares()
    phases = {
        phase: {
            "seconds": round(sum(end - start for start, end in times), 6),
            "busy": _mean(lanes.shares(times)),
        }
        for phase, times in lanes.phases.items()
    }
    console.print(_actors_table(shares))
    console.print()
    console.print(_phases_table(phases))
    for start, end in _pauses(lanes):
        console.print(
            f"nothing was done from {start:.1f} s to {end:.1f} s: --to {start:.0f} shows what came "
            f"before, --from {int(end)} what came after",
            soft_wrap=True,
        )
    found: dict[str, Any] = {"run": store.root}
    if settings.trace is not None:
        write_trace(lanes, settings.trace)
        found["trace"] = os.path.abspath(settings.trace)
    if settings.picture is not None:
        save_picture(lanes, os.path.basename(store.root.rstrip("/")), settings.picture)
        found["picture"] = os.path.abspath(settings.picture)
    for name in ("trace", "picture"):
        if name in found:
            console.print(printable(f"{name}: {found[name]}"), soft_wrap=True)
    return found | {
        "from": round(lanes.start, 6),
        "to": round(lanes.end, 6),
        "actors": [_numbers(share) for share in shares],
        "phases": phases,
    }


def _numbers(share: Share) -> dict[str, Any]:
    seconds = {name: round(getattr(share, name), 6) for name in SECONDS}
    return asdict(share) | seconds | {"busy": round(share.busy, 4)}


def _actors_table(shares: Sequence[Share]) -> Table:
    """The table that is printed: seconds of compute, transport and waiting, one line an actor."""
    table = _table("seconds:", "compute", "transport", "waiting", "rebuilding", "busy", "lost")
    for share in shares:
        many = f", {share.at_a_time} at a time" if share.at_a_time > 1 else ""
        seconds = (share.compute, share.transport, share.waiting, share.rebuilding)
        busy, lost = f"{100 * share.busy:.1f} %", str(share.lost or "")
        table.add_row(share.actor + many, *(f"{s:.2f}" if s else "" for s in seconds), busy, lost)
    return table


def _phases_table(phases: dict[str, dict[str, Any]]) -> Table:
    """One line a phase: how long, and how busy the actors were in it."""
    table = _table("phases:", "seconds", "actors busy")
    for phase, one in phases.items():
        busy = "" if one["busy"] is None else f"{100 * one['busy']:.1f} %"
        table.add_row(phase, f"{one['seconds']:.2f}", busy)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=None, pad_edge=False)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _mean(shares: Sequence[Share]) -> float | None:
    """The actors' mean share; ``None`` without any."""
    busy = [share.busy for share in shares if share.actor != "tasks"]
    return round(sum(busy) / len(busy), 4) if busy else None


def _pauses(lanes: Lanes) -> list[Interval]:
    """Long times in which nobody did anything: the job was stopped, and went on later."""
    long = max(_PAUSE_SECONDS, _PAUSE_SHARE * (lanes.end - lanes.start))
    spans = [span for lane in lanes.lanes for span in (*lane.work, *lane.failures)]
    busy = union((span.start, span.end) for span in spans if span.operation != "lost")
    pauses = [(before, after) for (_, before), (after, _) in pairwise(busy)]
    return [
        (start, end)
        for start, end in pauses
        if end - start > long and lanes.start < end < lanes.end
    ]
