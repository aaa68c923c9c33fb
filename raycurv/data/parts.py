"""Parts of a source: one file or one table in memory each, read in chunks of numbered rows.

A part names its columns, and hands out its rows in chunks whose memory is bounded (bounds.py),
always in data order. What a file says of itself is not believed: it is checked before it is
decoded, and what is decoded before it is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from raycurv.data.bounds import CHUNK_BYTES, CHUNK_ROWS
from raycurv.data.class_names import class_names_of
from raycurv.data.column_names import PLAIN, ColumnNames
from raycurv.data.conversations import keys_of
from raycurv.data.rows import Rows, arrow_rows, present, record_rows, unreadable
from raycurv.models.checkpoint import sampled_hash

# What a fingerprint looks at of each file: so many bytes, in so many windows.
SAMPLE_BYTES, SAMPLES = 256 << 10, 16


class Part(ABC):
    """One file, by its path below the data's root (``name``, with forward slashes), or one table in
    memory, whose name is empty. Messages call it by its ``location``."""

    name: str
    location: str
    names: ColumnNames = PLAIN
    """Of its columns: of those that are asked for, and of those that it hands out."""

    @abstractmethod
    def columns(self) -> tuple[str, ...] | None:
        """Names of the columns; ``None`` when the part has no rows."""

    @abstractmethod
    def message_keys(self, name: str) -> tuple[str, ...]:
        """The keys of the messages in a column of conversations; none in other columns."""

    @abstractmethod
    def read(self, required: Sequence[str], optional: Sequence[str]) -> Iterator[Rows]:
        """All rows with these columns; an optional one may be missing. UserError if the part is not
        what its name says, or a value is missing or null."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What tells this part from other ones, in JSON; UserError if it cannot be read."""

    def class_names(self, name: str) -> tuple[str, ...]:
        """Names of the classes that the whole numbers of a column stand for, where it says them."""
        return ()

    def count(self, at_most: int | None = None) -> int:
        """How many rows there are; or as many as have been seen when there are ``at_most``."""
        found = 0
        for rows in self.read((), ()):
            if at_most is not None and found >= at_most:
                break
            found += len(rows.numbers)
        return found


class BatchPart(Part):
    """A part of Arrow record batches of any size."""

    @abstractmethod
    def _batches(self) -> Iterator[Any]: ...

    @abstractmethod
    def _stored_bytes(self) -> int:
        """The bytes that stand for all rows."""

    def columns(self) -> tuple[str, ...] | None:
        for batch in self._batches():
            if batch.num_rows:
                return tuple(self.names.ours(batch.schema.names, self.location))
        return None

    def message_keys(self, name: str) -> tuple[str, ...]:
        for batch in self._batches():
            names = self.names.ours(batch.schema.names, self.location)
            return keys_of(batch.schema.field(names.index(name)).type)
        return ()

    def class_names(self, name: str) -> tuple[str, ...]:
        for batch in self._batches():
            names = self.names.ours(batch.schema.names, self.location)
            return class_names_of(batch.schema, batch.schema.names[names.index(name)])
        return ()

    def read(self, required: Sequence[str], optional: Sequence[str]) -> Iterator[Rows]:
        first, stored = 0, self._stored_bytes()
        for batch in self._batches():
            names = self.names.ours(batch.schema.names, self.location)
            chosen = batch.rename_columns(names).select(present(names, required, optional))
            yield from arrow_rows(self.location, first, chosen, frozenset(names), stored)
            first += batch.num_rows


class RecordPart(Part):
    """A part of mappings from column to value."""

    untyped: ClassVar[bool] = False
    """Whether all values are text, whatever they stand for."""

    @abstractmethod
    def _records(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Each record with the bytes that it was read from."""

    def columns(self) -> tuple[str, ...] | None:
        for _, record in self._named():
            return tuple(record)
        return None

    def message_keys(self, name: str) -> tuple[str, ...]:
        for _, record in self._named():
            value = record.get(name)
            if not isinstance(value, list) or value:  # an empty one says nothing of others
                return keys_of(value)
        return ()

    def _named(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Each record under raycurv's names, with its bytes."""
        if not self.names.theirs:
            yield from self._records()
            return
        for number, (size, record) in enumerate(self._records()):
            yield size, self.names.record(record, f"{self.location}, row {number}")

    def read(self, required: Sequence[str], optional: Sequence[str]) -> Iterator[Rows]:
        records: list[Mapping[str, Any]] = []
        first = pending = 0
        for size, record in self._named():
            records.append(record)
            pending += size
            if len(records) == CHUNK_ROWS or pending >= CHUNK_BYTES:
                yield self._rows(first, records, required, optional)
                first += len(records)
                records, pending = [], 0
        if records:
            yield self._rows(first, records, required, optional)

    def _rows(
        self,
        first: int,
        records: Sequence[Mapping[str, Any]],
        required: Sequence[str],
        optional: Sequence[str],
    ) -> Rows:
        rows = record_rows(self.location, first, records, required, optional)
        return replace(rows, untyped=self.untyped)


@dataclass(frozen=True)
class FilePart(Part):
    """A file that its ``filesystem`` (of ``pyarrow.fs``) calls ``path``."""

    name: str
    location: str
    path: str
    filesystem: Any
    names: ColumnNames = PLAIN

    def fingerprint(self) -> dict[str, Any]:
        """Its path below the data's root, its size in bytes and the hash of sampled ones."""
        with unreadable(self.location), self.filesystem.open_input_file(self.path) as file:

            def sample(start: int, length: int) -> bytes:
                file.seek(start)
                return bytes(file.read(length))

            size = int(file.size())
            digest = sampled_hash(size, sample, SAMPLES, SAMPLE_BYTES // SAMPLES)
        return {"path": self.name, "size": size, "hash": digest}
