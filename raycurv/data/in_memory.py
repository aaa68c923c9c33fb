"""Data in memory as parts of a source: tables, and lists of rows."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raycurv.data.bounds import CHUNK_ROWS
from raycurv.data.column_names import PLAIN, ColumnNames
from raycurv.data.parts import BatchPart, RecordPart
from raycurv.errors import UserError


@dataclass(frozen=True)
class TablePart(BatchPart):
    """Examples that are the rows of a ``pyarrow.Table``."""

    table: Any
    name: str = ""
    location: str = "the table"
    names: ColumnNames = PLAIN

    def _batches(self) -> Iterator[Any]:
        yield from self.table.to_batches()

    def _stored_bytes(self) -> int:
        return int(self.table.get_total_buffer_size())

    def fingerprint(self) -> dict[str, Any]:
        """The number of its rows, and the hash of all of its content."""
        digest, rows = hashlib.blake2b(digest_size=16), 0
        schema = self._schema().remove_metadata()
        with pa.ipc.new_stream(pa.PythonFile(_HashSink(digest), "w"), schema) as writer:
            for table in self._tables():
                # Taken, not sliced: chunks and what lies beside a slice are no part of the content.
                taken = table.take(pa.array(range(table.num_rows))).combine_chunks()
                writer.write_table(taken.replace_schema_metadata(None))
                rows += table.num_rows
        return {"rows": rows, "hash": digest.hexdigest()}

    def _schema(self) -> Any:
        return self.table.schema

    def _tables(self) -> Iterator[Any]:
        """The rows, ``CHUNK_ROWS`` at a time."""
        for first in range(0, self.table.num_rows, CHUNK_ROWS):
            yield self.table.slice(first, CHUNK_ROWS)


class _HashSink(io.RawIOBase):
    """A file that keeps only the hash of what was written to it."""

    def __init__(self, digest: Any) -> None:
        self._digest = digest

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return len(data)


@dataclass(frozen=True)
class RowsPart(RecordPart):
    """Examples that are a list of mappings, column -> value."""

    rows: Sequence[Mapping[str, Any]]
    name: str = ""
    location: str = "the list"
    names: ColumnNames = PLAIN

    def _records(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for number, row in enumerate(self.rows):
            if not isinstance(row, Mapping):
                raise UserError(
                    f"{self.location}, row {number}",
                    "a dict of columns",
                    f"a {type(row).__name__}",
                    "Give each example as a dict, for instance {'text': ...}.",
                )
            yield 0, row

    def fingerprint(self) -> dict[str, Any]:
        """The number of its rows, and the hash of all of its content."""

        digest = hashlib.blake2b(digest_size=16)
        for row in self.rows:
            digest.update(in_json(row, str))
        return {"rows": len(self.rows), "hash": digest.hexdigest()}


def in_json(row: Mapping[str, Any], other: Callable[[Any], Any]) -> bytes:
    """A row as a line of JSON, its keys in order.

    Args:
        other: makes JSON of a value that is neither that nor a tensor or an array.
    """

    def listed(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else other(value)

    return json.dumps(row, sort_keys=True, default=listed).encode() + b"\n"
