"""What the loss of a block rises by when a set Q of its weights goes at once, the rest moving.

    ρ_Q = ½ u_Qᵀ ([(F + λ)⁻¹]_QQ)⁻¹ u_Q             u: the weights, after the Newton step if any

Kurtic et al. 2022 (arXiv:2203.07259), section 3.2, there for a rank-m Fisher. Here exact, too, for
``(F + λ)⁻¹ = (Q_G ⊗ Q_A) diag(f(Λ)) (Q_G ⊗ Q_A)ᵀ``, whose submatrices are

    of an output o      Q_A diag(c[o]) Q_Aᵀ              c = (Q_G * Q_G) f(Λ)
    of columns C        (Q_G ⊗ I) blockdiag_p(D_p) (Q_G ⊗ I)ᵀ,   D_p = Q_A[C] diag(f(Λ)[p]) Q_A[C]ᵀ

and for a rank-m Fisher, by the Schur complement of the weights that stay (P),

    ([F⁻¹]_QQ)⁻¹ = λ + λ G_Qᵀ (λ m + G_P G_Pᵀ)⁻¹ G_Q

whose terms are all positive: the way by F⁻¹ takes 1/λ less nearly 1/λ.

All are increases of the mean loss per example, computed in float64, kept in float32. Axis letters
as in :mod:`raycurv.mathematics.pruning.saliency`; H columns of a set, P eigenvectors of the output
side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from raycurv.mathematics.cholesky import cholesky
from raycurv.mathematics.curvature import BlockCurvature, Damping
from raycurv.mathematics.eigen import Eigenbasis
from raycurv.mathematics.pruning.saliency import inverse_in_double

# Elements of what is formed at once (float64: 64 MiB).
CHUNK = 2**23


def row_saliencies(curvature: BlockCurvature, u_OI: Tensor, damping: Damping) -> Tensor:
    """Of every whole output with its bias, float32 ``[O]``; zero where Λ is.

    Args:
        curvature: of the block.
        u_OI: from :func:`~raycurv.mathematics.pruning.saliency.after_newton_step`.
        damping: of the block.

    Raises:
        UserError: a shape is not the block's, or there is no damping where Λ has a zero.
    """
    curvature.check(u_OI)
    if curvature.is_zero:
        return torch.zeros(len(u_OI), dtype=torch.float32, device=u_OI.device)
    turned_OI = curvature.input_basis.rotate(u_OI.double())
    spectra_OI = curvature.row_spectra(inverse_in_double(curvature, damping))
    return (0.5 * (turned_OI.square() / spectra_OI).sum(dim=1)).float()


def column_saliencies(
    curvature: BlockCurvature, u_OI: Tensor, damping: Damping, columns: Sequence[range]
) -> Tensor:
    """Of runs of columns over all outputs (attention heads), float32 ``[len(columns)]``.

    A set of H columns costs ``O H² I`` multiplications. Arguments and errors as for
    :func:`row_saliencies`.
    """
    curvature.check(u_OI)
    if curvature.is_zero:
        return torch.zeros(len(columns), dtype=torch.float32, device=u_OI.device)
    f_PI = inverse_in_double(curvature, damping)(curvature.eigenvalues)
    turned_PI = curvature.output_basis.rotate(u_OI.double().T).T
    found = [_column_saliency(curvature.input_basis, f_PI, turned_PI, run) for run in columns]
    return torch.stack(found).float()


def _column_saliency(basis: Eigenbasis, f_PI: Tensor, turned_PI: Tensor, run: range) -> Tensor:
    y_PH = turned_PI[:, run.start : run.stop]
    if not basis.vectors:
        return 0.5 * (y_PH.square() / f_PI[:, run.start : run.stop]).sum()
    among, q_HI = _some_rows(basis, run)
    total = torch.zeros((), dtype=torch.float64, device=f_PI.device)
    step = max(1, CHUNK // q_HI.numel())
    for f, y in zip(f_PI[:, among].split(step), y_PH.split(step), strict=True):
        d_PHH = (q_HI * f[:, None, :]) @ q_HI.T
        half = torch.linalg.solve_triangular(
            cholesky(d_PHH, "the inverse curvature of columns"), y[:, :, None], upper=False
        )
        total += 0.5 * half.square().sum()
    return total


def _some_rows(basis: Eigenbasis, run: range) -> tuple[slice, Tensor]:
    """Rows of the basis, and which of its columns they are not zero in."""
    touched = [
        (tile, vectors)
        for tile, vectors in zip(basis.ranges, basis.vectors, strict=True)
        if tile.start < run.stop and run.start < tile.stop
    ]
    rows: Tensor = torch.block_diag(
        *(
            q[max(run.start - tile.start, 0) : min(run.stop, tile.stop) - tile.start].double()
            for tile, q in touched
        )
    )
    return slice(touched[0][0].start, touched[-1][0].stop), rows


def rank_row_saliencies(rows_MN: Tensor, u_OI: Tensor, gram_MM: Tensor, lam: float) -> Tensor:
    """Of every whole output under a rank-m Fisher, float32 ``[O]``.

    Args:
        rows_MN: the part's columns of G, one a weight of ``u_OI`` in its order.
        u_OI: the part's weights, less its part of F⁻¹g where there is a first-order term.
        gram_MM: ``G Gᵀ`` of all parts, or of this one where each block stands alone; float64.
        lam: λ.

    Raises:
        NumericalError: λ is lost beside the Gram matrix.
    """
    width = u_OI.shape[1]
    sets = ((rows_MN[:, o * width : (o + 1) * width], u) for o, u in enumerate(u_OI))
    return _rank_saliencies(sets, gram_MM, lam)


def rank_column_saliencies(
    rows_MN: Tensor, u_OI: Tensor, gram_MM: Tensor, lam: float, columns: Sequence[range]
) -> Tensor:
    """Of runs of columns under a rank-m Fisher, float32; otherwise :func:`rank_row_saliencies`."""
    rows_MOI = rows_MN.view(-1, *u_OI.shape)
    sets = (
        (rows_MOI[..., run.start : run.stop].flatten(1), u_OI[:, run.start : run.stop].flatten())
        for run in columns
    )
    return _rank_saliencies(sets, gram_MM, lam)


def _rank_saliencies(sets: Iterable[tuple[Tensor, Tensor]], gram_MM: Tensor, lam: float) -> Tensor:
    # ½ λ (u_Qᵀ u_Q + yᵀ (λ m + G_P G_Pᵀ)⁻¹ y),   y = G_Q u_Q
    damped_MM = gram_MM.double().clone()
    damped_MM.diagonal().add_(lam * len(gram_MM))
    found = []
    for rows, u in sets:
        rows, u = rows.double(), u.double()
        kept_MM = torch.addmm(damped_MM, rows, rows.T, alpha=-1)
        root = cholesky(kept_MM, "the Gram matrix of the weights that stay")
        half = torch.linalg.solve_triangular(root, (rows @ u)[:, None], upper=False)
        found.append(0.5 * lam * (u.square().sum() + half.square().sum()))
    return torch.stack(found).float()
