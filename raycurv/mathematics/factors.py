"""Kronecker factors as sums with counts.

    A = mean over tokens of a aᵀ        input side, one for all blocks that read the same tensor
    G = mean over tokens of g gᵀ        output side, g the gradient of the summed loss

Where a block says so a factor is diagonal: the mean of squares alone, as tiles of width 1.

Martens & Grosse 2015 (arXiv:1503.05671), sections 3 and 4; over tokens as in Grosse et al. 2023
(arXiv:2308.03296), section 3.2. Axis letters as in :mod:`raycurv.mathematics.capture`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Captured, of_fit
from raycurv.mathematics.kinds.catalogue import kind_of_block
from raycurv.mathematics.sums import Results, RunningSum, Sums
from raycurv.mathematics.tiles import tile_widths


@dataclass(frozen=True)
class Factor:
    """A Kronecker factor before anything is known of it but its place: the ``input`` (A) or
    ``output`` (G) side of the first block that uses it."""

    block: Block
    side: Literal["input", "output"]

    @property
    def width(self) -> int:
        return self.block.d_in if self.side == "input" else self.block.d_out

    @property
    def diagonal(self) -> bool:
        """Whether it is summed up, and used, as a diagonal."""
        block = self.block
        return block.input_diagonal if self.side == "input" else block.output_diagonal

    def tiles(self, max_factor_dim: int | None) -> tuple[int, ...]:
        """Widths of its tiles; of a diagonal one all are 1."""
        return tile_widths(self.width, 1 if self.diagonal else max_factor_dim)


def factors_of(blocks: Iterable[Block]) -> dict[str, Factor]:
    """The factors of some blocks by name, each once, in the order in which they are summed up."""
    found: dict[str, Factor] = {}
    for block in blocks:
        found.setdefault(block.input_factor, Factor(block, "input"))
        found.setdefault(block.output_factor, Factor(block, "output"))
    return found


def share_outputs(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """The blocks, all of one parameter with one output factor where their kind says that they may:
    a mean over the rows of all of them."""
    return tuple(
        replace(block, one_output=f"{block.module}.{block.parameter}")
        if kind_of_block(block).may_share_output(block)
        else block
        for block in blocks
    )


@dataclass(frozen=True)
class FactorSum:
    """One factor: its sum, tile by tile, and what to divide it by.

    Attributes:
        tiles: float64 sums of ``a aᵀ`` or ``g gᵀ``, one ``[t, t]`` a tile; of a diagonal factor
            one ``[d]`` of squares.
        count: how many rows (times groups) were summed.
        rows: rows of one draw that were not padding: tokens x calls, or output positions.
        dtype: that it was summed (or stored) in, whichever is coarser.
    """

    name: str
    tiles: tuple[Tensor, ...]
    count: int
    rows: int
    dtype: torch.dtype = torch.float64

    def mean(self) -> tuple[Tensor, ...]:
        """The factor itself; zeros when no row entered it."""
        return tuple(tile / max(self.count, 1) for tile in self.tiles)

    def plus(self, other: FactorSum) -> FactorSum:
        """The factor of the data of both."""
        return self._combined(other, 1)

    def minus(self, other: FactorSum) -> FactorSum:
        """The factor of this data without the other's; rounding may leave eigenvalues below 0."""
        return self._combined(other, -1)

    def _combined(self, other: FactorSum, sign: int) -> FactorSum:
        assert self.name == other.name
        pairs = zip(self.tiles, other.tiles, strict=True)
        coarser = max(self.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        return replace(
            self,
            tiles=tuple(torch.add(mine, theirs, alpha=sign) for mine, theirs in pairs),
            count=self.count + sign * other.count,
            rows=self.rows + sign * other.rows,
            dtype=coarser,
        )


class FactorSums(Sums):
    """Gathers A and G of some blocks, microbatch by microbatch.

    Args:
        blocks: with their input factors known.
        dtype: of the model's computation; float64 sums in float64, all else in float32.
        max_factor_dim: widest tile.
        only: the factors to gather; all by default.
        weighted: weight the rows of A by the squared norms of the output gradients; no two blocks
            share an input factor then.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        dtype: torch.dtype,
        device: torch.device,
        max_factor_dim: int | None = None,
        only: frozenset[str] | None = None,
        weighted: bool = False,
    ) -> None:
        found = factors_of(blocks)
        super().__init__([n for n in found if only is None or n in only], dtype, device)
        self._blocks, self._weighted = blocks, weighted
        self._tiles: dict[str, list[RunningSum]] = {}
        for name in self.names:
            factor = found[name]
            shapes: list[tuple[int, ...]] = [(t, t) for t in factor.tiles(max_factor_dim)]
            if factor.diagonal:
                shapes = [(factor.width,)]
            self._tiles[name] = [RunningSum(shape, dtype, device) for shape in shapes]
            self.sums |= {f"{name}#{i}": tile for i, tile in enumerate(self._tiles[name])}
        # What to divide a sum by, and rows of one draw that were not padding.
        self.counts = {name: [0, 0] for name in self.names}

    def add(self, draws: Sequence[Captured], counts: bool = True) -> Results:
        if not counts:
            return {}
        for captured in of_fit(draws):
            first = captured.first_draw
            for block in self._blocks:
                rows, g = captured.rows.get(block.input_factor, 0), captured.gradients[block.name]
                if block.output_factor in self._tiles:
                    self.count(block.output_factor, rows, rows if first else 0)
                    if g is not None:
                        self._add_live(captured, block.output_factor, g, block.input_factor)
                if self._weighted and block.input_factor in self._tiles:
                    self.count(block.input_factor, rows, rows if first else 0)
                    if g is not None:
                        a = captured.inputs[block.input_factor].to(self.dtype)
                        a = a * _lengths(g.to(self.dtype), a.shape[2:-1])
                        self._add_live(captured, block.input_factor, a, block.input_factor)
            for name, a in captured.inputs.items() if first and not self._weighted else ():
                if name in self._tiles:
                    groups = a.shape[2] if a.ndim == 4 else 1
                    self.count(name, captured.rows[name] * groups, captured.rows[name])
                    self._add_live(captured, name, a, name)
        return {}

    def _add_live(self, captured: Captured, name: str, x: Tensor, input_factor: str) -> None:
        """Add the moment of the rows of ``x`` that count, which a block reads or gives."""
        live, rows = captured.live.get(input_factor), x.reshape(-1, x.shape[-1])
        rows = (rows if live is None else rows.index_select(0, live)).to(self.dtype)
        self._add(name, rows, rows, captured.columns.get(name))

    def _add(self, name: str, left: Tensor, right: Tensor, columns: Tensor | None = None) -> None:
        """Add ``leftᵀ right`` of rows ``[R, X]`` to a factor, which it is symmetric for."""
        start = 0
        for total in self._tiles[name]:
            if total.part.ndim == 1:
                total.add((left * right).sum(dim=0), columns=columns)
                continue
            assert columns is None, f"factor {name} of some columns is diagonal"
            tile = slice(start, start + len(total.part))
            if left is right:
                total.add_gram(left[:, tile])
            else:
                total.add_outer(left[:, tile], right[:, tile])
            start = tile.stop

    def result(self, name: str) -> FactorSum:
        """One factor, in float64; NumericalError if its sum is not finite."""
        tiles = tuple(tile.value(f"factor {name}") for tile in self._tiles[name])
        count, rows = self.counts[name]
        return FactorSum(name, tiles, count, rows, self.dtype)


def _lengths(g_NTO: Tensor, groups: Sequence[int]) -> Tensor:
    """``|g|`` of every row ``[N, T, 1]``, or of each of its groups ``[N, T, S, 1]``."""
    parts = g_NTO.unflatten(2, (*groups, -1)) if groups else g_NTO
    lengths: Tensor = parts.norm(dim=-1, keepdim=True)
    return lengths
