"""Rows of a source -> examples: tokenised, checked, cut to length, sampled and numbered."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa

from raycurv.data import beside_tokens, columns
from raycurv.data.bounds import TEXT_BYTES, TOKENISED_BYTES, chunks
from raycurv.data.conversations import COLUMNS as CONVERSATIONS
from raycurv.data.conversations import conversation
from raycurv.data.digests import Digests, Smallest
from raycurv.data.examples import NOT_A_TARGET, VOCABULARY_LIMIT, Example, loss_terms
from raycurv.data.findings import Findings
from raycurv.data.images import Images
from raycurv.data.labels import NAMES, Labels
from raycurv.data.masking import Masking
from raycurv.data.parts import Part, Rows
from raycurv.data.sources import Source, find_parts
from raycurv.data.tokenizer import Tokenizer, affixes
from raycurv.errors import UserError, user_errors
from raycurv.mathematics.loss.objective import Reads

# In order of preference; each with the columns that it takes.
TOKENS: tuple[tuple[str, ...], ...] = (("input_ids",), ("prompt", "completion"), ("text",))
# Of a text that is read together with another one, and of two that are compared.
TWO_TEXTS = ("text", "text_pair")
PAIRS: tuple[tuple[str, ...], ...] = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
# Of a source and the target that is made of it.
SOURCES = (("input_ids", "labels"), ("prompt", "completion"), ("text", "target"))
NUMBERS: tuple[tuple[str, ...], ...] = (("inputs",),)
# Of a model of images: numbers as well, or the bytes of files.
IMAGES: tuple[tuple[str, ...], ...] = (*NUMBERS, ("pixel_values",), ("image",))
# What a file of a stranger's can raise in the libraries that read it.
DATA_ERRORS = (
    pa.ArrowException, OSError, MemoryError, RecursionError, ArithmeticError, ValueError,
)  # fmt: skip
# So many labels that all equal the next token are no chance; nor are so many hidden tokens that
# are all shown, of which one in ten is.
_SHIFTED, _SHOWN = 4, 10
OPTIONAL_COLUMNS = ("id", "labels", "loss_mask")
_KINDS_OF_TOKENS = "token_type_ids"
# Rows of an embedding that looks a model's inputs up, of whole numbers; None if none does.
LooksUp: TypeAlias = Callable[[np.ndarray], "int | None"]


@dataclass
class ExampleReader:
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

    Args:
        source: see ``raycurv.data.sources.open_parts``.
        tokenizer: for text.
        images: for images, which a model of images takes.
        vocab_size: of the model; ``None`` for a model without token ids.
        max_positions: the longest example that the model takes, in tokens; ``None`` for any.
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

    Raises:
        UserError: for settings and source, at once; for what is in it, when the examples come.
    """

    source: Source
    tokenizer: Tokenizer | None
    vocab_size: int | None
    max_positions: int | None
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

    # What was met so far.
    findings: Findings = field(default_factory=Findings)
    # What the examples must agree on, as those that have been read have it.
    seen: Digests = field(default_factory=Digests)
    kind: tuple[str, ...] = ()
    shape: tuple[int, ...] | None = None
    labels: Labels = field(init=False)
    kinds_there: bool | None = None
    vocabulary: int | None = None
    """Rows of the embedding that looks ``inputs`` up; 0 if they are no more than numbers."""
    further_as: dict[str, np.ndarray | None] = field(default_factory=dict)
    """Of each further column the first value, if it is of numbers."""

    def __post_init__(self) -> None:
        limits = {"--max-length": self.max_length, "--max-examples": self.max_examples}
        for flag, value in limits.items():
            if value is not None and value < 1:
                remedy = "Leave it out for no limit."
                raise UserError(flag, "a number from 1 on", str(value), remedy)
        if self.long not in ("error", "truncate", "split"):
            got = repr(self.long)
            raise UserError("--long", "error, truncate or split", got, "Choose one of them.")
        if self.long == "split" and self._taken_whole():
            raise UserError(
                "--long split", "error or truncate, of texts that are taken as a whole",
                "split", "Choose one of them.",
            )  # fmt: skip
        self.labels = Labels(self.label_names)
        found = find_parts(self.source)
        self.parts = found.parts
        self.findings.left_out_files = list(found.left_out)

    def examples(self) -> Iterator[Example]:
        sample = None if self.max_examples is None else self._sample(self.max_examples)
        index = first = 0
        for part, rows in self._rows():
            count = len(rows.numbers)
            if sample is not None:
                begin, end = np.searchsorted(sample, [first, first + count])
                rows = rows.take(sample[begin:end] - first)
            first += count
            if not len(rows.numbers):
                continue
            with _told(part):
                ids = _ids(part, rows)
                if sample is None:
                    self._check_unique(ids, rows)
                make = self._of_numbers if self.kind in IMAGES else self._of_tokens
                if self.kind in PAIRS:
                    make = self._of_pairs
                if self.reads == "sources":
                    make = self._of_sources
                for example in make(rows, ids, _named(rows, ids)):
                    yield example.numbered(index)
                    index += 1
        self._note_classes()
        if not index:
            files = f"{len(self.parts)} file{'s' if len(self.parts) > 1 else ''}"
            raise UserError(
                str(self.source) if isinstance(self.source, (str, Path)) else "data",
                "at least one example",
                "none in "
                + (files if self.parts[0].name else self.parts[0].location)
                + (f" but {left:,} empty ones" if (left := self.findings.empty_examples) else ""),
                "Check that the data is complete.",
            )

    # Rows and their ids

    def _rows(self) -> Iterator[tuple[Part, Rows]]:
        for part in self.parts:
            with _told(part):
                found = part.columns()
                if found is None:
                    continue
                self.kind = self._kind(part, found)
                others = tuple(name for name in self.further if name not in self.kind)
                beside: tuple[str, ...] = ()
                if self.kind == TOKENS[0]:
                    beside = beside_tokens.READ
                if self.kind == SOURCES[0]:
                    beside = ("attention_mask",)
                optional = (*OPTIONAL_COLUMNS, *beside, *self._label_columns())
                for rows in part.read((*self.kind, *others), optional):
                    if self.kind in (("input_ids",), SOURCES[0], *IMAGES):
                        beside_tokens.refuse_others(rows)
                    if self.placeholders is not None:
                        beside_tokens.refuse_images(rows)
                    self.findings.unused_columns |= rows.others
                    yield part, rows

    def _kind(self, part: Part, found: Sequence[str]) -> tuple[str, ...]:
        """The columns of inputs that this part has, and the model takes."""
        usable = self._usable()
        kind = next((kind for kind in usable if set(kind) <= set(found)), None)
        if kind is None:
            talk = next((name for name in CONVERSATIONS if name in found), None)
            if talk is not None and any(kind in TOKENS for kind in usable):
                raise conversation(part.location, talk, part.message_keys(talk))
            model = {None: "", True: ", for a model of tokens", False: ", for a model of numbers"}
            what, remedy = model[None if self.either else self.token_inputs], ""
            if self.reads == "pairs":
                what = ", for --objective preference, which compares two texts"
                remedy = "; of texts with a number each as label give --objective regression"
            raise UserError(
                part.location,
                "a column " + " or ".join(" + ".join(f"`{c}`" for c in kind) for kind in usable)
                + what,
                "the columns " + _listed(found),
                f"Rename the column that holds the inputs{remedy}.",
            )  # fmt: skip
        if kind in IMAGES and "loss_mask" in found:
            raise UserError(
                part.location,
                "`loss_mask` beside tokens only",
                f"`loss_mask` beside `{kind[0]}`",
                "Leave out the column: numbers have no tokens to mask.",
            )
        if self.kind and (self.kind in IMAGES) != (kind in IMAGES):
            raise UserError(
                part.location,
                f"inputs like those of the files before it ({' + '.join(self.kind)})",
                " + ".join(kind),
                "Give tokens and numbers as data of their own.",
            )
        for name in self.further:
            if name not in found:
                raise UserError(
                    part.location,
                    f"a column `{name}`, which the objective reads",
                    "the columns " + _listed(found),
                    "Add it to the data, or choose another --objective.",
                )
        named = (*kind, *OPTIONAL_COLUMNS, *beside_tokens.READ, *self.further)
        twice = [name for name in named if list(found).count(name) > 1]
        if twice:
            wanted, remedy = f"one column `{twice[0]}`", "Rename all but one."
            raise UserError(part.location, wanted, "several", remedy)
        return kind

    def _usable(self) -> tuple[tuple[str, ...], ...]:
        """The columns of inputs that the model may take, in order of preference."""
        if self.images is not None:
            return IMAGES
        if self.reads in ("pairs", "sources"):
            return PAIRS if self.reads == "pairs" else SOURCES
        if self.whole_texts:
            return (TOKENS[0], TWO_TEXTS, TOKENS[2])
        if self.token_inputs is None:
            return (*TOKENS, *NUMBERS)
        if self.per_token and (self.token_inputs or self.either):
            return TOKENS
        first, second = (TOKENS, NUMBERS) if self.token_inputs else (NUMBERS, TOKENS)
        return (*first, *second) if self.either else first

    def _named_rows(self) -> Iterator[tuple[Rows, list[str]]]:
        """Only what names the rows, for passes that need no more."""
        for part in self.parts:
            with _told(part):
                if part.columns() is not None:
                    for rows in part.read((), ("id",)):
                        yield rows, _ids(part, rows)

    def _sample(self, size: int) -> np.ndarray:
        """Which rows to read: those of the ``size`` smallest hashes, ascending."""
        smallest = Smallest(size)
        first = 0
        for rows, ids in self._named_rows():
            self._check_unique(ids, rows)
            smallest.add([f"{self.seed} {id}" for id in ids], first)
            first += len(ids)
        return smallest.numbers()

    def _check_unique(self, ids: Sequence[str], rows: Rows) -> None:
        again = self.seen.add(ids)
        if again is not None:
            raise self._twice(ids[again], rows.place(again))

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

    # Tokens

    def _of_tokens(self, rows: Rows, ids: Sequence[str], place: columns.Place) -> Iterator[Example]:
        tokens, targets, blank = self._tokens(rows, place)
        self._check_vocabulary("input_ids", tokens, place)
        if self.placeholders:
            beside_tokens.refuse_placeholders(tokens, self.placeholders, place)
        nothing: list[np.ndarray | None] = [None] * len(ids)
        labels, masks, of_texts = nothing, nothing, nothing
        if self._of_texts(rows):
            self._refuse_beside(rows, place, "texts with a label each", ("loss_mask",))
            of_texts = self._text_labels(rows, place)
        elif "labels" in rows.columns:
            labels = self._token_labels(rows, place)
            self._check_lengths("labels", labels, tokens, place)
            self._check_vocabulary("labels", labels, place)
            if self.per_token and self.shift:
                _refuse_shifted(labels, tokens, place)
            if self.reads == "masked":
                _refuse_shown(labels, tokens, place)
        elif self.labelled:
            raise self._no_classes(place(0))
        if "loss_mask" in rows.columns:
            masks = columns.boolean_lists("loss_mask", rows.columns["loss_mask"], place)
            self._check_lengths("loss_mask", masks, tokens, place)
        spans, skip = self._spans(rows, tokens, labels, place), self.empty == "skip"
        further, named = self._further(rows, place), self._token_kinds(rows, tokens, place)
        for i, (ids_T, labels_T) in enumerate(zip(tokens, labels, strict=True)):
            span = None if spans is None else spans[i]
            if skip and (blank[i] or not len(ids_T if span is None else ids_T[span])):
                self.findings.empty_examples += 1
                continue
            targets_T = _both(masks[i], targets[i])
            if labels_T is not None and (labels_T == NOT_A_TARGET).any():
                targets_T = _both(targets_T, labels_T != NOT_A_TARGET)
            own = labels_T if of_texts[i] is None else of_texts[i]
            example = Example(
                0, ids[i], ids_T.astype(np.int32), None, own, targets_T, further[i], named[i]
            )
            if span is not None:
                example = _slice(example, ids[i], span.start, span.stop)
            if not example.length:
                raise UserError(
                    place(i),
                    "at least one token",
                    "none" if not len(ids_T) else "none but padding",
                    "Leave out empty examples, or give --empty skip.",
                )
            for fitting in self._fitted(example, i, rows, place):
                yield self._hidden(fitting)

    def _hidden(self, example: Example) -> Example:
        """An example of a masked language model, where its labels do not say what is hidden."""
        if self.reads != "masked" or example.labels is not None:
            return example
        shown_T, labels_T = self._masking.hide(example.id, _there(example.input_ids))
        targets_T = labels_T != NOT_A_TARGET
        return replace(
            example, input_ids=shown_T, labels=labels_T,
            loss_mask=_both(example.loss_mask, targets_T),
        )  # fmt: skip

    @cached_property
    def _masking(self) -> Masking:
        if self.masking is None:
            raise UserError(
                "data", "a tokenizer, which says what stands for a hidden token, or `labels`",
                "neither", "Give --tokenizer DIR, or `input_ids` in which tokens are hidden, with "
                f"their `labels` ({NOT_A_TARGET} for all others).",
            )  # fmt: skip
        masking = self.masking()
        self.findings.masking = masking.recorded()
        return masking

    def _of_pairs(self, rows: Rows, ids: Sequence[str], place: columns.Place) -> Iterator[Example]:
        """Examples of texts that are compared, the better one first."""
        what = "pairs, of which `chosen` is the better text"
        self._refuse_beside(rows, place, what, ("labels", "loss_mask"))
        names = [name for name in self.kind if name != "prompt"]
        given = {name: rows.columns[name] for name in self.kind}
        if any(columns.is_text(column) for column in given.values()):
            texts = {name: columns.strings(name, column, place) for name, column in given.items()}
            before = texts.get("prompt", [""] * len(ids))
            both = [[a + b for a, b in zip(before, texts[n], strict=True)] for n in names]
            tokens = [
                self._encoded(name, own, True, place) for name, own in zip(names, both, strict=True)
            ]
        else:
            lists = {
                name: [_there(one) for one in columns.integer_lists(name, column, place)]
                for name, column in given.items()
            }
            heads = lists.get("prompt", [np.empty(0, np.int64)] * len(ids))
            tokens = [
                [np.concatenate(pair) for pair in zip(heads, lists[name], strict=True)]
                for name in names
            ]
        for name, own in zip(names, tokens, strict=True):
            self._check_vocabulary(name, own, place)
        further = self._further(rows, place)
        for i, id in enumerate(ids):
            texts_ST = [own[i] for own in tokens]
            empty = next((n for n, own in zip(names, texts_ST, strict=True) if not len(own)), None)
            if empty is not None:
                raise UserError(
                    place(i), f"at least one token in `{empty}`", "none", "Leave out the pair."
                )
            limit = self._limit()
            if limit is not None and max(map(len, texts_ST)) > limit:
                if self.long == "error":
                    raise self._too_long(max(map(len, texts_ST)), place(i))
                texts_ST = [own[:limit] for own in texts_ST]
                self.findings.truncated_examples += 1
            whole = np.concatenate(texts_ST).astype(np.int32)
            yield Example(
                0, id, whole, labels=np.array(0, np.int64), columns=further[i],
                sequences=tuple(map(len, texts_ST)),
            )  # fmt: skip

    def _of_sources(
        self, rows: Rows, ids: Sequence[str], place: columns.Place
    ) -> Iterator[Example]:
        """Examples of targets, each with its source."""
        if "loss_mask" in rows.columns:
            raise UserError(
                place(0), f"`labels` of {NOT_A_TARGET} where a token of a target does not count",
                "`loss_mask`", "Leave the column out, or write it into `labels`.",
            )  # fmt: skip
        given = [rows.columns[name] for name in self.kind]
        spans: list[slice] | None = None
        if self.kind == SOURCES[0]:
            sources, targets = (
                [_there(one) for one in columns.integer_lists(name, column, place)]
                for name, column in zip(self.kind, given, strict=True)
            )
            spans = self._spans(rows, sources, [None] * len(ids), place)
        else:
            texts = [columns.strings(n, c, place) for n, c in zip(self.kind, given, strict=True)]
            sources = self._encoded(self.kind[0], texts[0], True, place)
            targets = self._encoded(self.kind[1], texts[1], True, place, target=True)
        self._check_vocabulary("input_ids", sources, place)
        self._check_vocabulary("labels", targets, place)
        further, limit = self._further(rows, place), self._limit()
        for i, (source_R, labels_T) in enumerate(zip(sources, targets, strict=True)):
            source_R = source_R if spans is None else source_R[spans[i]]
            counts = np.flatnonzero(labels_T != NOT_A_TARGET)
            # Behind the last target there is padding alone.
            labels_T = labels_T[: counts[-1] + 1 if len(counts) else 0]
            if not len(source_R) or not len(labels_T):
                if self.empty == "skip":
                    self.findings.empty_examples += 1
                    continue
                name = self.kind[bool(len(source_R))]
                raise UserError(
                    place(i), f"at least one token in `{name}`", "none",
                    "Leave out empty examples, or give --empty skip.",
                )  # fmt: skip
            longest = max(len(source_R), len(labels_T))
            if limit is not None and longest > limit:
                if self.long == "error":
                    raise self._too_long(longest, place(i))
                source_R, labels_T = source_R[:limit], labels_T[:limit]
                self.findings.truncated_examples += 1
                self.findings.targets_cut_off += not (labels_T != NOT_A_TARGET).any()
            own = labels_T != NOT_A_TARGET
            yield Example(
                0, ids[i], np.where(own, labels_T, 0).astype(np.int32),
                loss_mask=None if own.all() else own, columns=further[i],
                source=source_R.astype(np.int32),
            )  # fmt: skip

    def _refuse_beside(
        self, rows: Rows, place: columns.Place, what: str, names: Sequence[str]
    ) -> None:
        """Refuse columns that would say something else of examples that have a term each."""
        for name in names:
            if name in rows.columns:
                raise UserError(
                    place(0), f"{what}, all of which count", f"`{name}` beside them",
                    "Leave the column out, and the examples that are not meant.",
                )  # fmt: skip

    def _taken_whole(self) -> bool:
        """Whether an example cannot be cut into pieces."""
        return self.reads in ("pairs", "sources") or self._one_label()

    def _one_label(self) -> bool:
        return self.labels_of == "text" and self.whole_texts

    def _label_columns(self) -> tuple[str, ...]:
        """What a column of labels may be called, where each example has one."""
        return () if self.per_token or self.reads == "pairs" else NAMES[1:]

    def _of_texts(self, rows: Rows) -> bool:
        """Whether labels are of whole texts: always, or since they are no lists."""
        found = next((name for name in NAMES if name in rows.columns), None)
        if self.per_token or self.labels_of is not None or found is None:
            return self.labels_of == "text"
        kind = rows.columns[found].type
        return not (pa.types.is_list(kind) or pa.types.is_large_list(kind))

    def _text_labels(self, rows: Rows, place: columns.Place) -> list[np.ndarray | None]:
        labels = self.labels.read(rows, place)
        if labels is None:
            return [None] * len(rows.numbers)
        # One row for all tokens, where a label is a list.
        return [np.array(one if one.ndim == 0 else one[None]) for one in labels]

    def _note_classes(self) -> None:
        """Note the classes that no example has; probabilities of classes say of none."""
        if self.classes is None or not self.labels.met:
            return
        names = {number: name for name, number in self.label_names.items()}
        lacking = set(range(self.classes)) - self.labels.met
        self.findings.classes_lacking = [names.get(n, str(n)) for n in sorted(lacking)]

    def _token_kinds(
        self, rows: Rows, tokens: Sequence[np.ndarray], place: columns.Place
    ) -> list[dict[str, np.ndarray]]:
        """Of each row what its tokens are of, first or second text, where the model takes it and
        data or tokenizer say it."""
        name, there = _KINDS_OF_TOKENS, _KINDS_OF_TOKENS in rows.columns
        if name not in self.takes:
            return [{} for _ in tokens]
        kinds: Sequence[np.ndarray] = ()
        if self.kind == TWO_TEXTS or any(own.any() for own in self._kinds):
            kinds = self._kinds  # of one text usually zeros, which a model has without them
        if there:
            lists = columns.integer_lists(name, rows.columns[name], place)
            self._check_lengths(name, lists, tokens, place)
            kinds = [own for own in lists if own is not None]
        usual = bool(kinds) if self.kinds_there is None else self.kinds_there
        if len(kinds) != usual * len(tokens):
            raise UserError(
                place(0), f"`{name}` in all examples or in none", "some",
                "Give every example its own.",
            )  # fmt: skip
        self.kinds_there = bool(kinds)
        return [{name: own} for own in kinds] if kinds else [{} for _ in tokens]

    def _spans(
        self,
        rows: Rows,
        tokens: list[np.ndarray],
        labels: Sequence[np.ndarray | None],
        place: columns.Place,
    ) -> list[slice] | None:
        """What of each row is text and no padding; ``None`` where nothing is said of it."""
        if not rows.columns.keys() & set(beside_tokens.READ):
            return None
        spans = [slice(0, len(ids_T)) for ids_T in tokens]
        if "attention_mask" in rows.columns:
            name = "attention_mask"
            masks = columns.boolean_lists(name, rows.columns[name], place)
            self._check_lengths(name, masks, tokens, place)
            found = self.findings
            for i, mask_T in enumerate(masks):
                if mask_T is None or mask_T.all():
                    continue
                spans[i] = beside_tokens.text_span(mask_T, place(i))
                found.padded_examples += 1
                found.padding_tokens += int(np.count_nonzero(~mask_T))
                labels_T = labels[i]
                if labels_T is not None:
                    targets = (labels_T != NOT_A_TARGET) & ~mask_T
                    found.targets_at_padding += int(np.count_nonzero(targets))
        beside_tokens.check_positions(rows, tokens, spans, place, self.takes)
        return spans

    def _token_labels(self, rows: Rows, place: columns.Place) -> list[np.ndarray | None]:
        column = rows.columns["labels"]
        if pa.types.is_integer(column.type):
            raise UserError(
                place(0),
                "lists of whole numbers in `labels`, one a token",
                f"one whole number a row ({column.type})",
                "Rename the column if it is no label of tokens: these are their own labels."
                if self.shift else "Give a list of labels, one a token.",
            )  # fmt: skip
        found = columns.integer_lists("labels", self.labels.listed("labels", column, place), place)
        if self.labelled:
            for i, one in enumerate(found):
                if one is None:
                    raise self._no_classes(place(i))
                self.labels.met.update(np.unique(one).tolist())
        return found

    def _no_classes(self, where: str) -> UserError:
        return UserError(
            where, "a label of each token", "none",
            f"Add a column `labels`, with {NOT_A_TARGET} where a token has none.",
        )  # fmt: skip

    def _tokens(
        self, rows: Rows, place: columns.Place
    ) -> tuple[list[np.ndarray], list[np.ndarray | None], list[bool]]:
        """Each row's token ids (int64), which of them are targets (``None`` for all), and whether
        it is a text of no character."""
        self._kinds: list[np.ndarray] = []
        if self.kind == ("input_ids",):
            lists = columns.integer_lists("input_ids", rows.columns["input_ids"], place)
            present = [ids_T for ids_T in lists if ids_T is not None]
            return present, [None] * len(lists), [False] * len(lists)
        texts = [columns.strings(name, rows.columns[name], place) for name in self.kind]
        blank = [not any(parts) for parts in zip(*texts, strict=True)]
        if self.kind in (("text",), TWO_TEXTS):
            second = texts[1] if self.kind == TWO_TEXTS else None
            tokens = self._encoded("text", texts[0], True, place, second)
            return tokens, [None] * len(tokens), blank
        before, after = self._affixes
        prompts, completions = (
            self._encoded(name, own, False, place)
            for name, own in zip(self.kind, texts, strict=True)
        )
        tokens = []
        targets: list[np.ndarray | None] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = np.concatenate([before, prompt, completion, after]).astype(np.int64)
            tokens.append(ids)
            targets.append(np.arange(len(ids)) >= len(before) + len(prompt))
        return tokens, targets, blank

    def _encoded(
        self,
        name: str,
        texts: Sequence[str],
        special: bool,
        place: columns.Place,
        second: Sequence[str] | None = None,
        target: bool = False,
    ) -> list[np.ndarray]:
        """The token ids of texts, each with its ``second`` if there are any, or as what a model is
        to make; they go through the tokenizer a bounded number at a time."""
        sizes = np.array([len(text.encode()) for text in texts])
        if second is not None:
            sizes += [len(text.encode()) for text in second]
        if sizes.max(initial=0) > TEXT_BYTES:
            at = int(sizes.argmax())
            raise UserError(
                place(at),
                f"a text of at most {TEXT_BYTES >> 20} MiB in `{name}`",
                f"{sizes[at]:,} bytes",
                "Write it as several examples, or tokenise it yourself and give `input_ids`: a "
                "tokenizer holds 100 to 300 bytes for each of a text.",
            )
        tokens: list[np.ndarray] = []
        kinds: list[np.ndarray] = []
        limit = self._limit() if self.whole_texts and self.long == "truncate" else None
        for start, stop in chunks(sizes, TOKENISED_BYTES):
            with user_errors(
                f"{place(start)} and the {stop - start - 1} after it",
                f"texts in `{name}` that the model's tokenizer takes",
                "Try it on them, or give `input_ids`.",
                Exception,  # tokenizers raise whatever they meet
            ):
                if target:
                    encoded = self._tokenizer().encode_targets(texts[start:stop])
                elif not self.whole_texts:
                    encoded = self._tokenizer().encode(texts[start:stop], special=special)
                else:
                    pairs = None if second is None else second[start:stop]
                    found = self._tokenizer().encode_whole(texts[start:stop], pairs, limit)
                    encoded = found.ids
                    kinds += [np.array(own, np.int64) for own in found.kinds]
                    self.findings.truncated_examples += found.truncated
            tokens += [np.array(ids, np.int64) for ids in encoded]
        self._kinds = kinds
        return tokens

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(
                "data",
                "a tokenizer, since the data is text",
                f"none beside the column `{self.kind[0]}`",
                "Give --tokenizer DIR, a model directory that has its tokenizer, or the data as "
                "`input_ids`.",
            )
        return self.tokenizer

    @cached_property
    def _affixes(self) -> tuple[list[int], list[int]]:
        return affixes(self._tokenizer())

    def _check_vocabulary(
        self, name: str, lists: Sequence[np.ndarray | None], place: columns.Place
    ) -> None:
        size = VOCABULARY_LIMIT if self.vocab_size is None else self.vocab_size
        if name == "labels" and self.classes is not None:
            size = self.classes
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
                if name == "input_ids" and self.kind != ("input_ids",):
                    remedy = "This is not the model's tokenizer: save the right one beside it."
                elif self.vocab_size is None:
                    remedy = f"Correct `{name}`."
                also = f", or {NOT_A_TARGET} for no target" if name == "labels" else ""
                what = f"token ids from 0 to {size - 1} in `{name}` (a vocabulary of {size})"
                if name == "labels" and self.classes is not None:
                    what = f"classes from 0 to {size - 1} in `{name}`"
                    remedy = "Correct the label, or give the model that class."
                raise UserError(
                    place(i),
                    f"{what}{also}",
                    f"{ids_T[at]} at position {at}",
                    remedy,
                )

    def _check_lengths(
        self,
        name: str,
        lists: Sequence[np.ndarray | None],
        tokens: Sequence[np.ndarray],
        place: columns.Place,
    ) -> None:
        for i, (values_T, ids_T) in enumerate(zip(lists, tokens, strict=True)):
            if values_T is not None:
                beside_tokens.check_length(name, values_T, len(ids_T), place(i))

    def _fitted(
        self, example: Example, i: int, rows: Rows, place: columns.Place
    ) -> Iterator[Example]:
        """The example of row ``i`` within the limit of length: itself, its beginning, or its
        pieces."""
        limit = self._limit()
        if limit is None or example.length <= limit:
            yield example
            return
        if self.long == "error":
            raise self._too_long(example.length, place(i))
        if self.long == "truncate":
            cut = _slice(example, example.id, 0, limit)
            self.findings.truncated_examples += 1
            none_left = loss_terms(cut, self.shift) == 0 < loss_terms(example, self.shift)
            self.findings.targets_cut_off += none_left
            yield cut
            return
        begins = range(0, example.length, limit)
        pieces = [_slice(example, f"{example.id}#{k}", a, a + limit) for k, a in enumerate(begins)]
        again = self.seen.add([piece.id for piece in pieces])
        for k, piece in enumerate(pieces):
            if k == again:
                raise self._twice(piece.id, f"piece {k} of {rows.place(i)}")
            yield piece

    def _limit(self) -> int | None:
        """Tokens of the longest text that is taken."""
        limits = [limit for limit in (self.max_length, self.max_positions) if limit is not None]
        return min(limits, default=None)

    def _too_long(self, tokens: int, where: str) -> UserError:
        limit = self._limit()
        own = limit == self.max_positions
        whose = "the model's positions" if own else "--max-length"
        split = not self._taken_whole()
        remedy = "Give --long truncate" + " or --long split" * split
        if not own:
            most = "" if self.max_positions is None else f" (the model takes {self.max_positions})"
            remedy += f", or a larger --max-length{most}"
        return UserError(
            where, f"at most {limit} tokens ({whose})", f"{tokens} tokens", remedy + "."
        )

    # Further columns

    def _further(self, rows: Rows, place: columns.Place) -> list[dict[str, str | np.ndarray]]:
        """What each row has in the further columns."""
        found: list[dict[str, str | np.ndarray]] = [{} for _ in rows.numbers]
        for name in self.further:
            for own, value in zip(found, self._further_column(name, rows, place), strict=True):
                own[name] = value
        return found

    def _further_column(
        self, name: str, rows: Rows, place: columns.Place
    ) -> Sequence[str | np.ndarray]:
        column, first = rows.columns[name], self.further_as.get(name)
        text = columns.is_text(column)
        if name in self.further_as and text != (first is None):
            raise UserError(
                place(0),
                f"{'text' if first is None else 'numbers'} in `{name}`, as in the examples before",
                "text" if text else "numbers",
                f"Write `{name}` as one or the other everywhere.",
            )
        if text:
            self.further_as[name] = None
            return columns.strings(name, column, place)
        shape = None if first is None else first.shape
        values = columns.numbers(name, column, place, shape, exact_integers=True)
        if first is None:
            first = self.further_as[name] = np.array(values[0])
        whole = np.issubdtype(first.dtype, np.integer)
        if whole and not np.issubdtype(values.dtype, np.integer):
            raise UserError(
                place(0),
                f"whole numbers in `{name}`, as in the examples before it",
                "a fraction",
                f"Write every number of `{name}` as a fraction, or as a whole number.",
            )
        # Whole numbers after fractions are fractions that JSON wrote without a point.
        values = values if whole else values.astype(np.promote_types(values.dtype, first.dtype))
        # A view would keep its whole chunk alive as long as any of its examples.
        return [np.array(value) for value in values]

    # Numbers

    def _of_numbers(
        self, rows: Rows, ids: Sequence[str], place: columns.Place
    ) -> Iterator[Example]:
        inputs: Iterable[np.ndarray]
        if self.kind == ("image",):
            inputs = self._pixels(rows, place)
        else:
            inputs = given = self._inputs(rows, place)
            if given.ndim == 1:
                raise UserError(
                    place(0),
                    f"a list of numbers in `{self.kind[0]}`",
                    f"one number ({given[0]})",
                    "Write it as a list of one.",
                )
            self.shape = given.shape[1:]
        labels = self.labels.read(rows, place)
        further = self._further(rows, place)
        for i, (id, values) in enumerate(zip(ids, inputs, strict=True)):
            # A view would keep its whole chunk alive as long as any of its examples.
            own = None if labels is None else labels[i].copy()
            yield Example(0, id, inputs=values.copy(), labels=own, columns=further[i])

    def _pixels(self, rows: Rows, place: columns.Place) -> Iterator[np.ndarray]:
        """The numbers of images, one at a time: they take far more memory than their files."""
        assert self.images is not None
        for i, file in enumerate(columns.image_files("image", rows.columns["image"], place)):
            pixels = self.images.pixels(file, place(i))
            if self.shape not in (None, pixels.shape):
                raise UserError(
                    place(i),
                    f"an image that becomes {list(self.shape or ())}, as those before it",
                    f"one that becomes {list(pixels.shape)}",
                    "Let the processor resize or crop images to one size (do_resize with a height "
                    "and a width, do_center_crop in preprocessor_config.json).",
                )
            self.shape = pixels.shape
            yield pixels

    def _inputs(self, rows: Rows, place: columns.Place) -> np.ndarray:
        """Numbers as floats, or as int64 where the model's embedding looks them up."""
        (name,) = self.kind
        column = rows.columns[name]
        if self.vocabulary != 0 and self.looks_up is not None:
            inputs = columns.numbers(name, column, place, self.shape, exact_integers=True)
            whole = inputs.dtype == np.int64
            if self.vocabulary is None:
                self.vocabulary = (self.looks_up(inputs[0]) if whole else None) or 0
            elif not whole:
                raise UserError(
                    place(0),
                    "whole numbers in `inputs`, as in the examples before it",
                    "a fraction",
                    "The model looks them up in an embedding: give whole numbers everywhere.",
                )
            if self.vocabulary:
                wrong = (inputs < 0) | (inputs >= self.vocabulary)
                if wrong.any():
                    at = int(wrong.reshape(len(inputs), -1).any(axis=1).argmax())
                    raise UserError(
                        place(at),
                        f"whole numbers from 0 to {self.vocabulary - 1} in `inputs` (the model's "
                        f"embedding has {self.vocabulary} rows)",
                        str(inputs[at][wrong[at]].flat[0]),
                        "Tokenise the data as the model's were.",
                    )
                return inputs
        if self.token_inputs:
            raise UserError(
                place(0),
                "whole numbers in `inputs`, which the model's embedding looks up",
                f"{columns.type_name(column)}, which it does not",
                "Give token ids, as many in every row, as the model's forward takes them.",
            )
        return columns.numbers(name, column, place, self.shape, exact_integers=False)


