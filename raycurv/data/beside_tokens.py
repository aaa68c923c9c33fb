"""Columns beside ``input_ids`` that say how a model is to take them: followed, or refused.

    attention_mask    padding at either end is cut off: padded and unpadded data are the same
    position_ids      only 0, 1, 2, ...
    token_type_ids    given to a classifier or an encoder that takes them; else only zeros, which is
                      what a model has without them
    others            that would change what a model computes: refused by name

Padding on the left is cut off like that on the right: the text is the same text, and its positions
begin with 0, as ``generate`` of Hugging Face's counts them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from raycurv.data import columns
from raycurv.data.examples import NOT_A_TARGET
from raycurv.data.findings import Findings
from raycurv.data.rows import Rows
from raycurv.errors import UserError

# Looked at beside tokens; not of text, which raycurv tokenises itself.
READ = ("attention_mask", "position_ids", "token_type_ids")
# Never looked at: what to do about them.
_LOSS = "Rename it to `loss_mask`, whose zeros leave tokens out of the loss, or leave it out."
_PACKED = "Give each sequence as an example of its own, or leave the column out."
_INPUT = "Only token ids go into the model: leave the column out if they are all that it needs."
_BESIDE_NUMBERS = (
    "Only `inputs` go into the model, padding and all: leave the column out if that is what it "
    "takes, or give tokens as `input_ids`, of which padding is cut off."
)
REFUSED = {
    # Beside `inputs` of numbers; beside tokens they are read.
    **dict.fromkeys(READ, _BESIDE_NUMBERS),
    "completion_mask": _LOSS,
    "assistant_masks": _LOSS,
    "seq_lengths": _PACKED,
    "cu_seqlens": _PACKED,
    "cu_seq_lens_q": _PACKED,
    "cu_seq_lens_k": _PACKED,
    "seq_idx": _PACKED,
    "inputs_embeds": _INPUT,
    "pixel_values": _INPUT,
    "input_features": _INPUT,
    "input_values": _INPUT,
    "decoder_input_ids": _INPUT,
    "decoder_attention_mask": _INPUT,
    "encoder_hidden_states": _INPUT,
}

# What a model of images and text, say, would be given beside its text.
_SEEN = (
    "image", "images", "pixel_values", "image_grid_thw", "video", "videos", "pixel_values_videos",
    "audio", "audios", "input_features", "input_values",
)  # fmt: skip


def refuse_images(rows: Rows) -> None:
    """Refuse images and the like, of a model that would look at them.

    Raises:
        UserError: names the first column of them.
    """
    for name in _SEEN:
        if name in rows.others:
            raise UserError(
                rows.location,
                "texts alone, which are all that the model is given here",
                f"`{name}`",
                "Leave the column out where the texts are meant without it; else give the model as "
                "package.module:factory, which takes `inputs` of any shape.",
            )


def refuse_placeholders(
    tokens: list[np.ndarray], placeholders: Collection[int], place: columns.Place
) -> None:
    """Refuse tokens that stand for an image or the like, which is not there.

    Args:
        tokens: of every row.
        placeholders: these tokens.
        place: where a row is, by its number.

    Raises:
        UserError: names the first row with one.
    """
    for i, ids_T in enumerate(tokens):
        found = np.isin(ids_T, list(placeholders))
        if found.any():
            at = int(found.argmax())
            raise UserError(
                place(i),
                "texts alone, which are all that the model is given here",
                f"token {ids_T[at]} at position {at}, in whose place it sees an image or the like",
                "Leave the example out, or the token where the text is meant without it.",
            )


def refuse_others(rows: Rows) -> None:
    """Refuse columns that would change what a model makes of the tokens, or numbers.

    Raises:
        UserError: names the first of them.
    """
    for name, remedy in REFUSED.items():
        if name in rows.others:
            raise UserError(
                rows.location,
                "columns beside the inputs that raycurv follows, or that change nothing",
                f"`{name}`",
                remedy,
            )


def text_spans(
    rows: Rows,
    tokens: list[np.ndarray],
    labels: Sequence[np.ndarray | None],
    place: columns.Place,
    takes: Collection[str],
    findings: Findings,
) -> list[slice] | None:
    """What of each row is text and no padding; ``None`` where nothing is said of it.

    Args:
        tokens: of each row.
        labels: of its tokens; ``None`` where it has none.
        takes: further inputs that the model's forward takes.
        findings: counts what is cut off.

    Raises:
        UserError: a mask with gaps, or positions that are not those of the text.
    """
    name = "attention_mask"
    if not rows.columns.keys() & set(READ):
        return None
    spans = [slice(0, len(ids_T)) for ids_T in tokens]
    if name in rows.columns:
        masks = columns.boolean_lists(name, rows.columns[name], place)
        check_lengths(name, masks, tokens, place)
        for i, mask_T in enumerate(masks):
            if mask_T is None or mask_T.all():
                continue
            spans[i] = _text_span(mask_T, place(i))
            findings.padded_examples += 1
            findings.padding_tokens += int(np.count_nonzero(~mask_T))
            labels_T = labels[i]
            if labels_T is not None:
                targets = (labels_T != NOT_A_TARGET) & ~mask_T
                findings.targets_at_padding += int(np.count_nonzero(targets))
    _check_positions(rows, tokens, spans, place, takes)
    return spans


def _text_span(mask_T: np.ndarray, where: str) -> slice:
    """Which positions an attention mask leaves, ``[T]`` bool: a run without a gap.

    Raises:
        UserError: tokens within the text are masked.
    """
    tokens = int(np.count_nonzero(mask_T))
    first = int(mask_T.argmax()) if tokens else 0
    span = slice(first, first + tokens)
    if not mask_T[span].all():
        gap = first + int((~mask_T[first:]).argmax())
        raise UserError(
            where,
            "an `attention_mask` of zeros at the ends only, where the padding is",
            f"0 at position {gap}, and tokens behind it",
            "Leave masked tokens out of `input_ids`, or correct the mask; to leave tokens out of "
            "the loss alone give a `loss_mask`.",
        )
    return span


def _check_positions(
    rows: Rows,
    tokens: list[np.ndarray],
    spans: list[slice],
    place: columns.Place,
    takes: Collection[str],
) -> None:
    """Refuse positions and kinds of tokens that are not those that a model has without them.

    Args:
        takes: those that the model is given.
        tokens: of every row, with its padding.
        spans: what of every row is text.

    Raises:
        UserError: names the row and the first wrong entry.
    """
    for name in READ[1:]:
        if name not in rows.columns or name in takes:
            continue
        for i, values_T in enumerate(columns.integer_lists(name, rows.columns[name], place)):
            if values_T is None:
                continue
            _check_length(name, values_T, len(tokens[i]), place(i))
            text_T = values_T[spans[i]]
            ordered = name == "position_ids"
            wrong = text_T != (np.arange(len(text_T)) if ordered else 0)
            if wrong.any():
                at = int(wrong.argmax())
                raise UserError(
                    place(i),
                    f"`{name}` of {'0, 1, 2, ... over the text' if ordered else 'zeros'}, "
                    "or none",
                    f"{text_T[at]} at token {at}",
                    "Give each sequence as an example of its own." if ordered
                    else "Leave the column out, if the model was trained without.",
                )  # fmt: skip


def refuse_beside(rows: Rows, place: columns.Place, what: str, names: Sequence[str]) -> None:
    """Refuse columns that would say something else of examples that have a term each.

    Args:
        what: the examples, in words.

    Raises:
        UserError: names the first of the columns.
    """
    for name in names:
        if name in rows.columns:
            raise UserError(
                place(0), f"{what}, all of which count", f"`{name}` beside them",
                "Leave the column out, and the examples that are not meant.",
            )  # fmt: skip


def check_lengths(
    name: str,
    lists: Sequence[np.ndarray | None],
    tokens: Sequence[np.ndarray],
    place: columns.Place,
) -> None:
    """Refuse lists that have not one entry a token; ``None`` where a row has none."""
    for i, (values_T, ids_T) in enumerate(zip(lists, tokens, strict=True)):
        if values_T is not None:
            _check_length(name, values_T, len(ids_T), place(i))


def _check_length(name: str, values_T: np.ndarray, tokens: int, where: str) -> None:
    if len(values_T) != tokens:
        raise UserError(
            where,
            f"`{name}` of {tokens} entries, one a token",
            f"{len(values_T)}",
            f"Align `{name}` with the tokens: entry t speaks of token t (no shift); beside "
            "text, the tokenizer's special tokens count too.",
        )
