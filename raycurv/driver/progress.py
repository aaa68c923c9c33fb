"""What a person sees while a job runs: which phase, how far, how fast, how long still."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from raycurv.driver import stopping

# Seconds between two lines where there is no terminal to redraw.
_LINE_EVERY = 10.0


@dataclass
class Phase:
    """One phase under way.

    Attributes:
        name: what a person calls it.
        total: of ``unit``.
        unit: what is counted.
        where: which part of the model, if only a part.
        done: so far.
        tokens: so far, for the rate; 0 where there are none.
    """

    name: str
    total: int
    unit: str
    where: str = ""
    done: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    _shown: float = field(default_factory=time.monotonic)
    _bar: Progress | None = None

    def advance(self, count: int, tokens: int = 0) -> None:
        """``count`` more are done, with so many tokens."""
        self.done += count
        self.tokens += tokens
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, rate=self._rate())
            return
        now = time.monotonic()
        if now - self._shown >= _LINE_EVERY:
            self._shown = now
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """``covariance 120/300 microbatches, 4,200 tokens/s, 0:42 left``."""
        elapsed = time.monotonic() - self.started
        name = f"{self.name}, {self.where}:" if self.where else self.name
        parts = [f"{name} {self.done:,}/{self.total:,} {self.unit}"]
        if self.tokens:
            parts.append(self._rate())
        if 0 < self.done < self.total:
            parts.append(f"{_clock(elapsed * (self.total - self.done) / self.done)} left")
        return ", ".join(parts)

    def _rate(self) -> str:
        elapsed = max(time.monotonic() - self.started, 1e-9)
        return f"{self.tokens / elapsed:,.0f} tokens/s" if self.tokens else ""


class Reporter:
    """Shows phases as they run and remembers what each took.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.seconds: dict[str, float] = {}
        self._console = Console(stderr=True)

    def say(self, text: str) -> None:
        """One line for the person."""
        if not self.quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str, total: int, unit: str, where: str = "") -> Iterator[Phase]:
        """A phase; its seconds are kept even when it fails, those of all parts of a model in one.

        Args:
            where: the part of the model that it is about, if not the whole.
        """
        stopping.look()
        phase = Phase(name, total, unit, where)
        try:
            if self.quiet:
                phase._shown = float("inf")
                yield phase
            elif self._console.is_terminal:
                with self._bar() as bar:
                    shown = f"{name}, {where}" if where else name
                    bar.add_task(shown, total=total, unit=unit, rate="")
                    phase._bar = bar
                    yield phase
            else:
                yield phase
                self.say(phase.line() + f", {_clock(time.monotonic() - phase.started)}")
        finally:
            took = time.monotonic() - phase.started
            self.seconds[name] = self.seconds.get(name, 0.0) + took

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )

    def summary(self, title: str, places: dict[str, str]) -> None:
        """Phases with their seconds, and where the results lie."""
        self.say(title)
        for name, seconds in self.seconds.items():
            self.say(f"  {name:<28}{seconds:>9.1f} s")
        for what, where in places.items():
            self.say(f"  {what:<28}{where}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
