"""The job of timeline.py: who waits for whom, as a picture and a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from raycurv.driver.settings import TimelineSettings
from raycurv.files.store import open_store
from raycurv.jobs.timeline.lanes import Interval, Lanes, Share, read_lanes
from raycurv.jobs.timeline.picture import check_path, draw, save

# A time without any operation that is worth a word: seconds, and a share of all that is shown.
_PAUSE_SECONDS, _PAUSE_SHARE = 30.0, 0.2


def show_timeline(settings: TimelineSettings) -> dict[str, Any]:
    """Show what the actors of a run did; gives the same for machines.

    Raises:
        UserError: a mistake in the settings, or no timeline.
    """
    settings.check()
    if settings.picture is not None:
        check_path(settings.picture)
    store = open_store(settings.run, "--run")
    lanes = read_lanes(store, settings.phase, settings.start, settings.to)
    console = Console(highlight=False)
    shares = lanes.shares()
    by_phase = {phase: lanes.shares(times) for phase, times in lanes.phases().items()}
    console.print(_actors_table(shares))
    console.print()
    console.print(_phases_table(lanes, by_phase))
    for start, end in _pauses(lanes):
        console.print(
            f"nothing was done from {start:.1f} s to {end:.1f} s: --to {start:.0f} shows what came "
            f"before, --from {int(end)} what came after",
            soft_wrap=True,
        )
    found: dict[str, Any] = {"run": store.root}
    if settings.picture is not None:
        save(draw(lanes, os.path.basename(store.root.rstrip("/"))), settings.picture)
        found["picture"] = os.path.abspath(settings.picture)
        console.print(f"picture: {found['picture']}", markup=False, soft_wrap=True)
    return found | {
        "from": round(lanes.start, 6),
        "to": round(lanes.end, 6),
        "actors": [_plain(share) for share in shares],
        "phases": {
            phase: {"seconds": _seconds(lanes, phase), "busy": _mean(each)}
            for phase, each in by_phase.items()
        },
    }


def _plain(share: Share) -> dict[str, Any]:
    seconds = {
        name: round(getattr(share, name), 6)
        for name in ("compute", "transport", "rebuilding", "waiting")
    }
    return {
        "actor": share.actor, **seconds, "busy": round(share.busy, 4), "lost": share.lost,
        "at_a_time": share.lanes,
    }  # fmt: skip


def _actors_table(shares: Sequence[Share]) -> Table:
    """One line an actor."""
    table = Table(box=None, pad_edge=False)
    table.add_column("seconds:")
    for name in ("compute", "transport", "waiting", "rebuilding", "busy", "lost"):
        table.add_column(name, justify="right")
    for share in shares:
        name = share.actor if share.lanes == 1 else f"{share.actor}, {share.lanes} at a time"
        seconds = (share.compute, share.transport, share.waiting, share.rebuilding)
        table.add_row(
            name,
            *(f"{s:.2f}" if s else "" for s in seconds),
            f"{100 * share.busy:.1f} %",
            str(share.lost or ""),
        )
    return table


def _phases_table(lanes: Lanes, by_phase: dict[str, list[Share]]) -> Table:
    """One line a phase: how long, and how busy the actors were in it."""
    table = Table(box=None, pad_edge=False)
    table.add_column("phases:")
    for name in ("seconds", "actors busy"):
        table.add_column(name, justify="right")
    for phase, shares in by_phase.items():
        busy = _mean(shares)
        said = "" if busy is None else f"{100 * busy:.1f} %"
        table.add_row(phase, f"{_seconds(lanes, phase):.2f}", said)
    return table


def _seconds(lanes: Lanes, phase: str) -> float:
    return round(sum(end - start for start, end in lanes.phases()[phase]), 6)


def _mean(shares: Sequence[Share]) -> float | None:
    """The actors' mean share; ``None`` without any."""
    busy = [share.busy for share in shares if share.actor != "tasks"]
    return round(sum(busy) / len(busy), 4) if busy else None


def _pauses(lanes: Lanes) -> list[Interval]:
    """Long times in which nobody did anything: the job was stopped, and went on later."""
    long = max(_PAUSE_SECONDS, _PAUSE_SHARE * (lanes.end - lanes.start))
    bars = sorted(
        (bar.start, bar.end) for lane in lanes.lanes for bar in (*lane.bars, *lane.rebuilt)
    )
    found, last = [], bars[0][1] if bars else 0.0
    for start, end in bars:
        if start - last > long and lanes.start < start < lanes.end:
            found.append((last, start))
        last = max(last, end)
    return found
