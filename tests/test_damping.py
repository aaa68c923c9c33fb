"""Dampings that are chosen: the evidence against exact marginal likelihoods and dense matrices."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import snapshot
from dense import worst
from networks import LLAMA, MLP, REGRESSION, Case
from results import assert_close, changed
from test_ihvp import fit_settings
from test_scores import by_id
from torch import Tensor

import raycurv
from raycurv.jobs.influence.removals import Removals
from raycurv.mathematics.evidence import Density, Evidence
from raycurv.mathematics.influence.rank_agreement import agreement, mean_ranks
from raycurv.reporting import wording

# Eigenvalues of a bin count as equal.
BINNED = 3e-6
EXAMPLES, WIDTH = 40, 5


@pytest.fixture(scope="module")
def linear() -> tuple[Tensor, Tensor]:
    """Inputs and targets of a linear model with noise of standard deviation 0.3."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    x *= torch.tensor([3.0, 1.0, 0.3, 0.1, 0.01], dtype=torch.float64)
    noise = torch.randn(EXAMPLES, generator=generator, dtype=torch.float64)
    return x, x @ torch.linspace(-1, 1, WIDTH, dtype=torch.float64) + 0.3 * noise


def marginal(x: Tensor, y: Tensor, lam: float, noise: float | None = None) -> float:
    """``log p(y)`` of Gaussian weights and noise, exactly: y ~ N(0, (1 + x xᵀ / (N λ)) / β).

    β is ``noise``, or the best.
    """
    k = torch.eye(len(y), dtype=torch.float64) + x @ x.T / (len(y) * lam)
    square = float(y @ torch.linalg.solve(k, y))
    beta = len(y) / square if noise is None else noise
    log_det = float(torch.linalg.slogdet(k)[1]) - len(y) * math.log(beta)
    return -0.5 * (beta * square + log_det + len(y) * math.log(math.tau))


def trained(x: Tensor, y: Tensor, lam: float, noise: bool) -> Evidence:
    """The evidence about the weights that ridge regression with the decay λ finds."""
    f = x.T @ x / len(y)
    theta = torch.linalg.solve(f + lam * torch.eye(WIDTH, dtype=torch.float64), x.T @ y / len(y))
    errors = 0.5 * float((y - x @ theta).square().sum())
    numbers = len(y) if noise else None
    density = Density.of(torch.linalg.eigvalsh(f))
    return Evidence(density, float(theta.square().sum()), len(y), errors, numbers)


@pytest.mark.parametrize("noise", [False, True], ids=["known noise", "noise as it is"])
def test_of_a_linear_model_the_evidence_is_the_marginal_likelihood(linear, noise: bool) -> None:
    x, y = linear
    known = None if noise else 1.0
    # The loss as it stands leaves the Gaussian's constant out.
    constant = 0.0 if noise else 0.5 * EXAMPLES * math.log(math.tau)
    for lam in (1e-4, 0.01, 1.0):
        got = trained(x, y, lam, noise).log_evidence(lam) - constant
        assert got == pytest.approx(marginal(x, y, lam, known), rel=1e-5)


@pytest.mark.parametrize("noise", [False, True], ids=["known noise", "noise as it is"])
def test_trained_with_it_the_chosen_decay_has_the_largest_marginal_likelihood(
    linear, noise: bool
) -> None:
    x, y = linear
    lam = 1.0
    for _ in range(200):
        lam = trained(x, y, lam, noise).best()
    around = [marginal(x, y, lam * by, None if noise else 1.0) for by in (0.99, 1.0, 1.01)]
    assert around[1] == max(around) and max(around) - min(around) < 0.01
    # The other assumption about the noise has its maximum elsewhere.
    other = trained(x, y, lam, not noise).best()
    assert not 0.9 < other / lam < 1.1


def test_a_density_gives_the_sums_over_its_eigenvalues() -> None:
    values = torch.randn(2, 3000, dtype=torch.float64).mul(4).exp()
    values[0, :100] = 0.0
    joined = Density.joined([Density.of(part) for part in values])
    for lam in (1e-6, 0.1, 1e3):
        share, log = values / (values + lam), (lam / (values + lam)).log()
        assert joined.effective(lam) == pytest.approx(float(share.sum()), rel=BINNED)
        assert joined.shrinkage(lam) == pytest.approx(float(log.sum()), rel=BINNED)
    assert not len(Density.of(torch.zeros(3)).bins)


