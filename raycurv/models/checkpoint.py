"""A checkpoint: the tensors of a directory of safetensors files, each read into memory of its own.

The files are never mapped: a private map reserves the size of the whole file, which fails on files
larger than memory and defeats memory limits. Format: https://github.com/huggingface/safetensors
(8 bytes of header length, a JSON header, then the tensors' bytes, little-endian, without holes).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raycurv.errors import UserError, user_errors
from raycurv.jsonfile import MOST_BYTES, parse_json, read_json
from raycurv.models.pieces import Parts, Piece, Place, meta
from raycurv.names import plain_name, regular_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Bits of a number of what the format has besides: such a tensor may lie there, but is not read.
FOREIGN_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "U32": 32,
    "U64": 64,
    "C64": 64,
}
_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | FOREIGN_BITS
# What a tensor may have: torch counts elements in 64 bits.
_MOST_DIMENSIONS, _MOST_ELEMENTS = 32, 2**63 - 1
_MOST_NAME = 1024
# Linux moves at most 2 GiB - 4 KiB a call; a smaller piece keeps a signal's delay short.
PIECE_BYTES = 1 << 30
# What is held at once of a file that is copied.
COPIED_BYTES = 16 << 20
# What a fingerprint looks at of each tensor: this many windows of this many bytes.
WINDOWS, WINDOW_BYTES = 16, 4096


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: ``nbytes`` bytes from byte ``offset`` of ``file``.

    ``stored`` is what the format calls its dtype.
    """

    file: str
    stored: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype; UserError for one that is not read."""
        dtype = DTYPES.get(self.stored)
        if dtype is None:
            raise UserError(
                f"{self.file}, a tensor of shape {list(self.shape)}",
                f"one of {', '.join(DTYPES)}",
                self.stored,
                "Save the checkpoint in floating point.",
            )
        return dtype

    @property
    def floating(self) -> bool:
        """Whether it holds numbers that are no integers, real or complex."""
        return self.stored[0] == "C" or self.stored.startswith(("F", "BF"))


class Checkpoint:
    """The tensors of a directory: ``model.safetensors``, or the files of its index; or of the one
    ``file`` there that is named.

    Holds headers only (picklable, no open files); every header is checked against its file's size.

    Attributes:
        files: names of the files with tensors, in the order of the index.
        stored: where each tensor lies, by its key.
        entries: those that a model is made of, by their keys.
        notes: what a person should know of them.
        unlisted: keys of tensors in these files that the index does not name.

    Raises:
        UserError: no directory, no safetensors, an unreadable or incomplete index, one that leads
            out of the directory, an invalid header, a tensor in two files, or a file that is
            shorter or longer than its header says.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, directory: str | Path, file: str | None = None) -> None:
        self.directory = Path(directory)
        self.entries: dict[str, Entry] = {}
        files = _files(self.directory) if file is None else {file: set()}
        if file is not None:
            regular_file(self.directory, file, f"checkpoint {directory}")
        self.files = tuple(files)
        listed = {key for expected in files.values() for key in expected}
        unlisted: list[str] = []
        for file, expected in files.items():
            found = _read_header(self.directory / file)
            absent = sorted(expected - found.keys())
            for key in sorted(self.entries.keys() & found.keys()):
                _refuse_another(key, self.entries[key], found[key])
            unlisted += sorted(found.keys() - listed) if listed else []
            if absent:
                raise UserError(
                    f"{self.directory / file}",
                    f"tensor {absent[0]}, which {INDEX} places there",
                    f"no such tensor ({len(absent)} of {len(expected)} absent)",
                    "Copy the checkpoint again: its index and its files do not belong together.",
                )
            self.entries.update(found)
        self.stored = self.entries
        self.unlisted = tuple(unlisted)

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, in its stored dtype or cast to another, on the CPU, in memory of its own;
        UserError if the file ends inside it, or cannot be opened."""
        shape = self.stored[key].shape
        read = self._elements(key, 0, math.prod(shape)).view(shape)
        return read if dtype is None else read.to(dtype)

    def read_part(self, place: Place) -> Tensor:
        """A part of a tensor, as :meth:`read`; no more is read than lies between its ends."""
        span = self._elements(place.key, place.offset, place.span)
        return span.as_strided(place.shape, place.strides)

    def _elements(self, key: str, start: int, count: int) -> Tensor:
        entry = self.stored[key]
        size = entry.dtype.itemsize
        buffer = torch.empty(count * size, dtype=torch.uint8)
        if count:
            _fill(entry.file, key, entry.offset + start * size, buffer.numpy().data)
        return buffer.view(entry.dtype)

    def chunks(
        self, file: str, replaced: Mapping[str, Callable[[], Tensor]]
    ) -> Iterator[bytes | memoryview]:
        """The bytes of a file, piece by piece, with other tensors in place of some.

        Of what is copied a piece is in memory at a time, of what is replaced a tensor: ``replaced``
        gives it by its key, of the same shape and dtype.

        Raises:
            UserError: the file has changed, ends early, or cannot be opened.
        """
        path = self.directory / file
        # What the file itself has: several files may have a tensor of one name.
        entries = sorted(_read_header(path).items(), key=_order)
        start = entries[0][1].offset if entries else path.stat().st_size
        yield from pieces(str(path), "its header", 0, start)
        for key, entry in entries:
            if key not in replaced:
                yield from pieces(str(path), key, entry.offset, entry.nbytes)
                continue
            tensor = replaced[key]()
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), key
            yield tensor_bytes(tensor)
            del tensor

    def fingerprint(self, keys: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
        """Per tensor as it is stored, of ``keys`` or of all, ``{"dtype", "shape", "hash"}``: a hash
        of 64 KiB sampled from it."""

        def one(key: str) -> dict[str, Any]:
            entry = self.stored[key]

            def sample(start: int, length: int) -> bytes:
                window = bytearray(length)
                _fill(entry.file, key, entry.offset + start, memoryview(window))
                return bytes(window)

            named = DTYPES.get(entry.stored, entry.stored)
            return describe(named, entry.shape, entry.nbytes, sample)

        return {key: one(key) for key in sorted(self.stored if keys is None else keys)}


def describe(
    dtype: torch.dtype | str,
    shape: tuple[int, ...],
    nbytes: int,
    sample: Callable[[int, int], bytes],
) -> dict[str, Any]:
    """A tensor's fingerprint: its dtype, its shape and the :func:`sampled_hash` of its bytes."""
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
        "hash": sampled_hash(nbytes, sample, WINDOWS, WINDOW_BYTES),
    }


