"""What is left of a block after weights went, and the solver of the equations that say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Solver:
    """How the equations on P are solved.

    Attributes:
        tolerance: of ``|b − A x| / |b|``. Float32 seldom reaches less than 1e-5.
        most_iterations: of conjugate gradients.
        dtype: that they compute in.
        dense_up_to: blocks of so many weights are solved by Cholesky, in float64.
    """

    tolerance: float = 1e-6
    most_iterations: int = 500
    dtype: torch.dtype = torch.float64
    dense_up_to: int = 1500


@dataclass(frozen=True)
class Update:
    """The weights after the step.

    Attributes:
        w_OI: exactly zero where weights went; of the dtype that came in.
        iterations: of conjugate gradients; 0 where there were none.
        residual: ``|b − A x| / |b|`` of the solution itself, not of the recursion; of one that
            is not iterated what rounding leaves.
        outcome: ``ok``, ``zero`` (no curvature: the others stay), or ``not converged``.
    """

    w_OI: Tensor
    iterations: int
    residual: float
    outcome: str


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    right: Tensor,
    precondition: Callable[[Tensor], Tensor],
    solver: Solver,
) -> tuple[Tensor, int]:
    """The solution of ``A x = b`` for a positive definite A, and the iterations it took.

    The recursion's residual departs from the solution's own in low precision: where it claims to be
    small enough, the own one is formed, and the recursion begun again from it while that helps.
    """
    solution, rest = torch.zeros_like(right), right.clone()
    target = solver.tolerance * float(right.norm())
    iterations, before = 0, float("inf")
    while target < float(rest.norm()) < before / 2 and iterations < solver.most_iterations:
        before = float(rest.norm())
        direction = precondition(rest)
        descent = _dot(rest, direction)
        while float(rest.norm()) > target and iterations < solver.most_iterations:
            image = operator(direction)
            length = descent / _dot(direction, image)
            solution += length * direction
            rest -= length * image
            scaled = precondition(rest)
            last, descent = descent, _dot(rest, scaled)
            direction = scaled.add_(direction, alpha=descent / last)
            iterations += 1
        rest = right - operator(solution)
    return solution, iterations


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))
