"""The text of a row of examples, as a person reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from raycurv.data.conversations import COLUMNS as CONVERSATIONS

TOKENS = "input_ids"
_GONE_ON, _SECOND, _TARGET = ("prompt", "completion"), ("text", "text_pair"), ("text", "target")
_PAIRS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
# In order of preference: token ids come last, which nobody can read.
_KINDS = (
    _GONE_ON, _SECOND, _TARGET, ("text",), *_PAIRS, *((n,) for n in CONVERSATIONS), (TOKENS,)
)  # fmt: skip
# What objectives never read as inputs (raycurv/data/making/input_columns.py): such columns beside
# those that they read say something else.
_UNREAD: dict[str, tuple[tuple[str, ...], ...]] = {
    "causal-lm": (_SECOND, _TARGET, *_PAIRS),
    "seq2seq-lm": (_SECOND, *_PAIRS),
    "preference": (_GONE_ON, _SECOND, _TARGET, ("text",)),
    **dict.fromkeys(
        ("classification", "regression", "multi-label", "token-classification", "masked-lm"),
        (_TARGET, *_PAIRS),
    ),
}


def text_columns(
    found: Collection[str], named: Collection[str] = (), objective: str = ""
) -> tuple[str, ...]:
    """The columns that the text of a row is made of, of those that there are; none for numbers and
    images. Those that were ``named`` are among them, and none that the ``objective`` of this name
    does not read."""
    unread = _UNREAD.get(objective, ())
    kinds = (k for k in _KINDS if k not in unread and set(named) <= set(k) <= set(found))
    return next(kinds, ())


def row_text(
    row: Mapping[str, Any],
    decode: Callable[[Sequence[int]], str | None],
    named: Collection[str] = (),
    objective: str = "",
) -> str | None:
    """The text of a row; ``None`` where it has none.

    A prompt stands directly before what follows it. A second text, a target, the better and the
    worse of two texts stand on lines of their own; so do the messages of a conversation, each
    behind its role.

    Args:
        row: the columns that :func:`text_columns` names.
        decode: makes text of token ids, for a row of nothing else.
        named: columns that it is made of in any case.
        objective: that read it, by name.
    """
    kind = text_columns(row, named, objective)
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
