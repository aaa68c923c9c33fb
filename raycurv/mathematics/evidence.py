"""The Laplace evidence of a damping, from the curvature's eigenvalues and the trained weights.

A Gaussian prior of precision δ about zero on the P weights that have curvature, and a posterior
about the trained θ of precision ``N F + δ``: F is a mean over the N examples of the curvature of an
example's loss, which is summed over its targets, so ``N F`` is that of their total loss L. Per
example the posterior's precision is ``F + λ`` with ``λ = δ / N``, the damping. Up to what does not
depend on it

    log p(data | λ) = −L + ½ Σ log(λ / (Λ + λ)) − ½ N λ ‖θ‖²
    at its maximum    γ(λ) = N λ ‖θ‖²                    γ(λ) = Σ Λ / (Λ + λ)

γ, the number of parameters that the data determine, falls with λ while the other side rises: there
is one maximum. A zero in Λ adds nothing to either sum.

This takes L for a negative log-likelihood. Half the squared errors E of M numbers are one only once
the precision β of their noise is known, ``L = β E − ½ M log(β / 2π)``, with curvature ``β F`` and
``δ = β N λ``. The best β at a λ leaves

    log p(data | λ) = ½ M log(β / 2π) − ½ M + ½ Σ log(λ / (Λ + λ))      β = M / (2 E + N λ ‖θ‖²)
    at its maximum    γ(λ) = β N λ ‖θ‖²

MacKay 1992, "Bayesian interpolation", section 4, and "A practical Bayesian framework for
backpropagation networks"; Immer et al. 2021 (arXiv:2104.04975), section 3; Daxberger et al. 2021
(arXiv:2106.14806), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raycurv.errors import UserError

_OCTAVE = 64  # bins
# Of the curve: quarters of a decade, and how many to either side of the maximum.
_STEP, _REACH = 0.25, 12


@dataclass(frozen=True)
class Density:
    """How many eigenvalues above zero there are about each value.

    Those in a 64th of an octave are taken to be equal to their mean, which changes the sums above
    by less than 2e-6 of themselves.

    Attributes:
        bins: numbers of the bins that hold any, ascending, int64.
        counts, totals: of these, eigenvalues and their sum, float64.
    """

    bins: Tensor
    counts: Tensor
    totals: Tensor

    @classmethod
    def of(cls, eigenvalues: Tensor) -> Density:
        """Of eigenvalues of any shape, none below zero."""
        values = eigenvalues[eigenvalues > 0].double()
        if not len(values):
            return cls(values.long(), values, values)
        places = values.log2().mul_(_OCTAVE).floor_().long()
        first = int(places.min())
        places -= first
        counts, totals = places.bincount().double(), places.bincount(values)
        there = counts.nonzero().flatten()
        return cls(there + first, counts[there], totals[there])

    @classmethod
    def joined(cls, parts: Sequence[Density]) -> Density:
        """Of the eigenvalues of several blocks."""
        bins, place = torch.cat([p.bins for p in parts]).unique(return_inverse=True)
        counts, totals = (
            torch.zeros(len(bins), dtype=torch.float64).index_add_(0, place, torch.cat(some))
            for some in ([p.counts for p in parts], [p.totals for p in parts])
        )
        return cls(bins, counts, totals)

    def effective(self, lam: float) -> float:
        """``γ = Σ Λ / (Λ + λ)``: how many parameters the data determine at a damping λ."""
        return float((self.totals / (self.totals / self.counts + lam)).sum())

    def shrinkage(self, lam: float) -> float:
        """``Σ log(λ / (Λ + λ))``."""
        return -float((self.counts * (self.totals / self.counts / lam).log1p()).sum())


@dataclass(frozen=True)
class Evidence:
    """The evidence of a fit as a function of its damping λ.

    Attributes:
        density: of Λ, a mean over examples.
        squared_norm: ``‖θ‖²`` of the weights that Λ is of.
        examples: N.
        loss: L, the sum over examples in nats; half the squared errors where ``numbers`` is given.
        numbers: M, how many numbers of unknown noise are predicted; ``None`` where the loss is a
            negative log-likelihood as it stands.
    """

    density: Density
    squared_norm: float
    examples: int
    loss: float
    numbers: int | None = None

    def precision(self, lam: float) -> float:
        """β, the best at λ; 1 where the loss says how large the noise is."""
        if self.numbers is None:
            return 1.0
        return self.numbers / (2 * self.loss + self._norm(lam))

    def log_evidence(self, lam: float) -> float:
        """``log p(data | λ)`` in nats, up to what does not depend on the damping λ."""
        volume = 0.5 * self.density.shrinkage(lam)
        if self.numbers is None:
            return volume - self.loss - 0.5 * self._norm(lam)
        return volume + 0.5 * self.numbers * (math.log(self.precision(lam) / math.tau) - 1)

    def best(self) -> float:
        """The λ of the largest evidence.

        Raises:
            UserError: there is none, for the weights are all zero, or a regression leaves no error.
        """
        low, high = -700.0, 700.0  # log λ, within what a float holds
        if not (self._rises(low) and not self._rises(high)):
            raise UserError(
                "--damping evidence",
                "curvature, weights that are not all zero, and a regression that leaves some error",
                f"{float(self.density.counts.sum()):.0f} eigenvalues above zero, a squared norm of "
                f"{self.squared_norm:g}, a loss of {self.loss:g}",
                "Give --damping as a number.",
            )
        while high - low > 1e-12 * max(1.0, abs(low)):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self._rises(middle) else (low, middle)
        return math.exp(0.5 * (low + high))

    def curve(self, best: float) -> list[float]:
        """Dampings about the best, four a decade and three decades to either side."""
        return [best * 10 ** (_STEP * k) for k in range(-_REACH, _REACH + 1)]

    def _norm(self, lam: float) -> float:
        """``N λ ‖θ‖²``; half of it is what the prior takes from the evidence, in nats."""
        return self.examples * lam * self.squared_norm

    def _rises(self, log_lam: float) -> bool:
        """Whether the evidence still rises with λ."""
        lam = math.exp(log_lam)
        return self.density.effective(lam) > self.precision(lam) * self._norm(lam)