def dense_best(case: Case, run: Any, joint: bool) -> tuple[float, float]:
    """The λ of the largest evidence and its logarithm, from whole matrices and log determinants."""
    modules = dict(case.network().named_modules())
    found, norm = [], 0.0
    for name in run.block_names():
        module = modules[name]
        norm += sum(float(p.detach().double().square().sum()) for p in module.parameters())
        curvature = run.curvature(name)
        small = curvature.block.d_out * curvature.block.d_in < 100
        found.append(torch.linalg.eigvalsh(curvature.dense()) if small
                       else curvature.eigenvalues.double().flatten())  # fmt: skip
    if joint:
        whole = [run.curvature(name).rows_MOI.double().flatten(1) for name in run.block_names()]
        rows = torch.cat(whole, dim=1)
        found = [torch.linalg.eigvalsh(rows.T @ rows / len(rows))]
    spectra = torch.cat(found).clamp_min(0)
    losses = torch.tensor(run.examples()["loss"].to_pylist(), dtype=torch.float64)
    total, n = float(losses.sum()), len(losses)
    numbers = 3 * n if case.objective == "regression" else None

    def log_evidence(log_lam: Tensor) -> Tensor:
        delta = n * log_lam.exp()
        volume = 0.5 * (log_lam + math.log(n)) * len(spectra)
        volume = volume - 0.5 * (n * spectra + delta).log().sum()
        if numbers is None:
            return volume - total - 0.5 * delta * norm
        beta = numbers / (2 * total + delta * norm)
        return volume + 0.5 * numbers * (torch.log(beta / math.tau) - 1)

    grid = torch.linspace(-16, 8, 25, dtype=torch.float64)
    for step in (0.1, 0.01):  # there is one maximum: about it again, more finely
        values = torch.stack([log_evidence(one) for one in grid])
        at = int(values.argmax())
        assert 0 < at < len(grid) - 1
        grid = grid[at] + step * torch.arange(-12, 13, dtype=torch.float64)
    values = torch.stack([log_evidence(one) for one in grid])
    at = int(values.argmax())
    return float(grid[at].exp()), float(values[at])


@pytest.mark.parametrize(
    ("case", "method"),
    [
        *((case, "ekfac") for case in (MLP, REGRESSION, LLAMA)),
        *((MLP, method) for method in ("kfac", "diagonal", "mfac", "mfac, block")),
    ],
    ids=lambda part: getattr(part, "name", part),
)
def test_the_chosen_damping_has_the_largest_evidence_of_dense_matrices(
    fits, case: Case, method: str
) -> None:
    name, _, inverse = method.partition(", ")
    fit = fit_settings(name) | ({"rows": 4} if name == "mfac" else {})
    asked = {"inverse": inverse} if inverse else {}
    scores = fits.scores(case, fit, damping="evidence", **asked)
    said = scores.manifest.facts["damping"]
    lam, height = dense_best(case, fits.run(case, **fit), method == "mfac")
    chosen = raycurv.Damping.parse(said["value"])
    assert chosen.absolute and chosen.value == pytest.approx(lam, rel=5e-3)  # half of a step
    assert said["log_evidence"] == pytest.approx(height, rel=1e-5)
    curve = scores.damping().to_pydict()
    best = max(range(len(curve["damping"])), key=lambda k: curve["log_evidence"][k])
    assert curve["damping"][best] == chosen.value
    # Scores are those of the number, given as it is written.
    again = fits.scores(case, fit, damping=said["value"], **asked)
    assert scores.table().equals(again.table())
    usual = fits.scores(case, fit, **asked)
    assert worst(torch.tensor(scores.matrix()[0]), torch.tensor(usual.matrix()[0])) > 1e-3


def test_what_was_chosen_is_read_wherever_the_scores_are(fits, tmp_path: Path) -> None:
    scores = fits.scores(MLP, damping="evidence")
    said = scores.manifest.facts["damping"]
    value = said["value"]
    assert f"damping {value}" in repr(scores) and said["chosen_by"] == "evidence"
    assert said["examples"] == len(MLP.data) and 0 < said["effective_parameters"] < 100
    (file, *_) = sorted(Path(scores.path, "scores").glob("*.parquet"))
    assert pq.read_schema(file).metadata[b"raycurv.damping"] == f'"{value}"'.encode()
    shown, what = wording.damping(value, said)
    assert shown == wording.number(float(value[4:])) and "evidence of the fit's 9 examples" in what
    page = tmp_path / "report.html"
    raycurv.report(scores, page)
    assert shown in page.read_text() and "by the evidence of" in page.read_text()
    with pytest.raises(raycurv.UserError, match=r"whose damping was chosen.*damping 0\.1"):
        fits.scores(MLP).damping()


