"""The certificate of a scoring against dense matrices, cases where it is known, and words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Fits
from dense import worst
from networks import MLP, REGRESSION, Case, vectors
from test_refinement import Dense, answers, flat
from torch import Tensor, nn

import raycurv
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
    monkeypatch.setitem(SOLVER_DEFAULTS, "tolerance", 1e-11)
    damping = "0.3"
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
        one = norm(left[:, own], dim=1) / norm(v[:, own], dim=1)
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
    assert "almost the same way: cosine 1;" in words and "not converged" not in words
