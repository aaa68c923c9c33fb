"""What pruning asks of a block's curvature, and the answers of one that is the block's own.

    Surgeon         whichever form the curvature has
    BlockSurgeon    EK-FAC, K-FAC, diagonal
    RankSurgeon     a part of a rank-m Fisher (rank_surgeon.py)

What the loss rises by when a set Q of weights goes at once, the rest moving:

    ρ_Q = ½ u_Qᵀ ([(F + λ)⁻¹]_QQ)⁻¹ u_Q             u: the weights, after the Newton step if any

Kurtic et al. 2022 (arXiv:2203.07259), section 3.2, there for a rank-m Fisher. Exact, too, for
``(F + λ)⁻¹ = (Q_G ⊗ Q_A) diag(f(Λ)) (Q_G ⊗ Q_A)ᵀ``, whose submatrices are

    of an output o      Q_A diag(c[o]) Q_Aᵀ              c = (Q_G * Q_G) f(Λ)
    of columns C        (Q_G ⊗ I) blockdiag_p(D_p) (Q_G ⊗ I)ᵀ,   D_p = Q_A[C] diag(f(Λ)[p]) Q_A[C]ᵀ

What the others do when Q goes, all of it at once, the joint step:

    min over δ_P of  gᵀδ + ½ δᵀ(F + λ)δ,   δ_Q = −w_Q
    (F + λ)_PP δ_P = F_PQ w_Q − g_P                     P stays

The steps for single weights, ``−(F + λ)⁻¹e_k w_k / [(F + λ)⁻¹]_kk``, do not add up to this: each
moves weights that others set to zero. The equations are solved on P by conjugate gradients with the
masked ``apply(x, Λ -> Λ + λ)``, preconditioned by the masked inverse; a small block's by Cholesky;
a diagonal curvature's need no solving. Hassibi & Stork 1992.

Saliencies are predicted increases of the mean loss per example, computed in float64 and kept in
float32; those of single weights are in :mod:`raycurv.mathematics.pruning.saliency`.

Axis letters: M rows of a rank-m Fisher, O outputs, I inputs (with the bias column), B runs of a
row, H columns of a set, P eigenvectors of the output side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement
from typing import Protocol

import torch
from torch import Tensor

from raycurv.mathematics.cholesky import cholesky
from raycurv.mathematics.curvature import BlockCurvature, Damping
from raycurv.mathematics.eigen import Eigenbasis
from raycurv.mathematics.pruning.pattern import (
    CHUNK,
    Entries,
    Pattern,
    joint_pattern,
    summed_pattern,
)
from raycurv.mathematics.pruning.saliency import obd, obs
from raycurv.mathematics.pruning.structures import NofM
from raycurv.mathematics.pruning.update import Solver, Update, conjugate_gradients


@dataclass(frozen=True)
class Increase:
    """The rise of the mean loss per example that the quadratic model predicts for a block's step.

    Attributes:
        alone: of this step with no other.
        seen: of a rank-m Fisher the block's share of ``Gδ``, ``[M]``.
        first: its share of ``gᵀδ`` there.
    """

    alone: float
    seen: Tensor | None = None
    first: float = 0.0


class Surgeon(Protocol):
    """What the curvature of one block says of its weights."""

    def obd(self) -> Tensor:
        """Optimal Brain Damage of single weights, float32 ``[O, I]``."""
        ...

    def obs(self) -> Tensor:
        """Optimal Brain Surgeon of single weights, float32 ``[O, I]``; zero where F is."""
        ...

    def pattern(self, pattern: NofM, keep_OI: Tensor | None = None) -> Pattern:
        """The N:M pattern of least increase among weights that are still there.

        Raises:
            UserError: M does not divide the inputs.
        """
        ...

    def outputs(self) -> Tensor:
        """Optimal Brain Surgeon of whole outputs with their bias, float32 ``[O]``."""
        ...

    def columns(self, columns: tuple[range, ...]) -> Tensor:
        """Of runs of columns over all outputs (attention heads), float32 ``[len(columns)]``."""
        ...

    def remaining(self, keep_OI: Tensor, solver: Solver, z_M: Tensor | None = None) -> Update:
        """The weights once some are gone and the others have moved to the damped model's minimum.

        Args:
            keep_OI: bool, which stay.
            solver: of the equations, where they are iterated.
            z_M: the solution of the whole model's equations, where the block is part of them.

        Raises:
            NumericalError: the equations of a small block have no Cholesky root.
        """
        ...

    def increase(self, step_OI: Tensor) -> Increase:
        """What the undamped F predicts for a step, new weights less old ones."""
        ...


@dataclass(frozen=True)
class BlockSurgeon:
    """Of a curvature that is the block's own.

    Attributes:
        curvature: of the block.
        w_OI: its weights.
        damping: of the block.
        gradient_OI: mean gradient over examples, for a model that has not converged.

    Raises:
        UserError: a shape is not the block's; of all but ``obd`` also where there is no damping and
            Λ has a zero.
    """

    curvature: BlockCurvature
    w_OI: Tensor
    damping: Damping
    gradient_OI: Tensor | None = None

    def __post_init__(self) -> None:
        self.curvature.check(self.w_OI)
        if self.gradient_OI is not None:
            self.curvature.check(self.gradient_OI)

    def obd(self) -> Tensor:
        return obd(self.w_OI, self.curvature.diagonal(torch.Tensor.double), self.gradient_OI)

    def obs(self) -> Tensor:
        if self.curvature.is_zero:
            return torch.zeros_like(self.w_OI, dtype=torch.float32)
        return obs(self._u_OI, self.curvature.diagonal(self._inverse))

    def pattern(self, pattern: NofM, keep_OI: Tensor | None = None) -> Pattern:
        block, basis = self.curvature.block, self.curvature.input_basis
        groups = pattern.groups(block)
        if self.curvature.is_zero:
            return summed_pattern(pattern, block, self.obs(), keep_OI)
        spectra_OI = self.curvature.row_spectra(self._inverse)

        def entries(rows: slice) -> Entries:
            return _entries(basis, spectra_OI[rows], groups, pattern.of)

        return joint_pattern(pattern, block, self._u_OI, entries, keep_OI)

    def outputs(self) -> Tensor:
        if self.curvature.is_zero:
            return self._zeros(len(self.w_OI))
        turned_OI = self.curvature.input_basis.rotate(self._u_OI)
        spectra_OI = self.curvature.row_spectra(self._inverse)
        return (0.5 * (turned_OI.square() / spectra_OI).sum(dim=1)).float()

    def columns(self, columns: tuple[range, ...]) -> Tensor:
        # A set of H columns costs O H² I multiplications.
        if self.curvature.is_zero:
            return self._zeros(len(columns))
        f_PI = self._inverse(self.curvature.eigenvalues)
        turned_PI = self.curvature.output_basis.rotate(self._u_OI.T).T
        basis = self.curvature.input_basis
        return torch.stack([_column_saliency(basis, f_PI, turned_PI, c) for c in columns]).float()

    def remaining(self, keep_OI: Tensor, solver: Solver, z_M: Tensor | None = None) -> Update:
        curvature = self.curvature
        curvature.check(keep_OI)
        if curvature.is_zero:
            return Update(torch.where(keep_OI, self.w_OI, 0), 0, 0.0, "zero")
        damped, inverse = curvature.damped(self.damping), curvature.inverse(self.damping)
        dense = keep_OI.numel() <= solver.dense_up_to
        dtype = torch.float64 if dense else solver.dtype
        w = self.w_OI.to(dtype)

        def operator(x: Tensor) -> Tensor:
            return torch.where(keep_OI, curvature.apply(x, damped), 0)

        def precondition(x: Tensor) -> Tensor:
            # It doubles an iteration's cost and takes a fifth to three fifths of the iterations
            # that the diagonal takes, on spectra like those of networks (LOG.md).
            return torch.where(keep_OI, curvature.apply(x, inverse), 0)

        right = operator(torch.where(keep_OI, 0, w))
        if self.gradient_OI is not None:
            right -= torch.where(keep_OI, self.gradient_OI.to(dtype), 0)
        iterations, exact = 0, curvature.is_diagonal or dense
        if curvature.is_diagonal:
            step = right / damped(curvature.eigenvalues.to(right))
        elif dense:
            step = self._by_cholesky(keep_OI, right)
        else:
            step, iterations = conjugate_gradients(operator, right, precondition, solver)
        length = float(right.norm())
        residual = float((right - operator(step)).norm()) / length if length else 0.0
        outcome = "ok" if exact or residual <= solver.tolerance else "not converged"
        w_new = torch.where(keep_OI, w + step, 0).to(self.w_OI.dtype)
        return Update(w_new, iterations, residual, outcome)

    def _by_cholesky(self, keep_OI: Tensor, right: Tensor) -> Tensor:
        kept = keep_OI.flatten().nonzero()[:, 0]
        matrix = self.curvature.dense()[kept[:, None], kept]
        matrix.diagonal().add_(self.curvature.damping(self.damping))
        name = self.curvature.block.name
        root = cholesky(matrix, f"block {name}, the curvature of the weights that stay")
        step = torch.zeros_like(right)
        step.view(-1)[kept] = torch.cholesky_solve(right.flatten()[kept][:, None], root)[:, 0]
        return step

    def increase(self, step_OI: Tensor) -> Increase:
        # ½ δᵀFδ (+ gᵀδ)
        step = step_OI.double()
        rise = 0.5 * float((step * self.curvature.apply(step, torch.Tensor.double)).sum())
        if self.gradient_OI is not None:
            rise += float((self.gradient_OI.double() * step).sum())
        return Increase(rise)

    @cached_property
    def _u_OI(self) -> Tensor:
        """``w − (F + λ)⁻¹ g``, float64: the weights themselves without a gradient."""
        w = self.w_OI.double()
        if self.gradient_OI is None:
            return w
        inverse = self.curvature.inverse(self.damping)
        return w - self.curvature.apply(self.gradient_OI.double(), inverse)

    def _inverse(self, lam: Tensor) -> Tensor:
        """``1 / (Λ + λ)`` in float64, whatever Λ is kept in."""
        return self.curvature.inverse(self.damping)(lam.double())

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float32, device=self.w_OI.device)


def _entries(basis: Eigenbasis, spectra_OI: Tensor, groups: int, of: int) -> Entries:
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
