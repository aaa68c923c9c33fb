"""Examples of targets, each with the source that a model is to make it of."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from raycurv.data import beside_tokens, columns
from raycurv.data.examples import NOT_A_TARGET, Example
from raycurv.data.making.chunk import Chunk
from raycurv.data.making.input_columns import SOURCES
from raycurv.data.making.tools import Tools
from raycurv.errors import UserError


class TargetExamples:
    """Makes examples of ``input_ids`` and ``labels``, or of two texts, each tokenised with the
    special tokens of its side."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def make(self, chunk: Chunk) -> Iterator[Example]:
        """See :class:`raycurv.data.making.tools.Maker`."""
        settings, encoder, place = self._tools.settings, self._tools.encoder, chunk.place
        if "loss_mask" in chunk.columns:
            raise UserError(
                place(0), f"`labels` of {NOT_A_TARGET} where a token of a target does not count",
                "`loss_mask`", "Leave the column out, or write it into `labels`.",
            )  # fmt: skip
        given = [(name, chunk.columns[name]) for name in chunk.kind]
        spans: list[slice] | None = None
        if chunk.kind == SOURCES[0]:
            sources, targets = (columns.present_integer_lists(*one, place) for one in given)
            spans = beside_tokens.text_spans(
                chunk.rows, sources, [None] * len(chunk), place, settings.takes, settings.findings
            )
        else:
            texts = [columns.strings(*one, place) for one in given]
            sources = encoder.encode(chunk.kind[0], texts[0], place)
            targets = encoder.encode_targets(chunk.kind[1], texts[1], place)
        tokenised = chunk.kind != SOURCES[0]
        encoder.check_vocabulary("input_ids", sources, place, tokenised)
        encoder.check_vocabulary("labels", targets, place)
        further, limit = self._tools.further.read(chunk), settings.limit
        for i, (source_R, labels_T) in enumerate(zip(sources, targets, strict=True)):
            source_R = source_R if spans is None else source_R[spans[i]]
            counts = np.flatnonzero(labels_T != NOT_A_TARGET)
            # Behind the last target there is padding alone.
            labels_T = labels_T[: counts[-1] + 1 if len(counts) else 0]
            if not len(source_R) or not len(labels_T):
                if settings.empty == "skip":
                    settings.findings.empty_examples += 1
                    continue
                name = chunk.kind[bool(len(source_R))]
                raise UserError(
                    place(i), f"at least one token in `{name}`", "none",
                    "Leave out empty examples, or give --empty skip.",
                )  # fmt: skip
            if self._tools.lengths.exceeded(max(len(source_R), len(labels_T)), place(i)):
                source_R, labels_T = source_R[:limit], labels_T[:limit]
                settings.findings.truncated_examples += 1
                settings.findings.targets_cut_off += not (labels_T != NOT_A_TARGET).any()
            own = labels_T != NOT_A_TARGET
            yield Example(
                0, chunk.ids[i], np.where(own, labels_T, 0).astype(np.int32),
                loss_mask=None if own.all() else own, columns=further[i],
                source=source_R.astype(np.int32),
            )  # fmt: skip
