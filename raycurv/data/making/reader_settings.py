"""How a source is read, for all that makes examples of its rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from raycurv.data.assistant_turns import LossOn
from raycurv.data.findings import Findings
from raycurv.data.images import Images
from raycurv.data.masking import Masking
from raycurv.data.sources import Source
from raycurv.data.tokenizer import Tokenizer
from raycurv.errors import UserError
from raycurv.mathematics.loss.objective import Reads

# Rows of an embedding that looks a model's inputs up, of whole numbers; None if none does.
LooksUp: TypeAlias = Callable[[np.ndarray], "int | None"]


@dataclass
class ReaderSettings:
    """What a model and an objective ask of the rows of a source, and what was found in them.

    Args:
        source: see ``raycurv.data.sources.open_parts``.
        tokenizer: for text.
        vocab_size: of the model; ``None`` for a model without token ids.
        max_positions: the longest example that the model takes, in tokens; ``None`` for any.
        loss_on: which turns of conversations carry the loss; ``None`` where nobody asks for it.
        max_length: the longest example wanted, in tokens.
        long: what to do with a longer one: ``error``, ``truncate`` (its end is cut off), or
            ``split`` (pieces ``id#0``, ``id#1``, ...).
        max_examples: read a sample of this many rows, drawn by ``seed`` and id alone, so that it
            does not depend on the data's order. A row that is then split counts once.
        token_inputs: whether the model takes tokens (``True``) or numbers (``False``); ``None``
            when not known.
        either: whether it may as well take the others: ``inputs`` of whole numbers, say, that its
            embedding looks up.
        per_token: whether the loss is one of tokens, so that there must be some.
        shift: how far a token that is a target stands behind what predicts it.
        reads: see :class:`raycurv.mathematics.loss.objective.Objective`.
        labels_of: whether ``labels`` (or ``label``) beside tokens are one for each ``text``, or one
            for each of its ``tokens``; ``None`` where their type tells: no list is one for a text.
        label_names: the numbers of the model's classes by their names.
        classes: how many classes there are; ``None`` where labels are no classes.
        labelled: whether each token must have a label; else tokens without any are their own.
        masking: makes what hides tokens, of data whose labels do not say which are hidden.
        takes: further inputs that the model's forward takes.
        placeholders: tokens in whose place a model of images and text, say, sees an image; ``None``
            for a model of text alone.
        whole_texts: whether a text has its tokenizer's special tokens even where it is truncated.
        looks_up: gives the rows of the embedding that looks the inputs up, for the first example's.
        empty: what to do with a row of no token: ``error``, or ``skip``, which also leaves out a
            text of no character. The other rows keep their ids; ``max_examples`` counts it.
        further: columns besides, each of text or of numbers of one shape, that every example must
            have. A truncated example keeps what it has there, and each piece of a split one.
        images: for images, which a model of images takes.
        findings: what was met so far and not taken as it stands.

    Raises:
        UserError: a limit that is none.
    """

    source: Source
    tokenizer: Tokenizer | None
    vocab_size: int | None
    max_positions: int | None
    loss_on: LossOn | None = "assistant"
    max_length: int | None = None
    long: Literal["error", "truncate", "split"] = "error"
    max_examples: int | None = None
    seed: int = 0
    token_inputs: bool | None = None
    either: bool = False
    per_token: bool = False
    shift: int = 1
    reads: Reads = "texts"
    labels_of: Literal["text", "tokens"] | None = None
    label_names: Mapping[str, int] = field(default_factory=dict)
    classes: int | None = None
    labelled: bool = False
    masking: Callable[[], Masking] | None = None
    takes: Collection[str] = ()
    placeholders: Collection[int] | None = None
    whole_texts: bool = False
    looks_up: LooksUp | None = None
    empty: Literal["error", "skip"] = "error"
    further: Sequence[str] = ()
    images: Images | None = None
    findings: Findings = field(default_factory=Findings)

    def __post_init__(self) -> None:
        limits = {"--max-length": self.max_length, "--max-examples": self.max_examples}
        for flag, value in limits.items():
            if value is not None and value < 1:
                remedy = "Leave it out for no limit."
                raise UserError(flag, "a number from 1 on", str(value), remedy)
        if self.long not in ("error", "truncate", "split"):
            got = repr(self.long)
            raise UserError("--long", "error, truncate or split", got, "Choose one of them.")
        if self.long == "split" and self.taken_whole:
            raise UserError(
                "--long split", "error or truncate, of texts that are taken as a whole",
                "split", "Choose one of them.",
            )  # fmt: skip

    @property
    def taken_whole(self) -> bool:
        """Whether an example cannot be cut into pieces."""
        one_label = self.labels_of == "text" and self.whole_texts
        return self.reads in ("pairs", "sources") or one_label

    @property
    def limit(self) -> int | None:
        """Tokens of the longest text that is taken."""
        limits = [limit for limit in (self.max_length, self.max_positions) if limit is not None]
        return min(limits, default=None)
