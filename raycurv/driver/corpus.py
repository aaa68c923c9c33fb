"""The examples of a run as they lie in its directory: tokenised once, read in windows by each pass.

data/part-00000.parquet      the examples, 1,024 a file
data/corpus.json             how many, what tokenised them, what of their source was left out
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch

from raycurv.batch import Batch
from raycurv.data.examples import (
    Example,
    examples_to_table,
    loss_terms,
    no_loss_terms,
    table_to_examples,
)
from raycurv.data.findings import sentences
from raycurv.data.images import LazyImages
from raycurv.data.making.reader_settings import LooksUp
from raycurv.data.microbatch import Microbatches, make_batch, padding_share, plan_microbatches
from raycurv.data.reading import ExampleReader
from raycurv.data.shown import Decode, recorded
from raycurv.data.sources import Source
from raycurv.data.tokenizer import FILES, LazyTokenizer
from raycurv.driver.settings import Reading
from raycurv.errors import DamagedFile, RaycurvError, UserError
from raycurv.files.store import Store
from raycurv.files.tables import read_rows, read_table, write_table
from raycurv.jsonfile import made_of
from raycurv.mathematics.loss.objective import (
    CausalLM,
    Classification,
    Objective,
    TokenClassification,
)
from raycurv.mathematics.loss.shipped import is_ours
from raycurv.models.model import Model, Outline
from raycurv.stages.heap import give_back

PART = 1024
WINDOW = 1024
_GROUP = 1 << 14  # rows of a row group of the index
_WIDTHS = "positions"
_INDEX = pa.schema([("id", pa.string()), ("tokens", pa.int32())])

T = TypeVar("T")
Array = np.ndarray[Any, Any]
# Gives the labels that were drawn for some examples, all of one part.
Drawn = Callable[[Sequence[int]], Sequence[Array]]


@dataclass(frozen=True)
class Corpus:
    """Stored examples, and the plan of their microbatches.

    In memory an example is its id's text and 12 bytes, and 8 or up to 16 in a plan.

    Attributes:
        directory: below it, where the parts lie.
        ids: of every example, in order, as Arrow's large strings: no Python object an example.
        lengths: tokens of every example (1 without a token axis), int32.
        terms: how many examples have a loss term.
        tokenizer: what tokenised them; empty for data without text.
        columns: further ones, that an objective reads.
        findings: what of their source was left out, as :class:`Findings` records it.
        shift: how far a target stands behind what predicts it.
        positions: of each example in a microbatch of its own, where these are more than its
            tokens, for it has several texts.
        first: the first example as a person looks at it, see :func:`raycurv.data.shown.recorded`.
    """

    store: Store
    directory: str
    ids: pa.LargeStringArray
    lengths: Array
    terms: int
    tokenizer: dict[str, Any]
    columns: tuple[str, ...] = ()
    findings: Mapping[str, Any] = field(default_factory=dict)
    shift: int = 1
    positions: Array | None = None
    first: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def name(self) -> str:
        """What they are: ``data``, ``queries`` or ``train``."""
        return self.directory.rpartition("/")[2]

    def facts(self) -> dict[str, Any]:
        """For ``run.json``: how many there are, and what of their source was left out."""
        without = len(self) - self.terms
        count = {"examples_without_loss": without} if without else {}
        return {"examples": len(self), **count, **self.findings}

    def said(self) -> list[str]:
        """What a person is told of how they were read, a line each."""
        findings = dict(self.findings)
        if self.name == "queries":
            findings.pop("classes_lacking", None)  # some ask of some classes
        told = sentences(findings, len(self), len(self) - self.terms)
        return [f"{self.name}: {sentence}" for sentence in told]

    def check_targets(self, flag: str) -> None:
        """Refuse examples without a loss term, where the loss of each is asked for.

        Args:
            flag: the flag that named their source.

        Raises:
            UserError: names the first.
        """
        if self.terms == len(self):
            return
        first = next(one for one in self.examples() if not loss_terms(one, self.shift))
        cut = self.findings.get("targets_cut_off", 0)
        raise UserError(
            f"example {first.id!r} of {flag}",
            "a target" + " after its first token" * self.shift + ", whose loss is asked for",
            f"none, as in {len(self) - self.terms:,} of {len(self):,} examples"
            + (f" (of {cut:,} of them --long truncate cut all targets off)" if cut else ""),
            "Leave these examples out"
            + (", or give a larger --max-length, or --long split." if cut else "."),
        )

    @cached_property
    def tokens(self) -> int:
        """Tokens in all."""
        return int(self.lengths.sum(dtype=np.int64))

    def named(self, numbers: Sequence[int] | Array) -> pa.StringArray:
        """The ids of some examples."""
        return self.ids.take(pa.array(numbers, pa.int64())).cast(pa.string())

    @property
    def widths(self) -> Array:
        """Positions that every example takes in a microbatch of its own."""
        return self.lengths if self.positions is None else self.positions

    def plan(self, batch_tokens: int, numbers: np.ndarray[Any, Any] | None = None) -> Microbatches:
        """Example numbers of every microbatch, of all examples or of some."""
        return plan_microbatches(self.widths, batch_tokens, WINDOW, numbers)

    def padding(self, batch_tokens: int) -> float:
        """Share of a plan's positions that are padding."""
        return padding_share(self.widths, self.plan(batch_tokens))

    def reader(
        self, dtype: torch.dtype, drawn: Drawn | None = None
    ) -> Callable[[int, Sequence[int]], Batch]:
        """A function that packs a microbatch, inputs that are numbers in a dtype; it holds one
        part of the data at a time."""
        held: tuple[int, list[Example]] = (-1, [])

        def read(index: int, members: Sequence[int]) -> Batch:
            nonlocal held
            part = members[0] // PART
            if held[0] != part:
                held = (part, self._part(part))
            examples = [held[1][n - part * PART] for n in members]
            labels = None if drawn is None else drawn(members)
            return replace(make_batch(index, examples, dtype, labels), numbers=tuple(members))

        return read

    def among(self, numbers: Array, store: Store, directory: str) -> Corpus:
        """Some of the examples as a corpus of their own, numbered from 0 on in the same order.

        Args:
            numbers: of the examples, ascending.
            store: of the new corpus.
            directory: below that store; what lies there whole is these examples.
        """

        return stored_corpus(store, directory) or store_corpus(
            store, directory, (one.numbered(n) for n, one in enumerate(self.some(numbers))),
            f"--{self.name}", lambda: self.tokenizer, needs_loss=False, shift=self.shift,
            each=1 if self.positions is None else int(self.positions.min()),
        )  # fmt: skip

    def examples(self) -> Iterator[Example]:
        """All examples in order, a part of them in memory at a time."""
        for part in range(parts_of(len(self))):
            yield from self._part(part)

    def some(self, numbers: Array) -> Iterator[Example]:
        """The examples of ascending numbers, of which a part is in memory at a time."""
        for part, mine in itertools.groupby(numbers.tolist(), lambda n: n // PART):
            held = self._part(part)
            yield from (held[n - part * PART] for n in mine)

    def _part(self, part: int) -> list[Example]:
        name = part_file(self.directory, part)
        with _as_written(self.store, name, "examples"):
            return table_to_examples(read_table(self.store, name))


@dataclass(frozen=True)
class _Described:
    """What ``corpus.json`` says, see :class:`Corpus`."""

    examples: int
    with_loss: int
    tokenizer: dict[str, Any]
    columns: list[str] = field(default_factory=list)
    findings: dict[str, Any] = field(default_factory=dict)
    shift: int = 1
    first: dict[str, Any] = field(default_factory=dict)


def open_corpus(
    store: Store,
    directory: str,
    source: Source,
    flag: str,
    model: Model,
    reading: Reading,
    max_examples: int | None,
    seed: int,
    objective: Objective | None = None,
    needs_loss: bool = True,
    masks: int = 0,
    read_as: Mapping[str, Any] | None = None,
) -> Corpus:
    """The examples of a source, read from it once and from the store ever after.

    Args:
        flag: the flag that named it, for errors.
        max_examples: a seeded sample of so many.
        objective: whose labels and columns are read; a next-token loss when ``None``.
        needs_loss: whether an example needs a loss term, for its loss is what is asked for.
        masks: seed of the tokens that are hidden from a masked language model.
        read_as: what a fit that they follow says of its tokenizer, or its images' processor.

    Raises:
        UserError: see :class:`raycurv.data.reading.ExampleReader`; no example has a loss term; or
            they went through another tokenizer, or another processor.
    """
    asks = CausalLM() if objective is None else objective
    found = stored_corpus(store, directory)
    if found is not None and set(asks.columns) <= set(found.columns):
        return found
    of_model, trusted = model.tokenizer_dir, model.trust_remote_code
    tokenizer = None if of_model is None else LazyTokenizer(of_model, trusted)
    reader = reader_for(source, model, tokenizer, reading, asks, max_examples, seed, masks)
    made = reader.images or tokenizer

    def described() -> dict[str, Any]:
        # As JSON has it.
        here: dict[str, Any] = json.loads(json.dumps({} if made is None else made.describe()))
        if not described_alike(here, read_as or {}):
            what = "tokenizer" if reader.images is None else "image processor"
            raise UserError(
                flag, f"texts or images that go through the {what} of the fit, {read_as}",
                f"another one: {here}", f"Restore the {what}"
                + (", give the fit's by --tokenizer" if reader.images is None else "")
                + ", or fit again into another directory.",
            )  # fmt: skip
        return here

    corpus = store_corpus(
        store, directory, reader.examples(), flag, described, needs_loss,
        reader.findings.recorded, asks.shift, positions_of(model),
        None if tokenizer is None else tokenizer.texts,
    )  # fmt: skip
    give_back(collect=False)
    return corpus


def described_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether what is said of two tokenizers, or of two processors, is the same as far as it is
    said of both, whatever their files are."""
    both = [(one[name], other[name]) for name in one if name in other and name != FILES]
    return all(
        described_alike(a, b) if isinstance(a, Mapping) and isinstance(b, Mapping) else a == b
        for a, b in both
    )


def read_otherwise(model: Model, recorded: Mapping[str, Any]) -> list[str]:
    """What has changed of that which texts of a model, or images, go through.

    Args:
        recorded: what a run says of it; empty where it met neither.

    Returns:
        Names of the files that are others by now, or of what they say otherwise where the run has
        no files on record; none where the same is made of every text, or where no file is left.

    Raises:
        UserError: a changed file cannot be read.
    """
    reads: LazyTokenizer | LazyImages | None = None
    if model.images is not None:
        reads = LazyImages(model.images.directory, model.images.channels)
    elif model.tokenizer_dir is not None:
        reads = LazyTokenizer(model.tokenizer_dir, model.trust_remote_code)
    files = {} if reads is None or not recorded else reads.files()
    if reads is None or not files or files == recorded.get(FILES):
        return []
    here = json.loads(json.dumps(reads.describe_as(recorded)))
    if described_alike(here, recorded):
        return []
    one, other = (here[FILES], recorded[FILES]) if FILES in recorded else (here, recorded)
    names = sorted(one.keys() | other.keys())
    return [name for name in names if name != FILES and one.get(name) != other.get(name)]


def reader_for(
    source: Source,
    model: Outline,
    tokenizer: LazyTokenizer | None,
    reading: Reading,
    objective: Objective,
    max_examples: int | None,
    seed: int,
    masks: int,
) -> ExampleReader:
    """What reads the examples that a model and an objective take; see :func:`open_corpus`."""
    of_classes = isinstance(objective, Classification | TokenClassification)
    task, images = model.task, model.images
    whole_texts = task is not None and not task.causal and objective.reads != "sources"
    return ExampleReader(
        source,
        tokenizer=tokenizer,
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
        loss_on=reading.loss_on or "assistant",
        max_length=reading.max_length,
        long=reading.long,
        max_examples=max_examples,
        seed=seed,
        token_inputs=model.token_inputs,
        either=model.either_inputs,
        per_token=objective.per_token,
        shift=objective.shift,
        reads=objective.reads,
        labels_of="tokens" if objective.per_token else "text" if is_ours(objective) else None,
        label_names=model.class_names if of_classes else {},
        classes=model.classes if of_classes and objective.reads == "texts" else None,
        labelled=isinstance(objective, TokenClassification),
        masking=None if tokenizer is None else lambda: tokenizer.masking(masks, model.vocab_size),
        takes=model.takes,
        placeholders=model.placeholders,
        whole_texts=whole_texts,
        empty=reading.empty,
        further=objective.columns,
        images=None if images is None else LazyImages(images.directory, images.channels),
        looks_up=_looked_up_by(model) if isinstance(model, Model) else None,
    )


def _looked_up_by(model: Model) -> LooksUp:
    return lambda inputs: model.looks_up(torch.from_numpy(inputs)[None])


def positions_of(model: Outline) -> int:
    """Tokens that an example without any counts as in a microbatch."""
    return 1 if model.images is None else model.images.positions


def store_corpus(
    store: Store,
    directory: str,
    examples: Iterable[Example],
    flag: str,
    describe: Callable[[], dict[str, Any]],
    needs_loss: bool = True,
    findings: Callable[[], dict[str, Any]] = dict,
    shift: int = 1,
    each: int = 1,
    decode: Decode | None = None,
) -> Corpus:
    """Write examples, numbered from 0 on, as a corpus.

    Args:
        flag: where they come from, for errors.
        describe: what tokenised them; asked when all have been read.
        needs_loss: whether an example needs a loss term.
        findings: what of their source was left out; asked when all have been read.
        shift: how far a target stands behind what predicts it.
        each: positions that an example has at least.
        decode: gives the texts of tokens, for who looks at the first example.

    Raises:
        UserError: no example has a loss term.
    """
    store.delete_directory(directory)
    ids: list[pa.StringArray] = []
    lengths: list[Array] = []
    positions: list[Array] = []
    terms = count = 0
    columns: tuple[str, ...] = ()
    first: dict[str, Any] = {}
    for part, some in enumerate(in_parts(examples)):
        write_table(store, part_file(directory, part), examples_to_table(some))
        ids.append(pa.array([example.id for example in some], pa.string()))
        lengths.append(np.array([example.length for example in some], np.int32))
        positions.append(np.array([max(each, example.positions) for example in some], np.int32))
        columns = tuple(some[-1].columns)
        first = first or recorded(some[0], shift, decode)
        count += len(some)
        terms += sum(loss_terms(example, shift) > 0 for example in some)
        some.clear()
    if needs_loss and not terms:
        raise no_loss_terms(flag, count, shift)
    named, tokens = pa.chunked_array(ids, pa.string()), np.concatenate(lengths)
    widths = np.concatenate(positions)
    index = pa.table({"id": named, "tokens": tokens})
    wider = not np.array_equal(widths, tokens)
    if wider:
        index = index.append_column(_WIDTHS, pa.array(widths))
    # A writer takes as much as its row group, several times over.
    write_table(store, f"{directory}/index.parquet", index, row_group_size=_GROUP)
    described = describe()
    said = _Described(count, terms, described, list(columns), findings(), shift, first)
    store.write_json(f"{directory}/corpus.json", asdict(said))
    return Corpus(
        store, directory, one_array(named), tokens, terms, described, columns, said.findings,
        shift, widths if wider else None, first,
    )  # fmt: skip


def stored_corpus(store: Store, directory: str) -> Corpus | None:
    """The corpus if it is there whole; a damaged one is read from its source again."""
    name = f"{directory}/corpus.json"
    found = store.read_json(name)
    if found is None:
        return None
    try:
        said = made_of(_Described, found)
        if not 0 <= said.with_loss <= said.examples:
            raise ValueError(f"{said.with_loss} of {said.examples} examples")
    except ValueError as error:
        raise DamagedFile(
            store.path(name), "what was written of the examples", str(error),
            "Delete it and run the command again.",
        ) from error  # fmt: skip
    try:
        index = read_table(store, f"{directory}/index.parquet", _INDEX)
    except (DamagedFile, FileNotFoundError):
        return None
    if len(index) != said.examples or not parts_there(store, directory, len(index)):
        return None
    ids, lengths = one_array(index["id"]), index["tokens"].to_numpy()
    positions = index[_WIDTHS].to_numpy() if _WIDTHS in index.column_names else None
    return Corpus(
        store, directory, ids, lengths, said.with_loss, said.tokenizer, tuple(said.columns),
        said.findings, said.shift, positions, said.first,
    )  # fmt: skip


def corpus_of_run(store: Store) -> Corpus:
    """The examples of a finished fit (of one that extends another those that it added); DamagedFile
    if they are not there whole."""
    found = stored_corpus(store, "data")
    if found is None:
        raise DamagedFile(
            store.path("data"), "the examples of a run", "some of them at most",
            "Run its fit again: it makes what is missing.",
        )  # fmt: skip
    return found


@contextmanager
def _as_written(store: Store, name: str, what: str) -> Iterator[None]:
    """What is raised by a table whose columns are not those that were written is a DamagedFile."""
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError, pa.ArrowException) as error:
        if isinstance(error, RaycurvError):
            raise
        raise store.damaged(name, what, f"{type(error).__name__}: {error}") from error


def one_array(column: pa.ChunkedArray) -> pa.LargeStringArray:
    """A table's ids in one array, which 2 GiB of them do not fill."""
    return column.cast(pa.large_string()).combine_chunks()


def in_parts(examples: Iterable[T]) -> Iterator[list[T]]:
    """What there is of each example, a part at a time; the caller may empty the list."""
    left = iter(examples)
    while some := list(itertools.islice(left, PART)):
        yield some


def part_file(directory: str, part: int) -> str:
    """Where a directory has the rows of a part of the examples."""
    return f"{directory}/part-{part:05d}.parquet"


def parts_of(examples: int) -> int:
    """How many parts so many examples have."""
    return -(-examples // PART)


def parts_there(store: Store, directory: str, examples: int) -> bool:
    """Whether a directory has a row of each of so many examples, in files by part."""
    names = [part_file(directory, part) for part in range(parts_of(examples))]
    try:
        return sum(read_rows(store, name) for name in names) == examples
    except (DamagedFile, FileNotFoundError):
        return False


class DrawnLabels:
    """Labels drawn in the first pass, as every later pass reads them: one file a part of the data.

    ``labels/part-00000.parquet`` holds, in the order of ``data/part-00000.parquet``, the labels of
    every example flattened from ``[draws, ...]``, and that shape.
    """

    def __init__(self, store: Store, directory: str = "labels") -> None:
        self._store, self._directory = store, directory
        self._held: tuple[int, list[Array]] = (-1, [])

    def complete(self, examples: int) -> bool:
        """Whether the labels of all examples are there."""
        return parts_there(self._store, self._directory, examples)

    def write(self, part: int, labels: Sequence[Array]) -> None:
        """Write the labels of a whole part."""
        drawn = pa.array([y.reshape(-1) for y in labels])
        shape = pa.array([list(y.shape) for y in labels], pa.list_(pa.int32()))
        table = pa.table({"drawn": drawn, "shape": shape})
        write_table(self._store, part_file(self._directory, part), table)

    def read(self, members: Sequence[int]) -> list[Array]:
        """The labels of some examples of one part, ``[draws, ...]`` each."""
        part = members[0] // PART
        if self._held[0] != part:
            name = part_file(self._directory, part)
            with _as_written(self._store, name, "drawn labels"):
                self._held = (part, drawn_labels(read_table(self._store, name)))
        return [self._held[1][n - part * PART] for n in members]


def drawn_labels(table: pa.Table) -> list[Array]:
    """The labels in a table of their ``drawn`` and ``shape``, ``[draws, ...]`` an example."""
    flat = table["drawn"].combine_chunks()
    return [
        labels.values.to_numpy(zero_copy_only=False).reshape(shape)
        for labels, shape in zip(flat, table["shape"].to_pylist(), strict=True)
    ]
