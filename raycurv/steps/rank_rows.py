"""The rows of a rank-m Fisher (M-FAC) of every block, into ``rows/``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from raycurv.files.row_files import RUN, rows_file, write_rows
from raycurv.files.store import Store
from raycurv.files.tensorfile import is_complete
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.rank.rank_fisher import RowSum, RowSums
from raycurv.planning.cost import PassCost
from raycurv.planning.moments import Bytes, gradient_flops, gradients_of
from raycurv.planning.shapes import DataShape, Group, Recipe, StageShape
from raycurv.stages.passes import Gatherer
from raycurv.steps.step import PassStep


@dataclass(frozen=True)
class RowGatherer(Gatherer):
    """Gathers the rows of rank-m Fishers into ``rows/``.

    Attributes:
        only: the blocks to gather; squared gradient norms are over all blocks regardless.
        store_dtype: of the written rows.
    """

    store: Store
    only: frozenset[str]
    count: int
    store_dtype: torch.dtype

    name = "rows"
    results = RowSums.results

    def open(self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device) -> RowSums:
        return RowSums(blocks, self.count, dtype, device, self.only)

    def write(self, name: str, result: RowSum, blocks: Mapping[str, Block]) -> None:
        write_rows(self.store, blocks[name], result, self.store_dtype)


class RankRowCost(PassCost):
    """So many copies of a stage's blocks."""

    phase = "gradients"
    writing_name = "writing rows"

    def held(self, stage: StageShape, recipe: Recipe, data: DataShape) -> Bytes:
        return {"rows": self.commit([stage], recipe, data)}

    def passing(self, stage: StageShape, recipe: Recipe, data: DataShape) -> Bytes:
        return gradients_of(stage, recipe, data, 1, pieces=False)

    def writing(self, stage: StageShape, recipe: Recipe) -> Bytes:
        # As they are written; some outputs' at a time in float64.
        rows = recipe.rows * recipe.store_dtype.itemsize * stage.largest_block
        return {"rows of a block": rows + 16 * RUN}

    def flops(self, stage: StageShape, recipe: Recipe, data: DataShape) -> float:
        return gradient_flops(stage, recipe, data)

    def files(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        return self.scored(group, recipe)

    def scored(self, group: Group, recipe: Recipe) -> int:
        blocks = sum(stage.alike.counts.total() for stage in group)
        rows = recipe.rows * recipe.store_dtype.itemsize * sum(s.elements for s in group)
        return rows + 8 * blocks * recipe.rows**2

    def commit(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        return recipe.rows * recipe.computed * sum(s.elements for s in group)


class RankRows(PassStep):
    """Rows of gradients, and every example's squared gradient norm."""

    name = "rows"
    pass_name = "rows"
    cost = RankRowCost()

    def carries(self) -> bool:
        # Norms come from all groups.
        return not self.fit.examples_there()

    def sums(self, group: int) -> frozenset[str]:
        names = (block.name for block in self.fit.blocks_of(group))
        return frozenset(name for name in names if not is_complete(self.fit.store, rows_file(name)))

    def gatherers(self, group: int) -> tuple[RowGatherer, ...]:
        fit = self.fit
        return (RowGatherer(fit.store, self.sums(group), fit.recipe.rows, fit.recipe.store_dtype),)

    def again(self, group: int) -> tuple[RowGatherer, ...]:
        return tuple(replace(g, only=frozenset()) for g in self.gatherers(group))
