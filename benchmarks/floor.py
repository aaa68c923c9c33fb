"""The least that each phase of a Llama-shaped comparison takes: counted products and bytes over the
rates of this machine.

    floor = Σ products (as torch.mm takes them at their own shapes) + Σ eigh + bytes / copy rate

Rates are processor seconds, measured in the same process, one after the other. Element-wise work of
the network (softmax, norms, rotary embeddings) and files are left out, so the floor is a low one.

Axis letters: N examples, T tokens, Q queries, I in, O out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from shapes import SpeedShape


@dataclass
class Work:
    """Of one phase.

    Attributes:
        products: ``(m, k, n)`` -> how many products ``[m, k] [k, n]``.
        decompositions: width -> how many float64 eigendecompositions.
        elements: float32 numbers that are read or written outside of products.
    """

    products: dict[tuple[int, int, int], float] = field(default_factory=dict)
    decompositions: dict[int, int] = field(default_factory=dict)
    elements: float = 0.0

    def product(self, m: int, k: int, n: int, times: float = 1) -> None:
        """Count a product."""
        self.products[m, k, n] = self.products.get((m, k, n), 0) + times

    @property
    def flops(self) -> float:
        """Of the products; a multiplication and an addition are two."""
        return sum(2.0 * m * k * n * times for (m, k, n), times in self.products.items())


def count(shape: SpeedShape) -> dict[str, Work]:
    """The phases of a shape: each the cheaper way round, as DESIGN has it."""
    assert shape.network == "llama"
    d, ff, per_batch = shape.width, shape.feed_forward, shape.batch * shape.length
    # (in, out, blocks): those of one entry read one input.
    groups = [(d, d, 3), (d, d, 1), (d, ff, 2), (ff, d, 1)]
    phases = {
        name: Work() for name in ("covariance", "eigendecomposition", "lambda", "pairwise", "self")
    }
    batches = shape.train / shape.batch
    asked = shape.queries / shape.batch
    for name, work in phases.items():
        # Forward and backward through every weight, attention's own two products, and their four.
        passes = {"covariance": 1, "lambda": 1, "self": 1, "pairwise": 1 + asked / batches}
        for _ in range(shape.layers):
            for i, o, blocks in groups:
                times = blocks * batches * passes.get(name, 0)
                work.product(per_batch, i, o, times)
                work.product(per_batch, o, i, times)
            heads = shape.heads * shape.batch * batches * passes.get(name, 0)
            work.product(shape.length, d // shape.heads, shape.length, 3 * heads)
            work.product(shape.length, shape.length, d // shape.heads, 3 * heads)
    for _ in range(shape.layers):
        for i, o, blocks in groups:
            _of_blocks(phases, shape, i, o, blocks)
    return phases


def _of_blocks(phases: dict[str, Work], shape: SpeedShape, i: int, o: int, blocks: int) -> None:
    per_batch, batches = shape.batch * shape.length, shape.train / shape.batch
    covariance, eigen = phases["covariance"], phases["eigendecomposition"]
    for width, times in ((i, 1), (o, blocks)):
        covariance.product(width, per_batch, width, times * batches)
        covariance.elements += 3 * width * width * times * batches
        eigen.decompositions[width] = eigen.decompositions.get(width, 0) + times
    for name in ("lambda", "self"):
        work = phases[name]
        work.product(per_batch, i, i, batches)
        work.product(per_batch, o, o, blocks * batches)
        work.product(o, shape.length, i, blocks * shape.train)
        work.elements += 3 * blocks * i * o * shape.train
    pairwise = phases["pairwise"]
    # Query gradients into the basis, 1 / (Λ + λ), and then the cheaper of the two: products back,
    # or training rows into the basis.
    asked = shape.queries / shape.batch
    pairwise.product(per_batch, i, i, asked)
    pairwise.product(per_batch, o, o, blocks * asked)
    pairwise.product(o, shape.length, i, blocks * (shape.queries + shape.train))
    back = blocks * shape.queries * o * i * (i + o)
    turned = shape.train * shape.length * (i * i + blocks * o * o)
    if back < turned:
        pairwise.product(o, i, i, blocks * shape.queries)
        pairwise.product(i, o, o, blocks * shape.queries)
    else:
        pairwise.product(per_batch, i, i, batches)
        pairwise.product(per_batch, o, o, blocks * batches)
    pairwise.product(shape.batch, o * i, shape.queries, blocks * batches)
    pairwise.elements += 3 * blocks * i * o * shape.queries


class Rates:
    """Processor seconds of products, decompositions and copies, each shape measured once."""

    def __init__(self, seconds: float = 0.2) -> None:
        self._least, self._known = seconds, {}

    def product(self, m: int, k: int, n: int) -> float:
        """``torch.mm`` of float32 ``[m, k] [k, n]``."""
        return self._once(("mm", m, k, n), lambda: (torch.randn(m, k), torch.randn(k, n)), torch.mm)

    def decomposition(self, width: int) -> float:
        """``torch.linalg.eigh`` of a float64 factor of 2 · width rows."""

        def factor() -> tuple[torch.Tensor]:
            rows = torch.randn(2 * width, width, dtype=torch.float64)
            return (rows.T @ rows,)

        return self._once(("eigh", width), factor, torch.linalg.eigh)

    def element(self) -> float:
        """One float32 number read and written, of 64 MiB."""
        many = 2**24
        return self._once(("copy",), lambda: (torch.zeros(many),), torch.clone) / (2 * many)

    def _once(self, key: tuple, make: Callable, run: Callable) -> float:
        if key not in self._known:
            given, times = make(), 0
            run(*given)
            since = _cpu()
            while times == 0 or _cpu() - since < self._least:
                run(*given)
                times += 1
            self._known[key] = (_cpu() - since) / times
        return self._known[key]

    def seconds(self, work: Work) -> float:
        """The floor of a phase."""
        products = sum(self.product(*shape) * times for shape, times in work.products.items())
        eigen = sum(self.decomposition(w) * times for w, times in work.decompositions.items())
        return products + eigen + self.element() * work.elements


def _cpu() -> float:
    times = os.times()
    return times.user + times.system
