"""Step 1 of K-FAC and EK-FAC: A and G of every block, into ``factors/``; labels that are drawn.

Where the basis is that of the nearest Kronecker product, each further pass is a step of its power
iteration: it takes the sums of the one before from ``work/factors-STEP/``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from raycurv.files.artifacts import eigen_file, factor_file, read_factor, write_factor
from raycurv.files.store import Store
from raycurv.files.tensorfile import is_complete
from raycurv.files.together import together
from raycurv.mathematics.bases import Basis
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.factors import FactorSum, FactorSums, factors_of
from raycurv.mathematics.gradient_factors import (
    GradientFactorSums,
    rows_together,
    through_rows,
    unit,
)
from raycurv.mathematics.gradients import CHUNK
from raycurv.mathematics.loss.differentiation import DRAWN
from raycurv.mathematics.products import gram_elements
from raycurv.planning.cost import PassCost
from raycurv.planning.moments import Bytes, cast_elements, gradient_flops, sum_bytes
from raycurv.planning.shapes import DataShape, Group, Recipe, StageShape, factor_elements, squares
from raycurv.stages.passes import Gatherer
from raycurv.steps.step import Fit, PassStep


@dataclass(frozen=True)
class FactorGatherer(Gatherer):
    """Gathers A and G, of a basis, into files of theirs.

    Attributes:
        max_factor_dim: widest tile.
        sum_dtype: of the written sums.
        step, to: which step of a power iteration the sums come of, and are: see
            :func:`factor_file`. At its first they come of none; at its last they are ``factors/``.
    """

    store: Store
    factors: frozenset[str]
    max_factor_dim: int | None
    sum_dtype: torch.dtype
    basis: Basis
    step: int | None = None
    to: int | None = None

    name = "factors"

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> FactorSums:
        sums = (blocks, dtype, device, self.max_factor_dim, self.factors)
        if not self.basis.per_example:
            return FactorSums(*sums, self.basis.weighted)
        others = {}
        for block in blocks if self.step else ():
            sides = factors_of([block])
            if self.factors & sides.keys():
                for name, side in sides.items():
                    others[name] = unit(read_factor(self.store, name, side.width, self.step))
        return GradientFactorSums(*sums, others)

    def write(self, name: str, result: FactorSum, blocks: Mapping[str, Block]) -> None:
        write_factor(self.store, result, self.sum_dtype, self.to)


class CovarianceCost(PassCost):
    """Sums of A and G, a factor at a time beside them."""

    phase = "first pass: A and G"
    writing_name = "writing factors"

    def held(self, stage: StageShape, recipe: Recipe, data: DataShape) -> Bytes:
        sums, outputs = 0, _outputs(stage)
        for name, tiles in stage.factors(recipe.max_factor_dim).items():
            each_draw = recipe.basis.own or name in outputs
            additions = data.microbatches * (recipe.draws if each_draw else 1)
            if recipe.basis.per_example:
                additions *= data.batch_examples  # in so many parts at most
            sums += squares(tiles) * sum_bytes(recipe, additions) * stage.factor_count(name)
        return {"sums of A and G": sums}

    def passing(self, stage: StageShape, recipe: Recipe, data: DataShape) -> Bytes:
        if recipe.basis.per_example:
            adding = [_gathering(stage, block, recipe, data) for block in stage.blocks]
            return {"moments of gradients": recipe.computed * max(adding, default=0)}
        # Products are added to the sum afterwards; one operand is laid out anew for them.
        shares, weighted = stage.factor_shares, recipe.basis.weighted
        adding = [
            gram_elements(max(tiles))
            + data.thinned(shares[name]).rows
            * (max(tiles) + (cast_elements(recipe, sum(tiles)) or weighted * sum(tiles)))
            for name, tiles in stage.factors(recipe.max_factor_dim).items()
            if max(tiles) > 1  # else a sum of squares
        ]
        return {"covariance of a factor": recipe.computed * max(adding, default=0)}

    def writing(self, stage: StageShape, recipe: Recipe) -> Bytes:
        # The sum in float64, and as it is written.
        largest = max(map(squares, stage.factors(recipe.max_factor_dim).values()), default=0)
        return {"a factor in float64": (8 + recipe.computed) * largest}

    def flops(self, stage: StageShape, recipe: Recipe, data: DataShape) -> float:
        if recipe.basis.per_example:
            return sum(_moment_flops(stage, block, recipe, data) for block in stage.blocks)
        # 2 Σ t² a row; inputs once, outputs a draw.
        outputs, shares, total = _outputs(stage), stage.factor_shares, 0.0
        for name, tiles in stage.factors(recipe.max_factor_dim).items():
            each_draw = recipe.basis.own or name in outputs
            rows = shares[name] * stage.factor_count(name) * data.positions
            total += 2.0 * rows * squares(tiles) * (recipe.draws if each_draw else 1)
        return total

    def written(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        return factor_sum_bytes(group, recipe)

    def files(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        return factor_sum_bytes(group, recipe) if recipe.keep_sums else 0

    def commit(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        return sum_bytes(recipe, data.microbatches) * factor_elements(group, recipe)


class PowerIterationCost(CovarianceCost):
    """The same beside the factors of the step before."""

    phase = "power iteration: A and G"

    def held(self, stage: StageShape, recipe: Recipe, data: DataShape) -> Bytes:
        others = recipe.computed * factor_elements((stage,), recipe)
        return super().held(stage, recipe, data) | {"A and G of the step before": others}

    def flops(self, stage: StageShape, recipe: Recipe, data: DataShape) -> float:
        return super().flops(stage, recipe, data) + gradient_flops(stage, recipe, data)

    def read(self, group: Group, recipe: Recipe) -> int:
        return factor_sum_bytes(group, recipe)

    def written(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        # Beside those of the step before, which go then.
        return 2 * factor_sum_bytes(group, recipe)

    def files(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        return 0


def _gathering(stage: StageShape, block: Block, recipe: Recipe, data: DataShape) -> int:
    """Elements of what exists while moments of a block's gradients are added up."""
    here, d_in, d_out = stage.active(data, block), stage.columns(data, block), block.d_out
    tiles, tokens = _tiles(stage, block, recipe), here.batch_positions
    cast = here.rows * cast_elements(recipe, d_in + d_out)
    product = max(map(gram_elements, tiles))
    if through_rows(tokens, d_in, d_out, *tiles):
        together = min(data.batch_examples, rows_together(tokens, d_in, d_out))
        # Products of rows, the rows weighted by the other side, and by those products.
        return cast + product + together * tokens * (tokens + 2 * max(d_in, d_out) + max(tiles))
    # Gradients, these weighted by the other side, and laid out anew twice.
    together = min(data.batch_examples, max(1, CHUNK // (d_in * d_out)))
    return cast + product + 4 * together * d_in * d_out


def _moment_flops(stage: StageShape, block: Block, recipe: Recipe, data: DataShape) -> float:
    """FLOPs of the moments of all gradients of a block, and of those that are like it."""
    tokens, d_in = stage.active(data, block).row_length, stage.columns(data, block)
    t_in, t_out = _tiles(stage, block, recipe)
    sides = d_in * t_in + block.d_out * t_out
    one = 2.0 * (2 * tokens**2 * (d_in + block.d_out) + tokens * sides)
    if not through_rows(tokens, d_in, block.d_out, t_in, t_out):
        one = 2.0 * d_in * block.d_out * (tokens + t_in + t_out)
    return one * stage.count(block) * data.examples * recipe.draws


def _tiles(stage: StageShape, block: Block, recipe: Recipe) -> tuple[int, int]:
    """Widths of the widest tiles of A and G."""
    factors = stage.factors(recipe.max_factor_dim)
    return max(factors[block.input_factor]), max(factors[block.output_factor])


def _outputs(stage: StageShape) -> set[str]:
    return {block.output_factor for block in stage.blocks}


def factor_sum_bytes(group: Group, recipe: Recipe) -> int:
    """Bytes of the sums in ``factors/``."""
    return recipe.computed * factor_elements(group, recipe)


class Covariances(PassStep):
    """Sums of A and G; and the labels that are drawn on the way, which later passes read."""

    pass_name = "covariance"
    cost = CovarianceCost()
    earlier: ClassVar[int] = 0  # steps of a power iteration that other classes make before

    def __init__(self, fit: Fit, number: int = 1) -> None:
        super().__init__(fit, number)
        # Which step of a power iteration the sums are; the last of them are the factors.
        step = self.earlier + number
        self._from, self._to = step - 1 or None, step if step < fit.recipe.basis_passes else None
        self.name = "factors" if self._to is None else ""

    def sums(self, group: int) -> frozenset[str]:
        """Factors that lack a sum which is still needed, or shall be kept."""
        fit = self.fit
        factors: Iterable[str] = undecomposed(fit, group)
        if self._to is not None:
            wanted = PowerIterations(fit, self._to).sums(group)
            sides = (factors_of([block]).keys() for block in fit.blocks_of(group))
            factors = {name for both in sides if both & wanted for name in both}
        elif fit.recipe.keep_sums:
            factors = factors_of(fit.blocks_of(group))
        return frozenset(f for f in factors if not is_complete(fit.store, factor_file(f, self._to)))

    def columns(self, group: int) -> frozenset[str]:
        drawing = group == self.fit.last and not self.fit.labels_there()
        return frozenset({DRAWN}) if drawing else frozenset()

    def gatherers(self, group: int) -> tuple[FactorGatherer, ...]:
        fit, recipe = self.fit, self.fit.recipe
        gatherer = FactorGatherer(
            fit.store, self.sums(group), recipe.max_factor_dim, fit.sum_dtype, recipe.basis,
            self._from, self._to,
        )  # fmt: skip
        return (gatherer,)


class PowerIterations(Covariances):
    """A further step of the power iteration for the nearest Kronecker product."""

    cost = PowerIterationCost()
    earlier = 1

    def __init__(self, fit: Fit, number: int = 1) -> None:
        super().__init__(fit, number)
        self.pass_name = f"power-{number}"

    def columns(self, group: int) -> frozenset[str]:
        return frozenset()

    def passed(self, group: int) -> None:
        store, names = self.fit.store, factors_of(self.fit.blocks_of(group))
        together(store.delete, [factor_file(name, self._from) for name in names])


def undecomposed(fit: Fit, group: int) -> list[str]:
    """The factors of a group of stages that have no eigenbasis."""
    factors = factors_of(fit.blocks_of(group))
    return [f for f in factors if not is_complete(fit.store, eigen_file(f))]
