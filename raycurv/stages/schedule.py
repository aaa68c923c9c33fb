"""Schedules: stages x microbatches -> an ordered list of operations. Pure.

The order is one in which every operation comes after those it depends on, and in which each stage's
own operations stand in the order it must run them: a synchronous actor runs one caller's calls as
they were submitted, so the driver's order of submission is the schedule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Operation:
    """One call of a stage.

    Attributes:
        kind: ``forward``; ``turn``, the last stage's forward, loss and backward in one; or
            ``backward``.
    """

    kind: Literal["forward", "turn", "backward"]
    stage: int
    microbatch: int


def pipelined(stages: int, microbatches: Iterable[int]) -> Iterator[Operation]:
    """One forward, one backward: at most ``stages - s`` microbatches are alive in stage s.

    ``microbatches`` is drawn from only when the first stage can take the next one, and may end
    whenever the caller wants the pipeline to drain.
    """
    source = iter(microbatches)
    order: list[int] = []  # microbatches by place
    base = 0  # places before this one are finished and forgotten
    ended = False
    forwards, backwards = [0] * stages, [0] * stages

    def ready(stage: int) -> Operation | None:
        nonlocal ended
        f, b = forwards[stage], backwards[stage]
        if f - b < stages - stage:
            if stage == 0 and not ended and f == base + len(order):
                try:
                    order.append(next(source))
                except StopIteration:
                    ended = True
            arrived = base + len(order) if stage == 0 else forwards[stage - 1]
            if f < arrived:
                kind: Literal["forward", "turn"] = "turn" if stage == stages - 1 else "forward"
                return Operation(kind, stage, order[f - base])
            if not (ended and f == base + len(order)):
                return None  # wait for the next forward: one forward comes before one backward
        if stage < stages - 1 and b < f and b < backwards[stage + 1]:
            return Operation("backward", stage, order[b - base])
        return None

    while not ended or backwards[0] < base + len(order):
        for stage in range(stages):
            operation = ready(stage)
            if operation is None:
                continue
            if operation.kind != "backward":
                forwards[stage] += 1
            if operation.kind != "forward":
                backwards[stage] += 1
            yield operation
        while base < backwards[0]:
            order.pop(0)
            base += 1
