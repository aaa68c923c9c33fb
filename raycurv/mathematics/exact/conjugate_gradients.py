"""Conjugate gradients on ``A x = v`` for many v at once, with one synchronisation an iteration.

    u = M⁻¹ r,      w = A u                  the one product of an iteration; A = G + λ
    p ← u + β p,    s ← w + β s              so that s = A p, without a product of its own
    x ← x + α p,    r ← r − α s
    β = −(uᵀs) / (pᵀs),   α = (pᵀr) / (pᵀs)  conjugate to the last p; the lowest energy along p

Every dot product of an iteration is one of the six vectors x, p, u, r, s, w before it: a Gram
matrix of 6 x 6 numbers a query and block. Vectors so stay where their block is, and the driver adds
Grams over blocks (the whole model) or does not (each block solved alone). Begun at zero, the first
iterate is ``α M⁻¹ v``, with EK-FAC as M its solution at the best scale.

Chronopoulos & Gear 1989 (J. Comput. Appl. Math. 25), section 2, from which α and β differ in
rounding alone: theirs lean on p being conjugate to all directions before, these on the last one
only, so that each step lowers the energy ``½ xᵀAx − vᵀx`` when rounding has cost the conjugacy.

Axis letters: Q queries, O outputs, I inputs, V the six vectors, B blocks, K iterations. ``...Q``
stands for ``Q``, or ``B, Q`` where blocks are solved alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raycurv.errors import NumericalError
from raycurv.mathematics.exact.grams import gram
from raycurv.mathematics.sums import is_finite

# What became of a query; `running` asks for another iteration.
OUTCOMES = ("running", "ok", "zero", "negative curvature", "stopped at steps", "diverged")
_RUNNING, _OK, _ZERO, _NEGATIVE, _STEPS, _ = range(len(OUTCOMES))
# Where the vectors stand in a Gram matrix.
_X, _P, _U, _R, _S, _W = range(6)


@dataclass(frozen=True)
class Iterate:
    """The vectors of one block that the next iteration goes on from, each ``[Q, O, I]``.

    Attributes:
        x: the solution so far.
        r: what remains, ``v − A x``, by recurrence.
        p: the last direction; zero before the first.
        s: ``A p``, by recurrence.
    """

    x: Tensor
    r: Tensor
    p: Tensor
    s: Tensor

    @classmethod
    def zero(cls, v: Tensor) -> Iterate:
        """Before the first iteration, for right-hand sides v ``[Q, O, I]``."""
        nothing = torch.zeros_like(v)
        return cls(nothing, v, nothing, nothing)

    def advanced(self, u: Tensor, w: Tensor, alpha: Tensor, beta: Tensor) -> Iterate:
        """The vectors after the iteration.

        Args:
            u: ``M⁻¹ r`` ``[Q, O, I]``.
            w: ``A u``, likewise.
            alpha: ``[Q]``, as :func:`iteration` gives it: zero of queries that have stopped.
            beta: likewise.
        """
        a, b = (number.to(u)[:, None, None] for number in (alpha, beta))
        p, s = u + b * self.p, w + b * self.s
        return Iterate(self.x + a * p, self.r - a * s, p, s)

    def gram(self, u: Tensor, w: Tensor) -> Tensor:
        """The Gram matrices of this block's six vectors before the iteration, float64
        ``[Q, V, V]``; those of blocks that are solved together are added up."""
        return gram((self.x, self.p, u, self.r, self.s, w))


@dataclass(frozen=True)
class Progress:
    """Every query's next iteration, and where it leads. All are ``[...Q]``, float64 but for two.

    Attributes:
        alpha: the step's length; zero of a query that has stopped.
        beta: the last direction's share of the next one.
        steps: iterations taken with this one (int64).
        outcome: after it, a number of :data:`OUTCOMES` (int64).
        norm: ``‖v‖``.
        residual: ``‖v − A x‖ / ‖v‖`` after it, by recurrence; never below what float64 can tell.
        energy: ``½ xᵀAx − vᵀx`` after it; zero at the start, and the lowest at the solution.
        cosine: of the solution after it to that before; NaN of the first.
        curvature: ``pᵀAp / pᵀp`` along its direction.
    """

    alpha: Tensor
    beta: Tensor
    steps: Tensor
    outcome: Tensor
    norm: Tensor
    residual: Tensor
    energy: Tensor
    cosine: Tensor
    curvature: Tensor

    @classmethod
    def none(cls, norm: Tensor) -> Progress:
        """Before the first iteration, for ``‖v‖`` ``[...Q]``."""
        nothing, unknown = torch.zeros_like(norm), torch.full_like(norm, torch.nan)
        outcome = torch.where(norm > 0, _RUNNING, _ZERO)
        residual, steps = (norm > 0).to(norm), torch.zeros_like(outcome)
        return cls(
            nothing, nothing, steps, outcome, norm, residual, nothing, unknown, unknown
        )  # fmt: skip

    @property
    def running(self) -> bool:
        """Whether any query wants another iteration."""
        return bool((self.outcome == _RUNNING).any())

    @property
    def outcomes(self) -> list[str]:
        """The outcome of every query in words, block by block where blocks are solved alone."""
        return [OUTCOMES[code] for code in self.outcome.flatten().tolist()]


def iteration(gram: Tensor, before: Progress | None, tolerance: float, most: int) -> Progress:
    """The scalars of the next iteration, from nothing but the Gram matrices of its vectors.

    Args:
        gram: of :meth:`Iterate.gram`, added up over what is solved together, ``[...Q, V, V]``.
        before: of the last iteration; ``None`` at the first.
        tolerance: a query whose residual is no larger than this stops with ``ok``.
        most: iterations, after which a query stops with ``stopped at steps``.

    Returns:
        the scalars; a query along whose direction A curves downwards, or not at all, keeps the
        solution it has and stops with ``negative curvature``.

    Raises:
        NumericalError: a dot product is NaN or infinite.
    """
    if not is_finite(gram):
        raise NumericalError(
            "conjugate gradients", "finite dot products", "NaN or infinity",
            "Run the model in a wider --dtype, or give a larger --damping.",
        )  # fmt: skip
    before = before or Progress.none(gram[..., _R, _R].sqrt())
    norm, outcome = before.norm, before.outcome.clone()
    here = torch.where(norm > 0, gram[..., _R, _R].sqrt() / norm, 0.0)
    outcome[(outcome == _RUNNING) & (here <= tolerance)] = _OK
    running = outcome == _RUNNING
    # Of the first iteration there is no last direction.
    last = gram[..., _P, _S]
    beta = torch.where(running & (last > 0), -gram[..., _U, _S] / last, 0.0)
    nothing = torch.zeros_like(beta)
    x, r = _combined(nothing, _X, _X), _combined(nothing, _R, _R)
    p, s = _combined(beta, _U, _P), _combined(beta, _W, _S)
    bend, slope = _dot(gram, p, s), _dot(gram, p, r)
    outcome[running & ~(bend > 0)] = _NEGATIVE
    moves = outcome == _RUNNING
    alpha = torch.where(moves, slope / bend, 0.0)
    x_after, r_after = x + alpha[..., None] * p, r - alpha[..., None] * s
    # A small difference of large numbers is known no better than their rounding.
    unsure = torch.finfo(torch.float64).eps * _dot(gram.abs(), r_after.abs(), r_after.abs())
    residual = torch.where(moves, _dot(gram, r_after, r_after).maximum(unsure).sqrt() / norm, here)
    lengths = _dot(gram, x, x) * _dot(gram, x_after, x_after)
    steps = before.steps + moves
    outcome[moves & (steps >= most)] = _STEPS
    outcome[moves & (residual <= tolerance)] = _OK
    return Progress(
        alpha, beta, steps, outcome, norm, residual,
        energy=before.energy - alpha * slope / 2,
        cosine=torch.where(moves, _dot(gram, x, x_after) / lengths.sqrt(), before.cosine),
        curvature=torch.where(running, bend / _dot(gram, p, p), before.curvature),
    )  # fmt: skip


def curvature_along(gram: Tensor, beta: Tensor) -> Tensor:
    """``pᵀAp`` of an iteration's direction ``[...Q]``.

    Of the Gram matrices of single blocks ``[B, Q, V, V]``, and the ``beta`` ``[Q]`` of all, these
    are the blocks' shares: the most negative one is that of the block along which A curves down.
    """
    return _dot(gram, _combined(beta, _U, _P), _combined(beta, _W, _S))


def ritz_values(alphas: Sequence[Tensor], betas: Sequence[Tensor]) -> Tensor:
    """Approximate eigenvalues of ``M⁻¹ A``, as K iterations of queries have found them.

    The extreme ones converge first. Descent preconditioned by M is stable at rates below
    ``2 / λ_max``.

    Args:
        alphas: of K iterations in which every query ran, each ``[...Q]``.
        betas: likewise.

    Returns:
        eigenvalues of the tridiagonal matrix of the coefficients (Saad 2003, section 6.7.3),
        smallest first, ``[...Q, K]``.
    """
    a, b = torch.stack(list(alphas), -1), torch.stack(list(betas), -1)
    diagonal = 1 / a
    diagonal[..., 1:] += b[..., 1:] / a[..., :-1]
    beside = b[..., 1:].clamp(min=0).sqrt() / a[..., :-1]
    matrix = torch.diag_embed(diagonal)
    matrix += torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    values: Tensor = torch.linalg.eigvalsh(matrix)
    return values


def _combined(beta: Tensor, one: int, other: int) -> Tensor:
    """``one + β · other`` of the six vectors, as its six coefficients ``[...Q, V]``."""
    found = beta.new_zeros(*beta.shape, 6)
    found[..., one] += 1
    found[..., other] += beta
    return found


def _dot(gram: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Dot products of combinations of vectors ``[...Q, V]``, from their Gram matrix."""
    return torch.einsum("...v,...vw,...w->...", left, gram, right)
