"""Texts as tokens of the model's vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TypeVar

import numpy as np

from raycurv.data.bounds import TEXT_BYTES, TOKENISED_BYTES, chunks
from raycurv.data.columns import Place
from raycurv.data.examples import NOT_A_TARGET, VOCABULARY_LIMIT
from raycurv.data.making.reader_settings import ReaderSettings
from raycurv.data.tokenizer import Tokenizer, affixes
from raycurv.errors import UserError, user_errors

T = TypeVar("T")


class Encoder:
    """Makes tokens of texts, a bounded number of them at a time, and checks token ids."""

    def __init__(self, settings: ReaderSettings) -> None:
        self._settings = settings

    @property
    def whole_texts(self) -> bool:
        """Whether texts are taken as a whole, special tokens and all."""
        return self._settings.whole_texts

    def encode(
        self,
        name: str,
        texts: Sequence[str],
        place: Place,
        special: bool = True,
        written: bool = False,
    ) -> list[np.ndarray]:
        """The token ids of texts, int64.

        Args:
            name: of their column.
            special: with the tokenizer's special tokens, which texts that are taken as a whole have
                in any case.
            written: the texts have all special tokens in them, as a chat template writes them.

        Raises:
            UserError: no tokenizer; a text that is too large, or that it does not take.
        """
        if self.whole_texts and not written:
            return self.encode_whole(name, texts, None, place)[0]
        take = self.tokenizer(name).encode
        found = self._in_groups(
            name, [texts], place, lambda some: take(some, special=special and not written)
        )
        return [np.array(ids, np.int64) for group in found for ids in group]

    def encode_targets(self, name: str, texts: Sequence[str], place: Place) -> list[np.ndarray]:
        """As :meth:`encode`, of what a model is to make of a source."""
        found = self._in_groups(name, [texts], place, self.tokenizer(name).encode_targets)
        return [np.array(ids, np.int64) for group in found for ids in group]

    def encode_whole(
        self, name: str, texts: Sequence[str], second: Sequence[str] | None, place: Place
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """As :meth:`encode`, of texts that are taken as a whole, each with its ``second`` if there
        are any; and of each token which of both it is of, where the tokenizer says it."""
        settings, take = self._settings, self.tokenizer(name).encode_whole
        limit = settings.limit if settings.long == "truncate" else None
        given = [texts] if second is None else [texts, second]
        tokens: list[np.ndarray] = []
        kinds: list[np.ndarray] = []
        for found in self._in_groups(
            name, given, place, lambda some, other=None: take(some, other, limit)
        ):
            tokens += [np.array(ids, np.int64) for ids in found.ids]
            kinds += [np.array(own, np.int64) for own in found.kinds]
            settings.findings.truncated_examples += found.truncated
        return tokens, kinds

    def tokenizer(self, name: str) -> Tokenizer:
        """The tokenizer, for a column of texts; UserError if there is none."""
        if self._settings.tokenizer is None:
            raise UserError(
                "data",
                "a tokenizer, since the data is text",
                f"none beside the column `{name}`",
                "Give --tokenizer DIR, a model directory that has its tokenizer, or the data as "
                "`input_ids`.",
            )
        return self._settings.tokenizer

    @cached_property
    def affixes(self) -> tuple[list[int], list[int]]:
        """The special tokens that stand before and after a text."""
        return affixes(self.tokenizer("prompt"))

    def check_vocabulary(
        self,
        name: str,
        lists: Sequence[np.ndarray | None],
        place: Place,
        tokenised: bool = False,
    ) -> None:
        """Refuse token ids, or classes in ``labels``, that the model has not; UserError names the
        first.

        Args:
            lists: of each row; ``None`` where it has none.
            tokenised: whether they were made of texts.
        """
        settings = self._settings
        size = VOCABULARY_LIMIT if settings.vocab_size is None else settings.vocab_size
        classes = settings.classes if name == "labels" else None
        size = size if classes is None else classes
        present = [ids_T for ids_T in lists if ids_T is not None]
        flat = np.concatenate(present) if present else np.empty(0, np.int64)
        # One look at all rows, since nearly always all is well.
        if not flat.size or (flat.min() >= 0 and flat.max() < size):
            return
        for i, ids_T in enumerate(lists):
            if ids_T is None:
                continue
            wrong = (ids_T < 0) | (ids_T >= size)
            if name == "labels":
                wrong &= ids_T != NOT_A_TARGET
            if wrong.any():
                at = int(wrong.argmax())
                remedy = "Tokenise the data with the model's own tokenizer."
                if name == "input_ids" and tokenised:
                    remedy = "This is not the model's tokenizer: save the right one beside it."
                elif settings.vocab_size is None:
                    remedy = f"Correct `{name}`."
                also = f", or {NOT_A_TARGET} for no target" if name == "labels" else ""
                what = f"token ids from 0 to {size - 1} in `{name}` (a vocabulary of {size})"
                if classes is not None:
                    what = f"classes from 0 to {size - 1} in `{name}`"
                    remedy = "Correct the label, or give the model that class."
                raise UserError(
                    place(i),
                    f"{what}{also}",
                    f"{ids_T[at]} at position {at}",
                    remedy,
                )

    def _in_groups(
        self,
        name: str,
        columns: Sequence[Sequence[str]],
        place: Place,
        encode: Callable[..., T],
    ) -> Iterator[T]:
        """What the tokenizer makes of texts, or of each with its second, a group at a time."""
        sizes = np.zeros(len(columns[0]), np.int64)
        for texts in columns:
            sizes += np.array([len(text.encode()) for text in texts], np.int64)
        if sizes.max(initial=0) > TEXT_BYTES:
            at = int(sizes.argmax())
            raise UserError(
                place(at),
                f"a text of at most {TEXT_BYTES >> 20} MiB in `{name}`",
                f"{sizes[at]:,} bytes",
                "Write it as several examples, or tokenise it yourself and give `input_ids`: a "
                "tokenizer holds 100 to 300 bytes for each of a text.",
            )
        for start, stop in chunks(sizes, TOKENISED_BYTES):
            with user_errors(
                f"{place(start)} and the {stop - start - 1} after it",
                f"texts in `{name}` that the model's tokenizer takes",
                "Try it on them, or give `input_ids`.",
                Exception,  # tokenizers raise whatever they meet
            ):
                found = encode(*(texts[start:stop] for texts in columns))
            yield found
