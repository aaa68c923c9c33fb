"""Rows of data as Arrow columns, in chunks of bounded memory, whatever they were read from."""

from __future__ import annotations

import reprlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import pyarrow as pa

from raycurv.data.bounds import check_expansion, chunks
from raycurv.data.columns import first_null, row_bytes
from raycurv.data.conversations import TOOLS, encoded, keys_of
from raycurv.errors import UserError, in_words, shortened, user_errors

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
# Columns in which a row may have nothing.
_MAY_LACK = (TOOLS,)
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
        untyped: whether all values are text, whatever they stand for.
    """

    location: str
    numbers: np.ndarray
    columns: dict[str, Any]
    others: frozenset[str] = frozenset()
    untyped: bool = False

    def place(self, i: int) -> str:
        """Where row ``i`` of this chunk stands, for messages."""
        return f"{self.location}, row {self.numbers[i]}"

    def take(self, keep: np.ndarray) -> Rows:
        """The rows at the positions ``keep``."""
        taken = {name: column.take(pa.array(keep)) for name, column in self.columns.items()}
        return replace(self, numbers=self.numbers[keep], columns=taken)


def present(found: Sequence[str], required: Sequence[str], optional: Sequence[str]) -> list[str]:
    """Names of the columns to read, of those that were found."""
    return [*required, *(name for name in optional if name in found)]


def arrow_rows(
    location: str, first: int, batch: Any, others: frozenset[str], stored: int
) -> Iterator[Rows]:
    """The rows of a record batch, numbered from ``first`` on, in chunks.

    Args:
        others: names of all columns that there are.
        stored: the bytes that stand for all rows of the part.
    """
    with not_what_it_says(location, "whole columns"):
        batch.validate(full=True)
    names = batch.schema.names
    for name, column in zip(names, batch.columns, strict=True):
        if column.null_count and name not in _MAY_LACK:
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


def record_rows(
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
            if value is None and name not in _MAY_LACK:
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
        # Messages may have keys of their own, in an order of their own.
        some = [encoded(value) if keys_of(value) else value for value in values[:count]]
        lists = any(isinstance(value, list) for value in some)
        return pa.array(some, type=None if lists else ROW_TYPES.get(name))

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
            f"{shown(values[row])} ({in_words(error)})",
            f"Correct or leave out this value of `{name}`.",
        ) from error


# Messages -----------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value in at most 60 characters, however long or deep it is."""
    if isinstance(value, (str, bytes)):
        value = value[:60]
    return shortened(_SHORT.repr(value), 60)


_SHORT = reprlib.Repr()
_SHORT.maxlist, _SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 20, 4, 80, 80


def unreadable(location: str) -> AbstractContextManager[None]:
    """What a file system raises is a mistake: a file that cannot be read."""
    wanted, remedy = "a file that can be read", "Check its permissions."
    return user_errors(location, wanted, remedy, *READ_ERRORS, got="{error}")


def not_what_it_says(location: str, what: str) -> AbstractContextManager[None]:
    """What pyarrow raises of the content is a mistake: it is not ``what`` its name says."""
    got = "something that pyarrow cannot read ({error})"
    remedy = "Write the file again, or move it out of the data."
    return user_errors(location, f"{what}, as its name says", remedy, *READ_ERRORS, got=got)


def _null(place: str, name: str) -> UserError:
    remedy = f"Fill in `{name}`, or leave the example out of the data."
    return UserError(place, f"a value of `{name}`", "null", remedy)
