"""Scores divided by what makes those of long or unusual examples large.

    relative    s(q, n) / √(gₙᵀ H⁻¹ gₙ)
    cosine      s(q, n) / √(g_qᵀ H⁻¹ g_q · gₙᵀ H⁻¹ gₙ)
    per-token   s(q, n) / tokens of n

``g_q`` is the gradient of a query's measurement, ``gₙ`` that of an example's loss, both summed over
tokens and over all blocks; ``H⁻¹ = (F + λ)⁻¹`` at full rank. What stands below the roots is
self-influence. ``relative`` is the relative influence of Barshan, Brunet & Dziugaite 2020
(arXiv:2003.11630) under a bound on the loss (ℓ-RelatIF); theirs under a bound on the parameters
divides by ``‖H⁻¹gₙ‖``, which no scoring stores. ``cosine`` is that of the angle between both
gradients in the inner product of ``H⁻¹``: within [-1, 1] for scores at full rank, but for the
truncation's error otherwise. For one query it orders examples as ``relative`` does.

Axis letters: N training examples, Q queries.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from raycurv.errors import NumericalError

Normalise = Literal["cosine", "relative", "per-token"]
NORMALISATIONS: tuple[str, ...] = get_args(Normalise)
Array = np.ndarray[Any, np.dtype[Any]]


def divided(scores_QN: Array, queries_Q: Array | None, train_N: Array) -> Array:
    """Scores over what belongs to their query and to their example, float64.

    A score of zero stays so, whatever it is divided by: an example without any loss term has no
    gradient, and its self-influence is zero, too.

    Raises:
        NumericalError: a score that is not zero over zero.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        found = scores_QN.astype(np.float64) / train_N
        if queries_Q is not None:
            found /= queries_Q[:, None]
    found[scores_QN == 0] = 0.0
    if not np.isfinite(found).all():
        raise NumericalError(
            "normalised scores", "self-influence above zero where a score is not zero", "zero",
            "Score again with --dtype float64.",
        )  # fmt: skip
    return found


def roots(own_X: Array) -> Array:
    """The roots of self-influences.

    Raises:
        NumericalError: one is below zero.
    """
    if (own_X < 0).any():
        raise NumericalError(
            "self-influence", "no number below zero", f"{own_X.min():.3g}",
            "Score again with --dtype float64, or a larger --damping.",
        )  # fmt: skip
    found: Array = np.sqrt(own_X.astype(np.float64))
    return found
