"""Scores are explicit per-example gradients, preconditioned densely."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from dense import Truth, ekfac_matrix, solve, worst
from networks import CASES, LLAMA, MIXER, MLP, Case
from test_ihvp import WIDE, fit_settings
from torch import Tensor

import raycurv
from raycurv.mathematics.gradients import Rotations, example_gradients
from raycurv.mathematics.influence import ihvp

# Dot products of dense solves in float64.
EXACT = 1e-9
TOKENS = [case for case in CASES if case.objective == "causal-lm"]


def by_id(scores: Any, case: Case) -> Tensor:
    """``[Q, N]`` in the data's order."""
    matrix, queries, trains = scores.matrix()
    q = [queries.index(row["id"]) for row in case.queries]
    n = [trains.index(row["id"]) for row in case.data]
    return torch.from_numpy(matrix)[q][:, n]


def own_scores(scores: Any, case: Case) -> Tensor:
    table = scores.self_influence()
    found = dict(zip(table["id"].to_pylist(), table["score"].to_pylist(), strict=True))
    return torch.tensor([found[row["id"]] for row in case.data], dtype=torch.float64)


def lists(scores: Any, column: str) -> dict[tuple[str, str], list[float]]:
    table = pq.read_table(f"{scores.path}/scores")
    return {(r["query_id"], r["train_id"]): r[column] for r in table.to_pylist()}


def preconditioned(truth: Truth, run: Any, name: str, gradients: list[Tensor]) -> list[Tensor]:
    block = run.curvature(name)
    q_a, q_g = block.input_basis.dense(), block.output_basis.dense()
    lam = truth.corrected(name, q_a, q_g)
    matrix = ekfac_matrix(q_a, q_g, lam)
    return [solve(matrix, 0.1 * float(lam.mean()), gradient) for gradient in gradients]


