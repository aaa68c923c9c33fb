"""Parts of a source: one file or one table in memory each, read in chunks of numbered rows.

A part names its columns, and hands out its rows in chunks whose memory is bounded (``CHUNK_ROWS``
rows, about ``CHUNK_BYTES`` bytes), always in data order.
"""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from numbers import Integral
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from raycurv.data.columns import first_null
from raycurv.errors import UserError, user_errors
from raycurv.models.checkpoint import sampled_hash

CHUNK_ROWS = 1024
CHUNK_BYTES = 16 << 20
READ_BYTES = 4 << 20  # read of a column of a Parquet file at once
# What a fingerprint looks at of each file: so many bytes, in so many windows.
SAMPLE_BYTES, SAMPLES = 256 << 10, 16

# Values from JSON and from Python have no type of their own: text is given its, the rest is what
# pyarrow infers. (Given a type of whole numbers it would cut 1.5 down to 1 without a word.)
ROW_TYPES = {name: pa.large_string() for name in ("text", "prompt", "completion")}
TYPES_WANTED = {
    "text": "text",
    "prompt": "text",
    "completion": "text",
    "id": "strings or whole numbers",
    "input_ids": "lists of whole numbers",
    "inputs": "lists of numbers",
    "labels": "numbers or lists of numbers",
    "loss_mask": "lists of booleans",
}
CONVERSION_ERRORS = (pa.ArrowException, TypeError, ValueError, OverflowError)
READ_ERRORS = (pa.ArrowException, OSError)


@dataclass(frozen=True)
class Rows:
    """A chunk of rows of one part, as Arrow columns.

    Attributes:
        numbers: the rows' 0-based numbers within the part, ascending int64.
        columns: one Arrow array a column, as long as ``numbers``; null where a row does not have
            an optional column (an explicit null in the data has been refused by then).
    """

    location: str
    numbers: np.ndarray
    columns: dict[str, Any]

    def place(self, i: int) -> str:
        """Where row ``i`` of this chunk stands, for messages."""
        return f"{self.location}, row {self.numbers[i]}"

    def take(self, keep: np.ndarray) -> Rows:
        """The rows at the positions ``keep``."""
        taken = {name: column.take(pa.array(keep)) for name, column in self.columns.items()}
        return Rows(self.location, self.numbers[keep], taken)


class Part(ABC):
    """One file, by its path below the data's root (``name``, with forward slashes), or one table in
    memory, whose name is empty. Messages call it by its ``location``."""

    name: str
    location: str

    @abstractmethod
    def columns(self) -> tuple[str, ...] | None:
        """Names of the columns; ``None`` when the part has no rows."""

    @abstractmethod
    def read(self, required: Sequence[str], optional: Sequence[str]) -> Iterator[Rows]:
        """All rows with these columns; an optional one may be missing. UserError if the part is not
        what its name says, or a value is missing or null."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What tells this part from other ones, in JSON; UserError if it cannot be read."""


class _Batches(Part):
    """A part of Arrow record batches of any size."""

    @abstractmethod
    def _batches(self) -> Iterator[Any]: ...

    def columns(self) -> tuple[str, ...] | None:
        for batch in self._batches():
            if batch.num_rows:
                return tuple(batch.schema.names)
        return None

    def read(self, required: Sequence[str], optional: Sequence[str]) -> Iterator[Rows]:
        first = 0
        for batch in self._batches():
            chosen = batch.select(_present(batch.schema.names, required, optional))
            step = _chunk_rows(chosen.nbytes, chosen.num_rows)
            for start in range(0, chosen.num_rows, step):
                yield _arrow_rows(self.location, first + start, chosen.slice(start, step))
            first += batch.num_rows


