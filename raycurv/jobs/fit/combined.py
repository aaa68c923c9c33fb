"""What a new run takes over from those that it starts from: examples, labels, sums, bases, rows.

    merge, subtract    data/ labels/ blocks.json factors/      then the fit goes on from there
    extend             blocks.json eigen/                      then Λ of the new data alone

Every file is written whole and depends on the other runs alone, so that the same command goes on
where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from raycurv.data.examples import Example
from raycurv.data.sources import Source
from raycurv.driver.corpus import (
    PART,
    Corpus,
    DrawnLabels,
    in_parts,
    open_corpus,
    part_file,
    store_corpus,
    stored_corpus,
)
from raycurv.driver.workers import Workers
from raycurv.errors import DamagedFile, UserError
from raycurv.files.artifacts import eigen_file, read_factor, write_factor
from raycurv.files.store import Store
from raycurv.files.tables import read_directory, write_table
from raycurv.files.tensorfile import open_tensors
from raycurv.jobs.fit.fit_settings import FitSettings
from raycurv.jobs.fit.parents import How, Parent, Parents, check_new, places
from raycurv.jobs.shell import Shell
from raycurv.mathematics.loss.objective import Objective
from raycurv.models.model import Model
from raycurv.steps.step import EXAMPLES_TABLE

Array = np.ndarray[Any, Any]
_DIGEST = 16  # bytes


def open_examples(
    shell: Shell[FitSettings],
    parents: Parents,
    source: Source,
    network: Model,
    objective: Objective,
) -> Corpus:
    """The examples of a fit: of its own source, or of the runs that it puts together.

    Args:
        objective: whose labels and columns are read.

    Raises:
        UserError: a mistake in the source; an example that the extended run has already; examples
            of two runs that cannot share a microbatch; one that is subtracted is another than the
            one of its id.
        DamagedFile: a run has lost examples or labels.
    """
    if parents.combined:
        return _combined(shell, parents)
    settings = shell.settings
    corpus = open_corpus(
        shell.store, "data", source, "--data", network, settings, settings.max_examples,
        settings.seed, objective, masks=settings.seed, read_as=parents.tokenizer(),
    )  # fmt: skip
    check_new(parents, corpus)
    return corpus


def _combined(shell: Shell[FitSettings], parents: Parents) -> Corpus:
    """The examples of all runs, with the labels that were drawn for them."""
    store, sampled = shell.store, shell.settings.fisher == "sampled"
    corpus = stored_corpus(store, "data")
    if corpus is None:
        if parents.how == "subtract":
            others = _check_contents(parents, sampled)
            shell.manifest.facts["subtracted_with_other_labels"] = others
            if others:
                shell.reporter.say(
                    f"{others:,} subtracted examples have other drawn labels than in the first "
                    "run: what is left of G holds the difference of the two"
                )
        tokenizers = [run.corpus.tokenizer for run in parents.runs]
        tokenizer = next(filter(None, tokenizers), {})
        examples, flag = _renumbered(parents), f"--{parents.how}"
        shift = parents.runs[0].corpus.shift
        corpus = store_corpus(store, "data", examples, flag, lambda: tokenizer, shift=shift)
    labels = DrawnLabels(store)
    if sampled and not labels.complete(len(corpus)):
        drawn = (one for run, numbers in parents.kept for one in _drawn(run, numbers))
        for part, some in enumerate(in_parts(drawn)):
            labels.write(part, some)
    return corpus


def take_over_blocks(store: Store, parents: Parents) -> None:
    """Which blocks read the same tensor is a matter of the model, and known."""
    if parents.runs and not store.exists("blocks.json"):
        store.copy("blocks.json", parents.runs[0].store)


def take_over_factors(
    store: Store, parents: Parents, factors: Sequence[str], workers: Workers
) -> None:
    """Combine the sums of these factors, or copy their bases; a task for each."""
    if not factors:
        return
    stores = tuple(run.store for run in parents.runs)
    function: Callable[..., None]
    if parents.extended is not None:
        label, function = "bases of the run", copy_basis
        arguments: list[tuple[Any, ...]] = [(store, stores[0], name) for name in factors]
    else:
        label, function = "A and G of the runs", combine_factor
        arguments = [(store, stores, parents.how, name) for name in factors]
    for _ in workers.run_tasks(label, function, arguments, unit="factors"):
        pass


def copy_basis(store: Store, run: Store, name: str) -> None:
    """Take over a factor's eigenbasis byte for byte, if it is what its checksums say."""
    open_tensors(run, eigen_file(name)).read_all()
    store.copy(eigen_file(name), run)


