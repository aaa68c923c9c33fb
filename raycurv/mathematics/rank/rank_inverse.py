"""The inverse of a damped rank-m Fisher (M-FAC), from its rows and without forming it.

    F = λI + GᵀG / m                        row i of G [M, D] is √B times the mean gradient of B
    F⁻¹x = x/λ − Gᵀ C⁻¹ (Gx) / λ²            C = mI + GGᵀ/λ = LLᵀ
    (F⁻¹)_kl = δ_kl/λ − Σ_i Z_ik Z_il / λ²    LZ = G

Frantar et al. 2021 (arXiv:2107.03356), section 3, in Gram form (Woodbury's identity): the D columns
may lie in any number of parts, which share the Gram GGᵀ and a vector of M numbers for each x. C is
never inverted, and where D ≤ M, so that the differences above are of nearly equal numbers, F itself
is decomposed: D² ≤ M² numbers.

Everything is float64. Scale: F is a mean over examples, as Λ is.

Axis letters: M rows, D columns in all, N those of one part, Q vectors, S sets of K columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from raycurv.errors import NumericalError, UserError
from raycurv.mathematics.curvature import Damping

# Largest residual of a product that is still one: beyond, it is mostly rounding.
LARGEST_RESIDUAL = 1e-2


class RankInverse(Protocol):
    """F⁻¹, a part of its columns at a time.

    Attributes:
        gram: ``GGᵀ`` ``[M, M]`` over all columns.
        damping: λ.
        width: length of what a part contributes for each vector, see :meth:`project`.
    """

    @property
    def gram(self) -> Tensor: ...

    @property
    def damping(self) -> float: ...

    @property
    def width(self) -> int: ...

    def at(self, offset: int) -> RankInverse:
        """The same, for a part whose first column is so many behind that of this one."""
        ...

    def project(self, rows_MN: Tensor, x_QN: Tensor) -> Tensor:
        """A part's share ``[Q, width]`` of what :meth:`apply` needs to know of whole vectors; the
        shares of all parts add up."""
        ...

    def apply(self, rows_MN: Tensor, x_QN: Tensor, projection: Tensor) -> Tensor:
        """A part of ``F⁻¹x``, ``[Q, N]``, given its part of x and the sum of all projections."""
        ...

    def quadratic(self, projection: Tensor, squares_Q: Tensor) -> Tensor:
        """``xᵀF⁻¹x`` ``[Q]``, given the sum of all projections and ``|x|²``."""
        ...

    def residual(self, projection: Tensor, applied: Tensor) -> float:
        """How far F·(F⁻¹x) is from x, relative to x, in the directions that F sees.

        Args:
            projection: of the x, summed over parts.
            applied: of the products, likewise.
        """
        ...

    def diagonal(self, rows_MN: Tensor) -> Tensor:
        """A part of the diagonal of F⁻¹, ``[N]``."""
        ...

    def submatrices(self, rows_MN: Tensor, index_SK: Tensor) -> Tensor:
        """Entries ``[S, K, K]`` of F⁻¹ at sets of a part's columns."""
        ...


