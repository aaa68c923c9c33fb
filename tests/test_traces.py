"""Traces, diagonals and probes against dense matrices: values, errors, and where they are exact."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dense import uniform, worst
from torch import Tensor

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.exact.grams import combined, dots, orthonormalising
from raycurv.mathematics.exact.probes import normals, signs
from raycurv.mathematics.exact.trace_estimates import (
    DiagonalSum,
    Estimate,
    ProbeDots,
    hutch_plus_plus,
    hutchinson,
    student,
    x_trace,
)

WIDTH = 30
SHAPES = ((2, 5), (3, 4), (8, 1))
SIZES = [o * i for o, i in SHAPES]
EXACT = 1e-10
# Trials of the stated errors, and how many of 100 must hold the truth: 95 less the spread of that.
TRIALS, HELD = 200, 91
# Probes of each method. Half of Hutch++'s make the basis: it takes 18 products, XTrace 12.
# In shares of the largest eigenvalue the k-th is k^-DECAY; where few make most of a trace, what
# Hutchinson's probes say is skewed, and some hold the truth less often.
DECAY = 1.0
METHODS = {"hutchinson": 30, "hutch++": 12, "xtrace": 6}


def matrix(decay: float, rank: int = WIDTH) -> Tensor:
    """Symmetric, its eigenvalues ``k^-decay`` up to a rank, in a random basis."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
    values = torch.arange(1, WIDTH + 1, dtype=torch.float64) ** -decay
    values[rank:] = 0
    return (q * values) @ q.T


def apart(vectors: Tensor) -> list[Tensor]:
    shaped = zip(vectors.split(SIZES, dim=1), SHAPES, strict=True)
    return [v.reshape(len(v), *shape) for v, shape in shaped]


def estimated(method: str, a: Tensor, probes: Tensor) -> Estimate:
    """As a driver does it: basis and probes block by block, and dot products between them."""
    products = probes @ a
    if method == "hutchinson":
        own = (probes * products).split(SIZES, dim=1)
        return hutchinson(torch.stack([block.sum(1) for block in own]))
    first = len(probes) // 2 if method == "hutch++" else len(probes)
    basis = combined(products[:first], orthonormalising(dots(products[:first], products[:first])))
    of_blocks = zip(*map(apart, (basis, basis @ a, probes, products)), strict=True)
    found = ProbeDots.stacked([ProbeDots.of(*vectors) for vectors in of_blocks])
    return hutch_plus_plus(found, first) if method == "hutch++" else x_trace(found)


def traces(a: Tensor) -> Tensor:
    blocks = torch.stack([part.sum() for part in a.diagonal().split(SIZES)])
    return torch.cat([blocks, blocks.sum()[None]])


def drawn(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=generator, dtype=torch.float64).sign()


@pytest.fixture(scope="module")
def trials() -> dict[str, list[Estimate]]:
    a = matrix(DECAY)
    probes = {method: drawn(5, TRIALS * n).split(n) for method, n in METHODS.items()}
    return {method: [estimated(method, a, one) for one in probes[method]] for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_the_stated_error_holds_the_truth_in_95_of_100_trials(
    trials: dict[str, list[Estimate]], method: str
) -> None:
    truth = traces(matrix(DECAY))
    held = torch.stack([(e.value - truth).abs() <= e.margin for e in trials[method]])
    assert (held.double().mean(0) * 100 >= HELD).all(), held.double().mean(0)
    # And it is no wider than it has to be: a fifth of it holds far fewer.
    tight = torch.stack([(e.value - truth).abs() <= e.margin / 5 for e in trials[method]])
    assert (tight.double().mean(0) < 0.75).all()


@pytest.mark.parametrize("method", METHODS)
def test_estimates_have_no_bias(trials: dict[str, list[Estimate]], method: str) -> None:
    values = torch.stack([e.value for e in trials[method]])
    error = values.std(0) / TRIALS**0.5
    assert ((values.mean(0) - traces(matrix(DECAY))).abs() < 4 * error).all()


def test_deflation_is_worth_its_products(trials: dict[str, list[Estimate]]) -> None:
    # Errors of Hutchinson's fall with the root of the products. Of the blocks, too, though the
    # probes are the whole model's.
    products = {"hutchinson": 30, "hutch++": 18, "xtrace": 12}
    spread = {
        m: torch.stack([e.value for e in trials[m]]).std(0) * products[m] ** 0.5 for m in METHODS
    }
    assert (spread["hutch++"] < 0.9 * spread["hutchinson"]).all()
    assert (spread["xtrace"] < 0.9 * spread["hutchinson"]).all()


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_a_matrix_of_low_rank_is_exact(method: str) -> None:
    a = matrix(0.5, rank=3)
    found = estimated(method, a, drawn(0, 8))
    assert worst(found.value, traces(a)) < 1e-6
    assert float(found.standard_error.max()) < 1e-6
    assert worst(estimated("hutchinson", a, drawn(0, 8)).value, traces(a)) > 0.01


def test_a_matrix_that_is_not_definite_has_a_trace() -> None:
    a = matrix(DECAY) - 2 * matrix(1.0, rank=1)
    for method in METHODS:
        found = estimated(method, a, drawn(1, 8))
        assert ((found.value - traces(a)).abs() <= 2 * found.margin).all()


def test_student_is_what_tables_have() -> None:
    tabled = {3: 3.1824, 5: 2.5706, 9: 2.2622, 30: 2.0423}
    for degrees, value in tabled.items():
        assert abs(student(degrees) / value - 1) < 0.01


def test_the_diagonal_is_exact_of_a_diagonal_matrix_and_near_of_others() -> None:
    values = torch.arange(1.0, WIDTH + 1, dtype=torch.float64)
    a = 0.02 * matrix(0.5) + torch.diag(values)
    for truth, probes in ((torch.diag(values), 2), (a, 60)):
        total = DiagonalSum((5, 6))
        for probe in drawn(2, probes):
            total.add(probe.reshape(5, 6), (truth @ probe).reshape(5, 6))
        diagonal, error = total.result()
        off = (diagonal.flatten() - truth.diagonal()).abs()
        if probes == 2:
            assert float(off.max()) < EXACT and float(error.max()) < EXACT
        else:
            assert (off <= 4 * error.flatten()).all() and float(error.max()) < 0.02


def test_probes_are_the_counters() -> None:
    block = Block("layer", "linear", 3, 2, bias=False)
    for seed, draw in ((0, 0), (7, 5)):
        u = [[uniform(seed, block.name, o, draw, i) for i in range(3)] for o in (0, 1)]
        truth, one = torch.tensor(u, dtype=torch.float64), range(draw, draw + 1)
        assert torch.equal(signs(seed, block, one, torch.float64)[0], (2 * truth - 1).sign())
        normal = normals(seed, block, one, torch.float64)[0]
        assert worst(torch.special.ndtr(normal), truth) < EXACT
    many = partial(signs, 0, block, dtype=torch.float64)
    assert torch.equal(many(range(2, 5)), many(range(5))[2:])
    assert not torch.equal(many(range(3)), many(range(3, 6)))


def test_probes_have_the_moments_they_should() -> None:
    block = Block("wide", "linear", 40, 300, bias=False)
    for draw in (signs, normals):
        values = draw(0, block, range(1), torch.float64)[0]
        assert abs(float(values.mean())) < 0.03 and abs(float(values.square().mean()) - 1) < 0.05
    assert set(signs(0, block, range(1), torch.float64).unique().tolist()) == {-1.0, 1.0}
