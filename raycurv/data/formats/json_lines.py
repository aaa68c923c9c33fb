"""Files with a JSON object a line as parts of a source."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raycurv.data.formats.lines import bounded_lines
from raycurv.data.parts import FilePart, RecordPart
from raycurv.data.rows import shown
from raycurv.errors import UserError, in_words


@dataclass(frozen=True)
class JsonlPart(FilePart, RecordPart):
    """A file with a JSON object a line."""

    def _records(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for number, line in enumerate(bounded_lines(self), start=1):
            if line.strip():
                yield len(line), self._record(number, line)

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = DECODER.decode(line.decode())
        except (ValueError, RecursionError) as error:
            got = f"{in_words(error)} in {shown(line)}"
        else:
            if isinstance(record, dict):
                return record
            got = f"a {type(record).__name__}"
        raise UserError(
            f"{self.location}, line {number}",
            "one JSON object a line, in UTF-8",
            got,
            "Write the file as JSONL: every example an object on a line of its own, without a list "
            "round them and without line breaks inside.",
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no key comes twice: one of the two values would be lost."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_unique)
