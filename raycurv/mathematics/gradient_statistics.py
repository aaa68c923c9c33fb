"""Gradient statistics of the blocks: means, squares, norms, and the noise of the mean.

    mean                     ḡ = mean over examples of ∇W, the data's own labels
    mean_square              mean over examples of ∇W², the diagonal of the empirical Fisher
    mean_square_sampled      the same for drawn labels, the diagonal of the true Fisher
    gauss_newton_bartlett    Σ over microbatches and draws of (Σ_n ∇W_n)², over examples and draws
    noise                    tr Σ = (Σ_n |∇W_n|² - N |ḡ|²) / (N - 1)
    signal                   |ḡ|² - tr Σ / N

Squares are elementwise, losses are sums over an example's tokens. Gauss-Newton-Bartlett is the
estimate of Sophia (Liu et al. 2023, arXiv:2305.14342, algorithm 2): with drawn labels the examples'
gradients have mean zero and are independent, so that its expectation is the same diagonal. Noise
and signal are unbiased, and their quotient is the gradient noise scale, in examples (McCandlish et
al. 2018, arXiv:1812.06162, appendix A.1).

Axis letters: B blocks, N examples, O and I a block's axes (with the bias column).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Captured
from raycurv.mathematics.eigen import own_axes
from raycurv.mathematics.gradients import Rotations, add_squares
from raycurv.mathematics.sums import SHARED, Combine, Results, RunningSum, Sums

# What is summed up of gradients of the data's own labels, and of drawn ones.
OWN, SAMPLED = ("mean", "mean_square"), ("mean_square_sampled", "gauss_newton_bartlett")
# Squared norms of the examples' gradients, [N, B], among what the driver collects.
BLOCK_NORMS = "block_sq_norms"


@dataclass(frozen=True)
class GradientStatistics:
    """What is known of one block's gradients.

    Attributes:
        block: its name.
        mean: of the per-example gradient with the data's own labels, ``[O, I]``; the bias is the
            last column.
        mean_square: of its elements' squares, ``[O, I]``: the diagonal of the empirical Fisher.
        mean_square_sampled: the same for labels drawn from the model, over examples and draws:
            the diagonal of the true Fisher; ``None`` for an empirical fit.
        gauss_newton_bartlett: the estimate of the same diagonal from the gradients of whole
            microbatches; ``None`` for an empirical fit.
        examples: N.
        batches: how many microbatches there were.
    """

    block: str
    mean: Tensor
    mean_square: Tensor
    mean_square_sampled: Tensor | None
    gauss_newton_bartlett: Tensor | None
    examples: int
    batches: int


@dataclass(frozen=True)
class GradientNumbers:
    """Norms, noise and traces of one block's gradients, or of those of several together.

    Attributes:
        examples: N.
        mean_sq_norm: ``|ḡ|²`` as it is, biased up by ``tr Σ / N``.
        sq_norm: mean over examples of ``|∇W|²``, the trace of the empirical Fisher.
        sampled_trace: of the true Fisher, from drawn labels; ``None`` without.
        bartlett_trace: of its Gauss-Newton-Bartlett estimate; ``None`` without.
    """

    examples: int
    mean_sq_norm: float
    sq_norm: float
    sampled_trace: float | None = None
    bartlett_trace: float | None = None

    def plus(self, other: GradientNumbers) -> GradientNumbers:
        """The numbers of these blocks and of others together."""
        assert self.examples == other.examples
        return GradientNumbers(
            self.examples,
            self.mean_sq_norm + other.mean_sq_norm,
            self.sq_norm + other.sq_norm,
            _sum(self.sampled_trace, other.sampled_trace),
            _sum(self.bartlett_trace, other.bartlett_trace),
        )

    @property
    def noise(self) -> float | None:
        """``tr Σ``, unbiased; ``None`` for a single example."""
        if self.examples < 2:
            return None
        return (self.sq_norm - self.mean_sq_norm) * self.examples / (self.examples - 1)

    @property
    def signal(self) -> float | None:
        """``|E ∇W|²``, unbiased, and so below zero at times; ``None`` for a single example."""
        return None if self.noise is None else self.mean_sq_norm - self.noise / self.examples

    @property
    def scale(self) -> float | None:
        """The gradient noise scale in examples; ``None`` where no signal stands out."""
        if self.noise is None or self.signal is None or self.signal <= 0:
            return None
        return self.noise / self.signal


@dataclass(frozen=True)
class GradientSum:
    """Gradient statistics of one block as sums.

    Attributes:
        totals: of :data:`OWN`, and of :data:`SAMPLED` where labels were drawn; float64 ``[O, I]``.
        examples: N.
        draws: labels drawn for each; 0 for none.
    """

    block: str
    totals: dict[str, Tensor]
    examples: int
    draws: int
    batches: int

    def plus(self, other: GradientSum) -> GradientSum:
        """The sums over the examples of both."""
        assert self.block == other.block and self.draws == other.draws
        return GradientSum(
            self.block,
            {k: t.to(other.totals[k].device) + other.totals[k] for k, t in self.totals.items()},
            self.examples + other.examples,
            self.draws,
            self.batches + other.batches,
        )

    def mean(self, name: str) -> Tensor:
        """A total as a mean over examples, and over draws where labels were drawn; float64."""
        return self.totals[name] / max(1, self.examples * (self.draws if name in SAMPLED else 1))

    def numbers(self) -> GradientNumbers:
        """The block's norms and traces, from which noise and signal follow."""
        traces = [float(self.mean(kind).sum()) if self.draws else None for kind in SAMPLED]
        return GradientNumbers(
            self.examples,
            float(self.mean("mean").square().sum()),
            float(self.mean("mean_square").sum()),
            *traces,
        )


