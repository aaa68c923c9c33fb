"""A checkpoint whose weights are quantised, read as the floating point that its numbers stand for.

A weight is dequantised when it is asked for, some rows at a time: beside the weight itself, in the
dtype that is wanted, only those rows are in memory. Products are made in float32 and cast then, as
a copy of the checkpoint in float32 would be.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raycurv.errors import UserError
from raycurv.models.checkpoint import Checkpoint, Entry
from raycurv.models.pieces import Place
from raycurv.models.quantisation import COMPRESSED, Cell, Quantisation, Scheme
from raycurv.models.unused import listed

# Numbers that are dequantised at once.
_STRIP = 1 << 22
_FP8 = ("F8_E4M3", "F8_E5M2")
_BYTES = ("I8", *_FP8)
_PACKED, _BLOCKS = "weight_packed", "_blocks"
# What is put behind a weight's name for that of its scales, and what in place of ``weight``.
_SCALES, _INSTEAD = ("_scale_inv", "_scale"), ("scale", "qscale_weight")
_OF_ACTIVATIONS = re.compile(
    r"(^|\.)((input|output|activation|[qkv]|kv)_(scale|zero_point|global_scale)|qscale_act)$"
)
# The numbers of 4-bit floating point (a sign, two bits of exponent, one of mantissa).
_E2M1 = tuple(sign * n for sign in (1, -1) for n in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
_COPY = "Copy the checkpoint again, with config.json, from where it was quantised."


@dataclass(frozen=True)
class DequantisedEntry(Entry):
    """A weight ``[…, R, C]`` that is made of quantised numbers; its place is that of the numbers.

    Attributes:
        numbers: key of them.
        scales: key of the scales.
        zeros: key of the zero points, if there are any.
        cell: rows and columns that share a scale.
        bits: of a number that is not stored by itself.
        transposed: whether the numbers are those of ``[…, C, R]``.
    """

    numbers: str
    scales: str
    zeros: str | None
    cell: tuple[int, int]
    bits: int | None = None
    transposed: bool = False

    @property
    def stack(self) -> tuple[int, int, int]:
        """How many matrices, and the rows and columns of each, as the numbers lie."""
        *lead, rows, columns = self.shape
        return math.prod(lead), *((columns, rows) if self.transposed else (rows, columns))

    @property
    def grid(self) -> tuple[int, int, int]:
        """How many scales there are for these."""
        count, rows, columns = self.stack
        return count, math.ceil(rows / self.cell[0]), math.ceil(columns / self.cell[1])


class DequantisedCheckpoint(Checkpoint):
    """A checkpoint in which each quantised weight stands as one tensor of float32; its scales and
    zero points do not stand for themselves.

    Raises:
        UserError: as a checkpoint, or numbers without scales, or scales of another shape.
    """

    def __init__(self, directory: str | Path, quantisation: Quantisation) -> None:
        super().__init__(directory)
        self._quantisation = quantisation
        # What the index does not name must not take part.
        self._listed = self.entries.keys() - set(self.unlisted)
        made = dict(self._dequantised())
        parts = {k for e in made.values() for k in (e.numbers, e.scales, e.zeros, self._shape(e))}
        idle = {k for k in self._listed - parts if made and _OF_ACTIVATIONS.search(k)}
        self.entries = {k: e for k, e in self.stored.items() if k not in parts | idle} | made
        self.notes = tuple(self._told(made.values(), idle))

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, dequantised if it is quantised; UserError as of any checkpoint, or for a
        scale that is not finite, or zero though its numbers are not."""
        entry = self.entries[key]
        if not isinstance(entry, DequantisedEntry):
            return super().read(key, dtype)
        made = torch.empty(entry.shape, dtype=dtype or torch.float32)
        scales = self._scales(entry)
        zeros = None if entry.zeros is None else self._zeros(entry)
        wiped = not bool(scales.all())
        stacked = made.view(-1, *made.shape[-2:])
        stacked = stacked.transpose(1, 2) if entry.transposed else stacked
        _, rows, columns = entry.stack
        step = max(1, _STRIP // max(1, columns))

        def of(cells: Tensor, strip: slice) -> Tensor:
            mine = cells[torch.arange(strip.start, strip.stop) // entry.cell[0]]
            width = entry.cell[1]
            return mine if width >= columns else mine.repeat_interleave(width, 1)[:, :columns]

        for index, matrix in enumerate(stacked):
            for start in range(0, rows, step):
                strip = slice(start, min(start + step, rows))
                numbers = self._numbers(entry, index * rows + start, strip.stop - start, columns)
                if zeros is not None:
                    numbers -= of(zeros[index], strip)
                scale = of(scales[index], strip)
                if wiped and bool(((scale == 0) & (numbers != 0)).any()):
                    raise self._misfit(entry.scales, "a scale that is not zero", "a zero")
                matrix[strip] = numbers.mul_(scale)
        return made

    def read_part(self, place: Place) -> Tensor:
        if not isinstance(self.entries[place.key], DequantisedEntry):
            return super().read_part(place)
        return place.of(self.read(place.key)).clone()

    def _dequantised(self) -> Iterator[tuple[str, DequantisedEntry]]:
        for key in sorted(self._listed):
            entry, (module, _, last) = self.stored[key], key.rpartition(".")
            if last == _PACKED:
                yield self._packed(key, f"{module}.weight")
            elif self._quantisation.method == "mxfp4" and key.endswith(_BLOCKS):
                yield self._mxfp4(key, key.removesuffix(_BLOCKS))
            elif entry.stored in _BYTES and self._is_weight(key):
                yield key, self._plain(key)

    def _is_weight(self, key: str) -> bool:
        """Whether a tensor of bytes is a weight's numbers, and not what stands beside some."""
        beside = any(key.endswith(end) for end in (*_SCALES, *_INSTEAD, "_zero_point", "_scales"))
        return not beside and not _OF_ACTIVATIONS.search(key)

    def _plain(self, key: str) -> DequantisedEntry:
        """A weight whose numbers have a byte each."""
        entry = self.stored[key]
        if entry.stored == "I8" and self._quantisation.method != COMPRESSED:
            got = "bytes, as of packed numbers of 4 bits"
            raise self._misfit(key, "numbers of 8-bit floating point", got)
        if len(entry.shape) < 2:
            raise self._misfit(key, "a quantised matrix", f"shape {list(entry.shape)}")
        return self._made(key, key, entry.shape)

    def _packed(self, key: str, weight: str) -> tuple[str, DequantisedEntry]:
        """A weight whose integers are packed along its rows into words of 32 bits, without gaps."""
        entry, named = self.stored[key], f"{weight}_shape"
        bits = self._scheme(weight).bits
        if named not in self._listed:
            raise self._misfit(key, f"its shape beside it ({named})", "none")
        said = super().read(named)
        shape = tuple(said.tolist()) if said.ndim == 1 and not said.is_floating_point() else ()
        if (
            len(shape) < 2
            or entry.stored != "I32"
            or (entry.shape != (*shape[:-1], math.ceil(shape[-1] * bits / 32)))
        ):
            words = f"32-bit words of {bits}-bit numbers, of shape {list(shape)} as {named} says"
            raise self._misfit(key, words, f"{entry.stored} of shape {list(entry.shape)}")
        return weight, self._made(weight, key, shape, bits)

    def _mxfp4(self, key: str, weight: str) -> tuple[str, DequantisedEntry]:
        """Experts ``[E, C, R]`` whose numbers lie as ``[E, R, C / 32, 16]``."""
        entry = self.stored[key]
        if entry.stored != "U8" or len(entry.shape) != 4 or entry.shape[-1] != 16:
            wanted = "bytes [experts, rows, groups, 16]"
            raise self._misfit(key, wanted, f"{entry.stored} of shape {list(entry.shape)}")
        experts, rows, groups, _ = entry.shape
        return weight, self._made(weight, key, (experts, 32 * groups, rows), 4, True)

    def _made(
        self,
        weight: str,
        numbers: str,
        shape: tuple[int, ...],
        bits: int | None = None,
        transposed: bool = False,
    ) -> DequantisedEntry:
        """The entry of a weight, with the scales that its shape and its scheme ask for."""
        place, scheme = self.stored[numbers], self._scheme(weight)
        module = weight.rpartition(".")[0]
        names = [f"{weight}{end}" for end in (("_scales",) if transposed else _SCALES)]
        instead = [f"{module}.{last}" for last in _INSTEAD]
        found = [name for name in names if name in self._listed]
        found = found or [name for name in instead if name in self._listed]
        if len(found) != 1:
            wanted = f"its scales beside it ({names[0]})"
            raise self._misfit(numbers, wanted, " and ".join(found) or "none")
        scales, zeros = found[0], f"{weight}_zero_point"
        if zeros not in self._listed and not scheme.symmetric:
            raise self._misfit(numbers, f"its zero points beside it ({zeros})", "none")

        def entry(cell: Cell) -> DequantisedEntry:
            rows, columns = shape[-2:][::-1] if transposed else shape[-2:]
            size = (min(cell[0] or rows, rows) or 1, min(cell[1] or columns, columns) or 1)
            return DequantisedEntry(
                place.file, "F32", shape, place.offset, place.nbytes, numbers, scales,
                zeros if zeros in self._listed else None, size, bits, transposed,
            )  # fmt: skip

        stored = self.stored[scales]
        made = [entry(cell) for cell in scheme.cells]
        fits = [one for one in made if stored.shape in self._shapes(one)]
        if not fits or not (stored.floating or stored.stored == "U8"):
            wanted = " or ".join(str(list(self._shapes(one)[0])) for one in made)
            raise self._misfit(
                scales,
                f"floating-point scales of shape {wanted}, as config.json and {numbers} say",
                f"{stored.stored} of shape {list(stored.shape)}",
            )
        self._check_zeros(fits[0])
        self._check_order(weight, fits[0])
        return fits[0]

    def _check_order(self, weight: str, made: DequantisedEntry) -> None:
        """Refuse columns whose groups are told one by one, and are not those in order."""
        order = f"{weight}_g_idx"
        if order not in self._listed:
            return
        told, columns = super().read(order).flatten(), made.stack[2]
        plain = torch.arange(columns) // made.cell[1]
        # Its library takes a negative one for no order at all.
        if not bool((told < 0).any()) and not torch.equal(told.long(), plain):
            wanted = f"groups of {made.cell[1]} columns that follow each other"
            raise self._misfit(order, wanted, "columns in another order (actorder)")

    def _check_zeros(self, made: DequantisedEntry) -> None:
        """Refuse zero points of another shape than the scales, or that are packed otherwise."""
        if made.zeros is None:
            return
        stored, shapes = self.stored[made.zeros], self._shapes(made)
        if self._zeros_are_packed(made):
            *lead, rows, columns = shapes[0]
            shapes = [(*lead, math.ceil(rows * (made.bits or 0) / 32), columns)]
        if stored.shape not in shapes:
            wanted = f"zero points of shape {list(shapes[0])}"
            raise self._misfit(made.zeros, wanted, f"shape {list(stored.shape)}")

    def _zeros_are_packed(self, made: DequantisedEntry) -> bool:
        return (
            made.bits is not None
            and made.zeros is not None
            and (self.stored[made.zeros].stored == "I32")
        )

    @staticmethod
    def _shapes(made: DequantisedEntry) -> list[tuple[int, ...]]:
        """Shapes that the scales may have: of the grid, or without its last axes of one scale."""
        shape = (*made.shape[:-2], *made.grid[1:])
        shapes = [shape]
        while shape and shape[-1] == 1:
            shape = shape[:-1]
            shapes.append(shape)
        return shapes

    def _scheme(self, weight: str) -> Scheme:
        return self._quantisation.scheme(weight.rpartition(".")[0])

    def _shape(self, made: DequantisedEntry) -> str | None:
        """Key of the tensor that has a packed weight's shape."""
        weight = made.numbers.removesuffix("_packed")
        return f"{weight}_shape" if weight != made.numbers else None

    def _scales(self, entry: DequantisedEntry) -> Tensor:
        """The scales, in float32 ``[matrices, rows, columns]``; bytes are exponents of two."""
        read = super().read(entry.scales)
        scales = (read.float() - 127).exp2() if read.dtype == torch.uint8 else read.float()
        if not bool(scales.isfinite().all()):
            raise self._misfit(entry.scales, "finite scales", "NaN or infinity")
        return scales.view(entry.grid)

    def _zeros(self, entry: DequantisedEntry) -> Tensor:
        assert entry.zeros is not None
        read = super().read(entry.zeros)
        if self._zeros_are_packed(entry):
            # Packed along the rows' axis.
            count, rows, columns = entry.grid
            words = read.view(count, -1, columns).transpose(1, 2).reshape(count * columns, -1)
            read = _unpacked(words, entry.bits or 0, rows).view(count, columns, rows)
            return read.transpose(1, 2)
        return read.float().view(entry.grid)

    def _numbers(self, entry: DequantisedEntry, row: int, count: int, columns: int) -> Tensor:
        """Some rows of all matrices' quantised numbers, in float32 of their own."""
        stored = self.stored[entry.numbers]
        width = math.prod(stored.shape) // math.prod(entry.stack[:2])
        raw = self._elements(entry.numbers, row * width, count * width).view(count, width)
        if entry.bits is None:
            # Three times as fast as torch's cast of 8-bit floating point.
            table: Any = torch.arange(256).to(torch.uint8).view(raw.dtype).float().numpy()
            return torch.from_numpy(table[raw.view(torch.uint8).numpy()])
        if entry.transposed:
            halves = torch.stack([raw & 15, raw >> 4], -1)
            return torch.tensor(_E2M1)[halves.int()].view(count, columns)
        return _unpacked(raw, entry.bits, columns)

    def _told(self, made: Iterable[DequantisedEntry], idle: set[str]) -> Iterator[str]:
        counts = Counter(self.stored[entry.numbers].stored for entry in made)
        kinds = ", ".join(f"{count} of {stored}" for stored, count in sorted(counts.items()))
        if kinds:
            yield (
                f"the weights are dequantised from {self._quantisation.method} on loading "
                f"({kinds}), and what goes into the layers is not quantised"
            )
        if idle:
            yield f"not used: {listed(idle)} (scales of what goes into layers, or of caches)"

    def _misfit(self, key: str, expected: str, got: str) -> UserError:
        return UserError(f"{self.stored[key].file}, tensor {key}", expected, got, _COPY)


def open_checkpoint(directory: str | Path, quantisation: Quantisation | None) -> Checkpoint:
    """The tensors of a directory, dequantised where they are quantised."""
    if quantisation is None:
        return Checkpoint(directory)
    return DequantisedCheckpoint(directory, quantisation)


def _unpacked(words: Tensor, bits: int, columns: int) -> Tensor:
    """The integers ``[N, columns]`` in 32-bit words ``[N, W]``, as float32.

    A row's integers follow each other bit by bit, lowest first, over the ends of words; each was
    made positive by adding half of its range.
    """
    first = torch.arange(columns) * bits
    word, shift = first // 32, first % 32
    wide = words.long() & 0xFFFFFFFF
    found = wide[:, word] >> shift
    over = (word + 1).clamp(max=words.shape[1] - 1)
    found |= wide[:, over] << (32 - shift)
    return ((found & ((1 << bits) - 1)) - (1 << bits - 1)).float()
