"""Small curvatures for pruning, and what they are as whole matrices in float64.

The minima come from the equations of the constrained problem with its multipliers, so that neither
an inverse's submatrix nor a Schur complement is taken for granted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from dense import ekfac_matrix
from torch import Tensor

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import BlockCurvature, Damping, IdentityCurvature
from raycurv.mathematics.eigen import Eigenbasis
from raycurv.mathematics.pruning.rank_surgeon import RankSurgeon
from raycurv.mathematics.pruning.surgeon import BlockSurgeon
from raycurv.mathematics.pruning.update import Solver, Update
from raycurv.mathematics.rank.rank_inverse import rank_inverse

# Four outputs, eight inputs and the bias.
D_OUT, D_IN = 4, 9
BLOCK = Block("layer", "linear", D_IN, D_OUT, True)
DAMPING = Damping(0.1)
METHODS = ("ekfac", "tiles", "kfac", "diagonal", "identity")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(*tiles: int, seed: int = 0) -> Eigenbasis:
    vectors = tuple(torch.linalg.qr(numbers(t, t, seed=seed + n)).Q for n, t in enumerate(tiles))
    return Eigenbasis(vectors, tuple(torch.ones(t, dtype=torch.float64) for t in tiles))


def curvature(method: str, block: Block = BLOCK) -> BlockCurvature:
    """A block's curvature of this method; ``tiles`` cuts the bases of EK-FAC across runs of 4."""
    lam = numbers(block.d_out, block.d_in, seed=1).square()
    if method == "identity":
        return IdentityCurvature(block)
    if method == "diagonal":
        return BlockCurvature(block, Eigenbasis(), Eigenbasis(), lam)
    if method == "kfac":
        lam = torch.outer(lam[:, 0], lam[0])
    elif method == "tiles":
        return BlockCurvature(block, basis(3, 4, block.d_in - 7), basis(2, block.d_out - 2), lam)
    return BlockCurvature(block, basis(block.d_in, seed=2), basis(block.d_out, seed=3), lam)


@dataclass(frozen=True)
class Quadratic:
    """``gᵀδ + ½ δᵀHδ`` with a whole matrix.

    Attributes:
        undamped: F.
        lam: λ.
        gradient: g, flat.
    """

    undamped: Tensor
    lam: float
    gradient: Tensor

    @property
    def damped(self) -> Tensor:
        return self.undamped + self.lam * torch.eye(len(self.undamped), dtype=torch.float64)

    def value(self, step: Tensor) -> float:
        step = step.flatten()
        return float(self.gradient @ step + step @ self.damped @ step / 2)

    def prediction(self, step: Tensor) -> float:
        return replace(self, lam=0.0).value(step)

    def minimum(self, w: Tensor, gone: Sequence[int]) -> Tensor:
        """The step that sets the weights that are gone to zero, by Lagrange's multipliers."""
        size, count = len(self.damped), len(gone)
        ties = torch.zeros(size, count, dtype=torch.float64)
        ties[list(gone), range(count)] = 1
        system = torch.zeros(size + count, size + count, dtype=torch.float64)
        system[:size, :size], system[:size, size:], system[size:, :size] = self.damped, ties, ties.T
        right = torch.cat([-self.gradient, -w.flatten()[list(gone)]])
        return torch.linalg.solve(system, right)[:size]

    def cost(self, w: Tensor, gone: Sequence[int]) -> float:
        """Of setting weights to zero: above the lowest point there is."""
        return self.value(self.minimum(w, gone)) - self.value(self.minimum(w, ()))


def quadratic(method: str, gradient: Tensor | None, damping: Damping = DAMPING) -> Quadratic:
    """The model of :func:`curvature`, from the definition."""
    block = curvature(method)
    size = D_OUT * D_IN
    g = torch.zeros(size, dtype=torch.float64) if gradient is None else gradient.flatten()
    if method == "identity":
        return Quadratic(torch.eye(size, dtype=torch.float64), 0.0, g)
    lam, bases = block.lam_OI, (block.input_basis.vectors, block.output_basis.vectors)
    q_a, q_g = (
        torch.block_diag(*q) if q else torch.eye(d, dtype=torch.float64)
        for q, d in zip(bases, (D_IN, D_OUT), strict=True)
    )
    return Quadratic(ekfac_matrix(q_a, q_g, lam), damping.of(float(lam.mean())), g)


def rank_quadratic(rows: Tensor, lam: float, gradient: Tensor | None) -> Quadratic:
    """The model of a rank-m Fisher."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for row in rows:
        total += torch.outer(row, row) / len(rows)
    g = torch.zeros(len(total), dtype=torch.float64) if gradient is None else gradient.flatten()
    return Quadratic(total, lam, g)


def surgeon(
    method: str, w: Tensor, gradient: Tensor | None = None, damping: Damping = DAMPING
) -> BlockSurgeon:
    """What :func:`curvature` says of these weights."""
    return BlockSurgeon(curvature(method), w, damping, gradient)


def joint_update(
    curvature: BlockCurvature,
    w: Tensor,
    keep: Tensor,
    damping: Damping,
    gradient: Tensor | None = None,
    solver: Solver | None = None,
) -> Update:
    """What is left of a block after the joint step."""
    return BlockSurgeon(curvature, w, damping, gradient).remaining(keep, solver or Solver())


def predicted_increase(
    curvature: BlockCurvature,
    step: Tensor,
    gradient: Tensor | None = None,
    damping: Damping | None = None,
) -> float:
    """What a surgeon predicts for a step, and of the damped model ``½ λ |δ|²`` more."""
    found = BlockSurgeon(curvature, step, DAMPING, gradient).increase(step).alone
    lam = 0.0 if damping is None else curvature.damping(damping)
    return found + 0.5 * lam * float(step.square().sum())


def rank_surgeons(
    rows: Tensor, w: Tensor, lam: float, gradient: Tensor | None = None, outputs: int = D_OUT
) -> list[RankSurgeon]:
    """What a rank-m Fisher says of the blocks that it is of, ``outputs`` of a block at a time."""
    size, width = D_OUT * D_IN, rows.shape[1]
    inverse = rank_inverse(rows.double() @ rows.double().T, width, lam, "the test", rows)
    projection = None if gradient is None else inverse.project(rows, gradient[None])
    found = []
    for start in range(0, width, size):
        part = slice(start, start + size)
        own_MOI = rows[:, part].unflatten(1, (-1, D_IN))

        def runs(own_MOI: Tensor = own_MOI) -> Iterator[tuple[slice, Tensor]]:
            for first in range(0, own_MOI.shape[1], outputs):
                some = slice(first, first + outputs)
                yield some, own_MOI[:, some]

        matrix = (-1, D_IN)
        found.append(
            RankSurgeon(
                BLOCK, w[part].view(matrix), runs, inverse.at(start),
                None if gradient is None else gradient[part].view(matrix), projection,
            )
        )  # fmt: skip
    return found
