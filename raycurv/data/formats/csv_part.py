"""CSV and TSV files as parts of a source: every value is text, as it stands there.

As RFC 4180 has it: a value in double quotes may hold delimiters, line breaks, and quotes that are
doubled. The first line names the columns. What is a number is for those to say that read it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from raycurv.data.bounds import LINE_BYTES
from raycurv.data.formats.lines import bounded_lines
from raycurv.data.parts import FilePart, RecordPart
from raycurv.errors import UserError, in_words


@dataclass(frozen=True)
class CsvPart(FilePart, RecordPart):
    """A file of values that commas set apart."""

    untyped = True
    delimiter: ClassVar[str] = ","

    def _records(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        # The library's own limit is one of all readers of the process: ours is that of a record.
        csv.field_size_limit(max(csv.field_size_limit(), LINE_BYTES))
        lines = _Lines(self)
        reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
        names: list[str] | None = None
        row = 0
        while True:
            lines.begin()
            try:
                values = next(reader, None)
            except (csv.Error, UnicodeDecodeError) as error:
                raise self._mistake(row, lines, in_words(error)) from error
            if values is None:
                return
            if not values:
                continue  # an empty line
            if names is None:
                names = values
                twice = next((name for name in names if names.count(name) > 1), None)
                if twice is not None:
                    raise self._mistake(row, lines, f"two columns `{twice}`")
                continue
            if len(values) != len(names):
                got = f"{len(values)} values under {len(names)} names of columns"
                raise self._mistake(row, lines, got)
            tabs = self.delimiter == "\t" and lines.number > lines.first
            if tabs and lines.tabs == {len(names) - 1} != {0}:
                got = "quotes round several lines of which each is a row by itself"
                raise self._mistake(row, lines, got)
            yield lines.size, dict(zip(names, values, strict=True))
            row += 1

    def _mistake(self, row: int, lines: _Lines, got: str) -> UserError:
        at = f"line {lines.first}"
        if lines.number > lines.first:
            at += f" to {lines.number}"
        return UserError(
            f"{self.location}, row {row} ({at})",
            "as many values as the first line has names, in UTF-8; in double quotes those with "
            "delimiters, line breaks or quotes, which are doubled",
            got,
            "Correct the quotes there, or write the file again by a library of CSV, or as JSONL.",
        )


@dataclass(frozen=True)
class TsvPart(CsvPart):
    """A file of values that tabs set apart."""

    delimiter = "\t"


class _Lines:
    """The lines of a file as text, with how many bytes the record under way has, and how many tabs
    there are in its lines."""

    def __init__(self, part: FilePart) -> None:
        self._lines = bounded_lines(part)
        self.tabs: set[int] = set()
        self.number = self.first = self.size = 0

    def begin(self) -> None:
        """Count lines, bytes and tabs anew: a record begins on the next line."""
        self.first, self.size, self.tabs = self.number + 1, 0, set()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self.size += len(line)
        self.tabs.add(line.count(b"\t"))
        if self.size > LINE_BYTES:
            raise csv.Error(f"more than {LINE_BYTES >> 20} MiB: is a quote not closed?")
        return line.decode()
