"""What the driver collects of scores, and how it leaves them in Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raycurv.driver.corpus import Corpus
from raycurv.driver.sinks import Array, Rows
from raycurv.files.store import Store
from raycurv.files.tables import (
    ROWS,
    as_lists,
    read_table,
    scores_schema,
    self_schema,
    write_table,
    write_tables,
)
from raycurv.jobs.influence.influence_settings import InfluenceSettings
from raycurv.mathematics.rank.rank_inverse import RankInverses
from raycurv.mathematics.rank.rank_scores import whole_self_scores
from raycurv.mathematics.sums import Results


@dataclass
class ScoreRows(Rows):
    """Scores of a pass over the training examples, streamed to Parquet.

    Attributes:
        part: prefix of this pass's files.
        queries: ids.
        settings: which scores are written; with ``top_k`` only each query's k highest and k lowest
            of a file, of which :meth:`finished` makes one.
        inverses: of M-FAC, to make self-influence of what the stages gave.
    """

    store: Store
    part: str
    queries: Sequence[str]
    train: Corpus
    settings: InfluenceSettings
    double: bool
    notes: dict[str, str]
    inverses: RankInverses | None = None

    def __post_init__(self) -> None:
        super().__init__()
        settings = self.settings
        self._schema = scores_schema(self.double, settings.per_block, settings.per_token)
        self._self_schema = self_schema(self.double)
        # Of each microbatch, since every one has its own length.
        self._tokens: list[Array] = []

    def forget(self) -> None:
        super().forget()
        self._tokens = []

    def take(self, members: Sequence[int], results: Results) -> None:
        if self.inverses is not None:
            results = whole_self_scores(self.inverses, results)
        self._put("members", np.array(members, np.int64))
        for name in ("scores", "self_scores", "block_scores"):
            if name in results:
                self._put(name, results[name].numpy())
        if "token_scores" in results:
            self._tokens.append(results["token_scores"].numpy())
            self._size += results["token_scores"].numel()

    def commit(self, name: str) -> list[str]:
        """Write what waits; the files' numbers are how many microbatches were done."""
        if not self._piles:
            return []
        file = f"{self.part}-{name.rpartition('/')[2]}.parquet"
        members = self._piles["members"].whole()
        order = np.argsort(members, kind="stable")
        written = []
        if "self_scores" in self._piles:
            written.append(f"self/{file}")
            own = self._own_tables(members, order)
            write_tables(self.store, written[-1], self._self_schema, own, self.notes, repeated=[])
        directory = "scores" if self.settings.top_k is None else "work/top"
        written.append(f"{directory}/{file}")
        tables = self._tables(members, order)
        write_tables(
            self.store, written[-1], self._schema, tables, self.notes, repeated=["query_id"]
        )
        self.forget()
        return written

    def finished(self, names: Sequence[str]) -> list[str]:
        """The files of a pass when all are written; with ``top_k`` one of scores, which has each
        query's k highest and k lowest rows of all, highest first."""
        if self.settings.top_k is None:
            return list(names)
        tops = [name for name in names if name.startswith("work/top/")]
        into = f"scores/{self.part}-top.parquet"
        best = self._best(tops, self.settings.top_k)
        write_table(self.store, into, best, self.notes)
        return [*(name for name in names if name not in tops), into]

    def _own_tables(self, members: Array, order: Array) -> Iterator[pa.Table]:
        own, number = self._piles["self_scores"].whole(), self._self_schema.field("score").type
        for start in range(0, len(order), ROWS):
            taken = order[start : start + ROWS]
            ids, scores = self.train.named(members[taken]), pa.array(own[taken]).cast(number)
            yield pa.table({"id": ids, "score": scores}, schema=self._self_schema)

    def _tables(self, members: Array, order: Array) -> Iterator[pa.Table]:
        """The rows, some at a time: with their ids they take far more than the scores alone."""
        scores_NQ = self._piles["scores"].whole()
        queries = pa.array(list(self.queries), pa.string())
        places = _places(self._tokens)
        for n_rows, q_rows in self._rows(scores_NQ, order):
            taken = order[n_rows]
            columns: dict[str, Any] = {
                "query_id": queries.take(pa.array(q_rows)),
                "train_id": self.train.named(members[taken]),
                "score": pa.array(scores_NQ[taken, q_rows]).cast(self._schema.field("score").type),
            }
            if self.settings.per_block:
                blocks = self._piles["block_scores"].whole()[taken, q_rows]
                number = self._schema.field("block_scores").type.value_type
                columns["block_scores"] = as_lists(blocks, number)
            if self.settings.per_token:
                number = self._schema.field("token_scores").type.value_type
                lists = []
                for n, q in zip(taken, q_rows, strict=True):
                    m = int(np.searchsorted(places, n, side="right")) - 1
                    length = self.train.lengths[members[n]]
                    lists.append(self._tokens[m][n - places[m], q, :length])
                lists_ = pa.array(lists, pa.list_(pa.float64()))
                columns["token_scores"] = lists_.cast(pa.list_(number))
            yield pa.table(columns, schema=self._schema)

    def _rows(self, scores_NQ: Array, order: Array) -> Iterator[tuple[Array, Array]]:
        """Which (example, query) pairs are written, example by example, some at a time."""
        n, q = scores_NQ.shape
        k = self.settings.top_k
        if k is None or n <= 2 * k:
            for start in range(0, n * q, ROWS):
                yield np.divmod(np.arange(start, min(start + ROWS, n * q)), q)
            return
        kept = np.sort(_extremes(scores_NQ[order].T, k), axis=1)
        n_rows, q_rows = kept.reshape(-1), np.repeat(np.arange(q), kept.shape[1])
        for start in range(0, len(n_rows), ROWS):
            yield n_rows[start : start + ROWS], q_rows[start : start + ROWS]

    def _best(self, names: Sequence[str], k: int) -> pa.Table:
        """Each query's k highest and k lowest of the rows in some files."""
        queries = pa.array(list(self.queries), pa.string())
        best: pa.Table | None = None
        for name in names:
            table = read_table(self.store, name)
            best = table if best is None else pa.concat_tables([best, table])
            query = pc.index_in(best["query_id"], value_set=queries).to_numpy()
            order = np.lexsort((-best["score"].to_numpy(), query))
            counts = np.bincount(query, minlength=len(queries))
            starts = np.repeat(np.cumsum(counts) - counts, counts)
            place = np.arange(len(order)) - starts
            kept = (place < k) | (place >= np.repeat(counts, counts) - k)
            best = best.take(pa.array(order[kept]))
        assert best is not None
        return best


def _places(parts: Sequence[Array]) -> Array:
    """Where the rows of each part begin among those of all."""
    return np.cumsum([0, *(len(part) for part in parts)])


def _extremes(scores_QN: Array, k: int) -> Array:
    """Places of the k highest and k lowest of every row of more than 2k, ``[Q, 2k]``."""
    falling = np.argsort(-scores_QN, axis=1, kind="stable")
    return np.concatenate([falling[:, :k], falling[:, -k:]], axis=1)
