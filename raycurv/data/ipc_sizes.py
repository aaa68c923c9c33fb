"""What an Arrow IPC file or stream would take in memory, by its messages' headers alone.

Each message is a FlatBuffer, which names buffers, and a body, which holds them:

    ffffffff  length int32  Message                                   body, padded to 8 bytes
                            header: RecordBatch or DictionaryBatch    bytes uncompressed int64, data

https://arrow.apache.org/docs/format/Columnar.html, "Serialization and Interprocess Communication".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

MAGIC = b"ARROW1"
_DICTIONARY, _BATCH = 2, 3  # kinds of messages


@dataclass(frozen=True)
class MessageSize:
    """One message that holds data.

    Attributes:
        rows: of a record batch; 0 of a dictionary.
        decoded: bytes of its buffers, uncompressed.
        batch: whether it is a record batch.
    """

    rows: int
    decoded: int
    batch: bool


def message_sizes(file: Any, start: int, size: int) -> Iterator[MessageSize]:
    """The sizes of all messages with data.

    Args:
        file: seekable, binary.
        start: where the stream of messages begins.
        size: bytes of the file.

    Raises:
        pyarrow.ArrowInvalid: the headers contradict themselves or the file.
    """
    at = start
    while at + 4 <= size:
        (length,) = struct.unpack("<i", _read(file, at, 4))
        at += 4
        if length == -1:
            (length,) = struct.unpack("<i", _read(file, at, 4))
            at += 4
        if length == 0:
            return
        if length < 0 or at + length > size:
            raise pa.ArrowInvalid("a message is longer than the file")
        table = _Table.root(_read(file, at, length))
        at += length
        kind, body = table.number(1, "<B"), table.number(3, "<q")
        if body < 0 or at + body > size:
            raise pa.ArrowInvalid("a message is longer than the file")
        if kind in (_DICTIONARY, _BATCH):
            yield _size(table.table(2), kind, file, at, body)
        at += body


def _size(header: _Table | None, kind: int, file: Any, at: int, body: int) -> MessageSize:
    batch = header.table(1) if kind == _DICTIONARY and header is not None else header
    if batch is None:
        raise pa.ArrowInvalid("a message without its header")
    compressed, decoded = batch.table(3) is not None, 0
    for offset, length in batch.pairs(2):
        if offset < 0 or length < 0 or offset + length > body:
            raise pa.ArrowInvalid("a buffer outside its message")
        if compressed and length >= 8:
            # -1 says that this one buffer is not compressed.
            (whole,) = struct.unpack("<q", _read(file, at + offset, 8))
            decoded += length if whole == -1 else whole
            if whole < -1:
                raise pa.ArrowInvalid(f"a buffer of {whole} bytes")
        else:
            decoded += length
    rows = batch.number(0, "<q") if kind == _BATCH else 0
    if rows < 0:
        raise pa.ArrowInvalid(f"a record batch of {rows} rows")
    return MessageSize(rows, decoded, kind == _BATCH)


def _read(file: Any, at: int, length: int) -> bytes:
    file.seek(at)
    found = bytes(file.read(length))
    if len(found) != length:
        raise pa.ArrowInvalid("the file ends within a message")
    return found


@dataclass(frozen=True)
class _Table:
    """A table of a FlatBuffer: its fields by their number; one that is absent is 0 or ``None``."""

    data: bytes
    at: int

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, _number(data, 0, "<I"))

    def _field(self, number: int) -> int | None:
        table = self.at - _number(self.data, self.at, "<i")
        entry = 4 + 2 * number
        if entry + 2 > _number(self.data, table, "<H"):
            return None
        offset = _number(self.data, table + entry, "<H")
        return self.at + offset if offset else None

    def number(self, number: int, form: str) -> int:
        at = self._field(number)
        return 0 if at is None else _number(self.data, at, form)

    def table(self, number: int) -> _Table | None:
        at = self._field(number)
        return None if at is None else _Table(self.data, at + _number(self.data, at, "<I"))

    def pairs(self, number: int) -> Iterator[tuple[int, int]]:
        """A vector of structs of two int64 each."""
        at = self._field(number)
        if at is None:
            return
        at += _number(self.data, at, "<I")
        count = _number(self.data, at, "<I")
        if at + 4 + 16 * count > len(self.data):
            raise pa.ArrowInvalid("a vector longer than its message")
        yield from struct.iter_unpack("<qq", self.data[at + 4 : at + 4 + 16 * count])


def _number(data: bytes, at: int, form: str) -> int:
    if not 0 <= at <= len(data) - struct.calcsize(form):
        raise pa.ArrowInvalid("a header that points outside itself")
    number: int = struct.unpack_from(form, data, at)[0]
    return number
