"""What is taken of a source: one of its splits, some of its rows, columns under other names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from raycurv.data.column_names import ColumnNames
from raycurv.data.parts import Part
from raycurv.data.rows import Rows
from raycurv.data.splits import Split


@dataclass(frozen=True)
class Selection:
    """A source, and what is taken of it.

    Attributes:
        source: see ``raycurv.data.sources.find_parts``.
        split: of it, see splits.py; empty for all of a source that has one.
        columns: the source's own name for each of raycurv's.
        flag: that names a split.
        column_flag: that names a column, with ``{}`` for raycurv's name.
    """

    source: Any
    split: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    flag: str = "--split"
    column_flag: str = "--{}-column"

    def parsed(self) -> Split | None:
        """The split as such; UserError if it is none."""
        return Split.parse(self.flag, self.split) if self.split else None

    @property
    def inputs(self) -> set[str]:
        """Raycurv's names of columns of inputs that were named: those are read and no others."""
        return {"text", "prompt", "completion"} & self.columns.keys()

    def recorded(self) -> dict[str, Any]:
        """What tells it from other selections of the same source, for JSON."""
        split = {"split": self.split} if self.split else {}
        return split | ({"columns": dict(self.columns)} if self.columns else {})


def as_recorded(source: Any, recorded: Mapping[str, Any]) -> Selection:
    """What a fingerprint says that was taken of a source."""
    return Selection(source, recorded.get("split", ""), recorded.get("columns", {}))


def select(
    wanted: Selection, found: tuple[list[Part], Sequence[str]]
) -> tuple[list[Part], tuple[str, ...]]:
    """The parts of a source as a selection takes them, and the names of files left out."""
    parts, left_out = found
    if wanted.columns:
        names = ColumnNames(wanted.columns, wanted.column_flag)
        parts = [replace(part, names=names) for part in parts]  # type: ignore[type-var]
    split = wanted.parsed()
    if split is not None and not split.whole:
        spans = _Spans(parts, split)
        parts = [SlicedPart(part, spans, i) for i, part in enumerate(parts)]
    return parts, tuple(left_out)


class _Spans:
    """Which rows of each part are within a slice of all of them together; counted when asked."""

    def __init__(self, parts: Sequence[Part], split: Split) -> None:
        self._parts, self._split = parts, split

    def __getitem__(self, part: int) -> range:
        return self._found[part]

    @cached_property
    def _found(self) -> list[range]:
        split = self._split
        most = split.at_most
        counts: list[int] = []
        for part in self._parts:
            counts.append(part.count(None if most is None else most - sum(counts)))
        wanted = split.rows(sum(counts))
        firsts = [sum(counts[:i]) for i in range(len(counts))]
        return [
            range(max(wanted.start - first, 0), max(min(wanted.stop - first, count), 0))
            for first, count in zip(firsts, counts, strict=True)
        ]


@dataclass(frozen=True)
class SlicedPart(Part):
    """Some consecutive rows of a part, under the numbers that they have in it."""

    whole: Part
    spans: _Spans
    number: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.whole.name

    @property
    def location(self) -> str:  # type: ignore[override]
        return self.whole.location

    @property
    def names(self) -> ColumnNames:  # type: ignore[override]
        return self.whole.names

    def columns(self) -> tuple[str, ...] | None:
        return self.whole.columns() if self.spans[self.number] else None

    def message_keys(self, name: str) -> tuple[str, ...]:
        return self.whole.message_keys(name)

    def class_names(self, name: str) -> tuple[str, ...]:
        return self.whole.class_names(name)

    def fingerprint(self) -> dict[str, Any]:
        return self.whole.fingerprint()

    def read(self, required: Sequence[str], optional: Sequence[str]) -> Iterator[Rows]:
        span = self.spans[self.number]
        for rows in self.whole.read(required, optional):
            if rows.numbers[0] >= span.stop:
                return
            keep = np.flatnonzero((rows.numbers >= span.start) & (rows.numbers < span.stop))
            if len(keep) == len(rows.numbers):
                yield rows
            elif len(keep):
                yield rows.take(keep)