class GradientSums(Sums):
    """Gathers gradient statistics of some blocks, and every example's squared norms.

    Args:
        blocks: with their input factors known.
        draws: of labels for every example, beside the data's own; 0 for none.
        only: the blocks whose sums to gather; the norms are of all of ``blocks``.
    """

    results: ClassVar[Mapping[str, Combine]] = {BLOCK_NORMS: "apart"}

    def __init__(
        self,
        blocks: Sequence[Block],
        draws: int,
        dtype: torch.dtype,
        device: torch.device,
        only: frozenset[str] | None = None,
    ) -> None:
        gathered = [b for b in blocks if only is None or b.name in only]
        super().__init__([b.name for b in gathered], dtype, device)
        self._blocks, self._draws = tuple(blocks), draws
        self._bases = own_axes(blocks)
        kinds = (*OWN, *SAMPLED) if draws else OWN
        self._totals = {
            b.name: {kind: RunningSum((b.d_out, b.d_in), dtype, device) for kind in kinds}
            for b in gathered
        }
        for name, totals in self._totals.items():
            self.sums |= {f"{name}#{kind}": total for kind, total in totals.items()}
        # Examples and microbatches.
        self.counts = {SHARED: [0, 0]}

    def add(self, draws: Sequence[Captured], counts: bool = True) -> Results:
        """Add a microbatch's contribution; gives ``block_sq_norms [N, B]`` of the own labels."""
        (own,) = (captured for captured in draws if captured.own)
        sampled = [captured for captured in draws if not captured.own]
        assert len(sampled) == self._draws
        totals = self._totals if counts else {}
        apart, together = self._rotations(own), self._rotations(own, together=True)
        norms = []
        for block in self._blocks:
            mine = totals.get(block.name)
            norms.append(add_squares(None if mine is None else mine["mean_square"], apart, block))
            if mine is not None:
                _add_sum(mine["mean"], together, block)
        for captured in sampled if counts else ():
            apart, together = self._rotations(captured), self._rotations(captured, together=True)
            for block in self._blocks:
                if block.name in totals:
                    add_squares(totals[block.name]["mean_square_sampled"], apart, block)
                    add_squares(totals[block.name]["gauss_newton_bartlett"], together, block)
        if counts:
            self.count(SHARED, own.batch.size, 1)
        none = torch.zeros(own.batch.size, 0, dtype=torch.float64, device=self.device)
        return {BLOCK_NORMS: torch.stack(norms, dim=1) if norms else none}

    def _rotations(self, captured: Captured, together: bool = False) -> Rotations:
        return Rotations(captured, self._bases, self._blocks, self.dtype, together)

    def result(self, name: str) -> GradientSum:
        """The sums of one block; NumericalError if one is not finite."""
        totals = {k: t.value(f"block {name}, {k}") for k, t in self._totals[name].items()}
        examples, batches = self.counts[SHARED]
        return GradientSum(name, totals, examples, self._draws, batches)


def _add_sum(running: RunningSum, together: Rotations, block: Block) -> None:
    """Add the sum of all examples' gradients: one product of all rows, a group of channels each."""
    rows, columns = together.rows(block), together.columns(block)
    if rows is not None and rows[0].ndim == 3:
        running.add_outer(rows[1][0], rows[0][0], columns)
        return
    for _, outputs, m_NOI in together.pieces(block):
        running.add(m_NOI[0], outputs, columns)


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
