"""What the driver collects from a pass, example by example, and how it leaves it in Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raycurv.driver.corpus import PART, Corpus, DrawnLabels
from raycurv.files.store import Store
from raycurv.files.tables import (
    ROWS,
    as_lists,
    examples_schema,
    read_table,
    scores_schema,
    self_schema,
    write_table,
    write_tables,
)
from raycurv.mathematics.gradient_statistics import BLOCK_NORMS
from raycurv.mathematics.rank.rank_inverse import RankInverses
from raycurv.mathematics.rank.rank_scores import whole_self_scores
from raycurv.mathematics.sums import Results

# Numbers that may wait in memory for the next commit.
_FULL = 8_000_000
# Arrays on a pile that become one.
_SMALL = 256

Array = np.ndarray[Any, Any]


class Pile:
    """Arrays of like rows, until they are written: few objects, however many are put on it."""

    def __init__(self) -> None:
        self._parts: list[Array] = []
        self._small = 0

    def put(self, rows: Array) -> None:
        """Put some rows on it; they are copied in the end."""
        self._parts.append(rows)
        self._small += 1
        if self._small == _SMALL:
            self._parts[-_SMALL:] = [np.concatenate(self._parts[-_SMALL:])]
            self._small = 0

    def whole(self) -> Array:
        """All rows, in order."""
        if len(self._parts) > 1:
            self._parts, self._small = [np.concatenate(self._parts)], 0
        return self._parts[0]

    def __bool__(self) -> bool:
        return bool(self._parts)


class ExampleRows:
    """Losses, squared gradient norms (by block as well), drawn labels and correct predictions.

    Args:
        store: of the run.
        lengths: tokens of every example, to cut padding off labels drawn for each; ``None`` where
            labels are not one a token.
    """

    def __init__(self, store: Store, lengths: Array | None) -> None:
        self._store, self._lengths = store, lengths
        self.forget()

    @property
    def full(self) -> bool:
        return self._size > _FULL

    def take(self, members: Sequence[int], results: Results) -> None:
        self._put("index", np.array(members, np.int64))
        for name in ("loss", "gradient_sq_norm", "correct", BLOCK_NORMS):
            if name in results:
                self._put(name, results[name].numpy())
        drawn = results.get("drawn")
        if drawn is None:
            return
        for i, n in enumerate(members):
            y = drawn[:, i].numpy()
            if self._lengths is not None:
                y = y[:, : self._lengths[n]]
            self._put("drawn", y.reshape(-1))
            self._put("shape", np.array([y.shape], np.int32))

    def _put(self, name: str, rows: Array) -> None:
        self._piles.setdefault(name, Pile()).put(rows)
        self._size += rows.size

    def commit(self, name: str) -> list[str]:
        if not self._piles:
            return []
        index = self._piles["index"].whole()
        columns: dict[str, Any] = {"index": index}
        for key, number in (("loss", pa.float64()), ("gradient_sq_norm", pa.float64())):
            columns[key] = self._column(key, number, len(index))
        columns["drawn"], columns["shape"] = self._drawn(len(index))
        columns["correct"] = self._column("correct", pa.int32(), len(index))
        if BLOCK_NORMS in self._piles:
            columns[BLOCK_NORMS] = as_lists(self._piles[BLOCK_NORMS].whole(), pa.float64())
        else:
            columns[BLOCK_NORMS] = pa.nulls(len(index), pa.list_(pa.float64()))
        write_table(self._store, f"{name}/rows.parquet", pa.table(columns))
        self.forget()
        return [f"{name}/rows.parquet"]

    def _column(self, name: str, number: pa.DataType, count: int) -> pa.Array:
        if name not in self._piles:
            return pa.nulls(count, number)
        return pa.array(self._piles[name].whole()).cast(number)

    def _drawn(self, count: int) -> tuple[pa.Array, pa.Array]:
        """The labels of every example in one list, and their shapes."""
        if "drawn" not in self._piles:
            return pa.nulls(count), pa.nulls(count, pa.list_(pa.int32()))
        shapes = self._piles["shape"].whole()
        offsets = np.concatenate([[0], np.cumsum(shapes.prod(axis=1, dtype=np.int64))])
        values = pa.array(self._piles["drawn"].whole())
        lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
        return lists, as_lists(shapes, pa.int32())

    def forget(self) -> None:
        self._piles: dict[str, Pile] = {}
        self._size = 0


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
        index = table["index"].to_numpy()
        rows = pa.table(
            {
                "id": corpus.named(index),
                "tokens": corpus.lengths[index],
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
        self._members, self._scores, self._self = Pile(), Pile(), Pile()
        self._blocks = Pile()
        # Of each microbatch, since every one has its own length.
        self._tokens: list[Array] = []
        self._size = 0

    @property
    def full(self) -> bool:
        return self._size > _FULL

    def take(self, members: Sequence[int], results: Results) -> None:
        if self._inverses is not None:
            results = whole_self_scores(self._inverses, results)
        self._put(self._members, np.array(members, np.int64))
        self._put(self._scores, results["scores"].numpy())
        if "self_scores" in results:
            self._put(self._self, results["self_scores"].numpy())
        if self._per_block:
            self._put(self._blocks, results["block_scores"].numpy())
        if self._per_token:
            self._tokens.append(results["token_scores"].numpy())
            self._size += results["token_scores"].numel()

    def _put(self, pile: Pile, rows: Array) -> None:
        pile.put(rows)
        self._size += rows.size

    def commit(self, name: str) -> list[str]:
        """Write what waits; the files' numbers are how many microbatches were done."""
        if not self._members:
            return []
        number = name.rpartition("/")[2]
        members = self._members.whole()
        order = np.argsort(members, kind="stable")
        written = []
        if self._self:
            written.append(f"self/{self._part}-{number}.parquet")
            own = self._own_tables(members, order)
            write_tables(self._store, written[-1], self._self_schema, own, self._notes, repeated=[])
        directory = "scores" if self._top_k is None else "work/top"
        written.append(f"{directory}/{self._part}-{number}.parquet")
        tables = self._tables(members, order)
        write_tables(
            self._store, written[-1], self._schema, tables, self._notes, repeated=["query_id"]
        )
        self.forget()
        return written

    def _own_tables(self, members: Array, order: Array) -> Iterator[pa.Table]:
        own, number = self._self.whole(), self._self_schema.field("score").type
        for start in range(0, len(order), ROWS):
            taken = order[start : start + ROWS]
            yield pa.table(
                {
                    "id": self._train.named(members[taken]),
                    "score": pa.array(own[taken]).cast(number),
                },
                schema=self._self_schema,
            )

    def _tables(self, members: Array, order: Array) -> Iterator[pa.Table]:
        """The rows, some at a time: with their ids they take far more than the scores alone."""
        scores_NQ = self._scores.whole()
        queries = pa.array(self._queries, pa.string())
        places = _places(self._tokens)
        for n_rows, q_rows in self._rows(scores_NQ, order):
            taken = order[n_rows]
            columns: dict[str, Any] = {
                "query_id": queries.take(pa.array(q_rows)),
                "train_id": self._train.named(members[taken]),
                "score": pa.array(scores_NQ[taken, q_rows]).cast(self._schema.field("score").type),
            }
            if self._per_block:
                blocks = self._blocks.whole()[taken, q_rows]
                number = self._schema.field("block_scores").type.value_type
                columns["block_scores"] = as_lists(blocks, number)
            if self._per_token:
                number = self._schema.field("token_scores").type.value_type
                lists = []
                for n, q in zip(taken, q_rows, strict=True):
                    m = int(np.searchsorted(places, n, side="right")) - 1
                    length = self._train.lengths[members[n]]
                    lists.append(self._tokens[m][n - places[m], q, :length])
                lists_ = pa.array(lists, pa.list_(pa.float64()))
                columns["token_scores"] = lists_.cast(pa.list_(number))
            yield pa.table(columns, schema=self._schema)

    def _rows(self, scores_NQ: Array, order: Array) -> Iterator[tuple[Array, Array]]:
        """Which (example, query) pairs are written, example by example, some at a time."""
        n, q = scores_NQ.shape
        if self._top_k is None or n <= 2 * self._top_k:
            for start in range(0, n * q, ROWS):
                yield np.divmod(np.arange(start, min(start + ROWS, n * q)), q)
            return
        kept = np.sort(_extremes(scores_NQ[order].T, self._top_k), axis=1)
        n_rows, q_rows = kept.reshape(-1), np.repeat(np.arange(q), kept.shape[1])
        for start in range(0, len(n_rows), ROWS):
            yield n_rows[start : start + ROWS], q_rows[start : start + ROWS]


def _places(parts: Sequence[Array]) -> Array:
    """Where the rows of each part begin among those of all."""
    return np.cumsum([0, *(len(part) for part in parts)])


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