def test_stages_and_a_second_run_choose_the_same(fits, tmp_path: Path) -> None:
    scores = fits.scores(LLAMA, damping="evidence")
    run, asked = fits.run(LLAMA), {"address": "none", "rank": "full", "quiet": True}
    args = (list(LLAMA.queries), list(LLAMA.data), tmp_path)
    made = run.influence(*args, damping="evidence", stages=2, **asked)
    assert made.manifest.facts["damping"] == scores.manifest.facts["damping"]
    assert_close(tmp_path, Path(scores.path))
    before = snapshot(tmp_path)
    run.influence(*args, damping="evidence", **asked)
    assert not changed(before, tmp_path)
    with pytest.raises(raycurv.UserError, match="--damping was 'evidence'"):
        run.influence(*args, **asked)


@pytest.mark.parametrize(
    ("fit", "words"),
    [
        ({"method": "identity", "fisher": "empirical"}, "a fit with eigenvalues.*never damped"),
        ({}, "weights that are not all zero"),
    ],
    ids=["no curvature", "no weights"],
)
def test_where_there_is_nothing_to_choose_by_it_says_so(
    fits, tmp_path: Path, fit: dict[str, Any], words: str
) -> None:
    def zeros() -> torch.nn.Module:
        network = torch.nn.Sequential(torch.nn.Linear(5, 3)).eval()
        torch.nn.init.zeros_(network[0].weight)
        torch.nn.init.zeros_(network[0].bias)
        return network

    rows = list(MLP.data)
    source = zeros if not fit else MLP.network
    run = raycurv.fit(source, rows, tmp_path / "run", objective="classification", quiet=True,
                      address="none", **fit)  # fmt: skip
    with pytest.raises(raycurv.UserError, match=words):
        run.influence(
            rows, rows, tmp_path / "scores", damping="evidence", quiet=True, address="none"
        )


def test_a_word_is_refused_where_nothing_chooses(fits, tmp_path: Path) -> None:
    with pytest.raises(raycurv.UserError, match=r"--damping: expected a number.*run\.json"):
        fits.run(MLP).prune(tmp_path, damping="evidence", quiet=True, address="none")
    with pytest.raises(raycurv.UserError, match="--damping: expected a number"):
        fits.scores(MLP, damping="evidenc")


# Removals that were tried


@pytest.fixture(scope="module")
def removals() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randperm(9, generator=generator)[:4].tolist() for _ in range(12)]


def rows_of(removed: list[list[int]], measured_SQ: Tensor) -> list[dict[str, Any]]:
    """The table of removals, of the queries in another order than theirs."""
    ids = [row["id"] for row in reversed(MLP.queries)]
    return [
        {
            "removed": [f"row {n}" for n in one],
            "query_ids": ids,
            "measured": values.flip(0).tolist(),
        }
        for one, values in zip(removed, measured_SQ, strict=True)
    ]


def stop(*_: Any) -> None:
    raise InterruptedError


