"""Many networks of one shape trained in one batched computation, each on its own weighted examples.

    θ_m = argmin Σ_n w_mn ℓ_n(θ) / Σ_n w_mn + (decay / 2) |θ|²        m = 1..M

Parameters are stacked, ``[M, ...]``, and the forward pass is mapped over them (torch.func.vmap), so
that a linear layer is one ``bmm``. Networks that are trained together start from the same weights
and see the same batches: what sets them apart is what they are trained on, and nothing else.

A batch's loss is Σ over the batch of w ℓ, over batch size x mean of w: its expectation is the loss
above, whatever part of an example's weight is zero.

Axis letters: M networks, N examples, B of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from tasks import Examples, Recipe, Task
from torch import Tensor, nn
from torch.func import functional_call, vmap

# Networks that are trained at once: more outgrow the cache, fewer leave it to overheads.
GROUP = 128


@dataclass(frozen=True)
class Networks:
    """M networks.

    Attributes:
        skeleton: a module of their shape.
        parameters: name -> ``[M, ...]``.
    """

    skeleton: nn.Module
    parameters: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.parameters.values())))

    @classmethod
    def repeated(cls, module: nn.Module, count: int) -> Networks:
        """``count`` copies of a network, ready to be trained."""
        stacked = {
            name: p.detach().expand(count, *p.shape).clone().requires_grad_()
            for name, p in module.named_parameters()
        }
        return cls(module, stacked)

    def module(self, m: int) -> nn.Module:
        """Network m by itself, a copy."""
        made = copy.deepcopy(self.skeleton)
        named = dict(made.named_parameters())
        with torch.no_grad():
            for name, stacked in self.parameters.items():
                named[name].copy_(stacked[m])
        return made.eval()

    def outputs(self, inputs: Tensor) -> Tensor:
        """Of every network on the same inputs, ``[M, N, ...]``."""

        def forward(parameters: dict[str, Tensor]) -> Tensor:
            made = functional_call(self.skeleton, parameters, (inputs,))
            outputs: Tensor = getattr(made, "logits", made)
            return outputs

        found: Tensor = vmap(forward)(dict(self.parameters))
        return found

    @torch.no_grad()
    def losses(self, task: Task, examples: Examples) -> Tensor:
        """``[M, N]`` in float64."""
        found = []
        for start in range(0, len(self), GROUP):
            some = {name: p[start : start + GROUP] for name, p in self.parameters.items()}
            outputs = Networks(self.skeleton, some).outputs(examples.inputs)
            found.append(task.losses(outputs, examples.targets).double())
        return torch.cat(found)


def retrain(task: Task, weights_MN: Tensor, seed: int, group: int = GROUP) -> Networks:
    """Train one network for each row of weights, from the initial weights of one seed.

    Args:
        weights_MN: of the task's training examples; zeros leave an example out.
        seed: of the initial weights and the order of the batches.
        group: networks that are trained at once.
    """
    skeleton, recipe = task.make(seed), task.recipe
    count = len(task.train)
    assert weights_MN.shape[1] == count, weights_MN.shape
    generator = torch.Generator().manual_seed(seed)
    batches: list[slice | Tensor] = [slice(None)] * recipe.steps
    if recipe.batch is not None:
        batches = list(_batches(count, recipe, generator))
    parts = []
    for some_MN in weights_MN.split(group):
        networks = Networks.repeated(skeleton, len(some_MN))
        share_M1 = some_MN.mean(dim=1, keepdim=True)

        def objective(
            step: int, networks: Networks = networks, w: Tensor = some_MN / share_M1
        ) -> Tensor:
            batch = batches[step]
            inputs, targets = task.train.inputs[batch], task.train.targets[batch]
            losses_MB = task.losses(networks.outputs(inputs), targets)
            return (w[:, batch] * losses_MB).sum() / len(inputs)

        _minimise(networks, objective, recipe)
        parts.append(networks.parameters)
    stacked = {n: torch.cat([p[n].detach() for p in parts]) for n in parts[0]}
    return Networks(skeleton, stacked)


def _batches(count: int, recipe: Recipe, generator: torch.Generator) -> list[Tensor]:
    """Batches of every step: epochs in random orders, one after the other."""
    assert recipe.batch is not None
    epochs = -(-recipe.steps * recipe.batch // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return list(order.split(recipe.batch)[: recipe.steps])


def _minimise(networks: Networks, objective: Callable[[int], Tensor], recipe: Recipe) -> None:
    """Adam's steps; it works on each number by itself, hence on each network."""
    optimizer = torch.optim.Adam(
        networks.parameters.values(), recipe.rate, weight_decay=recipe.decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    for step in range(recipe.steps):
        optimizer.zero_grad()
        objective(step).backward()
        optimizer.step()
        schedule.step()


def gradient_norms(task: Task, networks: Networks, weights_MN: Tensor) -> Tensor:
    """``|∇J|`` of each network over its whole data, ``[M]``: how far it is from converged."""
    free = {n: p.detach().clone().requires_grad_() for n, p in networks.parameters.items()}
    losses_MN = task.losses(
        Networks(networks.skeleton, free).outputs(task.train.inputs), task.train.targets
    )
    (weights_MN / weights_MN.sum(dim=1, keepdim=True) * losses_MN).sum().backward()
    squares = torch.zeros(len(networks))
    for p in free.values():
        assert p.grad is not None
        squares += (p.grad + task.recipe.decay * p.detach()).square().flatten(1).sum(dim=1)
    return squares.sqrt()
