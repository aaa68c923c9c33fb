"""Exact per-example gradients of a block, in any basis, without ever keeping many of them.

    ∇W = Σ_t g_t a_tᵀ                  [O, I], t over tokens, calls, or output positions
    Q_Gᵀ ∇W Q_A = Σ_t (Q_Gᵀ g_t)(Q_Aᵀ a_t)ᵀ

Axis letters as in :mod:`raycurv.mathematics.capture`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Captured
from raycurv.mathematics.eigen import Eigenbasis
from raycurv.mathematics.products import outer
from raycurv.mathematics.sums import RunningSum

# Elements of the per-example gradients that are formed at once, where whole ones are needed
# (float32: 8 MiB), and where parts will do: those stay in the cache while they are used.
CHUNK, PIECE = 2**21, 2**20
# Squared norm of each example's gradient, [N] float64, among the results of a pass.
SQUARED_NORM = "gradient_sq_norm"


def rotate_before(
    tokens: int, d_in: int, d_out: int, tile_in: int, tile_out: int, sharing: int
) -> bool:
    """Whether rotating rows before the outer product takes fewer FLOPs than rotating the gradient.

    Args:
        tokens: rows of an example.
        tile_in, tile_out: widths of the bases' tiles (the axis itself when it is not cut).
        sharing: how many blocks use the rotated input.
    """
    before = tokens * (d_in * tile_in / sharing + d_out * tile_out)
    return before < d_in * d_out * (tile_in + tile_out)


def example_gradients(a: Tensor, g: Tensor) -> Tensor:
    """``[N, O, I]`` from ``a [N, T, I]`` and ``g [N, T, O]``, or a grouped ``a [N, T, S, I]``."""
    if a.ndim == 3:
        return outer(g, a)
    examples, _, groups, width = a.shape
    g = g.unflatten(2, (groups, -1))
    return torch.einsum("ntso,ntsi->nsoi", g, a).reshape(examples, -1, width)


def spread(m_NOI: Tensor, columns: Tensor | None, width: int) -> Tensor:
    """Matrices of some columns with zeros in the others, ``[N, O, width]``."""
    if columns is None:
        return m_NOI
    return m_NOI.new_zeros(*m_NOI.shape[:-1], width).index_copy_(-1, columns, m_NOI)


class Rotations:
    """One microbatch's rows for many blocks; an input that several blocks share is turned once.

    Args:
        bases: factor -> eigenbasis.
        blocks: the blocks that will be asked for.
        dtype: to compute in: float64 for float64 models, otherwise float32.
        together: take all examples as one, whose gradient is the sum of theirs.
    """

    def __init__(
        self,
        captured: Captured,
        bases: dict[str, Eigenbasis],
        blocks: tuple[Block, ...],
        dtype: torch.dtype,
        together: bool = False,
    ) -> None:
        self._captured = captured
        self._bases = bases
        self._dtype = dtype
        self._together = together
        self._sharing: dict[str, int] = {}
        for block in blocks:
            self._sharing[block.input_factor] = self._sharing.get(block.input_factor, 0) + 1
        self._turned: dict[str, Tensor] = {}
        self._latest: tuple[str, Tensor] | None = None

    @property
    def examples(self) -> int:
        """How many gradients there are of each block."""
        return 1 if self._together else self._captured.batch.size

    @property
    def device(self) -> torch.device:
        return self._captured.batch.inputs.device

    def rows(self, block: Block) -> tuple[Tensor, Tensor] | None:
        """``a`` and ``g`` as captured, in the dtype to compute in; ``None`` without a gradient."""
        g = self._captured.gradients[block.name]
        if g is None:
            return None
        a, g = self._captured.inputs[block.input_factor].to(self._dtype), g.to(self._dtype)
        if self._together:
            return a.flatten(0, 1)[None], g.flatten(0, 1)[None]
        return a, g

    def columns(self, block: Block) -> Tensor | None:
        """Numbers of the input columns that a block's rows and gradients have; ``None`` for all."""
        return self._captured.columns.get(block.input_factor)

    def turned_rows(self, block: Block) -> tuple[Tensor, Tensor] | None:
        """``a`` and ``g`` in the eigenbasis, where the block's shape makes that the cheaper way.

        ``None`` where it does not, or where no gradient arrived.
        """
        rows = self.rows(block)
        if rows is None or rows[0].ndim == 4:
            return None
        tokens, width = rows[0].shape[1:]
        left, right = self._bases[block.output_factor], self._bases[block.input_factor]
        sharing = self._sharing[block.input_factor]
        tile_in, tile_out = max(right.tiles, default=0), max(left.tiles, default=0)
        if not rotate_before(tokens, width, block.d_out, tile_in, tile_out, sharing) and (
            tile_in or tile_out
        ):
            return None
        return self.rotated(block)

    def rotated(self, block: Block) -> tuple[Tensor, Tensor] | None:
        """``a`` and ``g`` in the eigenbasis, be it the cheaper way or not.

        A block's own may be asked for twice in a row, and are turned once.
        """
        rows = self.rows(block)
        if rows is None:
            return None
        a, g = rows
        if block.input_factor not in self._turned:
            self._turned[block.input_factor] = self._rotate(block.input_factor, a, block)
        if self._latest is None or self._latest[0] != block.name:
            self._latest = block.name, self._rotate(block.output_factor, g, block)
        return self._turned[block.input_factor], self._latest[1]

    def _rotate(self, factor: str, rows: Tensor, block: Block) -> Tensor:
        """Rows ``[N, T, X]`` in the basis of a factor."""
        live = self._captured.live.get(block.input_factor)
        if live is None or not self._bases[factor].tiles:
            return self._bases[factor].rotate(rows)
        flat = rows.flatten(0, 1)
        turned = self._bases[factor].rotate(flat.index_select(0, live))
        return torch.zeros_like(flat).index_copy_(0, live, turned).view_as(rows)

    def gradients(self, block: Block) -> Iterator[tuple[slice, Tensor]]:
        """Per-example gradients in the eigenbasis, ``(examples, [n, O, I])`` a few at a time, of
        :meth:`columns` alone.

        The tensors are the caller's to change. Nothing is yielded where no gradient arrived.
        """
        rows = self.rows(block)
        if rows is None:
            return
        turned = self.turned_rows(block)
        a, g = rows if turned is None else turned
        step = max(1, CHUNK // (a.shape[-1] * block.d_out))
        left, right = self._bases[block.output_factor], self._bases[block.input_factor]
        for start in range(0, len(a), step):
            part = slice(start, min(start + step, len(a)))
            m_NOI = example_gradients(a[part], g[part])
            if turned is None:
                m_NOI = right.rotate(m_NOI)
                m_NOI = left.rotate(m_NOI.transpose(1, 2)).transpose(1, 2)
            yield part, m_NOI

    def pieces(self, block: Block) -> Iterator[tuple[slice, slice, Tensor]]:
        """The same in pieces: ``(examples, outputs, [n, o, I])``, for what looks at entries alone.

        Where rows are turned first, the gradient of a wide block never exists whole.
        """
        turned = self.turned_rows(block)
        if turned is None:
            for part, m_NOI in self.gradients(block):
                yield part, slice(0, block.d_out), m_NOI
            return
        a, g = turned
        at_once = max(1, PIECE // (a.shape[-1] * block.d_out))
        outputs = min(block.d_out, max(1, PIECE // a.shape[-1]))
        for start in range(0, block.d_out, outputs):
            rows = slice(start, min(start + outputs, block.d_out))
            for first in range(0, len(a), at_once):
                part = slice(first, min(first + at_once, len(a)))
                yield part, rows, example_gradients(a[part], g[part, :, rows])


def add_squares(running: RunningSum | None, rotations: Rotations, block: Block) -> Tensor:
    """Add the squares of all examples' gradients in the eigenbasis to ``running [O, I]``, if it is
    there; gives ``|∇W|² [N]``, float64."""
    turned, columns = rotations.turned_rows(block), rotations.columns(block)
    if turned is not None and turned[0].shape[1] == 1:
        # One row an example: the square of an outer product is the outer product of squares.
        a2, g2 = turned[0][:, 0].square(), turned[1][:, 0].square()
        if running is not None:
            running.add_outer(g2, a2, columns)
        return a2.sum(dim=1, dtype=torch.float64) * g2.sum(dim=1, dtype=torch.float64)
    norms = torch.zeros(rotations.examples, dtype=torch.float64, device=rotations.device)
    for part, outputs, m_NOI in rotations.pieces(block):
        squares = m_NOI.square_()
        norms[part] += squares.sum(dim=2).sum(dim=1, dtype=torch.float64)
        if running is not None:
            total = squares[0] if len(squares) == 1 else squares.sum(dim=0)
            running.add(total, outputs, columns)
    return norms
