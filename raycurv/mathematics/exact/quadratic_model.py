"""The loss along a direction v, and learning rates: what the curvature G says of steps.

    L(θ + t v) ≈ L(θ) + t gᵀv + ½ t² vᵀGv              the minimum along v at t = −gᵀv / vᵀGv
    ρ = π / (max_c a_c − min_c a_c),  a = J v           of a target: the softmax' expansion in t
                                                        converges for |t| < ρ
    η_max = 2 / λ_max                                   gradient descent on the quadratic is stable

The radius: ``log Σ_c exp(z_c + t a_c)`` has no singularity in t nearer than that, for its terms
cannot cancel while the phases of all are within π of each other. The least radius over all targets
bounds the steps for which a quadratic of the logits can be trusted.

λ_max of a mean over n examples is too large in expectation (the largest eigenvalue is convex), by
about c / n where it is simple: a line in 1 / n through what parts of the data give tells how much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AlongDirection:
    """A step v from the model, with sums over the examples divided by their number.

    Attributes:
        loss: L(θ), in nats.
        slope: gᵀv, the first-order term.
        curvature: vᵀGv.
        radius: the least ρ, in lengths of v; infinite where no logit moves.
    """

    loss: float
    slope: float
    curvature: float
    radius: float

    @property
    def predicted(self) -> float:
        """L(θ + v) to second order."""
        return self.loss + self.slope + self.curvature / 2

    @property
    def best(self) -> float:
        """The t with the least predicted loss along v; NaN where the loss curves not upwards."""
        return -self.slope / self.curvature if self.curvature > 0 else math.nan

    @property
    def trusted(self) -> bool:
        """Whether the whole step lies within the radius."""
        return self.radius > 1


def softmax_radius(reach: float) -> float:
    """ρ of the target whose outputs' changes along v reach furthest, ``max_c a_c − min_c a_c``."""
    return math.pi / reach if reach > 0 else math.inf


def largest_rate(largest_eigenvalue: float) -> float:
    """The largest stable learning rate of gradient descent, 2 / λ_max."""
    return 2 / largest_eigenvalue if largest_eigenvalue > 0 else math.inf


@dataclass(frozen=True)
class SampleBias:
    """A line ``limit + slope / n`` through what is measured on n examples.

    Attributes:
        limit: for n to infinity.
        slope: the excess at n examples, times n.
    """

    limit: float
    slope: float

    @classmethod
    def through(cls, counts: Sequence[int], values: Sequence[float]) -> SampleBias:
        """By least squares, from two numbers of examples at least, weighted by n: a value's
        variance falls with 1 / n."""
        n = torch.tensor(counts, dtype=torch.float64)
        root = n.sqrt()
        design = torch.stack([root, root / n], 1)
        right = root * torch.tensor(values, dtype=torch.float64)
        limit, slope = torch.linalg.lstsq(design, right[:, None]).solution[:, 0].tolist()
        return cls(limit, slope)

    def at(self, count: int) -> float:
        """How much too large a value of so many examples is."""
        return self.slope / count
