"""What a person sees while a job runs: which phase, how far, how fast, how long still, and what
becomes of the actors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console

from raycurv.progress import stopping
from raycurv.progress.activity import Activity
from raycurv.progress.displays import Display, Event, JsonLines, Lines, Terminal
from raycurv.progress.phase import PhaseProgress
from raycurv.progress.streams import Forgiving
from raycurv.stages.spans import Span

Log = Literal["text", "json"]


class Reporter:
    """Shows phases as they run and remembers what each took.

    Args:
        log: for a person, or one JSON object a line.
        console: the terminal or what there is in its place; by default stderr.

    Attributes:
        seconds: phase -> how long it took, all its parts together.
    """

    def __init__(
        self, quiet: bool = False, log: Log = "text", console: Console | None = None
    ) -> None:
        self.seconds: dict[str, float] = {}
        self.activity = Activity()
        self._open: list[PhaseProgress] = []
        # Progress is not worth a job: a stderr that cannot be written is not written any more.
        stderr: Any = Forgiving(sys.stderr)
        self._display = self._chosen(quiet, log, console or Console(file=stderr))

    def _chosen(self, quiet: bool, log: Log, console: Console) -> Display:
        if quiet:
            return Display()
        if log == "json":
            return JsonLines(console.file, self.activity)
        if console.is_terminal:
            return Terminal(console, self.activity)
        return Lines(console, self.activity)

    def say(self, text: str) -> None:
        """One line for the person."""
        self._display.tell(Event(text))

    def watch(self, span: Span) -> None:
        """An actor or a task has done something, or was lost."""
        self.activity.add(span)
        if span.failure:
            self._display.tell(_event(span, self._open[-1].name if self._open else ""))

    @contextmanager
    def phase(self, name: str, total: int, unit: str, where: str = "") -> Iterator[PhaseProgress]:
        """Show a phase as long as this lasts; its seconds are kept even when it fails.

        Args:
            total: how many ``unit`` there are to do.
            where: the part of the model that it is about, if only a part.

        Raises:
            Stopped: the job was asked to stop.
        """
        stopping.stop_unless_deferred()
        if not self._open:
            self.activity.begin()
        phase = PhaseProgress(name, total, unit, where, changed=self._display.advanced)
        self._open.append(phase)
        self._display.opened(phase)
        whole = False
        try:
            yield phase
            whole = True
        finally:
            self._display.closed(phase, whole)
            self._open.remove(phase)
            self.seconds[name] = self.seconds.get(name, 0.0) + phase.seconds

    def summary(self, title: str, places: dict[str, str]) -> None:
        """Show what the job has done, phases with their seconds, and where each result lies."""
        lines = [title]
        lines += [f"  {name:<28}{seconds:>9.1f} s" for name, seconds in self.seconds.items()]
        lines += [f"  {what:<28}{where}" for what, where in places.items()]
        seconds = {name: round(seconds, 3) for name, seconds in self.seconds.items()}
        # One line for machines: the rest is in the facts.
        facts = {"message": title, "seconds": seconds, **places}
        self._display.tell(Event("\n".join(lines), "summary", facts=facts))


def _event(span: Span, phase: str) -> Event:
    """What a person is told of a loss or a rebuilding."""
    facts: dict[str, Any] = {"phase": phase, "actor": span.actor}
    if span.operation == "rebuild":
        took = span.end - span.start
        text = f"{span.actor} rebuilt in {took:.1f} s"
        return Event(text, "rebuild", facts=facts | {"seconds": round(took, 3)})
    at, _, cause = span.note.partition(": ")
    facts |= {"operation": at, "cause": cause}
    if span.microbatch >= 0:
        facts |= {"microbatch": span.microbatch}
        at = f"{at} of microbatch {span.microbatch}"
    if span.actor == "task":
        return Event(f"{at} was lost: {cause}; it runs again elsewhere", "lost", "warning", facts)
    return Event(f"{span.actor} was lost in {at}: {cause}", "lost", "warning", facts)
