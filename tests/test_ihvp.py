"""IHVPs are dense solves; truncated ones are the optimal truncation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from dense import ekfac_matrix, solve, worst
from networks import CASES, LLAMA, MLP, Case, language_model, sentences, vectors
from torch import Tensor, nn

import raycurv
from raycurv.mathematics.influence import ihvp
from raycurv.mathematics.influence.ihvp import kept_rank, truncated_svd

# A solve with a condition number of at most some thousands, in float64.
SOLVED = 1e-9
METHODS = ("ekfac", "kfac", "diagonal", "identity")


def fit_settings(method: str) -> dict[str, Any]:
    # The identity needs no labels, drawn or not.
    return {"method": method} | ({"fisher": "empirical"} if method == "identity" else {})


def products(fits: Any, run: Any, case: Case, **settings: Any) -> Any:
    settings = {"address": "none", "rank": "full"} | settings
    return run.ihvp(list(case.queries), fits.place(), quiet=True, **settings)


def dense_curvature(truth: Any, run: Any, name: str, method: str) -> Tensor:
    if method == "kfac":
        scale = truth.rows(name) / len(truth.case.data)
        return scale * torch.kron(truth.output_factor(name), truth.input_factor(name))
    if method == "diagonal":
        return truth.fisher(name).diag().diag()
    block = run.curvature(name)
    q_a, q_g = block.input_basis.dense(), block.output_basis.dense()
    return ekfac_matrix(q_a, q_g, truth.corrected(name, q_a, q_g))


def check(fits: Any, case: Case, method: str, damping: str, tolerance: float = SOLVED) -> None:
    run, truth = fits.run(case, **fit_settings(method)), fits.truth(case)
    made = products(fits, run, case, damping=damping)
    for name in run.block_names():
        got, ids = made.block(name)
        assert ids == [row["id"] for row in case.queries]
        gradients = [own[name] for own in truth.own_gradients[: len(ids)]]
        if method == "identity":
            want = torch.stack(gradients)
        else:
            curvature = dense_curvature(truth, run, name, method)
            mean = float(curvature.diag().mean())
            lam = float(damping[4:]) if damping.startswith("abs:") else float(damping) * mean
            want = torch.stack([solve(curvature, lam, gradient) for gradient in gradients])
        assert worst(got, want) < tolerance, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_ihvp_is_the_dense_solve(fits, case: Case) -> None:
    check(fits, case, "ekfac", "0.1")


@pytest.mark.parametrize("damping", ["0.1", "abs:0.02"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", [MLP, LLAMA], ids=lambda case: case.name)
def test_an_ihvp_is_the_dense_solve_of_every_method(
    fits, case: Case, method: str, damping: str
) -> None:
    check(fits, case, method, damping)


class Half(nn.Module):
    """One layer that no gradient reaches, one that is never called, one that works."""

    def __init__(self) -> None:
        super().__init__()
        self.mute = nn.Linear(5, 4)
        self.idle = nn.Linear(5, 4)
        self.works = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.works(x) + 0.0 * self.mute(x).sum(dim=1, keepdim=True)


def _half() -> nn.Module:
    torch.manual_seed(0)
    return Half().eval()


HALF = Case("half", _half, vectors(6, 5, "classes"), "classification")


@pytest.mark.parametrize("method", ["ekfac", "kfac", "diagonal"])
def test_a_block_without_curvature_has_zero_ihvps_and_says_so(fits, method: str) -> None:
    run = fits.run(HALF, method=method)
    outcomes = {row["block"]: row["eigh_outcome"] for row in run.blocks().to_pylist()}
    assert "zero" in outcomes["mute"] and "zero" in outcomes["idle"] and outcomes["works"] == "ok"
    for damping in ("0.1", "abs:1e-3"):
        made = products(fits, run, HALF, damping=damping)
        assert not made.block("mute")[0].any() and not made.block("idle")[0].any()
        assert made.block("works")[0].any()
    scores, _, _ = fits.scores(HALF, {"method": method}).matrix()
    assert torch.isfinite(torch.from_numpy(scores)).all()


def test_no_damping_with_a_zero_in_lambda_is_an_error_that_names_the_block(fits) -> None:
    silent = tuple({**row, "inputs": [0.0, *row["inputs"][1:]]} for row in MLP.data)
    case = replace(MLP, name="mlp, one input silent", data=silent)
    run = fits.run(case, method="diagonal")
    with pytest.raises(raycurv.UserError, match=r"block 0.*zeros in Λ"):
        products(fits, run, case, damping="0")


def test_no_damping_without_a_zero_is_the_plain_inverse(fits) -> None:
    run, truth = fits.run(MLP, method="diagonal"), fits.truth(MLP)
    made = products(fits, run, MLP, damping="0")
    for name in run.block_names():
        lam = truth.fisher(name).diag().view_as(truth.gradients(name)[0])
        want = torch.stack([own[name] / lam for own in truth.own_gradients[:3]])
        assert worst(made.block(name)[0], want) < SOLVED


# Truncation


def _wide() -> nn.Module:
    torch.manual_seed(2)
    first = nn.Sequential(nn.Linear(24, 24), nn.Tanh())
    return language_model(lambda _: first, lambda _: nn.Linear(24, 24, bias=False), width=24).eval()


WIDE = Case(
    "wide",
    _wide,
    sentences((12, 9, 12, 5, 10, 8), False),
    "causal-lm",
    {"blocks": ("1.0", "2")},
    batch_tokens=24,
)


@pytest.mark.parametrize("rank", [4, 8])
def test_a_truncated_ihvp_is_nearly_the_optimal_truncation(fits, rank: int) -> None:
    # Two power steps and eight spare columns: the error is within 1e-3 of the smallest there is,
    # and so are the singular values that are kept (measured: 4e-7).
    run, truth = fits.run(WIDE), fits.truth(WIDE)
    made = products(fits, run, WIDE, rank=rank)
    for name in run.block_names():
        curvature = dense_curvature(truth, run, name, "ekfac")
        lam = 0.1 * float(curvature.diag().mean())
        for q, got in enumerate(made.block(name)[0]):
            whole = solve(curvature, lam, truth.own_gradients[q][name])
            u, s, vh = torch.linalg.svd(whole)
            assert torch.linalg.matrix_rank(got) == rank
            smallest = torch.linalg.norm(whole - (u[:, :rank] * s[:rank]) @ vh[:rank])
            error = torch.linalg.norm(whole - got)
            assert smallest * (1 - 1e-9) <= error <= smallest * 1.001
            assert worst(torch.linalg.svdvals(got)[:rank], s[:rank]) < 1e-3
            assert error > 1e-3 * torch.linalg.norm(whole), "nothing was cut off"


def test_a_rank_as_large_as_the_block_is_no_truncation(fits) -> None:
    run = fits.run(WIDE)
    full = products(fits, run, WIDE)
    for rank in (13, 24, 1000):  # 13 * (24 + 25) numbers are no fewer than 24 * 25
        made = products(fits, run, WIDE, rank=rank)
        for name in run.block_names():
            assert worst(made.block(name)[0], full.block(name)[0]) < SOLVED
    cut = products(fits, run, WIDE, rank=11)
    assert all(worst(cut.block(n)[0], full.block(n)[0]) > 1e-6 for n in run.block_names())


@pytest.mark.parametrize("stages, batch_tokens", [(2, 24), (3, 5), (1, 100)])
def test_truncation_does_not_depend_on_stages_or_batches(
    fits, stages: int, batch_tokens: int
) -> None:
    run = fits.run(WIDE)
    want = products(fits, run, WIDE, rank=4)
    got = products(fits, run, WIDE, rank=4, stages=stages, batch_tokens=batch_tokens)
    other = products(fits, run, WIDE, rank=4, seed=1)
    for name in run.block_names():
        assert worst(got.block(name)[0], want.block(name)[0]) < 1e-10
        # The control: test matrices of another seed find another subspace.
        assert worst(other.block(name)[0], want.block(name)[0]) > 1e-8


def test_a_matrix_of_small_rank_is_kept_whole() -> None:
    m = torch.randn(2, 30, 3, dtype=torch.float64) @ torch.randn(2, 3, 25, dtype=torch.float64)
    tests = torch.randn(2, 25, 13, dtype=torch.float64)
    u, w = truncated_svd(m, 5, tests)
    assert worst(u @ w, m) < 1e-12


def test_test_matrices_depend_on_seed_query_and_block_alone() -> None:
    one = ihvp.test_matrix(0, "q", "block", 5, 3)
    assert torch.equal(one, ihvp.test_matrix(0, "q", "block", 5, 3))
    for other in ((1, "q", "block"), (0, "r", "block"), (0, "q", "bloc")):
        assert not torch.equal(one, ihvp.test_matrix(*other, 5, 3))


def test_truncation_is_left_out_where_whole_is_no_larger() -> None:
    assert kept_rank(None, 10, 10) is None
    assert kept_rank(4, 10, 10) == 4
    assert kept_rank(5, 10, 10) is None
