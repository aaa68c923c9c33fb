"""Reading the scores that an influence job left, and views of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from raycurv.errors import DamagedFile, UserError
from raycurv.files.artifacts import ihvp_file, read_products
from raycurv.files.store import Store, open_store
from raycurv.files.tables import read_table, scores_schema, self_schema
from raycurv.jobs.inputs import AnySource
from raycurv.jobs.recorded import finished
from raycurv.jobs.scored_data import ScoredData


class Scores:
    """Influence scores in a directory (``raycurv.open_scores``).

    A positive score means that training on the example lowers the query's measurement.
    """

    def __init__(
        self,
        store: Store,
        queries: AnySource | None = None,
        train: AnySource | None = None,
    ) -> None:
        self._store = store
        self._sources = {"queries": queries, "train": train}
        self.manifest = finished(store, "influence", "scores", "finished scores")

    @property
    def path(self) -> str:
        """The directory."""
        return self._store.root

    def table(self) -> pa.Table:
        """All rows: ``query_id``, ``train_id``, ``score`` and what else was asked for."""
        tables = list(self._parts("scores"))
        return pa.concat_tables(tables) if tables else self._schema("scores").empty_table()

    def parts(self) -> Iterator[pa.Table]:
        """The rows of :meth:`table`, a file of them at a time."""
        return self._parts("scores")

    def self_influence(self) -> pa.Table:
        """``id`` and ``score`` of every training example against itself (with ``--self``)."""
        tables = list(self._parts("self"))
        return pa.concat_tables(tables) if tables else pa.schema([]).empty_table()

    def _schema(self, directory: str) -> pa.Schema:
        """The columns that every file of a table has."""
        double = self.manifest.settings["dtype"] == "float64"
        return scores_schema(double) if directory == "scores" else self_schema(double)

    def data(self, name: Literal["queries", "train"] = "train") -> ScoredData:
        """The training examples, or the queries, read again from where their data lies: their
        texts and further columns by id (``rows``), and the text of their tokens (``tokens``)."""
        given = self._sources[name]
        source = os.fspath(given) if isinstance(given, os.PathLike) else given
        return ScoredData(name, self.path, self.manifest, source)

    def top(self, query_id: str, k: int = 5, text: bool | None = None) -> pa.Table:
        """The k training examples of the highest scores on a query, highest first.

        Args:
            text: whether a column ``text`` stands beside the ids (see :meth:`ScoredData.rows`); by
                default with nulls, and a warning that says why, where the data cannot be read.

        Raises:
            UserError: no such query; with ``text=True`` that the data is gone, or another one.
        """
        parts = [t.filter(pc.equal(t["query_id"], query_id)) for t in self._parts("scores")]
        mine = pa.concat_tables([p for p in parts if len(p)]) if any(map(len, parts)) else None
        if mine is None:
            raise UserError(
                f"query {query_id!r}",
                "one of the queries that were scored",
                "no such id",
                "See table()['query_id'].unique().",
            )
        order = pc.sort_indices(mine, [("score", "descending")])
        best = mine.take(order[:k])
        return best if text is False else self._with_texts(best, needed=text is True)

    def _with_texts(self, table: pa.Table, needed: bool) -> pa.Table:
        """A table with the texts of its ``train_id``."""
        texts = pa.nulls(len(table), pa.large_string())
        try:
            texts = self.data("train").rows(table["train_id"].to_pylist())["text"]
        except UserError as error:
            if needed:
                raise
            warnings.warn(f"no texts: {error}", stacklevel=3)
        return table.append_column("text", texts)

    def matrix(self) -> tuple[np.ndarray[Any, Any], list[str], list[str]]:
        """``scores [Q, N]``, the query ids and the training ids, in the order of the table, which
        is not the data's where it has several files.

        Raises:
            UserError: with ``--top-k`` only some scores were kept.
        """
        if self.manifest.settings["top_k"] is not None:
            raise UserError(
                self.path,
                "all scores",
                f"the {self.manifest.settings['top_k']} at either end",
                "Run influence.py without --top-k into another directory.",
            )
        table = self.table().select(["query_id", "train_id", "score"])
        queries = pc.unique(table["query_id"])
        trains = pc.unique(table["train_id"])
        if len(table) != len(queries) * len(trains):
            raise DamagedFile(
                self.path, f"a score for each of {len(queries)} x {len(trains)}", f"{len(table)}",
                "Run the same command again: it makes what is missing.",
            )  # fmt: skip
        matrix = np.empty((len(queries), len(trains)), table["score"].type.to_pandas_dtype())
        q = pc.index_in(table["query_id"], value_set=queries).to_numpy()
        n = pc.index_in(table["train_id"], value_set=trains).to_numpy()
        matrix[q, n] = table["score"].to_numpy()
        return matrix, queries.to_pylist(), trains.to_pylist()

    def _parts(self, directory: str) -> Iterator[pa.Table]:
        """The files of a table, in the order of their names: those that the job wrote, and all."""
        passes: dict[str, dict[str, int]] = self.manifest.facts["files"]
        names = {n for files in passes.values() for n in files if n.startswith(f"{directory}/")}
        for name in sorted(names):
            if not self._store.exists(name):
                raise DamagedFile(
                    self._store.path(name), "a file of scores", "nothing",
                    "Run the same command again: it makes what is missing.",
                )  # fmt: skip
            schema = self._schema(directory)
            yield read_table(self._store, name, schema, schema.names)


class Products:
    """Inverse-Hessian-vector products in a directory."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def path(self) -> str:
        """The directory."""
        return self._store.root

    def block(self, name: str) -> tuple[Tensor, list[str]]:
        """The products of one block as ``[Q, O, I]``, and the ids of their queries.

        Raises:
            UserError: no such block.
        """
        if not self._store.exists(ihvp_file(name)):
            raise UserError(f"block {name!r}", "a block with IHVPs", "no such file", "")
        products, queries = read_products(self._store, name)
        return products.dense(), queries


def open_scores(
    out: str | os.PathLike[str],
    queries: AnySource | None = None,
    train: AnySource | None = None,
) -> Scores:
    """The scores that influence.py left in a directory.

    Args:
        out: the directory.
        queries, train: the data that was scored, given again where it has moved or was in memory,
            for what shows texts or groups by a column.

    Raises:
        UserError: none there.
    """
    return Scores(open_store(out, "--out"), queries, train)
