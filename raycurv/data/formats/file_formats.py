"""Which files hold examples, and what reads them: by the endings of their names."""

from __future__ import annotations

import os

from raycurv.data.formats.arrow_part import ArrowPart
from raycurv.data.formats.json_lines import JsonlPart
from raycurv.data.formats.parquet_part import ParquetPart
from raycurv.data.parts import FilePart

FORMATS: dict[str, type[FilePart]] = {
    ".parquet": ParquetPart,
    ".jsonl": JsonlPart,
    ".ndjson": JsonlPart,
    ".json": JsonlPart,
    ".arrow": ArrowPart,
    ".feather": ArrowPart,
}
READABLE = "Parquet (.parquet), JSONL (.jsonl, .ndjson, .json) or Arrow (.arrow, .feather)"


def ending(name: str) -> str:
    """The ending of a file's name that tells its format."""
    return os.path.splitext(name)[1].lower()
