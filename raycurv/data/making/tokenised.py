"""Rows as token ids, and which of these are targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from raycurv.data import columns
from raycurv.data.conversations import is_conversation, refuse_json
from raycurv.data.making.chunk import Chunk
from raycurv.data.making.input_columns import TALKS, TOKENS, TWO_TEXTS
from raycurv.data.making.tools import Tools


@dataclass(frozen=True)
class Tokenised:
    """Rows as tokens.

    Attributes:
        tokens: of each row, int64.
        targets: which of them are targets, bool; ``None`` for all.
        blank: whether a row is a text of no character.
        kinds: of each token whether it is of the second text; empty where nothing says it.
    """

    tokens: list[np.ndarray]
    targets: list[np.ndarray | None]
    blank: list[bool]
    kinds: list[np.ndarray] = field(default_factory=list)


class Tokeniser:
    """Makes tokens of rows, by the columns that their inputs are in."""

    def __init__(self, tools: Tools) -> None:
        self._encoder, self._talks = tools.encoder, tools.talks
        self._ways: dict[tuple[str, ...], Callable[[Chunk], Tokenised]] = {
            ("input_ids",): self._ids,
            ("prompt", "completion"): self._completions,
            ("text",): self._texts,
            TWO_TEXTS: self._texts,
            **dict.fromkeys(TALKS, self._conversations),
        }

    def take(self, chunk: Chunk) -> Tokenised:
        """The tokens of a chunk; UserError for a value of another type, or without a tokenizer."""
        return self._ways[chunk.kind](chunk)

    def _ids(self, chunk: Chunk) -> Tokenised:
        name = "input_ids"
        found = columns.present_integer_lists(name, chunk.columns[name], chunk.place)
        return Tokenised(found, [None] * len(chunk), [False] * len(chunk))

    def _texts(self, chunk: Chunk) -> Tokenised:
        if chunk.kind == TOKENS[2] and is_conversation(chunk.columns["text"]):
            return self._conversations(chunk)
        texts, blank = _texts(chunk)
        second = texts[1] if chunk.kind == TWO_TEXTS else None
        kinds: list[np.ndarray] = []
        if second is None and not self._encoder.whole_texts:
            tokens = self._encoder.encode("text", texts[0], chunk.place)
        else:
            tokens, kinds = self._encoder.encode_whole("text", texts[0], second, chunk.place)
        return Tokenised(tokens, [None] * len(chunk), blank, kinds)

    def _completions(self, chunk: Chunk) -> Tokenised:
        """A prompt and its completion, tokenised apart, with the special tokens of a text."""
        if is_conversation(*(chunk.columns[name] for name in chunk.kind)):
            return self._conversations(chunk)
        texts, blank = _texts(chunk)
        before, after = self._encoder.affixes
        prompts, completions = (
            self._encoder.encode(name, own, chunk.place, special=False)
            for name, own in zip(chunk.kind, texts, strict=True)
        )
        tokens: list[np.ndarray] = []
        targets: list[np.ndarray | None] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = np.concatenate([before, prompt, completion, after]).astype(np.int64)
            tokens.append(ids)
            targets.append(np.arange(len(ids)) >= len(before) + len(prompt))
        return Tokenised(tokens, targets, blank)

    def _conversations(self, chunk: Chunk) -> Tokenised:
        tokens, targets = self._talks.take(chunk, chunk.kind)
        return Tokenised(tokens, targets, [not len(ids_T) for ids_T in tokens])


def _texts(chunk: Chunk) -> tuple[list[list[str]], list[bool]]:
    """The texts of each column, and which rows have no character in any."""
    texts = [columns.strings(name, chunk.columns[name], chunk.place) for name in chunk.kind]
    for name, own in zip(chunk.kind, texts, strict=True):
        refuse_json(name, own, chunk.place)
    return texts, [not any(parts) for parts in zip(*texts, strict=True)]
