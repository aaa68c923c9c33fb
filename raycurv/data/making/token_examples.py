"""Examples of tokens: given as such, or made of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from raycurv.data import beside_tokens, columns
from raycurv.data.examples import NOT_A_TARGET, Example
from raycurv.data.making.chunk import Chunk
from raycurv.data.making.input_columns import TWO_TEXTS
from raycurv.data.making.lengths import piece
from raycurv.data.making.token_labels import TokenLabels
from raycurv.data.making.tokenised import Tokenised, Tokeniser
from raycurv.data.making.tools import Tools
from raycurv.data.masking import Masking
from raycurv.errors import UserError

_KINDS_OF_TOKENS = "token_type_ids"


class TokenExamples:
    """Makes examples of ``input_ids``, of texts, or of prompts with their completions."""

    def __init__(self, tools: Tools) -> None:
        self._tools, self._settings = tools, tools.settings
        self._tokeniser, self._labels = Tokeniser(tools), TokenLabels(tools)
        # Whether all examples say which text a token is of, or none.
        self._kinds_there: bool | None = None

    def make(self, chunk: Chunk) -> Iterator[Example]:
        """See :class:`raycurv.data.making.tools.Maker`."""
        settings, place = self._settings, chunk.place
        made = self._tokeniser.take(chunk)
        tokens, targets = made.tokens, made.targets
        tokenised = chunk.kind != ("input_ids",)
        self._tools.encoder.check_vocabulary("input_ids", tokens, place, tokenised)
        if settings.placeholders:
            beside_tokens.refuse_placeholders(tokens, settings.placeholders, place)
        labels, of_texts = self._labels.read(chunk, tokens)
        masks: list[np.ndarray | None] = [None] * len(chunk)
        if "loss_mask" in chunk.columns:
            masks = columns.boolean_lists("loss_mask", chunk.columns["loss_mask"], place)
            beside_tokens.check_lengths("loss_mask", masks, tokens, place)
        spans = beside_tokens.text_spans(
            chunk.rows, tokens, labels, place, settings.takes, settings.findings
        )
        skip = settings.empty == "skip"
        further, named = self._tools.further.read(chunk), self._kinds(chunk, made)
        for i, (ids_T, labels_T) in enumerate(zip(tokens, labels, strict=True)):
            span = None if spans is None else spans[i]
            if skip and (made.blank[i] or not len(ids_T if span is None else ids_T[span])):
                settings.findings.empty_examples += 1
                continue
            targets_T = _both(masks[i], targets[i])
            if labels_T is not None and (labels_T == NOT_A_TARGET).any():
                targets_T = _both(targets_T, labels_T != NOT_A_TARGET)
            own, id = labels_T if of_texts[i] is None else of_texts[i], chunk.ids[i]
            example = Example(
                0, id, ids_T.astype(np.int32), None, own, targets_T, further[i], named[i]
            )
            if span is not None:
                example = piece(example, id, span.start, span.stop)
            if not example.length:
                raise UserError(
                    place(i),
                    "at least one token",
                    "none" if not len(ids_T) else "none but padding",
                    "Leave out empty examples, or give --empty skip.",
                )
            for fitting in self._tools.lengths.fit(example, chunk, i):
                yield self._hidden(fitting)

    def _hidden(self, example: Example) -> Example:
        """An example of a masked language model, where its labels do not say what is hidden."""
        if self._settings.reads != "masked" or example.labels is not None:
            return example
        assert example.input_ids is not None
        shown_T, labels_T = self._masking.hide(example.id, example.input_ids)
        targets_T = labels_T != NOT_A_TARGET
        return replace(
            example, input_ids=shown_T, labels=labels_T,
            loss_mask=_both(example.loss_mask, targets_T),
        )  # fmt: skip

    @cached_property
    def _masking(self) -> Masking:
        if self._settings.masking is None:
            raise UserError(
                "data", "a tokenizer, which says what stands for a hidden token, or `labels`",
                "neither", "Give --tokenizer DIR, or `input_ids` in which tokens are hidden, with "
                f"their `labels` ({NOT_A_TARGET} for all others).",
            )  # fmt: skip
        masking = self._settings.masking()
        self._settings.findings.masking = masking.recorded()
        return masking

    def _kinds(self, chunk: Chunk, made: Tokenised) -> Sequence[dict[str, np.ndarray]]:
        """Of each row what its tokens are of, first or second text, where the model takes it and
        data or tokenizer say it."""
        name, there = _KINDS_OF_TOKENS, _KINDS_OF_TOKENS in chunk.columns
        if name not in self._settings.takes:
            return [{} for _ in made.tokens]
        kinds: Sequence[np.ndarray] = ()
        if chunk.kind == TWO_TEXTS or any(own.any() for own in made.kinds):
            kinds = made.kinds  # of one text usually zeros, which a model has without them
        if there:
            lists = columns.integer_lists(name, chunk.columns[name], chunk.place)
            beside_tokens.check_lengths(name, lists, made.tokens, chunk.place)
            kinds = [own for own in lists if own is not None]
        usual = bool(kinds) if self._kinds_there is None else self._kinds_there
        if len(kinds) != usual * len(chunk):
            raise UserError(
                chunk.place(0), f"`{name}` in all examples or in none", "some",
                "Give every example its own.",
            )  # fmt: skip
        self._kinds_there = bool(kinds)
        return [{name: own} for own in kinds] if kinds else [{} for _ in made.tokens]


def _both(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    """What both masks leave, ``None`` being a mask that leaves all."""
    if a is None or b is None:
        return b if a is None else a
    both: np.ndarray = a & b
    return both
