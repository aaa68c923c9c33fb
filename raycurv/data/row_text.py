"""The text of a row of examples, as a person reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from raycurv.data.conversations import COLUMNS as CONVERSATIONS

TOKENS = "input_ids"
# In order of preference: token ids come last, which nobody can read.
_KINDS = (
    ("prompt", "completion"), ("text", "text_pair"), ("text", "target"), ("text",),
    ("prompt", "chosen", "rejected"), ("chosen", "rejected"), *((n,) for n in CONVERSATIONS),
    (TOKENS,),
)  # fmt: skip


def text_columns(found: Collection[str], named: Collection[str] = ()) -> tuple[str, ...]:
    """The columns that the text of a row is made of, of those that there are; none for numbers and
    images. Those that were ``named`` are among them."""
    kinds = (kind for kind in _KINDS if set(named) <= set(kind) <= set(found))
    return next(kinds, ())


def row_text(
    row: Mapping[str, Any],
    decode: Callable[[Sequence[int]], str | None],
    named: Collection[str] = (),
) -> str | None:
    """The text of a row; ``None`` where it has none.

    A prompt stands directly before what follows it. A second text, a target, the better and the
    worse of two texts stand on lines of their own; so do the messages of a conversation, each
    behind its role.

    Args:
        row: the columns that :func:`text_columns` names.
        decode: makes text of token ids, for a row of nothing else.
        named: columns that it is made of in any case.
    """
    kind = text_columns(row, named)
    if kind == (TOKENS,):
        return decode(row[TOKENS])
    texts = {name: said for name in kind if (said := _said(row[name])) is not None}
    # A text goes on where its prompt ends; the next message of a conversation is a line of its own.
    head = texts.pop("prompt", "") + "\n" * isinstance(row.get("prompt"), list)
    if "chosen" in texts:
        return "\n".join(f"{name}: {head}{text}" for name, text in texts.items())
    return head + "\n".join(texts.values()) if texts else None


def _said(value: Any) -> str | None:
    """A text, or the messages of a conversation, a line each; ``None`` for anything else."""
    if isinstance(value, list) and all(isinstance(message, Mapping) for message in value):
        return "\n".join(map(_message, value))
    return value if isinstance(value, str) else None


def _message(message: Mapping[str, Any]) -> str:
    """Its role and content, and what else it has (calls of tools, say) as JSON."""
    rest = {name: value for name, value in message.items() if value is not None}
    role = rest.pop("role", rest.pop("from", ""))
    content = rest.pop("content", rest.pop("value", ""))
    said = content if isinstance(content, str) else _json(content)
    return f"{role}: {said}" + (f" {_json(rest)}" if rest else "")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
