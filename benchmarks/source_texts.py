"""Real text in pieces of exactly as many tokens as asked for: the Python standard library's source.

A token is a byte, with one BOS before each text (demo/tokenizer.py), so a piece of T tokens has
T - 1 bytes. Pieces are of ASCII, which can be cut anywhere, and no two are the same.
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Not the library's own, or tests of it, which repeat themselves.
LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "__pycache__",
}


@dataclass(frozen=True)
class Text:
    """A piece of a source file; ``id`` is the file and the piece's number in it."""

    id: str
    text: str


def choose(stdlib: Path, count: int, tokens: int, seed: int) -> list[Text]:
    """``count`` different texts of ``tokens`` tokens each, in a seeded order.

    Raises:
        ValueError: fewer than two tokens, or more than the library has.
    """
    size = tokens - 1
    if size < 1:
        raise ValueError(f"--tokens: expected 2 or more, got {tokens}. A BOS and a byte are 2.")
    pieces: dict[str, str] = {}
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib)
        if LEFT_OUT & set(name.parts):
            continue
        source = path.read_bytes().decode(errors="replace")
        for n, start in enumerate(range(0, len(source) - size + 1, size)):
            piece = source[start : start + size]
            if piece.isascii():
                pieces.setdefault(piece, f"{name.as_posix()}#{n}")
    if len(pieces) < count:
        raise ValueError(
            f"{stdlib}: expected {count} texts of {tokens} tokens, got {len(pieces)}. "
            f"Lower --examples or --tokens."
        )
    chosen = random.Random(seed).sample(sorted(pieces.items()), count)
    return [Text(name, piece) for piece, name in chosen]


def write(texts: Sequence[Text], path: Path) -> None:
    """A JSON Lines file of ``id`` and ``text``: the whole of it or none."""
    part = path.with_name(path.name + ".part")
    lines = (json.dumps({"id": text.id, "text": text.text}) + "\n" for text in texts)
    part.write_text("".join(lines))
    part.replace(path)


def standard_library() -> Path:
    """Where the running Python has its own modules."""
    return Path(sysconfig.get_path("stdlib"))