@dataclass(frozen=True)
class GramInverse:
    """F⁻¹ through the Gram, for more columns than rows.

    Attributes:
        gram: ``GGᵀ`` ``[M, M]``.
        damping: λ.
        lower: ``L`` ``[M, M]``.
    """

    gram: Tensor
    damping: float
    lower: Tensor

    @property
    def width(self) -> int:
        """M: a product with G travels, whatever the number of columns."""
        return len(self.gram)

    def at(self, offset: int) -> GramInverse:
        return self

    def project(self, rows_MN: Tensor, x_QN: Tensor) -> Tensor:
        return x_QN.double() @ rows_MN.double().T

    def apply(self, rows_MN: Tensor, x_QN: Tensor, projection: Tensor) -> Tensor:
        weights_QM = self._solve(projection) / self.damping**2
        found: Tensor = torch.addmm(
            x_QN.double(), weights_QM, rows_MN.double(), beta=1 / self.damping, alpha=-1.0
        )
        return found

    def quadratic(self, projection: Tensor, squares_Q: Tensor) -> Tensor:
        z: Tensor = torch.linalg.solve_triangular(self.lower, projection.double().T, upper=False)
        return squares_Q.double() / self.damping - z.square().sum(dim=0) / self.damping**2

    def residual(self, projection: Tensor, applied: Tensor) -> float:
        # G(Fy − x) = λGy + GGᵀ(Gy)/m − Gx: numbers of rows alone.
        seen = self.damping * applied + applied @ self.gram / len(self.gram)
        return _relative(seen - projection, projection)

    def own_residual(self) -> float:
        """The residual for an x in the span of the rows, where the two terms cancel most."""
        # x = Gᵀr: its projection is GGᵀr, and F⁻¹x = Gᵀ(r/λ − C⁻¹GGᵀr/λ²).
        ones = torch.ones(1, len(self.gram), dtype=torch.float64)
        projection = ones @ self.gram
        inner = ones / self.damping - self._solve(projection) / self.damping**2
        return self.residual(projection, inner @ self.gram)

    def diagonal(self, rows_MN: Tensor) -> Tensor:
        squares = self._whitened(rows_MN).square().sum(dim=0)
        return 1 / self.damping - squares / self.damping**2

    def submatrices(self, rows_MN: Tensor, index_SK: Tensor) -> Tensor:
        z_SMK = self._whitened(rows_MN)[:, index_SK].movedim(0, 1)
        inner = torch.bmm(z_SMK.transpose(1, 2), z_SMK) / self.damping**2
        return torch.eye(index_SK.shape[1], dtype=torch.float64) / self.damping - inner

    def _solve(self, projection_QM: Tensor) -> Tensor:
        solved: Tensor = torch.cholesky_solve(projection_QM.double().T, self.lower)
        return solved.T

    def _whitened(self, rows_MN: Tensor) -> Tensor:
        whitened: Tensor = torch.linalg.solve_triangular(self.lower, rows_MN.double(), upper=False)
        return whitened


@dataclass(frozen=True)
class DenseInverse:
    """F⁻¹ itself, for no more columns than rows.

    Attributes:
        gram: ``GGᵀ`` ``[M, M]``.
        inverse: ``[D, D]``.
        fisher: ``F`` ``[D, D]``, λ included.
        damping: λ.
        start: first column of the part that is asked for.
    """

    gram: Tensor
    inverse: Tensor
    fisher: Tensor
    damping: float
    start: int = 0

    @property
    def width(self) -> int:
        """D: what travels is x itself."""
        return len(self.inverse)

    def at(self, offset: int) -> DenseInverse:
        return replace(self, start=self.start + offset)

    def project(self, rows_MN: Tensor, x_QN: Tensor) -> Tensor:
        whole = torch.zeros(len(x_QN), self.width, dtype=torch.float64)
        whole[:, self._part(x_QN.shape[1])] = x_QN.double()
        return whole

    def apply(self, rows_MN: Tensor, x_QN: Tensor, projection: Tensor) -> Tensor:
        return projection.double() @ self.inverse[:, self._part(x_QN.shape[1])]

    def quadratic(self, projection: Tensor, squares_Q: Tensor) -> Tensor:
        return (projection @ self.inverse * projection).sum(dim=1)

    def residual(self, projection: Tensor, applied: Tensor) -> float:
        return _relative(applied @ self.fisher - projection, projection)

    def diagonal(self, rows_MN: Tensor) -> Tensor:
        return self.inverse.diagonal()[self._part(rows_MN.shape[1])]

    def submatrices(self, rows_MN: Tensor, index_SK: Tensor) -> Tensor:
        place = index_SK + self.start
        return self.inverse[place[:, :, None], place[:, None, :]]

    def _part(self, size: int) -> slice:
        return slice(self.start, self.start + size)