def hashed(data: bytes | memoryview) -> str:
    """The blake2b-128 of bytes, in hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def sampled_hash(
    nbytes: int, sample: Callable[[int, int], bytes], windows: int, window_bytes: int
) -> str:
    """The blake2b-128, in hex, of the windows that are spread evenly over bytes, or of all bytes
    that fit into the windows; ``sample`` gives the bytes ``[start, start + length)``."""
    digest = hashlib.blake2b(digest_size=16)
    if nbytes <= windows * window_bytes:
        digest.update(sample(0, nbytes) if nbytes else b"")
    else:
        for window in range(windows):
            start = window * (nbytes - window_bytes) // (windows - 1)
            digest.update(sample(start, window_bytes))
    return digest.hexdigest()


def describe_tensor(tensor: Tensor) -> dict[str, Any]:
    """The fingerprint of a tensor in memory: equal to that of the same tensor in a file."""
    raw = tensor_bytes(tensor)
    return describe(
        tensor.dtype,
        tuple(tensor.shape),
        raw.nbytes,
        lambda start, length: raw[start : start + length].tobytes(),
    )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy when it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data


def header_entries(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the header of a safetensors file says of tensors that stand one behind the other."""
    entries: dict[str, Any] = {}
    offset = 0
    for key, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[key] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    return entries


def encode_header(header: Mapping[str, Any]) -> bytes:
    """What a safetensors file begins with: the length of its header, and that, padded."""
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise a ``UserError`` that names ``where`` when a floating-point tensor has a NaN or Inf."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # aminmax carries NaN and Inf through and, unlike isfinite, makes no tensor of the same size.
    low, high = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        raise UserError(
            where,
            "finite weights",
            f"NaN or Inf (as {str(tensor.dtype).removeprefix('torch.')})",
            "Use a checkpoint from before the training diverged, or a wider --dtype.",
        )


class Weight:
    """One tensor of a checkpoint, not read yet, in the shape of what HF's loader asks for.

    The loader takes ``weight[...]`` and then ``.to(device=…, dtype=…)``: reading waits for the
    latter, so that no more than one tensor exists in its stored dtype at any time.
    """

    def __init__(self, key: str, weights: Weights) -> None:
        self._key, self._weights = key, weights
        self._entry = weights.checkpoint.entries[key]
        self.shape = torch.Size(self._entry.shape)

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored; UserError for one that is not read."""
        return self._entry.dtype

    def __getitem__(self, index: object) -> Weight:
        assert index is Ellipsis, "a tensor of a checkpoint is read whole"
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, read, cast, checked; on the device of its mapping, whatever is asked."""
        return self._weights.load(self._key, dtype)


