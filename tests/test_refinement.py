"""IHVPs by a solver against dense solves, and that nothing but the settings decides them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Fits
from dense import worst
from networks import LLAMA, MLP, REGRESSION, Case
from test_exact_products import Jacobians
from torch import Tensor

import raycurv
from raycurv import UserError
from raycurv.driver import linear_solver
from raycurv.files.store import Store
from raycurv.files.tables import read_directory

# A residual at which the solver stops, and how far from a dense solve that is at most.
SOLVED: dict[str, Any] = {"solver": "cg", "steps": 400, "tolerance": 1e-10, "rank": "full"}
EXACT = 1e-8
DESCENT: dict[str, Any] = {"solver": "astra", "tolerance": None, "damping": "100"}
TOLD = ("residual", "energy", "cosine")


def answers(fits: Fits, case: Case, fit: Any = None, **settings: Any) -> dict[str, Tensor]:
    """The IHVPs of a case's queries, by block."""
    run = fits.run(case, **(fit or {}))
    settings = {"address": "none", "batch_tokens": case.batch_tokens, **SOLVED} | settings
    products = run.ihvp(list(case.queries), fits.place(), quiet=True, **settings)
    return {name: products.block(name)[0] for name in run.block_names()}


def f64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


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

    def damped(self, damping: str, coupled: bool = True) -> Tensor:
        """``G + λ`` of the whole model, or of each block alone."""
        chosen = raycurv.Damping.parse(damping)
        lams = f64([self.run.curvature(n).damping(chosen) for n in self.names])
        matrix = self.matrix
        if not coupled:
            matrix = torch.where(self.of[:, None] == self.of, matrix, 0.0)
        return matrix + torch.diag(lams[self.of])

    def solved(self, damping: str, coupled: bool = True) -> Tensor:
        return torch.linalg.solve(self.damped(damping, coupled), self.v.T).T


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
    matrix = dense.damped("0.3")
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


def test_scores_are_products_of_answers_and_gradients(fits: Fits) -> None:
    scores = fits.scores(MLP, solver="cg", steps=3, damping="1", per_block=True)
    found = flat(answers(fits, MLP, steps=3, tolerance=None, damping="1"))
    dense, own = Dense(fits, MLP), fits.truth(MLP).own_gradients
    rows = torch.stack([torch.cat([one[n].flatten() for n in dense.names]) for one in own])
    table = scores.table().to_pydict()
    asked, trained = ([row["id"] for row in rows] for rows in (MLP.queries, MLP.data))
    want = (found @ rows.T)[
        [asked.index(name) for name in table["query_id"]],
        [trained.index(name) for name in table["train_id"]],
    ]
    assert worst(f64(table["score"]), want) < EXACT


def test_candidates_are_measured_by_scores_of_the_solver(fits: Fits) -> None:
    how = {"solver": "cg", "steps": 1, "candidates": "bm25:3,over=tokens", "candidates_check": 2}
    scores = fits.scores(LLAMA, **how)
    checked = scores.manifest.facts["candidates"]["check"]
    assert checked["queries"] == 2 and 0 < checked["recall"] <= 1


def test_what_every_step_found_is_told_and_recorded(fits: Fits) -> None:
    dense, steps = Dense(fits, MLP), 4
    scores = fits.scores(MLP, solver="cg", steps=steps, tolerance=1e-9, damping="1")
    table = read_directory(Store(scores.path), "tables/solver").to_pydict()
    assert table["query_id"] == [row["id"] for row in MLP.queries] * steps
    assert table["outcome"][-3:] == ["stopped at steps"] * 3
    x = flat(answers(fits, MLP, steps=steps, tolerance=1e-9, damping="1"))
    before = flat(answers(fits, MLP, steps=steps - 1, tolerance=1e-9, damping="1"))
    a = dense.damped("1")
    last = {key: f64(values[-3:]) for key, values in table.items() if key in TOLD}
    assert worst(last["residual"], (dense.v - x @ a).norm(dim=1) / dense.v.norm(dim=1)) < EXACT
    assert worst(last["energy"], ((x @ a) * x).sum(1) / 2 - (x * dense.v).sum(1)) < EXACT
    assert worst(last["cosine"], torch.cosine_similarity(x, before)) < EXACT
    facts = scores.manifest.facts["solver"]
    assert facts["largest_residual"] == max(table["residual"][-3:])
    assert facts["outcomes"] == {"stopped at steps": 3} and facts["steps"] == steps
    assert scores.manifest.settings["damping"] == "1"


