"""The models and data of the speed comparison, as both sides read them.

    (a) (b) (c)   Llama-shaped, bytes of Python source    (d) a perceptron   (e) a convolutional net

A shape is prepared once into a directory: ``model/`` (a checkpoint) or ``weights.safetensors``, and
``examples.npz`` with ``train``, ``queries`` and, for digits, ``train_labels``, ``query_labels``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from byte_model import Shape, read_sequences, train_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class SpeedShape:
    """One model with its data.

    Attributes:
        network: what kind of network.
        train, queries: how many examples.
        batch: examples a batch, on both sides.
        width, feed_forward, layers, heads, length: of a Llama-shaped one; tokens an example.
        steps: of training, on 4 sequences (or 64 images) each.
    """

    network: Literal["llama", "perceptron", "convolutions"]
    train: int
    queries: int
    batch: int
    width: int = 0
    feed_forward: int = 0
    layers: int = 0
    heads: int = 0
    length: int = 1
    steps: int = 20

    @property
    def llama(self) -> Shape:
        """As ``byte_model`` builds it."""
        return Shape(self.width, self.feed_forward, self.layers, self.heads, self.heads)

    @property
    def modules(self) -> list[str]:
        """Names of the layers with curvature."""
        if self.network == "llama":
            return self.llama.module_names()
        layers = NETWORKS[self.network]().named_modules()
        return [name for name, module in layers if isinstance(module, (nn.Linear, nn.Conv2d))]

    @property
    def title(self) -> str:
        """For a table."""
        data = f"{self.train} examples, {self.queries} queries"
        if self.network == "llama":
            return f"Llama d={self.width}, ff={self.feed_forward}, T={self.length}; {data}"
        return f"{self.network} on digits; {data}"


SHAPES = {
    "a": SpeedShape("llama", 32, 16, 8, 256, 688, 4, 4, 128),
    "b": SpeedShape("llama", 32, 16, 8, 768, 2048, 4, 12, 128),
    "c": SpeedShape("llama", 8, 16, 2, 768, 2048, 4, 12, 512),
    "d": SpeedShape("perceptron", 512, 64, 64, steps=300),
    "e": SpeedShape("convolutions", 256, 16, 64, steps=300),
}


def _perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(),
        nn.Linear(512, 10),
    )  # fmt: skip


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


NETWORKS = {"perceptron": _perceptron, "convolutions": _convolutions}


def load_network(network: str, weights: Path) -> nn.Module:
    """A trained network on digits ``[N, 1, 8, 8]``."""
    module = NETWORKS[network]()
    module.load_state_dict(load_file(weights))
    return module.eval()


def prepare(shape: SpeedShape, place: Path, seed: int = 0) -> None:
    """Train the model for some steps and write it with its examples into a directory."""
    if shape.network == "llama":
        sequences = read_sequences(shape.train, shape.queries, shape.length, seed)
        train_model(shape.llama, sequences, place / "model", shape.steps, 4, seed)
        examples = {"train": sequences.train_NT, "queries": sequences.queries_NT}
    else:
        examples = _digits(shape, seed)
        network = _trained(shape, examples["train"], examples["train_labels"], seed)
        save_file(network.state_dict(), place / "weights.safetensors")
    np.savez(place / "examples.npz", **examples)


def _digits(shape: SpeedShape, seed: int) -> dict[str, np.ndarray]:
    # Only the side that prepares has scikit-learn.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))[: shape.queries + shape.train]
    images = (images[order] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    labels, queries = labels[order].astype(np.int64), shape.queries
    return {
        "train": images[queries:],
        "train_labels": labels[queries:],
        "queries": images[:queries],
        "query_labels": labels[:queries],
    }


def _trained(shape: SpeedShape, images: np.ndarray, labels: np.ndarray, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = NETWORKS[shape.network]()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    for _ in range(shape.steps):
        some = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        cross_entropy(network(x[some]), y[some]).backward()
        optimizer.step()
    return network
