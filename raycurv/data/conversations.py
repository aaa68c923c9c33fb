"""Conversations: lists of messages, as data sets spell them, in the form that chat templates take.

    {"role": "user", "content": "How tall?"}       also {"from": "human", "value": "How tall?"}
    {"role": "assistant", "tool_calls": [...]}     content may be missing, or a list of text parts

A column of them is one of lists of structs, whose missing keys Arrow fills with nulls (left out
here, as if they were not there), of lists of JSON objects, or of JSON texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raycurv.errors import UserError, in_words, shortened

Message = dict[str, Any]

# Columns of conversations, as data sets call them, and of the tools that a conversation has.
COLUMNS = ("messages", "conversations", "conversation", "chat")
TOOLS = "tools"
# The key of a message that is kept as JSON.
_JSON = "__json__"
# Beside conversations these would change what a template makes of them.
REFUSED = {
    "system": "Write it as the first message, of the role system, or leave the column out.",
    "system_prompt": "Write it as the first message, of the role system, or leave the column out.",
    "chat_template_kwargs": "Give the rows as `input_ids` with a `loss_mask`, made with them.",
}
ASSISTANT = "assistant"
# What a model thought before it answered; the first of these is the one that templates read.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Each turn is rendered by itself beside all turns before it: the work grows as the square.
MOST_MESSAGES = 1024
_ROLES = {
    "human": "user", "gpt": ASSISTANT, "system": "system", "user": "user", ASSISTANT: ASSISTANT,
    "tool": "tool",
}  # fmt: skip
# Keys by which data sets leave a turn out of the loss.
_COUNTS = ("weight", "train", "training", "loss")
# How a list of messages begins as JSON.
_JSON_TALK = re.compile(r'\s*\[\s*\{\s*"(?:role|from|content|value)"\s*:')


@dataclass(frozen=True)
class Conversation:
    """Messages, and what goes with them.

    Attributes:
        messages: with ``role``, and ``content`` as text if there is any.
        tools: JSON schemas of the tools that the model may call.
        prompt: how many messages at the beginning only ask: what is not theirs answers.
        without_loss: numbers of messages that the data leaves out of the loss.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    prompt: int = 0
    without_loss: frozenset[int] = frozenset()


def is_conversation(*columns: Any) -> bool:
    """Whether Arrow columns are all of lists of messages."""
    return all(bool(keys_of(column.type)) for column in columns)


def keys_of(value: Any) -> tuple[str, ...]:
    """The keys of the messages in a value, or in an Arrow column of this type; none if it is no
    list of messages."""
    if isinstance(value, pa.DataType):
        inner = getattr(value, "value_type", None)
        return tuple(field.name for field in inner) if isinstance(inner, pa.StructType) else ()
    listed = isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) for m in value)
    return tuple(map(str, value[0])) if listed else ()


