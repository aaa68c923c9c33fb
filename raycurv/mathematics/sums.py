"""Running sums whose error does not grow with the number of microbatches, and their counts.

A sum travels with its count; division happens in one place, where the sum is used. What a stage
gathers in a pass is a set of named sums and counts, :class:`Sums`: how they are committed, loaded
and joined with those of other examples is written here once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from raycurv.errors import NumericalError
from raycurv.mathematics.capture import Captured
from raycurv.mathematics.products import add_gram, add_outer, mirror

# Additions between two folds of the float32 part into the float64 master: rounding error grows with
# their number, the cost of folding (20 bytes an element) falls with it.
FOLD_EVERY = 32


# How the results of consecutive stages become one: added in float64 (``sum``), joined along their
# last axis (``concat``), or that of the model's last stage alone (``last``). Those that are
# ``apart`` are joined over the resident stages, but stay with their group of stages in a sweep.
Combine = Literal["sum", "concat", "last", "apart"]
# Numbers of each example of a microbatch, N first, by name.
Results = dict[str, Tensor]
# The key of counts that all names of a set of sums share; no module has such a name.
SHARED = "*"


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, rotations and scores for a model's: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_finite(values: Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite, without a mask of its shape."""
    if not values.is_floating_point() or not values.numel():
        return True
    # Both carry NaN and infinities through, in one pass.
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_sum(total: Tensor, where: str) -> None:
    """Refuse a sum of a factor or block (``where``) that is not finite, with a NumericalError."""
    if not is_finite(total):
        raise NumericalError(
            where,
            "a finite sum",
            "NaN or infinity",
            "Run the model in a wider --dtype, or look for the example that overflows.",
        )


