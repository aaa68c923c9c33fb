"""What of finished scores a page shows: of each query the strongest rows, and where they come from.

One reading of the scores, a file at a time: memory does not grow with the training examples.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from raycurv.errors import DamagedFile
from raycurv.mathematics.influence.scores import BLOCK_SCORES, TOKEN_SCORES
from raycurv.reporting.charts import Array


@dataclass
class RankedQuery:
    """A query and its strongest rows.

    Attributes:
        id: of the query.
        rows: the highest and the lowest of its rows, highest first, as the scores have them.
        scored: how many rows there are.
        positive, negative: how many of them are above and below zero.
        gain: the sum of those above zero.
        block_sums: Σ |score| of every block over its rows; empty without ``--per-block``.
    """

    id: str
    rows: pa.Table
    scored: int = 0
    positive: int = 0
    negative: int = 0
    gain: float = 0.0
    block_sums: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def block_shares(self) -> Array:
        """Of each block, its share of the absolute scores; zeros where all are."""
        total = self.block_sums.sum()
        return self.block_sums / total if total else self.block_sums


@dataclass(frozen=True)
class Ranking:
    """The queries that are shown, in the order in which they were read.

    Attributes:
        blocks: names of the blocks whose scores were written; empty without ``--per-block``.
        tokens: whether scores of tokens were written.
    """

    queries: list[RankedQuery]
    blocks: list[str]
    tokens: bool

    def frequent(self, places: int) -> list[tuple[str, int]]:
        """Training examples among the highest ``places`` of several queries, and of how many."""
        counts = Counter(
            row["train_id"]
            for query in self.queries
            for row in query.rows.select(["train_id", "score"]).slice(0, places).to_pylist()
            if row["score"] > 0
        )
        return [(id, count) for id, count in counts.most_common(20) if count > 1]


def rank(parts: Iterable[pa.Table], most: int, places: int, where: str) -> Ranking:
    """Rank the rows of each query.

    Args:
        parts: tables of scores, together all of them.
        most: queries that are kept, the first ones.
        places: rows that are kept at either end.
        where: the scores lie, for errors.

    Raises:
        DamagedFile: a row has scores of other blocks.
    """
    found: dict[str, RankedQuery] = {}
    blocks: list[str] = []
    tokens = False
    for part in parts:
        blocks = blocks or _blocks(part)
        tokens |= TOKEN_SCORES in part.column_names
        coded = part["query_id"].combine_chunks().dictionary_encode()
        names: Sequence[str] = coded.dictionary.to_pylist()
        codes, scores = coded.indices.to_numpy(), part["score"].to_numpy().astype(np.float64)
        sizes = _sizes(part, len(blocks), where)
        order = np.lexsort((-scores, codes))
        stops = np.cumsum(np.bincount(codes, minlength=len(names)))
        for name, rows in zip(names, np.split(order, stops[:-1]), strict=True):
            if name not in found:
                if len(found) == most:
                    continue
                found[name] = RankedQuery(name, part.slice(0, 0), block_sums=np.zeros(len(blocks)))
            query, own = found[name], scores[rows]
            query.scored += len(rows)
            query.positive += int((own > 0).sum())
            query.negative += int((own < 0).sum())
            query.gain += float(own[own > 0].sum())
            if sizes is not None:
                query.block_sums += sizes[rows].sum(axis=0)
            best = pa.concat_tables([query.rows, part.take(_ends(rows, places))])
            falling = np.argsort(-best["score"].to_numpy(), kind="stable")
            query.rows = best.take(_ends(falling, places))
    return Ranking(list(found.values()), blocks, tokens)


def _ends(rows: Array, places: int) -> pa.Array:
    """The first and the last of some rows, each once."""
    return pa.array(rows if len(rows) <= 2 * places else np.r_[rows[:places], rows[-places:]])


def _blocks(part: pa.Table) -> list[str]:
    if BLOCK_SCORES not in part.column_names:
        return []
    names: list[str] = json.loads((part.schema.metadata or {}).get(b"raycurv.blocks", b"[]"))
    return names


def _sizes(part: pa.Table, blocks: int, where: str) -> Array | None:
    """``|score|`` of every row and block; ``None`` where there are none."""
    if BLOCK_SCORES not in part.column_names:
        return None
    lists = part[BLOCK_SCORES].combine_chunks()
    flat: Any = lists.flatten().to_numpy(zero_copy_only=False)
    if not blocks or len(flat) != len(part) * blocks:
        raise DamagedFile(
            where, f"{blocks} block scores in each of {len(part):,} rows", f"{len(flat):,} in all",
            "Score again into another directory.",
        )  # fmt: skip
    sizes: Array = np.abs(flat.reshape(len(part), blocks), dtype=np.float64)
    return sizes
