"""Descent on ``½ xᵀAx − vᵀx`` with products of minibatches, preconditioned by EK-FAC (ASTRA).

    x ← x − η M⁻¹ (A_B x − v)          A_B = G_B + λ, G_B of the examples of minibatch B

It is stable for ``η < 2 / λ_max(M⁻¹A)``, see
:func:`~raycurv.mathematics.exact.conjugate_gradients.ritz_values`. The stationary spread of the
iterates, which is of the minibatches, is averaged away by their running mean over the last steps.

Wang et al. 2025 (arXiv:2507.14740), section 4.

Axis letters: Q queries, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raycurv.errors import NumericalError
from raycurv.mathematics.exact.conjugate_gradients import OUTCOMES, Progress, ritz_values
from raycurv.mathematics.exact.grams import gram
from raycurv.mathematics.sums import is_finite

_RUNNING, _STEPS, _DIVERGED = map(OUTCOMES.index, ("running", "stopped at steps", "diverged"))


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


def largest_values(history: Sequence[Progress]) -> Tensor:
    """λ_max of ``M⁻¹A`` as conjugate gradients have found it for each query alone, ``[Q]``; NaN of
    one that took no step."""
    alphas, betas = (torch.stack([getattr(p, k) for p in history]) for k in ("alpha", "beta"))
    found = torch.full_like(alphas[0], torch.nan)
    for q, ran in enumerate(history[-1].steps.tolist()):
        if ran:
            found[q] = ritz_values(list(alphas[:ran, q]), list(betas[:ran, q]))[-1]
    return found


def descent_step(
    gram_Q33: Tensor, history: Sequence[Progress], rate: Tensor, most: int
) -> Progress:
    """The scalars of the next step; residual and energy are of the iterate before it, on the
    step's minibatch, and ``curvature`` is ``xᵀA_Bx / xᵀx``.

    Args:
        gram_Q33: as for :func:`descent_measures`.
        history: of the steps before.
        rate: η of each query, ``[Q]``.
        most: steps, after which a query stops with ``stopped at steps``.

    Returns:
        the scalars, ``alpha`` the rate; a query whose energy is as far above zero as it ever was
        below has ``diverged``, and then no other goes on.

    Raises:
        NumericalError: a dot product is NaN or infinite.
    """
    if not is_finite(gram_Q33):
        raise NumericalError(
            "descent on minibatches", "finite dot products", "NaN or infinity",
            "Give a smaller --rate, or run the model in a wider --dtype.",
        )  # fmt: skip
    before = history[-1] if history else Progress.none(gram_Q33[..., 1, 1].sqrt())
    residual, energy = descent_measures(gram_Q33)
    lowest = torch.stack([torch.zeros_like(energy), *(p.energy for p in history)]).amin(0)
    outcome = before.outcome.clone()
    running = outcome == _RUNNING
    outcome[running & (energy > -lowest)] = _DIVERGED
    moves = outcome == _RUNNING
    steps = before.steps + moves
    outcome[moves & ((steps >= most) | (outcome == _DIVERGED).any())] = _STEPS
    nothing, unknown = torch.zeros_like(energy), torch.full_like(energy, torch.nan)
    return Progress(
        torch.where(moves, rate, 0.0), nothing, steps, outcome, before.norm, residual, energy,
        cosine=unknown, curvature=gram_Q33[..., 0, 2] / gram_Q33[..., 0, 0],
    )  # fmt: skip
