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

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The limit of the reference implementation: a larger header is a file of another kind.
MAX_HEADER_BYTES = 100_000_000
# Linux moves at most 2 GiB - 4 KiB a call; a smaller piece keeps a signal's delay short.
PIECE_BYTES = 1 << 30
# What is held at once of a file that is copied.
COPIED_BYTES = 16 << 20
# What a fingerprint looks at of each tensor: this many windows of this many bytes.
WINDOWS, WINDOW_BYTES = 16, 4096


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: ``nbytes`` bytes from byte ``offset`` of ``file``."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint:
    """The tensors of a directory: ``model.safetensors``, or the files of its index.

    Holds headers only (picklable, no open files); every header is checked against its file's size.

    Attributes:
        files: names of the files with tensors, in the order of the index.
        entries: where each tensor lies, by its key.

    Raises:
        UserError: no directory, no safetensors, an unreadable or incomplete index, an invalid
            header, or a file that is shorter or longer than its header says.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.entries: dict[str, Entry] = {}
        files = _files(self.directory)
        self.files = tuple(files)
        for file, expected in files.items():
            found = _read_header(self.directory / file)
            absent = sorted(expected - found.keys())
            if absent:
                raise UserError(
                    f"{self.directory / file}",
                    f"tensor {absent[0]}, which {INDEX} places there",
                    f"no such tensor ({len(absent)} of {len(expected)} absent)",
                    "Copy the checkpoint again: its index and its files do not belong together.",
                )
            self.entries.update(found)

    def read(self, key: str) -> Tensor:
        """One tensor, in its stored dtype, on the CPU, in memory of its own; UserError if the file
        ends inside it, or cannot be opened."""
        entry = self.entries[key]
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        if entry.nbytes:
            _fill(entry.file, key, entry.offset, buffer.numpy().data)
        return buffer.view(entry.dtype).view(entry.shape)

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
        """Per tensor, of ``keys`` or of all, ``{"dtype", "shape", "hash"}``: a hash of 64 KiB
        sampled from it."""

        def one(key: str) -> dict[str, Any]:
            entry = self.entries[key]

            def sample(start: int, length: int) -> bytes:
                window = bytearray(length)
                _fill(entry.file, key, entry.offset + start, memoryview(window))
                return bytes(window)

            return describe(entry.dtype, entry.shape, entry.nbytes, sample)

        return {key: one(key) for key in sorted(self.entries if keys is None else keys)}


def describe(
    dtype: torch.dtype, shape: tuple[int, ...], nbytes: int, sample: Callable[[int, int], bytes]
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
        entry = weights.checkpoint.entries[key]
        self.shape, self.dtype = torch.Size(entry.shape), entry.dtype

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
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint, self.device = checkpoint, device
        self.used: list[str] = []
        self._made: list[tuple[str, Tensor]] = []
        # HF's loader asks from several threads; one tensor at a time bounds the memory.
        self._one_at_a_time = threading.Lock()

    def __getitem__(self, key: str) -> Weight:
        return Weight(key, self)

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.entries)

    def __len__(self) -> int:
        return len(self.checkpoint.entries)

    def keys_of(self, module: nn.Module) -> dict[str, str]:
        """Parameter of a module that was loaded on the meta device -> the one key that it is.

        A parameter that the loader made of several tensors, or of a part or another view of one, is
        left out: it has storage of its own, or another shape.
        """
        made = {tensor.untyped_storage()._cdata: (key, tensor) for key, tensor in self._made}
        found = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            key, tensor = made.get(parameter.untyped_storage()._cdata, ("", None))
            if tensor is not None and (
                (parameter.shape, parameter.stride(), parameter.storage_offset())
                == (tensor.shape, tensor.stride(), 0)
            ):
                found[name] = key
        return found

    def load(self, key: str, dtype: torch.dtype | None) -> Tensor:
        """Read one tensor and cast it; UserError for NaN or Inf after the cast, or a short file."""
        entry = self.checkpoint.entries[key]
        dtype = dtype or entry.dtype
        with self._one_at_a_time:
            self.used.append(key)
            if self.device.type == "meta":
                made = torch.empty(entry.shape, dtype=dtype, device="meta")
                self._made.append((key, made))
                return made
            tensor = self.checkpoint.read(key).to(dtype)
            check_finite(tensor, f"{entry.file}, tensor {key}")
            return tensor.to(self.device)


def _files(directory: Path) -> dict[str, set[str]]:
    """File names of a checkpoint, each with the tensors that an index expects in it."""
    if not directory.is_dir():
        raise UserError(
            f"checkpoint {directory}", "a directory", "none there", "Check the path of the model."
        )
    # The same preference as HF: one file wins over an index.
    if (directory / SINGLE).is_file():
        return {SINGLE: set()}
    if not (directory / INDEX).is_file():
        others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        raise UserError(
            f"checkpoint {directory}",
            f"{SINGLE} or {INDEX}",
            f"neither, but {others[0]}" if others else "neither",
            "Save the model again with save_pretrained, which writes safetensors.",
        )
    path = directory / INDEX
    files: dict[str, set[str]] = {}
    wanted, remedy = 'JSON with a "weight_map" from tensor to file', "Copy the checkpoint again."
    with user_errors(str(path), wanted, remedy, ValueError, KeyError, TypeError, AttributeError):
        for key, file in json.loads(path.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(str(file), set()).add(key)
    for file in sorted(files):
        if not (directory / file).is_file():
            raise UserError(
                str(path),
                f"the file {file}, which it names for {min(files[file])}",
                "no such file",
                "Copy the rest of the checkpoint.",
            )
    return files


def _read_header(path: Path) -> dict[str, Entry]:
    """Entries of one safetensors file, its layout checked."""

    wanted = "a safetensors file"
    remedy = "Copy or download the file again; it may be incomplete or of another format."

    def invalid(got: str) -> UserError:
        return UserError(str(path), wanted, got, remedy)

    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8:
            raise invalid(f"{size} bytes")
        if length > MAX_HEADER_BYTES:
            raise invalid(f"a header length of {length} bytes")
        if 8 + length > size:
            raise invalid(f"a file truncated inside its header ({size} bytes)")
        raw = file.read(length)
    start = 8 + length
    entries: dict[str, Entry] = {}
    kinds = (ValueError, KeyError, TypeError, AttributeError)
    unreadable = "an unreadable header ({kind}: {error})"
    with user_errors(str(path), wanted, remedy, *kinds, got=unreadable):
        header = json.loads(raw)
        header.pop("__metadata__", None)
        for key, value in header.items():
            shape = tuple(int(n) for n in value["shape"])
            begin, end = (int(n) for n in value["data_offsets"])
            if value["dtype"] not in DTYPES:
                raise invalid(f"tensor {key} of the unknown dtype {value['dtype']}")
            dtype = DTYPES[value["dtype"]]
            if min((begin, *shape)) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
                raise invalid(f"tensor {key} with {end - begin} bytes for shape {list(shape)}")
            entries[key] = Entry(str(path), dtype, shape, start + begin, end - begin)
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
