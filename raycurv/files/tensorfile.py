"""safetensors files that carry their own checksums: a truncated or damaged one is found, not used.

The file is an ordinary safetensors file. Its metadata hold, beside what the writer gives, a
blake2b hash of every tensor's bytes under ``checksums``, and one of the header itself.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raycurv.errors import DamagedFile, not_finite, shortened
from raycurv.files.store import Store
from raycurv.jsonfile import made_of, misfit, strict_json
from raycurv.mathematics.sums import is_finite
from raycurv.models.checkpoint import (
    DTYPES,
    encode_header,
    hashed,
    header_entries,
    tensor_bytes,
)

# The bits of infinity, as a whole number.
_INFINITE = {
    torch.float64: 0x7FF0 << 48,
    torch.float32: 0x7F80 << 16,
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
}
_LARGEST_HEADER = 100_000_000
# Bytes that are read, hashed and looked at together: they stay in a core's cache.
_PIECE = 1 << 18
# Bytes of a file that are read with its header: all of a small one.
_AHEAD = 1 << 16

# Where the checksum of the header stands among those of the tensors.
_HEADER = "__header__"


def _header_checksum(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    return hashed(json.dumps([entries, dict(metadata)], sort_keys=True).encode())


def write_tensors(
    store: Store,
    name: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    finite: bool = True,
) -> None:
    """Write a safetensors file, atomically, whose header carries ``metadata`` along.

    Args:
        finite: refuse numbers that are not; hidden states on their way may hold them.

    Raises:
        NumericalError: a number is NaN or infinite.
    """
    for key, tensor in tensors.items():
        if finite and not is_finite(tensor):
            block = f"block {metadata['block']}, " if "block" in metadata else ""
            raise not_finite(
                f"{block}{store.path(name)}", f"{key} of {str(tensor.dtype).removeprefix('torch.')}"
            )
    header = header_entries(tensors)
    chunks = [tensor_bytes(tensor) for tensor in tensors.values()]
    checksums = {key: hashed(data) for key, data in zip(tensors, chunks, strict=True)}
    checksums[_HEADER] = _header_checksum(header, metadata)
    header["__metadata__"] = {**metadata, "checksums": json.dumps(checksums)}
    store.write(name, [encode_header(header), *chunks])


@dataclass(frozen=True)
class TensorFile:
    """An opened file: its metadata, and its tensors when asked for."""

    store: Store
    name: str
    metadata: dict[str, str]
    _entries: dict[str, dict[str, Any]]
    _checksums: dict[str, str]
    _start: int
    # The first bytes of the file.
    _ahead: bytes

    @property
    def checksum(self) -> str:
        """A hash of all tensors' checksums."""
        return hashed(json.dumps(self._checksums, sort_keys=True).encode())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def read(self, key: str) -> Tensor:
        """One tensor in memory of its own; DamagedFile if its bytes do not match the checksum."""
        return self._read(key, None)

    def read_all(self) -> dict[str, Tensor]:
        return {key: self.read(key) for key in self._entries}

    def numbers(self, key: str, shape: Sequence[int | None], least: float = -math.inf) -> Tensor:
        """A tensor of finite floating-point numbers.

        Args:
            key: its name.
            shape: what it must be; ``None`` for an axis of any length.
            least: no number is below it; 0 or -∞.

        Raises:
            DamagedFile: as :meth:`read`, or a number, the shape or the dtype is another.
        """
        entry = self._entry(key)
        there = entry["shape"]
        fits = len(there) == len(shape) and all(
            s in (None, t) for s, t in zip(shape, there, strict=True)
        )
        if not fits or DTYPES[entry["dtype"]] not in _INFINITE:
            wanted = " x ".join("any" if s is None else str(s) for s in shape)
            raise self.store.damaged(
                self.name, f"{key} as floating-point numbers, {wanted}",
                f"{entry['dtype']}, {' x '.join(map(str, there))}",
            )  # fmt: skip
        return self._read(key, least)

    def count(self, key: str) -> int:
        """A whole number of at least 0 that a tensor holds; DamagedFile if it is something else."""
        entry = self._entry(key)
        found = int(self.read(key)) if (entry["dtype"], entry["shape"]) == ("I64", []) else -1
        if found < 0:
            raise self.store.damaged(self.name, f"{key} as a count", f"{entry['dtype']}, {found}")
        return found

    def note(self, key: str) -> str:
        """A text of the metadata; DamagedFile if there is none."""
        if key not in self.metadata:
            raise self.store.damaged(self.name, f"{key} in its metadata", "nothing")
        return self.metadata[key]

    def noted_json(self, key: str, kind: Any) -> Any:
        """What JSON of the metadata says, of a type as :func:`misfit` takes it, or a dataclass made
        of it; DamagedFile if there is none, or of another type."""
        try:
            said = strict_json(self.note(key).encode())
            if isinstance(kind, type) and is_dataclass(kind):
                return made_of(kind, said)
            wrong = misfit(said, kind)
        except ValueError as error:
            wrong = str(error)
        if wrong:
            raise self.store.damaged(self.name, f"{key} in its metadata", shortened(wrong))
        return said

    def noted(self, key: str) -> float:
        """A finite number of the metadata; DamagedFile if there is none."""
        text = self.note(key)
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            raise self.store.damaged(self.name, f"{key} as a number", shortened(repr(text)))
        return found

    def belongs(self, key: str, name: str) -> None:
        """Refuse, with a DamagedFile, a file whose metadata name another block or factor: one that
        was moved here."""
        if self.note(key) != name:
            got = shortened(repr(self.metadata[key]))
            raise self.store.damaged(self.name, f"the file of {key} {name}", f"that of {got}")

    def _entry(self, key: str) -> dict[str, Any]:
        if key not in self._entries:
            raise self.store.damaged(self.name, f"a tensor {key}", "none")
        return self._entries[key]

    def _read(self, key: str, least: float | None) -> Tensor:
        """Read a tensor and compare its checksum; with ``least`` see that its numbers are finite
        and not below, too, a piece at a time while it is at hand."""
        entry = self._entry(key)
        begin, end = entry["data_offsets"]
        buffer = torch.empty(end - begin, dtype=torch.uint8)
        values = buffer.view(DTYPES[entry["dtype"]])
        raw, digest = buffer.numpy(), hashlib.blake2b(digest_size=16)
        wrong = False
        ahead = self._start + end <= len(self._ahead)
        source = nullcontext(io.BytesIO(self._ahead)) if ahead else self.store.reading(self.name)
        with source as file:
            file.seek(self._start + begin)
            for start in range(0, len(buffer), _PIECE):
                piece = raw[start : start + _PIECE]
                got = file.readinto(piece.data)
                if got != len(piece):
                    wanted = f"{len(buffer)} bytes of {key}"
                    raise self.store.damaged(self.name, wanted, f"{start + got}")
                digest.update(piece.data)
                if least is not None:
                    wrong |= not _holds(piece, values.dtype, least)
        if digest.hexdigest() != self._checksums[key]:
            wanted = f"{key} with the checksum in the header"
            raise self.store.damaged(self.name, wanted, "another")
        if wrong:
            floor = "" if least is None or least == -math.inf else f" of at least {least:g}"
            raise self.store.damaged(self.name, f"{key} as finite numbers{floor}", "others")
        return values.view(entry["shape"])


