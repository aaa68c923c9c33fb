"""A damping chosen by removals that were tried: which scores foretell best what each of them did.

    removals: a row for each retraining     removed [train ids]   query_ids   measured, of these
    scores of these queries under every damping of a grid, on what was ever removed
    -> agreement of each damping            tables/damping, facts.damping

A gradient is made once for all dampings: only its IHVPs are made for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from raycurv.data.sources import Source, open_parts
from raycurv.driver.corpus import Corpus
from raycurv.errors import UserError
from raycurv.files.store import Store
from raycurv.files.tables import score_matrix
from raycurv.mathematics.curvature import Damping
from raycurv.mathematics.influence.rank_agreement import agreement

FLAG = "--removals"
# Half decades about the usual one, as factors of a block's mean eigenvalue.
GRID = tuple(map(Damping, (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)))
FEWEST = 5
_IDS = "a list of ids"
_COLUMNS = {"removed": _IDS, "query_ids": _IDS, "measured": "a list of numbers"}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Removals:
    """What retraining without some examples did to some queries.

    Attributes:
        queries: numbers of these queries, ascending.
        union: numbers of the training examples that were ever removed, ascending.
        removed_SU: bool, which of the union each removal took out; no two alike.
        measured_QS: the queries' measurements after each, a mean where it was done several times.
    """

    queries: list[int]
    union: Array
    removed_SU: Tensor
    measured_QS: Tensor

    def __len__(self) -> int:
        return self.measured_QS.shape[1]

    def agreements(
        self, store: Store, files: Sequence[str], queries: Corpus, train: Corpus
    ) -> dict[Damping, tuple[float, float]]:
        """Agreement and standard error of each damping of the grid.

        Args:
            files: of scores, whose query ids are :func:`named`.
        """
        ids = pa.array(named(queries.named(self.queries).to_pylist(), GRID))
        examples = train.named(self.union)
        scores_KU = score_matrix(store, files, ids, examples)
        predicted_KS = torch.from_numpy(scores_KU) @ self.removed_SU.double().T
        predicted_QGS = predicted_KS.view(-1, len(GRID), len(self))
        return {
            damping: agreement(predicted_QGS[:, place], self.measured_QS)
            for place, damping in enumerate(GRID)
        }


def named(ids: Sequence[str], dampings: Sequence[Damping]) -> tuple[str, ...]:
    """What the products of some queries under several dampings are called, queries first."""
    return tuple(f"{one} @ {damping}" for one in ids for damping in dampings)


def read_removals(source: Source, queries: Corpus, train: Corpus) -> Removals:
    """The removals of a table.

    Raises:
        UserError: it is none of removals, names ids that there are not, or has too few.
    """
    measured: dict[tuple[int, ...], list[Array]] = {}
    asked: list[int] | None = None
    for where, row in _rows(source):
        removed = _numbers(where, "removed", row["removed"], train, "--train")
        mine = _numbers(where, "query_ids", row["query_ids"], queries, "--queries")
        order = sorted(range(len(mine)), key=mine.__getitem__)
        numbers = [mine[place] for place in order]
        values = np.array(row["measured"], np.float64)
        asked = numbers if asked is None else asked
        if numbers != asked or len(values) != len(numbers) or not np.isfinite(values).all():
            raise UserError(
                where, "finite measurements, one for each of query_ids, of the same queries in all",
                f"{len(values)} of {len(numbers)} queries, {len(asked)} in the first row",
                "Give each retraining's measurement of every query.",
            )  # fmt: skip
        measured.setdefault(tuple(sorted(removed)), []).append(values[order])
    if len(measured) < FEWEST:
        raise UserError(
            FLAG, f"at least {FEWEST} retrainings, each without other examples",
            f"{len(measured)}", "Of so few an order says nothing: retrain more, of half the "
            "examples each, or give --damping as a number.",
        )  # fmt: skip
    assert asked is not None
    union = np.unique(np.concatenate([np.array(one, np.int64) for one in measured]))
    removed_SU = torch.stack([torch.from_numpy(np.isin(union, one)) for one in measured])
    means = [np.mean(several, axis=0) for several in measured.values()]
    return Removals(asked, union, removed_SU, torch.from_numpy(np.stack(means, axis=1)))


def _rows(source: Source) -> Any:
    """Where each row of a table is, and the row."""
    for part in open_parts(source):
        there = part.columns()
        missing = [name for name in _COLUMNS if there is not None and name not in there]
        if missing:
            raise UserError(
                f"{FLAG} {part.location}", f"columns {', '.join(_COLUMNS)}",
                f"no {' and no '.join(missing)} among {', '.join(there or ())}",
                "Give a table with a row for each retraining.",
            )  # fmt: skip
        for rows in part.read(tuple(_COLUMNS), ()):
            columns = {name: rows.columns[name].to_pylist() for name in _COLUMNS}
            for place, number in enumerate(rows.numbers):
                where = f"{FLAG} {part.location}, row {number}"
                row = {name: values[place] for name, values in columns.items()}
                for name, value in row.items():
                    kinds = (int, float) if name == "measured" else (str, int)
                    if not (isinstance(value, list) and all(isinstance(x, kinds) for x in value)):
                        raise UserError(
                            where, f"{name}: {_COLUMNS[name]}", repr(value)[:80],
                            "Give a row for each retraining: removed, query_ids, measured.",
                        )  # fmt: skip
                yield where, row


def _numbers(where: str, name: str, ids: Sequence[Any], corpus: Corpus, flag: str) -> list[int]:
    """Numbers of examples by their ids, of which there is one at least, and none twice."""
    found = pc.index_in(pa.array([*map(str, ids)], pa.large_string()), value_set=corpus.ids)
    if found.null_count or not len(found) or len(found.unique()) < len(found):
        unknown = [one for one, n in zip(ids, found.to_pylist(), strict=True) if n is None]
        got = f"{unknown[0]!r}" if unknown else "none, or one twice"
        raise UserError(
            f"{where}, {name}", f"ids of {flag}, such as {corpus.ids[0].as_py()!r}", got,
            "Take it out, or give the data that it is of. Ids are those of the column `id`, or "
            "made of file and row; --max-examples leaves some out.",
        )  # fmt: skip
    return [int(n) for n in found.to_pylist()]
