"""Conversations, which are told apart from texts: how to make tokens of them.

A conversation is a list of messages, ``{"role": "user", "content": "..."}``. What a model saw of it
is what the chat template of its tokenizer makes of it, which is not a matter of the data alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from raycurv.errors import UserError

# Columns of conversations, as data sets call them.
COLUMNS = ("messages", "conversations", "conversation", "chat")
_OPEN = "With tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)"


def keys_of(value: Any) -> tuple[str, ...]:
    """The keys of the messages in a value, or in an Arrow column of this type; none if it is no
    list of messages."""
    if isinstance(value, pa.DataType):
        inner = getattr(value, "value_type", None)
        return tuple(field.name for field in inner) if isinstance(inner, pa.StructType) else ()
    listed = isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) for m in value)
    return tuple(map(str, value[0])) if listed else ()


def conversation(where: str, name: str, keys: Sequence[str]) -> UserError:
    """The mistake of messages where tokens or text are wanted.

    Args:
        where: the file, or the row in it.
        name: the column.
        keys: of a message, as far as known.
    """
    first = ""
    if {"from", "value"} <= set(keys):
        first = (
            ' (after [{"role": {"human": "user", "gpt": "assistant"}.get(m["from"], m["from"]), '
            f'"content": m["value"]}} for m in row["{name}"]])'
        )
    if name in ("prompt", "completion"):
        remedy = (
            'ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], '
            'return_dict=False); start = len(tokenizer.apply_chat_template(row["prompt"], '
            "add_generation_prompt=True, return_dict=False)); give every row as "
            '{"input_ids": ids, "loss_mask": [t >= start for t in range(len(ids))]}'
        )
    else:
        remedy = (
            "give every row as "
            f'{{"input_ids": tokenizer.apply_chat_template(row["{name}"], return_dict=False)}}'
        )
    of = f" of {' and '.join(sorted(keys)[:4])}" if keys else ""
    return UserError(
        where,
        "tokens or text",
        f"conversations in `{name}` (lists of messages{of})",
        "Put them through the chat template that the model was trained with, and save the tokens. "
        f"{_OPEN}: {remedy}{first}.",
    )
