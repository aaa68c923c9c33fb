"""Files with a JSON object a line as parts of a source."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from raycurv.data.bounds import LINE_BYTES
from raycurv.data.parts import FilePart, RecordPart
from raycurv.data.rows import shown, unreadable
from raycurv.errors import UserError, in_words


@dataclass(frozen=True)
class JsonlPart(FilePart, RecordPart):
    """A file with a JSON object a line."""

    def _records(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        with unreadable(self.location):
            stream = self.filesystem.open_input_stream(self.path, compression=None)
        # What is read here is all that can fail so: no error of who takes the lines comes here.
        with unreadable(self.location), io.BufferedReader(stream, 1 << 20) as file:
            for number in count(1):
                line = file.readline(LINE_BYTES + 1)
                if not line:
                    return
                if len(line) > LINE_BYTES:
                    raise UserError(
                        f"{self.location}, line {number}",
                        f"a line of at most {LINE_BYTES >> 20} MiB",
                        "a longer one",
                        "Write one example a line, a long text as several of them, and large "
                        "arrays of numbers as Parquet.",
                    )
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield len(line), self._record(number, line)

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = _DECODER.decode(line.decode())
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


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
