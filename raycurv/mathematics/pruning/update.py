"""What the remaining weights of a block do when others go: the joint Optimal Brain Surgeon step.

    min over δ_P of  gᵀδ + ½ δᵀ(F + λ)δ,   δ_Q = −w_Q
    (F + λ)_PP δ_P = F_PQ w_Q − g_P                     P stays, Q goes

All of Q goes at once. The steps for single weights, ``−(F + λ)⁻¹e_k w_k / [(F + λ)⁻¹]_kk``, do not
add up to this: each moves weights that others set to zero.

The equations are solved on P by conjugate gradients with the masked ``apply(x, Λ -> Λ + λ)``,
preconditioned by the masked inverse; a small block's by Cholesky; a diagonal curvature's need no
solving.

Hassibi & Stork 1992; Kurtic et al. 2022 (arXiv:2203.07259), section 3.2. F is the curvature
of the mean loss per example. Axis letters: O outputs, I inputs (with the bias column).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raycurv.mathematics.cholesky import cholesky
from raycurv.mathematics.curvature import BlockCurvature, Damping


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


def joint_update(
    curvature: BlockCurvature,
    w_OI: Tensor,
    keep_OI: Tensor,
    damping: Damping,
    gradient_OI: Tensor | None = None,
    solver: Solver | None = None,
) -> Update:
    """Remove the weights that are not kept, and move the others to the damped model's minimum.

    Args:
        curvature: of the block.
        w_OI: its weights.
        keep_OI: bool.
        damping: of the block.
        gradient_OI: mean gradient of the loss over examples, for a model that has not converged.
        solver: of the equations.

    Raises:
        UserError: a shape is not the block's, or there is no damping where Λ has a zero.
        NumericalError: a small block's equations have no Cholesky root.
    """
    for x in (w_OI, keep_OI) if gradient_OI is None else (w_OI, keep_OI, gradient_OI):
        curvature.check(x)
    if curvature.is_zero:
        return Update(torch.where(keep_OI, w_OI, 0), 0, 0.0, "zero")
    solver = solver or Solver()
    damped = curvature.damped(damping)
    dense = keep_OI.numel() <= solver.dense_up_to
    dtype = torch.float64 if dense else solver.dtype
    w = w_OI.to(dtype)

    def operator(x: Tensor) -> Tensor:
        return torch.where(keep_OI, curvature.apply(x, damped), 0)

    right = operator(torch.where(keep_OI, 0, w))
    if gradient_OI is not None:
        right -= torch.where(keep_OI, gradient_OI.to(dtype), 0)
    iterations, exact = 0, True
    if curvature.is_diagonal:
        step = right / damped(curvature.eigenvalues.to(right))
    elif dense:
        step = _by_cholesky(curvature, keep_OI, damping, right)
    else:
        exact = False
        inverse = curvature.inverse(damping)

        def precondition(x: Tensor) -> Tensor:
            # It doubles an iteration's cost and takes a fifth to three fifths of the iterations
            # that the diagonal takes, on spectra like those of networks (LOG.md).
            return torch.where(keep_OI, curvature.apply(x, inverse), 0)

        step, iterations = _conjugate_gradients(operator, right, precondition, solver)
    length = float(right.norm())
    residual = float((right - operator(step)).norm()) / length if length else 0.0
    outcome = "ok" if exact or residual <= solver.tolerance else "not converged"
    w_new = torch.where(keep_OI, w + step, 0).to(w_OI.dtype)
    return Update(w_new, iterations, residual, outcome)


def predicted_increase(
    curvature: BlockCurvature,
    step_OI: Tensor,
    gradient_OI: Tensor | None = None,
    damping: Damping | None = None,
) -> float:
    """``½ δᵀFδ (+ gᵀδ)``: the rise of the mean loss per example that the quadratic model predicts.

    Args:
        curvature: of the block.
        step_OI: δ, new weights less old ones, those that went included.
        gradient_OI: mean gradient over examples.
        damping: to have the damped model instead, which :func:`joint_update` minimises. Without
            it F is undamped, as a prediction should be.

    Raises:
        UserError: a shape is not the block's, or there is no damping where Λ has a zero.
    """
    step = step_OI.double()
    moved = curvature.apply(
        step, torch.Tensor.double if damping is None else curvature.damped(damping)
    )
    rise = 0.5 * float((step * moved).sum())
    if gradient_OI is not None:
        curvature.check(gradient_OI)
        rise += float((gradient_OI.double() * step).sum())
    return rise


def _by_cholesky(
    curvature: BlockCurvature, keep_OI: Tensor, damping: Damping, right: Tensor
) -> Tensor:
    kept = keep_OI.flatten().nonzero()[:, 0]
    matrix = curvature.dense()[kept[:, None], kept]
    matrix.diagonal().add_(curvature.damping(damping))
    root = cholesky(matrix, f"block {curvature.block.name}, the curvature of the weights that stay")
    found = torch.cholesky_solve(right.flatten()[kept][:, None], root)[:, 0]
    step = torch.zeros_like(right)
    step.view(-1)[kept] = found
    return step


def _conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    right: Tensor,
    precondition: Callable[[Tensor], Tensor],
    solver: Solver,
) -> tuple[Tensor, int]:
    """``A x = b`` for a positive definite A, and the iterations it took.

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
