"""Where examples come from: files, directories, globs, URIs and tables, as parts of numbered rows.

A part is one file or one table in memory. It names its columns, and hands out its rows in chunks
whose memory is bounded (``CHUNK_ROWS`` rows, about ``CHUNK_BYTES`` bytes), always in data order.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from raycurv.errors import UserError

Source: TypeAlias = "str | Path | pa.Table | Sequence[Mapping[str, Any]]"

CHUNK_ROWS = 1024
CHUNK_BYTES = 16 << 20
SAMPLE_BYTES = 256 << 10
SAMPLES = 16

FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".arrow": "arrow",
    ".feather": "arrow",
}
READABLE = "Parquet (.parquet), JSONL (.jsonl, .ndjson, .json) or Arrow (.arrow, .feather)"

# What Hugging Face datasets puts beside the data of a saved data set. The caches of its `map` are
# Arrow files too, and reading them would count every example twice.
BESIDE_THE_DATA = {"state.json", "dataset_info.json", "dataset_dict.json", "dataset_infos.json"}
CACHES = re.compile(r"cache-.*\.arrow")

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


def open_parts(source: Source) -> list[Part]:
    """The parts of a source, sorted by their names.

    Args:
        source: a file, a directory (searched through all its subdirectories; names that begin with
            a dot or an underscore are left out), a glob, a URI of these that ``pyarrow.fs``
            understands, a ``pyarrow.Table``, or a list of dicts.

    Raises:
        UserError: there is no such data, or nothing readable in it.
    """
    if isinstance(source, pa.Table):
        return [_TablePart(source)]
    if isinstance(source, (str, Path)):
        return list(_files(str(source)))
    if isinstance(source, (list, tuple)):
        return [_RowsPart(source)]
    raise UserError(
        "data",
        "a path, a glob, a URI, a pyarrow.Table or a list of dicts",
        f"a {type(source).__name__}",
        "Turn a pandas frame into a table with pyarrow.Table.from_pandas, a Hugging Face data set "
        "with dataset.with_format('arrow')[:].",
    )


def fingerprint(source: Source) -> dict[str, Any]:
    """What tells this data from other data, without reading all of it.

    Returns:
        JSON-serialisable. Of files: ``{"files": [{"path", "size", "hash"}, ...]}`` in data order,
        ``path`` below the data's root, ``size`` in bytes, ``hash`` of sampled bytes: the first, the
        last and evenly spread ones between, at most 256 KiB, all of a smaller file. Of data in
        memory: ``{"rows", "hash"}``, the hash over all of its content.

    Raises:
        UserError: there is no such data, or nothing readable in it.
    """
    files = []
    for part in open_parts(source):
        if isinstance(part, _TablePart):
            return {"rows": part.table.num_rows, "hash": _table_hash(part.table)}
        if isinstance(part, _RowsPart):
            return {"rows": len(part.rows), "hash": _rows_hash(part.rows)}
        assert isinstance(part, _FilePart)
        try:
            size, digest = _sampled_hash(part)
        except READ_ERRORS as error:
            raise _unreadable(part.location, error) from error
        files.append({"path": part.name, "size": size, "hash": digest})
    return {"files": files}


# Files --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FilePart:
    name: str
    location: str
    path: str
    filesystem: Any


@dataclass(frozen=True)
class _ParquetPart(_FilePart):
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
            raise _unreadable(self.location, error) from error
        with file:
            try:
                # Without buffering ahead, memory is one row group and not the whole file.
                parquet = pq.ParquetFile(file, pre_buffer=False)
            except READ_ERRORS as error:
                raise _not_what_it_says(self.location, "a Parquet file", error) from error
            yield parquet


@dataclass(frozen=True)
class _ArrowPart(_FilePart):
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
            raise _unreadable(self.location, error) from error
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
class _JsonlPart(_FilePart):
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
            raise _unreadable(self.location, error) from error
        with io.BufferedReader(stream, 1 << 20) as file:
            lines = enumerate(file, start=1)
            while True:
                try:
                    number, line = next(lines)
                except StopIteration:
                    return
                except READ_ERRORS as error:
                    raise _unreadable(self.location, error) from error
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


def _files(source: str) -> Iterator[Part]:
    """The parts of a path, a glob or a URI of either, sorted by name."""
    is_uri = "://" in source
    filesystem, root, names = (
        _find_remote(source) if is_uri else _find_local(os.path.expanduser(source))
    )
    readable = [name for name in names if os.path.splitext(name)[1].lower() in FORMATS]
    if not readable:
        some = ", ".join(sorted(names)[:5])
        raise UserError(
            source,
            f"{READABLE} files",
            f"none of these, but {len(names)} other files ({some})" if names else "no file at all",
            "Check the path; a glob needs quotes on the command line, and ** for subdirectories.",
        )
    for name in sorted(set(readable)):
        kind = PART_KINDS[FORMATS[os.path.splitext(name)[1].lower()]]
        path = f"{root.rstrip('/')}/{name}" if root else name
        # Of a URI pyarrow gives back a bare path; the message shows what the user typed.
        location = f"{name} in {source}" if is_uri else path
        yield kind(name=name, location=location, path=path, filesystem=filesystem)


def _find_local(source: str) -> tuple[Any, str, list[str]]:
    """File system, root, and names of the files below it; hidden and side files are left out."""
    filesystem = pyarrow.fs.LocalFileSystem()
    if os.path.isfile(source):
        return filesystem, os.path.dirname(source), [os.path.basename(source)]
    if os.path.isdir(source):
        return filesystem, source, _walk(source)
    if not glob.has_magic(source):
        raise _no_such_data(source)
    root = _glob_root(source)
    names = []
    for match in glob.glob(source, recursive=True):
        below = os.path.relpath(match, root or ".").replace(os.sep, "/")
        if os.path.isdir(match):
            names += [f"{below}/{name}" if below != "." else name for name in _walk(match)]
        elif _wanted(os.path.basename(match)):
            names.append(below)
    return filesystem, root, names


def _find_remote(source: str) -> tuple[Any, str, list[str]]:
    # What follows a question mark is the file system's options, not a glob.
    address, mark, options = source.partition("?")
    magic = re.search(r"[*\[]", address) is not None
    root = _glob_root(address) if magic else address
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(root + mark + options)
        info = filesystem.get_file_info(path)
        if info.type == pyarrow.fs.FileType.NotFound:
            raise _no_such_data(source)
        if info.type == pyarrow.fs.FileType.File:
            base, _, name = path.rpartition("/")
            return filesystem, base, [name]
        below = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    except (*READ_ERRORS, ImportError) as error:
        raise UserError(
            source,
            "a URI that pyarrow.fs understands and may read",
            str(error),
            "Check the scheme, the address and the credentials, or copy the data to a local disk.",
        ) from error
    start = len(path.rstrip("/")) + 1
    files = [info.path[start:] for info in below if info.type == pyarrow.fs.FileType.File]
    names = [name for name in files if all(_wanted(step) for step in name.split("/"))]
    if magic:
        pattern = _glob_pattern(address[len(root) :].lstrip("/"))
        names = [name for name in names if pattern.fullmatch(name)]
    return filesystem, path, names


def _walk(root: str) -> list[str]:
    names = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if _wanted(name)]
        below = os.path.relpath(directory, root).replace(os.sep, "/")
        names += [name if below == "." else f"{below}/{name}" for name in files if _wanted(name)]
    return names


def _wanted(name: str) -> bool:
    beside = name in BESIDE_THE_DATA or CACHES.fullmatch(name) is not None
    return not (beside or name.startswith((".", "_")))


def _glob_root(pattern: str) -> str:
    """The directory above the first step that has a wildcard."""
    fixed = pattern[: re.search(r"[*?\[]", pattern).start()]  # type: ignore[union-attr]
    return fixed[: fixed.rfind("/")] or "/" if "/" in fixed else ""


def _glob_pattern(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression: ``**`` for any number of directories, ``*`` within one."""
    steps = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    out = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|.", pattern):
        if len(token) > 2 and token[0] == "[":
            out += "[" + token[1:-1].replace("!", "^", 1) + "]" if token[1] == "!" else token
        else:
            out += steps.get(token, re.escape(token))
    return re.compile(out)


