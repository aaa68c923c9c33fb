"""Who holds what: layers -> stages, factors -> the order of their eigendecompositions. Pure."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raycurv.errors import UserError


def cut_stages(costs: Sequence[float], stages: int) -> tuple[range, ...]:
    """Consecutive runs of units whose largest cost is as small as it can be.

    Args:
        stages: how many runs; each holds at least one unit.

    Raises:
        UserError: more stages than units.
    """
    units = len(costs)
    if stages > units:
        raise UserError(
            "--stages", f"at most {units}, the layers that this model can be cut between",
            str(stages), f"Give --stages {units} or fewer.",
        )  # fmt: skip
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[k][n]: the smallest largest cost of the first n units in k runs; cut[k][n]: where the
    # last of these runs starts.
    best = [[float("inf")] * (units + 1) for _ in range(stages + 1)]
    cut = [[0] * (units + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for k in range(1, stages + 1):
        for n in range(k, units + 1):
            for start in range(k - 1, n):
                worst = max(best[k - 1][start], sums[n] - sums[start])
                if worst < best[k][n]:
                    best[k][n], cut[k][n] = worst, start
    runs, stop = [], units
    for k in range(stages, 0, -1):
        runs.append(range(cut[k][stop], stop))
        stop = cut[k][stop]
    return tuple(reversed(runs))


def group_stages(stages: int, homes: int) -> tuple[range, ...]:
    """Consecutive stages that are resident together: as few groups as ``homes`` allow, of like
    size."""
    groups = -(-stages // homes)
    small, larger = divmod(stages, groups)
    sizes = [small + (g < larger) for g in range(groups)]
    starts = [sum(sizes[:g]) for g in range(groups)]
    return tuple(range(a, a + size) for a, size in zip(starts, sizes, strict=True))


def tree(count: int) -> list[tuple[int, int, int]]:
    """Additions of ``count`` sums along a tree: (into, from, by whom).

    Which are added does not depend on who does it; the work is spread over both sides.
    """
    steps = []
    distance = 1
    while distance < count:
        for number, left in enumerate(range(0, count - distance, 2 * distance)):
            right = left + distance
            steps.append((left, right, left if number % 2 == 0 else right))
        distance *= 2
    return steps


def eigh_cost(tiles: Sequence[int]) -> float:
    """Relative cost of decomposing a factor: about 9 d³ FLOPs a tile."""
    return 9.0 * sum(float(t) ** 3 for t in tiles)


def longest_first(costs: Mapping[str, float]) -> list[str]:
    """Names by falling cost (names break ties), so that the last task to start is a short one."""
    return sorted(costs, key=lambda name: (-costs[name], name))


def runs(
    names: Sequence[str], costs: Mapping[str, float], cost: float, count: int
) -> list[tuple[str, ...]]:
    """Names in runs, in their order: each as long as its costs and its number allow, or one name
    that is dearer by itself."""
    found: list[list[str]] = []
    left = 0.0
    for name in names:
        if found and costs[name] <= left and len(found[-1]) < count:
            found[-1].append(name)
        else:
            found.append([name])
            left = cost
        left -= costs[name]
    return [tuple(run) for run in found]


@dataclass(frozen=True)
class Slot:
    """Where one task at a time can run."""

    node: str
    number: int


def next_task(
    waiting: Sequence[int],
    slots: Sequence[Slot],
    busy: Sequence[tuple[Slot, int]],
    sizes: Sequence[int],
    memory: Mapping[str, int],
    shunned: Mapping[int, set[str]],
) -> tuple[int, Slot] | None:
    """Which task starts where, now that some slots are idle; ``None`` for none.

    The first that waits has the first choice. A task goes where its memory fits beside those that
    run there, or where nothing runs; and not to where it failed before, if there is another place.

    Args:
        waiting: tasks by number, the most urgent first.
        busy: those that are taken, each with the bytes of its task.
        sizes: bytes of every task.
        memory: bytes of every node.
        shunned: task -> nodes where it failed.
    """
    taken = {slot for slot, _ in busy}
    used: Counter[str] = Counter()
    for slot, size in busy:
        used[slot.node] += size
    idle = [slot for slot in slots if slot not in taken]
    # The emptier node first, so that what is left of memory is spread.
    idle.sort(key=lambda slot: used[slot.node] - memory.get(slot.node, 0))
    everywhere = {slot.node for slot in slots}
    for task in waiting:
        # Where nothing else is left it goes back to where it failed.
        bad = shunned.get(task, set())
        if not everywhere - bad:
            bad = set()
        for slot in idle:
            if slot.node in bad:
                continue
            fits = used[slot.node] + sizes[task] <= memory.get(slot.node, 0)
            if fits or not used[slot.node]:
                return task, slot
    return None


def makespan(costs: Sequence[float], workers: int) -> float:
    """When the last of some tasks ends, each worker taking the longest that is left."""
    ends = [0.0] * workers
    heapq.heapify(ends)
    for cost in sorted(costs, reverse=True):
        heapq.heappush(ends, heapq.heappop(ends) + cost)
    return max(ends)
