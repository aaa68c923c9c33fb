"""The vectors of conjugate gradients, which stay with the stages: files, directions and products.

    NUMBER/BLOCK    x, r, p, s before iteration NUMBER; u = M⁻¹ r, w = (C + λ) u   [Q, O, I] each
                    gram [Q, 6, 6], their dot products

A pass of products is an iteration: its directions are u, which stages make of the files of the
iteration before and the few numbers of its step, and its gatherer writes the next files of the
products. So a pass that is begun again, by whichever stages, does the same again.

Axis letters: Q right-hand sides, O outputs, I inputs, D directions of a pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raycurv.files.artifacts import read_products
from raycurv.files.curvature_files import CurvatureFiles
from raycurv.files.store import Store
from raycurv.files.tensorfile import open_tensors, write_tensors
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import BlockCurvature, Damping
from raycurv.mathematics.exact.conjugate_gradients import Iterate, Progress
from raycurv.mathematics.exact.product_sums import ProductSum
from raycurv.stages.passes import Directions, ProductGatherer

_CPU = torch.device("cpu")


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
        """Q."""
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
    """One iteration, as it travels to the stages.

    Attributes:
        system: that is solved.
        number: from 1 on.
        count: D.
        step: block -> the last iteration's α and β, ``[Q]`` each; none before the first.
    """

    system: System
    number: int
    count: int
    step: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

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
            r = self.iterate(curvature, device).r
            u, own = system.preconditioned(curvature, r).to(dtype), system.own[name]
            found[name] = u
            if len(own) < self.count:
                found[name] = u.new_zeros(self.count, *u.shape[1:])
                found[name][own.start : own.stop] = u
        return found

    def iterate(self, curvature: BlockCurvature, device: torch.device = _CPU) -> Iterate:
        """The vectors of a block before this iteration.

        Raises:
            DamagedFile: they are not what was written.
        """
        block, system = curvature.block, self.system
        if self.number == 1:
            products, _ = read_products(system.right, block.name, (block.d_out, block.d_in))
            v = products.dense().to(device)
            return Iterate.zero(torch.zeros_like(v) if curvature.is_zero else v)
        file = open_tensors(system.place, state_file(self.number - 1, block.name))
        file.belongs("block", block.name)
        shape = (system.queries, block.d_out, block.d_in)
        x, r, p, s, u, w = (file.numbers(key, shape).to(device) for key in "xrpsuw")
        return Iterate(x, r, p, s).advanced(u, w, *self.step[block.name])


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
        u = system.preconditioned(curvature, before.r)
        w, lam = torch.zeros_like(u), system.lam(curvature)
        if not curvature.is_zero:
            w = (result.mean + lam * u).to(u)
        vectors: dict[str, Any] = {"u": u, "w": w, "gram": before.gram(u, w)}
        vectors |= {key: getattr(before, key) for key in "xrps"}
        notes = {"block": name, "damping": repr(lam)}
        write_tensors(system.place, state_file(iteration.number, name), vectors, notes)


def read_grams(system: System, iteration: int) -> tuple[Tensor, Tensor]:
    """The dot products of an iteration's vectors, of every block of the system in their order:
    ``[B, Q, 6, 6]``; and λ of every block ``[B]``."""
    files = [open_tensors(system.place, state_file(iteration, name)) for name in system.own]
    grams = [file.numbers("gram", (system.queries, 6, 6)) for file in files]
    lams = torch.tensor([file.noted("damping") for file in files], dtype=torch.float64)
    return torch.stack(grams), lams
