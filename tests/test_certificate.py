"""The certificate of a scoring against dense matrices, cases where it is known, and words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import Fits
from dense import worst
from networks import MLP, REGRESSION, Case, arrays, vectors
from test_refinement import Dense, answers, flat
from torch import Tensor, nn

import raycurv
from raycurv import UserError
from raycurv.jobs.influence.certificate import certificate_words
from raycurv.jobs.influence.influence_settings import SOLVER_DEFAULTS

# How far a certificate is from the dense matrix's, in float64.
EXACT = 1e-8
CERTIFIED: dict[str, Any] = {"certify": 2, "certify_steps": 200}


def certified(
    fits: Fits, case: Case, fit: Any = None, **settings: Any
) -> tuple[pa.Table, raycurv.Scores]:
    run = fits.run(case, **(fit or {}))
    settings = {"address": "none", "rank": "full", **CERTIFIED} | settings
    scores = run.influence(
        list(case.queries), list(case.data), fits.place(), quiet=True, **settings
    )
    return scores.certificate(), scores


def column(table: pa.Table, name: str, block: str | None = None) -> Tensor:
    rows = [row[name] for row in table.to_pylist() if row["block"] == block]
    return torch.tensor(rows, dtype=torch.float64)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(x, y, dim=1)


@pytest.mark.parametrize("case", (MLP, REGRESSION), ids=lambda case: case.name)
def test_a_certificate_is_what_the_dense_matrix_says(
    fits: Fits, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOLVER_DEFAULTS, "tolerance", 1e-9)
    damping = "1"
    table, scores = certified(fits, case, damping=damping)
    dense = Dense(fits, case)
    asked = table["query_id"].to_pylist()
    rows = [n for n, query in enumerate(case.queries) if query["id"] in asked]
    matrix = dense.damped(damping)
    x = flat(answers(fits, case, solver="ekfac", steps=None, tolerance=None, damping=damping))[rows]
    v, y = dense.v[rows], dense.solved(damping)[rows]
    left = v - x @ matrix
    norm = torch.linalg.vector_norm
    assert worst(column(table, "residual"), norm(left, dim=1) / norm(v, dim=1)) < EXACT
    assert worst(column(table, "cosine"), cosine(x, y)) < EXACT
    captured = (x * v).sum(1) ** 2 / (x * (x @ matrix)).sum(1) / (v * y).sum(1)
    assert worst(column(table, "captured"), captured) < EXACT
    assert column(table, "refined_residual").max() < EXACT and captured.max() < 0.99
    for number, name in enumerate(dense.names):
        own = dense.of == number
        one = norm(left[:, own], dim=1) / norm(v, dim=1)
        assert worst(column(table, "residual", name), one) < EXACT
        assert worst(column(table, "cosine", name), cosine(x[:, own], y[:, own])) < EXACT
        share = norm(x[:, own], dim=1) ** 2 / norm(x, dim=1) ** 2
        assert worst(column(table, "share", name), share) < EXACT
    own_gradients = torch.stack(
        [
            torch.cat([one[name].flatten() for name in dense.names])
            for one in fits.truth(case).own_gradients
        ]
    )
    both = torch.stack([x @ own_gradients.T, y @ own_gradients.T]).numpy()
    pearson = [np.corrcoef(both[0, q], both[1, q])[0, 1] for q in range(len(rows))]
    assert worst(column(table, "pearson"), torch.tensor(pearson)) < EXACT
    assert scores.manifest.facts["certificate"]["on"] == "train"


def line() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 1))


def off_by_one(count: int) -> tuple[dict[str, Any], ...]:
    """Examples whose labels are one above or below what :func:`line` says: every squared gradient
    of an output is 1, as its curvature is, and EK-FAC of the own labels is the Gauss-Newton."""
    rows = vectors(count, 4, "numbers")
    inputs = torch.tensor([row["inputs"] for row in rows])
    said = line()(inputs).flatten().tolist()
    return tuple(
        row | {"labels": [f + (-1) ** n]} for n, (row, f) in enumerate(zip(rows, said, strict=True))
    )


def test_where_the_fit_is_exact_so_are_its_answers(fits: Fits) -> None:
    exact = {"fisher": "empirical"}
    case = Case("a line", line, off_by_one(12), "regression", exact)
    table, scores = certified(fits, case, certify_steps=1)
    for name in ("cosine", "captured", "spearman"):
        assert worst(column(table, name), torch.ones(2)) < EXACT
    assert column(table, "residual").max() < 1e-6  # labels are of float32 at most
    words = " ".join(certificate_words(scores.manifest.facts["certificate"]))
    assert "almost the same direction: cosine 1;" in words and "not converged" not in words


def test_a_fit_on_too_little_is_seen_to_be_one(fits: Fits) -> None:
    case = replace(MLP, data=arrays(60, (5,), "classes"), batch_tokens=20)
    few = replace(case, name="of few", data=case.data[:4])
    every, _ = certified(fits, replace(case, name="of all"), damping="0.3", certify_steps=16)
    run = fits.run(few)
    place = fits.place()
    how = {
        "address": "none",
        "rank": "full",
        "quiet": True,
        "certify": 2,
        "certify_steps": 16,
        "damping": "0.3",
    }
    badly = run.influence(list(case.queries), list(case.data), place, **how)
    found, said = badly.certificate(), badly.manifest.facts["certificate"]
    for name in ("cosine", "spearman", "captured"):
        assert column(found, name).mean() < column(every, name).mean() - 0.1
    assert (said["on"], said["examples"]) == ("train", 60)
    # By the fit's own examples it is another system.
    own = run.influence(list(case.queries), list(case.data), place, **how, certify_on="fit")
    assert own.manifest.facts["certificate"]["examples"] == 4
    assert worst(column(own.certificate(), "residual"), column(found, "residual")) > 0.1


LAYOUTS: tuple[dict[str, Any], ...] = (
    {"stages": 3, "schedule": "swept"},
    {"stages": 2, "replicas": 2, "batch_tokens": 9},
    {"query_memory": "1000"},
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_certificate_does_not_depend_on_how_the_work_is_laid_out(
    fits: Fits, layout: dict[str, Any]
) -> None:
    settings = {"certify_steps": 2, "rank": "2"}
    want, found = (certified(fits, MLP, **settings, **how)[0] for how in ({}, layout))
    assert found.select(["query_id", "block", "outcome"]).equals(
        want.select(["query_id", "block", "outcome"])
    )
    for name in ("residual", "refined_residual", "cosine"):
        one, other = (np.array(table[name], np.float64) for table in (found, want))
        assert np.abs(one - other).max() < EXACT


def test_a_certificate_is_added_to_finished_scores_which_stay(fits: Fits) -> None:
    run, place = fits.run(MLP), fits.place()
    how: dict[str, Any] = {"address": "none", "quiet": True, "solver": "cg", "steps": 2}
    data = (list(MLP.queries), list(MLP.data), place)
    scores = run.influence(*data, **how)
    with pytest.raises(UserError, match="--certify 4"):
        scores.certificate()
    more = run.influence(*data, **how, certify=1)
    assert more.table().equals(scores.table())
    said = more.manifest.facts["certificate"]
    words = " ".join(certificate_words(said))
    assert "1 of 1 had not converged" in words and "scores are of the refined answers" in words
    page = raycurv.report(more, f"{place}.html")
    assert "1 of 1 had not converged" in Path(page).read_text()
    # Of whole answers what the solver says of its residual is true.
    row = more.certificate().to_pylist()[0]
    assert row["steps"] == 2 and row["refined_residual"] == pytest.approx(row["solver_residual"])
    longer = run.influence(*data, **how, certify=1, certify_steps=40)
    assert longer.certificate()["outcome"][0].as_py() == "ok"
    assert {"certificate", "solver"} <= longer.manifest.facts.keys()


@pytest.mark.parametrize(
    ("said", "fit", "settings"),
    [
        ("--method mfac", {"method": "mfac", "rows": 4}, {}),
        ("--method identity", {"method": "identity"}, {}),
        ("--coupling blocks", {}, {"solver": "cg", "coupling": "blocks"}),
        ("--certify-steps: expected a certificate", {}, {"certify": 0}),
        ("a damping above zero", {}, {"damping": "0"}),
        ("--certify-examples 10: expected at most the 9", {}, {"certify_examples": 10}),
    ],
)  # fmt: skip
def test_what_cannot_be_certified_is_refused_by_name(
    fits: Fits, said: str, fit: dict[str, Any], settings: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=said):
        certified(fits, MLP, fit, **settings)
