"""What a Python caller holds as data: frames, data sets of Hugging Face's, whatever gives rows.

a frame of pandas or polars, a table, a reader         as Arrow, in place
datasets.Dataset                                       read in place, a batch at a time
an IterableDataset, a generator, a torch Dataset       gone through once, into a temporary file
datasets.DatasetDict                                   several data sets, of which one is named
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from decimal import Decimal
from itertools import islice
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.fs

from raycurv.data.bounds import CHUNK_ROWS
from raycurv.data.class_names import class_names_of
from raycurv.data.formats.json_lines import JsonlPart
from raycurv.data.in_memory import TablePart, in_json
from raycurv.data.parts import Part
from raycurv.data.portion import Selection
from raycurv.data.splits import Split
from raycurv.errors import UserError, user_errors
from raycurv.hub import Snapshot

# Several data sets by their names, in Hugging Face datasets.
_DICTS = {"DatasetDict", "IterableDatasetDict"}
# Of torch: a batch of its would be read as one row.
_LOADER = "DataLoader"
# What is written as its text: of a row it may be a column that nobody reads.
_AS_TEXT = (date, datetime, time, Decimal, UUID)


class Splits(dict[str, Any]):
    """Several data sets, by name."""


@dataclass(frozen=True)
class Spooled:
    """Rows that were gone through once, as a file that lasts as long as this.

    Attributes:
        file: of JSON, a row a line.
        rows: how many.
        digest: of their content, as that of a list of the same rows.
        schema: of Arrow, where what gave them has one.
    """

    file: Any
    rows: int
    digest: str
    schema: Any = None


def settled(source: Any, split: Split | None = None) -> Any:
    """A source that can be read as often as one likes: what can be gone through only once is
    written to a temporary file.

    Args:
        source: whatever a caller gave.
        split: what is wanted of it: of several data sets one, of rows perhaps the first ones.

    Raises:
        UserError: no data, or rows that cannot be read or written.
    """
    if isinstance(source, Selection):
        return replace(source, source=settled(source.source, source.parsed()))
    kinds = {kind.__name__ for kind in type(source).__mro__}
    if _LOADER in kinds and (source.batch_size or source.batch_sampler) is not None:
        raise UserError(
            "data", "something that gives dicts, one a row", "a DataLoader, which gives batches",
            "Give its data set (loader.dataset).",
        )  # fmt: skip
    if kinds & _DICTS:
        name = "" if split is None else split.name
        return Splits({n: settled(one, split) if n == name else one for n, one in source.items()})
    known = isinstance(source, (str, pa.Table, list, tuple, Snapshot, Splits, Spooled))
    if known or hasattr(source, "__fspath__") or _dataset(source):
        return source
    if hasattr(source, "__arrow_c_stream__") or hasattr(source, "__arrow_c_array__"):
        return _table(source)
    rows = _rows(source)
    if rows is None:
        raise UserError(
            "data",
            "a path, a glob, a URI, a table or frame (pyarrow, pandas, polars), a data set of "
            "Hugging Face's, or something that gives dicts, one a row",
            f"a {type(source).__name__}",
            "Turn it into one of these; a lazy frame by its collect().",
        )
    features, most = getattr(source, "features", None), None if split is None else split.at_most
    return replace(_spool(islice(rows, most)), schema=getattr(features, "arrow_schema", None))


def part_of(source: Any) -> Part:
    """The part that a settled object is: rows that were spooled, or a ``datasets.Dataset``."""
    if isinstance(source, Spooled):
        place = (source.file.name, pyarrow.fs.LocalFileSystem())
        return SpooledPart("", "the rows", *place, spooled=source)
    return DatasetPart(source)


@dataclass(frozen=True)
class SpooledPart(JsonlPart):
    """Rows that lie in a temporary file."""

    spooled: Any = None

    def fingerprint(self) -> dict[str, Any]:
        """The number of its rows, and the hash of all of its content."""
        return {"rows": self.spooled.rows, "hash": self.spooled.digest}

    def class_names(self, name: str) -> tuple[str, ...]:
        schema, theirs = self.spooled.schema, self.names.theirs.get(name, name)
        return () if schema is None else class_names_of(schema, theirs)


@dataclass(frozen=True)
class DatasetPart(TablePart):
    """The rows of a ``datasets.Dataset``, with the selection that it may be."""

    location: str = "the data set"

    def _batches(self) -> Iterator[Any]:
        for table in self._tables():
            yield from table.to_batches()

    def _schema(self) -> Any:
        return next(self._tables(), self.table.data).schema

    def _tables(self) -> Iterator[Any]:
        found = self.table.format
        if found["type"] == "custom":
            raise UserError(
                self.location, "rows as they are stored", "a transform that makes others of them",
                "Apply it by dataset.map(...), and give what that gives.",
            )  # fmt: skip
        stored = self.table.with_format("arrow", columns=found["columns"])
        yield from stored.iter(batch_size=CHUNK_ROWS)

    def _stored_bytes(self) -> int:
        return int(self.table.data.nbytes)


def _dataset(source: Any) -> bool:
    """Whether it is a ``datasets.Dataset``: one exists only where the library has been loaded."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(source, library.Dataset)


def _table(source: Any) -> Any:
    with user_errors(
        "data", "a frame that Arrow can hold", "Correct the column.",
        pa.ArrowException, TypeError, ValueError,
    ):  # fmt: skip
        table = pa.table(source)
        fields = [pa.field(field.name, _without_views(field.type)) for field in table.schema]
        return table.cast(pa.schema(fields, metadata=table.schema.metadata))


def _without_views(kind: Any) -> Any:
    """An Arrow type whose texts and bytes, at any depth, are no views, which are not taken."""
    if isinstance(kind, pa.StructType):
        return pa.struct([pa.field(one.name, _without_views(one.type)) for one in kind])
    if isinstance(kind, (pa.ListType, pa.LargeListType)):
        listed = pa.list_ if isinstance(kind, pa.ListType) else pa.large_list
        return listed(_without_views(kind.value_type))
    return {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}.get(
        kind, kind
    )


def _rows(source: Any) -> Iterable[Any] | None:
    """What gives the rows of an object, in order; ``None`` if nothing does."""
    if isinstance(source, (bytes, Mapping)):
        return None
    if isinstance(source, Iterable):
        return source
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return (source[number] for number in range(len(source)))
    return None


def _spool(rows: Iterable[Any]) -> Spooled:
    file = tempfile.NamedTemporaryFile(prefix="raycurv-", suffix=".jsonl")  # noqa: SIM115
    digest, number = hashlib.blake2b(digest_size=16), 0
    for number, row in enumerate(rows, start=1):
        where = f"the rows, row {number - 1}"
        if not isinstance(row, Mapping):
            raise UserError(
                where, "a dict of columns", f"a {type(row).__name__}",
                "Give each example as a dict, for instance {'text': ...}.",
            )  # fmt: skip
        remedy = "Give the columns that are read alone, or write the data as Parquet."
        with user_errors(where, "values that JSON can hold", remedy, TypeError, ValueError):
            line = in_json(dict(row), _plain)
        digest.update(line)
        file.write(line)
    file.flush()
    return Spooled(file, number, digest.hexdigest())


def _plain(value: Any) -> Any:
    """A value as JSON has it, the same one when it is read again."""
    if isinstance(value, _AS_TEXT):
        return str(value)
    raise TypeError(f"a {type(value).__name__}")