def dense_scores(truth: Truth, run: Any, case: Case) -> tuple[Tensor, Tensor]:
    """``[Q, N, B]`` and self-influence ``[N, B]``."""
    pairs, own = [], []
    for name in run.block_names():
        gradients = [e[name] for e in truth.own_gradients]
        products = preconditioned(truth, run, name, gradients)
        square = torch.tensor(
            [[float((p * g).sum()) for g in gradients] for p in products], dtype=torch.float64
        )
        pairs.append(square[: len(case.queries)])
        own.append(square.diag())
    return torch.stack(pairs, dim=2), torch.stack(own, dim=1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_scores_are_products_of_densely_preconditioned_gradients(fits, case: Case) -> None:
    scores = fits.scores(case, self_influence=True, per_block=True)
    pairs, own = dense_scores(fits.truth(case), fits.run(case), case)
    assert worst(by_id(scores, case), pairs.sum(dim=2)) < EXACT
    assert worst(own_scores(scores, case), own.sum(dim=1)) < EXACT
    (file, *_) = pq.ParquetDataset(f"{scores.path}/scores").files
    order = json.loads(pq.read_schema(file).metadata[b"raycurv.blocks"])
    assert order == fits.run(case).block_names()
    blocks = lists(scores, "block_scores")
    for q, query in enumerate(case.queries):
        for n, row in enumerate(case.data):
            got = torch.tensor(blocks[query["id"], row["id"]], dtype=torch.float64)
            scale = float(pairs.abs().max())
            assert float((got - pairs[q, n]).abs().max()) < EXACT * scale


@pytest.mark.parametrize("case", [MLP, LLAMA], ids=lambda case: case.name)
def test_scores_do_not_depend_on_which_side_is_turned(
    fits, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, _ = dense_scores(fits.truth(case), fits.run(case), case)

    def scored() -> Tensor:
        made = fits.run(case).influence(
            list(case.queries), list(case.data), fits.place(), quiet=True, address="none",
            rank="full",
        )  # fmt: skip
        return by_id(made, case)

    for turned in (True, False):
        monkeypatch.setattr(ihvp, "stays_turned", lambda *_, turned=turned: turned)
        assert worst(scored(), pairs.sum(dim=2)) < EXACT
    # IHVPs that stay in the eigenbasis say nothing to rows that are not turned.
    monkeypatch.setattr(ihvp, "stays_turned", lambda *_: True)
    monkeypatch.setattr(Rotations, "rotated", Rotations.rows)
    assert worst(scored(), pairs.sum(dim=2)) > 1e-3


def token_terms(truth: Truth, row: dict[str, Any], products: dict[str, Tensor]) -> Tensor:
    """Each token's part of a score: ``Σ_blocks g_t · P a_t``, over all calls and heads."""
    count = len(row["input_ids"])
    total = torch.zeros(count, dtype=torch.float64)
    for name, rows in truth.examine(row, truth.own(row), list(products)).items():
        terms = ((rows.g @ products[name]) * rows.a).sum(dim=1)
        routed = getattr(truth.network.get_submodule(name), "tokens", None)
        if routed is not None:  # an expert's
            total.index_add_(0, routed, terms)
            continue
        inner = truth.case.name == "tokens, heads behind positions" and name.endswith("each")
        total += terms.view(count, -1).sum(1) if inner else terms.view(-1, count).sum(0)
    return total


@pytest.mark.parametrize("case", TOKENS, ids=lambda case: case.name)
def test_token_scores_are_the_terms_of_the_sum(fits, case: Case) -> None:
    scores, truth, run = fits.scores(case, per_token=True), fits.truth(case), fits.run(case)
    tokens = lists(scores, "token_scores")
    matrix = by_id(scores, case)
    assert (
        worst(matrix, by_id(fits.scores(case, self_influence=True, per_block=True), case)) < EXACT
    )
    products = [
        {
            name: preconditioned(truth, run, name, [truth.own_gradients[q][name]])[0]
            for name in run.block_names()
        }
        for q in range(len(case.queries))
    ]
    scale = float(matrix.abs().max())
    for q, query in enumerate(case.queries):
        for n, row in enumerate(case.data):
            got = torch.tensor(tokens[query["id"], row["id"]], dtype=torch.float64)
            assert abs(float(got.sum() - matrix[q, n])) < EXACT * scale
            want = token_terms(truth, row, products[q])
            assert float((got - want).abs().max()) < EXACT * scale


@pytest.mark.parametrize("case", [MLP, LLAMA], ids=lambda case: case.name)
def test_identity_scores_are_dot_products(fits, case: Case) -> None:
    scores = fits.scores(case, fit_settings("identity"), damping="0.7")
    names = fits.run(case).block_names()
    flat = torch.stack(
        [torch.cat([e[n].flatten() for n in names]) for e in fits.truth(case).own_gradients]
    )
    assert worst(by_id(scores, case), flat[:3] @ flat.T) < EXACT


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("case", [MLP, LLAMA], ids=lambda case: case.name)
def test_scores_are_exact_in_a_cut_basis(fits, case: Case) -> None:
    cut = {"max_factor_dim": 3}
    scores = fits.scores(case, cut, self_influence=True)
    pairs, own = dense_scores(fits.truth(case), fits.run(case, **cut), case)
    assert worst(by_id(scores, case), pairs.sum(dim=2)) < EXACT
    assert worst(own_scores(scores, case), own.sum(dim=1)) < EXACT
    # The control: it is another operator than that of the whole basis.
    assert worst(by_id(scores, case), by_id(fits.scores(case), case)) > 1e-4


@pytest.mark.parametrize("through_gradients", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("numbers_at_once", [2**23, 1])
def test_low_rank_scores_are_those_of_the_truncated_ihvp(
    fits,
    through_gradients: bool,
    per_token: bool,
    numbers_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("raycurv.mathematics.influence.scores.TOGETHER", numbers_at_once)
    monkeypatch.setattr(
        "raycurv.mathematics.influence.scores.score_through_gradients", lambda *_: through_gradients
    )
    run = fits.run(WIDE)
    made = run.ihvp(list(WIDE.queries), fits.place(), quiet=True, address="none", rank=4)
    want = torch.zeros(len(WIDE.queries), len(WIDE.data), dtype=torch.float64)
    for name in run.block_names():
        gradients = torch.stack([e[name] for e in fits.truth(WIDE).own_gradients])
        want += made.block(name)[0].flatten(1) @ gradients.flatten(1).T
    scores = run.influence(
        list(WIDE.queries), list(WIDE.data), fits.place(), quiet=True, address="none", rank=4,
        per_token=per_token,
    )  # fmt: skip
    assert worst(by_id(scores, WIDE), want) < EXACT


@pytest.mark.parametrize("case", [WIDE, MLP, LLAMA], ids=lambda case: case.name)
def test_scores_do_not_depend_on_how_much_is_formed_at_once(
    fits, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whole blocks of a small network fit into a piece: here it takes a few outputs.
    pairs, own = dense_scores(fits.truth(case), fits.run(case), case)
    for module in ("influence.scores", "gradients"):
        monkeypatch.setattr(f"raycurv.mathematics.{module}.PIECE", 50)
    monkeypatch.setattr("raycurv.mathematics.gradients.CHUNK", 50)
    made = fits.run(case).influence(
        list(case.queries), list(case.data), fits.place(), quiet=True, address="none",
        rank="full", self_influence=True,
    )  # fmt: skip
    assert worst(by_id(made, case), pairs.sum(dim=2)) < EXACT
    assert worst(own_scores(made, case), own.sum(dim=1)) < EXACT


def test_a_rank_as_large_as_the_block_scores_as_full_rank(fits) -> None:
    assert worst(by_id(fits.scores(WIDE, rank=24), WIDE), by_id(fits.scores(WIDE), WIDE)) < EXACT
    assert worst(by_id(fits.scores(WIDE, rank=4), WIDE), by_id(fits.scores(WIDE), WIDE)) > 1e-6


def test_queries_in_several_passes_score_as_in_one(fits) -> None:
    for case in (MLP, MIXER):
        several = fits.scores(case, query_memory="1", self_influence=True)
        assert worst(by_id(several, case), by_id(fits.scores(case), case)) < EXACT


def test_top_keeps_each_querys_extremes(fits) -> None:
    kept = fits.scores(MLP, top_k=2).table().to_pylist()
    matrix = by_id(fits.scores(MLP), MLP).numpy()
    for q, query in enumerate(MLP.queries):
        got = {r["train_id"]: r["score"] for r in kept if r["query_id"] == query["id"]}
        order = np.argsort(matrix[q])
        assert set(got) == {MLP.data[n]["id"] for n in (*order[:2], *order[-2:])}


def test_grouped_rows_make_each_groups_gradient() -> None:
    a, g = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 6)
    got = example_gradients(a, g)
    for n in range(2):
        for o in range(6):
            want = sum(g[n, t, o] * a[n, t, o // 3] for t in range(3))
            assert worst(got[n, o], want) < 1e-6  # float32


def test_token_scores_without_positions_are_refused(fits) -> None:
    with pytest.raises(raycurv.UserError, match="--per-token"):
        fits.scores(MLP, per_token=True)
