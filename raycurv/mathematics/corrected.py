"""Corrected eigenvalues: the second moments of the per-example gradient in the eigenbasis.

    Λ[o, i] = mean over examples (and draws) of (Q_Gᵀ ∇W Q_A)[o, i]²

George et al. 2018 (arXiv:1806.03884), equation 7; ∇W is the exact gradient, summed over an
example's tokens. In the identity basis the same sum is the diagonal of the Fisher. Whatever the
orthonormal basis, ΣΛ is the mean squared gradient norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Captured, of_fit
from raycurv.mathematics.eigen import Eigenbasis
from raycurv.mathematics.gradients import SQUARED_NORM, Rotations, add_squares
from raycurv.mathematics.sums import SHARED, Combine, Results, RunningSum, Sums


@dataclass(frozen=True)
class CorrectedSum:
    """Λ of one block as a float64 sum ``[O, I]`` of the squared rotated gradients of so many
    examples, and its count, examples x draws."""

    block: str
    total: Tensor
    count: int
    examples: int

    def mean(self) -> Tensor:
        """Λ, float64."""
        return self.total / max(self.count, 1)

    def plus(self, other: CorrectedSum) -> CorrectedSum:
        """Λ of both data, in the one basis that both were fitted in."""
        assert self.block == other.block
        return CorrectedSum(
            self.block,
            self.total.to(other.total.device) + other.total,
            self.count + other.count,
            self.examples + other.examples,
        )


class CorrectedSums(Sums):
    """Gathers Λ of some blocks and every example's squared gradient norm.

    Args:
        blocks: with their input factors known.
        bases: factor -> eigenbasis, as stored (rounded): Λ is fitted in what is multiplied later.
        only: the blocks whose Λ to gather; the norms are over all of ``blocks``.
    """

    results: ClassVar[Mapping[str, Combine]] = {SQUARED_NORM: "sum"}

    def __init__(
        self,
        blocks: Sequence[Block],
        bases: dict[str, Eigenbasis],
        dtype: torch.dtype,
        device: torch.device,
        only: frozenset[str] | None = None,
    ) -> None:
        gathered = [b for b in blocks if only is None or b.name in only]
        super().__init__([b.name for b in gathered], dtype, device)
        self._blocks, self._bases = tuple(blocks), bases
        self._totals = {b.name: RunningSum((b.d_out, b.d_in), dtype, device) for b in gathered}
        self.sums |= self._totals
        # Examples, and examples x draws.
        self.counts = {SHARED: [0, 0]}

    def add(self, draws: Sequence[Captured], counts: bool = True) -> Results:
        """Add a microbatch's contribution; gives ``gradient_sq_norm [N]``, the mean over draws."""
        draws = of_fit(draws)
        examples = draws[0].batch.size
        norms = torch.zeros(examples, dtype=torch.float64, device=self.device)
        for captured in draws:
            rotations = Rotations(captured, self._bases, self._blocks, self.dtype)
            for block in self._blocks:
                running = self._totals.get(block.name) if counts else None
                norms += add_squares(running, rotations, block)
        if counts:
            self.count(SHARED, examples, examples * len(draws))
        return {SQUARED_NORM: norms / len(draws)}

    def result(self, name: str) -> CorrectedSum:
        """Λ of a block as a sum with its count; NumericalError if the sum is not finite."""
        examples, count = self.counts[SHARED]
        return CorrectedSum(name, self._totals[name].value(f"block {name}"), count, examples)