def test_no_residual_is_told_that_the_dtype_cannot_tell(fits: Fits) -> None:
    scores = fits.scores(
        MLP, solver="cg", steps=20, tolerance=1e-9, damping="100", dtype="bfloat16"
    )
    residuals = read_directory(Store(scores.path), "tables/solver").to_pydict()["residual"]
    assert min(residuals) == torch.finfo(torch.bfloat16).eps


def test_products_may_be_of_a_seeded_sample_of_the_examples(fits: Fits) -> None:
    few = answers(fits, MLP, steps=2, product_examples=4, seed=3)
    same = answers(fits, MLP, steps=2, product_examples=4, seed=3, stages=2)
    assert worst(flat(few), flat(same)) < EXACT
    assert worst(flat(few), flat(answers(fits, MLP, steps=2))) > 1e-3
    assert worst(flat(few), flat(answers(fits, MLP, steps=2, product_examples=4, seed=4))) > 1e-3
    everything = answers(fits, MLP, steps=2, product_examples=len(MLP.data))
    assert worst(flat(everything), flat(answers(fits, MLP, steps=2))) < EXACT


def test_negative_curvature_is_refused_with_its_block(fits: Fits) -> None:
    with pytest.raises(UserError) as refused:
        answers(fits, MLP, matrix="hessian", damping="abs:1e-6")
    said = str(refused.value)
    assert "positive curvature" in said and "the block" in said and "--matrix ggn" in said
    # With a large λ it is definite, and another matrix than the Gauss-Newton one.
    hessian = flat(answers(fits, MLP, matrix="hessian", damping="abs:2", steps=5))
    assert 1e-3 < worst(hessian, flat(answers(fits, MLP, damping="abs:2", steps=5))) < 0.5


@pytest.mark.parametrize(
    ("said", "fit", "settings"),
    [
        ("--product-examples 10: expected at most the 9 examples", {}, {"product_examples": 10}),
        ("--method mfac", {"method": "mfac", "rows": 4}, {}),
        ("a damping that needs no eigenvalues", {"method": "identity"}, {"damping": "3"}),
        ("a damping above zero", {}, {"damping": "0"}),
        ("--self", {}, {"self_influence": True}),
        ("--damping heldout", {}, {"damping": "heldout"}),
        ("--steps: expected a solver", {}, {"solver": "ekfac", "tolerance": None}),
        ("--minibatch: expected --solver astra", {}, {"minibatch": 4}),
        ("--tolerance: expected --solver cg", {}, {"solver": "astra"}),
        ("--coupling blocks", {}, {**DESCENT, "coupling": "blocks"}),
        ("--matrix hessian", {}, {**DESCENT, "matrix": "hessian"}),
        ("--certify: expected a run", {}, {**DESCENT, "certify": 2}),
    ],
)  # fmt: skip
def test_what_cannot_be_solved_is_refused_by_name(
    fits: Fits, said: str, fit: dict[str, Any], settings: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=said):
        answers(fits, MLP, fit, **settings)


@pytest.mark.parametrize("method", ("kfac", "diagonal", "identity"))
def test_another_preconditioner_changes_the_way_and_not_the_answer(fits: Fits, method: str) -> None:
    settings = {"damping": "abs:0.3", "batch_tokens": 9}
    found = flat(answers(fits, MLP, {"method": method}, **settings))
    assert worst(found, Dense(fits, MLP).solved("abs:0.3")) < EXACT


# Descent on minibatches

NUMBERS = {"steps": 7, "minibatch": 4, "rate": 0.7, "seed": 5}


