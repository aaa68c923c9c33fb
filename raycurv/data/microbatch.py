"""Microbatches: which examples go together, and how they are packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from raycurv.batch import Batch, apart
from raycurv.data.examples import NOT_A_TARGET, Example
from raycurv.errors import UserError

Lengths: TypeAlias = "Sequence[int] | np.ndarray"


class Microbatches:
    """A plan: the example numbers of every microbatch, in 8 bytes an example and 8 a microbatch.

    Args:
        order: the numbers, one microbatch after the other, int64.
        starts: where in ``order`` each microbatch begins, and at last where it ends.
    """

    def __init__(self, order: np.ndarray, starts: np.ndarray) -> None:
        self._order, self._starts = order, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, microbatch: int) -> tuple[int, ...]:
        if not 0 <= microbatch < len(self):
            raise IndexError(f"microbatch {microbatch} of {len(self)}")
        return tuple(self.members(microbatch).tolist())

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return (self[m] for m in range(len(self)))

    @property
    def nbytes(self) -> int:
        return self._order.nbytes + self._starts.nbytes

    @property
    def sizes(self) -> np.ndarray:
        """Number of examples of each microbatch, int64 ``[microbatches]``."""
        return np.diff(self._starts)

    def members(self, microbatch: int) -> np.ndarray:
        """The example numbers of one microbatch, int64, in the order in which they are packed."""
        start, stop = self._starts[microbatch : microbatch + 2]
        return self._order[start:stop]

    def longest(self, lengths: Lengths) -> np.ndarray:
        """Tokens of the longest example of each microbatch, int64 ``[microbatches]``."""
        if not len(self):
            return np.empty(0, np.int64)
        return np.maximum.reduceat(np.asarray(lengths, np.int64)[self._order], self._starts[:-1])

    def only(self, numbers: Sequence[int] | np.ndarray) -> Microbatches:
        """The plan without the other examples; microbatches that become empty are left out."""
        kept = np.isin(self._order, np.asarray(numbers))
        left = np.concatenate([[0], np.cumsum(kept)])[self._starts]
        return Microbatches(self._order[kept], np.unique(left))


def plan_microbatches(
    lengths: Lengths,
    batch_tokens: int,
    window: int = 1024,
    numbers: np.ndarray | None = None,
) -> Microbatches:
    """Which examples go through the stages together.

    Within each window of consecutive examples those of like length share a microbatch, longest
    first, so that little is padding. The microbatches of a window stand together in the plan, so
    that no more than one window of examples need be held.

    Args:
        lengths: tokens of every example; 1 each without a token axis.
        batch_tokens: N * T_max of a microbatch, padding included. A single example that is longer
            gets a microbatch of its own.
        window: how many consecutive examples are sorted together.
        numbers: which examples; by default every number from 0 to ``len(lengths) - 1``.

    Returns:
        The example numbers of each microbatch; every one once.

    Raises:
        UserError: ``batch_tokens`` or ``window`` is below 1.
    """
    for flag, value in (("--batch-tokens", batch_tokens), ("window", window)):
        if value < 1:
            raise UserError(flag, "a number from 1 on", str(value), "Leave it out for the default.")
    tokens = np.asarray(lengths)
    order = np.arange(len(tokens)) if numbers is None else np.sort(numbers)
    edges = np.searchsorted(order, np.arange(0, len(tokens) + window, window)).tolist()
    starts: list[np.ndarray] = []
    for first, last in pairwise(edges):
        here = tokens[order[first:last]].astype(np.int64)
        longest_first = np.argsort(-here, kind="stable")
        order[first:last] = order[first:last][longest_first]
        sorted_ = here[longest_first].tolist()
        begins, at = [], 0
        while at < len(sorted_):
            begins.append(first + at)
            at += max(1, batch_tokens // max(1, sorted_[at]))
        starts.append(np.array(begins, np.int64))
    return Microbatches(order, np.concatenate([*starts, np.array([len(order)], np.int64)]))


def padding_share(lengths: Lengths, plan: Microbatches) -> float:
    """The share of a plan's positions that are padding, from 0 to 1; 0 for an empty plan."""
    padded = int((plan.sizes * plan.longest(lengths)).sum())
    real = int(np.asarray(lengths, np.int64).sum())
    return 1.0 - real / padded if padded else 0.0


def make_batch(
    index: int,
    examples: Sequence[Example],
    dtype: torch.dtype,
    drawn: Sequence[np.ndarray] | None = None,
) -> Batch:
    """Packs examples into one microbatch.

    Args:
        examples: all of tokens, or all of numbers of one shape; at least one; all of as many texts
            each.
        dtype: floating-point type of inputs and labels that are numbers.
        drawn: labels drawn from the model, per example ``[draws, T_n]`` where each token has one,
            otherwise ``[draws, ...]``; whole numbers become int64, others ``dtype``.

    Returns:
        Of tokens: padded on the right with 0, ``mask`` True at tokens. ``labels`` are ``None`` when
        no example has any (the tokens are their own targets); an example without labels among
        others that have them gets its tokens. ``loss_mask`` is ``None`` when no example has one and
        no label is -100; otherwise False at padding and at labels of -100, which become 0. Where
        examples have a label each, no mask of targets. Further inputs padded like the tokens.
        Of numbers: no masks; ``labels`` int64 ``[N]`` or ``dtype`` ``[N, ...]``.
        Of either: ``columns`` of numbers int64 or ``dtype`` ``[N, ...]``, of text lists.
    """
    assert examples, "a microbatch of no examples"
    ids = tuple(example.id for example in examples)
    if examples[0].input_ids is None:
        inputs = np.stack([_there(example.inputs) for example in examples])
        labels = None
        if examples[0].labels is not None:
            labels = _numbers(np.stack([_there(example.labels) for example in examples]), dtype)
        drawn_ = None if drawn is None else _numbers(np.stack(drawn, axis=1), dtype)
        whole = np.issubdtype(inputs.dtype, np.integer)
        values = torch.from_numpy(inputs).to(torch.int64 if whole else dtype)
        batch = Batch(index, ids, values, labels=labels, drawn=drawn_)
    else:
        batch = _token_batch(index, ids, examples, dtype, drawn)
    return replace(batch, columns={n: _column(n, examples, dtype) for n in examples[0].columns})


