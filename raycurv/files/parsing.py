"""JSON that a file holds, read as data that may be anything: what is wrong with it is said.

made_of(cls, said) -> cls        a dataclass of values that have the types of its fields
checksum(value) -> str           of the content, however it is laid out
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

# What a whole number of ours fits into: tables and tensors hold no larger one.
_LARGEST = 2**63


def checksum(value: Any) -> str:
    """A hash of what JSON says of a value, the same for the value that it is read back as."""
    # Keys that are no text become one, and are sorted as such.
    again = json.loads(json.dumps(value))
    return hashlib.blake2b(json.dumps(again, sort_keys=True).encode(), digest_size=16).hexdigest()


def made_of(cls: type[T], said: Any) -> T:
    """A dataclass of what JSON says: every key a field, every value of its type; fields with a
    default may be left out.

    Types are ``int``, ``float`` (finite), ``bool``, ``str``, ``None``, ``Any``, unions of these,
    and ``list`` and ``dict`` of them.

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
    return cls(**said)


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
    if origin is list:
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


def shortened(text: str) -> str:
    """A text of a file, short enough for a message."""
    return text if len(text) <= 100 else f"{text[:100]}…"
