"""A block's rank-m Fisher with the primitives of every block's curvature.

    F = GᵀG/m = V S Vᵀ          G [M, O·I], V orthonormal [O·I, r], r ≤ min(M, O·I)
    apply(x, f)  = f(0) x + V (f(S) − f(0)) Vᵀ x
    diagonal(f)  = f(0) + (V ∘ V) (f(S) − f(0))

V comes from the eigenvectors of GGᵀ/m, or of F itself where that is no larger; eigenvalues that
rounding alone makes are zero. For the inverse at a damping far below the largest eigenvalue
:mod:`raycurv.mathematics.rank.rank_inverse` loses less.

Axis letters: M rows, O and I the block's axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import Curvature, SpectralFunction


@dataclass(frozen=True)
class RankCurvature(Curvature):
    """The rank-m Fisher of one block alone.

    Attributes:
        block: its shape and name.
        rows_MOI: ``G``; a row is √B times the mean gradient of B examples.
    """

    block: Block
    rows_MOI: Tensor

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``[r]``, falling, and their vectors ``[O·I, r]``, float64."""
        rows = self.rows_MOI.flatten(1).double()
        count, size = rows.shape
        small = rows.T @ rows if size <= count else rows @ rows.T
        values, vectors = torch.linalg.eigh(small / count)
        largest = values[-1].clamp_min(0.0)
        real = values > max(count, size) * torch.finfo(torch.float64).eps * largest
        values, vectors = values[real].flip(0), vectors[:, real].flip(1)
        if size > count:
            vectors = rows.T @ vectors / (count * values).sqrt()
        return values, vectors

    @property
    def eigenvalues(self) -> Tensor:
        """Those above zero, falling, ``[r]``; the other ``O·I − r`` are zero."""
        return self._spectrum[0]

    @property
    def trace(self) -> float:
        """The sum of the eigenvalues: the mean squared norm of the rows."""
        return float(self.rows_MOI.double().square().sum()) / len(self.rows_MOI)

    def apply(self, x: Tensor, f: SpectralFunction) -> Tensor:
        self.check(x)
        values, vectors = self._spectrum
        flat = x.double().flatten(-2)
        base = self._base(f)
        inner = (flat @ vectors) * (f(values.clone()) - base)
        return (base * flat + inner @ vectors.T).view(x.shape).to(x.dtype)

    def diagonal(self, f: SpectralFunction) -> Tensor:
        values, vectors = self._spectrum
        base = self._base(f)
        found = base + vectors.square() @ (f(values.clone()) - base)
        return found.view(self.block.d_out, self.block.d_in)

    def dense(self) -> Tensor:
        rows = self.rows_MOI.flatten(1).double()
        return rows.T @ rows / len(rows)

    def _base(self, f: SpectralFunction) -> float:
        return float(f(torch.zeros(1, dtype=torch.float64)))
