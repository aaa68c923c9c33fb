"""Gradient statistics of a fit: what is missing of them, what gathers it, and their tables.

    any pass -> gradients/                 one file a block
             -> work/gradient_norms/       norms of the examples, a group of stages each
    tables   -> tables/gradients, tables/gradient_norms

They are gathered beside the first pass that goes through a group of stages, or in a pass of their
own where no other is due.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from raycurv.driver.corpus import PART, Corpus
from raycurv.driver.pipeline import NoSink, Sink
from raycurv.driver.settings import DTYPES, FitSettings, identity
from raycurv.driver.sinks import as_lists, rows_by_part
from raycurv.driver.sweep import Task
from raycurv.errors import DamagedFile
from raycurv.files.artifacts import gradient_file
from raycurv.files.block_rows import GRADIENTS_FILE, write_gradients
from raycurv.files.store import Store
from raycurv.files.tables import (
    footer,
    gradient_norms_schema,
    read_rows,
    read_table,
    write_table,
)
from raycurv.files.tensorfile import whole
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.gradient_statistics import BLOCK_NORMS
from raycurv.mathematics.loss.differentiation import Target
from raycurv.stages.passes import ReplayPass
from raycurv.steps.gradient_pass import GradientPass, JointPass

_NORMS = "tables/gradient_norms"


class Gradients:
    """The gradient statistics of a fit.

    Args:
        settings: of the fit.
        store: of the run.
        corpus: its examples.
        groups: how many groups of stages there are.
    """

    def __init__(self, settings: FitSettings, store: Store, corpus: Corpus, groups: int) -> None:
        self._settings, self._store, self._corpus = settings, store, corpus
        self._groups = groups

    @property
    def wanted(self) -> bool:
        """Whether they are asked for at all."""
        return self._settings.gradients

    def lacking(self, group: int, blocks: Sequence[Block]) -> bool:
        """Whether a group of stages, with these blocks, has yet to gather anything."""
        if not (self.wanted and blocks):
            return False
        return bool(self._missing(blocks)) or not (self._norms_there() or self._kept(group, blocks))

    def target(self, fitted: Target, lacking: bool) -> Target:
        """What a pass differentiates if the curvature is fitted to ``fitted``.

        The data's own labels, too, where something is lacking; and in all passes of a sweep, since
        they read each other's gradients from the spool.
        """
        lacking = lacking or (self.wanted and self._groups > 1)
        return "both" if lacking and fitted == "sampled" else fitted

    def beside(
        self, task: Task, blocks: Sequence[Block], rows: Sink
    ) -> tuple[Task, frozenset[str], frozenset[str]]:
        """The task with what these blocks lack gathered as well, or alone instead of a replay.

        Args:
            rows: takes the results of a task that has no sink.

        Returns:
            the task; names of what its stages sum up; and of what else is among its rows.
        """
        missing = self._missing(blocks)
        dtype = DTYPES["float64" if self._settings.dtype == "float64" else "float32"]
        gradients = GradientPass(
            self._store, missing, task.work.target, self._settings.draws, dtype
        )
        alone = isinstance(task.work, ReplayPass)
        task = replace(
            task,
            work=gradients if alone else JointPass(task.work, gradients),
            sink=rows if isinstance(task.sink, NoSink) else task.sink,
        )
        sums = frozenset(f"gradients of {name}" for name in missing)
        return task, sums, frozenset({"gradient norms"})

    def keep(self, group: int, blocks: Sequence[Block], names: Sequence[str]) -> None:
        """Keep the norms among a pass's rows until those of all groups are there."""
        place = _place(group)
        self._store.delete_directory(place)
        for part, table in rows_by_part(self._store, names):
            norms = table.select(["index", BLOCK_NORMS])
            write_table(self._store, _part_file(place, part), norms)
        self._store.write_json(_blocks_file(group), [block.name for block in blocks])

    def tables_there(self) -> bool:
        """Whether both tables are there, if they are asked for."""
        if not self.wanted:
            return True
        try:
            return self._norms_there() and read_rows(self._store, GRADIENTS_FILE) > 0
        except (DamagedFile, FileNotFoundError):
            return False

    def write_tables(self, groups: Sequence[Sequence[Block]]) -> dict[str, Any]:
        """Both tables, when nothing is lacking; gives the numbers of all blocks together.

        Args:
            groups: the blocks of each group of stages.
        """
        said = identity(self._settings)
        if not self._norms_there():
            self._write_norms(groups, said)
        return write_gradients(self._store, [b for some in groups for b in some], footer(said))

    def _write_norms(self, groups: Sequence[Sequence[Block]], said: dict[str, Any]) -> None:
        """The norms of all groups side by side, one file a part of the data."""
        double = self._settings.dtype == "float64"
        schema, store = gradient_norms_schema(double), self._store
        widths = {group: len(blocks) for group, blocks in enumerate(groups) if blocks}
        notes = footer(said, blocks=[block.name for blocks in groups for block in blocks])
        store.delete_directory(_NORMS)
        for part in range(-(-len(self._corpus) // PART)):
            tables = {g: read_table(store, _part_file(_place(g), part)) for g in widths}
            index = next(iter(tables.values()))["index"].to_numpy()
            norms_NB = np.concatenate([_matrix(tables[g], widths[g]) for g in widths], axis=1)
            number = schema.field("sq_norm").type
            rows = pa.table(
                {
                    "id": self._corpus.named(index),
                    "sq_norm": pa.array(norms_NB.sum(axis=1)).cast(number),
                    BLOCK_NORMS: as_lists(norms_NB, number),
                },
                schema=schema,
            )
            write_table(store, _part_file(_NORMS, part), rows, notes)

    def _missing(self, blocks: Sequence[Block]) -> frozenset[str]:
        """Names of the blocks that lack a file."""
        return frozenset(b.name for b in blocks if not whole(self._store, gradient_file(b.name)))

    def _kept(self, group: int, blocks: Sequence[Block]) -> bool:
        """Whether the norms of these very blocks are kept."""
        said = self._store.read_json(_blocks_file(group))
        if said != [block.name for block in blocks]:
            return False
        return self._rows_there(_place(group))

    def _norms_there(self) -> bool:
        return self._rows_there(_NORMS)

    def _rows_there(self, place: str) -> bool:
        names = self._store.names(place, ".parquet")
        try:
            return sum(read_rows(self._store, name) for name in names) == len(self._corpus)
        except DamagedFile:
            return False


def _place(group: int) -> str:
    return f"work/gradient_norms/group-{group:04d}"


def _blocks_file(group: int) -> str:
    return f"{_place(group)}/blocks.json"


def _part_file(place: str, part: int) -> str:
    return f"{place}/part-{part:05d}.parquet"


def _matrix(table: pa.Table, width: int) -> np.ndarray[Any, Any]:
    """The norms of a group's blocks, ``[N, B]``."""
    flat = np.asarray(table[BLOCK_NORMS].combine_chunks().flatten())
    return flat.reshape(len(table), width)
