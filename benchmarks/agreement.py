"""How far two computations of one curvature, and of one matrix of scores, agree.

    F v            = Q_G (Λ * (Q_Gᵀ v Q_A)) Q_Aᵀ
    (F + λ)⁻¹ v    the same with 1 / (Λ + λ), λ = 0.1 · mean(Λ)

Neither depends on the signs of eigenvectors; both depend on everything else. Differences are
max |difference| over max |reference|.

Axis letters: O out, I in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import raycurv

DAMPING = 0.1
VECTORS = 8


@dataclass(frozen=True)
class Block:
    """Curvature of one weight matrix, in float64.

    Attributes:
        lam_OI: Λ, a mean over examples, columns and rows in the order of the bases.
        output_vectors, input_vectors: ``Q_G``, ``Q_A``.
        output_values, input_values: eigenvalues of G and A, means over tokens, ascending.
        counts: what Λ, A and G were divided by, where known.
    """

    lam_OI: Tensor
    output_vectors: Tensor
    input_vectors: Tensor
    output_values: Tensor
    input_values: Tensor
    counts: tuple[int, ...] = ()

    def apply(self, v: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """``Q_G (f(Λ) * (Q_Gᵀ v Q_A)) Q_Aᵀ`` for ``v [..., O, I]``."""
        rotated = self.output_vectors.T @ v @ self.input_vectors
        return self.output_vectors @ (f(self.lam_OI) * rotated) @ self.input_vectors.T

    def inverse(self, lam_OI: Tensor) -> Tensor:
        """``1 / (Λ + λ)``."""
        return 1 / (lam_OI + DAMPING * lam_OI.mean())


def fitted_blocks(run: raycurv.Run) -> dict[str, Block]:
    """Every block of a fit with factors."""
    blocks = {}
    for name in run.block_names():
        curvature = run.curvature(name)
        blocks[name] = Block(
            lam_OI=curvature.eigenvalues.double(),
            output_vectors=curvature.output_basis.dense(),
            input_vectors=curvature.input_basis.dense(),
            output_values=curvature.output_basis.eigenvalues(),
            input_values=curvature.input_basis.eigenvalues(),
        )
    return blocks


@dataclass(frozen=True)
class BlockAgreement:
    """Of one block. The first is better when high, the rest when low.

    Attributes:
        pearson: of Λ's sorted entries.
        entrywise: one minus Pearson of Λ, entry by entry.
        lam: difference of Λ's sorted entries.
        trace: relative difference of ΣΛ.
        values: difference of the factors' eigenvalues, the worse of the two.
        applied: difference of ``F v``, Gaussian v.
        inverted: difference of ``(F + λ)⁻¹ v``.
    """

    pearson: float
    entrywise: float
    lam: float
    trace: float
    values: float
    applied: float
    inverted: float

    TITLES: ClassVar = (
        "1 - Pearson, Λ sorted",
        "1 - Pearson, Λ in place",
        "Λ sorted",
        "ΣΛ",
        "factors' eigenvalues",
        "F v",
        "(F + λ)⁻¹ v",
    )

    def cells(self) -> list[str]:
        """For a table."""
        first, *rest = dataclasses.astuple(self)
        return [f"{x:.1e}" for x in (1 - first, *rest)]

    @classmethod
    def worst(cls, agreements: list[BlockAgreement]) -> BlockAgreement:
        """Of every measure the worst."""
        first, *rest = zip(*map(dataclasses.astuple, agreements), strict=True)
        return cls(min(first), *map(max, rest))


def compare_block(ours: Block, theirs: Block) -> BlockAgreement:
    """Both ways of the same block; theirs is the reference."""
    a, b = ours.lam_OI.flatten(), theirs.lam_OI.flatten()
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(VECTORS, *ours.lam_OI.shape, generator=generator, dtype=torch.float64)
    return BlockAgreement(
        pearson=pearson(a.sort().values, b.sort().values),
        entrywise=1 - pearson(a, b),
        lam=difference(a.sort().values, b.sort().values),
        trace=abs(float(a.sum() / b.sum()) - 1),
        values=max(
            difference(ours.input_values, theirs.input_values),
            difference(ours.output_values, theirs.output_values),
        ),
        applied=difference(ours.apply(v, torch.clone), theirs.apply(v, torch.clone)),
        inverted=difference(ours.apply(v, ours.inverse), theirs.apply(v, theirs.inverse)),
    )


@dataclass(frozen=True)
class Scores:
    """Of two arrays of scores.

    Attributes:
        title: what was compared.
        pearson, spearman: over all entries.
        worst_query: the lowest Pearson of one query's scores; of all where there are no queries.
        difference: max |difference| over max |reference|.
        scale: the factor on the reference that fits ours best, least squares; 1 when scales agree.
    """

    title: str
    pearson: float
    spearman: float
    worst_query: float
    difference: float
    scale: float

    TITLES: ClassVar = ("Pearson", "Spearman", "worst query", "max difference", "scale")

    @classmethod
    def of(cls, title: str, ours: NDArray[Any], theirs: NDArray[Any]) -> Scores:
        """Theirs is the reference."""
        assert ours.shape == theirs.shape, f"{title}: {ours.shape}, {theirs.shape}"
        a_QN = torch.tensor(np.atleast_2d(ours), dtype=torch.float64)
        b_QN = torch.tensor(np.atleast_2d(theirs), dtype=torch.float64)
        a, b = a_QN.flatten(), b_QN.flatten()
        return cls(
            title,
            pearson=pearson(a, b),
            spearman=pearson(ranks(a), ranks(b)),
            worst_query=min(map(pearson, a_QN, b_QN)),
            difference=difference(a, b),
            scale=float(a @ b / (b @ b)),
        )

    def cells(self) -> list[str]:
        """For a table."""
        return [
            f"{self.pearson:.10f}",
            f"{self.spearman:.10f}",
            f"{self.worst_query:.10f}",
            f"{self.difference:.1e}",
            f"{self.scale:.9f}",
        ]


def in_order(made: raycurv.Scores) -> NDArray[Any]:
    """``scores [Q, N]`` in the order of the ids."""
    matrix_QN, queries, trains = made.matrix()
    ordered: NDArray[Any] = matrix_QN[np.argsort(queries)][:, np.argsort(trains)]
    return ordered


def pearson(a: Tensor, b: Tensor) -> float:
    """Correlation of two vectors."""
    return float(correlations(a, b))


def correlations(a: Tensor, b: Tensor, counts: Tensor | None = None) -> Tensor:
    """Pearson's correlation over the last axis, ``[...]``; not a number where one is constant.

    Args:
        a, b: ``[..., K]``.
        counts: how often each of the K pairs stands in the sample; once by default.
    """
    a, b = a.double(), b.double()
    w = torch.ones_like(a[..., :1]) if counts is None else counts.double()
    w = (w / w.expand(torch.broadcast_shapes(w.shape, a.shape)).sum(-1, keepdim=True)).expand_as(a)
    a, b = a - (w * a).sum(-1, keepdim=True), b - (w * b).sum(-1, keepdim=True)
    scale = (w * a * a).sum(-1) * (w * b * b).sum(-1)
    return (w * a * b).sum(-1) / scale.sqrt()


def ranks(a: Tensor) -> Tensor:
    """Places in ascending order; ties are broken by position."""
    return a.argsort(stable=True).argsort().double()


def difference(a: Tensor, b: Tensor) -> float:
    """``max |a - b| / max |b|``."""
    return float((a - b).abs().max() / b.abs().max())