def _ids(part: Part, rows: Rows) -> list[str]:
    """The ids of rows: their own, or where they stand."""
    prefix = f"{part.name}:" if part.name else ""
    if "id" not in rows.columns:
        return [f"{prefix}{number}" for number in rows.numbers.tolist()]
    own = columns.ids(rows.columns["id"], rows.place)
    return [
        f"{prefix}{number}" if id is None else id
        for id, number in zip(own, rows.numbers.tolist(), strict=True)
    ]


def _named(rows: Rows, ids: Sequence[str]) -> columns.Place:
    return lambda i: f"example {ids[i]!r} ({rows.place(i)})"


def _listed(found: Sequence[str]) -> str:
    names = ", ".join(f"`{name}`" for name in found[:20])
    return names if len(found) <= 20 else f"{names} and {len(found) - 20} more"


def _told(part: Part) -> AbstractContextManager[None]:
    """Whatever a part's content makes libraries raise is a mistake in it."""
    return user_errors(
        part.location,
        "data that can be read",
        "Write the file again, with less in a row if it lacks memory.",
        *DATA_ERRORS,
    )


def _there(array: np.ndarray | None) -> np.ndarray:
    assert array is not None, "a column without nulls"
    return array


def _both(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    """What both masks leave, ``None`` being a mask that leaves all."""
    if a is None or b is None:
        return b if a is None else a
    both: np.ndarray = a & b
    return both


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


def _slice(example: Example, id: str, begin: int, end: int) -> Example:
    """The tokens ``begin`` to ``end`` as an example, with what speaks of them."""

    def cut(values_T: np.ndarray | None) -> np.ndarray | None:
        return None if values_T is None else values_T[begin:end]

    labels = example.labels
    return Example(
        example.index,
        id,
        cut(example.input_ids),
        None,
        cut(labels) if labels is not None and labels.ndim == 1 else labels,
        cut(example.loss_mask),
        example.columns,
        {name: values[begin:end] for name, values in example.named.items()},
    )
