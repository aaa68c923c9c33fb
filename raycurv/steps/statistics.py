"""Gradient statistics of a fit: what is missing of them, what gathers it, and their tables.

    any pass -> gradients/                 one file a block
             -> work/gradient_norms/       norms of the examples, a group of stages each
    tables   -> tables/gradients, tables/gradient_norms

They are gathered beside the first pass that goes through a group of stages, or in a pass of their
own where no other is due.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raycurv.driver.corpus import part_file, parts_of, parts_there
from raycurv.driver.sinks import rows_by_part
from raycurv.files.artifacts import gradient_file, write_gradient
from raycurv.files.block_rows import GRADIENTS_FILE, write_gradients
from raycurv.files.store import Store
from raycurv.files.tables import (
    as_lists,
    footer,
    gradient_norms_schema,
    read_table,
    write_table,
)
from raycurv.files.tensorfile import is_complete
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.gradient_statistics import (
    BLOCK_NORMS,
    OWN,
    SAMPLED,
    GradientSum,
    GradientSums,
)
from raycurv.mathematics.gradients import PIECE
from raycurv.planning.cost import PassCost
from raycurv.planning.moments import Bytes, cast_elements, gradients_of, larger, sum_bytes
from raycurv.planning.shapes import DataShape, Group, Recipe, StageShape
from raycurv.stages.passes import Gatherer
from raycurv.steps.step import PassStep, table_there

_NORMS = "tables/gradient_norms"


@dataclass(frozen=True)
class GradientGatherer(Gatherer):
    """Gathers gradient statistics into ``gradients/``, of own labels and of drawn ones.

    Attributes:
        only: the blocks to gather; squared gradient norms are of all blocks regardless.
        draws: of labels that the pass differentiates beside the data's own; 0 for none.
        dtype: of the written means.
    """

    store: Store
    only: frozenset[str]
    draws: int
    dtype: torch.dtype

    name = "gradients"
    results = GradientSums.results

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> GradientSums:
        return GradientSums(blocks, self.draws, dtype, device, self.only)

    def write(self, name: str, result: GradientSum, blocks: Mapping[str, Block]) -> None:
        write_gradient(self.store, result, self.dtype)


class StatisticsCost(PassCost):
    """Sums of means and squares: of own labels, and where labels are drawn of those as well."""

    phase = "gradient statistics"
    writing_name = "writing gradients"
    rides = True

    def held(self, stage: StageShape, recipe: Recipe, data: DataShape) -> Bytes:
        total = 0
        for block in stage.blocks:
            size = block.d_in * block.d_out
            together = max(1, PIECE // size)
            pieces = data.microbatches * math.ceil(data.batch_examples / together)
            additions = [data.microbatches, pieces]
            if recipe.own:
                additions += [recipe.draws * pieces, recipe.draws * data.microbatches]
            once = sum(sum_bytes(recipe, count) for count in additions)
            total += size * once * stage.count(block)
        return {"sums of gradients": total}

    def passing(self, stage: StageShape, recipe: Recipe, data: DataShape) -> Bytes:
        # Gradients are in the weights' own axes.
        pieces = gradients_of(stage, replace(recipe, method="diagonal"), data, 1, pieces=True)
        # A product of all rows is added to the sum afterwards; one operand is laid out anew for it.
        product = [
            b.d_in * b.d_out
            + stage.active(data, b).rows * (d_in + cast_elements(recipe, d_in + b.d_out))
            for b in stage.blocks
            for d_in in [stage.columns(data, b)]
        ]
        total = recipe.computed * max(product, default=0)
        return larger(pieces, {"sum of some gradients": total})

    def writing(self, stage: StageShape, recipe: Recipe) -> Bytes:
        # All sums of a block in float64 and as they are written, and a mean and its square.
        written = (8 + recipe.computed) * self._sums(recipe) + 16
        return {"a block's gradients in float64": written * stage.largest_block}

    def flops(self, stage: StageShape, recipe: Recipe, data: DataShape) -> float:
        # Two products of all rows for each set of labels: examples apart, and together.
        sets = 1 + (recipe.draws if recipe.own else 0)
        return 4.0 * sets * stage.active_elements * data.positions

    def files(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        norms = data.examples * sum(stage.alike.counts.total() for stage in group)
        return recipe.computed * (self._sums(recipe) * sum(s.elements for s in group) + norms)

    def rows(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        # The norms as a pass's rows and as they wait for those of other groups, in float64.
        return 16 * data.examples * sum(stage.alike.counts.total() for stage in group)

    def commit(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        return sum(sum(self.held(stage, recipe, data).values()) for stage in group)

    def _sums(self, recipe: Recipe) -> int:
        """How many sums of a block's shape there are."""
        return len(OWN) + (len(SAMPLED) if recipe.own else 0)


