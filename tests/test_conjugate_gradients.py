"""Conjugate gradients against dense solves: answers, what is said of them, where they stop."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from dense import worst
from torch import Tensor

from raycurv.errors import NumericalError
from raycurv.mathematics.exact.conjugate_gradients import (
    Iterate,
    Progress,
    curvature_along,
    iteration,
    ritz_values,
)

# Blocks of a small model, and two queries of it.
SHAPES = ((3, 4), (5, 2), (1, 7))
SIZES = [o * i for o, i in SHAPES]
WIDTH, QUERIES = sum(SIZES), 2
# Dense solves with condition numbers of a few thousands, in float64 and in float32.
SOLVED, SINGLE = 1e-9, 2e-4


@pytest.fixture(scope="module")
def matrix() -> Tensor:
    """``G + λ`` of all blocks together, positive definite, with eigenvalues from 0.01 to 20."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
    return (q * torch.logspace(-2, 1.3, WIDTH, dtype=torch.float64)) @ q.T


@pytest.fixture(scope="module")
def right() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(QUERIES, WIDTH, generator=generator, dtype=torch.float64)


def diagonal_of_blocks(matrix: Tensor) -> Tensor:
    parts = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    return torch.where(parts[:, None] == parts, matrix, 0.0)


@dataclass
class Solved:
    """A solution ``[Q, WIDTH]``, the scalars of every iteration, and the iterates."""

    x: Tensor
    history: list[Progress]
    iterates: list[Tensor]
    grams: list[Tensor]


def solve(
    matrix: Tensor, right: Tensor, inverse: Tensor, *, tolerance: float = 1e-12, most: int = 200,
    alone: bool = False, dtype: torch.dtype = torch.float64,
) -> Solved:  # fmt: skip
    """As a driver does it: vectors block by block, and nothing but Grams between them."""

    def apart(vectors: Tensor) -> list[Tensor]:
        shaped = zip(vectors.split(SIZES, dim=1), SHAPES, strict=True)
        return [v.reshape(len(v), *shape) for v, shape in shaped]

    def together(blocks: list[Tensor]) -> Tensor:
        return torch.cat([b.flatten(1) for b in blocks], dim=1)

    blocks = [Iterate.zero(v) for v in apart(right.to(dtype))]
    progress: Progress | None = None
    found = Solved(right, [], [], [])
    while progress is None or progress.running:
        directions = together([b.r for b in blocks]).double() @ inverse
        u, w = apart(directions.to(dtype)), apart((directions @ matrix).to(dtype))
        grams = torch.stack([b.gram(*uw) for b, *uw in zip(blocks, u, w, strict=True)])
        progress = iteration(grams if alone else grams.sum(0), progress, tolerance, most)
        of = range(len(blocks)) if alone else [...] * len(blocks)
        blocks = [
            b.advanced(*uw, progress.alpha[n], progress.beta[n])
            for b, n, *uw in zip(blocks, of, u, w, strict=True)
        ]
        found.history.append(progress)
        found.grams.append(grams)
        found.x = together([b.x for b in blocks])
        found.iterates.append(found.x)
    return found


def jacobi(matrix: Tensor) -> Tensor:
    return torch.diag(1 / matrix.diagonal())


