"""Stages are balanced as well as they can be; decompositions start with the longest."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from raycurv.errors import UserError
from raycurv.stages.dealing import (
    Slot,
    cut_stages,
    eigh_cost,
    longest_first,
    makespan,
    next_task,
    runs,
    tree,
)


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


def test_small_tasks_go_together_up_to_a_cost_and_a_number() -> None:
    costs = {"wide": 9.0, "a": 3.0, "b": 3.0, "c": 1.0, "d": 1.0, "e": 1.0, "f": 1.0}
    assert runs(tuple(costs), costs, 6.0, 3) == [("wide",), ("a", "b"), ("c", "d", "e"), ("f",)]
    assert runs(tuple(costs), costs, 0.0, 3) == [(name,) for name in costs]
    assert runs((), {}, 6.0, 3) == []


# Hidden and inner width, layers, heads, key-value heads.
LLAMAS = {
    "Llama-3-8B": (4096, 14336, 32, 32, 8),
    "Llama-2-13B": (5120, 13824, 40, 40, 40),
    "Llama-3-70B": (8192, 28672, 80, 64, 8),
}


def decompositions(name: str) -> list[float]:
    """Costs of all factors of a Llama's decoder blocks."""
    d, inner, layers, heads, shared = LLAMAS[name]
    narrow = d // heads * shared
    a_layer = [d, d, narrow, narrow, d, d, d, inner, inner, inner, d]
    return [eigh_cost((width,)) for width in a_layer * layers]


def at_best(costs: list[float], workers: int) -> float:
    """No order of tasks that cannot be cut ends before this.

    The first two sizes are dealt out whole, each worker taking as many of the second as fit beside
    what it has of the first; what is smaller is counted as if it could be cut.
    """
    sizes = sorted(set(costs), reverse=True)
    wide, second = sizes[0], sizes[1]
    many, more = costs.count(wide), costs.count(second)
    ends = {k * wide + n * second for k in range(len(costs)) for n in range(len(costs))}
    for end in sorted(ends | {sum(costs) / workers}):
        if end < max(wide, sum(costs) / workers):
            continue
        most = int(end / wide + 1e-9)
        if most * workers < many:
            continue
        each, beside = divmod(many, workers)
        room = sum(
            count * int((end - k * wide) / second + 1e-9)
            for k, count in ((each + 1, beside), (each, workers - beside))
            if count
        )
        if room >= more:
            return end
    raise AssertionError


@pytest.mark.parametrize("workers", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("name", LLAMAS)
def test_decompositions_end_within_a_fiftieth_of_the_best(name: str, workers: int) -> None:
    costs = decompositions(name)
    assert makespan(costs, workers) <= 1.02 * at_best(costs, workers)
    # Fairly shared work, where no single factor or its grain is longer than a share.
    if sum(costs) / workers > 8 * max(costs):
        assert makespan(costs, workers) <= 1.02 * sum(costs) / workers


def test_the_shortest_first_would_end_later() -> None:
    costs = decompositions("Llama-2-13B")
    ends = [0.0] * 64
    for cost in sorted(costs):
        ends[ends.index(min(ends))] += cost
    assert max(ends) > 1.03 * makespan(costs, 64)


ROOM = {"small": 10, "large": 100}
SLOTS = [Slot("small", 0), Slot("small", 1), Slot("large", 0)]


def test_a_task_goes_where_its_memory_fits() -> None:
    assert next_task([0], SLOTS, [], [60], ROOM, {}) == (0, Slot("large", 0))
    # Beside another one only as far as there is room, and the next one in the queue may go first.
    busy = [(Slot("small", 0), 6), (Slot("large", 0), 60)]
    assert next_task([0, 1], SLOTS, busy, [5, 4], ROOM, {}) == (1, Slot("small", 1))
    assert next_task([0], SLOTS, busy, [5], ROOM, {}) is None
    # What fits nowhere runs alone.
    assert next_task([0], SLOTS, [], [500], ROOM, {}) == (0, Slot("large", 0))


def test_a_task_that_failed_goes_elsewhere_if_there_is_another_place() -> None:
    assert next_task([0], SLOTS, [], [1], ROOM, {0: {"large"}}) == (0, Slot("small", 0))
    busy = [(Slot("small", n), 1) for n in range(2)]
    assert next_task([0], SLOTS, busy, [1], ROOM, {0: {"large"}}) is None
    assert next_task([0], SLOTS, busy, [1], ROOM, {0: {"large", "small"}}) is not None


@pytest.mark.parametrize("count", range(1, 10))
def test_a_tree_adds_everything_once_in_few_rounds(count: int) -> None:
    held = [{n} for n in range(count)]
    depth = [0] * count
    for into, other, by in tree(count):
        assert not held[into] & held[other] and by in (into, other)
        held[into] |= held[other]
        held[other] = set()
        depth[into] = 1 + max(depth[into], depth[other])
    assert held[0] == set(range(count))
    assert depth[0] == (count - 1).bit_length()
