"""Labels of whole examples: class numbers or names, numbers, or lists of numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raycurv.data import columns
from raycurv.data.rows import Rows
from raycurv.errors import UserError, shortened

# A number as text; its first group is what makes a fraction of it.
_NUMBER = re.compile(r"[-+]?(?:\d{1,18}|(\d*\.?\d+(?:[eE][-+]?\d+)?|\d+\.|\d{19,}))")
# The column, and what data sets of one label call it.
NAMES = ("labels", "label")


@dataclass
class Labels:
    """Reads the labels of a source, all alike, chunk by chunk.

    Args:
        names: of the model's classes, their numbers; empty where it names none.

    Attributes:
        met: numbers of classes that examples have.
        taken_as: what the data calls classes that the model calls otherwise, ``theirs as ours``.
    """

    names: Mapping[str, int]
    met: set[int] = field(default_factory=set)
    taken_as: set[str] = field(default_factory=set)
    _there: bool | None = None
    _shape: tuple[int, ...] | None = None
    _classes: bool | None = None

    def check_numbers(self, where: str, column: str, theirs: Sequence[str]) -> None:
        """Hold the names of the classes that the numbers of a column stand for against the model's.

        Args:
            where: the part, for messages.
            theirs: the names by number; none where the data does not say them.

        Raises:
            UserError: a number is of one class in the data, and of another in the model.
        """
        alike = {name.casefold(): number for name, number in self.names.items()}
        ours = {number: name for name, number in self.names.items()}
        for number, name in enumerate(theirs if self.names else ()):
            own = self.names.get(name, alike.get(name.casefold()))
            if own is None:
                if number in ours and ours[number] != f"LABEL_{number}":
                    self.taken_as.add(f"{name} as {ours[number]}")
            elif own != number:
                raise UserError(
                    where, f"whole numbers in `{column}` that mean the model's classes",
                    f"{number} for {shortened(repr(name), 60)}, which is {own} in the model",
                    "Renumber it (dataset.align_labels_with_mapping(model.config.label2id, "
                    f"{column!r})), or write names in place of numbers; where the numbers are "
                    "the model's nevertheless, take the names off (dataset.cast_column("
                    f"{column!r}, datasets.Value('int64'))).",
                )  # fmt: skip

    def read(self, rows: Rows, place: columns.Place) -> np.ndarray | None:
        """A label a row: int64 ``[rows]`` for classes, else float64 ``[rows, ...]``; ``None`` where
        the data has none."""
        found = [name for name in NAMES if name in rows.columns]
        if len(found) > 1:
            raise UserError(
                rows.location, "one column of labels", "`labels` and `label`",
                "Rename the one that is not meant.",
            )  # fmt: skip
        if self._there is not None and bool(found) != self._there:
            raise UserError(
                place(0),
                "`labels` in all examples or in none",
                "some" if found else "none, after examples that have them",
                "Give every example its labels, or leave out the column.",
            )
        self._there = bool(found)
        if not found:
            return None
        name, column = found[0], rows.columns[found[0]]
        if columns.is_text(column):
            text = self._typed if rows.untyped else self.numbered
            column = text(name, column, place)
        labels = columns.numbers(name, column, place, self._shape, exact_integers=True)
        self._shape = labels.shape[1:]
        classes = labels.dtype == np.int64 and labels.ndim == 1
        if self._classes and not classes:
            raise UserError(
                place(0),
                "a whole number as label, as in the examples before it",
                "a fraction",
                "Write classes as whole numbers, and every label of a regression as a fraction.",
            )
        # Whole numbers after fractions are fractions that JSON wrote without a point.
        self._classes = classes if self._classes is None else self._classes
        if not self._classes:
            return labels.astype(np.float64)
        self.met.update(np.unique(labels).tolist())
        return labels

    def _typed(self, name: str, column: Any, place: columns.Place) -> Any:
        """A column of text that may be names of classes or numbers as numbers; UserError for one
        that may be both."""
        texts = columns.strings(name, column, place)
        plain = [_NUMBER.fullmatch(text) for text in texts]
        for i, text in enumerate(texts):
            if plain[i] and text in self.names and self.names[text] != float(text):
                raise UserError(
                    place(i), f"a class or its number in `{name}`",
                    f"{text!r}, which may be class {self.names[text]}, of that name, or the number",
                    "Write the data as JSONL or Parquet, with names as text or with numbers.",
                )  # fmt: skip
        if not all(plain):
            for i, text in enumerate(texts):
                if not plain[i] and text not in self.names:  # the mistake, whatever numbers are
                    return self.numbered(name, column.slice(i, 1), lambda _: place(i))  # noqa: B023
            return self.numbered(name, column, place)
        whole = not any(found and found[1] for found in plain)
        return column.cast(pa.int64() if whole else pa.float64())

    def numbered(self, name: str, column: Any, place: columns.Place) -> Any:
        """A column of names of classes as their numbers."""
        texts = columns.strings(name, column, place)
        unknown = next((i for i, text in enumerate(texts) if text not in self.names), None)
        if unknown is not None:
            listed = shortened(", ".join(map(repr, self.names)), 200)
            raise UserError(
                place(unknown),
                f"a class of the model in `{name}`: {listed}" if self.names
                else f"a number in `{name}`: texts name classes where a classifier names them",
                shortened(repr(texts[unknown]), 60),
                "Write the class as the model names it (id2label and label2id in its config.json), "
                "or as its number." if self.names else "Write numbers.",
            )  # fmt: skip
        return pa.array([self.names[text] for text in texts], pa.int64())

    def listed(self, name: str, column: Any, place: columns.Place) -> Any:
        """A column of lists of names of classes, or of numbers, as lists of numbers."""
        kind = column.type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            return column
        inner = column.values
        if not columns.is_text(inner):
            return column
        row_of = pc.list_parent_indices(column)
        flat = pc.list_flatten(column)
        numbers = self.numbered(name, flat, lambda i: place(row_of[i].as_py()))
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return pa.LargeListArray.from_arrays(pa.array(offsets), numbers)
