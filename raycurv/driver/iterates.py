"""The vectors of solvers, which stay with the stages: files, directions and products.

    NUMBER/BLOCK    x, r, p, s before iteration NUMBER; u = M⁻¹ r, w = (C + λ) u   [Q, O, I] each
                    gram [Q, 6, 6], their dot products
                    of descent: x, mean; w = (C + λ) x; gram [Q, 3, 3], of x, v and w

A pass of products is an iteration: its directions are u (or x), which stages make of the files of
the iteration before and the few numbers of its step, and its gatherer writes the next files of the
products. So a pass that is begun again, by whichever stages, does the same again.

Axis letters: Q right-hand sides, O outputs, I inputs, D directions of a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from raycurv.files.artifacts import read_products
from raycurv.files.curvature_files import CurvatureFiles
from raycurv.files.store import Store
from raycurv.files.tensorfile import open_tensors, write_tensors
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import BlockCurvature, Damping
from raycurv.mathematics.exact.conjugate_gradients import Iterate, Progress
from raycurv.mathematics.exact.preconditioned_descent import averaged, descended, descent_gram
from raycurv.mathematics.exact.product_sums import ProductSum
from raycurv.stages.passes import Directions, ProductGatherer

_CPU = torch.device("cpu")
# Of a block, by their names in its file.
Vectors: TypeAlias = "dict[str, Tensor]"


@dataclass(frozen=True)
class System:
    """``(C + λ) x = v`` for several v: what it is made of, and where its vectors lie.

    A block that nothing of the fit reached has no curvature and no part in the system: x is zero
    there, as EK-FAC's is.

    Attributes:
        right: has v, a file of whole gradients a block.
        place: of the iterations' files.
        curvature: F of every block; ``M = F + λ`` preconditions, or without curvature nothing does.
        damping: gives λ of every block.
        own: block -> its directions in a pass, as many as there are v. Those of the whole model are
            the same of all blocks; of blocks that are solved each alone they are apart.
    """

    right: Store
    place: Store
    curvature: CurvatureFiles
    damping: Damping
    own: Mapping[str, range]

    @property
    def directions(self) -> int:
        """D: how many directions a pass has."""
        return max(own.stop for own in self.own.values())

    @property
    def queries(self) -> int:
        """Q: how many right-hand sides are solved for."""
        return len(next(iter(self.own.values())))

    def lam(self, curvature: BlockCurvature) -> float:
        """λ of a block, where there is no curvature, too."""
        block = curvature.block
        return self.damping.of(curvature.trace / (block.d_out * block.d_in))

    def preconditioned(self, curvature: BlockCurvature, r: Tensor) -> Tensor:
        """``M⁻¹ r`` of a block's ``[Q, O, I]``."""
        return curvature.apply(r, curvature.inverse(self.damping))


def state_file(iteration: int, block: str) -> str:
    """Where the vectors of a block lie, in an iteration."""
    return f"{iteration:04d}/{block}.safetensors"


@dataclass(frozen=True)
class Iteration(Directions):
    """One iteration, as it travels to the stages; this one is of conjugate gradients.

    Attributes:
        keys: of the vectors in its files, but for what it multiplies.
        multiplied: where in the Gram matrix the direction and its product stand.
        size: of the Gram matrix.
        system: that is solved.
        number: from 1 on.
        count: D.
        step: block -> the last iteration's α and β, ``[Q]`` each; none before the first.
    """

    system: System
    number: int
    count: int
    step: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    keys: ClassVar[tuple[str, ...]] = ("x", "r", "p", "s")
    multiplied: ClassVar[tuple[int, int]] = (2, 5)
    size: ClassVar[int] = 6

    @classmethod
    def after(cls, system: System, number: int, before: Progress | None) -> Iteration:
        """The iteration of a number, behind one that has these scalars, ``[Q]`` of the whole model
        or ``[B, Q]``."""
        step = {}
        if before is not None:
            alphas, betas = before.alpha, before.beta
            for place, name in enumerate(system.own):
                row = place if alphas.ndim == 2 else slice(None)
                step[name] = (alphas[row].clone(), betas[row].clone())
        return cls(system, number, system.directions, step)

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        system = self.system
        mine = [block for block in blocks if block.name in system.own]
        found = {}
        for name, curvature in system.curvature.open_stage(mine, device).items():
            before = self.iterate(curvature, device)
            u, own = self.direction(curvature, before).to(dtype), system.own[name]
            found[name] = u
            if len(own) < self.count:
                found[name] = u.new_zeros(self.count, *u.shape[1:])
                found[name][own.start : own.stop] = u
        return found

    def iterate(self, curvature: BlockCurvature, device: torch.device = _CPU) -> Vectors:
        """The vectors of a block before this iteration, by :attr:`keys`.

        Raises:
            DamagedFile: they are not what was written.
        """
        if self.number == 1:
            return vars(Iterate.zero(self._right(curvature, device)))
        x, r, p, s, u, w = self._read(curvature, device, *self.keys, "u", "w")
        return vars(Iterate(x, r, p, s).advanced(u, w, *self.step[curvature.block.name]))

    def direction(self, curvature: BlockCurvature, before: Vectors) -> Tensor:
        """What of a block is multiplied, ``[Q, O, I]``."""
        return self.system.preconditioned(curvature, before["r"])

    def left(self, curvature: BlockCurvature, before: Vectors, u: Tensor, w: Tensor) -> Vectors:
        """What a block's file holds once its direction u has been multiplied."""
        return {"u": u, "w": w, "gram": Iterate(**before).gram(u, w)} | before

    def answer(self, curvature: BlockCurvature) -> Tensor:
        """x of a block, ``[Q, O, I]``, if this iteration is not taken any more."""
        return self.iterate(curvature)["x"]

    def _right(self, curvature: BlockCurvature, device: torch.device) -> Tensor:
        block = curvature.block
        products, _ = read_products(self.system.right, block.name, (block.d_out, block.d_in))
        v = products.dense().to(device)
        return torch.zeros_like(v) if curvature.is_zero else v

    def _read(
        self, curvature: BlockCurvature, device: torch.device, *keys: str
    ) -> Iterator[Tensor]:
        block, system = curvature.block, self.system
        file = open_tensors(system.place, state_file(self.number - 1, block.name))
        file.belongs("block", block.name)
        shape = (system.queries, block.d_out, block.d_in)
        return (file.numbers(key, shape).to(device) for key in keys)


