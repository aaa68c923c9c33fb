"""Scores of a network's training examples by each method, as raycurv makes them.

Axis letters: Q queries, N training examples.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from agreement import in_order
from exact_labels import EXACT
from tasks import Task
from torch import Tensor, nn

import raycurv

# Microbatches of examples without a token axis; of tokens, for text.
BATCH = 1024


@dataclass(frozen=True)
class Method:
    """A way to score.

    Attributes:
        title: in reports.
        fit: settings of the fit.
        rank: that IHVPs are truncated to.
        exact: whether the Fisher is that of exact_labels.py.
        solver: settings of the scoring that say how IHVPs are made.
    """

    title: str
    fit: Mapping[str, Any]
    rank: str = "full"
    exact: bool = False
    solver: Mapping[str, Any] = field(default_factory=dict)


def methods(ranks: Sequence[int], rows: int) -> list[Method]:
    """Identity to M-FAC, EK-FAC also at some ranks.

    Args:
        ranks: lowest first.
        rows: gradients of M-FAC.
    """
    ekfac = {"method": "ekfac"}
    return [
        Method("identity", {"method": "identity"}),
        Method("diagonal", {"method": "diagonal"}),
        Method("K-FAC", {"method": "kfac"}),
        *(Method(f"EK-FAC, rank {rank}", ekfac, str(rank)) for rank in ranks),
        Method("EK-FAC", ekfac),
        Method(f"M-FAC, {rows} gradients", {"method": "mfac", "rows": rows}),
    ]


@dataclass
class Attribution:
    """One trained network; fits are made once.

    Attributes:
        task: its data; ``train`` and ``queries`` of it are scored.
        network: trained.
        place: a directory for the runs, its own.
        settings: of every fit, beside the task's.
    """

    task: Task
    network: nn.Module
    place: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    _runs: dict[str, raycurv.Run] = field(default_factory=dict)
    _count: int = 0

    def scores(self, method: Method, damping: str | None = None) -> Tensor:
        """``[Q, N]``; positive where training on the example lowers the query's loss."""
        return torch.from_numpy(in_order(self._score(method, damping, False))).double()

    def self_influence(self, method: Method) -> Tensor:
        """``[N]``, full rank."""
        made = self._score(method, None, True).self_influence().sort_by("id")
        return torch.tensor(made["score"].to_pylist(), dtype=torch.float64)

    def _score(self, method: Method, damping: str | None, itself: bool) -> raycurv.Scores:
        self._count += 1
        return self.run(method).influence(
            self.task.queries.rows("query"), self.task.train.rows("example"),
            self.place / f"scores-{self._count}", quiet=True, address="none", batch_tokens=BATCH,
            damping=damping or self.task.damping, rank=method.rank, self_influence=itself,
            **method.solver,
        )  # fmt: skip

    def run(self, method: Method) -> raycurv.Run:
        """The fit that a method stands on."""
        named = f"{method.fit} {method.exact}"
        if named not in self._runs:
            told = method.fit.keys() | self.settings.keys()
            draws = {"fisher": "sampled", "draws": self.task.draws}
            draws = {} if method.exact or told & {"fisher", "draws"} else draws
            objective = EXACT[self.task.objective]() if method.exact else self.task.objective
            self._runs[named] = raycurv.fit(
                lambda: copy.deepcopy(self.network), self.task.train.rows("example"),
                self.place / f"fit-{len(self._runs)}", objective=objective, quiet=True,
                address="none", batch_tokens=BATCH, blocks=self.task.blocks,
                **draws, **self.settings, **method.fit,
            )  # fmt: skip
        return self._runs[named]