class Weights(Mapping[str, Weight]):
    """All tensors of a checkpoint as the lazy ``state_dict`` of HF's ``from_pretrained(None, …)``.

    They go to ``device``; the meta device reads nothing, and shows names and shapes only. ``used``
    are the keys that were asked for, in that order.

    Args:
        keys: the names that the loader sees -> the keys that they stand for; by default all keys,
            under their own names.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, keys: Mapping[str, str] | None = None
    ) -> None:
        self.checkpoint, self.device = checkpoint, device
        self.keys_by_name = {key: key for key in checkpoint.entries} if keys is None else keys
        self.used: list[str] = []
        self._made: list[tuple[str, Tensor]] = []
        # HF's loader asks from several threads; one tensor at a time bounds the memory.
        self._one_at_a_time = threading.Lock()

    def __getitem__(self, name: str) -> Weight:
        return Weight(self.keys_by_name[name], self)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_by_name)

    def __len__(self) -> int:
        return len(self.keys_by_name)

    def parts_of(self, module: nn.Module) -> dict[str, Parts]:
        """Parameter of a module that was loaded on the meta device -> the tensor that it is, or is
        a view of, as :class:`Views` keeps them.

        A parameter that the loader made of several tensors is left out: it has storage of its own.
        """
        made = {tensor.untyped_storage()._cdata: (key, tensor) for key, tensor in self._made}
        found = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            key, tensor = made.get(parameter.untyped_storage()._cdata, ("", None))
            if tensor is not None:
                piece = Piece.between(key, tensor.shape, meta(parameter.shape), parameter)
                found[name] = Parts(tuple(parameter.shape), (piece,))
        return found

    def lost(self, module: nn.Module) -> list[str]:
        """Keys that were loaded on the meta device, and whose tensor is not in the module as it
        was read: another key's took its place, or something was made of it."""
        tensors = (*module.parameters(), *module.buffers())
        kept = {tensor.untyped_storage()._cdata for tensor in tensors}
        return [k for k, made in self._made if made.untyped_storage()._cdata not in kept]

    def load(self, key: str, dtype: torch.dtype | None) -> Tensor:
        """Read one tensor and cast it; UserError for NaN or Inf after the cast, a short file, or
        integers where the model has floating point."""
        entry = self.checkpoint.entries[key]
        dtype = dtype or entry.dtype
        if dtype.is_floating_point and not entry.dtype.is_floating_point:
            raise UserError(
                f"{entry.file}, tensor {key}",
                "numbers in floating point",
                f"{entry.stored}, as of a quantised weight",
                "Use the checkpoint before it was quantised.",
            )
        with self._one_at_a_time:
            self.used.append(key)
            if self.device.type == "meta":
                made = torch.empty(entry.shape, dtype=dtype, device="meta")
                self._made.append((key, made))
                return made
            tensor = self.checkpoint.read(key, dtype)
            check_finite(tensor, f"{entry.file}, tensor {key}")
            return tensor.to(self.device)


def _files(directory: Path) -> dict[str, set[str]]:
    """File names of a checkpoint, each with the tensors that an index expects in it."""
    if not directory.is_dir():
        raise UserError(
            f"checkpoint {directory}", "a directory", "none there", "Check the path of the model."
        )
    # The same preference as HF: one file wins over an index.
    if (directory / SINGLE).exists():
        regular_file(directory, SINGLE, f"checkpoint {directory}")
        return {SINGLE: set()}
    path = directory / INDEX
    if not path.exists():
        others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        raise UserError(
            f"checkpoint {directory}",
            f"{SINGLE} or {INDEX}",
            f"neither, but {others[0]}" if others else "neither",
            "Save the model again with save_pretrained, which writes safetensors.",
        )
    files: dict[str, set[str]] = {}
    for key, file in _weight_map(directory).items():
        files.setdefault(file, set()).add(key)
    for file in sorted(files):
        regular_file(directory, file, str(path))
    return files


def indexed_files(directory: Path) -> list[str]:
    """Names of the files that the index of a directory lists, which may not be there yet."""
    return sorted({plain_name(file, INDEX) for file in _weight_map(directory).values()})


def _weight_map(directory: Path) -> dict[str, str]:
    """In which file each tensor lies, by the index; UserError if that says nothing of the kind."""
    path = directory / INDEX
    wanted, remedy = 'JSON with a "weight_map" from tensor to file', "Copy the checkpoint again."
    place = regular_file(directory, INDEX, str(path))
    listed = read_json(place, str(path), wanted, remedy).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise UserError(str(path), wanted, "another one, or none", remedy)
    return listed