@pytest.mark.parametrize("alone", [False, True], ids=["whole model", "blocks alone"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_solution_is_that_of_a_dense_solve(
    matrix: Tensor, right: Tensor, alone: bool, dtype: torch.dtype
) -> None:
    truth = diagonal_of_blocks(matrix) if alone else matrix
    wide = dtype == torch.float64
    found = solve(
        truth, right, jacobi(matrix), alone=alone, dtype=dtype, tolerance=1e-12 if wide else 1e-6
    )
    assert set(found.history[-1].outcomes) == {"ok"}
    dense = torch.linalg.solve(truth, right.T).T
    assert worst(found.x, dense) < (SOLVED if wide else SINGLE)
    # The other matrix has another solution.
    other = torch.linalg.solve(matrix if alone else diagonal_of_blocks(matrix), right.T).T
    assert worst(found.x, other) > 0.1


def test_what_is_said_of_each_iterate_is_so(matrix: Tensor, right: Tensor) -> None:
    found = solve(matrix, right, jacobi(matrix), tolerance=1e-6)
    before = torch.zeros_like(right)
    for progress, x in zip(found.history, found.iterates, strict=True):
        rest = right - x @ matrix
        assert worst(progress.residual, rest.norm(dim=1) / right.norm(dim=1)) < 1e-7
        energy = ((x @ matrix) * x).sum(1) / 2 - (right * x).sum(1)
        assert worst(progress.energy, energy) < SOLVED
        if before.any():
            cosine = torch.cosine_similarity(x, before)
            assert worst(progress.cosine, cosine) < SOLVED
        else:
            assert progress.cosine.isnan().all()
        before = x
    energies = torch.stack([p.energy for p in found.history])
    assert (energies.diff(dim=0) <= 0).all() and (energies[0] < 0).all()


def test_the_first_iterate_is_the_preconditioners_solution_at_its_best_scale(
    matrix: Tensor, right: Tensor
) -> None:
    (first,) = solve(matrix, right, jacobi(matrix), most=1).iterates
    plain = right @ jacobi(matrix)
    best = (plain * right).sum(1) / ((plain @ matrix) * plain).sum(1)
    assert worst(first, best[:, None] * plain) < SOLVED


def test_an_exact_preconditioner_needs_one_iteration(matrix: Tensor, right: Tensor) -> None:
    found = solve(matrix, right, torch.linalg.inv(matrix), tolerance=1e-6)
    assert found.history[-1].steps.tolist() == [1, 1]
    assert len(solve(matrix, right, jacobi(matrix), tolerance=1e-6).history) > 10


def test_queries_stop_by_themselves(matrix: Tensor, right: Tensor) -> None:
    values, vectors = torch.linalg.eigh(matrix)
    # Of an eigenvector one iteration is enough, and of nothing none.
    mixed = torch.stack([vectors[:, 3], right[0], torch.zeros(WIDTH, dtype=torch.float64)])
    found = solve(matrix, mixed, torch.eye(WIDTH, dtype=torch.float64), most=5, tolerance=1e-6)
    last = found.history[-1]
    assert last.outcomes == ["ok", "stopped at steps", "zero"]
    assert last.steps.tolist() == [1, 5, 0]
    assert worst(found.x[0], vectors[:, 3] / values[3]) < SOLVED and not found.x[2].any()
    # The company of others changes nothing.
    alone = solve(matrix, mixed[1:2], torch.eye(WIDTH, dtype=torch.float64), most=5, tolerance=1e-6)
    assert worst(found.x[1:2], alone.x) < SOLVED


def test_negative_curvature_is_told_with_the_block_that_has_it(
    matrix: Tensor, right: Tensor
) -> None:
    turned = diagonal_of_blocks(matrix)
    second = slice(SIZES[0], SIZES[0] + SIZES[1])
    turned[second, second] *= -3
    found = solve(turned, right, torch.eye(WIDTH, dtype=torch.float64))
    last = found.history[-1]
    assert set(last.outcomes) == {"negative curvature"} and (last.curvature < 0).all()
    shares = curvature_along(found.grams[-1], last.beta)
    assert shares.argmin(0).tolist() == [1, 1]
    # What was reached before is kept.
    kept = found.iterates[-2] if len(found.iterates) > 1 else torch.zeros_like(right)
    assert torch.equal(found.x, kept)
    # Alone, the other blocks are solved.
    alone = solve(turned, right, torch.eye(WIDTH, dtype=torch.float64), alone=True)
    named = [alone.history[-1].outcomes[2 * b : 2 * b + 2] for b in range(3)]
    assert named == [["ok"] * 2, ["negative curvature"] * 2, ["ok"] * 2]


def test_numbers_that_are_none_are_refused(matrix: Tensor, right: Tensor) -> None:
    bad = matrix.clone()
    bad[0, 0] = torch.inf
    with pytest.raises(NumericalError, match="finite dot products"):
        solve(bad, right, jacobi(matrix))


def test_coefficients_give_the_eigenvalues_of_the_preconditioned_matrix(
    matrix: Tensor, right: Tensor
) -> None:
    found = solve(matrix, right, jacobi(matrix), most=25, tolerance=0.0)
    values = ritz_values([p.alpha for p in found.history], [p.beta for p in found.history])
    root = jacobi(matrix).sqrt()
    truth = torch.linalg.eigvalsh(root @ matrix @ root)
    assert worst(values[:, -1], truth[-1].expand(QUERIES)) < 1e-6
    assert (values[:, 0] >= truth[0] * (1 - 1e-9)).all()
