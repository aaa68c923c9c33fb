"""Files that are one JSON array of objects as parts of a source."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raycurv.data.bounds import LINE_BYTES
from raycurv.data.formats.json_lines import DECODER, JsonlPart
from raycurv.data.formats.lines import READ_BYTES, open_text
from raycurv.data.rows import shown
from raycurv.errors import UserError, in_words

_SPACE = " \t\r\n"


@dataclass(frozen=True)
class JsonPart(JsonlPart):
    """A file with a JSON array of objects, or with an object a line: its first character tells."""

    def _records(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        with open_text(self) as file:
            array = file.read(READ_BYTES).lstrip()[:1] == b"["
        yield from self._elements() if array else super()._records()

    def _elements(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The objects of an array, decoded one at a time as they come."""
        decode = codecs.getincrementaldecoder("utf-8")().decode
        number, text, begun, ended = 0, "", False, False
        with open_text(self) as file:
            while not ended:
                data = file.read(READ_BYTES)
                try:
                    text += decode(data, final=not data)
                except UnicodeDecodeError as error:
                    raise self._mistake(number, in_words(error)) from error
                at = 0
                while True:
                    at = _skip(text, at)
                    if not begun:
                        begun, at = True, at + 1
                        continue
                    if text[at : at + 1] == "]":
                        ended, at = True, _skip(text, at + 1)
                        break
                    start = _skip(text, at + 1) if number and text[at : at + 1] == "," else at
                    if number and start == at and at < len(text):
                        raise self._mistake(number, f"{shown(text[at:])} instead of a comma")
                    try:
                        record, end = DECODER.raw_decode(text, start)
                    except (ValueError, RecursionError) as error:
                        # Perhaps it goes on in what has not been read yet.
                        if data and len(text) - at <= LINE_BYTES:
                            break
                        got = f"{in_words(error)} in {shown(text[start:])}"
                        raise self._mistake(number, got) from error
                    if end - start > LINE_BYTES:
                        raise self._mistake(number, "a larger one")
                    if not isinstance(record, dict):
                        raise self._mistake(number, f"a {type(record).__name__}")
                    yield end - start, record
                    number, at = number + 1, end
                text = text[at:]
            if text or file.read(READ_BYTES).strip():
                raise self._mistake(number, f"{shown(text)} behind its end")

    def _mistake(self, row: int, got: str) -> UserError:
        return UserError(
            f"{self.location}, row {row}",
            f"one JSON array of objects of at most {LINE_BYTES >> 20} MiB each, in UTF-8",
            got,
            "Write the file as JSONL: every example an object on a line of its own.",
        )


def _skip(text: str, at: int) -> int:
    """The next place that is no space."""
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at
