"""Parts of a source: one file or one table in memory each, read in chunks of numbered rows.

A part names its columns, and hands out its rows in chunks whose memory is bounded (bounds.py),
always in data order. What a file says of itself is not believed: it is checked before it is
decoded, and what is decoded before it is used.
"""

from __future__ import annotations

import hashlib
import io
import json
import reprlib
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

from raycurv.data.bounds import CHUNK_BYTES, CHUNK_ROWS, LINE_BYTES, check_expansion, chunks
from raycurv.data.columns import first_null, row_bytes
from raycurv.data.conversations import conversation, keys_of
from raycurv.data.ipc_sizes import MAGIC, message_sizes
from raycurv.data.parquet_sizes import group_sizes
from raycurv.errors import UserError, in_words, shortened, user_errors
from raycurv.models.checkpoint import sampled_hash

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
    "attention_mask": "lists of zeros and ones",
}
PARQUET = "a Parquet file"
_ARROW_START = 8  # where an Arrow file's stream begins
CONVERSION_ERRORS = (pa.ArrowException, TypeError, ValueError, OverflowError)
READ_ERRORS = (pa.ArrowException, OSError)


@dataclass(frozen=True)
class Rows:
    """A chunk of rows of one part, as Arrow columns.

    Attributes:
        numbers: the rows' 0-based numbers within the part, ascending int64.
        columns: one Arrow array a column, as long as ``numbers``; null where a row does not have
            an optional column (an explicit null in the data has been refused by then).
        others: names of columns that are there and were not asked for.
    """

    location: str
    numbers: np.ndarray
    columns: dict[str, Any]
    others: frozenset[str] = frozenset()

    def place(self, i: int) -> str:
        """Where row ``i`` of this chunk stands, for messages."""
        return f"{self.location}, row {self.numbers[i]}"

    def take(self, keep: np.ndarray) -> Rows:
        """The rows at the positions ``keep``."""
        taken = {name: column.take(pa.array(keep)) for name, column in self.columns.items()}
        return Rows(self.location, self.numbers[keep], taken, self.others)


class Part(ABC):
    """One file, by its path below the data's root (``name``, with forward slashes), or one table in
    memory, whose name is empty. Messages call it by its ``location``."""

    name: str
    location: str

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


class _Batches(Part):
    """A part of Arrow record batches of any size."""

    @abstractmethod
    def _batches(self) -> Iterator[Any]: ...

    @abstractmethod
    def _stored_bytes(self) -> int:
        """The bytes that stand for all rows."""

    def columns(self) -> tuple[str, ...] | None:
        for batch in self._batches():
            if batch.num_rows:
                return tuple(batch.schema.names)
        return None

    def message_keys(self, name: str) -> tuple[str, ...]:
        for batch in self._batches():
            return keys_of(batch.schema.field(name).type)
        return ()

    def read(self, required: Sequence[str], optional: Sequence[str]) -> Iterator[Rows]:
        first, stored = 0, self._stored_bytes()
        for batch in self._batches():
            others = frozenset(batch.schema.names)
            chosen = batch.select(_present(batch.schema.names, required, optional))
            yield from _arrow_rows(self.location, first, chosen, others, stored)
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

    def message_keys(self, name: str) -> tuple[str, ...]:
        for _, record in self._records():
            return keys_of(record.get(name))
        return ()

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
    """A Parquet file, read row group by row group within the bounds of its metadata."""

    def columns(self) -> tuple[str, ...] | None:
        with self._open() as (file, _):
            return tuple(file.schema_arrow.names) if file.metadata.num_rows else None

    def message_keys(self, name: str) -> tuple[str, ...]:
        with self._open() as (file, _):
            return keys_of(file.schema_arrow.field(name).type)

    def read(self, required: Sequence[str], optional: Sequence[str]) -> Iterator[Rows]:
        with self._open() as (file, size):
            metadata, schema = file.metadata, file.schema_arrow
        names = _present(schema.names, required, optional)
        step = self._step(names) if names else CHUNK_ROWS
        # A text that the file has once for many rows stays so until a chunk of them is asked for.
        texts = [name for name in names if _is_text(schema, name)]
        others, first = frozenset(schema.names), 0
        with self._open(texts, metadata) as (file, _), _not_what_it_says(self.location, PARQUET):
            for batch in file.iter_batches(step, columns=names):
                yield from _arrow_rows(self.location, first, batch, others, size)
                first += batch.num_rows

    @contextmanager
    def _open(self, texts: Sequence[str] = (), metadata: Any = None) -> Iterator[tuple[Any, int]]:
        """The file and its size in bytes; of ``texts`` equal ones are read once."""
        with _unreadable(self.location):
            file = self.filesystem.open_input_file(self.path)
        with file:
            with _not_what_it_says(self.location, PARQUET):
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
        with _unreadable(self.location):
            file = self.filesystem.open_input_file(self.path)
        with file, _not_what_it_says(self.location, PARQUET):
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