def foretold(scores: Any, removed: list[list[int]]) -> Tensor:
    """``[S, Q]``: sums of scores over each removal."""
    matrix = by_id(scores, MLP)
    return torch.stack([matrix[:, one].sum(dim=1) for one in removed])


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of columns without ties."""
    ranks = [x.argsort().argsort().double().numpy() for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize(
    ("rank", "stages"),
    [("full", {}), ("2", {"stages": 2, "schedule": "swept", "query_memory": "1KB"})],
    ids=["whole", "truncated, swept, a query a pass"],
)
def test_the_damping_that_foretells_removals_is_found(
    fits, removals, rank: str, stages: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def at(damping: str) -> Tensor:
        return foretold(fits.scores(MLP, damping=damping, rank=rank), removals)

    noise = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean = at("3")
    told = clean + 0.05 * clean.std(dim=0) * noise
    # What was tried twice counts as its mean.
    table = rows_of(removals, told + noise) + rows_of(removals[:4], (told - noise)[:4])
    table[4:12] = rows_of(removals[4:], told[4:])
    args = (list(MLP.queries), list(MLP.data))
    run, how = fits.run(MLP), {"quiet": True, "address": "none", "rank": rank, **stages}
    how |= {"damping": "heldout", "removals": table, "out": fits.place()}
    with monkeypatch.context() as patch:
        patch.setattr(Removals, "agreements", stop)
        with pytest.raises(InterruptedError):
            run.influence(*args, **how)
    scores = run.influence(*args, **how)  # goes on
    found = {row["damping"]: row for row in scores.damping().to_pylist()}
    for damping, row in found.items():
        each = [rank_correlation(a, b) for a, b in zip(at(damping).T, told.T, strict=True)]
        assert row["agreement"] == pytest.approx(np.mean(each), abs=1e-12), damping
    said = scores.manifest.facts["damping"]
    best = max(found.values(), key=lambda row: row["agreement"])
    assert said["value"] == best["damping"] and said["agreement"] == best["agreement"]
    assert found["3"]["agreement"] > 0.95 > found["0.001"]["agreement"]
    assert "12 removals" in said["why"] and wording.damping(said["value"], said)[0].endswith("Λ")
    again = fits.scores(MLP, damping=said["value"], rank=rank)
    assert worst(by_id(scores, MLP), by_id(again, MLP)) < (1e-10 if stages else 1e-300)
    assert {path.name for path in Path(scores.path).iterdir()} == {"run.json", "scores", "tables"}


def test_an_agreement_and_its_error_are_by_the_book() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 15, generator=generator, dtype=torch.float64)

    def mean(kept: list[int]) -> float:
        pairs = zip(a[:, kept], b[:, kept], strict=True)
        return float(np.mean([rank_correlation(x, y) for x, y in pairs]))

    every = list(range(15))
    without = np.array([mean([s for s in every if s != left]) for left in every])
    error = math.sqrt(14 / 15 * ((without - without.mean()) ** 2).sum())
    assert agreement(a, b) == pytest.approx((mean(every), error))
    assert mean_ranks(torch.tensor([3.0, 1.0, 3.0, 7.0])).tolist() == [1.5, 0.0, 1.5, 3.0]
    # What never changes foretells nothing.
    assert agreement(torch.zeros(3, 15), b)[0] == 0.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[:4], "at least 5 retrainings, each without other examples, got 4"),
        (lambda rows: rows[:1] * 9, "got 1"),
        (lambda rows: [*rows, rows[0] | {"removed": ["nobody"]}], "row 12, removed.*'nobody'"),
        (lambda rows: [*rows, rows[0] | {"removed": []}], "row 12, removed.*got none"),
        (lambda rows: [r | {"removed": "row 1"} for r in rows], "row 0: expected removed: a list"),
        (lambda rows: [*rows, rows[0] | {"query_ids": ["row 9"]}], "row 12, query_ids.*'row 9'"),
        (lambda rows: [*rows, rows[0] | {"measured": [1.0]}], "of every query"),
        (lambda rows: [*rows, rows[0] | {"measured": [1.0, math.nan, 0.0]}], "finite measurements"),
        (lambda rows: [{"removed": r["removed"]} for r in rows], "columns removed, query_ids"),
        (lambda rows: None, "--removals: expected removals that were tried"),
    ],
)  # fmt: skip
def test_removals_that_say_too_little_are_refused(
    fits, removals, change: Any, words: str, tmp_path: Path
) -> None:
    table = change(rows_of(removals, torch.randn(12, 3)))
    args = (list(MLP.queries), list(MLP.data), tmp_path)
    with pytest.raises(raycurv.UserError, match=words):
        fits.run(MLP).influence(
            *args, damping="heldout", removals=table, quiet=True, address="none"
        )


def test_removals_are_of_no_use_to_a_fisher_of_rows_or_another_damping(fits, removals) -> None:
    table = rows_of(removals, torch.randn(12, 3))
    args, how = (list(MLP.queries), list(MLP.data)), {"quiet": True, "address": "none"}
    with pytest.raises(raycurv.UserError, match=r"--damping heldout.*mfac.*by evidence"):
        fits.run(MLP, method="mfac", rows=4).influence(
            *args, fits.place(), damping="heldout", removals=table, **how
        )
    with pytest.raises(raycurv.UserError, match="none without"):
        fits.run(MLP).influence(*args, fits.place(), removals=table, **how)
