"""Block Lanczos, quadratures and the quadratic model of the loss against dense eigenvalues."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dense import worst
from torch import Tensor

from raycurv.mathematics.exact.grams import combined, dots
from raycurv.mathematics.exact.lanczos import Krylov
from raycurv.mathematics.exact.preconditioned_descent import (
    averaged,
    descended,
    descent_gram,
    descent_measures,
)
from raycurv.mathematics.exact.quadratic_model import (
    AlongDirection,
    SampleBias,
    largest_rate,
    softmax_radius,
)

WIDTH = 60
EXACT = 1e-10
# Vectors in float32: their dot products with a basis are known to some 1e-7.
SINGLE = 2e-6


def symmetric(values: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
    return (q * values) @ q.T


@pytest.fixture(scope="module")
def values() -> Tensor:
    """Some large, three of them equal, many small, two negative."""
    found = torch.linspace(0, 1, WIDTH, dtype=torch.float64)
    found[-5:] = torch.tensor([9.0, 9.0, 9.0, 11.0, 20.0])
    found[:2] = torch.tensor([-3.0, -1.0])
    return found


def probes(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)


def lanczos(a: Tensor, start: Tensor, steps: int, rounds: int = 2) -> tuple[Krylov, Tensor]:
    """As a driver does it; gives the basis ``[K, WIDTH]`` too."""
    krylov, turn = Krylov.begin(dots(start, start))
    basis, block = start[:0], combined(start, turn)
    for _ in range(steps):
        basis = torch.cat([basis, block])
        w = (block.double() @ a).to(start)
        total = torch.zeros(len(basis), len(block), dtype=torch.float64)
        for _ in range(rounds):
            c = dots(basis, w)
            w = w - combined(basis, c)
            total += c
        krylov, turn = krylov.extended(total, dots(w, w), start.dtype)
        if not turn.shape[1]:
            break
        block = combined(w, turn)
    return krylov, basis


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ends_are_the_dense_eigenpairs(values: Tensor, dtype: torch.dtype) -> None:
    a = symmetric(values)
    krylov, basis = lanczos(a, probes(4).to(dtype), 12)
    tolerance = EXACT if dtype == torch.float64 else SINGLE
    for end, truth in (("top", values.sort(descending=True)[0]), ("bottom", values.sort()[0])):
        found = krylov.end(end, 5 if end == "top" else 2)
        assert worst(found.values, truth[: len(found.values)]) < tolerance
        vectors = combined(basis, found.coefficients).double()
        assert worst(dots(vectors, vectors), torch.eye(len(vectors), dtype=torch.float64)) < SINGLE
        own = (vectors @ a - found.values[:, None] * vectors).norm(dim=1)
        assert float(own.max()) < 1e-4


def test_one_column_finds_an_eigenvalue_once_and_three_find_it_three_times(values: Tensor) -> None:
    for columns, times in ((1, 1), (3, 3)):
        krylov, _ = lanczos(symmetric(values), probes(columns), 14)
        found = krylov.end("top", 6).values
        assert int(((found - 9).abs() < 1e-6).sum()) == times


@pytest.mark.parametrize("steps", [2, 5, 9])
def test_residuals_are_the_pairs_own(values: Tensor, steps: int) -> None:
    a = symmetric(values)
    krylov, basis = lanczos(a, probes(3), steps)
    found = krylov.pairs
    vectors = combined(basis, found.coefficients)
    own = (vectors @ a - found.values[:, None] * vectors).norm(dim=1)
    assert worst(found.residuals, own) < 1e-8
    # An eigenvalue lies within its residual of each.
    distance = (found.values[:, None] - values).abs().min(1).values
    assert (distance <= found.residuals + 1e-9).all()


def test_without_the_second_round_the_basis_is_not_orthonormal() -> None:
    a = symmetric(10.0 ** torch.linspace(-9, 3, WIDTH, dtype=torch.float64))
    off = {}
    for rounds in (1, 2):
        _, basis = lanczos(a, probes(2), 25, rounds)
        off[rounds] = float((dots(basis, basis) - torch.eye(len(basis))).abs().max())
    assert off[2] < 1e-13 < 1e-11 < off[1]


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_quadratures_are_exact_for_polynomials(steps: int) -> None:
    a, start = symmetric(torch.linspace(-0.7, 1, WIDTH, dtype=torch.float64)), probes(2)
    krylov, _ = lanczos(a, start, steps)
    nodes, weights = krylov.quadrature()
    assert worst(weights.sum(1), torch.ones(2, dtype=torch.float64)) < EXACT
    power = start
    for degree in range(2 * steps + 2):
        moment = (power * start).sum(1) / start.square().sum(1)
        off = worst((weights * nodes**degree).sum(1), moment)
        assert (off < 1e-9) == (degree < 2 * steps)
        power = power @ a


def test_a_basis_that_holds_all_gives_the_density_itself(values: Tensor) -> None:
    # Probes of every axis are a mean over all, whatever the basis.
    krylov, _ = lanczos(symmetric(values), math.sqrt(WIDTH) * torch.eye(WIDTH).double(), 3)
    assert krylov.sizes == (WIDTH,)
    grid, width = torch.linspace(-6, 25, 500, dtype=torch.float64), 0.3
    density, error = krylov.density(grid, width)
    curves = torch.distributions.Normal(values[:, None], width).log_prob(grid).exp()
    assert worst(density, curves.mean(0)) < 1e-9
    assert abs(float(torch.trapezoid(density, grid)) - 1) < 1e-6
    assert (error >= 0).all()


def test_densities_have_the_error_they_state(values: Tensor) -> None:
    krylov, _ = lanczos(symmetric(values), probes(8).sign(), 7)
    grid = torch.linspace(-5, 25, 100, dtype=torch.float64)
    density, error = krylov.density(grid, 1.0)
    truth = torch.distributions.Normal(values[:, None], 1.0).log_prob(grid).exp().mean(0)
    assert ((density - truth).abs() <= 3 * error + 1e-3).double().mean() > 0.95


def test_nothing_reaches_beyond_what_probes_span() -> None:
    values = torch.zeros(WIDTH, dtype=torch.float64)
    values[:3] = torch.tensor([5.0, 2.0, 1.0])
    krylov, basis = lanczos(symmetric(values), probes(2), 20)
    assert len(basis) <= 5
    assert worst(krylov.end("top", 3).values, values[:3]) < EXACT
    none, turn = Krylov.begin(torch.zeros(2, 2, dtype=torch.float64))
    assert turn.shape == (2, 0) and none.start.shape == (0, 2)


# The quadratic model


def test_a_step_is_predicted_to_second_order() -> None:
    found = AlongDirection(loss=3.0, slope=-1.0, curvature=4.0, radius=0.5)
    assert found.predicted == 4.0 and found.best == 0.25 and not found.trusted
    assert math.isnan(AlongDirection(1.0, -1.0, -2.0, 3.0).best)


def test_the_radius_is_where_the_softmax_has_its_singularity() -> None:
    # log(1 + exp(t a)) is singular where a t = iπ.
    assert softmax_radius(2.0) == math.pi / 2 and softmax_radius(0.0) == math.inf
    # Nothing within the radius of larger distributions vanishes, and something a little beyond may.
    logits = torch.tensor([0.3, 0.3, -9.0], dtype=torch.complex128)
    a = torch.tensor([0.0, 2.0, 1.0], dtype=torch.complex128)
    angles = torch.linspace(0, 2 * math.pi, 400, dtype=torch.float64)
    for scale, vanishes in ((0.98, False), (1.02, True)):
        # The argument principle: zeros of Σ exp(z + t a) within a circle.
        t = scale * math.pi / 2 * torch.exp(1j * angles)
        phase = torch.angle(torch.exp(logits + t[:, None] * a).sum(1)).numpy()
        turns = round((np.unwrap(phase)[-1] - phase[0]) / (2 * math.pi))
        assert (turns != 0) == vanishes


def test_the_bias_of_a_sample_is_a_line_in_one_over_n() -> None:
    line = SampleBias.through([100, 200, 400], [3 + 50 / n for n in (100, 200, 400)])
    assert line.limit == pytest.approx(3) and line.at(400) == pytest.approx(0.125)
    assert largest_rate(4.0) == 0.5 and largest_rate(0.0) == math.inf


# Preconditioned descent


def test_descent_on_batches_comes_to_the_solution_where_its_rate_is_stable() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 12, generator=generator, dtype=torch.float64)
    v = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    a = rows.T @ rows / 64 + 0.3 * torch.eye(12)
    inverse = torch.diag(1 / a.diagonal())
    largest = float(torch.linalg.eigvals(inverse @ a).real.max())
    truth = torch.linalg.solve(a, v.flatten(1).T).T.reshape(v.shape)
    for rate, comes in ((0.3, True), (2.3, False)):
        x = torch.zeros_like(v)
        mean, energies = x, []
        for step in range(300):
            part = rows[torch.randperm(64, generator=generator)[:16]]
            a_batch = part.T @ part / 16 + 0.3 * torch.eye(12)
            w = (x.flatten(1) @ a_batch).reshape(v.shape)
            residual, energy = descent_measures(descent_gram(x, v, w))
            assert worst(residual, (v - w).flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1)) < 1e-9
            energies.append(energy)
            step_rate = torch.full((2,), rate / largest)
            x = descended(x, v, w, step_rate, lambda r: (r.flatten(1) @ inverse).view_as(r))
            mean = averaged(mean, x, step - 100) if step >= 100 else x
        assert (float(torch.cosine_similarity(mean.flatten(), truth.flatten(), 0)) > 0.99) == comes
        assert bool((energies[-1] < 0).all()) == comes
