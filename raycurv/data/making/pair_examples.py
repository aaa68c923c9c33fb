"""Examples of pairs: two texts that are compared, the better one first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from raycurv.data import beside_tokens, columns
from raycurv.data.conversations import as_python, is_conversation, refuse_json
from raycurv.data.examples import Example
from raycurv.data.making.chunk import Chunk
from raycurv.data.making.tools import Tools
from raycurv.errors import UserError


class PairExamples:
    """Makes examples of ``chosen`` and ``rejected``, with a ``prompt`` before both if there is
    one."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        # Whether a pair was met whose texts do not begin with its prompt.
        self._apart = False

    def make(self, chunk: Chunk) -> Iterator[Example]:
        """See :class:`raycurv.data.making.tools.Maker`."""
        what = "pairs, of which `chosen` is the better text"
        beside_tokens.refuse_beside(chunk.rows, chunk.place, what, ("labels", "loss_mask"))
        names = [name for name in chunk.kind if name != "prompt"]
        tokens = self._tokens(chunk, names)
        for name, own in zip(names, tokens, strict=True):
            self._tools.encoder.check_vocabulary(name, own, chunk.place)
        further, limit = self._tools.further.read(chunk), self._tools.settings.limit
        for i, id in enumerate(chunk.ids):
            texts_ST = [own[i] for own in tokens]
            empty = next((n for n, own in zip(names, texts_ST, strict=True) if not len(own)), None)
            if empty is not None:
                raise UserError(
                    chunk.place(i), f"at least one token in `{empty}`", "none",
                    "Leave out the pair.",
                )  # fmt: skip
            if self._tools.lengths.exceeded(max(map(len, texts_ST)), chunk.place(i)):
                texts_ST = [own[:limit] for own in texts_ST]
                self._tools.settings.findings.truncated_examples += 1
            self._tools.settings.findings.pairs_alike += np.array_equal(texts_ST[0], texts_ST[1])
            whole = np.concatenate(texts_ST).astype(np.int32)
            yield Example(
                0, id, whole, labels=np.array(0, np.int64), columns=further[i],
                sequences=tuple(map(len, texts_ST)),
            )  # fmt: skip

    def _tokens(self, chunk: Chunk, names: list[str]) -> list[list[np.ndarray]]:
        """Each row's token ids, a list for each of the two texts."""
        given, place = {name: chunk.columns[name] for name in chunk.kind}, chunk.place
        if is_conversation(*given.values()):
            asks = [name for name in chunk.kind if name not in names]
            talks = {name: [*map(_bare, as_python(column))] for name, column in given.items()}
            self._check_prompts(
                chunk,
                [
                    [talks[n][i][: len(asked)] == asked for n in names]
                    for i, asked in enumerate(talks.get("prompt", ())) if asked
                ],
            )  # fmt: skip
            return [self._tools.talks.take(chunk, [*asks, n], turns=False)[0] for n in names]
        if any(columns.is_text(column) for column in given.values()):
            texts = {name: columns.strings(name, column, place) for name, column in given.items()}
            for name, own in texts.items():
                refuse_json(name, own, place)
            before = texts.get("prompt", [""] * len(chunk))
            self._check_prompts(
                chunk,
                [[texts[n][i].startswith(b) for n in names] for i, b in enumerate(before) if b],
            )
            both = [[a + b for a, b in zip(before, texts[n], strict=True)] for n in names]
            return [
                self._tools.encoder.encode(n, own, place)
                for n, own in zip(names, both, strict=True)
            ]
        lists = {n: columns.present_integer_lists(n, column, place) for n, column in given.items()}
        heads = lists.get("prompt", [np.empty(0, np.int64)] * len(chunk))
        self._check_prompts(
            chunk,
            [
                [np.array_equal(lists[n][i][: len(b)], b) for n in names]
                for i, b in enumerate(heads) if len(b)
            ],
        )  # fmt: skip
        return [[np.concatenate(pair) for pair in zip(heads, lists[n], strict=True)] for n in names]

    def _check_prompts(self, chunk: Chunk, begins: list[list[bool]]) -> None:
        """Refuse prompts that stand in both texts already, where that is so of all pairs.

        Args:
            begins: of each pair with a prompt, whether either text begins with it.
        """
        self._apart |= not all(map(all, begins))
        if begins and not self._apart:
            raise UserError(
                chunk.place(0), "`chosen` and `rejected` that go on behind their `prompt`",
                "ones that begin with it, in every pair: it would stand there twice",
                "Leave the column `prompt` out, or cut it off `chosen` and `rejected`.",
            )  # fmt: skip


def _bare(messages: Any) -> list[Any]:
    """Messages without what they lack, which Arrow has as null."""
    return [
        {key: value for key, value in one.items() if value is not None}
        if isinstance(one, Mapping) else one
        for one in messages or ()
    ]  # fmt: skip
