"""N:M patterns: which weights of each run of M inputs stay, by what the others cost together.

Every way to choose M − N of M is tried (six for 2:4), and the cheapest taken; runs are chosen
independently of one another. For OBS a way costs

    ρ_Q = ½ u_Qᵀ ([(F + λ)⁻¹]_QQ)⁻¹ u_Q

with the exact submatrix of the damped inverse, whose entries the surgeons make.

Kurtic et al. 2022 (arXiv:2203.07259), section 3.2.

Axis letters: O outputs, I inputs (with the bias column), B runs of a row, M places of a run, C
ways to choose those that go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raycurv.errors import NumericalError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.pruning.structures import NofM, inputs_of

# Elements of what is formed at once (float64: 64 MiB).
CHUNK = 2**23
# Entries of the damped inverse at any two places of a run, ``[O, B]`` each.
Entries = dict[tuple[int, int], Tensor]


@dataclass(frozen=True)
class Pattern:
    """Which weights of a block stay.

    Attributes:
        keep_OI: bool; the bias column stays.
        saliency_OB: float32, of each run's choice; what had gone before counts with it. An increase
            of the mean loss per example (by magnitude: a sum of squares).
    """

    keep_OI: Tensor
    saliency_OB: Tensor


def summed_pattern(
    pattern: NofM, block: Block, saliency_OI: Tensor, keep_OI: Tensor | None = None
) -> Pattern:
    """The pattern whose removed weights have the least sum of saliencies (magnitude, OBD).

    Args:
        pattern: N of M.
        block: whose matrix it is.
        saliency_OI: of single weights.
        keep_OI: weights that are still there. Those that are not go first, and stay away even
            where that leaves fewer than N.

    Raises:
        UserError: M does not divide the inputs.
    """
    width = pattern.groups(block) * pattern.of

    def costs(rows: slice) -> list[Tensor]:
        runs_OBM = saliency_OI[rows, :width].double().unflatten(1, (-1, pattern.of))
        return [runs_OBM[..., subset].sum(dim=-1) for subset in pattern.subsets]

    return _choose(pattern, block, len(saliency_OI), costs, keep_OI)


def joint_pattern(
    pattern: NofM,
    block: Block,
    u_OI: Tensor,
    entries: Callable[[slice], Entries],
    keep_OI: Tensor | None = None,
    numbers: int = 1,
) -> Pattern:
    """The pattern of least ρ_Q in every run.

    Args:
        pattern: N of M.
        block: whose matrix it is.
        u_OI: its weights after the Newton step, if any; zero (less the step) where weights went
            before.
        entries: gives entries of the damped inverse for some outputs.
        keep_OI: as for :func:`summed_pattern`.
        numbers: how many numbers ``entries`` holds of each weight while it looks at it.

    Raises:
        UserError: M does not divide the inputs.
    """
    groups = pattern.groups(block)

    def costs(rows: slice) -> list[Tensor]:
        runs_OBM = u_OI[rows, : groups * pattern.of].double().unflatten(1, (groups, pattern.of))
        return _quadratics(pattern, list(runs_OBM.unbind(dim=-1)), entries(rows))

    return _choose(pattern, block, len(u_OI), costs, keep_OI, numbers)


def _quadratics(pattern: NofM, u: list[Tensor], entries: Entries) -> list[Tensor]:
    """``½ u_Qᵀ S_QQ⁻¹ u_Q`` of every subset Q, ``[O, B]`` each.

    By elimination, over all runs at once: LAPACK would be called for each small matrix.
    """
    found = []
    for subset in pattern.subsets.tolist():
        rest = {place: u[place] for place in subset}
        left = {pair: s for pair, s in entries.items() if {*pair} <= {*subset}}
        total = torch.zeros_like(u[0])
        for n, a in enumerate(subset):
            pivot, value = left[a, a], rest[a]
            total += value.square() / pivot
            for k, b in enumerate(subset[n + 1 :], n + 1):
                factor = left[a, b] / pivot
                rest[b] = rest[b] - factor * value
                for c in subset[k:]:
                    left[b, c] = left[b, c] - factor * left[a, c]
        found.append(0.5 * total)
    return found


def _choose(
    pattern: NofM,
    block: Block,
    outputs: int,
    costs: Callable[[slice], list[Tensor]],
    keep_OI: Tensor | None,
    numbers: int = 1,
) -> Pattern:
    """The cheapest subset of every run, the first of equal ones; some outputs at a time.

    ``numbers`` are held of each weight while ``costs`` looks at it.
    """
    width, subsets = inputs_of(block), pattern.subsets
    goes_CM = torch.zeros(len(subsets), pattern.of, dtype=torch.bool).scatter_(1, subsets, True)
    keeps, saliencies = [], []
    step = max(1, CHUNK // (width * max(len(subsets), numbers)))
    for start in range(0, outputs, step):
        rows = slice(start, start + step)
        cost_COB = torch.stack(costs(rows))
        if bool(cost_COB.isnan().any()):
            raise NumericalError(
                f"block {block.name}, pattern {pattern}",
                "saliencies that are numbers",
                "NaN",
                "Look for values that are not finite in its weights and its curvature.",
            )
        if keep_OI is not None:
            gone_OBM = ~keep_OI[rows, :width].unflatten(1, (-1, pattern.of))
            missed_COB = torch.stack(
                [(gone_OBM & ~goes.to(gone_OBM.device)).sum(dim=-1) for goes in goes_CM]
            )
            cost_COB[missed_COB > missed_COB.amin(dim=0)] = torch.inf
        least_OB, choice_OB = cost_COB.min(dim=0)
        keeps.append(~goes_CM.to(choice_OB.device)[choice_OB].flatten(1))
        saliencies.append(least_OB.float())
    keep = torch.cat(keeps)
    if block.bias:
        keep = torch.cat([keep, keep.new_ones(outputs, 1)], dim=1)
    if keep_OI is not None:
        keep &= keep_OI
    return Pattern(keep, torch.cat(saliencies))
