"""Which files hold examples, and what reads them: by the endings of their names."""

from __future__ import annotations

import os

from raycurv.data.formats.arrow_part import ArrowPart
from raycurv.data.formats.csv_part import CsvPart, TsvPart
from raycurv.data.formats.json_array import JsonPart
from raycurv.data.formats.json_lines import JsonlPart
from raycurv.data.formats.lines import PACKED
from raycurv.data.formats.parquet_part import ParquetPart
from raycurv.data.parts import FilePart

# Read as a stream, and so packed ones as well.
_STREAMS: dict[str, type[FilePart]] = {
    ".jsonl": JsonlPart,
    ".ndjson": JsonlPart,
    ".json": JsonPart,
    ".csv": CsvPart,
    ".tsv": TsvPart,
}
FORMATS: dict[str, type[FilePart]] = {
    ".parquet": ParquetPart,
    ".arrow": ArrowPart,
    ".feather": ArrowPart,
    **_STREAMS,
    **{f"{ending}{packed}": kind for ending, kind in _STREAMS.items() for packed in PACKED},
}
READABLE = (
    "Parquet (.parquet), Arrow (.arrow, .feather), JSONL (.jsonl, .ndjson, .json), JSON or CSV "
    f"(.csv, .tsv; of text also with {', '.join(PACKED)})"
)


def ending(name: str) -> str:
    """The ending of a file's name that tells its format."""
    base, last = os.path.splitext(name.lower())
    return f"{os.path.splitext(base)[1]}{last}" if last in PACKED else last
