"""JSON of a model directory, read within bounds: bytes, values, depth, and each key once.

A file of a stranger's may hold anything that JSON can say. What is read here takes a few hundred
megabytes and seconds at the most, and is an error of the file otherwise.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from raycurv.errors import UserError, user_errors

# A header or an index of 300,000 tensors has some 30 MB and 2 million values.
MOST_BYTES = 32 << 20
MOST_VALUES = 4_000_000


def read_bytes(path: str | os.PathLike[str], most: int, where: str) -> bytes:
    """All bytes of a file; UserError if it cannot be read, or has more than ``most``."""
    with user_errors(where, "a file that can be read", "Copy it again.", OSError, got="{error}"):
        # Neither waits for the other end of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            # A buffer of what is asked for is there before anything is read.
            data = file.read(min(most, os.fstat(descriptor).st_size) + 1)
    if len(data) > most:
        got, remedy = "more", "A file of this kind is far smaller: check what it is."
        raise UserError(where, f"at most {most:,} bytes of JSON", got, remedy)
    return data


def read_json(path: Path, where: str, expected: str, remedy: str) -> dict[str, Any]:
    """The object that a JSON file holds; see :func:`parse_json`."""
    return parse_json(read_bytes(path, MOST_BYTES, where), where, expected, remedy)


def strict_json(data: bytes) -> Any:
    """What JSON text in UTF-8 says; ValueError, and no other, if it is none, is nested too deeply,
    or has a key twice."""
    try:
        return _DECODER.decode(data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("values nested too deeply") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:200]!r} twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def parse_json(
    data: bytes, where: str, expected: str, remedy: str, got: str = "{error}"
) -> dict[str, Any]:
    """The object that JSON text says.

    Args:
        data: the text in UTF-8.
        where: what it is of, for errors.
        expected: what should be there.
        remedy: what to do about a file that is not right.
        got: how an ``error`` in it is worded.

    Raises:
        UserError: no JSON, not an object, a key twice, or beyond the bounds above.
    """

    def invalid(error: str) -> UserError:
        return UserError(where, expected, got.format(error=error), remedy)

    # Every value but the first stands behind one of these.
    values = data.count(b",") + data.count(b"[") + data.count(b"{") + data.count(b":")
    if values > MOST_VALUES:
        raise invalid(f"more than {MOST_VALUES:,} values of JSON")
    try:
        found = strict_json(data)
    except ValueError as error:
        raise invalid(str(error)[:300]) from error
    if not isinstance(found, dict):
        raise invalid(f"a {type(found).__name__} of JSON")
    return found