class _Records(Part):
    """A part of mappings from column to value."""

    @abstractmethod
    def _records(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Each record with the bytes that it was read from."""

    def columns(self) -> tuple[str, ...] | None:
        for _, record in self._records():
            return tuple(record)
        return None

    def read(self, required: Sequence[str], optional: Sequence[str]) -> Iterator[Rows]:
        records: list[Mapping[str, Any]] = []
        first = pending = 0
        for size, record in self._records():
            records.append(record)
            pending += size
            if len(records) == CHUNK_ROWS or pending >= CHUNK_BYTES:
                yield _record_rows(self.location, first, records, required, optional)
                first += len(records)
                records, pending = [], 0
        if records:
            yield _record_rows(self.location, first, records, required, optional)


# Files --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FilePart(Part):
    """A file that its ``filesystem`` (of ``pyarrow.fs``) calls ``path``."""

    name: str
    location: str
    path: str
    filesystem: Any

    def fingerprint(self) -> dict[str, Any]:
        """Its path below the data's root, its size in bytes and the hash of sampled ones."""
        with _unreadable(self.location), self.filesystem.open_input_file(self.path) as file:

            def sample(start: int, length: int) -> bytes:
                file.seek(start)
                return bytes(file.read(length))

            size = int(file.size())
            digest = sampled_hash(size, sample, SAMPLES, SAMPLE_BYTES // SAMPLES)
        return {"path": self.name, "size": size, "hash": digest}


@dataclass(frozen=True)
class ParquetPart(FilePart):
    def columns(self) -> tuple[str, ...] | None:
        with self._open() as file:
            return tuple(file.schema_arrow.names) if file.metadata.num_rows else None

    def read(self, required: Sequence[str], optional: Sequence[str]) -> Iterator[Rows]:
        with self._open() as file:
            names = _present(file.schema_arrow.names, required, optional)
            groups = range(file.metadata.num_row_groups)
            size = sum(file.metadata.row_group(group).total_byte_size for group in groups)
            step = _chunk_rows(size, file.metadata.num_rows) if names else CHUNK_ROWS
            first = 0
            with _not_what_it_says(self.location, "a Parquet file"):
                for batch in file.iter_batches(step, columns=names):
                    yield _arrow_rows(self.location, first, batch)
                    first += batch.num_rows

    @contextmanager
    def _open(self) -> Iterator[Any]:
        with _unreadable(self.location):
            file = self.filesystem.open_input_file(self.path)
        with file:
            with _not_what_it_says(self.location, "a Parquet file"):
                # Neither the whole file ahead nor a whole row group, which may be all of it.
                parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=READ_BYTES)
            yield parquet


@dataclass(frozen=True)
class ArrowPart(FilePart, _Batches):
    """An Arrow IPC file or stream."""

    def _batches(self) -> Iterator[Any]:
        with _unreadable(self.location):
            # A map lets a large record batch be read in slices without holding it.
            local = isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)
            file = pa.memory_map(self.path) if local else self.filesystem.open_input_file(self.path)
        with file, _not_what_it_says(self.location, "an Arrow IPC file or stream"):
            if file.size() == 0:
                raise pa.ArrowInvalid("the file is empty")
            random_access = file.read(6) == b"ARROW1"
            file.seek(0)
            if random_access:
                reader = pa.ipc.open_file(file)
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                yield from pa.ipc.open_stream(file)


