"""What pruning asks of a block's curvature, whichever form it has.

    Surgeon        of a block alone: EK-FAC, K-FAC, diagonal
    RankSurgeon    of a part of a rank-m Fisher, a run of outputs at a time

Saliencies are predicted increases of the mean loss per example, but for the magnitude's, which are
squares of weights (:mod:`raycurv.mathematics.pruning.saliency`).

Axis letters: M rows of a rank-m Fisher, O outputs, I inputs (with the bias column), N = O I.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import BlockCurvature, Damping
from raycurv.mathematics.pruning.pattern import Pattern, obs_pattern, rank_pattern, summed_pattern
from raycurv.mathematics.pruning.rank_update import (
    masked_gram,
    projection,
    rank_increase,
    removed_projection,
    solve_kept,
    updated_block,
    updated_part,
)
from raycurv.mathematics.pruning.saliency import (
    after_newton_step,
    block_obd,
    block_obs,
    magnitude,
    obd,
    rank_diagonal,
    rank_obs,
)
from raycurv.mathematics.pruning.set_saliency import (
    column_saliencies,
    rank_column_saliencies,
    rank_row_saliencies,
    row_saliencies,
)
from raycurv.mathematics.pruning.structures import NofM, column_sums, row_sums
from raycurv.mathematics.pruning.update import Solver, Update, joint_update, predicted_increase
from raycurv.mathematics.rank.rank_inverse import RankInverse

Criterion = Literal["magnitude", "obd", "obs"]
# Runs of outputs and the rows of a rank-m Fisher there, ``[M, o, I]``.
Runs = Callable[[], Iterator[tuple[slice, Tensor]]]


class Surgeon(Protocol):
    """What the curvature of one block says of its weights."""

    def obd(self) -> Tensor:
        """Optimal Brain Damage of single weights, float32 ``[O, I]``."""
        ...

    def obs(self) -> Tensor:
        """Optimal Brain Surgeon of single weights, float32 ``[O, I]``."""
        ...

    def pattern(self, pattern: NofM, keep_OI: Tensor) -> Pattern:
        """The N:M pattern of least increase."""
        ...

    def outputs(self) -> Tensor:
        """Optimal Brain Surgeon of whole outputs with their bias, float32 ``[O]``."""
        ...

    def columns(self, columns: tuple[range, ...]) -> Tensor:
        """Of runs of columns over all outputs, float32 ``[len(columns)]``."""
        ...


@dataclass(frozen=True)
class BlockSurgeon:
    """Of a curvature that is the block's own.

    Attributes:
        curvature: of the block.
        w_OI: its weights.
        damping: of the block.
        gradient_OI: mean gradient over examples, for a model that has not converged.
    """

    curvature: BlockCurvature
    w_OI: Tensor
    damping: Damping
    gradient_OI: Tensor | None = None

    def obd(self) -> Tensor:
        return block_obd(self.curvature, self.w_OI, self.gradient_OI)

    def obs(self) -> Tensor:
        return block_obs(self.curvature, self.w_OI, self.damping, self.gradient_OI)

    def pattern(self, pattern: NofM, keep_OI: Tensor) -> Pattern:
        if self.curvature.is_zero:
            return summed_pattern(pattern, self.curvature.block, self.obs(), keep_OI)
        return obs_pattern(pattern, self.curvature, self._moved(), self.damping, keep_OI)

    def outputs(self) -> Tensor:
        return row_saliencies(self.curvature, self._moved(), self.damping)

    def columns(self, columns: tuple[range, ...]) -> Tensor:
        return column_saliencies(self.curvature, self._moved(), self.damping, columns)

    def remaining(self, keep_OI: Tensor, solver: Solver) -> Update:
        """The weights once some are gone and the others have moved."""
        return joint_update(
            self.curvature, self.w_OI, keep_OI, self.damping, self.gradient_OI, solver
        )

    def increase(self, step_OI: Tensor) -> float:
        """Predicted rise of the mean loss per example, F undamped."""
        return predicted_increase(self.curvature, step_OI, self.gradient_OI)

    def _moved(self) -> Tensor:
        return after_newton_step(self.curvature, self.w_OI, self.damping, self.gradient_OI)


@dataclass(frozen=True)
class RankSurgeon:
    """Of a rank-m Fisher that the block is a part of, or all of.

    Attributes:
        block: the part.
        w_OI: its weights.
        runs: gives the rows of G there, a run of outputs at a time.
        inverse: of the Fisher, at the block's first column; ``None`` where its rows are all zero.
        gram_MM: ``GGᵀ`` over all columns of the inverse.
        gradient_OI: mean gradient over examples, for a model that has not converged.
        gradient_projection: of that, over all columns of the inverse.
    """

    block: Block
    w_OI: Tensor
    runs: Runs
    inverse: RankInverse | None
    gram_MM: Tensor
    gradient_OI: Tensor | None = None
    gradient_projection: Tensor | None = None

    def obd(self) -> Tensor:
        parts = []
        for outputs, rows in self.runs():
            w = self.w_OI[outputs]
            gradient = None if self.gradient_OI is None else self.gradient_OI[outputs]
            parts.append(obd(w, rank_diagonal(rows.flatten(1)).view(w.shape), gradient))
        return torch.cat(parts)

    def obs(self) -> Tensor:
        if self.inverse is None:
            return torch.zeros(self.w_OI.shape, dtype=torch.float32)
        parts = []
        for outputs, rows in self.runs():
            here, u_OI = self._at(outputs), self._moved(outputs, rows)
            parts.append(rank_obs(here, rows.flatten(1), u_OI.flatten()).view(u_OI.shape))
        return torch.cat(parts)

    def pattern(self, pattern: NofM, keep_OI: Tensor) -> Pattern:
        if self.inverse is None:
            return summed_pattern(pattern, self.block, self.obs(), keep_OI)
        found = []
        for outputs, rows in self.runs():
            part = replace(self.block, d_out=rows.shape[1])
            u_OI = self._moved(outputs, rows)
            found.append(
                rank_pattern(
                    pattern, part, self._at(outputs), rows.flatten(1), u_OI, keep_OI[outputs]
                )
            )
        return Pattern(
            torch.cat([p.keep_OI for p in found]), torch.cat([p.saliency_OB for p in found])
        )

    def outputs(self) -> Tensor:
        if self.inverse is None:
            return torch.zeros(len(self.w_OI), dtype=torch.float32)
        lam = self.inverse.damping
        return torch.cat(
            [
                rank_row_saliencies(rows.flatten(1), self._moved(outputs, rows), self.gram_MM, lam)
                for outputs, rows in self.runs()
            ]
        )

    def columns(self, columns: tuple[range, ...]) -> Tensor:
        if self.inverse is None:
            return torch.zeros(len(columns), dtype=torch.float32)
        parts = list(self.runs())
        u_OI = torch.cat([self._moved(outputs, rows) for outputs, rows in parts])
        rows_MN = torch.cat([rows for _, rows in parts], dim=1).flatten(1)
        return rank_column_saliencies(rows_MN, u_OI, self.gram_MM, self.inverse.damping, columns)

    def kept(self, keep_OI: Tensor) -> tuple[Tensor, Tensor]:
        """The part's share of the equations of what remains: ``[M, M]`` and ``[M]``."""
        rows_count = len(self.gram_MM)
        gram = torch.zeros(rows_count, rows_count, dtype=torch.float64)
        bracket = torch.zeros(rows_count, dtype=torch.float64)
        for outputs, rows in self.runs():
            flat = rows.flatten(1)
            gram += masked_gram(flat, keep_OI[outputs])
            bracket += removed_projection(
                flat, keep_OI[outputs], self.w_OI[outputs], *self._first_order(outputs)
            )
        return gram, bracket

    def moved(self, keep_OI: Tensor, z_M: Tensor) -> Tensor:
        """The part's weights once some are gone and the others have moved.

        Args:
            z_M: the solution of the sums of :meth:`kept`.
        """
        return torch.cat(
            [
                updated_part(
                    rows.flatten(1), keep_OI[outputs], self.w_OI[outputs], z_M,
                    *self._first_order(outputs),
                )
                for outputs, rows in self.runs()
            ]
        )  # fmt: skip

    def alone(self, keep_OI: Tensor) -> Tensor:
        """The same for a block that is all of its Fisher."""
        assert self.inverse is not None
        lam = self.inverse.damping
        if int(keep_OI.sum()) < len(self.gram_MM):
            rows_MN = torch.cat([rows for _, rows in self.runs()], dim=1).flatten(1)
            return updated_block(rows_MN, keep_OI, self.w_OI, lam, self.gradient_OI)
        return self.moved(keep_OI, solve_kept(*self.kept(keep_OI), lam))

    def increase(self, seen_M: Tensor, first: float) -> float:
        """Predicted rise of the mean loss per example, F undamped, for shares of :meth:`seen`."""
        return rank_increase(seen_M) + first

    def seen(self, step_OI: Tensor) -> tuple[Tensor, float]:
        """The part's share of ``Gδ`` ``[M]``, and of ``gᵀδ``."""
        total = torch.zeros(len(self.gram_MM), dtype=torch.float64)
        for outputs, rows in self.runs():
            total += projection(rows.flatten(1), step_OI[outputs])
        if self.gradient_OI is None:
            return total, 0.0
        return total, float((self.gradient_OI.double() * step_OI.double()).sum())

    def _first_order(self, outputs: slice) -> tuple[Tensor | None, float | None]:
        if self.gradient_OI is None or self.inverse is None:
            return None, None
        return self.gradient_OI[outputs], self.inverse.damping

    def _at(self, outputs: slice) -> RankInverse:
        assert self.inverse is not None
        return self.inverse.at(outputs.start * self.block.d_in)

    def _moved(self, outputs: slice, rows: Tensor) -> Tensor:
        """``w − F⁻¹g`` of some outputs."""
        w = self.w_OI[outputs].double()
        if self.gradient_OI is None:
            return w
        assert self.gradient_projection is not None
        gradient = self.gradient_OI[outputs].flatten()[None]
        step = self._at(outputs).apply(rows.flatten(1), gradient, self.gradient_projection)
        return w - step.view(w.shape)


