"""Which training examples each query is scored on, where it is not all: given, or found by BM25.

Only what some query of a pass asks for goes through the model in that pass, and only the pairs that
were asked for are written. How much of the influence they hold is measured on some queries, whose
exact scores on all examples are made for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raycurv.data.bm25 import BM25, Matching
from raycurv.data.sources import Source, fingerprint, open_parts
from raycurv.data.tokenizer import LazyTokenizer
from raycurv.driver.corpus import Corpus, in_parts
from raycurv.errors import UserError
from raycurv.files.store import Store
from raycurv.files.tables import read_table, score_matrix, write_table
from raycurv.planning.report import size
from raycurv.planning.supply import memory_here, resident

FLAG = "--candidates"
TOP = 10
_COLUMNS = {"query_id": "--queries", "train_id": "--train"}
_FILE = "candidates/pairs.parquet"
_STORED = pa.schema([("query", pa.int64()), ("example", pa.int64())])
_WORD = re.compile(r"\w+")

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Pairs:
    """The pairs of a pass: of its example n the queries ``queries[starts[n]:starts[n + 1]]``.

    Attributes:
        starts: int64 ``[examples + 1]``.
        queries: numbers within the pass, int64, ascending for each example.
        own: whether this pass, of all that an example takes part in, scores it on itself, bool
            ``[examples]``.
    """

    starts: Array
    queries: Array
    own: Array

    def of(self, examples: Array) -> tuple[Array, Array]:
        """The pairs of some examples, one after the other.

        Returns:
            For each pair the place of its example in ``examples``, and its query.
        """
        first, counts = self.starts[examples], np.diff(self.starts)[examples]
        ends = np.cumsum(counts)
        within = np.arange(counts.sum()) - np.repeat(ends - counts, counts)
        return np.repeat(np.arange(len(examples)), counts), self.queries[
            np.repeat(first, counts) + within
        ]


@dataclass(frozen=True)
class Candidates:
    """Pairs of a query and a training example, by their numbers, int64 ``[P]`` each: no pair twice,
    sorted by the query, then by the example. In ``candidates/pairs.parquet`` they are ``query`` and
    ``example``."""

    queries: Array
    examples: Array

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def union(self) -> Array:
        """Numbers of all examples that some query asks for, ascending."""
        return np.unique(self.examples)

    def of(self, query: int) -> Array:
        """Numbers of the examples that a query asks for, ascending."""
        first, last = np.searchsorted(self.queries, [query, query + 1])
        return self.examples[first:last]

    def of_pass(self, numbers: range) -> tuple[Array, Pairs]:
        """What consecutive queries ask for.

        Returns:
            Numbers of the examples, ascending, and the pairs by their places there.
        """
        first, last = np.searchsorted(self.queries, [numbers.start, numbers.stop])
        union, place = np.unique(self.examples[first:last], return_inverse=True)
        order = np.argsort(place, kind="stable")
        starts = np.searchsorted(place[order], np.arange(len(union) + 1))
        # The first query that asks for an example decides in which pass its own score is made.
        everyone, at = np.unique(self.examples, return_index=True)
        asked_first = self.queries[at[np.searchsorted(everyone, union)]]
        mine = self.queries[first:last][order] - numbers.start
        return union, Pairs(starts, mine, asked_first >= numbers.start)


def candidates_print(candidates: Source) -> dict[str, Any]:
    """What tells candidates from others: those of BM25 by how they are found, others by the hash of
    their table."""
    matching = Matching.parse(FLAG, candidates) if isinstance(candidates, str) else None
    if matching is None:
        return fingerprint(candidates)
    return {"bm25": matching.k, "b": matching.b, "over": matching.over}


def choose_candidates(
    candidates: Source,
    queries: Corpus,
    train: Corpus,
    tokenizer: LazyTokenizer | None,
    advance: Callable[[int], object] = lambda examples: None,
    forced: bool = False,
) -> Candidates | None:
    """The candidates of all queries; ``None`` when they are all examples.

    Args:
        candidates: what ``--candidates`` says, or a table that it would name.
        tokenizer: that words are read with.
        advance: is told how many more training examples have been looked at.
        forced: make an index that is larger than this machine's memory all the same.

    Raises:
        UserError: that index is; it names ids that there are not; a query has no candidate; or
            there are no words or tokens to match.
    """
    matching = Matching.parse(FLAG, candidates) if isinstance(candidates, str) else None
    if matching is None:
        found = _listed(candidates, queries, train)
        lacking, other = "the file has none of its", ""
    elif matching.k >= len(train):
        return None
    else:
        room = (lambda needed: None) if forced else _check_room
        found = _matched(matching, queries, train, tokenizer, advance, room)
        lacking = f"no training example shares any of its {matching.over}"
        # A text without spaces between its words is a single one.
        by_tokens = f"match tokens ({FLAG} bm25:{matching.k},over=tokens), "
        other = by_tokens if matching.over == "words" else ""
    without = np.flatnonzero(np.bincount(found.queries, minlength=len(queries)) == 0)
    if len(without):
        raise UserError(
            f"query {queries.ids[without[0]].as_py()!r}", f"candidates for each query ({FLAG})",
            f"{lacking}, and so for {len(without):,} of {len(queries):,} queries",
            f"Leave such queries out, {other}or give {FLAG} FILE with rows of theirs.",
        )  # fmt: skip
    return found if len(found) < len(queries) * len(train) else None


def stored_candidates(store: Store, queries: Corpus, train: Corpus) -> Candidates | None:
    """Those that the scoring in a directory chose when it began, if it did; DamagedFile for pairs
    that are none of these queries and examples, or in another order."""
    try:
        table = read_table(store, _FILE, _STORED, _STORED.names)
    except FileNotFoundError:
        return None
    found = Candidates(*(table[name].to_numpy() for name in _STORED.names))
    inside = (found.queries >= 0) & (found.queries < len(queries))
    inside &= (found.examples >= 0) & (found.examples < len(train))
    pairs = found.queries[inside] * len(train) + found.examples[inside]
    if not inside.all() or not (np.diff(pairs) > 0).all():
        raise store.damaged(_FILE, "pairs of queries and training examples, in order", "others")
    return found


def store_candidates(store: Store, chosen: Candidates) -> None:
    """Write them down: whatever finds candidates may find others of equal worth another time."""
    columns = (chosen.queries, chosen.examples)
    table = pa.table(dict(zip(_STORED.names, columns, strict=True)), schema=_STORED)
    write_table(store, _FILE, table)


def _listed(source: Source, queries: Corpus, train: Corpus) -> Candidates:
    """The pairs of a table, each once."""
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for part in open_parts(source):
        there = part.columns()
        missing = [name for name in _COLUMNS if there is not None and name not in there]
        if missing:
            raise UserError(
                f"{FLAG} {part.location}", "columns query_id and train_id",
                f"no {' and no '.join(missing)} among {', '.join(there or ())}",
                "Give a table with a row for each query and training example to score.",
            )  # fmt: skip
        for rows in part.read(tuple(_COLUMNS), ()):
            for name in _COLUMNS:
                columns[name].append(_as_text(rows.columns[name], part.location, name))
    numbers = [
        _numbers(pa.chunked_array(columns[name], pa.large_string()), corpus, name)
        for name, corpus in zip(_COLUMNS, (queries, train), strict=True)
    ]
    both = np.unique(numbers[0] * len(train) + numbers[1])
    return Candidates(*np.divmod(both, len(train)))


def _as_text(column: Any, location: str, name: str) -> Any:
    if pa.types.is_dictionary(column.type):  # as texts of a Parquet file are read
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return column.cast(pa.large_string())
    raise UserError(
        f"{FLAG} {location}", f"ids as text in {name}", str(kind), "Write them as text."
    )


def _numbers(ids: pa.ChunkedArray, corpus: Corpus, name: str) -> Array:
    found = pc.index_in(ids, value_set=corpus.ids)
    if found.null_count:
        unknown = pc.unique(ids.filter(pc.is_null(found)))
        named = ", ".join(repr(one.as_py()) for one in unknown[:3])
        example = corpus.ids[0].as_py()
        raise UserError(
            f"{FLAG}, {name}", f"ids of {_COLUMNS[name]}, such as {example!r}",
            f"{len(unknown):,} others: {named}{', …' if len(unknown) > 3 else ''}",
            "Take these rows out, or give the data that they are of. Ids are those of the column "
            "`id`, or made of file and row; --long split adds #0, #1, …; --max-examples leaves "
            "some out.",
        )  # fmt: skip
    return np.asarray(found.to_numpy(), np.int64)


def _matched(
    matching: Matching,
    queries: Corpus,
    train: Corpus,
    tokenizer: LazyTokenizer | None,
    advance: Callable[[int], object],
    room: Callable[[int], None],
) -> Candidates:
    def documents() -> Iterator[Sequence[Hashable]]:
        for some in in_parts(_terms(train, matching, tokenizer)):
            yield from some
            advance(len(some))

    asked = list(_terms(queries, matching, tokenizer))
    index = BM25(documents(), asked, matching.b, room)
    best = [index.best(query, matching.k) for query in range(len(asked))]
    numbers = np.repeat(np.arange(len(best)), [len(found) for found in best])
    return Candidates(numbers, np.concatenate(best))


def _check_room(needed: int) -> None:
    """Refuse an index of so many bytes that this machine's memory does not hold."""
    most, limit = memory_here()
    free = max(0, most - resident())
    if needed > free:
        raise UserError(
            f"{FLAG} bm25:K", f"an index of at most {size(free)}, the rest of the {limit}",
            f"{size(needed)} at most, for all terms that the queries share with the examples",
            f"Score fewer queries at a time, or a sample (--max-examples), give {FLAG} FILE, or "
            "start it all the same with --force.",
        )  # fmt: skip


