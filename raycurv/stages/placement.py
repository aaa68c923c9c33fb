"""Who holds what: layers -> stages, factors -> the order of their eigendecompositions. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raycurv.errors import UserError


def cut_stages(costs: Sequence[float], stages: int) -> tuple[range, ...]:
    """Consecutive runs of units whose largest cost is as small as it can be.

    Args:
        costs: of each unit.
        stages: how many runs; each holds at least one unit.

    Raises:
        UserError: more stages than units.
    """
    units = len(costs)
    if stages > units:
        raise UserError(
            "--stages",
            f"at most {units}, the layers that this model can be cut between",
            str(stages),
            f"Give --stages {units} or fewer.",
        )
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


def eigh_cost(tiles: Sequence[int]) -> float:
    """Relative cost of decomposing a factor: about 9 d³ FLOPs a tile."""
    return 9.0 * sum(float(t) ** 3 for t in tiles)


def longest_first(costs: Mapping[str, float]) -> list[str]:
    """Names by falling cost (names break ties), so that the last task to start is a short one."""
    return sorted(costs, key=lambda name: (-costs[name], name))