def _column(name: str, examples: Sequence[Example], dtype: torch.dtype) -> Tensor | list[str]:
    values: list[Any] = [example.columns[name] for example in examples]
    return values if isinstance(values[0], str) else _numbers(np.stack(values), dtype)


def _token_batch(
    index: int,
    ids: tuple[str, ...],
    examples: Sequence[Example],
    dtype: torch.dtype,
    drawn: Sequence[np.ndarray] | None,
) -> Batch:
    labels = [example.labels for example in examples]
    tokens = [_there(example.input_ids) for example in examples]
    named = {
        name: _padded(examples, [e.named[name] for e in examples]) for name in examples[0].named
    }
    if labels[0] is not None and labels[0].ndim != 1:
        inputs = _padded(examples, tokens)
        flat = np.stack([_there(one).reshape(-1) for one in labels])
        return Batch(
            index,
            ids,
            torch.from_numpy(inputs),
            mask=torch.from_numpy(_padded(examples, [np.ones(len(t), bool) for t in tokens])),
            labels=_numbers(flat if labels[0].ndim else flat[:, 0], dtype),
            drawn=None if drawn is None else _numbers(np.stack(drawn, axis=1), dtype),
            named=_tensors(named),
        )
    shape = (len(tokens), max(len(ids_T) for ids_T in tokens))
    inputs_NT = np.zeros(shape, np.int64)
    labels_NT = np.zeros(shape, np.int64)
    mask_NT = np.zeros(shape, bool)
    loss_mask_NT = np.zeros(shape, bool)
    for n, (example, ids_T) in enumerate(zip(examples, tokens, strict=True)):
        here = (n, slice(0, len(ids_T)))
        inputs_NT[here] = ids_T
        mask_NT[here] = True
        loss_mask_NT[here] = True if example.loss_mask is None else example.loss_mask
        labels_T = ids_T if example.labels is None else example.labels
        loss_mask_NT[here] &= labels_T != NOT_A_TARGET
        # A place that is no target still has to be one that a head can look up.
        labels_NT[here] = np.where(labels_T == NOT_A_TARGET, 0, labels_T)
    labelled = any(example.labels is not None for example in examples)
    masked = bool((loss_mask_NT != mask_NT).any()) or any(
        example.loss_mask is not None for example in examples
    )
    source = source_mask = None
    if examples[0].source is not None:
        own = [_there(example.source) for example in examples]
        there_NR = _padded(examples, [np.ones(len(ids_R), bool) for ids_R in own])
        source_NR = torch.from_numpy(_padded(examples, own))
        source, source_mask = apart(source_NR, torch.from_numpy(there_NR), shape[1])
    drawn_ = None
    if drawn is not None:
        drawn_ = _numbers(_stacked(drawn, [len(ids_T) for ids_T in tokens]), dtype)
    return Batch(
        index,
        ids,
        torch.from_numpy(inputs_NT),
        mask=torch.from_numpy(mask_NT),
        labels=torch.from_numpy(labels_NT) if labelled else None,
        loss_mask=torch.from_numpy(loss_mask_NT) if masked else None,
        drawn=drawn_,
        named=_tensors(named),
        source=source,
        source_mask=source_mask,
    )


def _padded(examples: Sequence[Example], values: Sequence[np.ndarray]) -> np.ndarray:
    """What each example has of each of its tokens as ``[N S, T]``, 0 (False) at padding."""
    rows: list[np.ndarray] = []
    for example, own in zip(examples, values, strict=True):
        rows += np.split(own, np.cumsum(example.sequences[:-1], dtype=np.int64))
    kind = bool if rows[0].dtype == bool else np.int64
    padded = np.zeros((len(rows), max(len(row) for row in rows)), kind)
    for n, row in enumerate(rows):
        padded[n, : len(row)] = row
    return padded


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _stacked(drawn: Sequence[np.ndarray], lengths: Sequence[int]) -> np.ndarray:
    """``[draws, N, T]`` where every example's labels are one a token, else ``[draws, N, ...]``."""
    by_token = all(y.shape[1:] == (t,) for y, t in zip(drawn, lengths, strict=True))
    if not by_token:
        return np.stack(drawn, axis=1)
    padded = np.zeros((len(drawn[0]), len(drawn), max(lengths)), np.result_type(*drawn))
    for n, y_KT in enumerate(drawn):
        padded[:, n, : lengths[n]] = y_KT
    return padded


def _there(array: np.ndarray | None) -> np.ndarray:
    assert array is not None, "examples of one microbatch must be of one kind"
    return array


def _numbers(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Whole numbers as int64, others in ``dtype``, but never coarser than float32."""
    if np.issubdtype(values.dtype, np.integer):
        return torch.from_numpy(values).to(torch.int64)
    return torch.from_numpy(values).to(torch.promote_types(dtype, torch.float32))
