"""Okapi BM25 (Robertson and Zaragoza 2009, section 3): which documents share a query's rarer terms.

    score(q, d) = Σ_{t in q} IDF(t) (k₁ + 1) f / (f + k₁ (1 − b + b |d| / mean |d|))
    IDF(t)      = log((C − n_t + ½) / (n_t + ½) + 1)

f: how often term t stands in document d, of |d| terms; n_t: how many of the C documents have t.
That is ``lucene`` of the package bm25s, times k₁ + 1. Terms are tokens, or the words of a text.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from raycurv.errors import UserError

K1 = 1.5
# Memory of each different term of a document that some query has, while bm25s makes its index:
# 44 were measured of 4 million, beside what is held of the documents.
_INDEX_BYTES = 48
_PREFIX = "bm25:"
_SPELLING = "bm25:K, bm25:K,b=0.75 or bm25:K,over=tokens"

Array = np.ndarray[Any, Any]
Terms = Literal["words", "tokens"]


@dataclass(frozen=True)
class Matching:
    """How documents are chosen for a query: the k of the highest scores.

    Attributes:
        k: how many.
        b: how far scores are divided by a document's length: 0 not at all, 1 in proportion.
        over: what terms are.
    """

    k: int
    b: float = 0.75
    over: Terms = "words"

    @classmethod
    def parse(cls, flag: str, text: str) -> Matching | None:
        """What ``bm25:K``, ``bm25:K,b=0`` or ``bm25:K,b=0,over=tokens`` says; ``None`` for what
        does not begin so.

        Raises:
            UserError: it does, and cannot be read.
        """
        if not text.startswith(_PREFIX):
            return None
        number, *options = text.removeprefix(_PREFIX).split(",")
        said = dict(option.partition("=")[::2] for option in options)
        b, over = said.pop("b", "0.75"), said.pop("over", "words")
        try:
            found = cls(int(number), float(b), over)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(flag, _SPELLING, f"{text!r} ({error})", "") from error
        if said or len(options) != len({option.partition("=")[0] for option in options}):
            raise UserError(flag, _SPELLING, repr(text), "Give each of b and over once at most.")
        if found.k < 1:
            raise UserError(flag, "a number K of at least 1", repr(text), "Give bm25:100, say.")
        if not 0 <= found.b <= 1:
            raise UserError(flag, "b from 0 to 1", repr(text), "Leave it out for 0.75.")
        if found.over not in get_args(Terms):
            raise UserError(flag, f"over={' or over='.join(get_args(Terms))}", repr(text), "")
        return found


class _Documents:
    """The terms of documents that some query has, numbered: what of each counts for its score.

    In memory a document is 16 bytes, and 4 for each of these terms.

    Attributes:
        different: how many different ones each document has, added up.
    """

    def __init__(
        self, documents: Iterable[Sequence[Hashable]], numbers: dict[Hashable, int]
    ) -> None:
        self._terms, self._ends, self._lengths = array("i"), array("q", [0]), array("q")
        self.different = 0
        for terms in documents:
            own = [numbers[term] for term in terms if term in numbers]
            self.different += len(set(own))
            self._terms.extend(own)
            self._ends.append(len(self._terms))
            self._lengths.append(len(terms))

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[_Document]:
        for n, length in enumerate(self._lengths):
            yield _Document(length, self._terms[self._ends[n] : self._ends[n + 1]])


@dataclass(frozen=True)
class _Document:
    """As long as the whole document; iterates over the terms that count."""

    length: int
    terms: array[int]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(self.terms)


class BM25:
    """Scores of documents on queries that are known before the documents are read.

    Args:
        documents: their terms, read once.
        queries: their terms; one that comes twice counts twice.
        b: how far scores are divided by a document's length: 0 not at all, 1 in proportion.
        room: is told the bytes that the index will take, once documents are read; raises what stops
            it.

    Raises:
        UserError: the package bm25s is not installed.
    """

    def __init__(
        self,
        documents: Iterable[Sequence[Hashable]],
        queries: Sequence[Sequence[Hashable]],
        b: float,
        room: Callable[[int], object] = lambda needed: None,
    ) -> None:
        check_installed()
        import bm25s

        numbers = {term: n for n, term in enumerate(dict.fromkeys(t for q in queries for t in q))}
        self._queries = [[numbers[term] for term in query] for query in queries]
        kept = _Documents(documents, numbers)
        room(_INDEX_BYTES * kept.different)
        self._index = bm25s.BM25(k1=K1, b=b, method="lucene", dtype="float64")
        self._index.scores = self._index.build_index_from_ids(
            list(numbers.values()), kept, show_progress=False
        )

    def scores(self, query: int) -> Array:
        """The scores of all documents on a query, float64 ``[C]``; 0 where no term is shared."""
        found: Array = self._index.get_scores_from_ids(self._queries[query])
        return found * (K1 + 1)

    def best(self, query: int, k: int) -> Array:
        """Numbers of the k documents of the highest scores on a query, ascending; the earlier ones
        of equal scores, and none of score 0."""
        scores = self.scores(query)
        there = np.flatnonzero(scores > 0)
        order = np.argsort(-scores[there], kind="stable")
        return np.sort(there[order[:k]])


def check_installed() -> None:
    """Refuse, with a UserError, to go on without the package that makes the index."""
    try:
        import bm25s  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--candidates bm25:K", "the package bm25s", f"none ({error})",
            "Install it (pip install 'raycurv[candidates]'), or give --candidates FILE.",
        ) from error  # fmt: skip
