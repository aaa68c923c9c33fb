"""A chunk of rows with their names, as what makes examples of it takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raycurv.data.rows import Rows


@dataclass(frozen=True)
class Chunk:
    """Rows of one part.

    Attributes:
        kind: the columns of inputs.
        rows: what is in them.
        ids: of each row.
    """

    kind: tuple[str, ...]
    rows: Rows
    ids: Sequence[str]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def columns(self) -> dict[str, Any]:
        """One Arrow array a column."""
        return self.rows.columns

    def place(self, i: int) -> str:
        """Names row ``i``, for messages."""
        return f"example {self.ids[i]!r} ({self.rows.place(i)})"
