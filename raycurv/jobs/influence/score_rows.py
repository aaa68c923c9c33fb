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
from raycurv.jobs.influence.candidates import Pairs
from raycurv.jobs.influence.influence_settings import InfluenceSettings
from raycurv.mathematics.influence.scores import SCORES, SELF_SCORES, PairwiseScores
from raycurv.mathematics.rank.rank_inverse import RankInverses
from raycurv.mathematics.rank.rank_scores import joint_self_scores
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
        pairs: those that are written; ``None`` for all.
        directory: where files of scores go.
    """

    store: Store
    part: str
    queries: Sequence[str]
    train: Corpus
    settings: InfluenceSettings
    double: bool
    notes: dict[str, str]
    inverses: RankInverses | None = None
    pairs: Pairs | None = None
    directory: str = "scores"

    def __post_init__(self) -> None:
        super().__init__()
        self._self_schema = self_schema(self.double)
        # Lists of tokens by column, one array a microbatch, since every one has its own length.
        self._tokens: dict[str, list[Array]] = {}

    def forget(self) -> None:
        super().forget()
        self._tokens = {}

    def take(self, members: Sequence[int], results: Results) -> None:
        if self.inverses is not None:
            results = joint_self_scores(self.inverses, results)
        self._put("members", np.array(members, np.int64))
        for name, found in results.items():
            if PairwiseScores.columns.get(name) == "tokens":
                self._tokens.setdefault(name, []).append(found.numpy())
                self._size += found.numel()
            elif name == SELF_SCORES or name in PairwiseScores.columns:
                self._put(name, found.numpy())

    def commit(self, name: str) -> list[str]:
        """Write what waits; the files' numbers are how many microbatches were done."""
        if not self._piles:
            return []
        file = f"{self.part}-{name.rpartition('/')[2]}.parquet"
        members = self._piles["members"].whole()
        order = np.argsort(members, kind="stable")
        written = []
        if SELF_SCORES in self._piles:
            written.append(f"self/{file}")
            own = self._own_tables(members, order)
            write_tables(self.store, written[-1], self._self_schema, own, self.notes, repeated=[])
        directory = self.directory if self.settings.top_k is None else "work/top"
        written.append(f"{directory}/{file}")
        kinds = PairwiseScores.columns
        more = [n for n in kinds if n != SCORES and (n in self._piles or n in self._tokens)]
        schema = scores_schema(self.double, {name: kinds[name] != "number" for name in more})
        tables = self._tables(schema, more, members, order)
        write_tables(self.store, written[-1], schema, tables, self.notes, repeated=["query_id"])
        self.forget()
        return written

    def finished(self, names: Sequence[str]) -> list[str]:
        """The files of a pass when all are written; with ``top_k`` one of scores, which has each
        query's k highest and k lowest rows of all, highest first."""
        if self.settings.top_k is None:
            return list(names)
        tops = [name for name in names if name.startswith("work/top/")]
        into = f"{self.directory}/{self.part}-top.parquet"
        best = self._best(tops, self.settings.top_k)
        write_table(self.store, into, best, self.notes)
        return [*(name for name in names if name not in tops), into]

    def _own_tables(self, members: Array, order: Array) -> Iterator[pa.Table]:
        own, number = self._piles[SELF_SCORES].whole(), self._self_schema.field("score").type
        if self.pairs is not None:
            order = order[self.pairs.own[members[order]]]
        for start in range(0, len(order), ROWS):
            taken = order[start : start + ROWS]
            ids, scores = self.train.named(members[taken]), pa.array(own[taken]).cast(number)
            yield pa.table({"id": ids, "score": scores}, schema=self._self_schema)

    def _tables(
        self, schema: pa.Schema, more: Sequence[str], members: Array, order: Array
    ) -> Iterator[pa.Table]:
        """The rows, some at a time: with their ids they take far more than the scores alone."""
        scores_NQ = self._piles[SCORES].whole()
        queries, number = pa.array(list(self.queries), pa.string()), schema.field("score").type
        for n_rows, q_rows in self._rows(scores_NQ, members, order):
            taken = order[n_rows]
            columns: dict[str, Any] = {
                "query_id": queries.take(pa.array(q_rows)),
                "train_id": self.train.named(members[taken]),
                "score": pa.array(scores_NQ[taken, q_rows]).cast(number),
            }
            for name in more:
                if name in self._tokens:
                    lists = pa.array(self._of_tokens(name, members, taken, q_rows))
                    columns[name] = lists.cast(pa.list_(number))
                    continue
                values = self._piles[name].whole()[taken, q_rows]
                is_list = values.ndim > 1
                columns[name] = as_lists(values, number) if is_list else pa.array(values)
            yield pa.table(columns, schema=schema)

    def _of_tokens(self, name: str, members: Array, taken: Array, q_rows: Array) -> Iterator[Array]:
        """A list for each row, cut to the tokens of its example."""
        parts = self._tokens[name]
        begins = np.cumsum([0, *(len(part) for part in parts)])
        for n, q in zip(taken, q_rows, strict=True):
            m = int(np.searchsorted(begins, n, side="right")) - 1
            yield parts[m][n - begins[m], q, : self.train.lengths[members[n]]]

    def _rows(
        self, scores_NQ: Array, members: Array, order: Array
    ) -> Iterator[tuple[Array, Array]]:
        """Which (example, query) pairs are written, example by example, some at a time."""
        n, q = scores_NQ.shape
        k = self.settings.top_k
        if self.pairs is not None:
            n_rows, q_rows = self.pairs.of(members[order])
        elif k is None or n <= 2 * k:
            for start in range(0, n * q, ROWS):
                yield np.divmod(np.arange(start, min(start + ROWS, n * q)), q)
            return
        else:
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


def _extremes(scores_QN: Array, k: int) -> Array:
    """Places of the k highest and k lowest of every row of more than 2k, ``[Q, 2k]``."""
    falling = np.argsort(-scores_QN, axis=1, kind="stable")
    return np.concatenate([falling[:, :k], falling[:, -k:]], axis=1)
