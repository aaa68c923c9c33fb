"""Kronecker factors of per-example gradients, as sums with counts; M is an example's ``∇W``.

    G = Σ_n M A' Mᵀ        A = Σ_n Mᵀ G' M        over examples and draws

A' and G' are the identity (Shampoo), or what the last step of a power iteration gave. Where rows
are few, no gradient is formed: with rows a ``[T, I]`` and g ``[T, O]`` of an example

    M A' Mᵀ = gᵀ (a A' aᵀ) g        Mᵀ G' M = aᵀ (g G' gᵀ) a

Axis letters as in :mod:`raycurv.mathematics.capture`; see :mod:`raycurv.mathematics.bases`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Captured, of_fit
from raycurv.mathematics.eigen import own_axes
from raycurv.mathematics.factors import FactorSum, FactorSums
from raycurv.mathematics.gradients import CHUNK, Rotations
from raycurv.mathematics.products import outer
from raycurv.mathematics.sums import Results
from raycurv.mathematics.tiles import times_tiles


def through_rows(tokens: int, d_in: int, d_out: int, tile_in: int, tile_out: int) -> bool:
    """Whether products of an example's rows take fewer FLOPs than its gradient.

    Args:
        tokens: rows of an example.
        tile_in, tile_out: widths of the factors' tiles.
    """
    squares = 2 * tokens**2 * (d_in + d_out) + tokens * (d_in * tile_in + d_out * tile_out)
    return squares < d_in * d_out * (tokens + tile_in + tile_out)


def rows_together(tokens: int, d_in: int, d_out: int) -> int:
    """How many examples' products of rows are formed at once."""
    return max(1, CHUNK // (tokens * max(tokens, d_in, d_out)))


def unit(factor: FactorSum) -> tuple[Tensor, ...]:
    """A factor of Frobenius norm 1, tile by tile; zero where it is zero."""
    norm = math.sqrt(sum(float(tile.square().sum()) for tile in factor.tiles))
    return tuple(tile / (norm or 1.0) for tile in factor.tiles)


class GradientFactorSums(FactorSums):
    """Gathers A and G of per-example gradients; each factor is one block's.

    Args:
        others: factor -> A' or G', tile by tile, as :func:`unit` gives them: of each block the
            other side's of what is gathered. ``None`` for the identity.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        dtype: torch.dtype,
        device: torch.device,
        max_factor_dim: int | None = None,
        only: frozenset[str] | None = None,
        others: Mapping[str, tuple[Tensor, ...]] | None = None,
    ) -> None:
        super().__init__(blocks, dtype, device, max_factor_dim, only)
        self._others = {
            name: tuple(tile.to(device, self.dtype) for tile in tiles)
            for name, tiles in (others or {}).items()
        }
        self._axes = own_axes(blocks)

    def add(self, draws: Sequence[Captured], counts: bool = True) -> Results:
        if not counts:
            return {}
        for captured in of_fit(draws):
            rotations = Rotations(captured, self._axes, tuple(self._blocks), self.dtype)
            for block in self._blocks:
                mine = {block.input_factor, block.output_factor} & self._tiles.keys()
                rows = captured.rows.get(block.input_factor, 0) if captured.first_draw else 0
                for name in mine:
                    self.count(name, captured.batch.size, rows)
                if mine:
                    self._add_block(block, rotations, captured.columns)
        return {}

    def _add_block(self, block: Block, rotations: Rotations, columns: Mapping[str, Tensor]) -> None:
        """Add one draw's gradients of a block to its two sums, as far as they are gathered."""
        rows = rotations.rows(block)
        if rows is None:
            return
        a, g = rows
        sides = block.output_factor, block.input_factor
        tokens, widths = a.shape[1], (a.shape[-1], block.d_out)
        if a.ndim == 3 and through_rows(tokens, *widths, *map(self._widest, sides[::-1])):
            step = rows_together(tokens, *widths)
            for start in range(0, len(a), step):
                part = slice(start, start + step)
                self._add_rows(*sides, g[part], a[part], columns)
                self._add_rows(*sides[::-1], a[part], g[part], columns)
            return
        for _, m_NOI in rotations.gradients(block):
            self._add_gradients(*sides, m_NOI.mT, columns)
            self._add_gradients(*sides[::-1], m_NOI, columns)

    def _widest(self, name: str) -> int:
        """Width of a factor's widest tile; 1 of what is diagonal, or not gathered."""
        parts = (total.part for total in self._tiles.get(name, ()))
        return max((len(part) for part in parts if part.ndim == 2), default=1)

    def _add_rows(
        self, name: str, other: str, x_NTX: Tensor, y_NTY: Tensor, columns: Mapping[str, Tensor]
    ) -> None:
        """Add ``Σ xᵀ (y Y' yᵀ) x`` to a factor, Y' being that of the other side."""
        if name in self._tiles:
            k_NTT = outer(self._times(other, y_NTY, columns).mT, y_NTY.mT)
            left = outer(k_NTT, x_NTX)
            self._add(name, left.flatten(0, 1), x_NTX.flatten(0, 1), columns.get(name))

    def _add_gradients(
        self, name: str, other: str, m_NYX: Tensor, columns: Mapping[str, Tensor]
    ) -> None:
        """Add ``Σ mᵀ Y' m`` to a factor, Y' being that of the other side."""
        if name in self._tiles:
            right = m_NYX.flatten(0, 1)
            left = right
            if other in self._others:
                left = self._times(other, m_NYX.mT, columns).mT.flatten(0, 1)
            self._add(name, left, right, columns.get(name))

    def _times(self, name: str, x: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        """``x A'`` or ``x G'`` along the last axis, of which A' has these columns alone."""
        tiles = self._others.get(name, ())
        if name in columns and tiles:
            tiles = (tiles[0].index_select(0, columns[name]),)
        return times_tiles(x, tiles)
