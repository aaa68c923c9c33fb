"""Rows of a source -> examples: read in its order, checked, sampled, made and numbered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from raycurv.data import beside_tokens, columns
from raycurv.data.digests import Digests, Smallest
from raycurv.data.examples import Example
from raycurv.data.labels import NAMES, Labels
from raycurv.data.making.chunk import Chunk
from raycurv.data.making.conversation_tokens import ConversationTokens
from raycurv.data.making.encoder import Encoder
from raycurv.data.making.further import FurtherColumns
from raycurv.data.making.input_columns import IMAGES, SOURCES, InputColumns
from raycurv.data.making.lengths import Lengths
from raycurv.data.making.number_examples import NumberExamples
from raycurv.data.making.pair_examples import PairExamples
from raycurv.data.making.reader_settings import ReaderSettings
from raycurv.data.making.target_examples import TargetExamples
from raycurv.data.making.token_examples import TokenExamples
from raycurv.data.making.tools import Maker, Tools
from raycurv.data.parts import Part
from raycurv.data.portion import Selection
from raycurv.data.rows import Rows
from raycurv.data.sources import find_parts
from raycurv.errors import UserError, counted, user_errors

# What a file of a stranger's can raise in the libraries that read it.
DATA_ERRORS = (
    pa.ArrowException, OSError, MemoryError, RecursionError, ArithmeticError, ValueError,
)  # fmt: skip
# What makes examples of tokens and texts, by what an objective reads; else TokenExamples.
_OF_TOKENS: dict[str, Callable[[Tools], Maker]] = {
    "pairs": PairExamples, "sources": TargetExamples,
}  # fmt: skip


@dataclass
class ExampleReader(ReaderSettings):
    """Reads, tokenises, checks and numbers the examples of a source, once, in its order.

    Streams: what stays in memory is one chunk of rows (bounds.py), and 16 bytes for every id.

    The columns are ``input_ids``; ``prompt`` and ``completion``; ``text``, for some models with a
    second one in ``text_pair``; or ``inputs``, of a model of images also ``pixel_values`` or
    ``image``: the first of these that is there. Of texts that are compared they are ``chosen`` and
    ``rejected``, of text or of token ids, with a ``prompt`` before both if there is one. Of sources
    and their targets they are ``input_ids`` and ``labels`` (-100 where a token is no target, and
    the decoder does not see it), ``prompt`` and ``completion``, or ``text`` and ``target``, each
    tokenised with the special tokens of its side; a limit of length is one of either. Optional are
    ``id`` (otherwise the path below the data's root and the 0-based row, ``sub/file.parquet:17``,
    and the row alone of a table in memory), ``labels`` and ``loss_mask``; beside ``input_ids`` also
    those of beside_tokens.py. A prompt and its completion
    are tokenised apart; the tokenizer's special tokens stand before the prompt and after the
    completion, and the targets are the completion's tokens with those after it, as they would be
    of a text. ``findings`` has what was left out.

    Raises:
        UserError: for settings and source, at once; for what is in it, when the examples come.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._seen = Digests()
        self.columns_read: set[str] = set()
        self._labels, self._inputs = Labels(self.label_names), InputColumns(self)
        encoder = Encoder(self)
        tools = Tools(
            self, encoder, ConversationTokens(self, encoder), Lengths(self, self._claim),
            self._labels, FurtherColumns(self.further),
        )  # fmt: skip
        self._of_numbers = NumberExamples(tools)
        self._of_tokens = _OF_TOKENS.get(self.reads, TokenExamples)(tools)
        found = find_parts(self.source)
        self.parts = found.parts
        self.findings.left_out_files = list(found.left_out)

    def examples(self) -> Iterator[Example]:
        sample = None if self.max_examples is None else self._sample(self.max_examples)
        index = first = 0
        for part, kind, rows in self._rows():
            count = len(rows.numbers)
            if sample is not None:
                begin, end = np.searchsorted(sample, [first, first + count])
                rows = rows.take(sample[begin:end] - first)
            first += count
            if not len(rows.numbers):
                continue
            with told(part):
                chunk = Chunk(kind, rows, ids_of(part, rows))
                if sample is None:
                    self._claim(chunk.ids, rows.place)
                maker = self._of_numbers if kind in IMAGES else self._of_tokens
                for example in maker.make(chunk):
                    yield example.numbered(index)
                    index += 1
        self._note_classes()
        if not index:
            files = counted(len(self.parts), "file")
            taken = self.source if isinstance(self.source, Selection) else Selection(self.source)
            where = str(taken.source) if isinstance(taken.source, (str, Path)) else "data"
            raise UserError(
                f"{where}, {taken.split}" if taken.split else where,
                "at least one example",
                "none in "
                + (files if self.parts[0].name else self.parts[0].location)
                + (f" but {left:,} empty ones" if (left := self.findings.empty_examples) else ""),
                "Check that the data is complete.",
            )

    def _rows(self) -> Iterator[tuple[Part, tuple[str, ...], Rows]]:
        """The rows of all parts, a chunk at a time, with the columns of their inputs."""
        for part in self.parts:
            with told(part):
                found = part.columns()
                if found is None:
                    continue
                kind = self._inputs.choose(part, found)
                others, optional = self._inputs.beside(kind)
                for name in (name for name in NAMES if name in found):
                    theirs = part.names.theirs.get(name, name)
                    self._labels.check_numbers(part.location, theirs, part.class_names(name))
                for rows in part.read((*kind, *others), optional):
                    if kind in (("input_ids",), SOURCES[0], *IMAGES):
                        beside_tokens.refuse_others(rows)
                    if self.placeholders is not None:
                        beside_tokens.refuse_images(rows)
                    self.findings.unused_columns |= rows.others
                    self.columns_read |= rows.columns.keys()
                    yield part, kind, rows

    def _named_rows(self) -> Iterator[tuple[Rows, list[str]]]:
        """Only what names the rows, for passes that need no more."""
        for part in self.parts:
            with told(part):
                if part.columns() is not None:
                    for rows in part.read((), ("id",)):
                        yield rows, ids_of(part, rows)

    def _sample(self, size: int) -> np.ndarray:
        """Which rows to read: those of the ``size`` smallest hashes, ascending."""
        smallest = Smallest(size)
        first = 0
        for rows, ids in self._named_rows():
            self._claim(ids, rows.place)
            smallest.add([f"{self.seed} {id}" for id in ids], first)
            first += len(ids)
        return smallest.numbers()

    def _claim(self, ids: Sequence[str], place: columns.Place) -> None:
        """Take ids for examples; UserError if one is taken already."""
        again = self._seen.add(ids)
        if again is not None:
            raise self._twice(ids[again], place(again))

    def _twice(self, id: str, place: str) -> UserError:
        # Only hashes were kept, so the first place is looked up again.
        places = (r.place(ids.index(id)) for r, ids in self._named_rows() if id in ids)
        first = next((one for one in places if one != place), "a piece of a split example")
        return UserError(
            f"example {id!r}",
            "an id of its own for every example",
            f"the same id in {first} and in {place}",
            "Make the ids unique, or leave out the column `id` to have the examples named after "
            "their files and rows.",
        )

    def _note_classes(self) -> None:
        """Note the classes that no example has; probabilities of classes say of none."""
        self.findings.classes_taken_as = sorted(self._labels.taken_as)
        if self.classes is None or not self._labels.met:
            return
        names = {number: name for name, number in self.label_names.items()}
        lacking = set(range(self.classes)) - self._labels.met
        self.findings.classes_lacking = [names.get(n, str(n)) for n in sorted(lacking)]


def ids_of(part: Part, rows: Rows) -> list[str]:
    """The ids of rows: their own, or where they stand."""
    prefix = f"{part.name}:" if part.name else ""
    if "id" not in rows.columns:
        return [f"{prefix}{number}" for number in rows.numbers.tolist()]
    own = columns.ids(rows.columns["id"], rows.place)
    return [
        f"{prefix}{number}" if id is None else id
        for id, number in zip(own, rows.numbers.tolist(), strict=True)
    ]


def told(part: Part) -> AbstractContextManager[None]:
    """Whatever a part's content makes libraries raise is a mistake in it."""
    return user_errors(
        part.location,
        "data that can be read",
        "Write the file again, with less in a row if it lacks memory.",
        *DATA_ERRORS,
    )
