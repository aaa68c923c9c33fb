"""What the passes of a scoring gather in every stage: queries' gradients and IHVPs, and scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from raycurv.files.artifacts import read_bases, read_products, write_products
from raycurv.files.curvature_files import CurvatureFiles
from raycurv.files.row_files import open_rows
from raycurv.files.store import Store
from raycurv.jobs.influence.removals import named
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import Damping
from raycurv.mathematics.influence.ihvp import (
    BlockProducts,
    QueryGradients,
    QueryProducts,
    check_products,
)
from raycurv.mathematics.influence.scores import PairwiseScores, SelfScores, SpectralSelfScores
from raycurv.mathematics.rank import rank_scores
from raycurv.mathematics.rank.rank_inverse import RankInverses
from raycurv.mathematics.rank.rank_scores import RankSelfScores
from raycurv.mathematics.sums import Combine
from raycurv.stages.passes import Gatherer


@dataclass(frozen=True)
class GradientsGatherer(Gatherer):
    """Gathers plain gradients of queries into ``ihvp/`` of a store of their own, for IHVPs that no
    stage can make alone.
    """

    queries: tuple[str, ...]
    out: Store

    name = "gradients"

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> QueryGradients:
        return QueryGradients(blocks, self.queries, dtype, device)

    def write(self, name: str, result: BlockProducts, blocks: Mapping[str, Block]) -> None:
        write_products(self.out, name, result, self.queries)


@dataclass(frozen=True)
class ProductsGatherer(Gatherer):
    """Gathers IHVPs of queries into ``ihvp/`` of a store of their own.

    Attributes:
        damping: of every block; of several each query has a product for each (see
            :func:`raycurv.jobs.influence.removals.named`).
        rank: to truncate to; ``None`` for whole.
        seed: of the test matrices.
        scored: rows of the examples that alone the products are for; ``None`` when they are
            results themselves.
        held: where the products go instead, in one process; by block.
        beside: which numbers of each query are kept with them, see :class:`QueryProducts`.
    """

    queries: tuple[str, ...]
    out: Store
    curvature: CurvatureFiles
    damping: Damping | tuple[Damping, ...]
    rank: int | None
    seed: int
    scored: int | None = None
    held: dict[str, BlockProducts] | None = None
    beside: tuple[str, ...] = ()

    name = "queries"

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> QueryProducts:
        curvatures = self.curvature.open_stage(blocks, device)
        return QueryProducts(
            curvatures, self.queries, self.damping, self.rank, self.seed, dtype, device,
            self.scored, self.beside,
        )  # fmt: skip

    def write(self, name: str, result: BlockProducts, blocks: Mapping[str, Block]) -> None:
        names = self.queries
        if not isinstance(self.damping, Damping):
            names = named(self.queries, self.damping)
        if self.held is None:
            write_products(self.out, name, result, names)
        else:
            check_products(name, result, names)
            self.held[name] = result


@dataclass(frozen=True)
class ScoreGatherer(Gatherer):
    """Scores training examples on the queries of one pass, and on themselves.

    Attributes:
        curvature: of the fit, needed for self-influence, and where products stayed in its bases.
        products: where the pass over the queries left its IHVPs.
        per_token: also give every token's.
        inverses: of a ranked method, for self-influence.
        held: products that the pass over the queries left in this process instead, by block.
    """

    curvature: CurvatureFiles
    damping: Damping
    products: Store
    queries: int
    per_block: bool
    per_token: bool
    self_influence: bool
    inverses: RankInverses | None = None
    held: Mapping[str, BlockProducts] = field(default_factory=dict)

    name = "scores"
    results: ClassVar[Mapping[str, Combine]] = {**PairwiseScores.results, **rank_scores.RESULTS}

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> PairwiseScores:
        products = {b.name: self._products(b).to(device) for b in blocks}
        own = self._own(blocks, dtype, device) if self.self_influence else None
        turned = [b for b in blocks if products[b.name].turned is not None]
        bases = read_bases(self.curvature.store, turned, device) if own is None else None
        return PairwiseScores(
            blocks, products, self.queries, self.per_block, self.per_token, dtype, device, bases,
            own,
        )  # fmt: skip

    def _own(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> SelfScores:
        if self.inverses is None:
            curvatures = self.curvature.open_stage(blocks, device)
            return SpectralSelfScores(curvatures, self.damping, dtype, device)
        rows = {b.name: open_rows(self.curvature.store, b).whole() for b in blocks}
        return RankSelfScores(blocks, rows, self.inverses)

    def _products(self, block: Block) -> BlockProducts:
        held = self.held.get(block.name)
        if held is not None:
            return held
        return read_products(self.products, block.name, (block.d_out, block.d_in))[0]

    def write(self, name: str, result: Any, blocks: Mapping[str, Block]) -> None:
        """Scores went to the driver, microbatch by microbatch."""
