"""The linear datamodeling score (LDS): do scores foretell what training on a part of the data does?

    predicted(q, S) = Σ over n in S of score(q, n)
    LDS(q)          = Spearman over subsets S of predicted(q, S) and −loss of q after training on S

Park et al. 2023 (TRAK, arXiv:2303.14186), section 4. The ground truth is an average over seeds of
retraining. What is left of its noise is measured by its reliability: the same Spearman between two
halves of the seeds, and by Spearman-Brown's formula 2r / (1 + r) of all of them.

Intervals hold 95 % of a bootstrap: over queries their LDS is drawn with replacement, over subsets
the subsets are, and every Spearman is taken anew. The draws are the same for every method, so that
differences are paired.

Axis letters: Q queries, N examples, S subsets, R seeds, K bootstrap samples.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from agreement import correlations
from torch import Tensor

SAMPLES = 1000  # of a bootstrap: the ends of its interval move by some hundredths of its width
_CHUNK = 50  # of them at once


@dataclass(frozen=True)
class Interval:
    """That 95 % of a bootstrap's samples lie in."""

    low: float
    high: float

    @classmethod
    def of(cls, samples_K: Tensor) -> Interval:
        low, high = torch.quantile(samples_K, torch.tensor([0.025, 0.975]).to(samples_K)).tolist()
        return cls(low, high)

    def __str__(self) -> str:
        return f"{self.low:.3f} to {self.high:.3f}"


def mean_interval(values: Tensor) -> Interval:
    """Of the mean of ``values [Q]``, over these."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (SAMPLES, len(values)), generator=generator)
    return Interval.of(values.double()[drawn].mean(dim=1))


@dataclass(frozen=True)
class Lds:
    """The LDS of a method, or the difference of two.

    Attributes:
        by_query: ``[Q]``.
        by_subsets: the mean over queries, on resampled subsets, ``[K]``.
    """

    by_query: Tensor
    by_subsets: Tensor

    def __sub__(self, other: Lds) -> Lds:
        return Lds(self.by_query - other.by_query, self.by_subsets - other.by_subsets)

    @property
    def mean(self) -> float:
        """Over queries."""
        return float(self.by_query.mean())

    @property
    def over_queries(self) -> Interval:
        return mean_interval(self.by_query)

    @property
    def over_subsets(self) -> Interval:
        return Interval.of(self.by_subsets)

    @property
    def positive(self) -> bool:
        """Whether both intervals lie above 0."""
        return self.over_queries.low > 0 and self.over_subsets.low > 0

    def figures(self) -> dict[str, float | tuple[float, float]]:
        """The mean, and the ends of its intervals."""
        queries, subsets = self.over_queries, self.over_subsets
        return {
            "mean": self.mean,
            "over queries": (queries.low, queries.high),
            "over subsets": (subsets.low, subsets.high),
        }

    def cells(self) -> list[str]:
        """For a table."""
        return [f"{self.mean:.3f}", str(self.over_queries), str(self.over_subsets)]


@dataclass(frozen=True)
class GroundTruth:
    """What training on subsets did.

    Attributes:
        masks_SN: 1 for the examples of a subset.
        losses_RSQ: of the queries after training on each, from each seed.
    """

    masks_SN: Tensor
    losses_RSQ: Tensor

    def lds(self, scores_QN: Tensor) -> Lds:
        """Of a method's scores."""
        predicted_QS = scores_QN.double() @ self.masks_SN.double().T
        gains_QS = -self.losses_RSQ.mean(dim=0).T
        return Lds(spearman(predicted_QS, gains_QS), resampled_spearman(predicted_QS, gains_QS))

    def reliability(self) -> tuple[float, float]:
        """Of half the seeds, a mean over all ways to halve them, and of all by Spearman-Brown.

        Of one seed nothing is known: not a number.
        """
        seeds = len(self.losses_RSQ)
        half = seeds // 2
        found = [
            spearman(
                self.losses_RSQ[list(one)].mean(dim=0).T,
                self.losses_RSQ[[r for r in range(seeds) if r not in one][:half]].mean(dim=0).T,
            ).mean()
            for one in itertools.combinations(range(seeds), half)
            if half
        ]
        r = float(torch.stack(found).mean()) if found else float("nan")
        return r, 2 * r / (1 + r)


def draw_subsets(count: int, examples: int, share: float, seed: int) -> Tensor:
    """``[S, N]``: each row has ones for a share of the examples, drawn without replacement."""
    generator = torch.Generator().manual_seed(seed)
    masks_SN = torch.zeros(count, examples)
    for mask_N in masks_SN:
        mask_N[torch.randperm(examples, generator=generator)[: round(share * examples)]] = 1
    return masks_SN


def spearman(a: Tensor, b: Tensor, counts: Tensor | None = None) -> Tensor:
    """Correlation of the ranks over the last axis, equal numbers at their mean rank.

    Args:
        a, b: ``[..., S]``.
        counts: ``[..., S]``, how often each pair stands in the sample; once by default.
    """
    once = torch.ones(a.shape[-1:]) if counts is None else counts
    return correlations(mean_ranks(a, once), mean_ranks(b, once), once)


def mean_ranks(a: Tensor, counts: Tensor) -> Tensor:
    """Ranks over the last axis of ``a [..., S]``, entry s standing ``counts[..., s]`` times.

    An entry's rank is the number of entries below it and half of those equal to it.
    """
    shape = torch.broadcast_shapes(a.shape, counts.shape)
    values, order = a.sort(dim=-1)
    seen = counts.double().expand(shape).gather(-1, order.expand(shape)).cumsum(dim=-1)
    seen = torch.cat([torch.zeros_like(seen[..., :1]), seen], dim=-1)
    values = values.contiguous()
    below = seen.gather(-1, torch.searchsorted(values, a.contiguous()).expand(shape))
    upto = seen.gather(-1, torch.searchsorted(values, a.contiguous(), right=True).expand(shape))
    return (below + upto) / 2


def resampled_spearman(a_QS: Tensor, b_QS: Tensor) -> Tensor:
    """Spearman's mean over queries on subsets that are drawn with replacement, ``[K]``."""
    subsets = a_QS.shape[1]
    generator = torch.Generator().manual_seed(0)
    drawn_KS = torch.randint(subsets, (SAMPLES, subsets), generator=generator)
    counts_KS = torch.zeros(SAMPLES, subsets, dtype=torch.float64)
    counts_KS.scatter_add_(1, drawn_KS, torch.ones_like(drawn_KS, dtype=torch.float64))
    return torch.cat(
        [spearman(a_QS, b_QS, c_KS[:, None]).mean(dim=1) for c_KS in counts_KS.split(_CHUNK)]
    )
