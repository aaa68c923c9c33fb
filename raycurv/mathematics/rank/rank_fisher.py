"""A rank-m Fisher as its rows: gathered from the data, and kept in a sliding window.

    F = GᵀG / m,     row i of G = (Σ over its B examples of ∇L) / √B,  example n in row n mod m

A row is √B times the mean gradient of B examples, so that F has the scale of Λ, a mean over
examples (for drawn labels its expectation is the Fisher whatever B). With several draws an example
counts once for each.

Frantar et al. 2021 (arXiv:2107.03356), sections 2 and 3. All m rows count.

Axis letters: M rows, O and I a block's axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Captured, of_fit
from raycurv.mathematics.curvature import Damping
from raycurv.mathematics.eigen import own_axes
from raycurv.mathematics.gradients import SQUARED_NORM, Rotations, spread
from raycurv.mathematics.rank.rank_inverse import RankInverse, rank_damping, rank_inverse
from raycurv.mathematics.sums import SHARED, Combine, PlainSum, Results, Sums, check_sum


@dataclass(frozen=True)
class RowSum:
    """The rows of one block, as sums with their counts.

    Attributes:
        block: its name.
        total_MOI: sums of gradients, ``[M, O, I]``.
        counts_M: examples x draws in each, int64.
        examples: examples in all.
    """

    block: str
    total_MOI: Tensor
    counts_M: Tensor
    examples: int

    def rows(self, outputs: slice) -> Tensor:
        """``G`` ``[M, o, I]`` of some outputs: the sums over the roots of their counts; zero for an
        empty row."""
        roots = self.counts_M.clamp_min(1).to(self.total_MOI).sqrt()
        return self.total_MOI[:, outputs] / roots[:, None, None]

    def plus(self, other: RowSum) -> RowSum:
        """The rows over the examples of both, which have no example in common."""
        assert self.block == other.block
        return RowSum(
            self.block,
            self.total_MOI + other.total_MOI,
            self.counts_M + other.counts_M,
            self.examples + other.examples,
        )


class RowSums(Sums):
    """Gathers the rows of some blocks and every example's squared gradient norm.

    Sums are in float32 (float64 for float64 models) without a wider master: M of them are the
    largest thing that a stage holds, and each takes no more than its share of the examples.

    Args:
        blocks: with their input factors known.
        count: M.
        dtype: of the model's computation.
        device: where the sums live.
        only: the blocks whose rows to gather; the norms are over all of ``blocks``.
    """

    results: ClassVar[Mapping[str, Combine]] = {SQUARED_NORM: "sum"}

    def __init__(
        self,
        blocks: Sequence[Block],
        count: int,
        dtype: torch.dtype,
        device: torch.device,
        only: frozenset[str],
    ) -> None:
        gathered = [b for b in blocks if b.name in only]
        super().__init__([b.name for b in gathered], dtype, device)
        self._blocks, self._rows = tuple(blocks), count
        self._bases = own_axes(blocks)
        for b in gathered:
            self.sums[b.name] = PlainSum((count, b.d_out, b.d_in), dtype, device)
        # Examples in all, and examples x draws in every row.
        self.counts = {SHARED: [0] * (1 + count)}

    def add(self, draws: Sequence[Captured], counts: bool = True) -> Results:
        """Add a microbatch's contribution; gives ``gradient_sq_norm [N]``, the mean over draws."""
        draws = of_fit(draws)
        batch = draws[0].batch
        places = torch.tensor(batch.numbers, dtype=torch.int64) % self._rows
        where = places.to(self.device)
        norms = torch.zeros(batch.size, dtype=torch.float64, device=self.device)
        for captured in draws:
            rotations = Rotations(captured, self._bases, self._blocks, self.dtype)
            for block in self._blocks:
                total = self.sums.get(block.name) if counts else None
                for part, m_NOI in rotations.gradients(block):
                    if total is not None:
                        whole = spread(m_NOI, rotations.columns(block), block.d_in)
                        total.part.index_add_(0, where[part], whole)
                    norms[part] += m_NOI.square_().sum(dim=2).sum(dim=1, dtype=torch.float64)
        if counts:
            in_rows = torch.bincount(places, minlength=self._rows) * len(draws)
            self.count(SHARED, batch.size, *in_rows.tolist())
        return {SQUARED_NORM: norms / len(draws)}

    def result(self, name: str) -> RowSum:
        """The rows of a block as sums with their counts.

        Raises:
            NumericalError: a sum is not finite.
        """
        total = self.sums[name].part
        check_sum(total, f"block {name}")
        examples, *in_rows = self.counts[SHARED]
        return RowSum(name, total, torch.tensor(in_rows), examples)


