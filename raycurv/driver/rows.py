"""What the driver collects from a pass, example by example, and how it leaves it in Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raycurv.driver.corpus import PART, Corpus, DrawnLabels
from raycurv.driver.feed import Results
from raycurv.files.store import Store
from raycurv.files.tables import (
    examples_schema,
    read_table,
    scores_schema,
    self_schema,
    write_table,
)
from raycurv.mathematics.gradient_statistics import BLOCK_NORMS
from raycurv.mathematics.rank_inverse import RankInverses
from raycurv.mathematics.rank_scores import whole_self_scores

# Numbers that may wait in memory for the next commit.
_FULL = 8_000_000

Array = np.ndarray[Any, Any]


class ExampleRows:
    """Losses, squared gradient norms (by block as well), drawn labels and correct predictions.

    Args:
        store: of the run.
        lengths: tokens of every example, to cut padding off labels drawn for each; ``None`` where
            labels are not one a token.
    """

    def __init__(self, store: Store, lengths: Sequence[int] | None) -> None:
        self._store, self._lengths = store, lengths
        self._rows: list[dict[str, Any]] = []
        self._size = 0

    @property
    def full(self) -> bool:
        return self._size > _FULL

    def take(self, members: Sequence[int], results: Results) -> None:
        norms, loss, drawn = (results.get(k) for k in ("gradient_sq_norm", "loss", "drawn"))
        correct = results.get("correct")
        by_block = results.get(BLOCK_NORMS)
        for i, n in enumerate(members):
            y = None if drawn is None else drawn[:, i].numpy()
            if y is not None and self._lengths is not None:
                y = y[:, : self._lengths[n]]
            self._rows.append(
                {
                    "index": n,
                    "loss": None if loss is None else float(loss[i]),
                    "gradient_sq_norm": None if norms is None else float(norms[i]),
                    "drawn": None if y is None else y.reshape(-1),
                    "shape": None if y is None else list(y.shape),
                    "correct": None if correct is None else int(correct[i]),
                    BLOCK_NORMS: None if by_block is None else by_block[i].numpy(),
                }
            )
            self._size += 4 + (0 if y is None else y.size)
            self._size += 0 if by_block is None else by_block.shape[1]

    def commit(self, name: str) -> list[str]:
        if not self._rows:
            return []
        drawn = [r["drawn"] for r in self._rows]
        table = pa.table(
            {
                "index": [r["index"] for r in self._rows],
                "loss": pa.array([r["loss"] for r in self._rows], pa.float64()),
                "gradient_sq_norm": pa.array(
                    [r["gradient_sq_norm"] for r in self._rows], pa.float64()
                ),
                "drawn": pa.array(drawn),
                "shape": pa.array([r["shape"] for r in self._rows], pa.list_(pa.int32())),
                "correct": pa.array([r["correct"] for r in self._rows], pa.int32()),
                BLOCK_NORMS: pa.array([r[BLOCK_NORMS] for r in self._rows], pa.list_(pa.float64())),
            }
        )
        write_table(self._store, f"{name}/rows.parquet", table)
        self.forget()
        return [f"{name}/rows.parquet"]

    def forget(self) -> None:
        self._rows, self._size = [], 0


def as_lists(values: Array, number: pa.DataType) -> pa.ListArray:
    """The rows of a matrix as lists of numbers."""
    offsets = pa.array(np.arange(len(values) + 1) * values.shape[1], pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)).cast(number))


def rows_by_part(store: Store, names: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """Rows of a pass, a part of the data at a time, in the data's order.

    A pass goes through the windows of the data in order, so the rows of a part stand together.
    """
    held: list[pa.Table] = []
    part = 0

    def whole() -> pa.Table:
        return pa.concat_tables(held, promote_options="permissive").sort_by("index")

    for name in names:
        table = read_table(store, name)
        while len(table):
            inside = pc.less(table["index"], (part + 1) * PART)
            mine = table.filter(inside)
            rest = table.filter(pc.invert(inside))
            held.append(mine)
            if len(rest):
                yield part, whole()
                held, part = [], part + 1
            table = rest
    if held:
        yield part, whole()


def write_drawn(store: Store, names: Sequence[str], labels: DrawnLabels) -> None:
    """Put the drawn labels among a pass's rows where later passes read them."""
    for part, table in rows_by_part(store, names):
        flat = table["drawn"].combine_chunks()
        shapes = table["shape"].to_pylist()
        labels.write(
            part,
            [
                flat[i].values.to_numpy(zero_copy_only=False).reshape(shapes[i])
                for i in range(len(flat))
            ],
        )


def write_examples(
    store: Store,
    names: Sequence[str],
    corpus: Corpus,
    double: bool,
    notes: dict[str, str],
    before: int = 0,
) -> None:
    """``tables/examples`` from a pass's rows, one file a part of the data.

    Args:
        before: how many files of other rows there are.
    """
    schema = examples_schema(double)
    for part, table in rows_by_part(store, names):
        index = table["index"].to_pylist()
        rows = pa.table(
            {
                "id": [corpus.ids[n] for n in index],
                "tokens": pa.array([corpus.lengths[n] for n in index], pa.int32()),
                "loss": table["loss"].cast(schema.field("loss").type),
                "gradient_sq_norm": table["gradient_sq_norm"].cast(
                    schema.field("gradient_sq_norm").type
                ),
            },
            schema=schema,
        )
        write_table(store, f"tables/examples/part-{before + part:05d}.parquet", rows, notes)


