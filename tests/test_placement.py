"""Stages are balanced as well as they can be; decompositions start with the longest."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from raycurv.errors import UserError
from raycurv.stages.placement import cut_stages, eigh_cost, longest_first


def smallest_largest(costs: list[float], stages: int) -> float:
    """By trying every cut."""
    best = float("inf")
    for cuts in combinations(range(1, len(costs)), stages - 1):
        edges = (0, *cuts, len(costs))
        best = min(best, max(sum(costs[a:b]) for a, b in pairwise(edges)))
    return best


@pytest.mark.parametrize("seed", range(30))
def test_the_largest_stage_is_as_small_as_any_cut_makes_it(seed: int) -> None:
    rng = random.Random(seed)
    costs = [float(rng.choice((0, 1, 1, 2, 5, 20))) for _ in range(rng.randint(1, 9))]
    for stages in range(1, len(costs) + 1):
        runs = cut_stages(costs, stages)
        assert len(runs) == stages and all(len(run) > 0 for run in runs)
        assert [unit for run in runs for unit in run] == list(range(len(costs)))
        largest = max(sum(costs[unit] for unit in run) for run in runs)
        assert largest == smallest_largest(costs, stages)


@pytest.mark.parametrize("units", [1, 3])
def test_more_stages_than_layers_are_refused(units: int) -> None:
    with pytest.raises(UserError, match=f"--stages.*at most {units}.*{units + 1}"):
        cut_stages([1.0] * units, units + 1)


def test_decompositions_go_longest_first_and_by_name_among_equals() -> None:
    costs = {"b": eigh_cost((10,)), "a": eigh_cost((10,)), "wide": eigh_cost((30,))}
    costs["cut"] = eigh_cost((10, 10, 10))
    assert longest_first(costs) == ["wide", "cut", "a", "b"]
