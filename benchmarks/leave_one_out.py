"""Leave-one-out by retraining exactly: networks of one linear layer, hence of a convex objective.

    θ = argmin (1/N) Σ_n w_n ℓ(W a_n, y_n) + (decay / 2) |θ|²,    a with a one for the bias
    Hessian: (1/N) Σ_n w_n ∇²ℓ(W a_n) ⊗ a_n a_nᵀ + decay

minimised by Newton's method in float64, for all w at once. Leaving out n is w_n = 0; the sum is
still divided by N, so that to first order the loss of a query rises by score / N (Koh & Liang 2017,
arXiv:1703.04730, section 2.1).

Axis letters: M models, N examples, Q queries, O outputs, I inputs with the bias.
"""

from __future__ import annotations

import torch
from retraining import Networks
from tasks import Task
from torch import Tensor, nn
from torch.func import grad, hessian, vmap

# Newton's method doubles the correct digits a step: some twenty are plenty, and more a mistake.
STEPS = 30
CONVERGED = 1e-12


def solve(task: Task, weights_MN: Tensor) -> Networks:
    """The minimisers, float64; the network of the task is one ``nn.Linear`` in a Sequential.

    Raises:
        RuntimeError: no convergence.
    """
    skeleton = task.make(0).double()
    assert isinstance(skeleton, nn.Sequential) and len(skeleton) == 1
    layer = skeleton[0]
    assert isinstance(layer, nn.Linear)
    train = task.train.double()
    a_NI, y_N = nn.functional.pad(train.inputs, (0, 1), value=1.0), train.targets
    count, width = a_NI.shape
    weights_MN = weights_MN.double() / count
    theta_MOI = torch.zeros(len(weights_MN), layer.out_features, width, dtype=torch.float64)
    for _ in range(STEPS):
        move_MOI = _newton_step(task, theta_MOI, weights_MN, a_NI, y_N)
        theta_MOI = theta_MOI - move_MOI
        if float(move_MOI.abs().max()) < CONVERGED * float(theta_MOI.abs().max()):
            parts = {"0.weight": theta_MOI[:, :, :-1], "0.bias": theta_MOI[:, :, -1]}
            return Networks(skeleton, {n: p.contiguous() for n, p in parts.items()})
    raise RuntimeError(f"{task.title}: expected Newton's method to converge, in {STEPS} steps")


def _newton_step(
    task: Task, theta_MOI: Tensor, weights_MN: Tensor, a_NI: Tensor, y_N: Tensor
) -> Tensor:
    """Hessian⁻¹ gradient, ``[M, O, I]``."""
    models, outputs, width = theta_MOI.shape
    z_MNO = a_NI @ theta_MOI.transpose(1, 2)
    slope_MNO = vmap(vmap(grad(task.losses)), in_dims=(0, None))(z_MNO, y_N)
    bend_MNOO = vmap(vmap(hessian(task.losses)), in_dims=(0, None))(z_MNO, y_N)
    decay = task.recipe.decay
    gradient = torch.einsum("mn,mno,ni->moi", weights_MN, slope_MNO, a_NI) + decay * theta_MOI
    curved = torch.empty(models, outputs, width, outputs, width, dtype=torch.float64)
    for o in range(outputs):
        for p in range(outputs):
            weighted_MIN = (weights_MN * bend_MNOO[:, :, o, p])[:, None] * a_NI.T
            curved[:, o, :, p] = weighted_MIN @ a_NI
    curved = curved.view(models, outputs * width, -1)
    curved += decay * torch.eye(outputs * width, dtype=torch.float64)
    return torch.linalg.solve(curved, gradient.flatten(1)).view_as(theta_MOI)


def removal_rises(task: Task) -> tuple[Networks, Tensor]:
    """The model of all examples, and how much each query's loss rises without each, ``[Q, N]``."""
    count = len(task.train)
    whole = solve(task, torch.ones(1, count))
    queries = task.queries.double()
    without = solve(task, 1 - torch.eye(count))
    return whole, without.losses(task, queries).T - whole.losses(task, queries).T