def test_descent_on_all_examples_comes_to_the_dense_solution(fits: Fits) -> None:
    want, settings = Dense(fits, MLP).solved("100"), DESCENT | {"batch_tokens": 9}
    found = answers(fits, MLP, **settings, steps=14, rate=0.95)
    assert worst(flat(found), want) < EXACT
    # Half of what is stable, as no rate is said.
    slow = flat(answers(fits, MLP, **settings, steps=8))
    assert EXACT < worst(slow, want) < 0.02


def by_hand(fits: Fits, steps: int, minibatch: int, rate: float, seed: int) -> Tensor:
    """Descent on the dense matrices of minibatches."""
    dense, truth = Dense(fits, MLP), copy(fits.truth(MLP))
    damping, count = raycurv.Damping.parse(DESCENT["damping"]), len(MLP.data)
    whole, parts = dense.damped(DESCENT["damping"]) - dense.matrix, -(-count // minibatch)
    curvatures = [dense.run.curvature(name) for name in dense.names]

    def preconditioned(x: Tensor) -> Tensor:
        blocks = x.split(torch.bincount(dense.of).tolist(), dim=1)
        return torch.cat([
            c.apply(b.view(len(b), c.block.d_out, -1), c.inverse(damping)).flatten(1)
            for c, b in zip(curvatures, blocks, strict=True)
        ], dim=1)  # fmt: skip

    iterates, blocks = [rate * preconditioned(dense.v)], {c.block.name: c.block for c in curvatures}
    for step in range(steps):
        order = np.random.default_rng([seed, step // parts]).permutation(count)
        chosen = np.array_split(order, parts)[step % parts]
        truth.case = replace(MLP, data=tuple(MLP.data[n] for n in chosen))
        jacobians = Jacobians(truth, blocks)
        jacobians.vector = x = iterates[-1]
        product = jacobians.products() + x @ whole
        iterates.append(x - rate * preconditioned(product - dense.v))
    return torch.stack(iterates[(steps + 1) // 2 :]).mean(0)


@pytest.mark.parametrize(
    "layout",
    ({}, {"stages": 2}, {"stages": 3, "schedule": "swept"}, {"stages": 2, "replicas": 2}),
    ids=str,
)
def test_descent_is_that_on_the_dense_matrices_of_its_minibatches(
    fits: Fits, layout: dict[str, Any]
) -> None:
    found = flat(answers(fits, MLP, **DESCENT, **NUMBERS, **layout))
    assert worst(found, fits.once("descent by hand", lambda: by_hand(fits, **NUMBERS))) < 1e-9
    if not layout:
        assert worst(found, by_hand(fits, **NUMBERS | {"seed": 6})) > 1e-4


def test_descent_goes_on_where_it_was_stopped(fits: Fits, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out, step = fits.run(MLP), fits.place(), linear_solver.descent_step
    numbers = DESCENT | {"steps": 4, "minibatch": 4, "batch_tokens": 9}
    settings = {"address": "none", "rank": "full", "quiet": True} | numbers
    calls = []

    def stopped(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise RuntimeError("stopped")
        return step(*given)

    monkeypatch.setattr(linear_solver, "descent_step", stopped)
    with pytest.raises(RuntimeError, match="stopped"):
        run.ihvp(list(MLP.queries), out, **settings)
    products = run.ihvp(list(MLP.queries), out, **settings)
    assert len(calls) == 3 + 2
    want = answers(fits, MLP, **numbers)
    assert all(torch.equal(products.block(name)[0], want[name]) for name in want)


def test_descent_that_diverges_is_told_and_scores_nothing(fits: Fits) -> None:
    run, out = fits.run(MLP), fits.place()
    settings = {"address": "none", "quiet": True, **DESCENT, "steps": 9, "rate": 2.4}
    for _ in range(2):
        with pytest.raises(UserError, match="it has diverged"):
            run.ihvp(list(MLP.queries), out, **settings)
    table = read_directory(Store(out), "tables/solver").to_pydict()
    assert "diverged" in table["outcome"] and max(table["energy"]) > 0
