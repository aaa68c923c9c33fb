"""Claims about how many failures a run bears, and which of them have a cause of their own."""

from __future__ import annotations

import pytest

from raycurv import RaycurvError
from raycurv.stages.failures import RUN, Failures, Limits


def test_three_losses_of_one_operation_on_one_microbatch_name_it() -> None:
    failures = Failures(Limits(failures=100, actor_failures=100))
    for other in (1, 2, 3, 4):
        failures.count("replica 0, stage 1", "turn", other, "killed")
    for _ in range(2):
        failures.count("replica 0, stage 1", "turn", 7, "killed")
    with pytest.raises(RaycurvError, match="replica 0, stage 1, turn of microbatch 7") as caught:
        failures.count("replica 0, stage 1", "turn", 7, "out of memory")
    assert "out of memory" in caught.value.got and "--stages" in caught.value.remedy


def test_a_task_that_is_lost_three_times_is_named() -> None:
    failures = Failures(Limits(failures=100, actor_failures=100))
    for _ in range(2):
        failures.count("decompose_factor of 0.input", RUN, -1, "killed")
    with pytest.raises(RaycurvError, match=r"decompose_factor of 0\.input, run"):
        failures.count("decompose_factor of 0.input", RUN, -1, "killed")


@pytest.mark.parametrize("operation", ["idle", "start", "load", "begin", "commit"])
def test_what_is_about_no_microbatch_is_borne_as_often_as_the_actor_may_be_lost(
    operation: str,
) -> None:
    failures = Failures(Limits(failures=100, actor_failures=6))
    for _ in range(6):
        failures.count("replica 0, stage 1", operation, -1, "killed")
    with pytest.raises(RaycurvError, match=r"at most 6 failures.*--max-actor-failures"):
        failures.count("replica 0, stage 1", operation, -1, "killed")


def test_a_run_bears_so_many_failures_of_whomever() -> None:
    failures = Failures(Limits(failures=3, actor_failures=100))
    for stage in range(3):
        failures.count(f"replica 0, stage {stage}", "turn", stage, "killed")
    with pytest.raises(RaycurvError, match="the run: expected at most 3 failures"):
        failures.count("replica 0, stage 9", "turn", 9, "killed")


def test_none_are_borne_where_none_may_be() -> None:
    with pytest.raises(RaycurvError, match="at most 0 failures"):
        Failures(Limits(failures=0)).count("replica 0, stage 0", "turn", 0, "killed")
