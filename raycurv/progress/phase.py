"""A phase under way: how far it is, how fast, how long still."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False)
class PhaseProgress:
    """How far one phase under way is.

    Attributes:
        total: how many ``unit`` there are to do.
        unit: what is counted.
        where: the part of the model that it is about, if only a part.
        done: how many are done so far.
        before: how many of those an earlier run has done.
        tokens: how many tokens they had, for the rate; 0 where there are none.
    """

    name: str
    total: int
    unit: str
    where: str = ""
    done: int = 0
    before: int = 0
    tokens: int = 0
    changed: Callable[[PhaseProgress], None] | None = None
    started: float = field(default_factory=time.monotonic)

    def skip(self, count: int) -> None:
        """``count`` were done by an earlier run: they say nothing about the rate."""
        self.before += count
        self.done += count

    def advance(self, count: int, tokens: int = 0) -> None:
        """``count`` more are done, with so many tokens."""
        self.done += count
        self.tokens += tokens
        if self.changed is not None:
            self.changed(self)

    @property
    def title(self) -> str:
        """Its name, and which part of the model it is about."""
        return f"{self.name}, {self.where}" if self.where else self.name

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self.started

    @property
    def tokens_per_second(self) -> float | None:
        """Its mean rate so far; ``None`` where there are no tokens."""
        return self.tokens / max(self.seconds, 1e-9) if self.tokens else None

    @property
    def seconds_left(self) -> float | None:
        """How long the rest would take at this rate; ``None`` where nothing is done yet, or all."""
        mine = self.done - self.before
        if mine <= 0 or self.done >= self.total:
            return None
        return self.seconds * (self.total - self.done) / mine

    def line(self, busy: str = "") -> str:
        """``covariance 120/300 microbatches, 4,200 tokens/s, busy 83 %, 0:42 left``."""
        name = f"{self.title}:" if self.where else self.name
        parts = [f"{name} {self.done:,}/{self.total:,} {self.unit}", self.rate(), busy]
        if self.seconds_left is not None:
            parts.append(f"{clock(self.seconds_left)} left")
        return ", ".join(part for part in parts if part)

    def rate(self) -> str:
        """``4,200 tokens/s``; empty where there are none."""
        rate = self.tokens_per_second
        return "" if rate is None else f"{rate:,.0f} tokens/s"


def clock(seconds: float) -> str:
    """``0:42`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
