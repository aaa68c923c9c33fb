"""What the driver collects from a pass, example by example, and how it leaves it in Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raycurv.driver.corpus import PART, Corpus, part_file
from raycurv.files.store import Store
from raycurv.files.tables import as_lists, examples_schema, read_table, write_table
from raycurv.mathematics.gradient_statistics import BLOCK_NORMS
from raycurv.mathematics.sums import Results

# Numbers that may wait in memory for the next commit.
_FULL = 8_000_000
# Arrays on a pile that become one.
_SMALL = 256

Array = np.ndarray[Any, Any]


class Pile:
    """Arrays of like rows, until they are written: few objects, however many are put on it."""

    def __init__(self) -> None:
        self._parts: list[Array] = []
        self._small = 0

    def put(self, rows: Array) -> None:
        """Put some rows on it; they are copied in the end."""
        self._parts.append(rows)
        self._small += 1
        if self._small == _SMALL:
            self._parts[-_SMALL:] = [np.concatenate(self._parts[-_SMALL:])]
            self._small = 0

    def whole(self) -> Array:
        """All rows in one array, in the order in which they were put on the pile."""
        if len(self._parts) > 1:
            self._parts, self._small = [np.concatenate(self._parts)], 0
        return self._parts[0]


class Sink:
    """Takes the results of a pass, microbatch by microbatch, in order; this one keeps nothing, for
    where other groups of stages have their part of the results still to add."""

    @property
    def full(self) -> bool:
        """Whether so much waits that it should be committed now."""
        return False

    def take(self, members: Sequence[int], results: Results) -> None:
        """Take what all stages found of the examples ``members``."""

    def commit(self, name: str) -> list[str]:
        """Write what was taken since the last commit; gives the files' names."""
        return []

    def forget(self) -> None:
        """Drop what was taken since the last commit: it will be given again."""


class Rows(Sink):
    """A sink that keeps piles of rows by name until its next commit."""

    def __init__(self) -> None:
        self._piles: dict[str, Pile] = {}
        self._size = 0

    @property
    def full(self) -> bool:
        return self._size > _FULL

    def forget(self) -> None:
        self._piles, self._size = {}, 0

    def _put(self, name: str, rows: Array) -> None:
        self._piles.setdefault(name, Pile()).put(rows)
        self._size += rows.size


class ExampleRows(Rows):
    """Losses, squared gradient norms (by block as well), drawn labels and correct predictions.

    Args:
        lengths: tokens of every example, to cut padding off labels drawn for each; ``None`` where
            labels are not one a token.
    """

    def __init__(self, store: Store, lengths: Array | None) -> None:
        super().__init__()
        self._store, self._lengths = store, lengths

    def take(self, members: Sequence[int], results: Results) -> None:
        self._put("index", np.array(members, np.int64))
        for name in ("loss", "gradient_sq_norm", "correct", BLOCK_NORMS):
            if name in results:
                self._put(name, results[name].numpy())
        drawn = results.get("drawn")
        if drawn is None:
            return
        for i, n in enumerate(members):
            y = drawn[:, i].numpy()
            if self._lengths is not None:
                y = y[:, : self._lengths[n]]
            self._put("drawn", y.reshape(-1))
            self._put("shape", np.array([y.shape], np.int32))

    def commit(self, name: str) -> list[str]:
        if not self._piles:
            return []
        index = self._piles["index"].whole()
        columns: dict[str, Any] = {"index": index}
        for key in ("loss", "gradient_sq_norm"):
            columns[key] = self._column(key, pa.float64(), len(index))
        columns["drawn"], columns["shape"] = self._drawn(len(index))
        columns["correct"] = self._column("correct", pa.int32(), len(index))
        if BLOCK_NORMS in self._piles:
            columns[BLOCK_NORMS] = as_lists(self._piles[BLOCK_NORMS].whole(), pa.float64())
        else:
            columns[BLOCK_NORMS] = pa.nulls(len(index), pa.list_(pa.float64()))
        write_table(self._store, f"{name}/rows.parquet", pa.table(columns))
        self.forget()
        return [f"{name}/rows.parquet"]

    def _column(self, name: str, number: pa.DataType, count: int) -> pa.Array:
        if name not in self._piles:
            return pa.nulls(count, number)
        return pa.array(self._piles[name].whole()).cast(number)

    def _drawn(self, count: int) -> tuple[pa.Array, pa.Array]:
        """The labels of every example in one list, and their shapes."""
        if "drawn" not in self._piles:
            return pa.nulls(count), pa.nulls(count, pa.list_(pa.int32()))
        shapes = self._piles["shape"].whole()
        offsets = np.concatenate([[0], np.cumsum(shapes.prod(axis=1, dtype=np.int64))])
        values = pa.array(self._piles["drawn"].whole())
        lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
        return lists, as_lists(shapes, pa.int32())


def rows_by_part(store: Store, names: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """Rows of a pass, a part of the data at a time, in the data's order.

    A pass goes through the windows of the data in order, so the rows of a part stand together.
    """
    held: list[pa.Table] = []
    part = 0

    def whole() -> pa.Table:
        return pa.concat_tables(held, promote_options="permissive").sort_by("index")

    for name in names:
        table = read_table(store, name)
        while len(table):
            inside = pc.less(table["index"], (part + 1) * PART)
            mine = table.filter(inside)
            rest = table.filter(pc.invert(inside))
            held.append(mine)
            if len(rest):
                yield part, whole()
                held, part = [], part + 1
            table = rest
    if held:
        yield part, whole()


def write_examples(
    store: Store,
    names: Sequence[str],
    corpus: Corpus,
    double: bool,
    notes: dict[str, str],
    before: int = 0,
) -> None:
    """``tables/examples`` from a pass's rows, one file a part of the data, behind so many files of
    other rows."""
    schema = examples_schema(double)
    for part, table in rows_by_part(store, names):
        index = table["index"].to_numpy()
        columns = {"id": corpus.named(index), "tokens": corpus.lengths[index]}
        for key in ("loss", "gradient_sq_norm"):
            columns[key] = table[key].cast(schema.field(key).type)
        rows = pa.table(columns, schema=schema)
        write_table(store, part_file("tables/examples", before + part), rows, notes)
