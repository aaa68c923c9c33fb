"""Step 1 of K-FAC and EK-FAC: A and G of every block, into ``factors/``; labels that are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from raycurv.files.artifacts import eigen_file, factor_file, write_factor
from raycurv.files.store import Store
from raycurv.files.tensorfile import is_complete
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.factors import FactorSum, FactorSums, factors_of
from raycurv.mathematics.loss.differentiation import DRAWN
from raycurv.mathematics.products import gram_elements
from raycurv.planning.cost import PassCost
from raycurv.planning.moments import Bytes, cast_elements, sum_bytes
from raycurv.planning.shapes import DataShape, Group, Recipe, StageShape, factor_elements, squares
from raycurv.stages.passes import Gatherer
from raycurv.steps.step import Fit, PassStep


@dataclass(frozen=True)
class FactorGatherer(Gatherer):
    """Gathers A and G into ``factors/``.

    Attributes:
        max_factor_dim: widest tile.
        sum_dtype: of the written sums.
    """

    store: Store
    factors: frozenset[str]
    max_factor_dim: int | None
    sum_dtype: torch.dtype

    name = "factors"

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> FactorSums:
        return FactorSums(blocks, dtype, device, self.max_factor_dim, self.factors)

    def write(self, name: str, result: FactorSum, blocks: Mapping[str, Block]) -> None:
        write_factor(self.store, result, self.sum_dtype)


class CovarianceCost(PassCost):
    """Sums of A and G, a factor at a time beside them."""

    phase = "first pass: A and G"
    writing_name = "writing factors"

    def held(self, stage: StageShape, recipe: Recipe, data: DataShape) -> Bytes:
        sums, outputs = 0, _outputs(stage)
        for name, tiles in stage.factors(recipe.max_factor_dim).items():
            additions = data.microbatches * (recipe.draws if name in outputs else 1)
            sums += squares(tiles) * sum_bytes(recipe, additions) * stage.factor_count(name)
        return {"sums of A and G": sums}

    def passing(self, stage: StageShape, recipe: Recipe, data: DataShape) -> Bytes:
        # Products are added to the sum afterwards; one operand is laid out anew for them.
        shares = stage.factor_shares
        adding = [
            gram_elements(max(tiles))
            + data.thinned(shares[name]).rows * (max(tiles) + cast_elements(recipe, sum(tiles)))
            for name, tiles in stage.factors(recipe.max_factor_dim).items()
            if max(tiles) > 1  # else a sum of squares
        ]
        return {"covariance of a factor": recipe.computed * max(adding, default=0)}

    def writing(self, stage: StageShape, recipe: Recipe) -> Bytes:
        # The sum in float64, and as it is written.
        largest = max(map(squares, stage.factors(recipe.max_factor_dim).values()), default=0)
        return {"a factor in float64": (8 + recipe.computed) * largest}

    def flops(self, stage: StageShape, recipe: Recipe, data: DataShape) -> float:
        # 2 Σ t² a row; inputs once, outputs a draw.
        outputs, shares, total = _outputs(stage), stage.factor_shares, 0.0
        for name, tiles in stage.factors(recipe.max_factor_dim).items():
            rows = shares[name] * stage.factor_count(name) * data.positions
            total += 2.0 * rows * squares(tiles) * (recipe.draws if name in outputs else 1)
        return total

    def written(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        return factor_sum_bytes(group, recipe)

    def files(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        return factor_sum_bytes(group, recipe) if recipe.keep_sums else 0

    def commit(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        return sum_bytes(recipe, data.microbatches) * factor_elements(group, recipe)


def _outputs(stage: StageShape) -> set[str]:
    return {block.output_factor for block in stage.blocks}


def factor_sum_bytes(group: Group, recipe: Recipe) -> int:
    """Bytes of the sums in ``factors/``."""
    return recipe.computed * factor_elements(group, recipe)


class Covariances(PassStep):
    """Sums of A and G; and the labels that are drawn on the way, which later passes read."""

    name = "factors"
    pass_name = "covariance"
    cost = CovarianceCost()

    def sums(self, group: int) -> frozenset[str]:
        """Factors that lack a sum which is still needed, or shall be kept."""
        fit = self.fit
        factors: Iterable[str] = undecomposed(fit, group)
        if fit.recipe.keep_sums:
            factors = factors_of(fit.blocks_of(group))
        return frozenset(f for f in factors if not is_complete(fit.store, factor_file(f)))

    def columns(self, group: int) -> frozenset[str]:
        drawing = group == self.fit.last and not self.fit.labels_there()
        return frozenset({DRAWN}) if drawing else frozenset()

    def gatherers(self, group: int) -> tuple[FactorGatherer, ...]:
        fit = self.fit
        missing = self.sums(group)
        return (FactorGatherer(fit.store, missing, fit.recipe.max_factor_dim, fit.sum_dtype),)


def undecomposed(fit: Fit, group: int) -> list[str]:
    """The factors of a group of stages that have no eigenbasis."""
    factors = factors_of(fit.blocks_of(group))
    return [f for f in factors if not is_complete(fit.store, eigen_file(f))]