@dataclass(frozen=True)
class Descent(Iteration):
    """A step of descent on a minibatch, from x = 0, whose first step needs no product.

    Attributes:
        rate: ``[Q]``.
        start: the first iterate of those whose mean is the answer.
    """

    rate: Tensor = field(kw_only=True)
    start: int = field(kw_only=True)
    keys: ClassVar[tuple[str, ...]] = ("x", "mean")
    multiplied: ClassVar[tuple[int, int]] = (0, 2)
    size: ClassVar[int] = 3

    def iterate(self, curvature: BlockCurvature, device: torch.device = _CPU) -> Vectors:
        v = self._right(curvature, device)
        x = mean = w = torch.zeros_like(v)
        if self.number > 1:
            x, mean, w = self._read(curvature, device, *self.keys, "w")
        x = descended(x, v, w, self.rate, lambda r: self.system.preconditioned(curvature, r))
        behind = self.number - self.start
        return {"x": x, "mean": averaged(mean, x, behind) if behind > 0 else x}

    def direction(self, curvature: BlockCurvature, before: Vectors) -> Tensor:
        return before["x"]

    def left(self, curvature: BlockCurvature, before: Vectors, u: Tensor, w: Tensor) -> Vectors:
        v = self._right(curvature, u.device)
        return {"w": w, "gram": descent_gram(u, v, w)} | before

    def answer(self, curvature: BlockCurvature) -> Tensor:
        return self.iterate(curvature)["mean"]


@dataclass(frozen=True)
class IterationGatherer(ProductGatherer):
    """Leaves an iteration's files.

    Attributes:
        iteration: whose directions are multiplied.
    """

    iteration: Iteration = field(kw_only=True)

    @classmethod
    def of(cls, iteration: Iteration) -> IterationGatherer:
        """The one of an iteration."""
        return cls(iteration.count, iteration.system.own, iteration=iteration)

    def write(self, name: str, result: ProductSum, blocks: Mapping[str, Block]) -> None:
        iteration, system = self.iteration, self.iteration.system
        device = result.total.device
        curvature = system.curvature.open_spectral(blocks[name], {}, device)
        before = iteration.iterate(curvature, device)
        u = iteration.direction(curvature, before)
        w, lam = torch.zeros_like(u), system.lam(curvature)
        if not curvature.is_zero:
            w = (result.mean + lam * u).to(u)
        vectors = iteration.left(curvature, before, u, w)
        notes = {"block": name, "damping": repr(lam)}
        write_tensors(system.place, state_file(iteration.number, name), vectors, notes)


def read_grams(iteration: Iteration) -> tuple[Tensor, Tensor]:
    """The dot products of an iteration's vectors, of every block of the system in their order:
    ``[B, Q, V, V]``; and λ of every block ``[B]``."""
    system, size = iteration.system, iteration.size
    files = [open_tensors(system.place, state_file(iteration.number, name)) for name in system.own]
    grams = [file.numbers("gram", (system.queries, size, size)) for file in files]
    lams = torch.tensor([file.noted("damping") for file in files], dtype=torch.float64)
    return torch.stack(grams), lams