def single_saliencies(criterion: Criterion, w_OI: Tensor, surgeon: Surgeon | None) -> Tensor:
    """Of single weights, float32 ``[O, I]``; magnitudes need no surgeon."""
    if criterion == "magnitude":
        return magnitude(w_OI)
    assert surgeon is not None
    return surgeon.obd() if criterion == "obd" else surgeon.obs()


def pattern_of(
    pattern: NofM, block: Block, saliency_OI: Tensor, keep_OI: Tensor, surgeon: Surgeon | None
) -> Pattern:
    """The N:M pattern of least cost: jointly with a surgeon, else by sums of single saliencies."""
    if surgeon is None:
        return summed_pattern(pattern, block, saliency_OI, keep_OI)
    return surgeon.pattern(pattern, keep_OI)


def output_saliencies(saliency_OI: Tensor, surgeon: Surgeon | None) -> Tensor:
    """Of whole outputs, float32 ``[O]``; as :func:`pattern_of`."""
    return row_sums(saliency_OI) if surgeon is None else surgeon.outputs()


def run_saliencies(
    saliency_OI: Tensor, columns: tuple[range, ...], surgeon: Surgeon | None
) -> Tensor:
    """Of runs of columns, float32; as :func:`pattern_of`."""
    if surgeon is None:
        return column_sums(saliency_OI, columns)
    return surgeon.columns(columns)
