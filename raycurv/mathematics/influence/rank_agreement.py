"""How well scores foretell what removals did: the linear datamodeling score of some removals.

    predicted(q, S) = Σ over removed n in S of score(q, n)
    agreement       = mean over queries q of Spearman over removals S of predicted and measured

Park et al. 2023 (arXiv:2303.14186), section 4. Its standard error is the jackknife's over at most
20 groups of removals (Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 11).

Axis letters: Q queries, S removals.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GROUPS = 20


def agreement(predicted_QS: Tensor, measured_QS: Tensor) -> tuple[float, float]:
    """The agreement, and its standard error over removals. A query of which one side never changes
    counts as 0."""
    removals = predicted_QS.shape[1]
    group_S = torch.arange(removals) * min(_GROUPS, removals) // removals
    without = []
    for group in group_S.unique():
        kept = group_S != group
        without.append(_mean(predicted_QS[:, kept], measured_QS[:, kept]))
    count = len(without)
    spread = torch.tensor(without, dtype=torch.float64).var(correction=0)
    return _mean(predicted_QS, measured_QS), float((spread * (count - 1)).sqrt())


def _mean(a_QS: Tensor, b_QS: Tensor) -> float:
    return float(correlation(mean_ranks(a_QS), mean_ranks(b_QS)).mean())


def correlation(a_QS: Tensor, b_QS: Tensor) -> Tensor:
    """Pearson's correlation of each row, ``[Q]``, of their :func:`mean_ranks` Spearman's; 0 where
    one side never changes."""
    a, b = a_QS - a_QS.mean(dim=1, keepdim=True), b_QS - b_QS.mean(dim=1, keepdim=True)
    norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    found: Tensor = (a * b).sum(dim=1) / norms.clamp_min(1e-300)
    return found


def mean_ranks(values: Tensor) -> Tensor:
    """Ranks over the last axis from 0, float64, equal numbers at their mean rank."""
    values = values.double().contiguous()
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values)
    return (below + torch.searchsorted(ordered, values, right=True) - 1).double() / 2
