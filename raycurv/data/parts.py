"""Parts of a source: one file or one table in memory each, read in chunks of numbered rows.

A part names its columns, and hands out its rows in chunks whose memory is bounded (``CHUNK_ROWS``
rows, about ``CHUNK_BYTES`` bytes), always in data order.
"""

from __future__ import annotations

import io
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from raycurv.errors import UserError

CHUNK_ROWS = 1024
CHUNK_BYTES = 16 << 20
READ_BYTES = 4 << 20  # read of a column of a Parquet file at once

# Values from JSON and from Python have no type of their own: text is given its, the rest is what
# pyarrow infers. (Given a type of whole numbers it would cut 1.5 down to 1 without a word.)
ROW_TYPES: dict[str, Any] = {
    "text": pa.large_string(),
    "prompt": pa.large_string(),
    "completion": pa.large_string(),
}
CONVERSION_ERRORS = (pa.ArrowException, TypeError, ValueError, OverflowError)
READ_ERRORS = (pa.ArrowException, OSError)


@dataclass(frozen=True)
class Rows:
    """Some rows of one part.

    Attributes:
        location: the part's own, for messages.
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


class Part(Protocol):
    """One file, or one table in memory.

    Attributes:
        name: path below the data's root with forward slashes; empty for a table in memory.
        location: what to call it in messages.
    """

    @property
    def name(self) -> str: ...

    @property
    def location(self) -> str: ...

    def columns(self) -> tuple[str, ...] | None:
        """Names of the columns; ``None`` when the part has no rows."""
        ...

    def read(self, required: Sequence[str], optional: Sequence[str]) -> Iterator[Rows]:
        """All rows with these columns; an optional one may be missing.

        Raises:
            UserError: the part is not what its name says, or a value is missing or null.
        """
        ...


# Files --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FilePart:
    name: str
    location: str
    path: str
    filesystem: Any


@dataclass(frozen=True)
class _ParquetPart(FilePart):
    def columns(self) -> tuple[str, ...] | None:
        with self._open() as file:
            return tuple(file.schema_arrow.names) if file.metadata.num_rows else None

    def read(self, required: Sequence[str], optional: Sequence[str]) -> Iterator[Rows]:
        with self._open() as file:
            names = _present(file.schema_arrow.names, required, optional)
            count = file.metadata.num_rows
            if not names:
                yield from _bare_rows(self.location, count)
                return
            groups = range(file.metadata.num_row_groups)
            size = sum(file.metadata.row_group(group).total_byte_size for group in groups)
            first = 0
            try:
                for batch in file.iter_batches(_chunk_rows(size, count), columns=names):
                    yield _arrow_rows(self.location, first, batch)
                    first += batch.num_rows
            except READ_ERRORS as error:
                raise _not_what_it_says(self.location, "a Parquet file", error) from error

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            file = self.filesystem.open_input_file(self.path)
        except READ_ERRORS as error:
            raise unreadable(self.location, error) from error
        with file:
            try:
                # Neither the whole file ahead nor a whole row group, which may be all of it.
                parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=READ_BYTES)
            except READ_ERRORS as error:
                raise _not_what_it_says(self.location, "a Parquet file", error) from error
            yield parquet


@dataclass(frozen=True)
class _ArrowPart(FilePart):
    def columns(self) -> tuple[str, ...] | None:
        for batch in self._batches():
            if batch.num_rows:
                return tuple(batch.schema.names)
        return None

    def read(self, required: Sequence[str], optional: Sequence[str]) -> Iterator[Rows]:
        first = 0
        for batch in self._batches():
            yield from _sliced(self.location, first, batch, required, optional)
            first += batch.num_rows

    def _batches(self) -> Iterator[Any]:
        what = "an Arrow IPC file or stream"
        try:
            # A map lets a large record batch be read in slices without holding it.
            local = isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)
            file = pa.memory_map(self.path) if local else self.filesystem.open_input_file(self.path)
        except READ_ERRORS as error:
            raise unreadable(self.location, error) from error
        with file:
            try:
                if file.size() == 0:
                    raise pa.ArrowInvalid("the file is empty")
                random_access = file.read(6) == b"ARROW1"
                file.seek(0)
                if random_access:
                    reader = pa.ipc.open_file(file)
                    yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
                else:
                    yield from pa.ipc.open_stream(file)
            except READ_ERRORS as error:
                raise _not_what_it_says(self.location, what, error) from error


@dataclass(frozen=True)
class _JsonlPart(FilePart):
    def columns(self) -> tuple[str, ...] | None:
        for _, record in self._records():
            return tuple(record)
        return None

    def read(self, required: Sequence[str], optional: Sequence[str]) -> Iterator[Rows]:
        records: list[dict[str, Any]] = []
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

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each record with the bytes of its line."""
        try:
            stream = self.filesystem.open_input_stream(self.path, compression=None)
        except READ_ERRORS as error:
            raise unreadable(self.location, error) from error
        with io.BufferedReader(stream, 1 << 20) as file:
            lines = enumerate(file, start=1)
            while True:
                try:
                    number, line = next(lines)
                except StopIteration:
                    return
                except READ_ERRORS as error:
                    raise unreadable(self.location, error) from error
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
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


