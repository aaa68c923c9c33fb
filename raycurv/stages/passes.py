"""The passes over the data: what each differentiates, gathers, and leaves in the run directory.

A new use of curvature is a new pass with a gatherer of its own; stages and schedules stay as they
are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raycurv.files.artifacts import (
    basis_mark,
    read_corrected,
    read_curvature,
    read_eigen,
    read_products,
    write_corrected,
    write_factor,
    write_products,
)
from raycurv.files.row_files import open_rows, write_rows
from raycurv.files.store import Store
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Captured
from raycurv.mathematics.corrected import CorrectedSum, CorrectedSums
from raycurv.mathematics.curvature import BlockCurvature, Damping
from raycurv.mathematics.eigen import Eigenbasis, own_axes
from raycurv.mathematics.factors import FactorSum, FactorSums, factors_of
from raycurv.mathematics.influence.ihvp import BlockProducts, Products
from raycurv.mathematics.influence.scores import PairwiseScores, SelfScores
from raycurv.mathematics.loss.differentiation import Target
from raycurv.mathematics.rank.rank_fisher import RowSum, RowSums
from raycurv.mathematics.rank.rank_inverse import RankInverses
from raycurv.mathematics.rank.rank_scores import RankSelfScores


@dataclass(frozen=True)
class LossPass:
    """Only the losses: no backward, nothing gathered by stages."""

    name: str = "losses"
    target: Target = "nothing"
    draws: int = 1

    def open(self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device) -> Nothing:
        return Nothing()

    def write(self, name: str, result: Any, blocks: Mapping[str, Block]) -> None:
        """Nothing is gathered."""


@dataclass(frozen=True)
class ReplayPass:
    """Forward and backward of microbatches whose contributions are there: only gradients pass."""

    target: Target
    draws: int
    name: str = "replay"

    def open(self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device) -> Nothing:
        return Nothing()

    def write(self, name: str, result: Any, blocks: Mapping[str, Block]) -> None:
        """Nothing is gathered."""


class Nothing:
    """The gatherer that gathers nothing."""

    names: tuple[str, ...] = ()

    def add(self, draws: Sequence[Captured], counts: bool = True) -> dict[str, Tensor]:
        return {}

    def result(self, name: str) -> Any:
        raise KeyError(name)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        pass

    def join(self, state: Mapping[str, Tensor]) -> None:
        pass


@dataclass(frozen=True)
class CovariancePass:
    """A and G into ``factors/``.

    Attributes:
        store: of the run.
        factors: the factors to gather.
        max_factor_dim: widest tile.
        sum_dtype: of the written sums.
    """

    store: Store
    factors: frozenset[str]
    target: Target
    draws: int
    max_factor_dim: int | None
    sum_dtype: torch.dtype
    name: str = "covariance"

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> FactorSums:
        return FactorSums(blocks, dtype, device, self.max_factor_dim, self.factors)

    def write(self, name: str, result: FactorSum, blocks: Mapping[str, Block]) -> None:
        write_factor(self.store, result, self.sum_dtype)


@dataclass(frozen=True)
class CorrectedPass:
    """Λ into ``corrected/``, in the eigenbases or, for the diagonal, in the weights' own.

    Attributes:
        store: of the run.
        only: the blocks to gather; squared gradient norms are over all blocks regardless.
        diagonal: in the identity basis.
        store_dtype: of the written Λ.
        sum_dtype: also keep sums, in this dtype.
        extends: a run in the same bases, whose sums and counts are added.
    """

    store: Store
    only: frozenset[str]
    target: Target
    draws: int
    diagonal: bool
    store_dtype: torch.dtype
    sum_dtype: torch.dtype | None = None
    extends: Store | None = None
    name: str = "corrected"

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> CorrectedSums:
        bases = own_axes(blocks) if self.diagonal else _read_bases(self.store, blocks, device)
        only = frozenset(self.only & {b.name for b in blocks})
        return CorrectedSums(blocks, bases, dtype, device, only)

    def write(self, name: str, result: CorrectedSum, blocks: Mapping[str, Block]) -> None:
        block = blocks[name]
        mark = "" if self.diagonal else basis_mark(self.store, block)
        if self.extends is not None:
            result = read_corrected(self.extends, block, self.draws, mark).plus(result)
        write_corrected(self.store, block, result, self.store_dtype, mark, self.sum_dtype)


@dataclass(frozen=True)
class RowsPass:
    """The rows of rank-m Fishers into ``rows/``.

    Attributes:
        store: of the run.
        only: the blocks to gather; squared gradient norms are over all blocks regardless.
        count: how many rows.
        store_dtype: of the written rows.
    """

    store: Store
    only: frozenset[str]
    target: Target
    draws: int
    count: int
    store_dtype: torch.dtype
    name: str = "rows"

    def open(self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device) -> RowSums:
        return RowSums(blocks, self.count, dtype, device, self.only)

    def write(self, name: str, result: RowSum, blocks: Mapping[str, Block]) -> None:
        write_rows(self.store, blocks[name], result, self.store_dtype)


@dataclass(frozen=True)
class CurvatureSource:
    """Where a stage reads its blocks' curvature.

    Attributes:
        store: of the fit.
        method: of the fit.
        examples: of the fit.
        damping: to precondition with.
    """

    store: Store
    method: str
    examples: int
    damping: Damping

    def read(self, blocks: Sequence[Block], device: torch.device) -> dict[str, BlockCurvature]:
        """The curvature of every block, bases on the device; shared input bases are read once."""
        found: dict[str, BlockCurvature] = {}
        shared: dict[str, Eigenbasis] = {}
        for block in blocks:
            curvature = read_curvature(self.store, block, self.method, self.examples)
            right = shared.setdefault(block.input_factor, _on(curvature.input_basis, device))
            left = _on(curvature.output_basis, device)
            found[block.name] = BlockCurvature(block, right, left, curvature.lam_OI)
        return found


@dataclass(frozen=True)
class QueryPass:
    """IHVPs of queries into ``ihvp/`` of a store of their own.

    Attributes:
        source: the curvature.
        queries: ids, in order.
        rank: to truncate to; ``None`` for whole.
        seed: of the test matrices.
        out: where the products go.
        scored: rows of the examples that alone the products are for; ``None`` when they are
            results themselves.
        held: where the products go instead, in one process; by block.
    """

    source: CurvatureSource
    queries: tuple[str, ...]
    rank: int | None
    seed: int
    out: Store
    name: str = "queries"
    target: Target = "measurement"
    draws: int = 1
    scored: int | None = None
    held: dict[str, BlockProducts] | None = None

    def open(self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device) -> Products:
        return Products(
            self.source.read(blocks, device),
            self.queries,
            self.source.damping,
            self.rank,
            self.seed,
            dtype,
            device,
            self.scored,
        )

    def write(self, name: str, result: BlockProducts, blocks: Mapping[str, Block]) -> None:
        if self.held is None:
            write_products(self.out, name, result, self.queries)
        else:
            self.held[name] = result


@dataclass(frozen=True)
class ScorePass:
    """Scores of training examples on the queries of one pass, and on themselves.

    Attributes:
        source: the curvature, needed for self-influence only.
        products: where the query pass left its IHVPs.
        queries: how many.
        per_block, per_token: what else to give.
        self_influence: whether to score examples on themselves, too.
        inverses: of M-FAC, for self-influence.
        held: products that the query pass left in this process instead, by block.
    """

    source: CurvatureSource
    products: Store
    queries: int
    per_block: bool
    per_token: bool
    self_influence: bool
    inverses: RankInverses | None = None
    name: str = "scores"
    target: Target = "labels"
    draws: int = 1
    held: Mapping[str, BlockProducts] = field(default_factory=dict)

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> ScoreGatherer:
        products = {b.name: self._products(b.name).to(device) for b in blocks}
        own: SelfScores | None = None
        ranked: RankSelfScores | None = None
        bases: Mapping[str, Eigenbasis] = {}
        if self.self_influence and self.inverses is not None:
            rows = {block.name: open_rows(self.source.store, block).whole() for block in blocks}
            ranked = RankSelfScores(blocks, rows, self.inverses, dtype, device)
        elif self.self_influence:
            own = SelfScores(self.source.read(blocks, device), self.source.damping, dtype, device)
        if own is None:
            turned = [b for b in blocks if products[b.name].turned is not None]
            bases = _read_bases(self.source.store, turned, device)
        pairwise = PairwiseScores(
            blocks, products, self.queries, self.per_block, self.per_token, dtype, device,
            bases, own,
        )  # fmt: skip
        return ScoreGatherer(pairwise, ranked)

    def _products(self, block: str) -> BlockProducts:
        held = self.held.get(block)
        return read_products(self.products, block)[0] if held is None else held

    def write(self, name: str, result: Any, blocks: Mapping[str, Block]) -> None:
        """Scores went to the driver, microbatch by microbatch."""


class ScoreGatherer(Nothing):
    """Scores of a microbatch, which leave at once."""

    def __init__(self, pairwise: PairwiseScores, ranked: RankSelfScores | None) -> None:
        self._parts: list[PairwiseScores | RankSelfScores] = [pairwise]
        if ranked is not None:
            self._parts.append(ranked)

    def add(self, draws: Sequence[Captured], counts: bool = True) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in self._parts:
            found |= part.add(draws)
        return found


def _read_bases(
    store: Store, blocks: Sequence[Block], device: torch.device
) -> dict[str, Eigenbasis]:
    """The eigenbases of some blocks, by factor."""
    return {n: _on(read_eigen(store, n), device) for n in factors_of(blocks)}


def _on(basis: Eigenbasis, device: torch.device) -> Eigenbasis:
    vectors = tuple(q.to(device) for q in basis.vectors)
    return Eigenbasis(vectors, basis.values, basis.outcome, basis.seconds)
