"""Conversations as tokens, by the chat template of the model's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raycurv.data import columns
from raycurv.data.assistant_turns import LossOn, Written, token_mask, write
from raycurv.data.chat_template import DATE, ChatTemplate
from raycurv.data.conversations import (
    REFUSED,
    TOOLS,
    Conversation,
    as_python,
    conversation_of,
)
from raycurv.data.making.chunk import Chunk
from raycurv.data.making.encoder import Encoder
from raycurv.data.making.reader_settings import ReaderSettings
from raycurv.errors import UserError


class ConversationTokens:
    """Makes tokens of conversations; notes in the findings how their turns were told apart."""

    def __init__(self, settings: ReaderSettings, encoder: Encoder) -> None:
        self._settings, self._encoder = settings, encoder

    def take(
        self, chunk: Chunk, names: Sequence[str], turns: bool = True
    ) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
        """The tokens of each row, int64, none for a conversation without messages; and which of
        them are targets, ``None`` for all.

        Args:
            names: columns of messages, which follow each other; all but the last only ask.
            turns: whether it matters whose turn a token is of.

        Raises:
            UserError: names the first row that is no conversation, that the template does not
                take, or whose turns cannot be told apart.
        """
        for name, remedy in REFUSED.items():
            if name in chunk.rows.others:
                raise UserError(
                    chunk.rows.location, "conversations that are in their messages alone",
                    f"`{name}` beside them", remedy,
                )  # fmt: skip
        template = self._encoder.tokenizer(names[-1]).chat
        settings = self._settings
        turns = turns and not settings.whole_texts and settings.labels_of != "text"
        on = settings.loss_on if turns else None
        talks = _conversations(chunk, names)
        written = [
            write(talk, template, on, chunk.place(i)) if talk.messages else Written("", None)
            for i, talk in enumerate(talks)
        ]

        def encode(texts: Sequence[str], place: columns.Place) -> list[np.ndarray]:
            return self._encoder.encode(names[-1], texts, place, written=True)

        tokens = encode([one.text for one in written], chunk.place)
        targets = [
            token_mask(ids_T, one, encode, chunk.place(i))
            for i, (ids_T, one) in enumerate(zip(tokens, written, strict=True))
        ]
        self._note(talks, template, on)
        return tokens, targets

    def _note(
        self, talks: Sequence[Conversation], template: ChatTemplate, on: LossOn | None
    ) -> None:
        found = self._settings.findings
        said: dict[str, Any] = {"count": found.conversations.get("count", 0) + len(talks)}
        if on is not None:
            said |= {"loss_on": on}
        if on in ("assistant", "last-assistant"):
            marked = any(template.marks(talk.tools) for talk in talks[:1])
            said |= {"turns_by": "marks" if marked else "prefixes"}
        found.conversations = said | ({"date": DATE.isoformat()} if template.dated else {})
        if not template.shows_tools():
            found.tools_not_written += sum(talk.tools is not None for talk in talks)


def _conversations(chunk: Chunk, names: Sequence[str]) -> list[Conversation]:
    lists = [as_python(chunk.columns[name]) for name in names]
    tools = [None] * len(chunk)
    if TOOLS in chunk.columns:
        tools = as_python(chunk.columns[TOOLS])
    return [
        conversation_of(row, names, own, chunk.place(i))
        for i, (row, own) in enumerate(zip(zip(*lists, strict=True), tools, strict=True))
    ]