def _holds(piece: np.ndarray[Any, Any], dtype: torch.dtype, least: float) -> bool:
    """Whether floating-point numbers are finite, and not below ``least``, which is 0 or -∞.

    The bits of such numbers, taken as whole numbers, grow with the number; behind those of all
    finite ones stand infinity and NaN, and behind these the same of negative numbers. To look for
    the largest takes a hundredth of the time of hashing.
    """
    size = dtype.itemsize
    infinite = _INFINITE[dtype]
    unsigned = piece.view(f"u{size}")
    if least == 0.0:
        return int(unsigned.max()) < infinite
    sign = 1 << (8 * size - 1)
    return int(piece.view(f"i{size}").max()) < infinite and int(unsigned.max()) < infinite + sign


def open_tensors(store: Store, name: str) -> TensorFile:
    """Read the header of a file and check its length; FileNotFoundError if there is no such file,
    DamagedFile if it is truncated, or none that :func:`write_tensors` made."""
    with store.reading(name) as file:
        size = file.size()
        try:
            ahead = bytes(file.read(_AHEAD))
            length = int.from_bytes(ahead[:8], "little")
            if len(ahead) < 8 or length > min(size - 8, _LARGEST_HEADER):
                begin = ahead[:8].hex() or "none"
                raise ValueError(f"a file of {size} bytes that begins with {begin}")
            ahead += bytes(file.read(max(0, 8 + length - len(ahead))))
            header = strict_json(ahead[8 : 8 + length])
            metadata, checksums = _taken_apart(header)
            if checksums.pop(_HEADER) != _header_checksum(header, metadata):
                raise ValueError("a header that does not match its checksum")
            if checksums.keys() != header.keys():
                raise ValueError("checksums of other tensors")
            expected = 8 + length + _check_layout(header)
        except (ValueError, KeyError) as error:
            got = shortened(f"{type(error).__name__}: {error}")
            raise store.damaged(name, "a safetensors header with checksums", got) from error
    if size != expected:
        raise store.damaged(name, f"{expected} bytes", f"{size} bytes")
    return TensorFile(store, name, metadata, header, checksums, 8 + length, ahead[:_AHEAD])


def _taken_apart(header: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Take metadata and checksums out of a header; KeyError or ValueError if they are not there."""
    _check_object(header, dict)
    metadata = _check_object(header.pop("__metadata__"), str)
    return metadata, _check_object(strict_json(metadata.pop("checksums").encode()), str)


def _check_object(said: Any, kind: type) -> dict[str, Any]:
    """Refuse, with a ValueError, what is no object with values of a type."""
    if not isinstance(said, dict) or not all(isinstance(value, kind) for value in said.values()):
        raise ValueError("another header")
    return said


def _check_layout(header: dict[str, dict[str, Any]]) -> int:
    """Refuse, with a ValueError or KeyError, tensors that do not stand one behind the other with
    the bytes that their shapes have; gives where the last one ends."""
    at = 0
    for key, entry in header.items():
        dtype, shape, offsets = DTYPES[str(entry["dtype"])], entry["shape"], entry["data_offsets"]
        both = isinstance(shape, list) and isinstance(offsets, list)
        if not both or not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):
            raise ValueError(f"{key} of no shape")
        if offsets != [at, at + math.prod(shape) * dtype.itemsize]:
            raise ValueError(f"{key} in the bytes {offsets}")
        at = offsets[1]
    return at


def is_complete(store: Store, name: str) -> bool:
    """Whether the file is there with its full length (its content is checked when it is read)."""
    if not store.exists(name):
        return False
    try:
        open_tensors(store, name)
    except DamagedFile:
        return False
    return True
