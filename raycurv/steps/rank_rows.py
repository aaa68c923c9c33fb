"""The rows of a rank-m Fisher (M-FAC) of every block, into ``rows/``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from raycurv.files.row_files import rows_file, write_rows
from raycurv.files.store import Store
from raycurv.files.tensorfile import whole
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.rank.rank_fisher import RowSum, RowSums
from raycurv.mathematics.sums import Combine
from raycurv.steps.step import PassStep


@dataclass(frozen=True)
class RowGatherer:
    """Gathers the rows of rank-m Fishers into ``rows/``.

    Attributes:
        store: of the run.
        only: the blocks to gather; squared gradient norms are over all blocks regardless.
        count: how many rows.
        store_dtype: of the written rows.
    """

    store: Store
    only: frozenset[str]
    count: int
    store_dtype: torch.dtype
    name: str = "rows"

    @property
    def results(self) -> Mapping[str, Combine]:
        return RowSums.results

    def open(self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device) -> RowSums:
        return RowSums(blocks, self.count, dtype, device, self.only)

    def write(self, name: str, result: RowSum, blocks: Mapping[str, Block]) -> None:
        write_rows(self.store, blocks[name], result, self.store_dtype)


class RankRows(PassStep):
    """Rows of gradients, and every example's squared gradient norm."""

    name = "rows"
    pass_name = "rows"
    label = "gradients"

    def lacking(self, group: int) -> bool:
        # Norms come from all groups.
        return self.carries() or bool(self.sums(group))

    def carries(self) -> bool:
        return not self.fit.examples_there()

    def sums(self, group: int) -> frozenset[str]:
        names = (block.name for block in self.fit.blocks_of(group))
        return frozenset(name for name in names if not whole(self.fit.store, rows_file(name)))

    def gatherers(self, group: int) -> tuple[RowGatherer, ...]:
        fit = self.fit
        return (RowGatherer(fit.store, self.sums(group), fit.rows, fit.store_dtype),)

    def again(self, group: int) -> tuple[RowGatherer, ...]:
        return tuple(replace(g, only=frozenset()) for g in self.gatherers(group))
