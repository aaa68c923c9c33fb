"""Files of text that are read as a stream, packed or not, within the bounds of a line."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from raycurv.data.bounds import LINE_BYTES
from raycurv.data.parts import FilePart
from raycurv.data.rows import READ_ERRORS, unreadable
from raycurv.errors import UserError, user_errors

# Endings of packed files, behind that of their format, and what unpacks them.
PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
READ_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"


@contextmanager
def open_text(part: FilePart) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked, without a mark of their order.

    Raises:
        UserError: it cannot be read, or ends before what it was packed of does.
    """
    packed = PACKED.get(os.path.splitext(part.path)[1].lower())
    with unreadable(part.location):
        stream = part.filesystem.open_input_stream(part.path, compression=packed)
    what = "a file that can be read" if packed is None else f"a whole file packed by {packed}"
    remedy = "Check its permissions." if packed is None else "Pack it again, or fetch it again."
    # What is read here is all that can fail so: no error of who takes the lines comes here.
    with (
        user_errors(part.location, what, remedy, *READ_ERRORS, got="{error}"),
        io.BufferedReader(stream, READ_BYTES) as file,
    ):
        if file.peek(len(BOM))[: len(BOM)] == BOM:
            file.read(len(BOM))
        yield cast(BinaryIO, file)


def bounded_lines(part: FilePart) -> Iterator[bytes]:
    """The lines of a file, each with its end, and empty ones.

    Raises:
        UserError: one is longer than ``LINE_BYTES``, or so many empty ones stand together.
    """
    blank = 0
    with open_text(part) as file:
        number = 0
        while line := file.readline(LINE_BYTES + 1):
            number += 1
            blank = 0 if line.strip() else blank + len(line)
            if len(line) > LINE_BYTES or blank > LINE_BYTES:
                raise UserError(
                    f"{part.location}, line {number}",
                    f"a line of at most {LINE_BYTES >> 20} MiB",
                    "a longer one" if len(line) > LINE_BYTES else "nothing but empty ones before",
                    "Write one example a line, a long text as several of them, and large "
                    "arrays of numbers as Parquet.",
                )
            yield line
