"""Reading the scores that an influence job left, and views of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from raycurv.driver.settings import flag_of
from raycurv.errors import DamagedFile, UserError, some_of, user_errors
from raycurv.files.artifacts import ihvp_file, read_products
from raycurv.files.store import Store, open_store
from raycurv.files.tables import (
    lengths_schema,
    read_directory,
    read_table,
    scores_schema,
    self_schema,
)
from raycurv.jobs.damping_choice import CURVE, used_damping
from raycurv.jobs.influence.certificate import DIRECTORY as CERTIFICATES
from raycurv.jobs.inputs import AnySource
from raycurv.jobs.recorded import finished
from raycurv.jobs.scored_data import ScoredData
from raycurv.mathematics.influence.normalisation import (
    NORMALISATIONS,
    Normalise,
    divided,
    roots,
)
from raycurv.summary_html import summary_html

Side = Literal["train", "queries"]


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

    def with_data(self, queries: AnySource | None = None, train: AnySource | None = None) -> Scores:
        """These scores, with queries or training examples given again (see
        :func:`open_scores`)."""
        was = self._sources
        return Scores(
            self._store,
            was["queries"] if queries is None else queries,
            was["train"] if train is None else train,
        )

    @property
    def path(self) -> str:
        """The directory of the scores, as an absolute path or a URI."""
        return self._store.root

    def __fspath__(self) -> str:
        return self._store.uri

    def __repr__(self) -> str:
        said = self._said()
        alone = f" ({said['candidates']})" if said["candidates"] else ""
        return (
            f"<raycurv scores {self.path}: {said['queries']} queries x {said['training examples']} "
            f"training examples{alone}, rank {said['rank']}, damping {said['damping']}>"
        )

    def _repr_html_(self) -> str:
        return summary_html("scores", self.path, self._said())

    def _said(self) -> dict[str, str]:
        facts, settings = self.manifest.facts, self.manifest.settings
        iterates = ("solver", "steps") if settings["solver"] != "ekfac" else ()
        also = (*iterates, "top_k", "per_block", "per_token", "self_influence", "ihvp")
        chosen = facts.get("candidates")
        return {
            "queries": f"{facts['queries_scored']:,}",
            "training examples": f"{facts['examples']:,}",
            "candidates": f"{chosen['pairs']:,} pairs" if chosen else "",
            "rank": settings["rank"],
            "damping": used_damping(self.manifest),
            "fit": facts.get("run", ""),
            "also": ", ".join(
                flag_of(name) + ("" if settings[name] is True else f" {settings[name]}")
                for name in also
                if settings[name]
            ).replace("--self-influence", "--self"),
        }

    def table(self) -> pa.Table:
        """All rows: ``query_id``, ``train_id``, ``score`` and what else was asked for."""
        tables = list(self._parts("scores", self._schema()))
        return pa.concat_tables(tables) if tables else self._schema().empty_table()

    def parts(self) -> Iterator[pa.Table]:
        """The rows of :meth:`table`, a file of them at a time."""
        return self._parts("scores", self._schema())

    def self_influence(self) -> pa.Table:
        """``id`` and ``score`` of every training example against itself (with ``--self``)."""
        tables = list(self._parts("self", self_schema(self._double)))
        return pa.concat_tables(tables) if tables else pa.schema([]).empty_table()

    def damping(self) -> pa.Table:
        """What a chosen damping was chosen from (``--damping evidence``): a row for each that was
        looked at. Which it is stands in ``manifest.facts["damping"]``.

        Raises:
            UserError: it was given as a number.
        """
        if "damping" not in self.manifest.facts:
            raise UserError(
                self.path, "scores whose damping was chosen",
                f"damping {used_damping(self.manifest)}",
                "Score into another directory with --damping evidence.",
            )  # fmt: skip
        return read_directory(self._store, CURVE, needed=True)

    def certificate(self) -> pa.Table:
        """How far the answers of some queries are from those to the damped Gauss-Newton matrix
        (``--certify``): a row for each query and block, and one without a block for all of it.
        In sentences they are what a report says.

        Raises:
            UserError: none was made.
        """
        if "certificate" not in self.manifest.facts:
            raise UserError(
                self.path, "scores with a certificate", "none",
                "Run the same influence command again, with --certify 4.",
            )  # fmt: skip
        return read_directory(self._store, CERTIFICATES, needed=True)

    @property
    def _double(self) -> bool:
        return bool(self.manifest.settings["dtype"] == "float64")

    def _schema(self) -> pa.Schema:
        """The columns that every file of scores has."""
        return scores_schema(self._double)

    def data(self, name: Side = "train") -> ScoredData:
        """The training examples, or the queries, read again from where their data lies: their
        texts and further columns by id (``rows``), and the text of their tokens (``tokens``)."""
        if name not in self._sources:
            raise UserError("scores", "train or queries", repr(name), "Name one of the two.")
        given = self._sources[name]
        source = os.fspath(given) if isinstance(given, os.PathLike) else given
        return ScoredData(name, self.path, self.manifest, source)

    def top(
        self,
        query_id: str,
        k: int = 5,
        normalise: Normalise | None = None,
        text: bool | None = None,
    ) -> pa.Table:
        """The k training examples of the highest scores on a query, highest first.

        Args:
            k: how many; all that there are where these are fewer. Of scores with ``--top-k`` no
                more than were kept at this end.
            normalise: order by scores divided as :meth:`matrix` says, which become a column
                ``normalised``, float64.
            text: whether a column ``text`` stands beside the ids (see :meth:`ScoredData.rows`); by
                default with nulls, and a warning that says why, where the data cannot be read.

        Raises:
            UserError: no such query; with ``normalise`` as for :meth:`matrix`; with ``text=True``
                that the data is gone, or another one.
        """
        _check_count(k)
        if normalise is not None:
            self._check_kept()
        found = self._parts("scores", self._schema())
        parts = [t.filter(pc.equal(t["query_id"], query_id)) for t in found]
        mine = pa.concat_tables([p for p in parts if len(p)]) if any(map(len, parts)) else None
        if mine is None:
            raise self._no_query(query_id)
        kept = self.manifest.settings["top_k"]
        if kept is not None and 2 * kept <= len(mine) < self.manifest.facts["examples"]:
            # What follows the highest that were kept is the lowest, not the next.
            k = min(k, kept)
        by = "score"
        if normalise is not None:
            by, trains = "normalised", mine["train_id"].to_pylist()
            scores = mine["score"].to_numpy()[None]
            values = self._normalised(scores, [query_id], trains, normalise)
            mine = mine.append_column(by, pa.array(values[0]))
        order = pc.sort_indices(mine, [(by, "descending")])
        return self._with_texts(mine.take(order[:k]), text)

    def by(
        self,
        column: str | Mapping[str, Any],
        of: Side = "train",
        normalise: Normalise | None = None,
    ) -> pa.Table:
        """Sums and means of scores over groups of training examples, or of queries.

        Args:
            column: of the data, whose value is an example's group (its source, domain or author,
                say); or the group of each id, where the data does not say.
            of: what is grouped: ``train``, or ``queries``.
            normalise: of each score, before it is added; see :meth:`matrix`.

        Returns:
            A row for each query and group (of queries: for each group and training example):
            ``query_id`` (or ``train_id``), ``group``, ``count`` (examples, or queries, of the
            group), ``sum`` and ``mean`` of its scores, float64.

        Raises:
            UserError: as for :meth:`matrix`; the data is gone or another one; it has no such
                column: names those that there are.
        """
        self.data(of)
        matrix, queries, trains = self.matrix(normalise)
        ids, others = (trains, queries) if of == "train" else (queries, trains)
        coded = self._groups(column, of, ids)
        codes, count = coded.indices.to_numpy(), len(coded.dictionary)
        if of == "train":
            sums = np.stack([np.bincount(codes, row, count) for row in matrix])
        else:
            sums = np.stack([matrix[codes == g].sum(0, dtype=np.float64) for g in range(count)]).T
        counts = np.tile(np.bincount(codes, minlength=count), len(others))
        return pa.table(
            {
                "query_id" if of == "train" else "train_id": np.repeat(others, count),
                "group": coded.dictionary.take(np.tile(np.arange(count), len(others))),
                "count": counts,
                "sum": sums.reshape(-1),
                "mean": sums.reshape(-1) / counts,
            }
        )

    def contrast(
        self,
        a: Sequence[str],
        b: Sequence[str],
        k: int | None = None,
        normalise: Normalise | None = None,
        text: bool | None = None,
    ) -> pa.Table:
        """What training examples do more for some queries than for others, highest first.

        Args:
            a: ids of queries, each once.
            b: ids of others, likewise.
            k: how many rows, with texts; all of them by default, without.
            normalise: of each score, before the means; see :meth:`matrix`.
            text: as for :meth:`top`.

        Returns:
            A row for each training example: ``train_id``, ``score`` (the mean over ``a`` less the
            mean over ``b``), and both means as ``a`` and ``b``, float64.

        Raises:
            UserError: as for :meth:`matrix`; a query that was not scored, or none.
        """
        if k is not None:
            _check_count(k)
        matrix, queries, trains = self.matrix(normalise)
        row, means = {id: q for q, id in enumerate(queries)}, []
        for name, some in (("a", a), ("b", b)):
            some = [some] if isinstance(some, str) else list(some)
            if not some or len(set(some)) < len(some):
                got = "none" if not some else "one twice"
                raise UserError(f"contrast, {name}", "ids of queries, each once", got, "")
            for id in some:
                if id not in row:
                    raise self._no_query(id)
            means.append(matrix[[row[id] for id in some]].mean(0, dtype=np.float64))
        names = {"train_id": trains, "score": means[0] - means[1], "a": means[0], "b": means[1]}
        table = pa.table(names).sort_by([("score", "descending")])
        if k is None and text is None:
            text = False
        return self._with_texts(table if k is None else table.slice(0, k), text)

    def matrix(
        self, normalise: Normalise | None = None
    ) -> tuple[np.ndarray[Any, Any], list[str], list[str]]:
        """``scores [Q, N]``, the query ids and the training ids, in the order of the table, which
        is not the data's where it has several files.

        Args:
            normalise: divide scores, in float64 (raycurv/mathematics/influence/normalisation.py):

                ``per-token``
                    by the tokens of the training example.
                ``relative``
                    by the root of the example's self-influence, ``√(gᵀ(F + λ)⁻¹g)``; needs
                    ``--self``, one look at each example's gradient at full rank.
                ``cosine``
                    by that and by the root of the query's own, which ``--self`` leaves as well.

                All are of whole scores, over all blocks.

        Raises:
            UserError: with ``--top-k`` only some scores were kept, with ``--candidates`` some pairs
                were not scored; what to divide by was not kept.
        """
        self._check_kept()
        self._check_dense()
        parts = [self._dense(table) for table in self._parts("scores", self._schema())]
        queries = list(dict.fromkeys(id for part in parts for id in part[1]))
        trains = list(dict.fromkeys(id for part in parts for id in part[2]))
        number = self._schema().field("score").type.to_pandas_dtype()
        matrix = np.full((len(queries), len(trains)), np.nan, number)
        q_of = {id: q for q, id in enumerate(queries)}
        n_of = {id: n for n, id in enumerate(trains)}
        while parts:
            values, some, others = parts.pop()
            matrix[np.ix_([q_of[id] for id in some], [n_of[id] for id in others])] = values
        if np.isnan(matrix).any():
            raise self._incomplete(len(queries), len(trains), int(np.isfinite(matrix).sum()))
        if normalise is not None:
            matrix = self._normalised(matrix, queries, trains, normalise)
        return matrix, queries, trains

    def _dense(self, table: pa.Table) -> tuple[np.ndarray[Any, Any], list[str], list[str]]:
        """The scores of a file as a matrix, NaN where there is none, with its ids."""
        queries, trains = pc.unique(table["query_id"]), pc.unique(table["train_id"])
        scores = table["score"].to_numpy()
        matrix = np.full((len(queries), len(trains)), np.nan, scores.dtype)
        q = pc.index_in(table["query_id"], value_set=queries).to_numpy()
        n = pc.index_in(table["train_id"], value_set=trains).to_numpy()
        matrix[q, n] = scores
        return matrix, queries.to_pylist(), trains.to_pylist()

    def _normalised(
        self,
        scores_QN: np.ndarray[Any, Any],
        queries: Sequence[str],
        trains: Sequence[str],
        normalise: Normalise,
    ) -> np.ndarray[Any, Any]:
        if normalise not in NORMALISATIONS:
            wanted = f"one of {', '.join(NORMALISATIONS)}, or None"
            raise UserError("normalise", wanted, repr(normalise), "")
        if normalise == "per-token":
            by_train = self._numbers("tables/train", "tokens", trains, lengths_schema())
            if (by_train == 1).all():
                raise UserError(
                    self.path, "training examples of several tokens, to divide by", "one of each",
                    "Divide by self-influence: normalise='relative', or 'cosine'.",
                )  # fmt: skip
            return divided(scores_QN, None, by_train)
        if not self.manifest.settings["self_influence"]:
            raise UserError(
                self.path, f"self-influence, by whose roots {normalise} divides", "none",
                "Score again with --self (in Python self_influence=True), into another directory.",
            )  # fmt: skip
        by_train = roots(self._numbers("self", "score", trains, self_schema(self._double)))
        by_query = None
        if normalise == "cosine":
            schema = lengths_schema(self._double)
            by_query = roots(self._numbers("tables/queries", "self_influence", queries, schema))
        return divided(scores_QN, by_query, by_train)

    def _numbers(
        self, directory: str, column: str, ids: Sequence[str], schema: pa.Schema
    ) -> np.ndarray[Any, Any]:
        """A column of a table of examples, by their ids."""
        parts = list(self._parts(directory, schema))
        if not parts:
            raise UserError(
                self.path, f"a table {directory}", "scores of a version that wrote none",
                "Score again into another directory.",
            )  # fmt: skip
        table = pa.concat_tables([part.select(["id", column]) for part in parts])
        places = pc.index_in(pa.array(ids, pa.string()), value_set=table["id"].combine_chunks())
        if places.null_count:
            raise DamagedFile(
                self._store.path(directory), f"`{column}` of every example", "none of some",
                "Score again into another directory.",
            )  # fmt: skip
        found: np.ndarray[Any, Any] = table[column].take(places).to_numpy()
        return found

    def _groups(
        self, column: str | Mapping[str, Any], of: Side, ids: Sequence[str]
    ) -> pa.DictionaryArray:
        """The group of each id, as codes of the groups in their order."""
        if isinstance(column, str):
            where = f"column `{column}` of the {of} of {self.path}"
            groups = self.data(of).rows(ids, [column], text=False)[column].combine_chunks()
        else:
            where, lacking = "the groups", [id for id in ids if id not in column]
            if lacking:
                got = f"none of {some_of(lacking, 1, repr)}"
                raise UserError(where, f"one of each of the {of}", got, "")
            groups = [column[id] for id in ids]
            nothing = [id for id, group in zip(ids, groups, strict=True) if group is None]
            if nothing:
                raise UserError(where, f"one of each of the {of}", f"None of {nothing[0]!r}", "")
        remedy = "Give a column of texts or whole numbers."
        with user_errors(where, "values that make groups", remedy, pa.ArrowException, TypeError):
            return pa.array(groups).dictionary_encode()

    def _check_kept(self) -> None:
        """Refuse scores of which ``--top-k`` kept some."""
        k = self.manifest.settings["top_k"]
        if k is not None:
            raise UserError(
                self.path, "all scores", f"the {k} at either end",
                "Run influence.py without --top-k into another directory.",
            )  # fmt: skip

    def _check_dense(self) -> None:
        """Refuse candidates, where a query was not scored on those of another."""
        said = self.manifest.facts.get("candidates")
        missing = said and self.manifest.facts["queries_scored"] * said["examples"] - said["pairs"]
        if missing:
            raise UserError(
                self.path, "all scores", f"those of candidates: {missing:,} pairs have none",
                "Use table() or top(), or run influence.py without --candidates into another "
                "directory.",
            )  # fmt: skip

    def _incomplete(self, queries: int, trains: int, found: int) -> DamagedFile:
        return DamagedFile(
            self.path, f"a score for each of {queries} x {trains}", f"{found}",
            "Run the same command again: it makes what is missing.",
        )  # fmt: skip

    def _no_query(self, id: str) -> UserError:
        return UserError(
            f"query {id!r}", "one of the queries that were scored", "no such id",
            "See table()['query_id'].unique().",
        )  # fmt: skip

    def _with_texts(self, table: pa.Table, text: bool | None) -> pa.Table:
        """A table with the texts of its ``train_id``; see :meth:`top`."""
        if text is False:
            return table
        texts = pa.nulls(len(table), pa.large_string())
        try:
            texts = self.data("train").rows(table["train_id"].to_pylist())["text"]
        except UserError as error:
            if text:
                raise
            warnings.warn(f"no texts: {error}", stacklevel=3)
        return table.append_column("text", texts)

    def _parts(self, directory: str, schema: pa.Schema) -> Iterator[pa.Table]:
        """The files of a table, in the order of their names: those that the job wrote, and all."""
        passes: dict[str, dict[str, int]] = self.manifest.facts["files"]
        names = {n for files in passes.values() for n in files if n.startswith(f"{directory}/")}
        for name in sorted(names):
            if not self._store.exists(name):
                raise DamagedFile(
                    self._store.path(name), "a file of scores", "nothing",
                    "Run the same command again: it makes what is missing.",
                )  # fmt: skip
            yield read_table(self._store, name, schema, schema.names)


def _check_count(k: int) -> None:
    if k < 0:
        raise UserError("k", "a number of rows", str(k), "")


class Products:
    """Inverse-Hessian-vector products in a directory."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def path(self) -> str:
        """The directory of the products, as an absolute path or a URI."""
        return self._store.root

    def __repr__(self) -> str:
        return f"<raycurv IHVPs {self.path}>"

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
        queries: the data that was scored, given again where it has moved or was in memory, for
            what shows texts or groups by a column.
        train: the training examples, likewise.

    Raises:
        UserError: none there.
    """
    return Scores(open_store(out, "--out"), queries, train)