# Tables in memory ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _TablePart:
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
class _RowsPart:
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


# Hashes -------------------------------------------------------------------------------------


def _sampled_hash(part: _FilePart) -> tuple[int, str]:
    digest = hashlib.blake2b(digest_size=16)
    with part.filesystem.open_input_file(part.path) as file:
        size = int(file.size())
        if size <= SAMPLE_BYTES:
            digest.update(file.read())
        else:
            each = SAMPLE_BYTES // SAMPLES
            for sample in range(SAMPLES):
                file.seek((size - each) * sample // (SAMPLES - 1))
                digest.update(file.read(each))
    return size, digest.hexdigest()


class _HashSink(io.RawIOBase):
    """A file that keeps only the hash of what was written to it."""

    def __init__(self) -> None:
        self.digest = hashlib.blake2b(digest_size=16)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)


def _table_hash(table: Any) -> str:
    table = table.replace_schema_metadata(None)
    sink = _HashSink()
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), table.schema) as writer:
        for first in range(0, table.num_rows, CHUNK_ROWS):
            rows = table.slice(first, CHUNK_ROWS)
            # Taken, not sliced: chunks and what lies beside a slice are no part of the content.
            writer.write_table(rows.take(pa.array(range(rows.num_rows))).combine_chunks())
    return sink.digest.hexdigest()


def _rows_hash(rows: Sequence[Mapping[str, Any]]) -> str:
    def listed(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else str(value)

    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=listed).encode() + b"\n")
    return digest.hexdigest()


# Messages -----------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _no_such_data(source: str) -> UserError:
    return UserError(
        source,
        "a file, a directory, a glob or a URI of data",
        "nothing of that name",
        "Check the path; a relative one starts from the working directory of this process.",
    )


def _unreadable(location: str, error: Exception) -> UserError:
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
