"""The layout of a fit: which blocks read the same tensor and so share an input factor.

a group of stages and the first example that enters it -> work/layout/UNITS.json
all groups -> blocks.json
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from raycurv.batch import Batch, Hidden
from raycurv.driver.feed import Feed, Given
from raycurv.driver.workers import Workers
from raycurv.errors import DamagedFile
from raycurv.files.artifacts import (
    BLOCKS_FILE,
    read_block_list,
    read_blocks,
    write_block_list,
)
from raycurv.mathematics.blocks import Block
from raycurv.stages.pool import Handle, Pool, StageLost


class SharedInputs:
    """Looks at one group of stages after the other, by the first example of a feed."""

    def __init__(self, workers: Workers, feed: Feed) -> None:
        self._store, self._workers, self._feed = workers.store, workers, feed

    @property
    def known(self) -> bool:
        """Whether all groups were looked at."""
        return self._store.exists(BLOCKS_FILE)

    def read(self, chosen: tuple[Block, ...]) -> tuple[Block, ...]:
        """The blocks with their factors; DamagedFile if they are not those that were chosen."""
        there = read_blocks(self._store)
        if _nameless(there) != _nameless(chosen):
            raise DamagedFile(
                self._store.path(BLOCKS_FILE), "the blocks of the model", "others",
                "Delete it and run the command again.",
            )  # fmt: skip
        return there

    def meet(self, group: int, given: Given) -> None:
        """Look at a resident group, by the first example that enters it."""
        name = self._part(group)
        if self._store.exists(name):
            return
        pool, where = self._workers.pool, self._workers.named(group)
        with self._workers.phase("layout", pool.stages, "stages", where) as phase:
            # The first of a microbatch is its longest: alone, it is as long as all of them.
            batch = pool.put(self._feed.read(0, self._feed.plan[0][:1]))
            first_hidden = None
            if given.hidden is not None:
                first_hidden = pool.put(tuple(tensor[:1] for tensor in given.hidden))
            while True:
                try:
                    mine = _discovered(pool, batch, first_hidden)
                    break
                except StageLost as lost:
                    pool.repair(0, lost)
            phase.advance(pool.stages)
        write_block_list(self._store, name, mine)

    def write(self) -> tuple[Block, ...]:
        """``blocks.json``, from what was seen of every group."""
        found = tuple(
            block
            for group in range(len(self._workers.groups))
            for block in read_block_list(self._store, self._part(group))
        )
        write_block_list(self._store, BLOCKS_FILE, found)
        self._store.delete_directory("work/layout")
        return found

    def _part(self, group: int) -> str:
        # Groups may be cut anew while some have been looked at.
        stages, cuts = self._workers.groups[group], self._workers.cuts
        start, stop = cuts[stages.start].start, cuts[stages.stop - 1].stop
        return f"work/layout/units-{start:04d}-{stop:04d}.json"


def _discovered(pool: Pool, batch: Handle[Batch], hidden: Handle[Hidden] | None) -> list[Block]:
    """The blocks of the resident stages, as one example that goes through them shows them."""
    found = []
    for stage in range(pool.stages):
        hidden, blocks = pool.at(stage).discover(batch, hidden)
        found.append(blocks)
    return [block for handle in found for block in pool.get(handle)]


def _nameless(blocks: Iterable[Block]) -> set[Block]:
    return {dataclasses.replace(block, input_factor="") for block in blocks}
