"""The proximal Bregman response (PBRF): what influence functions of a network approximate.

    θ_z = argmin (1/N) Σ_n D(f(θ, x_n), f(θ₀, x_n)) + (λ/2) |θ − θ₀|² + ε ℓ(z, θ),   ε = −1/N

with D(y, y₀) = ℓ(y) − ℓ(y₀) − ∇ℓ(y₀)·(y − y₀), the Bregman divergence of the loss on outputs. At
θ₀ its Hessian is the Gauss-Newton matrix and λ, whether or not training has converged there; to
first order the loss of a query rises by score / N.

Bae et al. 2022 (arXiv:2209.05364), section 4. Minimised from θ₀ in float64 by Nesterov's method
(2004, scheme 2.2.22), whose rate is known: λ is the strong convexity, and the smoothness is found
by power iteration.

Axis letters: M networks, N examples, Q queries.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from retraining import Networks
from tasks import Task
from torch import Tensor, nn

GROUP = 32
POWER_STEPS = 30
# Above the largest eigenvalue that was found at θ₀: a power iteration finds it from below, and the
# curvature moves with θ.
MARGIN = 1.3


@dataclass(frozen=True)
class Response:
    """Of removing some examples, one at a time.

    Attributes:
        rises_QM: of the queries' losses.
        residual: the largest |gradient| of the objective left, over |ε ∇ℓ(z, θ₀)|.
    """

    rises_QM: Tensor
    residual: float


def respond(task: Task, network: nn.Module, removed: Tensor, damping: float) -> Response:
    """Remove examples from the network's proximal objective.

    Args:
        removed: places among the training examples, ``[M]``.
        damping: λ.
    """
    train, queries = task.train.double(), task.queries.double()
    start = copy.deepcopy(network).double()
    one = Networks.repeated(start, 1)
    before_Q = one.losses(task, queries)[0]
    fixed_N = one.outputs(train.inputs)[0].detach()
    divergence = bregman(task, fixed_N, train.targets)
    smooth = MARGIN * _smoothness(one, lambda some: divergence(some.outputs(train.inputs)).mean())
    rises, residuals = [], []
    for places_M in removed.split(GROUP):
        networks = Networks.repeated(start, len(places_M))
        rows = torch.arange(len(places_M))

        def objective(
            networks: Networks = networks, m: Tensor = rows, z: Tensor = places_M
        ) -> Tensor:
            outputs_MN = networks.outputs(train.inputs)
            gone = task.losses(outputs_MN, train.targets)[m, z].sum() / len(train)
            kept = divergence(outputs_MN).mean(dim=1).sum()
            return kept + _proximity(networks, one, damping) - gone

        residuals.append(_minimise(networks, objective, smooth + damping, damping))
        rises.append(networks.losses(task, queries).T - before_Q[:, None])
    return Response(torch.cat(rises, dim=1), max(residuals))


def bregman(task: Task, fixed_N: Tensor, targets_N: Tensor) -> Callable[[Tensor], Tensor]:
    """``D(y, y₀)``, ``[M, N]``, of outputs ``y [M, N, D]`` from the fixed ``y₀ [N, D]``."""
    free = fixed_N.detach().requires_grad_()
    base_N = task.losses(free, targets_N)
    (slope_N,) = torch.autograd.grad(base_N.sum(), free)

    def divergence(outputs_MN: Tensor) -> Tensor:
        moved = (slope_N * (outputs_MN - fixed_N)).flatten(2).sum(dim=2)
        return task.losses(outputs_MN, targets_N) - base_N.detach() - moved

    return divergence


def _proximity(networks: Networks, centre: Networks, damping: float) -> Tensor:
    """``(λ/2) |θ − θ₀|²``, summed over networks."""
    centres = (p.detach() for p in centre.parameters.values())
    pairs = zip(networks.parameters.values(), centres, strict=True)
    return damping / 2 * torch.stack([(p - q).square().sum() for p, q in pairs]).sum()


def _smoothness(centre: Networks, objective: Callable[[Networks], Tensor]) -> float:
    """The largest eigenvalue of a Hessian: differences of gradients along power iterations."""
    step = 1e-4  # float64: its square root of rounding, in units of parameters of about 1
    start = {n: p.detach() for n, p in centre.parameters.items()}
    generator = torch.Generator().manual_seed(0)
    v = {n: torch.randn(p.shape, generator=generator).to(p) for n, p in start.items()}
    found = 0.0
    for _ in range(POWER_STEPS):
        length = _norm(v)
        ends = []
        for sign in (1, -1):
            by = sign * step / length
            moved = {n: (p + by * v[n]).requires_grad_() for n, p in start.items()}
            objective(Networks(centre.skeleton, moved)).backward()
            ends.append(_gradients(moved))
        v = {n: (ends[0][n] - ends[1][n]) / (2 * step) for n in v}
        found = _norm(v)
    return found


def _minimise(
    networks: Networks, objective: Callable[[], Tensor], smooth: float, convex: float
) -> float:
    """Nesterov's steps until the gradient has shrunk a million times; gives what is left of it."""
    root = math.sqrt(convex / smooth)
    optimizer = torch.optim.SGD(
        networks.parameters.values(), 1 / smooth, momentum=(1 - root) / (1 + root), nesterov=True
    )
    # Its bound falls by (1 - root) a step: a little more than what 1e-6 takes.
    steps = math.ceil(1.5 * math.log(1e6) / root)
    first = 0.0
    for step in range(steps):
        optimizer.zero_grad()
        objective().backward()
        if step == 0:
            first = _norm(_gradients(networks.parameters))
        optimizer.step()
    optimizer.zero_grad()
    objective().backward()
    return _norm(_gradients(networks.parameters)) / first


def _gradients(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    return {n: g.clone() for n, g in found.items()}


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return float(torch.stack([t.norm() for t in tensors.values()]).norm())
