"""N:M patterns: which weights of each run of M inputs stay, by what the others cost together.

Every way to choose M − N of M is tried (six for 2:4), and the cheapest taken; runs are chosen
independently of one another. For OBS a way costs

    ρ_Q = ½ u_Qᵀ ([(F + λ)⁻¹]_QQ)⁻¹ u_Q

with the exact submatrix, whose entries for EK-FAC are those of an output's own part,
``Σ_q c[o, q] Q_A[i, q] Q_A[j, q]`` (see :mod:`raycurv.mathematics.pruning.set_saliency`).

Kurtic et al. 2022 (arXiv:2203.07259), section 3.2.

Axis letters: O outputs, I inputs (with the bias column), B runs of a row, M places of a run, K of
them that go, S runs that are looked at together, Z rows of a rank-m Fisher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from raycurv.errors import NumericalError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import BlockCurvature, Damping
from raycurv.mathematics.eigen import Eigenbasis
from raycurv.mathematics.pruning.saliency import inverse_in_double
from raycurv.mathematics.pruning.set_saliency import CHUNK
from raycurv.mathematics.pruning.structures import NofM, inputs_of
from raycurv.mathematics.rank.rank_inverse import RankInverse


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


def obs_pattern(
    pattern: NofM,
    curvature: BlockCurvature,
    u_OI: Tensor,
    damping: Damping,
    keep_OI: Tensor | None = None,
) -> Pattern:
    """The pattern of least ρ_Q in every run, under a block's damped curvature.

    Args:
        pattern: N of M.
        curvature: of the block.
        u_OI: from :func:`~raycurv.mathematics.pruning.saliency.after_newton_step`, zero (less the
            step) where weights went before.
        damping: of the block.
        keep_OI: as for :func:`summed_pattern`.

    Raises:
        UserError: M does not divide the inputs, a shape is not the block's, or there is no damping
            where Λ has a zero.
    """
    curvature.check(u_OI)
    groups = pattern.groups(curvature.block)
    if curvature.is_zero:
        return summed_pattern(pattern, curvature.block, torch.zeros_like(u_OI), keep_OI)
    spectra_OI = curvature.row_spectra(inverse_in_double(curvature, damping))

    def costs(rows: slice) -> list[Tensor]:
        entries = _entries(curvature.input_basis, spectra_OI[rows], groups, pattern.of)
        return _quadratics(pattern, _runs(pattern, u_OI[rows], groups), entries)

    return _choose(pattern, curvature.block, len(u_OI), costs, keep_OI)


def rank_pattern(
    pattern: NofM,
    block: Block,
    inverse: RankInverse,
    rows_ZN: Tensor,
    u_OI: Tensor,
    keep_OI: Tensor | None = None,
) -> Pattern:
    """The pattern of least ρ_Q in every run, under a rank-m Fisher.

    Args:
        pattern: N of M.
        block: the part that is looked at.
        inverse: of the whole Fisher, or of this block's.
        rows_ZN: the block's columns of G, one a weight of ``u_OI`` in its order.
        u_OI: its weights, less its part of F⁻¹g where there is a first-order term.
        keep_OI: as for :func:`summed_pattern`.

    Raises:
        UserError: M does not divide the inputs.
    """
    groups, width = pattern.groups(block), u_OI.shape[1]
    places_IM = torch.arange(groups * pattern.of, device=u_OI.device).view(groups, pattern.of)

    def costs(rows: slice) -> list[Tensor]:
        outputs = torch.arange(rows.start, min(rows.stop, len(u_OI)), device=u_OI.device)
        index_SM = (outputs[:, None, None] * width + places_IM).flatten(0, 1)
        found_OBMM = (
            inverse.submatrices(rows_ZN, index_SM).double().unflatten(0, (len(outputs), groups))
        )
        pairs = combinations_with_replacement(range(pattern.of), 2)
        entries = {(a, b): found_OBMM[..., a, b] for a, b in pairs}
        return _quadratics(pattern, _runs(pattern, u_OI[rows], groups), entries)

    # A row of G for every weight that is looked at.
    return _choose(pattern, block, len(u_OI), costs, keep_OI, len(rows_ZN))


def _runs(pattern: NofM, u_OI: Tensor, groups: int) -> list[Tensor]:
    """Place by place, ``[O, B]`` each."""
    runs_OBM = u_OI[:, : groups * pattern.of].double().unflatten(1, (groups, pattern.of))
    return list(runs_OBM.unbind(dim=-1))


def _entries(
    basis: Eigenbasis, spectra_OI: Tensor, groups: int, of: int
) -> dict[tuple[int, int], Tensor]:
    """``Σ_q spectra[o, q] Q[i, q] Q[j, q]``, ``[O, B]``, for i and j at any two places of a run."""
    found = {}
    for a, b in combinations_with_replacement(range(of), 2):
        if not basis.vectors and a == b:
            found[a, b] = spectra_OI[:, a : groups * of : of]
            continue
        # Places in two tiles have nothing in common.
        found[a, b] = spectra_OI.new_zeros(len(spectra_OI), groups)
        for tile, q in zip(basis.ranges, basis.vectors, strict=True):
            first = max(0, -(-(tile.start - a) // of))
            last = min(groups, (tile.stop - 1 - b) // of + 1)
            if first < last:
                place = torch.arange(first * of, last * of, of, device=q.device) - tile.start
                product = q[place + a].double() * q[place + b].double()
                found[a, b][:, first:last] = spectra_OI[:, tile.start : tile.stop] @ product.T
    return found


def _quadratics(
    pattern: NofM, u: list[Tensor], entries: dict[tuple[int, int], Tensor]
) -> list[Tensor]:
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