@dataclass(frozen=True)
class ArrowPart(FilePart, _Batches):
    """An Arrow IPC file or stream, both read as a stream: a file is one between its magic and its
    footer."""

    def _stored_bytes(self) -> int:
        with _unreadable(self.location), self.filesystem.open_input_file(self.path) as file:
            return int(file.size())

    def _batches(self) -> Iterator[Any]:
        with _unreadable(self.location):
            # A map lets a large record batch be read in slices without holding it.
            local = isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)
            file = pa.memory_map(self.path) if local else self.filesystem.open_input_file(self.path)
        with file, _not_what_it_says(self.location, "an Arrow IPC file or stream"):
            size, batches = file.size(), None
            if size == 0:
                raise pa.ArrowInvalid("the file is empty")
            if file.read(len(MAGIC)) == MAGIC:
                file.seek(0)
                batches = pa.ipc.open_file(file).num_record_batches
            file.seek(0 if batches is None else _ARROW_START)
            reader = pa.ipc.open_stream(file)
            for number in count():
                if not self._next(file, size, number):
                    break
                yield reader.read_next_batch()
            if batches not in (None, number):
                raise pa.ArrowInvalid(f"{number} record batches, and {batches} in the footer")

    def _next(self, file: Any, size: int, number: int) -> bool:
        """Whether a further batch comes; UserError if it takes far more memory than the file has
        bytes. Leaves the file where it is."""
        at = file.tell()
        decoded, found = 0, False
        for message in message_sizes(file, at, size):
            decoded, found = decoded + message.decoded + message.rows, message.batch
            if found:
                break
        file.seek(at)
        check_expansion(
            f"{self.location}, record batch {number}", decoded, size,
            "Write it with smaller record batches, and long examples as several.",
        )  # fmt: skip
        return found


@dataclass(frozen=True)
class JsonlPart(FilePart, _Records):
    """A file with a JSON object a line."""

    def _records(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        with _unreadable(self.location):
            stream = self.filesystem.open_input_stream(self.path, compression=None)
        # What is read here is all that can fail so: no error of who takes the lines comes here.
        with _unreadable(self.location), io.BufferedReader(stream, 1 << 20) as file:
            for number in count(1):
                line = file.readline(LINE_BYTES + 1)
                if not line:
                    return
                if len(line) > LINE_BYTES:
                    raise UserError(
                        f"{self.location}, line {number}",
                        f"a line of at most {LINE_BYTES >> 20} MiB",
                        "a longer one",
                        "Write one example a line, a long text as several of them, and large "
                        "arrays of numbers as Parquet.",
                    )
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield len(line), self._record(number, line)

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = _DECODER.decode(line.decode())
        except (ValueError, RecursionError) as error:
            got = f"{in_words(error)} in {_shown(line)}"
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no key comes twice: one of the two values would be lost."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {_shown(twice)} twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)

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

    def _stored_bytes(self) -> int:
        return int(self.table.get_total_buffer_size())

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


def _arrow_rows(
    location: str, first: int, batch: Any, others: frozenset[str], stored: int
) -> Iterator[Rows]:
    """The rows of a record batch, numbered from ``first`` on, in chunks.

    Args:
        others: names of all columns that there are.
        stored: the bytes that stand for all rows of the part.
    """
    with _not_what_it_says(location, "whole columns"):
        batch.validate(full=True)
    names = batch.schema.names
    for name, column in zip(names, batch.columns, strict=True):
        if column.null_count:
            raise _null(f"{location}, row {first + first_null(column)}", name)
    sizes = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        sizes += row_bytes(column)
    if len(sizes):
        largest = int(sizes.argmax())
        check_expansion(
            f"{location}, row {first + largest}", int(sizes[largest]), stored,
            "Write a long example as several.",
        )  # fmt: skip
    for start, stop in chunks(sizes):
        cut = batch.slice(start, stop - start)
        columns = dict(zip(names, cut.columns, strict=True))
        numbers = np.arange(first + start, first + stop)
        yield Rows(location, numbers, columns, others - columns.keys())


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
    names = set().union(*records)
    for name in (*required, *(one for one in optional if one in names)):
        values = [record.get(name, missing) for record in records]
        absent = [i for i, value in enumerate(values) if value is missing]
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
    others = frozenset(map(str, names)) - columns.keys()
    return Rows(location, np.arange(first, first + len(records)), columns, others)


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
        if name in ROW_TYPES:
            for row, value in enumerate(values):
                keys = keys_of(value)
                if keys:
                    raise conversation(f"{location}, row {first + row}", name, keys) from error
        # A prefix that fails fails however it goes on, so the first bad row can be bisected.
        row = bisect_left(range(len(values)), True, key=lambda i: fails(i + 1))
        wanted = TYPES_WANTED.get(name, "text, or numbers of one shape")
        raise UserError(
            f"{location}, row {first + row}",
            f"`{name}` of one type in all rows ({wanted})",
            f"{_shown(values[row])} ({in_words(error)})",
            f"Correct or leave out this value of `{name}`.",
        ) from error


# Messages -----------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    """A value in at most 60 characters, however long or deep it is."""
    if isinstance(value, (str, bytes)):
        value = value[:60]
    return shortened(_SHORT.repr(value), 60)


_SHORT = reprlib.Repr()
_SHORT.maxlist, _SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 20, 4, 80, 80


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