def encoded(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Messages for an Arrow column, each as JSON: as structs they would all have the same keys, in
    one order, with values of one type."""
    return [{_JSON: json.dumps(message, default=_plain)} for message in messages]


def as_python(column: Any) -> list[Any]:
    """What every row of an Arrow column has, messages as they were before :func:`encoded`."""
    found: list[Any] = column.to_pylist()
    if keys_of(column.type) != (_JSON,):
        return found
    return [None if row is None else [json.loads(m[_JSON]) for m in row] for row in found]


def _plain(value: Any) -> Any:
    if not hasattr(value, "tolist"):
        raise TypeError(f"a {type(value).__name__} in a message")
    return value.tolist()


def conversation_of(
    lists: Sequence[Any], names: Sequence[str], tools: Any, where: str
) -> Conversation:
    """A row's conversation.

    Args:
        lists: what the row has in its columns of messages, which follow each other; all but the
            last only ask.
        names: of these columns.
        tools: what it has as tools; ``None`` for nothing.
        where: the row, for errors.

    Raises:
        UserError: it is none, or has what is not text.
    """
    parts = [_messages(value, name, where) for value, name in zip(lists, names, strict=True)]
    messages = [message for part in parts for message in part]
    if len(messages) > MOST_MESSAGES:
        raise UserError(
            where, f"a conversation of at most {MOST_MESSAGES:,} messages", f"{len(messages):,}",
            "Give it as several, or its tokens as `input_ids` with a `loss_mask`.",
        )  # fmt: skip
    asking = sum(map(len, parts[:-1]))
    if asking and parts[-1][:asking] == messages[:asking]:
        raise UserError(
            where, f"`{names[-1]}` that goes on behind its `{names[0]}`", "one that begins with it",
            f"Cut it off `{names[-1]}`; of pairs `{names[0]}` may be left out instead.",
        )  # fmt: skip
    if asking and messages[asking - 1]["role"] == ASSISTANT:
        raise UserError(
            where, f"a `{names[0]}` that ends with what is answered",
            f"one that ends with a message of the {ASSISTANT}",
            f"Move that message to the beginning of `{names[-1]}`.",
        )  # fmt: skip
    silent = frozenset(k for k, m in enumerate(messages) if not _counts(m, where))
    said = [{k: v for k, v in m.items() if k not in _COUNTS} for m in messages]
    return Conversation(said, _tools(tools, where), asking, silent)


def without_nulls(value: Any) -> Any:
    """A value without the keys that have none: Arrow gives every struct of a column all keys."""
    if isinstance(value, Mapping):
        return {str(key): without_nulls(v) for key, v in value.items() if v is not None}
    return [without_nulls(one) for one in value] if isinstance(value, (list, tuple)) else value


def refuse_json(name: str, texts: Sequence[str], place: Callable[[int], str]) -> None:
    """Refuse a column of texts that are all conversations as JSON: a model would be given the JSON.

    Raises:
        UserError: names the first of them.
    """
    if not texts or not all(map(_JSON_TALK.match, texts)):
        return
    try:
        first = json.loads(texts[0])
    except (ValueError, RecursionError):
        return
    if all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in first):
        raise UserError(
            place(0), f"text in `{name}`", "messages as JSON",
            "Call the column `messages`, where JSON is read as a conversation, or write lists of "
            "messages; where the model is to see the JSON itself, give its tokens as `input_ids`.",
        )  # fmt: skip


def no_template(where: str, name: str) -> UserError:
    """The mistake of conversations where text alone is taken."""
    return UserError(
        where, "text, or tokens", f"conversations in `{name}` (lists of messages)",
        "Give conversations in one column, or in all of `prompt` and `completion`, or `prompt`, "
        "`chosen` and `rejected` (where these two hold the whole of it, without the column "
        "`prompt`); to a masked model, and one with an encoder, as `input_ids`.",
    )  # fmt: skip


def _messages(value: Any, name: str, where: str) -> list[Message]:
    given = without_nulls(_parsed(value, name, where))
    if not isinstance(given, list):
        raise _no_list(where, name, given)
    return [_message(_parsed(m, name, where), name, f"{where}, message {k}")
            for k, m in enumerate(given)]  # fmt: skip


def _parsed(value: Any, name: str, where: str) -> Any:
    """What a JSON text says; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return without_nulls(json.loads(value))
    except (ValueError, RecursionError) as error:
        raise UserError(
            where, f"JSON in `{name}`, where it is a text", in_words(error), f"Correct `{name}`."
        ) from error


def _message(given: Any, name: str, where: str) -> Message:
    if not isinstance(given, Mapping):
        raise _no_list(where, name, given)
    message = dict(given)
    if "role" not in message and "from" in message:
        role = str(message.pop("from"))
        if role not in _ROLES:
            raise UserError(
                where, f"`from` one of {', '.join(_ROLES)}", shortened(repr(role)),
                "Rename it, or write `role` and `content` as the chat template takes them.",
            )  # fmt: skip
        message["role"] = _ROLES[role]
        if "value" in message:
            message["content"] = message.pop("value")
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise UserError(
            where, "a message with a `role` (or `from`)", f"the keys {_listed(message)}",
            "Give every message the role of who says it: system, user, assistant or tool.",
        )  # fmt: skip
    if "content" in message:
        message["content"] = _text(message["content"], where)
    return message


def _text(content: Any, where: str) -> str:
    """Content as one text: parts stand one after the other, as templates of such parts put them."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                where, "content that is text, or parts of the type text",
                f"a part of the type {shortened(repr(kind))}",
                "Models are given text alone here: leave the part out where the text is meant "
                "without it, else the example.",
            )  # fmt: skip
        texts.append(part["text"])
    return "".join(texts)


def _tools(value: Any, where: str) -> list[Any] | None:
    given = without_nulls(_parsed(value, TOOLS, where)) if value not in (None, "") else None
    if given is None:
        return None
    if not isinstance(given, list):
        raise UserError(
            where, f"a list of JSON schemas in `{TOOLS}`", shortened(repr(given)),
            "Correct it, or leave the column out.",
        )  # fmt: skip
    found = [_parsed(one, TOOLS, where) for one in given]
    wrong = next((one for one in found if not isinstance(one, Mapping)), None)
    if wrong is not None:
        raise UserError(
            where, f"JSON schemas in `{TOOLS}`", shortened(repr(wrong)), "Correct them."
        )
    return found or None


def _counts(message: Message, where: str) -> bool:
    """Whether a message counts in the loss, as far as it says so itself."""
    found = {name: message[name] for name in _COUNTS if name in message}
    for name, value in found.items():
        if value not in (0, 1):
            raise UserError(
                where, f"`{name}` of a message that is 0 or 1, whether it counts in the loss",
                shortened(repr(value)), "Correct it, or leave it out.",
            )  # fmt: skip
    return all(found.values())


def _no_list(where: str, name: str, given: Any) -> UserError:
    return UserError(
        where, f"lists of messages in `{name}`, each with `role` and `content`",
        shortened(repr(given), 60), f"Correct `{name}`, or rename the column.",
    )  # fmt: skip


def _listed(message: Message) -> str:
    return shortened(", ".join(map(str, message)) or "none")
