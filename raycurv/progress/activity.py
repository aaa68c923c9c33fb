"""How busy the actors are: what the spans of the last seconds say, one line an actor."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from raycurv.planning.report import size
from raycurv.stages.spans import Span, actor_order

# Seconds that a share is about.
WINDOW = 30.0
# Lines of actors; the others share one.
MOST_LINES = 12
# After so many seconds it is worth saying when an actor was last heard of.
_LONG_AGO = 5.0


@dataclass
class Doing:
    """What an actor does, and how busy it is.

    Attributes:
        actor: its name; ``task`` for all tasks together.
        memory: bytes of its process at the end of that span.
        busy: share of the last seconds, compute and transport; of tasks, how many ran at a time.
    """

    actor: str
    last: Span
    memory: int = 0
    busy: float = 0.0
    recent: deque[tuple[float, float]] = field(default_factory=deque)

    def line(self, now: float) -> str:
        """``replica 0, stage 1       busy  83 %   1.20 GB  turn of microbatch 12``."""
        name, busy = self.actor, f"busy {100 * self.busy:3.0f} %"
        if self.actor == "task":
            name, busy = "tasks", f"{self.busy:.1f} at a time"
        ago = now - self.last.end
        since = f", {ago:.0f} s ago" if ago > _LONG_AGO else ""
        return _line(name, busy, self.memory, said(self.last) + since)


def said(span: Span) -> str:
    """A span in words: ``turn of microbatch 12``, or an operation and its factor."""
    if span.failure:
        return span.operation
    if span.microbatch >= 0:
        return f"{span.operation} of microbatch {span.microbatch}"
    if span.note:
        return f"{span.operation} of {span.note}"
    return span.operation


class Activity:
    """How busy the actors were in the last seconds; takes spans in any thread."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[str, Doing] = {}
        self.begin()

    def begin(self) -> None:
        """Forget what was done: a phase begins, and only who does something in it is shown."""
        with self._lock:
            self._began = self._now = self._clock()
            self._seen = {}

    def add(self, span: Span) -> None:
        """Take note of a span."""
        with self._lock:
            seen = self._seen.setdefault(span.actor, Doing(span.actor, span))
            seen.last = span
            if span.failure:
                return
            seen.memory = span.memory
            seen.recent.append((span.start, span.end))
            # Spans come with answers: a share up to this moment would lack those on their way.
            self._now = max(self._now, span.end)
            while seen.recent and seen.recent[0][1] < self._now - WINDOW:
                seen.recent.popleft()

    def actors(self) -> list[Doing]:
        """Everyone who did something since the phase began, in their order."""
        with self._lock:
            since = max(self._began, self._now - WINDOW)
            length = max(self._now - since, 1e-9)
            found = []
            for actor in sorted(self._seen, key=actor_order):
                seen = self._seen[actor]
                busy = sum(max(0.0, end - max(start, since)) for start, end in seen.recent)
                share = busy / length
                # Clocks of other nodes may be ahead.
                share = share if actor == "task" else min(share, 1.0)
                found.append(replace(seen, busy=share))
            return found

    def lines(self) -> list[str]:
        """One line an actor; those beyond the twelfth in one."""
        actors, now = self.actors(), self._clock()
        lines = [doing.line(now) for doing in actors[:MOST_LINES]]
        rest = actors[MOST_LINES:]
        if rest:
            busy = sum(doing.busy for doing in rest) / len(rest)
            most = max(doing.memory for doing in rest)
            lines.append(
                _line(f"and {len(rest)} more", f"busy {100 * busy:3.0f} %", most, "at most")
            )
        return lines

    def share(self) -> float | None:
        """The stages' mean share; ``None`` while none of them works."""
        stages = [doing.busy for doing in self.actors() if doing.actor != "task"]
        return sum(stages) / len(stages) if stages else None

    def busy(self) -> str:
        """``busy 83 %``, or ``2.0 tasks at a time``; empty while nobody works."""
        share = self.share()
        if share is not None:
            return f"busy {100 * share:.0f} %"
        return "".join(f"{doing.busy:.1f} tasks at a time" for doing in self.actors())


def _line(name: str, busy: str, memory: int, text: str) -> str:
    return f"  {name:<24}{busy:<14}{size(memory) if memory else '':>9}  {text}"
