"""Parquet files as parts of a source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raycurv.data.bounds import CHUNK_BYTES, CHUNK_ROWS, check_expansion
from raycurv.data.class_names import class_names_of
from raycurv.data.conversations import keys_of
from raycurv.data.parquet_sizes import group_sizes
from raycurv.data.parts import FilePart
from raycurv.data.rows import Rows, arrow_rows, not_what_it_says, present, unreadable

READ_BYTES = 4 << 20  # read of a column of a Parquet file at once
PARQUET = "a Parquet file"


@dataclass(frozen=True)
class ParquetPart(FilePart):
    """A Parquet file, read row group by row group within the bounds of its metadata."""

    def columns(self) -> tuple[str, ...] | None:
        with self._open() as (file, _):
            return tuple(self._names(file)) if file.metadata.num_rows else None

    def message_keys(self, name: str) -> tuple[str, ...]:
        with self._open() as (file, _):
            return keys_of(file.schema_arrow.field(self._names(file).index(name)).type)

    def class_names(self, name: str) -> tuple[str, ...]:
        with self._open() as (file, _):
            schema = file.schema_arrow
            return class_names_of(schema, schema.names[self._names(file).index(name)])

    def count(self, at_most: int | None = None) -> int:
        with self._open() as (file, _):
            return int(file.metadata.num_rows)

    def _names(self, file: Any) -> list[str]:
        return self.names.ours(file.schema_arrow.names, self.location)

    def read(self, required: Sequence[str], optional: Sequence[str]) -> Iterator[Rows]:
        with self._open() as (file, size):
            metadata, schema, ours = file.metadata, file.schema_arrow, self._names(file)
        theirs = dict(zip(ours, schema.names, strict=True))
        names = [theirs[name] for name in present(ours, required, optional)]
        step = self._step(names) if names else CHUNK_ROWS
        # A text that the file has once for many rows stays so until a chunk of them is asked for.
        texts = [name for name in names if _is_text(schema, name)]
        others, first = frozenset(ours), 0
        with self._open(texts, metadata) as (file, _), not_what_it_says(self.location, PARQUET):
            for batch in file.iter_batches(step, columns=names):
                given = [ours[schema.names.index(name)] for name in batch.schema.names]
                batch = batch.rename_columns(given)
                yield from arrow_rows(self.location, first, batch, others, size)
                first += batch.num_rows

    @contextmanager
    def _open(self, texts: Sequence[str] = (), metadata: Any = None) -> Iterator[tuple[Any, int]]:
        """The file and its size in bytes; of ``texts`` equal ones are read once."""
        with unreadable(self.location):
            file = self.filesystem.open_input_file(self.path)
        with file:
            with not_what_it_says(self.location, PARQUET):
                # Neither the whole file ahead nor a whole row group, which may be all of it.
                parquet = pq.ParquetFile(
                    file, pre_buffer=False, buffer_size=READ_BYTES, read_dictionary=list(texts),
                    metadata=metadata,
                )  # fmt: skip
            yield parquet, int(file.size())

    def _step(self, names: Sequence[str]) -> int:
        """How many rows of these columns to read at a time; UserError for a row group that takes
        far more memory than it has bytes in the file."""
        step = CHUNK_ROWS
        with unreadable(self.location):
            file = self.filesystem.open_input_file(self.path)
        with file, not_what_it_says(self.location, PARQUET):
            size = int(file.size())
            for number, group in enumerate(group_sizes(file, size, names)):
                check_expansion(
                    f"{self.location}, row group {number}", group.decoded, group.stored,
                    "Write it with smaller row groups (pyarrow.parquet.write_table(table, path, "
                    "row_group_size=100)), and long examples as several.",
                )  # fmt: skip
                step = min(step, CHUNK_BYTES * group.rows // max(group.decoded, 1))
                # Each text may be as long as all of what it repeats.
                step = min(step, CHUNK_BYTES // max(group.longest, 1))
        return max(step, 1)


def _is_text(schema: Any, name: str) -> bool:
    if schema.names.count(name) != 1:
        return False
    kind = schema.field(name).type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
