"""The joint step is the constrained minimum of the dense model, and better than other steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dense import ekfac_matrix, worst
from pruning import (
    BLOCK,
    D_IN,
    D_OUT,
    DAMPING,
    METHODS,
    Quadratic,
    basis,
    curvature,
    joint_update,
    numbers,
    predicted_increase,
    quadratic,
    rank_quadratic,
    rank_surgeons,
)
from torch import Tensor

import raycurv
from raycurv.errors import NumericalError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import BlockCurvature, Damping
from raycurv.mathematics.eigen import Eigenbasis
from raycurv.mathematics.pruning.rank_surgeon import RankSurgeon, rank_increase, solve_kept
from raycurv.mathematics.pruning.update import Solver
from raycurv.mathematics.rank.rank_inverse import rank_inverse

# Solves with condition numbers of at most some thousands, in float64.
SOLVED = 1e-9
W = numbers(D_OUT, D_IN, seed=5)
G = 0.1 * numbers(D_OUT, D_IN, seed=6)
KEEP = numbers(D_OUT, D_IN, seed=7) > 0.3
GRADIENTS = pytest.mark.parametrize("gradient", [None, G], ids=["converged", "first order"])
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
# By conjugate gradients, to the last digit that the comparison asks for.
ITERATED = Solver(tolerance=1e-12, dense_up_to=0)
RANKS = pytest.mark.parametrize("m", [5, 90])
LAM = 1e-2


def gone(keep: Tensor) -> list[int]:
    return (~keep).flatten().nonzero()[:, 0].tolist()


def single_steps(truth: Quadratic, w: Tensor, keep: Tensor) -> Tensor:
    """The steps for single weights added up, as public code has it; removed weights at zero."""
    inverse = torch.linalg.inv(truth.damped)
    step = torch.zeros(w.numel(), dtype=torch.float64)
    for k in gone(keep):
        step -= inverse[:, k] * w.flatten()[k] / inverse[k, k]
    return torch.where(keep.flatten(), step, -w.flatten())


@GRADIENTS
@EVERY_METHOD
@pytest.mark.parametrize("solver", [Solver(), ITERATED], ids=["dense", "iterated"])
@pytest.mark.parametrize("keep", [KEEP, numbers(D_OUT, D_IN, seed=8) > -1], ids=["few", "most"])
def test_the_joint_step_is_the_constrained_minimum(method, gradient, solver, keep) -> None:
    truth = quadratic(method, gradient)
    want = truth.minimum(W, gone(keep)).view_as(W)
    found = joint_update(curvature(method), W, keep, DAMPING, gradient, solver)
    assert worst(found.w_OI - W, want) < SOLVED
    assert found.outcome == "ok" and found.residual < SOLVED
    assert not found.w_OI[~keep].any()
    # No step where nothing of the others' curvature is mixed in.
    still = method in ("diagonal", "identity") and gradient is None
    assert torch.equal(found.w_OI[keep], W[keep]) == still


@EVERY_METHOD
def test_the_predicted_increase_is_the_dense_models(method) -> None:
    truth, block, step = quadratic(method, G), curvature(method), numbers(D_OUT, D_IN, seed=9)
    zero = replace(truth, gradient=0 * truth.gradient)
    assert predicted_increase(block, step, G) == pytest.approx(truth.prediction(step), rel=SOLVED)
    assert predicted_increase(block, step) == pytest.approx(zero.prediction(step), rel=SOLVED)
    damped = predicted_increase(block, step, G, DAMPING)
    assert damped == pytest.approx(truth.value(step), rel=SOLVED)


@pytest.mark.parametrize("method", ["ekfac", "tiles", "kfac"])
def test_the_joint_step_loses_less_than_no_step_and_than_single_steps_together(method) -> None:
    light = Damping(1e-3)
    truth, block = quadratic(method, None, light), curvature(method)
    joint = predicted_increase(block, joint_update(block, W, KEEP, light).w_OI - W)
    none = predicted_increase(block, torch.where(KEEP, 0, -W))
    apart = predicted_increase(block, single_steps(truth, W, KEEP).view_as(W))
    assert joint < 0.7 * none
    assert joint < 0.7 * apart
    # The control: for one weight the two are one.
    one = torch.ones_like(KEEP)
    one[1, 2] = False
    alone = predicted_increase(block, joint_update(block, W, one, light).w_OI - W)
    single = predicted_increase(block, single_steps(truth, W, one).view_as(W))
    assert alone == pytest.approx(single, rel=SOLVED)


def test_the_joint_step_of_a_set_costs_its_saliency() -> None:
    truth, block = quadratic("ekfac", G), curvature("ekfac")
    found = joint_update(block, W, KEEP, DAMPING, G)
    lowest = truth.value(truth.minimum(W, ()))
    cost = predicted_increase(block, found.w_OI - W, G, DAMPING) - lowest
    assert cost == pytest.approx(truth.cost(W, gone(KEEP)), rel=SOLVED)


def wide() -> tuple[BlockCurvature, Tensor, Tensor]:
    """A block of 200 x 150 with a spectrum like those of networks, and a mask."""
    d_out, d_in = 200, 150
    block = Block("wide", "linear", d_in, d_out, False)
    lam = torch.outer(torch.arange(1.0, d_out + 1) ** -1, torch.arange(1.0, d_in + 1) ** -1)
    lam = lam.double() * numbers(d_out, d_in, seed=1).square()
    wide = BlockCurvature(block, basis(d_in, seed=2), basis(d_out, seed=3), lam)
    # Only three outputs lose weights, and have some that stay, so that the dense solve is small.
    keep = torch.zeros(d_out, d_in, dtype=torch.bool)
    keep[:4] = numbers(4, d_in, seed=4) > 0
    return wide, numbers(d_out, d_in, seed=5), keep


@pytest.mark.parametrize(
    "dtype, tolerance, agreement", [(torch.float64, 1e-10, 1e-8), (torch.float32, 1e-5, 1e-3)]
)
def test_conjugate_gradients_meet_their_residual_on_a_wide_block(
    dtype, tolerance, agreement
) -> None:
    # The error is at most the residual times the condition number, some hundreds here.
    block, w, keep = wide()
    solver = Solver(tolerance, 1000, dtype)
    found = joint_update(block, w.to(dtype), keep, DAMPING, solver=solver)
    assert found.outcome == "ok" and found.residual <= tolerance
    assert 0 < found.iterations < 300
    assert found.w_OI.dtype == dtype and not found.w_OI[~keep].any()
    # F_PP from the basis' rows that P touches, and F_PQ w_Q as a whole matrix product.
    q_a, q_g, lam = block.input_basis.dense(), block.output_basis.dense(), block.eigenvalues
    o, i = keep.nonzero().T
    rotated = (q_g[o][:, :, None] * q_a[i][:, None, :]).flatten(1)
    matrix = (rotated * (lam + block.damping(DAMPING)).flatten()) @ rotated.T
    removed = torch.where(keep, 0, w)
    right = (q_g @ (lam * (q_g.T @ removed @ q_a)) @ q_a.T)[keep]
    want = w[keep] + torch.linalg.solve(matrix, right)
    assert worst(found.w_OI[keep], want) < agreement


def test_conjugate_gradients_on_a_wide_block_of_which_most_stays_are_the_step_by_its_inverse() -> (
    None
):
    block, w, gone = wide()
    found = joint_update(block, w, ~gone, DAMPING, solver=Solver(1e-10, 1000))
    assert found.outcome == "ok" and found.residual <= 1e-10
    # δ = −F⁻¹ E_Q ([F⁻¹]_QQ)⁻¹ w_Q, Q being as few as stayed above.
    q_a, q_g, lam = block.input_basis.dense(), block.output_basis.dense(), block.eigenvalues
    inverse = 1 / (lam + block.damping(DAMPING))
    o, i = gone.nonzero().T
    rotated = (q_g[o][:, :, None] * q_a[i][:, None, :]).flatten(1)
    forces = torch.zeros_like(w)
    forces[gone] = torch.linalg.solve((rotated * inverse.flatten()) @ rotated.T, w[gone])
    want = -q_g @ (inverse * (q_g.T @ forces @ q_a)) @ q_a.T
    assert worst(found.w_OI - w, want) < 1e-8


def test_too_few_iterations_are_an_outcome_and_not_a_silence() -> None:
    block, w, keep = wide()
    found = joint_update(block, w, keep, DAMPING, solver=Solver(1e-10, 3))
    assert (found.outcome, found.iterations) == ("not converged", 3)
    assert found.residual > 1e-10
    assert not found.w_OI[~keep].any()
    assert joint_update(block, w, keep, DAMPING, solver=Solver(1e-10, 0)).outcome != "ok"


def test_a_residual_beyond_the_dtype_ends_as_not_converged() -> None:
    block, w, keep = wide()
    found = joint_update(block, w, keep, DAMPING, solver=Solver(1e-12, 5000, torch.float32))
    assert found.outcome == "not converged"
    assert 1e-12 < found.residual < 1e-4
    assert found.iterations < 5000


def test_a_step_with_nothing_to_remove_is_none() -> None:
    found = joint_update(curvature("ekfac"), W, torch.ones_like(KEEP), DAMPING, solver=ITERATED)
    assert torch.equal(found.w_OI, W)
    assert (found.outcome, found.iterations, found.residual) == ("ok", 0, 0.0)
    everything = joint_update(curvature("ekfac"), W, torch.zeros_like(KEEP), DAMPING)
    assert not everything.w_OI.any()


def test_a_block_without_curvature_leaves_the_others_where_they_are() -> None:
    nothing = BlockCurvature(BLOCK, basis(D_IN), basis(D_OUT), 0 * W)
    found = joint_update(nothing, W, KEEP, DAMPING, 0 * G)
    assert torch.equal(found.w_OI, torch.where(KEEP, W, 0))
    assert found.outcome == "zero"


def test_mistakes_name_the_block() -> None:
    holes = BlockCurvature(BLOCK, Eigenbasis(), Eigenbasis(), torch.zeros(D_OUT, D_IN).add(KEEP))
    with pytest.raises(raycurv.UserError, match=r"block layer.*zeros in Λ"):
        joint_update(holes, W, KEEP, Damping(0.0))
    with pytest.raises(raycurv.UserError, match=r"block layer.*\(4, 8\)"):
        joint_update(curvature("ekfac"), W, KEEP[:, :8], DAMPING)
    below_zero = replace(curvature("ekfac"), lam_OI=curvature("ekfac").eigenvalues - 1)
    with pytest.raises(NumericalError, match=r"block layer.*positive definite"):
        joint_update(below_zero, W, KEEP, Damping(1e-9, absolute=True))


# A model of two blocks under a rank-m Fisher


def model(m: int, first_order: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    size = 2 * D_OUT * D_IN
    keep = numbers(size, seed=13) > 0.2
    g = 0.1 * numbers(size, seed=12) if first_order else None
    return numbers(m, size, seed=11), numbers(size, seed=10), keep, g


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., : D_OUT * D_IN], x[..., D_OUT * D_IN :]


def by_parts(
    rows: Tensor, w: Tensor, keep: Tensor, g: Tensor | None, outputs: int = D_OUT
) -> Tensor:
    """As a job does it: sums over the parts, one solve, then every part its own."""
    surgeons = list(zip(rank_surgeons(rows, w, LAM, g, outputs), masks(keep), strict=True))
    grams, brackets = zip(*(s.share(k) for s, k in surgeons), strict=True)
    z = solve_kept(sum(grams), sum(brackets), LAM)
    return torch.cat([s.remaining(k, Solver(), z).w_OI.flatten() for s, k in surgeons])


def masks(keep: Tensor) -> list[Tensor]:
    return [k.view(D_OUT, D_IN) for k in halves(keep)]


def alone(rows: Tensor, keep: Tensor, w: Tensor, g: Tensor | None = None) -> Tensor:
    """All columns as one block that stands alone."""
    outputs = len(w) // D_IN
    block = replace(BLOCK, d_out=outputs)
    inverse = rank_inverse(rows @ rows.T, len(w), LAM, "the test", rows)
    rows_MOI = rows.unflatten(1, (outputs, D_IN))
    surgeon = RankSurgeon(
        block, w.view(-1, D_IN), lambda: iter([(slice(0, outputs), rows_MOI)]), inverse,
        None if g is None else g.view(-1, D_IN),
    )  # fmt: skip
    return surgeon.remaining(keep.view(-1, D_IN), Solver()).w_OI.flatten()


@RANKS
@pytest.mark.parametrize("first_order", [False, True])
def test_the_joint_step_of_a_rank_m_fisher_is_the_constrained_minimum(m, first_order) -> None:
    rows, w, keep, g = model(m, first_order)
    want = rank_quadratic(rows, LAM, g).minimum(w, gone(keep))
    found = by_parts(rows, w, keep, g)
    assert worst(found - w, want) < SOLVED
    assert worst(alone(rows, keep, w, g) - w, want) < SOLVED
    assert not found[~keep].any()


@RANKS
def test_blocks_that_stand_alone_take_another_step(m) -> None:
    rows, w, keep, _ = model(m, False)
    own, whole = [], by_parts(rows, w, keep, None)
    for r, k, x in zip(halves(rows), halves(keep), halves(w), strict=True):
        truth = rank_quadratic(r, LAM, None)
        own.append(alone(r, k, x))
        assert worst(own[-1] - x, truth.minimum(x, gone(k))) < SOLVED
    assert worst(torch.cat(own), whole) > 1e-2


def test_the_step_does_not_depend_on_how_many_outputs_are_looked_at_at_once() -> None:
    rows, w, keep, g = model(5, True)
    want = by_parts(rows, w, keep, g)
    assert worst(by_parts(rows, w, keep, g, outputs=1), want) < SOLVED


def test_rows_kept_in_less_are_computed_with_in_float64() -> None:
    rows, w, keep, g = model(5, True)
    rows = rows.bfloat16()
    assert worst(by_parts(rows, w, keep, g), by_parts(rows.double(), w, keep, g)) < SOLVED


@RANKS
def test_the_predicted_increase_is_a_sum_over_parts(m) -> None:
    rows, w, keep, _ = model(m, False)
    step, truth = by_parts(rows, w, keep, None) - w, rank_quadratic(rows, LAM, None)
    parts = zip(rank_surgeons(rows, w, LAM), halves(step), strict=True)
    found = [s.increase(x.view(D_OUT, D_IN)) for s, x in parts]
    together = rank_increase(sum(f.seen for f in found))
    assert together == pytest.approx(truth.prediction(step), rel=SOLVED)
    assert sum(f.alone for f in found) != pytest.approx(together, rel=1e-3)


def test_the_joint_step_of_a_rank_m_fisher_loses_less_than_single_steps_together() -> None:
    # By the damped model: with fewer rows than weights the Fisher itself hardly sees the step.
    rows, w, keep, _ = model(90, False)
    truth = rank_quadratic(rows, LAM, None)
    joint = truth.value(by_parts(rows, w, keep, None) - w)
    assert joint < 0.7 * truth.value(torch.where(keep, 0, -w))
    assert joint < 0.7 * truth.value(single_steps(truth, w, keep))


def test_a_rank_m_fisher_without_damping_is_refused() -> None:
    for lam in (0.0, -1.0, float("nan")):
        with pytest.raises(raycurv.UserError, match=r"rank-m Fisher.*--damping"):
            solve_kept(numbers(5, 5), numbers(5), lam)


def test_the_dense_model_is_the_curvatures_own() -> None:
    # The oracle of these tests against the primitive that others rely on.
    for method in METHODS:
        assert worst(curvature(method).dense(), quadratic(method, None).undamped) < SOLVED
    eye = torch.eye(2, dtype=torch.float64)
    assert torch.equal(ekfac_matrix(eye, eye, eye), torch.tensor([1.0, 0, 0, 1]).double().diag())
