"""The joint step of what remains, under a rank-m Fisher ``F = λ + GᵀG / m`` (M-FAC), exactly.

    δ_P = G_Pᵀ z − g_P / λ
    z   = (λ m + G_P G_Pᵀ)⁻¹ (G_Q w_Q + G_P g_P / λ)       P stays, Q goes; g only if not converged

which is ``F_PP δ_P = F_PQ w_Q − g_P`` by the Woodbury identity. G_P G_Pᵀ ``[M, M]`` and the bracket
``[M]`` are sums over parts of the weights: each is formed where the part's columns of G are, and
nothing larger travels. The sums go over the whole model, or over one block where blocks stand
alone. Frantar et al. 2021 (arXiv:2107.03356); Kurtic et al. 2022 (arXiv:2203.07259).

A row of G is one gradient of the mean loss per example, so F has Λ's scale. Axis letters: M rows,
N weights of a part, flattened. Everything is computed in float64, whatever G is kept in.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from raycurv.errors import UserError
from raycurv.mathematics.cholesky import cholesky

# Elements of G that are copied at once (float64: 64 MiB).
_CHUNK = 2**23


def masked_gram(rows_MN: Tensor, keep: Tensor) -> Tensor:
    """``G_P G_Pᵀ`` of a part, float64 ``[M, M]``.

    Args:
        rows_MN: the part's columns of G.
        keep: bool, of N elements in whatever shape.
    """
    total = rows_MN.new_zeros(len(rows_MN), len(rows_MN), dtype=torch.float64)
    for part in _chunks(rows_MN):
        kept = rows_MN[:, part][:, keep.flatten()[part]].double()
        total.addmm_(kept, kept.T)
    return total


def removed_projection(
    rows_MN: Tensor,
    keep: Tensor,
    w: Tensor,
    gradient: Tensor | None = None,
    lam: float | None = None,
) -> Tensor:
    """``G_Q w_Q (+ G_P g_P / λ)`` of a part, float64 ``[M]``.

    Args:
        rows_MN: the part's columns of G.
        keep: bool, of N elements.
        w: weights, of N elements.
        gradient: mean gradient over examples, of N elements.
        lam: λ, with a gradient.
    """
    chosen = torch.where(keep, 0, w.double())
    if gradient is not None:
        assert lam is not None
        chosen = torch.where(keep, gradient.double() / lam, chosen)
    return projection(rows_MN, chosen)


def projection(rows_MN: Tensor, x: Tensor) -> Tensor:
    """``G x`` of a part, float64 ``[M]``; ``x`` has N elements."""
    flat = x.flatten().double()
    total = rows_MN.new_zeros(len(rows_MN), dtype=torch.float64)
    for part in _chunks(rows_MN):
        total.addmv_(rows_MN[:, part].double(), flat[part])
    return total


def solve_kept(gram_MM: Tensor, projection_M: Tensor, lam: float) -> Tensor:
    """``z``, float64 ``[M]``, of the sums over all parts.

    Args:
        gram_MM: from :func:`masked_gram`.
        projection_M: from :func:`removed_projection`.
        lam: λ.

    Raises:
        UserError: λ is not above 0.
        NumericalError: λ is lost beside the Gram matrix.
    """
    _check_damping(lam)
    damped = gram_MM.double().clone()
    damped.diagonal().add_(lam * len(damped))
    root = cholesky(damped, "the Gram matrix of the weights that stay")
    return torch.cholesky_solve(projection_M.double()[:, None], root)[:, 0]


def updated_part(
    rows_MN: Tensor,
    keep: Tensor,
    w: Tensor,
    z_M: Tensor,
    gradient: Tensor | None = None,
    lam: float | None = None,
) -> Tensor:
    """The part's weights after the step, of ``w``'s shape and dtype; exactly zero where they went.

    Args:
        rows_MN: the part's columns of G.
        keep: bool, of ``w``'s shape.
        w: weights before.
        z_M: from :func:`solve_kept`.
        gradient: as it went into :func:`removed_projection`.
        lam: λ, with a gradient.
    """
    step = torch.cat([rows_MN[:, part].double().T @ z_M for part in _chunks(rows_MN)])
    step = step.view(w.shape)
    if gradient is not None:
        assert lam is not None
        step -= gradient.double() / lam
    return torch.where(keep, w.double() + step, 0).to(w.dtype)


def updated_block(
    rows_MN: Tensor, keep: Tensor, w: Tensor, lam: float, gradient: Tensor | None = None
) -> Tensor:
    """The same for a block that stands alone.

    Where fewer weights stay than G has rows, their own equations are the smaller ones, and of the
    better condition: z would be large in directions that G_Pᵀ does not see.

    Raises:
        UserError: λ is not above 0.
        NumericalError: λ is lost beside G.
    """
    if int(keep.sum()) >= len(rows_MN):
        bracket = removed_projection(rows_MN, keep, w, gradient, lam)
        z_M = solve_kept(masked_gram(rows_MN, keep), bracket, lam)
        return updated_part(rows_MN, keep, w, z_M, gradient, lam)
    # (λ + G_PᵀG_P / m) δ_P = G_Pᵀ(G_Q w_Q) / m − g_P
    _check_damping(lam)
    kept = rows_MN[:, keep.flatten()].double()
    right = kept.T @ removed_projection(rows_MN, keep, w) / len(rows_MN)
    if gradient is not None:
        right -= gradient[keep].double()
    matrix = kept.T @ kept / len(rows_MN)
    matrix.diagonal().add_(lam)
    root = cholesky(matrix, "the rank-m Fisher of the weights that stay")
    new = torch.zeros_like(w)
    step = torch.cholesky_solve(right[:, None], root)[:, 0]
    new[keep] = (w[keep].double() + step).to(w.dtype)
    return new


def rank_increase(projection_M: Tensor) -> float:
    """``½ δᵀFδ`` without λ, ``|Gδ|² / 2m``: the predicted rise of the mean loss per example.

    Args:
        projection_M: ``Gδ``, the sum of :func:`projection` over all parts. A first-order term is
            ``gᵀδ`` more, also a sum over parts.
    """
    return float(projection_M.double().square().sum()) / (2 * len(projection_M))


def _check_damping(lam: float) -> None:
    if not lam > 0:
        raise UserError(
            "the damping of a rank-m Fisher",
            "a number above 0",
            f"{lam:g}",
            "Beyond its m rows the Fisher is λ alone: give --damping a positive value.",
        )


def _chunks(rows_MN: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK // len(rows_MN))
    return (slice(start, start + step) for start in range(0, rows_MN.shape[1], step))
