"""Products of the curvature with many vectors, summed over the data.

    (C v_q)_block = (1/N) Σ_n J_nᵀ R_n J_n v_q        a mean over examples, as Λ is

Axis letters: Q directions, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Captured
from raycurv.mathematics.sums import SHARED, Results, RunningSum, Sums


@dataclass(frozen=True)
class ProductSum:
    """A block's products: the sum over examples ``[Q, O, I]`` float64, and how many these are."""

    total: Tensor
    examples: int

    def plus(self, other: ProductSum) -> ProductSum:
        """The sum over the examples of both."""
        return ProductSum(self.total + other.total, self.examples + other.examples)

    @property
    def mean(self) -> Tensor:
        """``[Q, O, I]``, float64."""
        return self.total / max(1, self.examples)


class ProductSums(Sums):
    """Gathers products; its draws are directions, in their order, each made when it is asked for.

    Args:
        blocks: of the stage.
        directions: Q.
        dtype: of the model's computation.
        device: where the sums live.
    """

    def __init__(
        self, blocks: Iterable[Block], directions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shapes = {block.name: (directions, block.d_out, block.d_in) for block in blocks}
        super().__init__(shapes, dtype, device)
        self._totals = {name: RunningSum(shape, dtype, device) for name, shape in shapes.items()}
        self.sums |= self._totals
        self.counts[SHARED] = [0]

    def add(self, draws: Iterable[Captured], counts: bool = True) -> Results:
        examples = 0
        for q, captured in enumerate(draws):
            examples = captured.batch.size
            for name, product in captured.products.items() if counts else ():
                self._totals[name].add(product[None], slice(q, q + 1))
        if counts:
            self.count(SHARED, examples)
        return {}

    def result(self, name: str) -> ProductSum:
        where = f"block {name}, its product"
        return ProductSum(self._totals[name].value(where), self.counts[SHARED][0])
