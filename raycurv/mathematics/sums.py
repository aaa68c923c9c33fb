"""Running sums whose error does not grow with the number of microbatches.

A sum travels with its count; division happens in one place, where the sum is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from raycurv.errors import NumericalError
from raycurv.mathematics.products import add_outer

# Additions between two folds of the float32 part into the float64 master: rounding error grows with
# their number, the cost of folding (20 bytes an element) falls with it.
FOLD_EVERY = 32


class RunningSum:
    """A sum in float32 (or float64), folded now and then into a float64 master.

    The master is made at the first fold, so that a short run holds 4 bytes an element and not 12.

    Args:
        shape: of the sum.
        dtype: float64 sums need no master; every other dtype is summed in float32.
        device: where the sum lives.
    """

    def __init__(
        self, shape: Iterable[int], dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        self.part = torch.zeros(
            tuple(shape),
            dtype=torch.float64 if dtype == torch.float64 else torch.float32,
            device=device,
        )
        self.master: Tensor | None = None
        self.pending = 0

    def add_outer(self, left: Tensor, right: Tensor) -> None:
        """Add ``leftᵀ right`` for rows ``left [R, X]`` and ``right [R, Y]``."""
        dtype = self.part.dtype
        add_outer(self.part, left.to(dtype), right.to(dtype))
        self._count()

    def add(self, value: Tensor, rows: slice | None = None) -> None:
        """Add a tensor to the sum, or to some rows: all are given equally often, in order."""
        if rows is None:
            self.part.add_(value)
        else:
            self.part[rows].add_(value)
        if rows is None or rows.stop == len(self.part):
            self._count()

    def _count(self) -> None:
        self.pending += 1
        if self.pending >= FOLD_EVERY and self.part.dtype != torch.float64:
            self._fold()

    def _fold(self) -> None:
        if self.master is None:
            self.master = self.part.double()
        else:
            self.master.add_(self.part)
        self.part.zero_()
        self.pending = 0

    def join(self, state: Mapping[str, Tensor]) -> None:
        """Add another sum, given as its :meth:`state`."""
        if self.part.dtype == torch.float64:
            self.part.add_(state["part"].to(self.part.device))
            return
        self._fold()
        assert self.master is not None
        for key in ("master", "part"):
            if key in state:
                self.master.add_(state[key].to(self.master.device))

    def value(self, where: str) -> Tensor:
        """The sum in float64 (a copy).

        Raises:
            NumericalError: it is not finite; ``where`` names the factor or block.
        """
        total = self.part.double() if self.master is None else self.master + self.part
        # One number tells, without a mask of the sum's shape.
        if not torch.isfinite(total.sum()):
            raise NumericalError(
                where,
                "a finite sum",
                "NaN or infinity",
                "Run the model in a wider --dtype, or look for the example that overflows.",
            )
        return total.clone() if total is self.part else total

    def state(self) -> dict[str, Tensor]:
        """The sum exactly as it stands, so that a restart goes on bit for bit."""
        state = {"part": self.part, "pending": torch.tensor(self.pending)}
        if self.master is not None:
            state["master"] = self.master
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        self.part.copy_(state["part"])
        self.pending = int(state["pending"])
        master = state.get("master")
        self.master = None if master is None else master.to(self.part.device, copy=True)


def nested_state(sums: Mapping[str, RunningSum]) -> dict[str, Tensor]:
    """The states of many sums in one flat mapping, ``name/part`` and so on."""
    return {f"{name}/{key}": t for name, s in sums.items() for key, t in s.state().items()}


def load_nested(sums: Mapping[str, RunningSum], state: Mapping[str, Tensor]) -> None:
    """Go on from :func:`nested_state`."""
    for name, one in _by_sum(sums, state).items():
        sums[name].load(one)


def join_nested(sums: Mapping[str, RunningSum], state: Mapping[str, Tensor]) -> None:
    """Add the sums of a :func:`nested_state`."""
    for name, one in _by_sum(sums, state).items():
        sums[name].join(one)


def _by_sum(
    sums: Mapping[str, RunningSum], state: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    keys: dict[str, dict[str, Tensor]] = {name: {} for name in sums}
    for key, tensor in state.items():
        name, _, part = key.rpartition("/")
        if name in keys:
            keys[name][part] = tensor
    return keys
