"""Diagonal tiles of a wide axis: a factor wider than ``max_factor_dim`` is cut into equal runs.

Its basis is then block-diagonal, which is still orthonormal, so the corrected eigenvalues are
fitted in it as in any other (Grosse et al. 2023, appendix A).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.products import rows_times

# Narrower tiles would save nothing, and lose what a factor is there for.
SMALLEST_TILE = 8
# 32-bit LAPACK indexes d*d elements with a signed 32-bit integer in its workspace queries.
LARGEST_EIGH = 32_766


def tile_widths(width: int, max_factor_dim: int | None) -> tuple[int, ...]:
    """Widths of the tiles of an axis, as equal as they can be, none above ``max_factor_dim``."""
    count = -(-width // (max_factor_dim or width))
    small, larger = divmod(width, count)
    return (small + 1,) * larger + (small,) * (count - larger)


def tile_ranges(widths: Iterable[int]) -> tuple[range, ...]:
    """Which indices of the axis each tile holds."""
    stops = list(accumulate(widths, initial=0))
    return tuple(range(start, stop) for start, stop in pairwise(stops))


def times_tiles(x: Tensor, tiles: Sequence[Tensor]) -> Tensor:
    """``x B`` along the last axis, B having these ``[t, t]`` on its diagonal, or being the ``[d]``
    of a diagonal matrix; without tiles the identity."""
    if not tiles:
        return x
    if tiles[0].ndim == 1:
        return x * tiles[0]
    if len(tiles) == 1:
        return rows_times(x, tiles[0])
    parts = x.split([len(tile) for tile in tiles], dim=-1)
    return torch.cat([rows_times(p, tile) for p, tile in zip(parts, tiles, strict=True)], dim=-1)


def decomposable(
    blocks: Sequence[Block], max_factor_dim: int | None, vocabulary: int | None
) -> tuple[Block, ...]:
    """The blocks with a diagonal factor on the side of a vocabulary that nothing can decompose
    whole, where tiles are not asked for.

    Raises:
        UserError: another axis of a block is as wide; it is named.
    """
    if max_factor_dim is not None:
        return tuple(blocks)
    found = []
    for block in blocks:
        if block.d_out == vocabulary and block.d_out > LARGEST_EIGH:
            block = replace(block, output_diagonal=True)
        found.append(block)
        for side, width, diagonal in (
            ("input", block.d_in, block.input_diagonal),
            ("output", block.d_out, block.output_diagonal),
        ):
            if width > LARGEST_EIGH and not diagonal:
                raise UserError(
                    f"block {block.name}",
                    f"an {side} axis of at most {LARGEST_EIGH:,}, or tiles of it",
                    f"{width:,}, wider than LAPACK decomposes",
                    f"Give --max-factor-dim, {-(-width // 4)} say, to cut it into diagonal tiles, "
                    f"or leave the block out: --blocks '!{block.name}'.",
                )
    return tuple(found)
