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
    read_bases,
    read_corrected,
    read_products,
    write_corrected,
    write_factor,
    write_products,
)
from raycurv.files.curvature_files import CurvatureFiles
from raycurv.files.row_files import open_rows, write_rows
from raycurv.files.store import Store
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Captured
from raycurv.mathematics.corrected import CorrectedSum, CorrectedSums
from raycurv.mathematics.curvature import Damping
from raycurv.mathematics.eigen import own_axes
from raycurv.mathematics.factors import FactorSum, FactorSums
from raycurv.mathematics.influence.ihvp import BlockProducts, QueryGradients, QueryProducts
from raycurv.mathematics.influence.scores import (
    PairwiseScores,
    SelfScores,
    SpectralSelfScores,
)
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
        bases = own_axes(blocks) if self.diagonal else read_bases(self.store, blocks, device)
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
class QueryGradientsPass:
    """Plain gradients of queries into ``ihvp/`` of a store of their own, for IHVPs that no stage
    can make alone.

    Attributes:
        queries: ids, in order.
        out: where the gradients go.
    """

    queries: tuple[str, ...]
    out: Store
    name: str = "gradients"
    target: Target = "measurement"
    draws: int = 1

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> QueryGradients:
        return QueryGradients(blocks, self.queries, dtype, device)

    def write(self, name: str, result: BlockProducts, blocks: Mapping[str, Block]) -> None:
        write_products(self.out, name, result, self.queries)


@dataclass(frozen=True)
class QueryPass:
    """IHVPs of queries into ``ihvp/`` of a store of their own.

    Attributes:
        queries: ids, in order.
        out: where the products go.
        curvature: of the fit.
        damping: of every block.
        rank: to truncate to; ``None`` for whole.
        seed: of the test matrices.
        scored: rows of the examples that alone the products are for; ``None`` when they are
            results themselves.
        held: where the products go instead, in one process; by block.
    """

    queries: tuple[str, ...]
    out: Store
    curvature: CurvatureFiles
    damping: Damping
    rank: int | None
    seed: int
    name: str = "queries"
    target: Target = "measurement"
    draws: int = 1
    scored: int | None = None
    held: dict[str, BlockProducts] | None = None

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> QueryProducts:
        curvatures = self.curvature.open_stage(blocks, device)
        return QueryProducts(
            curvatures, self.queries, self.damping, self.rank, self.seed, dtype, device,
            self.scored,
        )  # fmt: skip

    def write(self, name: str, result: BlockProducts, blocks: Mapping[str, Block]) -> None:
        if self.held is None:
            write_products(self.out, name, result, self.queries)
        else:
            self.held[name] = result


@dataclass(frozen=True)
class ScorePass:
    """Scores of training examples on the queries of one pass, and on themselves.

    Attributes:
        curvature: of the fit, needed for self-influence, and where products stayed in its bases.
        damping: of every block.
        products: where the query pass left its IHVPs.
        queries: how many.
        per_block, per_token: what else to give.
        self_influence: whether to score examples on themselves, too.
        inverses: of a ranked method, for self-influence.
        held: products that the query pass left in this process instead, by block.
    """

    curvature: CurvatureFiles
    damping: Damping
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
        own = self._own(blocks, dtype, device) if self.self_influence else None
        turned = [b for b in blocks if products[b.name].turned is not None]
        bases = read_bases(self.curvature.store, turned, device) if own is None else None
        return ScoreGatherer(
            PairwiseScores(
                blocks, products, self.queries, self.per_block, self.per_token, dtype, device,
                bases, own,
            )
        )  # fmt: skip

    def _own(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> SelfScores:
        if self.inverses is None:
            curvatures = self.curvature.open_stage(blocks, device)
            return SpectralSelfScores(curvatures, self.damping, dtype, device)
        rows = {b.name: open_rows(self.curvature.store, b).whole() for b in blocks}
        return RankSelfScores(blocks, rows, self.inverses)

    def _products(self, block: str) -> BlockProducts:
        held = self.held.get(block)
        return read_products(self.products, block)[0] if held is None else held

    def write(self, name: str, result: Any, blocks: Mapping[str, Block]) -> None:
        """Scores went to the driver, microbatch by microbatch."""


class ScoreGatherer(Nothing):
    """Scores of a microbatch, which leave at once."""

    def __init__(self, scores: PairwiseScores) -> None:
        self._scores = scores

    def add(self, draws: Sequence[Captured], counts: bool = True) -> dict[str, Tensor]:
        return self._scores.add(draws)