class PlainSum:
    """A tensor, zeros at first, that is added to, or filled, in place; without a wider master.

    Its dtype is the :func:`working_dtype` for that of the model.
    """

    def __init__(
        self, shape: Iterable[int], dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        self.part = torch.zeros(tuple(shape), dtype=working_dtype(dtype), device=device)

    def state(self) -> dict[str, Tensor]:
        """The sum exactly as it stands, so that a restart goes on bit for bit."""
        return {"part": self.part}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`; KeyError or ValueError if that is none of such a sum."""
        self.part.copy_(_as_large(state["part"], self.part))

    def join(self, state: Mapping[str, Tensor]) -> None:
        """Add another sum, given as its :meth:`state`; raises as :meth:`load`."""
        self.part.add_(_as_large(state["part"], self.part).to(self.part.device))


class RunningSum(PlainSum):
    """A sum in float32, folded now and then into a float64 master; float64 sums need none.

    The master is made at the first fold, so that a short run holds 4 bytes an element and not 12.
    """

    def __init__(
        self, shape: Iterable[int], dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        super().__init__(shape, dtype, device)
        self.master: Tensor | None = None
        self.pending = 0
        # Whether the part holds the sum on and above its diagonal alone.
        self._upper = False

    def add_outer(self, left: Tensor, right: Tensor, columns: Tensor | None = None) -> None:
        """Add ``leftᵀ right`` for rows ``left [R, X]`` and ``right [R, Y]``, whose columns are all
        of the sum's, or those with these numbers."""
        left, right = left.to(self.part.dtype), right.to(self.part.dtype)
        if columns is not None:
            self.add(left.T @ right, columns=columns)
            return
        add_outer(self.part, left, right)
        self._count()

    def add_gram(self, rows: Tensor) -> None:
        """Add ``rowsᵀ rows`` for ``rows [R, X]``, which is symmetric: to such a sum nothing that is
        not is added."""
        self._upper |= add_gram(self.part, rows.to(self.part.dtype))
        self._count()

    def _complete(self) -> None:
        if self._upper:
            mirror(self.part)
            self._upper = False

    def add(self, value: Tensor, rows: slice | None = None, columns: Tensor | None = None) -> None:
        """Add a tensor to the sum, or to some rows: all are given equally often, in order. Its last
        axis is all of the sum's, or the columns with these numbers, each once."""
        part = self.part if rows is None else self.part[rows]
        if columns is None:
            part.add_(value)
        else:
            part.index_add_(-1, columns, value)
        if rows is None or rows.stop == len(self.part):
            self._count()

    def _count(self) -> None:
        self.pending += 1
        if self.pending >= FOLD_EVERY and self.part.dtype != torch.float64:
            self._fold()

    def _fold(self) -> None:
        self._complete()
        if self.master is None:
            self.master = self.part.double()
        else:
            self.master.add_(self.part)
        self.part.zero_()
        self.pending = 0

    def value(self, where: str) -> Tensor:
        """The sum in float64 (a copy); NumericalError if it is not finite, at ``where``."""
        self._complete()
        total = self.part.double() if self.master is None else self.master + self.part
        check_sum(total, where)
        return total.clone() if total is self.part else total

    def state(self) -> dict[str, Tensor]:
        self._complete()
        state = super().state() | {"pending": torch.tensor(self.pending)}
        if self.master is not None:
            state["master"] = self.master
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self._upper = False
        self.pending = int(state["pending"])
        master = state.get("master")
        if master is not None:
            master = _as_large(master, self.part).to(self.part.device, torch.float64, copy=True)
        self.master = master

    def join(self, state: Mapping[str, Tensor]) -> None:
        if self.part.dtype == torch.float64:
            super().join(state)
            return
        self._fold()
        assert self.master is not None
        for key in ("master", "part"):
            if key in state:
                self.master.add_(_as_large(state[key], self.part).to(self.master.device))


class Sums(ABC):
    """What a stage gathers in a pass, a whole microbatch at a time: named sums with their counts.

    Each of ``names`` gives a result; ``dtype`` is that of the model's computation.

    Attributes:
        results: what :meth:`add` gives of each example, and how stages combine it.
        sums: the running sums; a key is ``NAME``, or ``NAME#PART`` where a name has several.
        counts: whole numbers that add up over the data, of a name or of all (:data:`SHARED`).
    """

    results: ClassVar[Mapping[str, Combine]] = {}

    def __init__(self, names: Iterable[str], dtype: torch.dtype, device: torch.device) -> None:
        self.names = tuple(names)
        self.dtype, self.device = working_dtype(dtype), device
        self.sums: dict[str, PlainSum] = {}
        self.counts: dict[str, list[int]] = {}

    @abstractmethod
    def add(self, draws: Sequence[Captured], counts: bool = True) -> Results:
        """Add a microbatch; gives what the driver shall collect of its examples, N first.

        Args:
            draws: what was captured, one item a draw of labels.
            counts: whether it enters the sums; when it does not, they have it already.
        """

    def result(self, name: str) -> Any:
        """What was gathered under a name; its ``plus`` adds that of another replica."""
        raise AssertionError(f"nothing is gathered under the name {name}")

    def sizes(self) -> dict[str, float]:
        """Elements of the sums of each name; infinite of what is gathered in another form."""
        found = Counter[str]()
        for key, one in self.sums.items():
            found[key.partition("#")[0]] += one.part.numel()
        return {name: found.get(name, math.inf) for name in self.names}

    def count(self, key: str, *numbers: int) -> None:
        self.counts[key] = [a + b for a, b in zip(self.counts[key], numbers, strict=True)]

    def state(self) -> dict[str, Tensor]:
        """Everything that a restart needs, in one flat mapping: ``KEY/part`` and ``KEY/count``."""
        state = {f"{k}/{part}": t for k, s in self.sums.items() for part, t in s.state().items()}
        return state | {f"{k}/count": torch.tensor(n) for k, n in self.counts.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        by_key = _by_key(state)
        for key, one in self.sums.items():
            one.load(by_key[key])
        for key, counted in self.counts.items():
            self.counts[key] = _numbers(by_key[key]["count"], len(counted))

    def join(self, state: Mapping[str, Tensor]) -> None:
        """Add the sums of other examples, given as their :meth:`state`."""
        by_key = _by_key(state)
        for key, one in self.sums.items():
            one.join(by_key[key])
        for key in self.counts:
            self.count(key, *_numbers(by_key[key]["count"], len(self.counts[key])))


def _numbers(counts: Tensor, how_many: int) -> list[int]:
    if counts.dtype != torch.int64 or counts.shape != (how_many,):
        raise ValueError(f"counts {tuple(counts.shape)} for {how_many}")
    found: list[int] = counts.tolist()
    return found


def _as_large(given: Tensor, mine: Tensor) -> Tensor:
    # A smaller one would be added to every part of the sum.
    if given.shape != mine.shape or not given.is_floating_point():
        raise ValueError(f"a sum {tuple(given.shape)} for one {tuple(mine.shape)}")
    return given


def _by_key(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        key, _, part = name.rpartition("/")
        found.setdefault(key, {})[part] = tensor
    return found
