"""Further columns: those that an objective reads beside the inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raycurv.data import columns
from raycurv.data.making.chunk import Chunk
from raycurv.errors import UserError


class FurtherColumns:
    """Reads further columns, each of text or of numbers of one shape in all examples.

    Args:
        names: of the columns.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        # Of each column the first value, if it is of numbers.
        self._first: dict[str, np.ndarray | None] = {}

    def read(self, chunk: Chunk) -> list[dict[str, str | np.ndarray]]:
        """What each row has in the columns."""
        found: list[dict[str, str | np.ndarray]] = [{} for _ in range(len(chunk))]
        for name in self._names:
            for own, value in zip(found, self._column(name, chunk), strict=True):
                own[name] = value
        return found

    def _column(self, name: str, chunk: Chunk) -> Sequence[str | np.ndarray]:
        column, first, place = chunk.columns[name], self._first.get(name), chunk.place
        text = columns.is_text(column)
        if name in self._first and text != (first is None):
            raise UserError(
                place(0),
                f"{'text' if first is None else 'numbers'} in `{name}`, as in the examples before",
                "text" if text else "numbers",
                f"Write `{name}` as one or the other everywhere.",
            )
        if text:
            self._first[name] = None
            return columns.strings(name, column, place)
        shape = None if first is None else first.shape
        values = columns.numbers(name, column, place, shape, exact_integers=True)
        if first is None:
            first = self._first[name] = np.array(values[0])
        whole = np.issubdtype(first.dtype, np.integer)
        if whole and not np.issubdtype(values.dtype, np.integer):
            raise UserError(
                place(0),
                f"whole numbers in `{name}`, as in the examples before it",
                "a fraction",
                f"Write every number of `{name}` as a fraction, or as a whole number.",
            )
        # Whole numbers after fractions are fractions that JSON wrote without a point.
        values = values if whole else values.astype(np.promote_types(values.dtype, first.dtype))
        # A view would keep its whole chunk alive as long as any of its examples.
        return [np.array(value) for value in values]
