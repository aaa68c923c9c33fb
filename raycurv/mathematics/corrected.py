"""Corrected eigenvalues: the second moments of the per-example gradient in the eigenbasis.

    Λ[o, i] = mean over examples (and draws) of (Q_Gᵀ ∇W Q_A)[o, i]²

George et al. 2018 (arXiv:1806.03884), equation 7; ∇W is the exact gradient, summed over an
example's tokens. In the identity basis the same sum is the diagonal of the Fisher. Whatever the
orthonormal basis, ΣΛ is the mean squared gradient norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Captured, of_fit
from raycurv.mathematics.eigen import Eigenbasis
from raycurv.mathematics.gradients import Rotations, add_squares
from raycurv.mathematics.sums import RunningSum, join_nested, load_nested, nested_state


@dataclass(frozen=True)
class CorrectedSum:
    """Λ of one block as a sum.

    Attributes:
        block: its name.
        total: float64 sum of the squared rotated gradients, ``[O, I]``.
        count: examples x draws.
        examples: examples.
    """

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


class CorrectedSums:
    """Gathers Λ of some blocks and every example's squared gradient norm.

    Args:
        blocks: with their input factors known.
        bases: factor -> eigenbasis, as stored (rounded): Λ is fitted in what is multiplied later.
        dtype: of the model's computation.
        only: the blocks whose Λ to gather; the norms are over all of ``blocks``.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        bases: dict[str, Eigenbasis],
        dtype: torch.dtype,
        device: torch.device,
        only: frozenset[str] | None = None,
    ) -> None:
        self.blocks = {block.name: block for block in blocks}
        self._bases = bases
        self._dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._device = device
        self._sums = {
            b.name: RunningSum((b.d_out, b.d_in), dtype, device)
            for b in blocks
            if only is None or b.name in only
        }
        self._examples = 0
        self._count = 0

    def add(self, draws: Sequence[Captured], counts: bool = True) -> dict[str, Tensor]:
        """Add a microbatch's contribution; gives ``gradient_sq_norm [N]``, the mean over draws.

        Args:
            counts: whether it enters the sums; without, it only gives the norms.
        """
        draws = of_fit(draws)
        examples = draws[0].batch.size
        norms = torch.zeros(examples, dtype=torch.float64, device=self._device)
        for captured in draws:
            blocks = tuple(self.blocks.values())
            rotations = Rotations(captured, self._bases, blocks, self._dtype)
            for block in blocks:
                running = self._sums.get(block.name) if counts else None
                norms += add_squares(running, rotations, block)
        if counts:
            self._examples += examples
            self._count += examples * len(draws)
        return {"gradient_sq_norm": norms / len(draws)}

    @property
    def names(self) -> tuple[str, ...]:
        """The blocks whose Λ is gathered."""
        return tuple(self._sums)

    def result(self, name: str) -> CorrectedSum:
        """Λ of a block as a sum with its count.

        Raises:
            NumericalError: the sum is not finite.
        """
        total = self._sums[name].value(f"block {name}")
        return CorrectedSum(name, total, self._count, self._examples)

    def state(self) -> dict[str, Tensor]:
        """Sums and counts as they stand."""
        return nested_state(self._sums) | {"counts": torch.tensor([self._examples, self._count])}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        load_nested(self._sums, state)
        self._examples, self._count = (int(x) for x in state["counts"])

    def join(self, state: Mapping[str, Tensor]) -> None:
        """Add the sums of other examples, given as their :meth:`state`."""
        join_nested(self._sums, state)
        examples, count = (int(x) for x in state["counts"])
        self._examples += examples
        self._count += count