class ScoreRows:
    """Scores of a pass over the training examples, streamed to Parquet.

    Args:
        store: of the results.
        part: prefix of this pass's files.
        queries: ids.
        train: the training examples.
        double: float64 scores.
        top_k: keep only each query's k highest and k lowest (of a file; see :func:`merge_top`).
        notes: footers of the scores, and of self-influence.
        inverses: of M-FAC, to make self-influence of what the stages gave.
    """

    def __init__(
        self,
        store: Store,
        part: str,
        queries: Sequence[str],
        train: Corpus,
        double: bool,
        per_block: bool,
        per_token: bool,
        top_k: int | None,
        notes: dict[str, str],
        inverses: RankInverses | None = None,
    ) -> None:
        self._inverses = inverses
        self._store, self._part, self._queries, self._train = store, part, list(queries), train
        self._per_block, self._per_token, self._top_k = per_block, per_token, top_k
        self._schema = scores_schema(double, per_block, per_token)
        self._self_schema = self_schema(double)
        self._notes = notes
        self.forget()

    def forget(self) -> None:
        self._members: list[int] = []
        self._scores: list[Array] = []
        self._blocks: list[Array] = []
        self._tokens: list[Array] = []
        self._self: list[Array] = []
        self._size = 0

    @property
    def full(self) -> bool:
        return self._size > _FULL

    def take(self, members: Sequence[int], results: Results) -> None:
        if self._inverses is not None:
            results = whole_self_scores(self._inverses, results)
        self._members += members
        self._scores.append(results["scores"].numpy())
        self._size += results["scores"].numel()
        if "self_scores" in results:
            self._self.append(results["self_scores"].numpy())
            self._size += results["self_scores"].numel()
        if self._per_block:
            self._blocks.append(results["block_scores"].numpy())
            self._size += results["block_scores"].numel()
        if self._per_token:
            self._tokens += list(results["token_scores"].numpy())
            self._size += results["token_scores"].numel()

    def commit(self, name: str) -> list[str]:
        """Write what waits; the files' numbers are how many microbatches were done."""
        if not self._members:
            return []
        number = name.rpartition("/")[2]
        order = np.argsort(np.array(self._members), kind="stable")
        ids = pa.array([self._train.ids[self._members[i]] for i in order], pa.string())
        written = []
        if self._self:
            own = np.concatenate(self._self)[order]
            table = pa.table(
                {"id": ids, "score": pa.array(own).cast(self._self_schema.field("score").type)},
                schema=self._self_schema,
            )
            written.append(f"self/{self._part}-{number}.parquet")
            write_table(self._store, written[-1], table, self._notes)
        directory = "scores" if self._top_k is None else "work/top"
        written.append(f"{directory}/{self._part}-{number}.parquet")
        write_table(self._store, written[-1], self._table(order, ids), self._notes)
        self.forget()
        return written

    def _table(self, order: Array, ids: pa.Array) -> pa.Table:
        scores_NQ = np.concatenate(self._scores)[order]
        n_rows, q_rows = self._rows(scores_NQ)
        columns: dict[str, Any] = {
            "query_id": pa.array(self._queries, pa.string()).take(pa.array(q_rows)),
            "train_id": ids.take(pa.array(n_rows)),
            "score": pa.array(scores_NQ[n_rows, q_rows]).cast(self._schema.field("score").type),
        }
        if self._per_block:
            blocks = np.concatenate(self._blocks)[order][n_rows, q_rows]
            number = self._schema.field("block_scores").type.value_type
            columns["block_scores"] = as_lists(blocks, number)
        if self._per_token:
            number = self._schema.field("token_scores").type.value_type
            lists = []
            for n, q in zip(n_rows, q_rows, strict=True):
                example = order[n]
                length = self._train.lengths[self._members[example]]
                lists.append(self._tokens[example][q, :length])
            columns["token_scores"] = pa.array(lists, pa.list_(pa.float64())).cast(pa.list_(number))
        return pa.table(columns, schema=self._schema)

    def _rows(self, scores_NQ: Array) -> tuple[Array, Array]:
        """Which (example, query) pairs are written, example by example."""
        n, q = scores_NQ.shape
        if self._top_k is None or n <= 2 * self._top_k:
            return np.repeat(np.arange(n), q), np.tile(np.arange(q), n)
        kept = np.sort(_extremes(scores_NQ.T, self._top_k), axis=1)
        return kept.reshape(-1), np.repeat(np.arange(q), kept.shape[1])


def _extremes(scores_QN: Array, k: int) -> Array:
    """Places of the k highest and k lowest of every row of more than 2k, ``[Q, 2k]``."""
    falling = np.argsort(-scores_QN, axis=1, kind="stable")
    return np.concatenate([falling[:, :k], falling[:, -k:]], axis=1)


def merge_top(
    store: Store,
    names: Sequence[str],
    queries: Sequence[str],
    k: int,
    notes: dict[str, str],
    into: str,
) -> None:
    """One file with each query's k highest and k lowest rows, highest first."""
    value_set = pa.array(list(queries), pa.string())
    best: pa.Table | None = None
    for name in names:
        table = read_table(store, name)
        best = table if best is None else pa.concat_tables([best, table])
        query = pc.index_in(best["query_id"], value_set=value_set).to_numpy()
        order = np.lexsort((-best["score"].to_numpy(), query))
        counts = np.bincount(query, minlength=len(queries))
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        place = np.arange(len(order)) - starts
        kept = (place < k) | (place >= np.repeat(counts, counts) - k)
        best = best.take(pa.array(order[kept]))
    assert best is not None
    write_table(store, into, best, notes)
