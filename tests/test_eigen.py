"""Eigendecompositions say what happened to them, and a failure has a name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from dense import worst

from raycurv.errors import NumericalError, UserError
from raycurv.mathematics import eigen
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.eigen import Eigenbasis, decompose, effective_rank
from raycurv.mathematics.gradients import rotate_before
from raycurv.mathematics.tiles import LARGEST_EIGH, decomposable, tile_ranges, tile_widths

CPU = torch.device("cpu")
EXACT = 1e-12  # float64, a dozen columns
DOUBLE = torch.float64


def factor(width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * width, width, generator=generator, dtype=DOUBLE)
    return x.T @ x / len(x)


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> list[torch.Tensor]:
    """Let the first calls of ``eigh`` fail; gives what it was called with."""
    real, calls = eigen.eigh, []

    def eigh(matrix: torch.Tensor) -> Any:
        calls.append(matrix)
        if len(calls) <= times:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(eigen, "eigh", eigh)
    return calls


def rebuilt(basis: Eigenbasis) -> torch.Tensor:
    q = basis.dense()
    return (q * basis.eigenvalues()) @ q.T


def test_a_basis_rebuilds_its_factor() -> None:
    a = factor(7)
    basis = decompose("f", (a,), DOUBLE, CPU)
    assert basis.outcome == "ok"
    assert worst(rebuilt(basis), a) < EXACT
    assert worst(basis.dense().T @ basis.dense(), torch.eye(7, dtype=DOUBLE)) < EXACT
    assert (basis.eigenvalues().diff() >= 0).all()


def test_tiles_are_decomposed_on_their_own() -> None:
    tiles = (factor(3), factor(2, 1))
    basis = decompose("f", tiles, DOUBLE, CPU)
    assert basis.tiles == (3, 2)
    assert worst(rebuilt(basis), torch.block_diag(*tiles)) < EXACT
    x = torch.randn(4, 5, dtype=DOUBLE)
    assert worst(basis.rotate(x), x @ basis.dense()) < EXACT
    assert worst(basis.unrotate(x), x @ basis.dense().T) < EXACT
    assert worst(basis.squared(DOUBLE), basis.dense() ** 2) < EXACT


def test_an_empty_basis_is_the_identity() -> None:
    x = torch.randn(4, 5)
    assert torch.equal(Eigenbasis().rotate(x), x) and torch.equal(Eigenbasis().unrotate(x), x)


@pytest.mark.parametrize("store", [torch.float64, torch.float32, torch.bfloat16])
def test_vectors_are_stored_as_asked_and_values_in_float64(store: torch.dtype) -> None:
    basis = decompose("f", (factor(6),), store, CPU)
    assert basis.vectors[0].dtype == store and basis.values[0].dtype == DOUBLE
    x = torch.randn(2, 6)
    assert basis.rotate(x).dtype == x.dtype


def test_a_failure_is_retried_with_jitter_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    a = factor(6)
    calls = failing(monkeypatch, 1)
    basis = decompose("f", (a,), DOUBLE, CPU)
    assert basis.outcome == "jittered" and len(calls) == 2
    assert not torch.equal(calls[1], calls[0])
    assert 0 < worst(calls[1], calls[0]) < 1e-9
    assert worst(rebuilt(basis), a) < 1e-9


def test_failures_without_end_are_an_error_with_the_factors_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing(monkeypatch, 2)
    with pytest.raises(NumericalError, match=r"factor layer\.input.*did not converge.*jittered"):
        decompose("layer.input", (factor(4),), DOUBLE, CPU)


def test_eigenvectors_that_are_not_finite_count_as_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = eigen.eigh, []

    def eigh(matrix: torch.Tensor) -> Any:
        calls.append(matrix)
        w, q = real(matrix)
        return (w, q * math.nan) if len(calls) == 1 else (w, q)

    monkeypatch.setattr(eigen, "eigh", eigh)
    assert decompose("f", (factor(4),), DOUBLE, CPU).outcome == "jittered"


def test_negative_eigenvalues_are_clamped_and_counted() -> None:
    q = torch.linalg.qr(factor(5)).Q
    a = (q * torch.tensor([-0.5, -0.1, 0.0, 1.0, 2.0], dtype=DOUBLE)) @ q.T
    basis = decompose("f", (a,), DOUBLE, CPU)
    assert basis.outcome == "clamped 2"
    assert float(basis.eigenvalues().min()) == 0.0
    assert worst(basis.eigenvalues()[-2:], torch.tensor([1.0, 2.0], dtype=DOUBLE)) < EXACT


def test_roundings_below_zero_are_not_worth_a_word() -> None:
    x = torch.randn(3, 9, dtype=DOUBLE)
    basis = decompose("f", (x.T @ x,), DOUBLE, CPU)
    assert basis.outcome == "ok" and float(basis.eigenvalues().min()) >= 0.0


def test_outcomes_of_several_kinds_are_all_told(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, 1)
    assert decompose("f", (-factor(3),), DOUBLE, CPU).outcome == "jittered+clamped 3+zero"


def test_a_factor_of_zeros_has_a_basis_and_says_zero() -> None:
    basis = decompose("f", (torch.zeros(4, 4, dtype=DOUBLE),), DOUBLE, CPU)
    assert basis.outcome == "zero"
    assert worst(basis.dense().T @ basis.dense(), torch.eye(4, dtype=DOUBLE)) < EXACT


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_factor_that_is_not_finite_is_an_error_with_its_name(bad: float) -> None:
    a, b = factor(3), factor(3, 1)
    b[1, 2] = bad
    with pytest.raises(NumericalError, match=r"factor layer\.output, tile 1"):
        decompose("layer.output", (a, b), DOUBLE, CPU)


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 0.0, 2.0])) == pytest.approx(3.0)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1.0)
    assert effective_rank(torch.zeros(3)) == 0.0


@pytest.mark.parametrize("width", [1, 2, 5, 7, 64, 100])
@pytest.mark.parametrize("limit", [None, 1, 2, 3, 64, 99])
def test_tiles_are_as_few_and_as_equal_as_can_be(width: int, limit: int | None) -> None:
    tiles = tile_widths(width, limit)
    assert sum(tiles) == width and max(tiles) <= (limit or width)
    assert max(tiles) - min(tiles) <= 1
    assert len(tiles) == math.ceil(width / (limit or width))


def test_an_axis_wider_than_lapack_can_take_is_cut_only_when_asked() -> None:
    def block(d_in: int, d_out: int) -> Block:
        return Block("layer", "linear", d_in, d_out, False)

    for blocks, tiles, words in (
        ([block(LARGEST_EIGH, LARGEST_EIGH)], None, LARGEST_EIGH),
        ([block(LARGEST_EIGH + 1, 10**6)], LARGEST_EIGH, 10**6),
    ):
        assert decomposable(blocks, tiles, words) == tuple(blocks)
    # The side of a vocabulary that is wider is a diagonal.
    (head,) = decomposable([block(4, 10**6)], None, 10**6)
    assert head == replace(block(4, 10**6), output_diagonal=True)
    for wide, side in ((block(LARGEST_EIGH + 1, 3), "input"), (block(3, 10**6), "output")):
        with pytest.raises(UserError, match=rf"block layer: .*{side} axis.*--max-factor-dim"):
            decomposable([block(4, 4), wide], None, 10**5)
    assert tile_widths(LARGEST_EIGH + 1, LARGEST_EIGH) == (16384, 16383)


def test_tiles_say_which_indices_they_hold() -> None:
    assert tile_ranges((3, 2, 2)) == (range(0, 3), range(3, 5), range(5, 7))
    assert tile_ranges(()) == ()
    basis = decompose("f", (factor(3), factor(2, 1)), DOUBLE, CPU)
    assert basis.ranges == (range(0, 3), range(3, 5))


def test_rows_are_turned_first_when_that_takes_fewer_flops() -> None:
    def flops(tokens: int, i: int, o: int, t_i: int, t_o: int, sharing: int) -> tuple[float, int]:
        return tokens * (i * t_i / sharing + o * t_o), i * o * (t_i + t_o)

    for shape in ((1, 64, 64, 64, 64, 1), (2048, 64, 64, 64, 64, 1), (100, 64, 16, 64, 16, 3)):
        before, after = flops(*shape)
        assert rotate_before(*shape) == (before < after)
    assert rotate_before(1, 64, 64, 64, 64, 1) and not rotate_before(2048, 64, 64, 64, 64, 1)
