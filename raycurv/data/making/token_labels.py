"""Labels beside tokens: one for each token, or one for the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from raycurv.data import beside_tokens, columns
from raycurv.data.examples import NOT_A_TARGET
from raycurv.data.labels import NAMES
from raycurv.data.making.chunk import Chunk
from raycurv.data.making.tools import Tools
from raycurv.errors import UserError

# So many labels that all equal the next token are no chance; nor are so many hidden tokens that
# are all shown, of which one in ten is.
_SHIFTED, _SHOWN = 4, 10
Labelled: TypeAlias = "list[np.ndarray | None]"


class TokenLabels:
    """Reads what the data says of tokens as targets, or of texts."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def read(self, chunk: Chunk, tokens: list[np.ndarray]) -> tuple[Labelled, Labelled]:
        """The labels of each row's tokens, ``[T]``, and those of each row as a whole; ``None``
        where it has none.

        Raises:
            UserError: they are not as many as the tokens, no labels of the model, or missing.
        """
        settings, place = self._tools.settings, chunk.place
        nothing: Labelled = [None] * len(chunk)
        if self._of_texts(chunk):
            what = "texts with a label each"
            beside_tokens.refuse_beside(chunk.rows, place, what, ("loss_mask",))
            return nothing, self._whole(chunk)
        if "labels" not in chunk.columns:
            if settings.labelled:
                raise _no_classes(place(0))
            return nothing, nothing
        labels = self._of_tokens(chunk)
        beside_tokens.check_lengths("labels", labels, tokens, place)
        self._tools.encoder.check_vocabulary("labels", labels, place)
        if settings.per_token and settings.shift:
            _refuse_shifted(labels, tokens, place)
        if settings.reads == "masked":
            _refuse_shown(labels, tokens, place)
        return labels, nothing

    def _of_texts(self, chunk: Chunk) -> bool:
        """Whether labels are of whole texts: always, or since they are no lists."""
        settings = self._tools.settings
        found = next((name for name in NAMES if name in chunk.columns), None)
        if settings.per_token or settings.labels_of is not None or found is None:
            return settings.labels_of == "text"
        kind = chunk.columns[found].type
        return not (pa.types.is_list(kind) or pa.types.is_large_list(kind))

    def _whole(self, chunk: Chunk) -> Labelled:
        labels = self._tools.labels.read(chunk.rows, chunk.place)
        if labels is None:
            return [None] * len(chunk)
        # One row for all tokens, where a label is a list.
        return [np.array(one if one.ndim == 0 else one[None]) for one in labels]

    def _of_tokens(self, chunk: Chunk) -> Labelled:
        column, place = chunk.columns["labels"], chunk.place
        if pa.types.is_integer(column.type):
            raise UserError(
                place(0),
                "lists of whole numbers in `labels`, one a token",
                f"one whole number a row ({column.type})",
                "Rename the column if it is no label of tokens: these are their own labels."
                if self._tools.settings.shift else "Give a list of labels, one a token.",
            )  # fmt: skip
        listed = self._tools.labels.listed("labels", column, place)
        found = columns.integer_lists("labels", listed, place)
        if self._tools.settings.labelled:
            for i, one in enumerate(found):
                if one is None:
                    raise _no_classes(place(i))
                self._tools.labels.met.update(np.unique(one).tolist())
        return found


def _no_classes(where: str) -> UserError:
    return UserError(
        where, "a label of each token", "none",
        f"Add a column `labels`, with {NOT_A_TARGET} where a token has none.",
    )  # fmt: skip


def _refuse_shifted(
    labels: Sequence[np.ndarray | None], tokens: Sequence[np.ndarray], place: columns.Place
) -> None:
    """Refuse labels of which each is the token after its own: those would be shifted twice."""
    for i, (labels_T, ids_T) in enumerate(zip(labels, tokens, strict=True)):
        if labels_T is None:
            continue
        targets = labels_T[:-1] != NOT_A_TARGET
        shifted = labels_T[:-1] == ids_T[1:]
        if np.count_nonzero(targets) >= _SHIFTED and shifted[targets].all():
            if (labels_T[:-1] == ids_T[:-1])[targets].all():
                continue  # one and the same token all along
            raise UserError(
                place(i),
                "`labels[t]` of token t itself, which the position before it predicts",
                "labels of which each is the token after: shifted already",
                "Leave the column out where all tokens are targets; else move the labels one "
                "position to the right, with -100 for the first.",
            )


def _refuse_shown(
    labels: Sequence[np.ndarray | None], tokens: Sequence[np.ndarray], place: columns.Place
) -> None:
    """Refuse labels of which each is the token that is shown: nothing is hidden."""
    for i, (labels_T, ids_T) in enumerate(zip(labels, tokens, strict=True)):
        if labels_T is None:
            continue
        own, targets = labels_T, labels_T != NOT_A_TARGET
        if np.count_nonzero(targets) >= _SHOWN and np.array_equal(own[targets], ids_T[targets]):
            raise UserError(
                place(i),
                "`labels` of hidden tokens, which `input_ids` does not show",
                "labels that all equal the tokens",
                "Leave the column out, so that the tokens to hide are drawn; or hide them, with "
                f"{NOT_A_TARGET} as the label of all others.",
            )