def _terms(
    corpus: Corpus, matching: Matching, tokenizer: LazyTokenizer | None
) -> Iterator[Sequence[Hashable]]:
    """What of each example is matched: its tokens, with those that an encoder reads, or the words
    of the text that they spell."""
    for example in corpus.examples():
        if example.input_ids is None:
            raise UserError(
                f"{FLAG} bm25:K", "examples of tokens", f"numbers ({corpus.name})",
                f"Give {FLAG} FILE, a table with the columns query_id and train_id.",
            )  # fmt: skip
        source = () if example.source is None else example.source.tolist()
        tokens = [*source, *example.input_ids.tolist()]
        if matching.over == "tokens":
            yield tokens
            continue
        if tokenizer is None:
            raise UserError(
                f"{FLAG} bm25:K", "a tokenizer, to read words", "none",
                f"Write {FLAG} bm25:{matching.k},over=tokens, or give --tokenizer DIR.",
            )  # fmt: skip
        yield _WORD.findall(tokenizer.decode(tokens, special=False).lower())


@dataclass(frozen=True)
class Held:
    """What the candidates of some queries hold of their exact scores on all examples.

    Attributes:
        queries: how many were looked at.
        recall: mean share of a query's 10 highest scores.
        positive: mean share of the sum of a query's positive scores; ``None`` where none has any.
    """

    queries: int
    recall: float
    positive: float | None


def measure(
    store: Store, names: Sequence[str], candidates: Candidates, asked: Sequence[int],
    queries: Corpus, train: Corpus,
) -> Held:  # fmt: skip
    """What candidates hold of the scores in some files, which have each example on each query.

    Args:
        names: of the files.
        asked: numbers of the queries that they are of.
    """
    scores_QN = score_matrix(store, names, queries.named(asked), train.ids)
    recalls, shares = [], []
    for query, scores_N in zip(asked, scores_QN, strict=True):
        mine = np.zeros(len(train), bool)
        mine[candidates.of(query)] = True
        recalls.append(float(mine[np.argsort(-scores_N, kind="stable")[:TOP]].mean()))
        positive = np.maximum(scores_N, 0)
        if positive.any():
            shares.append(float(positive[mine].sum() / positive.sum()))
    return Held(len(asked), float(np.mean(recalls)), float(np.mean(shares)) if shares else None)