def _read_header(path: Path) -> dict[str, Entry]:
    """Entries of one safetensors file, its layout checked."""

    wanted = "a safetensors file"
    remedy = "Copy or download the file again; it may be incomplete or of another format."

    def invalid(got: str) -> UserError:
        return UserError(str(path), wanted, got, remedy)

    with user_errors(str(path), wanted, remedy, OSError, got="{error}"), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if prefix == b"version ":
            raise UserError(
                str(path), wanted, "a pointer of git-lfs to it",
                "Fetch the file itself: git lfs pull.",
            )  # fmt: skip
        if len(prefix) < 8:
            raise invalid(f"{size} bytes")
        if length > MOST_BYTES:
            raise invalid(f"a header length of {length} bytes")
        if 8 + length > size:
            raise invalid(f"a file truncated inside its header ({size} bytes)")
        raw = file.read(length)
    start = 8 + length
    header = parse_json(raw, str(path), wanted, remedy, "an unreadable header ({error})")
    header.pop("__metadata__", None)
    entries = {key: _entry(path, key, value, start, invalid) for key, value in header.items()}
    at = start
    for key, entry in sorted(entries.items(), key=_order):
        if entry.offset != at:
            raise invalid(f"tensor {key} at byte {entry.offset} instead of {at}")
        at += entry.nbytes
        if at > size:
            raise invalid(f"a file truncated inside tensor {key} ({size} bytes, {at} needed)")
    if at != size:
        raise invalid(f"{size - at} bytes after the last tensor")
    return entries


def _entry(
    path: Path, key: str, value: Any, start: int, invalid: Callable[[str], UserError]
) -> Entry:
    """What a header says of one tensor, checked by itself."""
    if not key.isprintable() or len(key) > _MOST_NAME:
        raise invalid(f"a tensor with a name of {len(key)} characters, {key[:80]!r}")
    named = f"an unreadable header (tensor {key})"
    if not isinstance(value, dict):
        raise invalid(named)
    stored: Any = value.get("dtype")
    shape, offsets = _counts(value.get("shape")), _counts(value.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        shown = ", ".join(f"{k} {str(value.get(k))[:80]}" for k in ("shape", "data_offsets"))
        raise invalid(f"{named}: {shown}")
    bits = _BITS.get(stored) if isinstance(stored, str) else None
    if bits is None:
        raise invalid(f"tensor {key} of the unknown dtype {str(stored)[:80]}")
    (begin, end), elements = offsets, math.prod(shape)
    if math.prod(max(1, n) for n in shape) > _MOST_ELEMENTS or 8 * (end - begin) != elements * bits:
        raise invalid(f"tensor {key} with {end - begin} bytes for shape {list(shape)}")
    return Entry(str(path), stored, shape, start + begin, end - begin)


def _counts(value: object) -> tuple[int, ...] | None:
    """A short list of whole numbers from 0, or ``None`` for anything else."""
    if not isinstance(value, list) or len(value) > _MOST_DIMENSIONS:
        return None
    return tuple(value) if all(type(n) is int and 0 <= n <= _MOST_ELEMENTS for n in value) else None


def _refuse_another(key: str, one: Entry, other: Entry) -> None:
    """Refuse a tensor that a second file has with other values."""

    def content(entry: Entry) -> tuple[object, ...]:
        digest = hashlib.blake2b()
        for piece in pieces(entry.file, key, entry.offset, entry.nbytes):
            digest.update(piece)
        return entry.stored, entry.shape, digest.digest()

    if content(one) != content(other):
        raise UserError(
            f"{other.file}, tensor {key}",
            "each tensor once",
            f"another one of that name in {Path(one.file).name}",
            "Copy the checkpoint again: its files are of different saves.",
        )


def _order(named: tuple[str, Entry]) -> tuple[int, int]:
    """Sorts entries as they lie in their file, empty ones before what begins where they do."""
    return named[1].offset, named[1].nbytes


def pieces(file: str, what: str, offset: int, nbytes: int) -> Iterator[memoryview]:
    """``nbytes`` bytes of a file from ``offset``, piece by piece, each in memory of its own."""
    for start in range(offset, offset + nbytes, COPIED_BYTES):
        piece = memoryview(bytearray(min(COPIED_BYTES, offset + nbytes - start)))
        _fill(file, what, start, piece)
        yield piece


def _fill(file: str, key: str, offset: int, into: memoryview) -> None:
    """Read ``len(into)`` bytes from ``offset``."""
    where, remedy = f"{file}, tensor {key}", "Check the path of the model."
    with user_errors(where, "a readable file", remedy, OSError, got="{error}"):
        descriptor = os.open(file, os.O_RDONLY)
    try:
        done = 0
        while done < len(into):
            got = os.preadv(descriptor, [into[done : done + PIECE_BYTES]], offset + done)
            if got == 0:
                raise UserError(
                    where,
                    f"{len(into)} bytes from byte {offset}",
                    f"{done}: the file is truncated",
                    "Copy or download the file again.",
                )
            done += got
    finally:
        os.close(descriptor)
