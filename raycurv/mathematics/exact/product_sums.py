"""Products of the curvature with many vectors, summed over the data.

    (C v_q)_block = (1/N) Σ_n J_nᵀ R_n J_n v_q        a mean over examples, as Λ is

Axis letters: Q directions, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raycurv.errors import RaycurvError
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
        own: block -> the directions whose products are gathered of it, and nothing of other blocks;
            by default all of all.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        directions: int,
        dtype: torch.dtype,
        device: torch.device,
        own: Mapping[str, range] | None = None,
    ) -> None:
        asked = {block.name: range(directions) for block in blocks} if own is None else own
        self._own = {block.name: asked[block.name] for block in blocks if block.name in asked}
        shapes = {
            block.name: (len(self._own[block.name]), block.d_out, block.d_in)
            for block in blocks
            if block.name in self._own
        }
        super().__init__(shapes, dtype, device)
        self._totals = {name: RunningSum(shape, dtype, device) for name, shape in shapes.items()}
        self.sums |= self._totals
        self.counts[SHARED] = [0]

    def add(self, draws: Iterable[Captured], counts: bool = True) -> Results:
        examples = 0
        for q, captured in enumerate(draws):
            examples = captured.batch.size
            for name, own in self._own.items() if counts else ():
                if q in own:
                    at = q - own.start
                    self._totals[name].add(captured.products[name][None], slice(at, at + 1))
        if counts:
            self.count(SHARED, examples)
        return {}

    def result(self, name: str) -> ProductSum:
        where = f"block {name}, its product"
        return ProductSum(self._totals[name].value(where), self.counts[SHARED][0])


# How far vᵀGv by tangents may be from vᵀ(Gv) by cotangents, relative: rounding gives far less, a
# wrong derivative of an operation far more.
_AGREE = {torch.float64: 1e-5, torch.float32: 1e-2}


def check_quadratic(quadratic_Q: Tensor, dots_Q: Tensor, dtype: torch.dtype) -> None:
    """Hold ``vᵀCv``, as tangents give it, against ``vᵀ(Cv)``, which cotangents have come back for.

    Args:
        quadratic_Q: a mean over examples, float64.
        dots_Q: dot products of the vectors with their products, over all blocks, float64.
        dtype: of the model's computation.

    Raises:
        RaycurvError: they differ: forward and backward derivative of an operation of the model are
            not of one function.
    """
    scale = torch.maximum(quadratic_Q.abs(), dots_Q.abs()).clamp_min(1e-300)
    apart = float(((quadratic_Q - dots_Q).abs() / scale).max())
    if not apart <= _AGREE.get(dtype, 0.2):
        q = int(((quadratic_Q - dots_Q).abs() / scale).argmax())
        raise RaycurvError(
            f"direction {q + 1} of {len(dots_Q)}",
            f"vᵀCv by tangents and by cotangents to agree within {_AGREE.get(dtype, 0.2):g}",
            f"{float(quadratic_Q[q]):.6g} and {float(dots_Q[q]):.6g}",
            "An operation of the model has a forward derivative that its backward does not belong "
            "to: leave the blocks before it out, or write it with other operations of torch's.",
        )