PART_KINDS: dict[str, type[_ParquetPart | _ArrowPart | _JsonlPart]] = {
    "parquet": _ParquetPart,
    "jsonl": _JsonlPart,
    "arrow": _ArrowPart,
}


# Tables in memory ---------------------------------------------------------------------------


@dataclass(frozen=True)
class TablePart:
    table: Any
    name: str = ""
    location: str = "the table"

    def columns(self) -> tuple[str, ...] | None:
        return tuple(self.table.column_names) if self.table.num_rows else None

    def read(self, required: Sequence[str], optional: Sequence[str]) -> Iterator[Rows]:
        first = 0
        names = _present(self.table.column_names, required, optional)
        if not names:
            yield from _bare_rows(self.location, self.table.num_rows)
            return
        for batch in self.table.select(names).to_batches():
            yield from _sliced(self.location, first, batch, required, optional)
            first += batch.num_rows


@dataclass(frozen=True)
class RowsPart:
    rows: Sequence[Mapping[str, Any]]
    name: str = ""
    location: str = "the list"

    def columns(self) -> tuple[str, ...] | None:
        if not self.rows:
            return None
        self._check(0, self.rows[:1])
        return tuple(self.rows[0])

    def read(self, required: Sequence[str], optional: Sequence[str]) -> Iterator[Rows]:
        for first in range(0, len(self.rows), CHUNK_ROWS):
            rows = self.rows[first : first + CHUNK_ROWS]
            self._check(first, rows)
            yield _record_rows(self.location, first, rows, required, optional)

    def _check(self, first: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise UserError(
                    f"{self.location}, row {first + i}",
                    "a dict of columns",
                    f"a {type(row).__name__}",
                    "Give each example as a dict, for instance {'text': ...}.",
                )


# Rows ---------------------------------------------------------------------------------------


def _present(found: Sequence[str], required: Sequence[str], optional: Sequence[str]) -> list[str]:
    return [*required, *(name for name in optional if name in found)]


def _chunk_rows(size: int, count: int) -> int:
    return max(1, min(CHUNK_ROWS, CHUNK_BYTES * count // max(size, 1)))


def _bare_rows(location: str, count: int) -> Iterator[Rows]:
    for first in range(0, count, CHUNK_ROWS):
        yield Rows(location, np.arange(first, min(first + CHUNK_ROWS, count)), {})


def _sliced(
    location: str, first: int, batch: Any, required: Sequence[str], optional: Sequence[str]
) -> Iterator[Rows]:
    """A record batch of any size as chunks."""
    names = _present(batch.schema.names, required, optional)
    if not names:
        for rows in _bare_rows(location, batch.num_rows):
            yield Rows(location, rows.numbers + first, {})
        return
    batch = batch.select(names)
    step = _chunk_rows(batch.nbytes, batch.num_rows)
    for start in range(0, batch.num_rows, step):
        yield _arrow_rows(location, first + start, batch.slice(start, step))


def _arrow_rows(location: str, first: int, batch: Any) -> Rows:
    columns = {}
    numbers = np.arange(first, first + batch.num_rows)
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if column.null_count:
            row = int(column.is_null().to_numpy(zero_copy_only=False).argmax())
            raise _null(f"{location}, row {numbers[row]}", name)
        columns[name] = column
    return Rows(location, numbers, columns)


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
        raise UserError(
            f"{location}, row {first + row}",
            f"`{name}` of one type in all rows ({_type_wanted(name)})",
            f"{_shown(values[row])} ({error})",
            f"Correct or leave out this value of `{name}`.",
        ) from error


def _type_wanted(name: str) -> str:
    if name in ("text", "prompt", "completion"):
        return "text"
    wanted = {
        "id": "strings or whole numbers",
        "input_ids": "lists of whole numbers",
        "inputs": "lists of numbers",
        "labels": "numbers or lists of numbers",
        "loss_mask": "lists of booleans",
    }
    return wanted[name]


# Messages -----------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def unreadable(location: str, error: Exception) -> UserError:
    return UserError(location, "a file that can be read", str(error), "Check its permissions.")


def _not_what_it_says(location: str, what: str, error: Exception) -> UserError:
    return UserError(
        location,
        f"{what}, as its name says",
        f"something that pyarrow cannot read ({error})",
        "Write the file again, or move it out of the data.",
    )


def _null(place: str, name: str) -> UserError:
    return UserError(
        place,
        f"a value of `{name}`",
        "null",
        f"Fill in `{name}`, or leave the example out of the data.",
    )
