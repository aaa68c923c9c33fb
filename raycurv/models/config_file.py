"""``config.json`` before anything is built from it: within bounds.

A configuration of a stranger's is data: its numbers decide how much is built, and in how many
pieces. What is built per layer or per class is bounded here, before transformers reads the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from raycurv.errors import UserError
from raycurv.jsonfile import parse_json, read_bytes
from raycurv.names import regular_file

CONFIG = "config.json"
# Far more than any configuration has.
_MOST_BYTES, _MOST_VALUES, _MOST_DEPTH = 8 << 20, 400_000, 32
# torch counts in 64 bits, and products of several of these must stay below.
_MOST = 2**53
# A layer takes some 10 ms to look at; the deepest that are known have 315.
_MOST_LAYERS = 512
# Numbers of which so many objects of Python are made, and the most of each.
_COUNTED = (
    (re.compile(r"(^|_)(?<!per_)(layers?|blocks?|depths?|stages?|types)$"), _MOST_LAYERS),
    (re.compile(r"(^|_)experts?$|experts_per|^num_labels$"), 100_000),
    (re.compile(r"(^|_)(attention_)?heads?$"), 100_000),
)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


def read_content(directory: Path) -> dict[str, Any]:
    """What ``config.json`` says, checked.

    Raises:
        UserError: no such file, no JSON object, too large, too deep, or a number that no model has.
    """
    path = str(directory / CONFIG)
    remedy = "Take config.json from where the model was saved."
    place = regular_file(directory, CONFIG, f"model {directory}")
    content = parse_json(read_bytes(place, _MOST_BYTES, path), path, "a JSON object", remedy)
    waiting: list[tuple[str, Any, int]] = [("", content, 0)]
    seen = 0
    while waiting:
        name, value, depth = waiting.pop()
        seen += 1
        if depth > _MOST_DEPTH or seen > _MOST_VALUES:
            expected = f"at most {_MOST_VALUES:,} values, nested {_MOST_DEPTH} deep"
            raise UserError(path, expected, "more", remedy)
        if isinstance(value, Mapping):
            waiting += [(str(key), inner, depth + 1) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(name, inner, depth + 1) for inner in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            least, most = _bounds(name)
            # Infinity is what some configurations mean by no limit.
            if not least <= value <= most and not (abs(value) == math.inf and most == _MOST):
                got = f"{value:,}" if abs(value) < 1e15 else "a number far beyond"
                raise UserError(
                    f"{path}, {name[:80]}", f"a number from {least:,} to {most:,}", got, remedy
                )
    return content


def _bounds(name: str) -> tuple[int, int]:
    """What a number of a configuration may be."""
    if name in _LAYERS:
        return 1, _MOST_LAYERS
    most = next((most for pattern, most in _COUNTED if pattern.search(name)), None)
    # Negative ones count from the end (vision_feature_layer), or say that there is none.
    return (-_MOST, _MOST) if most is None else (-most, most)


def check_layers(content: Mapping[str, Any], keys: Collection[str], path: str) -> None:
    """Refuse more layers than the names of the tensors count: what is missing would be built.

    Raises:
        UserError: how many layers there are, and how many there should be.
    """
    numbers = [int(n) for key in keys for n in re.findall(r"(?<=\.)\d{1,9}(?=\.)", f".{key}.")]
    stored = max(numbers, default=-1) + 1
    text, groups = content.get("text_config"), content.get("num_hidden_groups")
    for name in _LAYERS:
        wanted = (text if isinstance(text, Mapping) else content).get(name)
        if name == "num_hidden_layers" and isinstance(groups, int):
            wanted = groups  # each of which is used several times
        if isinstance(wanted, int) and wanted > max(1, stored):
            raise UserError(
                f"{path}, {name}",
                f"{wanted} layers in the checkpoint",
                f"{stored} at the most, by the names of its {len(keys)} tensors",
                "Complete the checkpoint, or correct config.json.",
            )
