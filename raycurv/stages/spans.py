"""Who did what, when: one span a call of a stage or task, kept until somebody writes them down."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from raycurv.batch import Batch

_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Span:
    """One operation of one actor.

    Attributes:
        actor: who: ``replica 0, stage 1``, ``task``, or ``driver``.
        operation: what: a method of the stage, ``load``, the name of a task; ``lost`` and
            ``rebuild`` of one that died.
        microbatch: which, -1 for none.
        start, end: seconds since the epoch, by the clock of the node.
        transport: seconds of it that went into taking in and giving out tensors.
        note: more about it: a factor; of a death, what it was at and the cause, ``turn: …``.
        node: host name.
        memory: anonymous resident bytes of the process at the end.
    """

    actor: str
    operation: str
    microbatch: int
    start: float
    end: float
    transport: float = 0.0
    note: str = ""
    node: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    memory: int = 0

    @property
    def failure(self) -> bool:
        """Whether it is a loss or a rebuilding, which befalls an actor."""
        return self.operation in ("lost", "rebuild")


class SpanLog:
    """Spans in the order in which they became known, until somebody takes them.

    Attributes:
        watch: is told of each at once, if anybody is.
    """

    def __init__(self) -> None:
        self.watch: Callable[[Span], None] | None = None
        self._spans: list[Span] = []

    def append(self, span: Span) -> None:
        """One more."""
        self._spans.append(span)
        if self.watch is not None:
            self.watch(span)

    def extend(self, spans: Iterable[Span]) -> None:
        """Some more."""
        for span in spans:
            self.append(span)

    def take(self) -> list[Span]:
        """All that nobody has taken."""
        spans, self._spans = self._spans, []
        return spans

    def __iter__(self) -> Iterator[Span]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)


def timed(
    actor: str,
    operation: str,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    enter: Callable[[Any], Any] | None = None,
    leave: Callable[[Any], Any] | None = None,
) -> tuple[Any, Span]:
    """Make a call; gives what it gave, and its span. ``enter`` takes in each of the arguments, and
    ``leave`` gives out the value."""
    start = time.time()
    if enter is not None:
        args = tuple(enter(arg) for arg in args)
    began = time.time()
    value = call(*args)
    ended = time.time()
    if leave is not None:
        value = leave(value)
    end = time.time()
    transport = (began - start) + (end - ended)
    return value, Span(
        actor, operation, microbatch_of(args), start, end, transport, memory=resident()
    )


def microbatch_of(args: tuple[Any, ...]) -> int:
    """The microbatch that a call of a stage is about, -1 for none."""
    if args and isinstance(args[0], Batch):
        return args[0].index
    return args[0] if args and isinstance(args[0], int) else -1


def resident() -> int:
    """Anonymous resident bytes of this process; 0 where there is no /proc."""
    try:
        with open("/proc/self/statm") as file:
            fields = file.read().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * _PAGE


def actor_name(replica: int, stage: int) -> str:
    """What a stage's actor is called."""
    return f"replica {replica}, stage {stage}"


def actor_order(actor: str) -> tuple[bool, tuple[int, ...], str]:
    """Sorts actors by replica, then stage; others behind them."""
    numbers = tuple(int(part.split()[-1]) for part in actor.split(", ") if part[-1:].isdecimal())
    return not numbers, numbers, actor
