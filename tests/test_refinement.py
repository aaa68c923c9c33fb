"""IHVPs by a solver against dense solves, and that nothing but the settings decides them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conftest import Fits
from dense import worst
from networks import MLP, REGRESSION, Case
from test_products import Jacobians
from torch import Tensor

import raycurv

# A residual at which the solver stops, and how far from a dense solve that is at most.
SOLVED: dict[str, Any] = {"solver": "cg", "steps": 400, "tolerance": 1e-10, "rank": "full"}
EXACT = 1e-8


def answers(fits: Fits, case: Case, fit: Any = None, **settings: Any) -> dict[str, Tensor]:
    """The IHVPs of a case's queries, by block."""
    run = fits.run(case, **(fit or {}))
    settings = {"address": "none", "batch_tokens": case.batch_tokens, **SOLVED} | settings
    products = run.ihvp(list(case.queries), fits.place(), quiet=True, **settings)
    return {name: products.block(name)[0] for name in run.block_names()}


def flat(found: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten(1) for tensor in found.values()], dim=1)


class Dense:
    """``G`` and λ of a case's blocks, and the queries' gradients."""

    def __init__(self, fits: Fits, case: Case) -> None:
        truth, self.run = fits.truth(case), fits.run(case)
        names = self.run.block_names()
        own = truth.own_gradients
        self.v = torch.stack(
            [torch.cat([one[n].flatten() for n in names]) for one in own[: len(case.queries)]]
        )
        sizes = [own[0][n].numel() for n in names]
        self.of = torch.arange(len(names)).repeat_interleave(torch.tensor(sizes))
        jacobians = Jacobians(truth, {name: self.run.curvature(name).block for name in names})
        jacobians.vector = torch.eye(len(self.of), dtype=torch.float64)
        self.matrix = jacobians.products()
        self.names = names

    def solved(self, damping: str, coupled: bool = True) -> Tensor:
        chosen = raycurv.Damping.parse(damping)
        lams = torch.tensor(
            [self.run.curvature(n).damping(chosen) for n in self.names], dtype=torch.float64
        )
        matrix = self.matrix
        if not coupled:
            matrix = torch.where(self.of[:, None] == self.of, matrix, 0.0)
        return torch.linalg.solve(matrix + torch.diag(lams[self.of]), self.v.T).T


@pytest.mark.parametrize("case", (MLP, REGRESSION), ids=lambda case: case.name)
@pytest.mark.parametrize("coupling", ("model", "blocks"))
def test_answers_are_those_of_a_dense_solve(fits: Fits, case: Case, coupling: str) -> None:
    dense = Dense(fits, case)
    found = flat(answers(fits, case, coupling=coupling, damping="3", batch_tokens=9))
    assert worst(found, dense.solved("3", coupling == "model")) < EXACT
    other = dense.solved("3", coupling != "model")
    assert worst(found, other) > 1e-3, "the two are the same here"


def test_one_step_is_the_answer_of_the_fit_at_the_best_scale(fits: Fits) -> None:
    dense = Dense(fits, MLP)
    found = flat(answers(fits, MLP, steps=1, damping="0.3"))
    of_fit = flat(answers(fits, MLP, steps=None, solver="ekfac", tolerance=None, damping="0.3"))
    lams = [dense.run.curvature(n).damping(raycurv.Damping(0.3)) for n in dense.names]
    matrix = dense.matrix + torch.diag(torch.tensor(lams, dtype=torch.float64)[dense.of])
    best = (of_fit * dense.v).sum(1) / (of_fit * (of_fit @ matrix)).sum(1)
    assert worst(found, best[:, None] * of_fit) < EXACT
    assert worst(found, of_fit) > 0.01


LAYOUTS: tuple[dict[str, Any], ...] = (
    {"stages": 2},
    {"stages": 3, "schedule": "swept"},
    {"stages": 2, "replicas": 2},
    {"batch_tokens": 9},
    {"coupling": "blocks", "query_memory": "1000"},
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_answers_do_not_depend_on_how_the_work_is_laid_out(
    fits: Fits, layout: dict[str, Any]
) -> None:
    settings = {"steps": 3, "damping": "1", "rank": "2"}
    want = answers(fits, MLP, **settings, coupling=layout.get("coupling", "model"))
    found = answers(fits, MLP, **settings, **layout)
    assert worst(flat(found), flat(want)) < 1e-9
