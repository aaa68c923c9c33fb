"""What columns of a Parquet file would take in memory, by the headers of its pages alone.

The footer says where each column of a row group begins, and a header before each page how many
values it holds, in Thrift's compact protocol. Both are read here, and not by pyarrow: it believes
the footer's counts, and ends the process on a footer that contradicts itself.

https://parquet.apache.org/docs/file-format/, https://github.com/apache/thrift, "compact protocol".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

MAGIC = b"PAR1"
# Bytes of a value of each physical type in memory; of a text only of what refers to it.
_WIDTHS = {0: 1, 1: 4, 2: 8, 3: 12, 4: 4, 5: 8, 6: 8}
_FIXED, _TEXT, _DELTA_BYTE_ARRAY = 7, 6, 7  # a type, a type, an encoding
# Fields by number, and their types: what is read of the footer, and of the header of a page. A list
# stands for a list, a dictionary for a struct.
_COLUMN = {1: int, 2: [int], 3: [bytes], 5: int, 6: int, 7: int, 9: int, 11: int}
_FOOTER = {2: [{1: int, 2: int, 5: int}], 4: [{1: [{3: _COLUMN}], 3: int}]}
_PAGE = {2: int, 3: int, 5: {1: int}, 7: {1: int}, 8: {1: int}}
_HEADER_BYTES = 1 << 12  # read of a page at first
_HEADER_LIMIT = 1 << 20


@dataclass(frozen=True)
class GroupSize:
    """One row group, and in it some columns.

    Attributes:
        rows: how many.
        decoded: bytes that the columns take in memory, equal texts once.
        stored: bytes that they take in the file.
        longest: no text of a row is longer, in bytes, where each may repeat the one before it;
            0 where none does.
    """

    rows: int
    decoded: int
    stored: int
    longest: int


def group_sizes(file: Any, size: int, names: Sequence[str]) -> Iterator[GroupSize]:
    """The sizes of all row groups.

    Args:
        file: seekable, binary.
        size: its bytes.
        names: of the columns that are to be read.

    Raises:
        pyarrow.ArrowInvalid: headers contradict themselves or the file.
    """
    (length,) = struct.unpack("<I", _read(file, size - 8, 8)[:4]) if size >= 12 else (size,)
    if length + 12 > size:
        raise pa.ArrowInvalid("the footer is longer than the file")
    footer = _Thrift(_read(file, size - 8 - length, length)).struct(_FOOTER)
    lengths = [e.get(2, 0) for e in footer.get(2, ()) if not e.get(5)]
    wanted = {name.encode() for name in names}
    for group in footer.get(4, ()):
        decoded = stored = longest = 0
        for number, chunk in enumerate(group.get(1, ())):
            column = chunk.get(3, {})
            path = b".".join(column.get(3, ()))
            if path in wanted or any(path.startswith(name + b".") for name in wanted):
                width = lengths[number] if number < len(lengths) else 0
                bytes_, texts = _column(file, size, column, width)
                decoded, stored = decoded + bytes_, stored + column.get(7, 0)
                if _DELTA_BYTE_ARRAY in column.get(2, ()):
                    longest = max(longest, texts)
        rows = group.get(3, 0)
        if rows < 0 or stored < 0:
            raise pa.ArrowInvalid("a size below 0")
        yield GroupSize(rows, decoded + rows, min(stored, size), longest)


def _column(file: Any, size: int, column: Mapping[int, Any], length: int) -> tuple[int, int]:
    """Bytes of a column of a row group in memory, and of its pages uncompressed."""
    kind = column.get(1, 0)
    width = max(length, 1) if kind == _FIXED else _WIDTHS.get(kind, 8)
    starts = [column[field] for field in (9, 11) if column.get(field, 0) > 0]
    at = min(starts, default=size)
    end = min(at + column.get(7, 0), size)
    values = pages = largest = 0
    while at < end:
        page, header = _page(file, at, size)
        data = page.get(5) or page.get(8) or {}
        uncompressed, compressed, count = page.get(2, 0), page.get(3, 0), data.get(1, 0)
        if min(uncompressed, compressed, count) < 0:
            raise pa.ArrowInvalid("a page of a size below 0")
        values, pages, largest = values + count, pages + uncompressed, max(largest, uncompressed)
        at += header + compressed
    # Whatever the pages hold, as many values as the footer says are made room for.
    values = max(values, column.get(5, 0))
    return width * values + (pages if kind == _TEXT else largest), pages


def _page(file: Any, at: int, size: int) -> tuple[dict[int, Any], int]:
    """The header of a page, and how many bytes it has."""
    length = _HEADER_BYTES
    while True:
        thrift = _Thrift(_read(file, at, min(length, size - at)))
        try:
            return thrift.struct(_PAGE), thrift.at
        except pa.ArrowInvalid:
            if length >= min(_HEADER_LIMIT, size - at):
                raise
            length *= 16


def _read(file: Any, at: int, length: int) -> bytes:
    file.seek(at)
    return bytes(file.read(length))


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value is of the type that a field has."""
    if isinstance(wanted, list):
        return isinstance(value, list) and all(_fits(one, wanted[0]) for one in value)
    return isinstance(value, dict if isinstance(wanted, dict) else wanted)


class _Thrift:
    """Reads structs of the compact protocol as dictionaries by the numbers of their fields."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def struct(self, wanted: Mapping[int, Any], depth: int = 0) -> dict[int, Any]:
        """The fields that are ``wanted``, by their types; in structs and lists of them likewise."""
        found: dict[int, Any] = {}
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self._number()
            inner = wanted.get(field)
            value = self._value(head & 15, inner, depth + 1)
            if inner is not None:
                if not _fits(value, inner):
                    raise pa.ArrowInvalid("a field of another type")
                found[field] = value
        return found

    def _value(self, kind: int, wanted: Any, depth: int, listed: bool = False) -> Any:
        if depth > 32:
            raise pa.ArrowInvalid("a header that is nested too deeply")
        if kind in (1, 2):
            return self._byte() if listed else 2 - kind
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._number()
        if kind in (7, 13):
            return self._bytes(8 if kind == 7 else 16)
        if kind == 8:
            return self._bytes(self._varint())
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            self._check(count)
            inner = wanted[0] if isinstance(wanted, list) else None
            return [self._value(head & 15, inner, depth + 1, True) for _ in range(count)]
        if kind == 11:
            count = self._varint()
            self._check(count)
            kinds = self._byte() if count else 0
            for _ in range(count):
                self._value(kinds >> 4, None, depth + 1, True)
                self._value(kinds & 15, None, depth + 1, True)
            return None
        if kind == 12:
            return self.struct(wanted if isinstance(wanted, dict) else {}, depth + 1)
        raise pa.ArrowInvalid(f"a header with a field of the unknown type {kind}")

    def _check(self, count: int) -> None:
        # Every element has a byte at least.
        if count > len(self._data) - self.at:
            raise pa.ArrowInvalid("a header longer than its file")

    def _bytes(self, count: int) -> bytes:
        self._check(count)
        self.at += count
        return self._data[self.at - count : self.at]

    def _byte(self) -> int:
        if self.at >= len(self._data):
            raise pa.ArrowInvalid("a header longer than its file")
        self.at += 1
        return self._data[self.at - 1]

    def _varint(self) -> int:
        found = shift = 0
        while shift < 70:
            byte = self._byte()
            found |= (byte & 127) << shift
            if byte < 128:
                return found
            shift += 7
        raise pa.ArrowInvalid("a number longer than 64 bits")

    def _number(self) -> int:
        zigzag = self._varint()
        return (zigzag >> 1) ^ -(zigzag & 1)
