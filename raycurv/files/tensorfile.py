"""safetensors files that carry their own checksums: a truncated or damaged one is found, not used.

The file is an ordinary safetensors file. Its metadata hold, beside what the writer gives, a
blake2b hash of every tensor's bytes under ``checksums``, and one of the header itself.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from raycurv.errors import DamagedFile, not_finite
from raycurv.files.store import Store
from raycurv.mathematics.sums import is_finite
from raycurv.models.checkpoint import DTYPES, encode_header, hashed, header_entries, tensor_bytes

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

    @property
    def checksum(self) -> str:
        """A hash of all tensors' checksums."""
        return hashed(json.dumps(self._checksums, sort_keys=True).encode())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def read(self, key: str) -> Tensor:
        """One tensor in memory of its own; DamagedFile if its bytes do not match the checksum."""
        entry = self._entries[key]
        begin, end = entry["data_offsets"]
        buffer = torch.empty(end - begin, dtype=torch.uint8)
        with self.store.open(self.name) as file:
            file.seek(self._start + begin)
            got = file.readinto(buffer.numpy().data) if len(buffer) else 0
        if got != len(buffer):
            raise self.store.damaged(self.name, f"{len(buffer)} bytes of {key}", f"{got}")
        if hashed(tensor_bytes(buffer)) != self._checksums[key]:
            wanted = f"{key} with the checksum in the header"
            raise self.store.damaged(self.name, wanted, "another")
        return buffer.view(DTYPES[entry["dtype"]]).view(entry["shape"])

    def read_all(self) -> dict[str, Tensor]:
        return {key: self.read(key) for key in self._entries}


def open_tensors(store: Store, name: str) -> TensorFile:
    """Read the header of a file and check its length; FileNotFoundError if there is no such file,
    DamagedFile if it is truncated, or none that :func:`write_tensors` made."""
    with store.open(name) as file:
        size = file.size()
        try:
            (length,) = struct.unpack("<Q", bytes(file.read(8)))
            header = json.loads(bytes(file.read(min(length, size))))
            metadata = header.pop("__metadata__")
            checksums = json.loads(metadata.pop("checksums"))
            if checksums.pop(_HEADER) != _header_checksum(header, metadata):
                raise ValueError("a header that does not match its checksum")
            if checksums.keys() != header.keys():
                raise ValueError("checksums of other tensors")
            expected = 8 + length + max((e["data_offsets"][1] for e in header.values()), default=0)
        except (
            struct.error, ValueError, KeyError, TypeError, AttributeError, pa.ArrowInvalid,
        ) as error:  # fmt: skip
            got = f"{type(error).__name__}: {error}"
            raise store.damaged(name, "a safetensors header with checksums", got) from error
    if size != expected:
        raise store.damaged(name, f"{expected} bytes", f"{size} bytes")
    return TensorFile(store, name, metadata, header, checksums, 8 + length)


def is_complete(store: Store, name: str) -> bool:
    """Whether the file is there with its full length (its content is checked when it is read)."""
    if not store.exists(name):
        return False
    try:
        open_tensors(store, name)
    except DamagedFile:
        return False
    return True
