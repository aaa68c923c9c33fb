"""The rows of a block's rank-m Fisher (M-FAC), as a run keeps them.

rows/NAME.safetensors     rows.0, rows.1, … [M, o, I], runs of outputs; gram [M, M], counts [M]

Rows are √B times the mean gradient of B examples. A block's rows are as large as M weights, so they
lie in runs of outputs, which are read one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raycurv.errors import DamagedFile
from raycurv.files.store import Store
from raycurv.files.tensorfile import TensorFile, open_tensors, write_tensors
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import Damping
from raycurv.mathematics.rank.rank_fisher import RowSum, gram_of
from raycurv.mathematics.rank.rank_inverse import (
    RankInverse,
    RankInverses,
    rank_damping,
    rank_inverse,
)

# Elements of a run of outputs: in float64, as they are computed with, 64 MiB.
RUN = 2**23


@dataclass(frozen=True)
class BlockRows:
    """An opened file of rows.

    Attributes:
        block: whose rows they are.
        file: the file.
    """

    block: Block
    file: TensorFile

    @property
    def count(self) -> int:
        """How many rows there are, M."""
        found = self.file.noted("count")
        if found < 1 or found != int(found):
            raise self.file.store.damaged(self.file.name, "a count of rows", repr(found))
        return int(found)

    @property
    def size(self) -> int:
        """Columns: the block's parameters."""
        return self.block.d_out * self.block.d_in

    def gram(self) -> Tensor:
        """``GGᵀ`` over the block's columns, float64."""
        return self.file.numbers("gram", (self.count, self.count))

    def runs(self) -> Iterator[tuple[slice, Tensor]]:
        """Runs of outputs and their rows ``[M, o, I]``, in the order of the outputs."""
        start = number = 0
        while start < self.block.d_out:
            rows = self.file.numbers(f"rows.{number}", (self.count, None, self.block.d_in))
            stop, number = start + rows.shape[1], number + 1
            if not start < stop <= self.block.d_out:
                got = f"{stop} with run {number - 1}"
                raise self.file.store.damaged(self.file.name, f"{self.block.d_out} outputs", got)
            yield slice(start, stop), rows
            start = stop

    def whole(self) -> Tensor:
        """``[M, O, I]``, of a small block."""
        return torch.cat([rows for _, rows in self.runs()], dim=1)

    def parts(self, inverse: RankInverse) -> Iterator[tuple[slice, Tensor, RankInverse]]:
        """Runs of outputs, their columns of G ``[M, N]``, and an inverse at these columns.

        Args:
            inverse: at the block's first column.
        """
        for outputs, rows in self.runs():
            yield outputs, rows.flatten(1), inverse.at(outputs.start * self.block.d_in)

    def project(self, values_QOI: Tensor, inverse: RankInverse) -> Tensor:
        """The block's share ``[Q, width]`` of what an inverse needs to know of matrices."""
        total = torch.zeros(len(values_QOI), inverse.width, dtype=torch.float64)
        for outputs, rows_MN, here in self.parts(inverse):
            total += here.project(rows_MN, values_QOI[:, outputs].flatten(1))
        return total


def rows_file(block: str) -> str:
    """Where a block's rows lie."""
    return f"rows/{block}.safetensors"


def write_rows(store: Store, block: Block, found: RowSum, dtype: torch.dtype) -> None:
    """Write a block's rows in ``dtype``, and the Gram of them as they were rounded."""
    count = len(found.counts_M)
    outputs = max(1, RUN // (count * block.d_in))
    runs = [
        found.rows(slice(at, at + outputs)).to(dtype).cpu() for at in range(0, block.d_out, outputs)
    ]
    gram = torch.stack([gram_of(run) for run in runs]).sum(dim=0)
    metadata = {
        "block": block.name,
        "count": str(count),
        "runs": str(len(runs)),
        "examples": str(found.examples),
        "trace": repr(float(gram.trace()) / count),
    }
    tensors: Mapping[str, Tensor] = {
        **{f"rows.{i}": run for i, run in enumerate(runs)},
        "gram": gram,
        "counts": found.counts_M,
    }
    write_tensors(store, rows_file(block.name), tensors, metadata)


def open_rows(store: Store, block: Block) -> BlockRows:
    """The rows of a block.

    Raises:
        DamagedFile: they are gone, or damaged.
    """
    try:
        file = open_tensors(store, rows_file(block.name))
    except FileNotFoundError as error:
        raise DamagedFile(
            f"{store.root}, block {block.name}", "the rows of its Fisher", str(error),
            "Run the fit again: it makes what is missing.",
        ) from error  # fmt: skip
    file.belongs("block", block.name)
    return BlockRows(block, file)


def open_inverses(
    store: Store, blocks: Sequence[Block], damping: Damping, joint: bool
) -> RankInverses:
    """The inverses of a fit's rank-m Fisher.

    Args:
        store: of the run.
        blocks: all of the fit, or those that are looked at.
        damping: λ, or the factor that makes it.
        joint: one of all these blocks together, instead of each block's own.

    Raises:
        UserError: λ is zero.
        NumericalError: λ is too small.
    """
    if not joint:
        return RankInverses({b.name: _inverse(store, (b,), damping) for b in blocks}, False)
    inverse = _inverse(store, blocks, damping)
    found: dict[str, RankInverse | None] = {}
    start = 0
    for block in blocks:
        found[block.name] = None if inverse is None else inverse.at(start)
        start += block.d_out * block.d_in
    return RankInverses(found, True)


def _inverse(store: Store, blocks: Sequence[Block], damping: Damping) -> RankInverse | None:
    opened = [open_rows(store, block) for block in blocks]
    gram, size = opened[0].gram(), sum(rows.size for rows in opened)
    for rows in opened[1:]:
        gram += rows.gram()
    where = f"block {blocks[0].name}" if len(blocks) == 1 else "the model's Fisher"
    lam = rank_damping(damping, gram, size, where)
    if lam == 0.0:
        return None
    # The rows themselves are needed where they are no larger than the Gram.
    small = size <= len(gram)
    matrix = torch.cat([r.whole().flatten(1) for r in opened], dim=1) if small else None
    return rank_inverse(gram, size, lam, where, matrix)
