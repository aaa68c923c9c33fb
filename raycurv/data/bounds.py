"""How much of a stranger's data is held at a time, in bytes: what is larger is refused by name.

A few bytes of a file can stand for many: a column of zeros, a dictionary of one long text, a
compressed buffer. What a file says of itself is looked at before it is decoded:

    file -> bytes decoded       at most EXPANDED, or RATIO times what the file has for them
    line of JSON                at most LINE_BYTES; Python holds up to 30 times as much of it
    text that is tokenised      at most TEXT_BYTES, for a tokenizer holds 100 to 300 bytes a byte
    id                          at most ID_BYTES, for all ids stay in memory

Rows are read in chunks of at most CHUNK_ROWS rows and CHUNK_BYTES bytes, one row at least, and
texts tokenised at most TOKENISED_BYTES at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from raycurv.errors import UserError

CHUNK_ROWS = 1024
CHUNK_BYTES = 4 << 20
LINE_BYTES = 16 << 20
TEXT_BYTES = 2 << 20
TOKENISED_BYTES = 256 << 10
ID_BYTES = 4 << 10
EXPANDED = 512 << 20
RATIO = 32


def check_expansion(where: str, decoded: int, stored: int, remedy: str) -> None:
    """Refuse what takes far more memory than the bytes that stand for it.

    Args:
        where: what is read, for the message.
        decoded: bytes that it takes in memory.
        stored: bytes that stand for it, in a file say.
        remedy: how data that has to be like this gets by.

    Raises:
        UserError: more than ``EXPANDED`` bytes, and more than ``RATIO`` times ``stored``.
    """
    if decoded > max(EXPANDED, RATIO * stored):
        raise UserError(
            where,
            f"what takes at most {EXPANDED >> 20} MiB, or {RATIO} times its bytes, in memory",
            f"{stored:,} bytes that become {decoded:,}",
            remedy,
        )


def chunks(row_bytes: np.ndarray, limit: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """Ranges of rows, from the first on, that are within the bounds of a chunk.

    Args:
        row_bytes: what each row takes in memory, ``[rows]``.
        limit: bytes of a chunk of more than one row.
    """
    ends = np.cumsum(row_bytes, dtype=np.int64)
    start = 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + limit, side="right"))
        stop = min(max(stop, start + 1), start + CHUNK_ROWS)
        yield start, min(stop, len(ends))
        start = stop
