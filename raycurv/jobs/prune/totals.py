"""Sums of what tasks give."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Total:
    """Adds up tensors that tasks give, so that those of all blocks are never there together.

    In the order of the blocks, whichever ends first: the sum would depend on chance.

    Attributes:
        sums: of a tensor, or of each of several; ``None`` where no block gave any.
    """

    def __init__(self) -> None:
        self.sums: tuple[Tensor, ...] | None = None
        self._early: dict[int, Any] = {}
        self._next = 0

    def add(self, place: int, value: Tensor | tuple[Tensor, ...] | None) -> None:
        """What the block at a place gave."""
        self._early[place] = value
        while self._next in self._early:
            found = self._early.pop(self._next)
            self._next += 1
            if found is None:
                continue
            parts = found if isinstance(found, tuple) else (found,)
            if self.sums is None:
                self.sums = tuple(part.clone() for part in parts)
            else:
                self.sums = tuple(a.add_(b) for a, b in zip(self.sums, parts, strict=True))