def combine_factor(store: Store, runs: Sequence[Store], how: How, name: str) -> None:
    """Add a factor's sums and counts in float64, or take the later ones off the first."""
    total = read_factor(runs[0], name)
    for run in runs[1:]:
        other = read_factor(run, name)
        total = total.plus(other) if how == "merge" else total.minus(other)
    assert total.count >= 0 and total.rows >= 0
    write_factor(store, total, total.dtype)


def combine_examples(store: Store, parents: Parents, notes: dict[str, str]) -> None:
    """``tables/examples`` of a method without a second pass: the rows that the runs have."""
    rows = pa.concat_tables(
        read_directory(run.store, EXAMPLES_TABLE).take(pa.array(kept, pa.int64()))
        for run, kept in parents.kept
    )
    store.delete_directory(EXAMPLES_TABLE)
    for part, start in enumerate(range(0, len(rows), PART)):
        write_table(store, part_file(EXAMPLES_TABLE, part), rows.slice(start, PART), notes)


# Examples and labels


def _renumbered(parents: Parents) -> Iterator[Example]:
    """The kept examples of all runs, numbered anew."""
    first: Example | None = None
    index = 0
    for run, numbers in parents.kept:
        kept = np.zeros(len(run.corpus), bool)
        kept[numbers] = True
        for example in run.corpus.examples():
            if not kept[example.index]:
                continue
            first = first or example
            if example.input_ids is None and _shapes(example) != _shapes(first):
                raise UserError(
                    f"example {example.id!r} of {run.flag}",
                    f"inputs and labels as those of {first.id!r}: {_shapes(first)}",
                    str(_shapes(example)),
                    "Only data of one shape, all with labels or all without, go through together.",
                )
            yield replace(example, index=index)
            index += 1


def _shapes(example: Example) -> tuple[tuple[Any, ...] | None, ...]:
    parts = (example.inputs, example.labels)
    return tuple(None if part is None else (*part.shape, str(part.dtype)) for part in parts)


def _drawn(run: Parent, numbers: Iterable[int]) -> Iterator[Array]:
    """The labels that were drawn for some examples of a run."""
    labels = DrawnLabels(run.store)
    if not labels.complete(len(run.corpus)):
        raise DamagedFile(
            run.store.path("labels"), "the labels that were drawn for all examples", "fewer",
            "Run its fit again: it makes what is missing.",
        )  # fmt: skip
    for n in numbers:
        yield labels.read([int(n)])[0]


def _check_contents(parents: Parents, sampled: bool) -> int:
    """Refuse to subtract an example that is another than the one of its id.

    Labels that were drawn otherwise (by another kernel, say) are only counted: what is left is then
    off by the difference of two draws.
    """
    first, *others = parents.runs
    gone = pa.concat_arrays([run.corpus.ids for run in others])
    digests = bytearray()
    for run in others:
        for found in _digests(run, sampled):
            digests += found
    other_labels = 0
    place = places(first.corpus.ids, gone)
    kept = np.flatnonzero(place >= 0)
    for n, found in zip(kept, _digests(first, sampled, place >= 0), strict=True):
        at = 2 * _DIGEST * int(place[n])
        there = digests[at : at + 2 * _DIGEST]
        if found[:_DIGEST] != there[:_DIGEST]:
            raise UserError(
                f"example {first.corpus.ids[int(n)].as_py()!r}",
                f"the same content in {first.flag} and in the other run",
                "another", "Only what has entered a run can be taken out of it.",
            )  # fmt: skip
        other_labels += found[_DIGEST:] != there[_DIGEST:]
    return other_labels


def _digests(run: Parent, sampled: bool, only: Array | None = None) -> Iterator[bytes]:
    """Hashes of each example's content and of its drawn labels, one behind the other; of all
    examples, or those that ``only`` says, ``[N]`` bool."""
    drawn = _drawn(run, range(len(run.corpus))) if sampled else None
    for example in run.corpus.examples():
        labels = None if drawn is None else next(drawn)
        if only is None or only[example.index]:
            given = (*sorted(example.columns.items()), *sorted(example.named.items()))
            further = (np.asarray(value) for _, value in given)
            content = _hash(
                example.input_ids, example.inputs, example.labels, example.loss_mask,
                example.source, np.array(example.sequences, np.int64), *further,
            )  # fmt: skip
            yield content + _hash(labels)


def _hash(*arrays: Array | None) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for array in arrays:
        if array is None:
            digest.update(b"none;")
        else:
            digest.update(f"{array.dtype}{array.shape};".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()