@dataclass(frozen=True)
class JsonlPart(FilePart, _Records):
    """A file with a JSON object a line."""

    def _records(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        with _unreadable(self.location):
            stream = self.filesystem.open_input_stream(self.path, compression=None)
        with io.BufferedReader(stream, 1 << 20) as file:
            for number in count(1):
                with _unreadable(self.location):
                    line = file.readline()
                if not line:
                    return
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield len(line), self._record(number, line)

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            got = f"{error} in {_shown(line)}"
        else:
            if isinstance(record, dict):
                return record
            got = f"a {type(record).__name__}"
        raise UserError(
            f"{self.location}, line {number}",
            "one JSON object a line, in UTF-8",
            got,
            "Write the file as JSONL: every example an object on a line of its own, without a list "
            "round them and without line breaks inside.",
        )


FORMATS: dict[str, type[FilePart]] = {
    ".parquet": ParquetPart,
    ".jsonl": JsonlPart,
    ".ndjson": JsonlPart,
    ".json": JsonlPart,
    ".arrow": ArrowPart,
    ".feather": ArrowPart,
}


# Tables in memory ---------------------------------------------------------------------------


@dataclass(frozen=True)
class TablePart(_Batches):
    """Examples that are the rows of a ``pyarrow.Table``."""

    table: Any
    name: str = ""
    location: str = "the table"

    def _batches(self) -> Iterator[Any]:
        yield from self.table.to_batches()

    def fingerprint(self) -> dict[str, Any]:
        """The number of its rows, and the hash of all of its content."""
        table, digest = self.table.replace_schema_metadata(None), hashlib.blake2b(digest_size=16)
        with pa.ipc.new_stream(pa.PythonFile(_HashSink(digest), "w"), table.schema) as writer:
            for first in range(0, table.num_rows, CHUNK_ROWS):
                rows = table.slice(first, CHUNK_ROWS)
                # Taken, not sliced: chunks and what lies beside a slice are no part of the content.
                writer.write_table(rows.take(pa.array(range(rows.num_rows))).combine_chunks())
        return {"rows": table.num_rows, "hash": digest.hexdigest()}


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
class RowsPart(_Records):
    """Examples that are a list of mappings, column -> value."""

    rows: Sequence[Mapping[str, Any]]
    name: str = ""
    location: str = "the list"

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

        def listed(value: Any) -> Any:
            return value.tolist() if hasattr(value, "tolist") else str(value)

        digest = hashlib.blake2b(digest_size=16)
        for row in self.rows:
            digest.update(json.dumps(row, sort_keys=True, default=listed).encode() + b"\n")
        return {"rows": len(self.rows), "hash": digest.hexdigest()}


# Rows ---------------------------------------------------------------------------------------


def _present(found: Sequence[str], required: Sequence[str], optional: Sequence[str]) -> list[str]:
    return [*required, *(name for name in optional if name in found)]


def _chunk_rows(size: int, count: int) -> int:
    return max(1, min(CHUNK_ROWS, CHUNK_BYTES * count // max(size, 1)))


def _arrow_rows(location: str, first: int, batch: Any) -> Rows:
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    for name, column in columns.items():
        if column.null_count:
            raise _null(f"{location}, row {first + first_null(column)}", name)
    return Rows(location, np.arange(first, first + batch.num_rows), columns)


def _record_rows(
    location: str,
    first: int,
    records: Sequence[Mapping[str, Any]],
    required: Sequence[str],
    optional: Sequence[str],
) -> Rows:
    """Dicts as Arrow columns. A missing optional key becomes a null; a null itself is refused."""
    columns = {}
    missing = object()
    for name in (*required, *optional):
        values = [record.get(name, missing) for record in records]
        absent = [i for i, value in enumerate(values) if value is missing]
        if len(absent) == len(values) and name in optional:
            continue
        if absent and name in required:
            raise UserError(
                f"{location}, row {first + absent[0]}",
                f"the column `{name}`, as in the rows before it",
                "none (found " + (", ".join(map(str, records[absent[0]])) or "no column") + ")",
                "Give every example the same column of inputs.",
            )
        for i, value in enumerate(values):
            if value is None:
                raise _null(f"{location}, row {first + i}", name)
        plain = [None if value is missing else _plain(name, value) for value in values]
        columns[name] = _column(location, first, name, plain)
    return Rows(location, np.arange(first, first + len(records)), columns)


def _plain(name: str, value: Any) -> Any:
    """A value as Python's own types: tensors and arrays as lists, ids as strings."""
    if name == "id" and isinstance(value, Integral) and not isinstance(value, bool):
        return str(value)
    return value.tolist() if hasattr(value, "tolist") else value


def _column(location: str, first: int, name: str, values: list[Any]) -> Any:
    def convert(count: int) -> Any:
        return pa.array(values[:count], type=ROW_TYPES.get(name))

    def fails(count: int) -> bool:
        try:
            convert(count)
        except CONVERSION_ERRORS:
            return True
        return False

    try:
        return convert(len(values))
    except CONVERSION_ERRORS as error:
        # A prefix that fails fails however it goes on, so the first bad row can be bisected.
        row = bisect_left(range(len(values)), True, key=lambda i: fails(i + 1))
        wanted = TYPES_WANTED.get(name, "text, or numbers of one shape")
        raise UserError(
            f"{location}, row {first + row}",
            f"`{name}` of one type in all rows ({wanted})",
            f"{_shown(values[row])} ({error})",
            f"Correct or leave out this value of `{name}`.",
        ) from error


# Messages -----------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unreadable(location: str) -> AbstractContextManager[None]:
    wanted, remedy = "a file that can be read", "Check its permissions."
    return user_errors(location, wanted, remedy, *READ_ERRORS, got="{error}")


def _not_what_it_says(location: str, what: str) -> AbstractContextManager[None]:
    got = "something that pyarrow cannot read ({error})"
    remedy = "Write the file again, or move it out of the data."
    return user_errors(location, f"{what}, as its name says", remedy, *READ_ERRORS, got=got)


def _null(place: str, name: str) -> UserError:
    remedy = f"Fill in `{name}`, or leave the example out of the data."
    return UserError(place, f"a value of `{name}`", "null", remedy)
