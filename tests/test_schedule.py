"""The pipelined order is one that can run, holds few microbatches, and lets its source end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from raycurv.stages.schedule import Operation, pipelined


def check(stages: int, microbatches: list[int], operations: list[Operation]) -> list[int]:
    """Every operation once, after what it needs; gives the most alive in each stage."""
    forward: list[list[int]] = [[] for _ in range(stages)]
    backward: list[list[int]] = [[] for _ in range(stages)]
    alive = [0] * stages
    for op in operations:
        stage, m, last = op.stage, op.microbatch, op.stage == stages - 1
        assert op.kind in (("turn",) if last else ("forward", "backward"))
        if op.kind != "backward":
            assert m not in forward[stage]
            assert stage == 0 or m in forward[stage - 1], "its input has not been made"
            forward[stage].append(m)
        if op.kind != "forward":
            assert m in forward[stage] and m not in backward[stage]
            assert last or m in backward[stage + 1], "its gradient has not been made"
            # Counted while a turn is under way, too.
            alive[stage] = max(alive[stage], len(forward[stage]) - len(backward[stage]))
            backward[stage].append(m)
        alive[stage] = max(alive[stage], len(forward[stage]) - len(backward[stage]))
    assert forward == backward == [microbatches] * stages, "every one once, in order"
    return alive


@pytest.mark.parametrize("count", range(10))
@pytest.mark.parametrize("stages", range(1, 6))
def test_every_operation_comes_once_after_what_it_needs(stages: int, count: int) -> None:
    microbatches = [7 * m + 3 for m in range(count)]  # numbers are names, not places
    alive = check(stages, microbatches, list(pipelined(stages, microbatches)))
    for stage, most in enumerate(alive):
        assert most <= stages - stage
        # One forward, one backward: the pipeline is filled, not run dry.
        assert most == min(count, stages - stage)


@pytest.mark.parametrize("stages", range(1, 6))
def test_the_next_microbatch_is_asked_for_only_when_it_can_start(stages: int) -> None:
    asked: list[int] = []

    def source() -> Iterator[int]:
        for m in range(9):
            asked.append(m)
            yield m

    done = 0
    for operation in pipelined(stages, source()):
        if operation.stage == 0 and operation.kind != "forward":
            done += 1
        assert len(asked) - done <= stages + 1
        if operation.stage == 0 and operation.kind != "backward":
            assert asked[-1] == operation.microbatch


@pytest.mark.parametrize("stop", range(8))
@pytest.mark.parametrize("stages", range(1, 5))
def test_a_source_may_end_whenever_its_caller_wants(stages: int, stop: int) -> None:
    finished: list[int] = []

    def source() -> Iterator[int]:
        m = 0
        while len(finished) < stop:  # decided while the pipeline runs
            yield m
            m += 1

    operations = []
    for operation in pipelined(stages, source()):
        operations.append(operation)
        if operation.stage == 0 and operation.kind != "forward":
            finished.append(operation.microbatch)
    check(stages, sorted({op.microbatch for op in operations}), operations)
    assert len(finished) >= stop