@dataclass(frozen=True)
class RankInverses:
    """The inverses of a model's blocks: one that all are parts of, or one for each.

    Attributes:
        by_block: block -> the inverse, at the block's own columns; ``None`` where all rows are
            zero, whose products are zero.
        joint: whether it is one inverse, of the model's whole Fisher, that all blocks are parts of.
    """

    by_block: Mapping[str, RankInverse | None]
    joint: bool


def rank_damping(setting: Damping, gram: Tensor, size: int, where: str) -> float:
    """λ: a factor of the mean eigenvalue ``tr(GGᵀ) / (m d)`` of F without it, or absolute; 0 where
    all rows are zero.

    Args:
        gram: ``GGᵀ``.
        size: D.
        where: whose Fisher it is, for errors.

    Raises:
        UserError: it is 0, and F has no inverse.
    """
    mean = float(gram.trace()) / (len(gram) * size)
    if mean == 0.0:
        return 0.0
    found = setting.of(mean)
    if found == 0.0:
        raise UserError(
            where,
            f"a positive damping, since {len(gram)} gradients do not span {size:,} parameters",
            f"damping {setting}",
            "Give --damping a positive value.",
        )
    return found


def rank_inverse(
    gram: Tensor, size: int, damping: float, where: str, whole: Tensor | None = None
) -> RankInverse:
    """The inverse of ``λI + GᵀG/m``.

    Args:
        gram: ``GGᵀ`` ``[M, M]`` over all columns.
        size: D, how many columns there are.
        damping: λ, above 0.
        where: whose Fisher it is, for errors.
        whole: G itself, needed where D ≤ M.

    Raises:
        NumericalError: λ is too small for float64 beside the largest eigenvalue.
    """
    assert damping > 0
    gram = gram.double()
    if size <= len(gram):
        assert whole is not None and whole.shape == (len(gram), size)
        rows = whole.double()
        fisher = rows.T @ rows / len(gram)
        fisher.diagonal().add_(damping)
        lower = _cholesky(fisher, damping, where)
        inverse = torch.cholesky_inverse(lower)
        product = fisher @ inverse
        residual = float((product - torch.eye(size, dtype=product.dtype)).abs().max())
        found: RankInverse = DenseInverse(gram, inverse, fisher, damping)
    else:
        matrix = gram / damping
        matrix.diagonal().add_(len(gram))
        by_gram = GramInverse(gram, damping, _cholesky(matrix, damping, where))
        found, residual = by_gram, by_gram.own_residual()
    if not residual <= LARGEST_RESIDUAL:
        raise _too_small(where, damping, f"a residual of {residual:.2g}")
    return found


def check_residual(residual: float, where: str, damping: float, dtype: torch.dtype) -> None:
    """Refuse products that are mostly rounding.

    Raises:
        NumericalError: the residual is above :data:`LARGEST_RESIDUAL`, or not a number.
    """
    if not residual <= LARGEST_RESIDUAL:
        raise NumericalError(
            where,
            f"products with the inverse whose residual is at most {LARGEST_RESIDUAL:g}",
            f"a residual of {residual:.2g}: a damping of {damping:.2g} is too small for "
            f"{str(dtype).removeprefix('torch.')}",
            "Give a larger --damping, or --dtype float64.",
        )


def _cholesky(matrix: Tensor, damping: float, where: str) -> Tensor:
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info) or not torch.isfinite(lower).all():
        raise _too_small(where, damping, "no Cholesky factor")
    return lower


def _too_small(where: str, damping: float, got: str) -> NumericalError:
    return NumericalError(
        where,
        "a damping that float64 can tell beside the gradients",
        f"{damping:.2g}, with {got}",
        "Give a larger --damping.",
    )


def _relative(difference: Tensor, reference: Tensor) -> float:
    scale = float(reference.abs().max())
    return float(difference.abs().max()) / scale if scale else 0.0
