"""Descent on ``½ xᵀAx − vᵀx`` with products of minibatches, preconditioned by EK-FAC (ASTRA).

    x ← x − η M⁻¹ (A_B x − v)          A_B = G_B + λ, G_B of the examples of minibatch B

It is stable for ``η < 2 / λ_max(M⁻¹A)``, see
:func:`~raycurv.mathematics.exact.conjugate_gradients.ritz_values`. The stationary spread of the
iterates, which is of the minibatches, is averaged away by their running mean over the last steps.

Wang et al. 2025 (arXiv:2507.14740), section 4.

Axis letters: Q queries, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from raycurv.mathematics.exact.grams import gram


def descended(
    x: Tensor, v: Tensor, w: Tensor, rate: Tensor, precondition: Callable[[Tensor], Tensor]
) -> Tensor:
    """The next iterate of one block.

    Args:
        x: the last one, ``[Q, O, I]``; zero at the start, where the first step is ``η M⁻¹ v``.
        v: the right-hand sides.
        w: ``A_B x``.
        rate: η of each query, ``[Q]``; zero for one that has stopped.
        precondition: ``M⁻¹`` of matrices ``[Q, O, I]``.
    """
    return x - rate.to(x)[:, None, None] * precondition(w - v)


def averaged(mean: Tensor, x: Tensor, count: int) -> Tensor:
    """The mean of ``count`` iterates and one more."""
    return mean + (x - mean) / (count + 1)


def descent_gram(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Dot products of one block's x, v and w, float64 ``[Q, 3, 3]``, for :func:`descent_measures`
    once they are added up over blocks."""
    return gram((x, v, w))


def descent_measures(gram_Q33: Tensor) -> tuple[Tensor, Tensor]:
    """On a minibatch, ``‖v − A_B x‖ / ‖v‖`` and the energy ``½ xᵀA_Bx − vᵀx``, ``[...Q]`` each.

    The energy of zero is zero, and of the solution the lowest: an iterate whose energy is positive
    is worse than none, which tells a rate that is too large.
    """
    vv, vw, ww = (gram_Q33[..., i, j] for i, j in ((1, 1), (1, 2), (2, 2)))
    residual = torch.where(vv > 0, ((vv - 2 * vw + ww).clamp(min=0) / vv).sqrt(), 0.0)
    return residual, gram_Q33[..., 0, 2] / 2 - gram_Q33[..., 0, 1]
