"""JSON that a file holds, read as data that may be anything, within bounds: bytes, values, depth,
and each key once.

A file of a stranger's may hold anything that JSON can say. What is read here takes a few hundred
megabytes and seconds at the most, and is an error of the file otherwise.

read_json(path, ...) -> dict     an object, or what is wrong with it
made_of(cls, said) -> cls        a dataclass of values that have the types of its fields
checksum(value) -> str           of the content, however it is laid out
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from raycurv.errors import UserError, in_words, shortened, user_errors

T = TypeVar("T")

# What a whole number of ours fits into: tables and tensors hold no larger one.
_LARGEST = 2**63

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
        raise invalid(in_words(error)) from error
    if not isinstance(found, dict):
        raise invalid(f"a {type(found).__name__} of JSON")
    return found


def checksum(value: Any) -> str:
    """A hash of what JSON says of a value, the same for the value that it is read back as."""
    # Keys that are no text become one, and are sorted as such.
    again = json.loads(json.dumps(value))
    return hashlib.blake2b(json.dumps(again, sort_keys=True).encode(), digest_size=16).hexdigest()


def made_of(cls: type[T], said: Any) -> T:
    """A dataclass of what JSON says: every key a field, every value of its type; fields with a
    default may be left out.

    Types are ``int``, ``float`` (finite), ``bool``, ``str``, ``None``, ``Any``, unions of these,
    and ``list``, ``dict`` and ``tuple[..., ...]`` (a list in JSON) of them.

    Raises:
        ValueError: says which key is wrong.
    """
    if not isinstance(said, dict):
        raise ValueError(f"no object, but {_kind(said)}")
    fields: Any = _fields
    kinds, needed = fields(cls)
    for name in needed:
        if name not in said:
            raise ValueError(f"no {name!r}")
    for name, value in said.items():
        if name not in kinds:
            raise ValueError(f"an unknown {shortened(repr(name))}")
        wrong = misfit(value, kinds[name])
        if wrong:
            raise ValueError(f"{name!r} is {wrong}")
    tuples = (name for name in said if get_origin(kinds[name]) is tuple)
    return cls(**{**said, **{name: tuple(said[name]) for name in tuples}})


@cache
def _fields(cls: Any) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The types of a dataclass' fields, and the names of those without a default."""
    hints, missing = get_type_hints(cls), dataclasses.MISSING
    fields = dataclasses.fields(cls)
    needed = (f.name for f in fields if f.default is missing and f.default_factory is missing)
    return {field.name: hints[field.name] for field in fields}, tuple(needed)


def misfit(value: Any, kind: Any) -> str:
    """What a value is instead of a type; empty where it is of that type."""
    if kind is float and isinstance(value, float):
        return "" if math.isfinite(value) else _kind(value)
    if kind is int or kind is float:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return "" if whole and abs(value) < _LARGEST else _kind(value)
    if kind is Any:
        return ""
    if isinstance(kind, type) and not get_args(kind):
        return "" if isinstance(value, kind) else _kind(value)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (list, tuple):
        if not isinstance(value, list):
            return _kind(value)
        return next((f"a list with {wrong}" for v in value if (wrong := misfit(v, inner[0]))), "")
    if origin is dict:
        if not isinstance(value, dict):
            return _kind(value)
        wrongs = (f"an object with {w}" for v in value.values() if (w := misfit(v, inner[1])))
        return next(wrongs, "")
    return "" if any(not misfit(value, one) for one in inner) else _kind(value)  # a union


def _kind(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, int) and abs(value) >= _LARGEST:
        return "a number beyond 64 bits"
    return shortened(repr(value))