class RankFisher:
    """A rank-m Fisher whose rows come and go: a sliding window over gradients.

    Adding or removing one takes O(D M) for the Gram; the next use of the inverse O(M³) for its
    factor.

    Args:
        rows: block name -> rows ``[M, O, I]``; not changed.
    """

    def __init__(self, rows: Mapping[str, Tensor]) -> None:
        counts = {len(r) for r in rows.values()}
        if len(counts) != 1 or not min(counts):
            raise UserError(
                "rows", "the same number of rows, one or more, for every block", str(counts), ""
            )
        self.rows = {name: r.double() for name, r in rows.items()}
        self.gram = sum(
            (gram_of(r) for r in self.rows.values()), torch.zeros((), dtype=torch.float64)
        )

    def __len__(self) -> int:
        """How many rows there are, M."""
        return len(self.gram)

    @property
    def size(self) -> int:
        """D, the number of parameters."""
        return sum(r[0].numel() for r in self.rows.values())

    def add(self, gradient: Mapping[str, Tensor]) -> None:
        """Add a row: √B times the mean gradient of B examples, ``[O, I]`` a block.

        Raises:
            UserError: a block is missing, or of another shape.
        """
        self._check(gradient)
        crossed = torch.zeros(len(self) + 1, dtype=torch.float64)
        for name, rows in self.rows.items():
            grown = torch.cat([rows, gradient[name].double()[None]])
            crossed += grown.flatten(1) @ grown[-1].flatten()
            self.rows[name] = grown
        gram = torch.empty(len(crossed), len(crossed), dtype=torch.float64)
        gram[:-1, :-1] = self.gram
        gram[-1, :], gram[:, -1] = crossed, crossed
        self.gram = gram

    def remove(self, index: int) -> None:
        """Remove a row.

        Raises:
            UserError: no such row, or no other.
        """
        if not -len(self) <= index < len(self) or len(self) == 1:
            raise UserError(
                f"row {index}", f"one of {len(self)} rows, of which one must stay", str(index), ""
            )
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[index] = False
        self.rows = {name: rows[keep] for name, rows in self.rows.items()}
        self.gram = self.gram[keep][:, keep]

    def inverse(self, damping: Damping | float | str) -> RankInverse:
        """``(λI + GᵀG/m)⁻¹``; see :class:`raycurv.mathematics.rank.rank_inverse.RankInverse`.

        Args:
            damping: a factor of the mean eigenvalue, or ``abs:1e-6``.

        Raises:
            UserError: λ is zero.
            NumericalError: λ is too small for float64.
        """
        setting = damping if isinstance(damping, Damping) else Damping.parse(damping)
        where = f"the Fisher of {len(self)} gradients"
        found = rank_damping(setting, self.gram, self.size, where)
        if found == 0.0:
            raise UserError(where, "a gradient that is not zero", "zeros", "")
        whole = None
        if self.size <= len(self):
            whole = torch.cat([rows.flatten(1) for rows in self.rows.values()], dim=1)
        return rank_inverse(self.gram, self.size, found, where, whole)

    def apply(self, x: Mapping[str, Tensor], damping: Damping | float | str) -> dict[str, Tensor]:
        """``F⁻¹x`` for ``x [..., O, I]`` a block, float64."""
        inverse, parts = self.inverse(damping), list(self._parts())
        flat = {name: x[name].double().reshape(-1, rows.shape[1]) for name, _, rows in parts}
        projection = torch.stack(
            [inverse.at(start).project(rows, flat[name]) for name, start, rows in parts]
        ).sum(dim=0)
        return {
            name: inverse.at(start).apply(rows, flat[name], projection).view(x[name].shape)
            for name, start, rows in parts
        }

    def diagonal(self, damping: Damping | float | str) -> dict[str, Tensor]:
        """The diagonal of F⁻¹, ``[O, I]`` a block, float64."""
        inverse = self.inverse(damping)
        return {
            name: inverse.at(start).diagonal(rows).view(self.rows[name].shape[1:])
            for name, start, rows in self._parts()
        }

    def element(
        self, first: tuple[str, int, int], second: tuple[str, int, int], damping: Damping | str
    ) -> float:
        """One element of F⁻¹; each parameter is named by block, output and input."""
        inverse = self.inverse(damping)
        columns, places = [], []
        for name, o, i in (first, second):
            start = next(start for other, start, _ in self._parts() if other == name)
            width = self.rows[name].shape[2]
            columns.append(self.rows[name][:, o, i])
            places.append(start + o * width + i)
        if self.size <= len(self):
            index = torch.tensor([places])
            found = inverse.submatrices(torch.empty(len(self), self.size), index)
        else:
            # δ_kl/λ is of a parameter with itself.
            index = torch.tensor([[0, 0 if places[0] == places[1] else 1]])
            found = inverse.submatrices(torch.stack(columns, dim=1), index)
            if places[0] == places[1]:
                return float(found[0, 0, 0])
        return float(found[0, 0, 1])

    def _parts(self) -> list[tuple[str, int, Tensor]]:
        """Every block's name, first column and rows ``[M, N]``."""
        found, start = [], 0
        for name, rows in self.rows.items():
            found.append((name, start, rows.flatten(1)))
            start += rows[0].numel()
        return found

    def _check(self, gradient: Mapping[str, Tensor]) -> None:
        for name, rows in self.rows.items():
            got = gradient.get(name)
            if got is None or got.shape != rows.shape[1:]:
                raise UserError(
                    f"block {name}",
                    f"a gradient of shape {tuple(rows.shape[1:])}",
                    "none" if got is None else str(tuple(got.shape)),
                    "Give every block's gradient as one matrix, the bias its last column.",
                )


def gram_of(rows_MOI: Tensor) -> Tensor:
    """``GGᵀ`` ``[M, M]`` of a part of the columns, float64."""
    flat = rows_MOI.flatten(1).double()
    return flat @ flat.T
