"""Names of the classes that whole numbers in a column stand for, where the data says them.

Data sets of Hugging Face's keep them in the metadata of an Arrow schema, and so in Parquet:

    {"info": {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raycurv.jsonfile import strict_json

_KEY, _MOST_BYTES = b"huggingface", 8 << 20


def class_names_of(schema: Any, column: str) -> tuple[str, ...]:
    """The names by number of the classes in a column, or in its lists; none where the schema does
    not say them, or says what nobody writes there."""
    said = (schema.metadata or {}).get(_KEY, b"")
    try:
        found = strict_json(said) if len(said) <= _MOST_BYTES else None
    except ValueError:
        return ()
    for key in ("info", "features", column):
        found = found.get(key) if isinstance(found, Mapping) else None
    while isinstance(found, Mapping) and "feature" in found:
        found = found["feature"]
    if not isinstance(found, Mapping) or found.get("_type") != "ClassLabel":
        return ()
    names = found.get("names")
    names = names if isinstance(names, list) else []
    return tuple(names) if all(isinstance(name, str) for name in names) else ()
