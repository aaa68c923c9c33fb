"""Where progress is shown: redrawn in a terminal, line by line elsewhere, or as JSON."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import IO, Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from raycurv.progress.activity import Activity
from raycurv.progress.phase import PhaseProgress, clock
from raycurv.progress.streams import printable

Level = Literal["info", "warning", "error"]
# Seconds between two lines where there is no terminal to redraw.
LINE_EVERY = 10.0


@dataclass(frozen=True)
class Event:
    """Something that a person is told once.

    Attributes:
        name: what kind of event, for machines.
        facts: the same as values by name, for machines.
    """

    text: str
    name: str = "message"
    level: Level = "info"
    facts: dict[str, Any] = field(default_factory=dict)


class Display:
    """Shows events, and phases as they go on; this one shows nothing."""

    def tell(self, event: Event) -> None:
        """Show an event."""

    def opened(self, phase: PhaseProgress) -> None:
        """A phase begins; others may be under way."""

    def advanced(self, phase: PhaseProgress) -> None:
        """A phase has gone on."""

    def closed(self, phase: PhaseProgress, whole: bool) -> None:
        """A phase has ended; ``whole`` if it was not broken off."""


class Terminal(Display):
    """One live display: a bar a phase, beneath them a line an actor; events scroll by above."""

    def __init__(self, console: Console, activity: Activity) -> None:
        self._console, self._activity = console, activity
        self._live: Live | None = None
        self._bars = self._new_bars()
        self._open: dict[int, TaskID] = {}

    def tell(self, event: Event) -> None:
        style = {"info": "", "warning": "yellow", "error": "red"}[event.level]
        text = printable(event.text)
        self._console.print(
            text, highlight=False, markup=False, soft_wrap=True, style=style or None
        )

    def opened(self, phase: PhaseProgress) -> None:
        if self._live is None:
            self._bars = self._new_bars()
            self._live = Live(
                get_renderable=self._shown, console=self._console, refresh_per_second=2
            )
            self._live.start()
        task = self._bars.add_task(
            phase.title, total=phase.total, unit=phase.unit, rate="", left=""
        )
        self._open[id(phase)] = task

    def advanced(self, phase: PhaseProgress) -> None:
        self._draw(self._open[id(phase)], phase)

    def closed(self, phase: PhaseProgress, whole: bool) -> None:
        task = self._open.pop(id(phase))
        self._draw(task, phase)
        self._bars.stop_task(task)
        if self._live is not None and not self._open:
            # The bars stay where they are; the actors' lines are gone by then.
            live, self._live = self._live, None
            live.stop()

    def _draw(self, task: TaskID, phase: PhaseProgress) -> None:
        left = "" if phase.seconds_left is None else f"{clock(phase.seconds_left)} left"
        self._bars.update(task, completed=phase.done, rate=phase.rate(), left=left)

    def _shown(self) -> Group:
        lines = self._activity.lines() if self._open else []
        actors = [Text(line, no_wrap=True, overflow="ellipsis", style="dim") for line in lines]
        return Group(self._bars.get_renderable(), *actors)

    def _new_bars(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            auto_refresh=False,
        )


class Paced(Display):
    """Shows how far a phase is every ten seconds, where there is nothing to redraw."""

    def __init__(self, activity: Activity) -> None:
        self._activity = activity
        self._shown: dict[int, float] = {}

    def opened(self, phase: PhaseProgress) -> None:
        self._shown[id(phase)] = time.monotonic()

    def advanced(self, phase: PhaseProgress) -> None:
        now = time.monotonic()
        # Of the last step, what is shown at the end tells.
        if now - self._shown[id(phase)] >= LINE_EVERY and phase.done < phase.total:
            self._shown[id(phase)] = now
            self.tell(self._event(phase))

    def closed(self, phase: PhaseProgress, whole: bool) -> None:
        del self._shown[id(phase)]

    def _event(self, phase: PhaseProgress) -> Event:
        """How far a phase is, in words."""
        return Event(phase.line(self._activity.busy()))


class Lines(Paced):
    """Lines of text."""

    def __init__(self, console: Console, activity: Activity) -> None:
        super().__init__(activity)
        self._console = console

    def tell(self, event: Event) -> None:
        text = printable(event.text)
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def closed(self, phase: PhaseProgress, whole: bool) -> None:
        super().closed(phase, whole)
        if whole:
            self.tell(Event(f"{self._event(phase).text}, {clock(phase.seconds)}"))


class JsonLines(Paced):
    """One JSON object a line: ``time`` (ISO 8601, UTC), ``level``, ``event``, ``message``, and the
    facts of the event."""

    def __init__(self, file: IO[str], activity: Activity) -> None:
        super().__init__(activity)
        self._file = file

    def tell(self, event: Event) -> None:
        print(json_line(event), file=self._file, flush=True)

    def opened(self, phase: PhaseProgress) -> None:
        super().opened(phase)
        self.tell(self._event(phase, "begin"))

    def closed(self, phase: PhaseProgress, whole: bool) -> None:
        super().closed(phase, whole)
        event = self._event(phase, "end", seconds=phase.seconds)
        self.tell(event if whole else replace(event, name="broken off", level="warning"))

    def _event(
        self, phase: PhaseProgress, name: str = "progress", seconds: float | None = None
    ) -> Event:
        facts = {
            "phase": phase.name,
            "where": phase.where or None,
            "done": phase.done,
            "total": phase.total,
            "unit": phase.unit,
            "tokens_per_second": phase.tokens_per_second,
            "seconds_left": phase.seconds_left,
            "busy": self._activity.share(),
            "seconds": seconds,
        }
        rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in facts.items()}
        known = {key: value for key, value in rounded.items() if value is not None}
        return Event(phase.line(self._activity.busy()), name, facts=known)


def json_line(event: Event) -> str:
    """An event as one line of JSON."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    head = {"time": now, "level": event.level, "event": event.name, "message": event.text}
    return json.dumps(head | event.facts)
