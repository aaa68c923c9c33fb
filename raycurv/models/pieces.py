"""Where numbers of a parameter lie among stored tensors: as strided views, of whatever shape.

transformers stacks, joins, cuts and transposes stored tensors into parameters. Each of these takes
an axis to an axis, so a stored tensor is a strided view of a parameter, or the other way round; and
so is a block, as the matrix ``[O, I]``. Flat positions that both share tell which part of which
stored tensor a block is: an index of an axis, a half, every second row, a transposition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Place:
    """A strided view of one stored tensor; offset and strides count elements.

    Attributes:
        key: of the tensor.
        whole: its shape.
    """

    key: str
    whole: tuple[int, ...]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The view of the tensor, which is contiguous."""
        assert tuple(tensor.shape) == self.whole and tensor.is_contiguous(), self.key
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.offset)

    @property
    def span(self) -> int:
        """Elements from its first to its last one in the tensor, both included."""
        steps = zip(self.shape, self.strides, strict=True)
        return 1 + sum((size - 1) * stride for size, stride in steps)

    @property
    def covers(self) -> bool:
        """Whether it has all numbers of the tensor."""
        return math.prod(self.shape) == math.prod(self.whole)


@dataclass(frozen=True)
class Piece:
    """Numbers that a parameter and a stored tensor have in common, as a strided view of both.

    Attributes:
        key, whole: of the stored tensor, and its shape.
        sizes: of the view's axes.
        inner_offset, inner: where it begins in the flat parameter, and its strides there.
        outer_offset, outer: the same in the flat stored tensor.
    """

    key: str
    whole: tuple[int, ...]
    sizes: tuple[int, ...]
    inner_offset: int
    inner: tuple[int, ...]
    outer_offset: int
    outer: tuple[int, ...]

    @classmethod
    def between(cls, key: str, whole: Sequence[int], inner: Tensor, outer: Tensor) -> Piece:
        """Of two views of one shape, whose storages are the parameter's and the tensor's."""
        # Axes that both step through as one are one: a block may have them flattened.
        axes: list[list[int]] = []
        steps = zip(inner.shape, inner.stride(), outer.stride(), strict=True)
        for size, one, other in steps:
            if axes and axes[-1][1:] == [size * one, size * other]:
                axes[-1] = [axes[-1][0] * size, one, other]
            elif size > 1:
                axes.append([size, one, other])
        # The widest stride first, by which flat positions are taken apart.
        axes.sort(key=lambda axis: -axis[1])
        sizes, inside, outside = zip(*axes, strict=True) if axes else ((), (), ())
        starts = int(inner.storage_offset()), int(outer.storage_offset())
        return cls(key, tuple(whole), sizes, starts[0], inside, starts[1], outside)

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def place(self, view: Tensor) -> Place | None:
        """Where a view of the parameter is in the stored tensor, if all of it is in there."""
        start = int(view.storage_offset())
        origin = self._index(start)
        if origin is None:
            return None
        low, high = list(origin), list(origin)
        strides = []
        for size, stride in zip(view.shape, view.stride(), strict=True):
            step = [0] * len(origin)
            if size > 1:
                second = self._index(start + stride)
                if second is None:
                    return None
                step = [b - a for a, b in zip(origin, second, strict=True)]
            for axis, by in enumerate(step):
                (high if by > 0 else low)[axis] += by * (size - 1)
            strides.append(sum(by * s for by, s in zip(step, self.outer, strict=True)))
        # Steps that stay on every axis are the same everywhere.
        if any(a < 0 or b >= n for a, b, n in zip(low, high, self.sizes, strict=True)):
            return None
        offset = self.outer_offset + sum(a * s for a, s in zip(origin, self.outer, strict=True))
        return Place(self.key, self.whole, offset, tuple(view.shape), tuple(strides))

    def _index(self, position: int) -> list[int] | None:
        """A flat position of the parameter on the axes, if it is on them."""
        rest, index = position - self.inner_offset, []
        for size, stride in zip(self.sizes, self.inner, strict=True):
            number, rest = divmod(rest, stride)
            if not 0 <= number < size:
                return None
            index.append(number)
        return index if rest == 0 else None


@dataclass(frozen=True)
class Parts:
    """The stored tensors that a parameter is made of.

    Attributes:
        shape: of the parameter.
        pieces: together all of it, each number once.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def one(cls, key: str, shape: Sequence[int]) -> Parts:
        """Of a parameter that is a stored tensor."""
        alike = meta(shape)
        return cls(tuple(shape), (Piece.between(key, shape, alike, alike),))

    def place(self, view: Callable[[Tensor], Tensor]) -> Place | None:
        """Where a view of the parameter is stored; ``None`` if not in one tensor."""
        seen = view(meta(self.shape))
        places = (piece.place(seen) for piece in self.pieces)
        return next((place for place in places if place is not None), None)

    def renamed(self, keys: Mapping[str, str]) -> Parts:
        """With the tensors under other keys."""
        return replace(self, pieces=tuple(replace(p, key=keys[p.key]) for p in self.pieces))


def meta(shape: Sequence[int]) -> Tensor:
    """A contiguous tensor without values."""
    return torch.empty(tuple(shape), device="meta")


class Views(TorchFunctionMode):
    """Within it, tensors on the meta device stay views where they would be laid out anew."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.contiguous and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