class Statistics(PassStep):
    """Means, squares and noise of every block's gradients, and norms of every example's."""

    pass_name = "gradients"
    cost = StatisticsCost()
    own_labels = True

    def sums(self, group: int) -> frozenset[str]:
        return frozenset(f"gradients of {name}" for name in self._missing(group))

    def columns(self, group: int) -> frozenset[str]:
        kept = self._norms_there() or self._kept(group) or not self.fit.blocks_of(group)
        # A pass that gathers for one block gives the norms of all.
        return frozenset({BLOCK_NORMS}) if self._missing(group) or not kept else frozenset()

    def gatherers(self, group: int) -> tuple[GradientGatherer, ...]:
        fit = self.fit
        draws = fit.recipe.draws if fit.fisher == "sampled" else 0
        return (GradientGatherer(fit.store, self._missing(group), draws, fit.sum_dtype),)

    def keep(self, group: int, names: Sequence[str]) -> None:
        """Keep the norms among a pass's rows until those of all groups are there."""
        store, place = self.fit.store, _place(group)
        store.delete_directory(place)
        for part, table in rows_by_part(store, names):
            write_table(store, part_file(place, part), table.select(["index", BLOCK_NORMS]))
        store.write_json(_blocks_file(group), {"blocks": self._names(group)})

    def tables_there(self) -> bool:
        return self._norms_there() and table_there(self.fit.store, GRADIENTS_FILE)

    def write_tables(self) -> None:
        """Both tables; the numbers of all blocks together go to the facts of ``run.json``."""
        fit = self.fit
        groups = [fit.blocks_of(group) for group in fit.groups]
        if not self._norms_there():
            self._write_norms(groups)
        blocks = [block for some in groups for block in some]
        fit.manifest.facts["gradients"] = write_gradients(fit.store, blocks, fit.notes)
        if "gradients" not in fit.manifest.complete:
            fit.manifest.complete.append("gradients")

    def _write_norms(self, groups: Sequence[Sequence[Block]]) -> None:
        """The norms of all groups side by side, one file a part of the data."""
        corpus, store = self.fit.corpus, self.fit.store
        schema = gradient_norms_schema(self.fit.double)
        number = schema.field("sq_norm").type
        widths = {group: len(blocks) for group, blocks in enumerate(groups) if blocks}
        order = [block.name for blocks in groups for block in blocks]
        notes = footer({}, blocks=order) | self.fit.notes
        store.delete_directory(_NORMS)
        for part in range(parts_of(len(corpus))):
            tables = {g: read_table(store, part_file(_place(g), part)) for g in widths}
            index = next(iter(tables.values()))["index"].to_numpy()
            norms_NB = np.concatenate([_matrix(tables[g], widths[g]) for g in widths], axis=1)
            rows = pa.table(
                {
                    "id": corpus.named(index),
                    "sq_norm": pa.array(norms_NB.sum(axis=1)).cast(number),
                    BLOCK_NORMS: as_lists(norms_NB, number),
                },
                schema=schema,
            )
            write_table(store, part_file(_NORMS, part), rows, notes)

    def _missing(self, group: int) -> frozenset[str]:
        """Names of the blocks that lack a file."""
        names = (block.name for block in self.fit.blocks_of(group))
        return frozenset(
            name for name in names if not is_complete(self.fit.store, gradient_file(name))
        )

    def _names(self, group: int) -> list[str]:
        return [block.name for block in self.fit.blocks_of(group)]

    def _kept(self, group: int) -> bool:
        """Whether the norms of these very blocks are kept."""
        if self.fit.store.read_list(_blocks_file(group), "blocks") != self._names(group):
            return False
        return parts_there(self.fit.store, _place(group), len(self.fit.corpus))

    def _norms_there(self) -> bool:
        return parts_there(self.fit.store, _NORMS, len(self.fit.corpus))


def _place(group: int) -> str:
    return f"work/gradient_norms/group-{group:04d}"


def _blocks_file(group: int) -> str:
    return f"{_place(group)}/blocks.json"


def _matrix(table: pa.Table, width: int) -> np.ndarray[Any, Any]:
    """The norms of a group's blocks, ``[N, B]``."""
    flat = np.asarray(table[BLOCK_NORMS].combine_chunks().flatten())
    return flat.reshape(len(table), width)
