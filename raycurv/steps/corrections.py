"""Λ of every block into ``corrected/``: in the eigenbases of EK-FAC, or weight by weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from raycurv.files.artifacts import (
    basis_mark,
    corrected_file,
    corrected_notes,
    keeps_sum,
    read_bases,
    read_corrected,
    write_corrected,
)
from raycurv.files.store import Store
from raycurv.files.tensorfile import is_complete
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.corrected import CorrectedSum, CorrectedSums
from raycurv.mathematics.eigen import own_axes
from raycurv.mathematics.gradients import CHUNK, PIECE
from raycurv.planning.cost import PassCost
from raycurv.planning.moments import (
    Bytes,
    bases_of,
    gradient_flops,
    gradients_of,
    sum_bytes,
    turned_blocks,
)
from raycurv.planning.shapes import DataShape, Group, Recipe, StageShape
from raycurv.stages.passes import Gatherer
from raycurv.steps.covariances import undecomposed
from raycurv.steps.decompositions import basis_bytes
from raycurv.steps.step import PassStep


@dataclass(frozen=True)
class CorrectedGatherer(Gatherer):
    """Gathers Λ into ``corrected/``, in the eigenbases or, for the diagonal, in the weights' own.

    Attributes:
        only: the blocks to gather; squared gradient norms are over all blocks regardless.
        rotated: in the eigenbases.
        store_dtype: of the written Λ.
        sum_dtype: also keep sums, in this dtype.
        extends: a run in the same bases, whose sums and counts are added.
    """

    store: Store
    only: frozenset[str]
    draws: int
    rotated: bool
    store_dtype: torch.dtype
    sum_dtype: torch.dtype | None = None
    extends: Store | None = None

    name = "corrected"
    results = CorrectedSums.results

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> CorrectedSums:
        bases = read_bases(self.store, blocks, device) if self.rotated else own_axes(blocks)
        return CorrectedSums(blocks, bases, dtype, device, self.only)

    def write(self, name: str, result: CorrectedSum, blocks: Mapping[str, Block]) -> None:
        block = blocks[name]
        mark = basis_mark(self.store, block) if self.rotated else ""
        if self.extends is not None:
            result = read_corrected(self.extends, block, self.draws, mark).plus(result)
        write_corrected(self.store, block, result, self.store_dtype, mark, self.sum_dtype)


class CorrectionCost(PassCost):
    """Sums of Λ beside the eigenbases, or alone for the diagonal."""

    phase = "second pass: Λ"
    writing_name = "writing Λ"

    def held(self, stage: StageShape, recipe: Recipe, data: DataShape) -> Bytes:
        sums = 0
        for block, rotated_before in turned_blocks(stage, recipe, data):
            size = block.d_in * block.d_out
            together = max(1, (PIECE if rotated_before else CHUNK) // size)
            additions = data.microbatches * recipe.draws * math.ceil(data.batch_examples / together)
            sums += size * sum_bytes(recipe, additions) * stage.count(block)
        return bases_of(stage, recipe) | {"sums of Λ": sums}

    def passing(self, stage: StageShape, recipe: Recipe, data: DataShape) -> Bytes:
        return gradients_of(stage, recipe, data, 1, pieces=True)

    def writing(self, stage: StageShape, recipe: Recipe) -> Bytes:
        # The sum and the mean in float64, and both as they are written.
        return {"a block in float64": (16 + self._stored(recipe)) * stage.largest_block}

    def flops(self, stage: StageShape, recipe: Recipe, data: DataShape) -> float:
        return gradient_flops(stage, recipe, data)

    def files(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        return self.scored(group, recipe)

    def scored(self, group: Group, recipe: Recipe) -> int:
        return self._stored(recipe) * sum(s.elements for s in group)

    def read(self, group: Group, recipe: Recipe) -> int:
        return basis_bytes(group, recipe) if recipe.kind.factors else 0

    def commit(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        return sum_bytes(recipe, data.microbatches) * sum(s.elements for s in group)

    def _stored(self, recipe: Recipe) -> int:
        """Bytes of an element of Λ, and of its sum where sums are kept."""
        return recipe.store_dtype.itemsize + (recipe.computed if recipe.keep_sums else 0)


class Corrections(PassStep):
    """Corrected eigenvalues, and every example's squared gradient norm."""

    name = "corrected"
    pass_name = "corrected"
    cost = CorrectionCost()

    def lacking(self, group: int) -> bool:
        # Without its bases nothing can be said of a group's Λ.
        unknown = self.fit.method.factors and bool(undecomposed(self.fit, group))
        return unknown or super().lacking(group)

    def carries(self) -> bool:
        # Norms come from all groups.
        return not self.fit.examples_there()

    def sums(self, group: int) -> frozenset[str]:
        # Sums of squares in other bases than those that are there are of no use.
        return frozenset(f"{b.name} {self._mark(b)}" for b in self._missing(group))

    def gatherers(self, group: int) -> tuple[CorrectedGatherer, ...]:
        fit, recipe = self.fit, self.fit.recipe
        missing = frozenset(b.name for b in self._missing(group))
        rotated, kept = fit.method.factors, fit.sum_dtype if recipe.keep_sums else None
        gatherer = CorrectedGatherer(
            fit.store, missing, recipe.draws, rotated, recipe.store_dtype, kept, fit.extends
        )
        return (gatherer,)

    def again(self, group: int) -> tuple[CorrectedGatherer, ...]:
        return tuple(replace(g, only=frozenset()) for g in self.gatherers(group))

    def _missing(self, group: int) -> list[Block]:
        return [b for b in self.fit.blocks_of(group) if not self._there(b)]

    def _there(self, block: Block) -> bool:
        store = self.fit.store
        if not is_complete(store, corrected_file(block.name)):
            return False
        if corrected_notes(store, block).bases != self._mark(block):
            return False
        return not self.fit.recipe.keep_sums or keeps_sum(store, block)

    def _mark(self, block: Block) -> str:
        return basis_mark(self.fit.store, block) if self.fit.method.factors else ""
