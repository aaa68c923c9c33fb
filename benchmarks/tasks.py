"""What the accuracy of influence scores is measured on: small data and networks, one recipe each.

scikit-learn's diabetes (regression), breast cancer (two classes) and digits (ten), networks of one
hidden layer or none, and bytes of Python source with the Llama-shaped model of byte_model.py.
Tabular columns and numbers to predict are standardised by the training examples.

The objective of every task, of which influence functions speak:

    J(θ) = Σ_n w_n ℓ_n(θ) / Σ_n w_n + (decay / 2) |θ|²        ℓ summed over an example's tokens

Its decay adds to the curvature what damping does, so decay is the damping of the tabular tasks.

Axis letters: N examples, D outputs, T tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from byte_model import Shape, llama_config, read_sequences
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from torch import Tensor, nn
from transformers import LlamaForCausalLM

BATCH = 16  # examples a step of the language model's training


@dataclass(frozen=True)
class Examples:
    """Inputs ``[N, ...]`` and what they are to give, ``[N, ...]``; of text both are its tokens."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def double(self) -> Examples:
        """Numbers in float64; classes and tokens stay what they are."""
        both = (x.double() if x.is_floating_point() else x for x in (self.inputs, self.targets))
        return Examples(*both)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """As raycurv takes them, with ids ``name 00000``, ``name 00001``, …"""
        ids = [f"{name} {n:05d}" for n in range(len(self))]
        if not self.inputs.is_floating_point():
            return [
                {"id": i, "input_ids": x} for i, x in zip(ids, self.inputs.tolist(), strict=True)
            ]
        columns = zip(ids, self.inputs.tolist(), self.targets.tolist(), strict=True)
        return [{"id": i, "inputs": x, "labels": y} for i, x, y in columns]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: Adam, its rate falling to 0 as a cosine.

    Attributes:
        steps: of the optimiser.
        rate: at the start.
        decay: of J above; 0 without.
        batch: examples a step; all of them when ``None``.
    """

    steps: int
    rate: float
    decay: float
    batch: int | None = None


@dataclass(frozen=True)
class Task:
    """Data, network and recipe.

    Attributes:
        title: in reports.
        objective: raycurv's name of the loss.
        make: the untrained network of a seed.
        losses: outputs ``[..., N, D]`` (of text ``[..., N, T, V]``) and targets -> ``[..., N]``.
        damping: of the curvature, as raycurv takes it.
        draws: labels drawn for every target of a fit.
        blocks: that have curvature, as raycurv takes them.
    """

    title: str
    objective: str
    make: Callable[[int], nn.Module]
    losses: Callable[[Tensor, Tensor], Tensor]
    recipe: Recipe
    train: Examples
    queries: Examples
    damping: str
    draws: int
    blocks: tuple[str, ...] = ()


def squared_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """``½ |y − f|²``."""
    return 0.5 * (targets - outputs).square().sum(dim=-1)


def cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    """In nats; targets are classes."""
    chosen = targets.expand(outputs.shape[:-1]).unsqueeze(-1)
    return outputs.logsumexp(dim=-1) - outputs.gather(-1, chosen).squeeze(-1)


def token_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the next token in nats, summed over an example's targets."""
    # Fused: the logits of many models take most of the memory that is touched.
    logits_RV = outputs[..., :-1, :].flatten(0, -2)
    shape = (*outputs.shape[:-2], targets.shape[-1] - 1)
    labels = targets[..., 1:].expand(shape)
    return F.cross_entropy(logits_RV, labels.flatten(), reduction="none").view(shape).sum(dim=-1)


def perceptron(widths: Sequence[int]) -> Callable[[int], nn.Module]:
    """Makes linear layers of these widths, tanh between them, from a seed."""

    def make(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            for d_in, d_out in itertools.pairwise(widths):
                layers += [nn.Linear(d_in, d_out), nn.Tanh()]
            return nn.Sequential(*layers[:-1]).eval()

    return make


def tabular_task(name: str, hidden: Sequence[int], decay: float, seed: int = 0) -> Task:
    """``diabetes`` or ``breast cancer``: four fifths to train on, the rest asks.

    Args:
        hidden: widths of the hidden layers; none for the convex task.
        decay: of the objective, and the damping.
        seed: of the split.
    """
    numbers = name == "diabetes"
    x, y = (load_diabetes if numbers else load_breast_cancer)(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    first, rest = order[: len(x) * 4 // 5], order[len(x) * 4 // 5 :]
    x = (x - x[first].mean(axis=0)) / x[first].std(axis=0)
    inputs = torch.tensor(x, dtype=torch.float32)
    if numbers:
        y = (y - y[first].mean()) / y[first].std()
        targets = torch.tensor(y, dtype=torch.float32).unsqueeze(1)
    else:
        targets = torch.tensor(y, dtype=torch.int64)
    return Task(
        title=name,
        objective="regression" if numbers else "classification",
        make=perceptron([x.shape[1], *hidden, 1 if numbers else 2]),
        losses=squared_errors if numbers else cross_entropies,
        recipe=Recipe(steps=300, rate=0.02, decay=decay),
        train=Examples(inputs[first], targets[first]),
        queries=Examples(inputs[rest], targets[rest]),
        damping=f"abs:{decay:g}",
        # One draw of a confident classifier is nearly always its own answer.
        draws=16,
    )


def digits_task(hidden: Sequence[int], decay: float, queries: int, seed: int = 0) -> Task:
    """Images of 8 x 8 in ten classes: four fifths to train on, of the rest some ask.

    Args:
        hidden, decay, seed: as above; pixels are all of one unit, so they are centred alone.
        queries: how many.
    """
    pixels, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(pixels))
    first, rest = order[: len(pixels) * 4 // 5], order[len(pixels) * 4 // 5 :][:queries]
    inputs = torch.tensor(pixels / 8 - (pixels / 8).mean(), dtype=torch.float32)
    targets = torch.tensor(y, dtype=torch.int64)
    return Task(
        title="digits",
        objective="classification",
        make=perceptron([64, *hidden, 10]),
        losses=cross_entropies,
        recipe=Recipe(steps=300, rate=0.02, decay=decay),
        train=Examples(inputs[first], targets[first]),
        queries=Examples(inputs[rest], targets[rest]),
        damping=f"abs:{decay:g}",
        draws=4,
    )


def byte_task(
    shape: Shape, train: int, queries: int, length: int, steps: int, seed: int = 0
) -> Task:
    """A language model of bytes; its damping is raycurv's default, a tenth of a block's mean.

    Args:
        train, queries, length: examples, and tokens of each.
        steps: of training.
        seed: of the order of the text.
    """
    read = read_sequences(train, queries, length, seed)

    def make(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(llama_config(shape, length)).eval()

    def examples(ids_NT: np.ndarray[Any, Any]) -> Examples:
        return Examples(torch.from_numpy(ids_NT), torch.from_numpy(ids_NT))

    return Task(
        title="bytes",
        objective="causal-lm",
        make=make,
        losses=token_losses,
        recipe=Recipe(steps=steps, rate=1e-2, decay=0.0, batch=min(BATCH, train)),
        train=examples(read.train_NT),
        queries=examples(read.queries_NT),
        damping="0.1",
        draws=1,
        blocks=("model.layers.*",),
    )
