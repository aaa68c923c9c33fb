"""Examples as a person looks at them: their text, and which of their tokens carry the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from raycurv.data.examples import Example, loss_terms

# Gives the texts of tokens, those together that are alike, each with what it is; see
# `LazyTokenizer.texts`. None at all where no tokenizer was needed.
Decode: TypeAlias = "Callable[[Sequence[int], Sequence[Any]], list[tuple[str, Any]]]"
# Of a long text so many characters at either end, and of many so many at either end.
_CHARACTERS, _RUNS = 300, 20


@dataclass(frozen=True)
class TokenRow:
    """A sequence of tokens.

    Attributes:
        name: which of several of an example's; empty for the only one.
        ids: ``[T]``.
        carries: which of them have a loss term, ``[T]`` bool.
    """

    name: str
    ids: np.ndarray
    carries: np.ndarray


def sequences_of(example: Example, shift: int) -> list[TokenRow]:
    """The sequences of an example's tokens; none of one of numbers.

    Args:
        shift: how far a target stands behind what predicts it: the first so many tokens have none.
    """
    ids_T = example.input_ids
    if ids_T is None:
        return []
    none_T = np.zeros(len(ids_T), bool)
    if example.sequences:
        ends = np.cumsum(example.sequences)[:-1]
        cut = zip(np.split(ids_T, ends), np.split(none_T, ends), strict=True)
        return [TokenRow(n, *own) for n, own in zip(("chosen", "rejected"), cut, strict=True)]
    if example.labels is not None and example.labels.ndim != 1:
        return [TokenRow("", ids_T, none_T)]
    carries_T = ~none_T if example.loss_mask is None else example.loss_mask.astype(bool)
    carries_T = carries_T & (np.arange(len(ids_T)) >= shift)
    if example.source is not None:
        before = TokenRow("source", example.source, np.zeros(len(example.source), bool))
        return [before, TokenRow("target", ids_T, carries_T)]
    return [TokenRow("", ids_T, carries_T)]


def recorded(example: Example, shift: int, decode: Decode | None) -> dict[str, Any]:
    """An example as JSON, a few thousand characters at most: ``id``, ``tokens``, ``targets``, and
    of each of its sequences ``loss``, ranges of tokens that carry it, and ``text``, pairs of a text
    and whether it does, as far as its tokens went through a tokenizer."""
    said: dict[str, Any] = {"id": example.id, "tokens": example.length}
    said["targets"] = loss_terms(example, shift)
    for own in sequences_of(example, shift):
        one: dict[str, Any] = {"loss": ranges(own.carries)[:_RUNS]}
        texts = [] if decode is None else decode(own.ids.tolist(), own.carries.tolist())
        if texts:
            one["text"] = [[elided(text, _CHARACTERS), carries] for text, carries in texts[:_RUNS]]
        said |= {own.name: one} if own.name else one
    return said


def ranges(carries_T: np.ndarray) -> list[list[int]]:
    """Where an array is true, as ``[begin, end)`` each."""
    steps = np.diff(np.concatenate([[0], carries_T.astype(np.int8), [0]]))
    begins, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    return [list(pair) for pair in zip(begins.tolist(), ends.tolist(), strict=True)]


def elided(text: str, most: int) -> str:
    """A text without its middle, where it has more than twice so many characters."""
    if len(text) <= 2 * most:
        return text
    return f"{text[:most]} … {len(text) - 2 * most:,} characters … {text[-most:]}"
