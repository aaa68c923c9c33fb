"""Saliencies are the least rise of the quadratic model, weight by weight and set by set."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from dense import worst
from pruning import (
    BLOCK,
    D_IN,
    D_OUT,
    DAMPING,
    METHODS,
    DenseInverse,
    curvature,
    numbers,
    quadratic,
    rank_quadratic,
)
from torch import Tensor

import raycurv
from raycurv.errors import NumericalError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import BlockCurvature, Damping
from raycurv.mathematics.eigen import Eigenbasis
from raycurv.mathematics.pruning import pattern as patterns
from raycurv.mathematics.pruning.pattern import obs_pattern, rank_pattern, summed_pattern
from raycurv.mathematics.pruning.saliency import (
    after_newton_step,
    block_obd,
    block_obs,
    magnitude,
    obd,
    rank_diagonal,
    rank_obs,
)
from raycurv.mathematics.pruning.set_saliency import (
    column_saliencies,
    rank_column_saliencies,
    rank_row_saliencies,
    row_saliencies,
)
from raycurv.mathematics.pruning.structures import NofM, column_runs, column_sums, row_sums

# Float64 solves, kept in float32: half of its last place is 6e-8.
ROUNDED = 1e-7
W = numbers(D_OUT, D_IN, seed=5)
G = 0.1 * numbers(D_OUT, D_IN, seed=6)
GRADIENTS = pytest.mark.parametrize("gradient", [None, G], ids=["converged", "first order"])
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
ROWS = [list(range(o * D_IN, (o + 1) * D_IN)) for o in range(D_OUT)]
HEADS = [[o * D_IN + i for o in range(D_OUT) for i in head] for head in column_runs(BLOCK, 4)]
# Two blocks of one model: fewer and more rows than weights.
RANKS = pytest.mark.parametrize("m", [5, 90])
LAM = 1e-2
EYE = torch.eye(2 * D_OUT * D_IN, dtype=torch.float64)


def exact(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def whole_rows(m: int) -> Tensor:
    return numbers(m, 2 * D_OUT * D_IN, seed=7)


def parts(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., : D_OUT * D_IN], x[..., D_OUT * D_IN :]


@GRADIENTS
@EVERY_METHOD
def test_obs_is_the_least_rise_that_any_move_of_the_others_leaves(method, gradient) -> None:
    truth = quadratic(method, gradient)
    want = exact([truth.cost(W, [k]) for k in range(W.numel())]).view_as(W)
    assert worst(block_obs(curvature(method), W, DAMPING, gradient), want) < ROUNDED


@EVERY_METHOD
def test_obs_without_the_newton_step_is_another_number(method) -> None:
    truth = quadratic(method, G)
    want = exact([truth.cost(W, [k]) for k in range(W.numel())]).view_as(W)
    assert worst(block_obs(curvature(method), W, DAMPING), want) > 1e-2


@GRADIENTS
@EVERY_METHOD
def test_obd_is_the_rise_when_the_others_stay(method, gradient) -> None:
    truth = quadratic(method, gradient)
    steps = (-W.flatten()).diag()
    want = exact([truth.prediction(step) for step in steps]).view_as(W)
    found = block_obd(curvature(method), W, gradient)
    assert found.dtype == torch.float32
    assert worst(found, want) < ROUNDED


def test_magnitude_is_in_the_order_of_the_weights_size() -> None:
    assert torch.equal(magnitude(W).flatten().argsort(), W.abs().flatten().argsort())


def test_float64_is_computed_from_curvature_kept_in_less() -> None:
    kept = curvature("ekfac")
    narrow = BlockCurvature(
        BLOCK,
        Eigenbasis(tuple(q.float() for q in kept.input_basis.vectors), kept.input_basis.values),
        Eigenbasis(tuple(q.float() for q in kept.output_basis.vectors), kept.output_basis.values),
        kept.eigenvalues.float(),
    )
    wide = BlockCurvature(
        BLOCK,
        Eigenbasis(tuple(q.double() for q in narrow.input_basis.vectors), kept.input_basis.values),
        Eigenbasis(
            tuple(q.double() for q in narrow.output_basis.vectors), kept.output_basis.values
        ),
        narrow.eigenvalues.double(),
    )
    for gradient in (None, G):
        got = block_obs(narrow, W, DAMPING, gradient)
        assert worst(got, block_obs(wide, W, DAMPING, gradient)) < ROUNDED
        assert worst(block_obd(narrow, W, gradient), block_obd(wide, W, gradient)) < ROUNDED


@GRADIENTS
@EVERY_METHOD
def test_whole_outputs_cost_what_the_dense_model_says(method, gradient) -> None:
    truth, block = quadratic(method, gradient), curvature(method)
    u = after_newton_step(block, W, DAMPING, gradient)
    before = u.clone()
    want = exact([truth.cost(W, row) for row in ROWS])
    assert worst(row_saliencies(block, u, DAMPING), want) < ROUNDED
    assert torch.equal(u, before)


@GRADIENTS
@EVERY_METHOD
def test_heads_cost_what_the_dense_model_says(method, gradient) -> None:
    truth, block = quadratic(method, gradient), curvature(method)
    u = after_newton_step(block, W, DAMPING, gradient)
    want = exact([truth.cost(W, head) for head in HEADS])
    found = column_saliencies(block, u, DAMPING, column_runs(BLOCK, 4))
    assert worst(found, want) < ROUNDED


def test_a_set_does_not_cost_what_its_weights_cost_one_by_one() -> None:
    # Each alone is made up for by the others of its set; all at once are not.
    one_by_one = row_sums(block_obs(curvature("ekfac"), W, DAMPING))
    together = row_saliencies(curvature("ekfac"), W, DAMPING)
    assert bool((together > 1.5 * one_by_one).any())
    plain = row_sums(block_obs(curvature("diagonal"), W, DAMPING))  # the control: nothing moves
    assert worst(row_saliencies(curvature("diagonal"), W, DAMPING), plain) < ROUNDED


def test_sums_over_sets_are_sums() -> None:
    saliency = magnitude(W)
    want = exact([saliency.double().flatten()[row].sum() for row in ROWS])
    assert worst(row_sums(saliency), want) < ROUNDED
    want = exact([saliency.double().flatten()[head].sum() for head in HEADS])
    assert worst(column_sums(saliency, column_runs(BLOCK, 4)), want) < ROUNDED


@RANKS
@GRADIENTS
def test_obs_of_a_rank_m_fisher_knows_the_other_blocks(m, gradient) -> None:
    rows, w = whole_rows(m), numbers(2 * W.numel(), seed=8)
    g = None if gradient is None else gradient.flatten().repeat(2)
    truth = rank_quadratic(rows, LAM, g)
    inverse = DenseInverse(rows, LAM)
    u = w if g is None else w - inverse.inverse @ g
    for part, (own_rows, own_u) in enumerate(zip(parts(rows), parts(u), strict=True)):
        places = range(part * W.numel(), (part + 1) * W.numel())
        want = exact([truth.cost(w, [k]) for k in places])
        assert worst(rank_obs(inverse, own_rows, own_u), want) < ROUNDED
        want = exact([truth.prediction(-w[k] * EYE[k]) for k in places])
        own_g = None if g is None else parts(g)[part]
        assert worst(obd(parts(w)[part], rank_diagonal(own_rows), own_g), want) < ROUNDED


@RANKS
@GRADIENTS
def test_sets_of_a_rank_m_fisher_cost_what_the_dense_model_says(m, gradient) -> None:
    rows, w = whole_rows(m), numbers(2 * W.numel(), seed=8)
    g = None if gradient is None else gradient.flatten().repeat(2)
    truth, gram = rank_quadratic(rows, LAM, g), rows @ rows.T
    u = w if g is None else w - DenseInverse(rows, LAM).inverse @ g
    for part, (own_rows, own_u) in enumerate(zip(parts(rows), parts(u), strict=True)):
        first, own_u = part * W.numel(), own_u.view_as(W)
        want = exact([truth.cost(w, [first + k for k in row]) for row in ROWS])
        assert worst(rank_row_saliencies(own_rows, own_u, gram, LAM), want) < ROUNDED
        want = exact([truth.cost(w, [first + k for k in head]) for head in HEADS])
        runs = column_runs(BLOCK, 4)
        assert worst(rank_column_saliencies(own_rows, own_u, gram, LAM, runs), want) < ROUNDED


def test_a_lone_output_costs_its_own_block_whatever_the_damping() -> None:
    # Nothing is left to move, so that the Gram matrix of what stays is nothing but rounding: with
    # λ at 1e-6 of the mean eigenvalue that leaves 1e-10 of it.
    rows, w = numbers(5, 12, seed=9), numbers(1, 12, seed=10)
    found = rank_row_saliencies(rows, w, rows @ rows.T, 1e-6)
    want = rank_quadratic(rows, 1e-6, None).value(w)
    assert worst(found, exact([want])) < ROUNDED


def test_a_damping_that_rounding_swallows_is_an_error() -> None:
    rows = numbers(5, 12, seed=9)
    gram = rows @ rows.T - 1e-6 * torch.eye(5, dtype=torch.float64)
    with pytest.raises(NumericalError, match=r"Gram matrix of the weights that stay.*--damping"):
        rank_row_saliencies(rows, numbers(1, 12), gram, 1e-15)


def cheapest(costs, pattern: NofM, gone: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Every run's cheapest subset, one by one."""
    keep = torch.ones(D_OUT, D_IN, dtype=torch.bool)
    found = torch.zeros(D_OUT, (D_IN - 1) // pattern.of, dtype=torch.float64)
    for o in range(D_OUT):
        for b in range(found.shape[1]):
            places = range(b * pattern.of, (b + 1) * pattern.of)
            ways = {
                way: costs([o * D_IN + i for i in way])
                for way in combinations(places, pattern.of - pattern.kept)
                if gone is None or {i for i in places if gone[o, i]} <= {*way}
            }
            best = min(ways, key=ways.__getitem__)
            keep[o, list(best)] = False
            found[o, b] = ways[best]
    return keep, found


@GRADIENTS
@EVERY_METHOD
@pytest.mark.parametrize("text", ["2:4", "1:2", "5:8"])
def test_a_pattern_is_the_cheapest_subset_of_every_run(method, gradient, text) -> None:
    truth, block, pattern = quadratic(method, gradient), curvature(method), NofM.parse(text)
    inverse = torch.linalg.inv(truth.damped)
    u = (W.flatten() - inverse @ truth.gradient).view_as(W)

    def costs(way: list[int]) -> float:
        own = u.flatten()[way]
        return float(own @ torch.linalg.solve(inverse[way][:, way], own)) / 2

    keep, saliency = cheapest(costs, pattern)
    found = obs_pattern(pattern, block, after_newton_step(block, W, DAMPING, gradient), DAMPING)
    assert torch.equal(found.keep_OI, keep)
    assert worst(found.saliency_OB, saliency) < ROUNDED
    assert costs([0, 3]) == pytest.approx(truth.cost(W, [0, 3]))


@RANKS
def test_a_pattern_of_a_rank_m_fisher_is_the_cheapest_subset_of_every_run(m) -> None:
    rows, w, pattern = whole_rows(m), numbers(2 * W.numel(), seed=8), NofM(2, 4)
    inverse = DenseInverse(rows, LAM)
    own_rows, own_w = parts(rows)[1], parts(w)[1].view_as(W)
    dense = inverse.part(own_rows)

    def costs(way: list[int]) -> float:
        own = own_w.flatten()[way]
        return float(own @ torch.linalg.solve(dense[way][:, way], own)) / 2

    keep, saliency = cheapest(costs, pattern)
    found = rank_pattern(pattern, BLOCK, inverse, own_rows, own_w)
    assert torch.equal(found.keep_OI, keep)
    assert worst(found.saliency_OB, saliency) < ROUNDED


def test_a_pattern_of_sums_keeps_the_largest_of_every_run() -> None:
    saliency = block_obd(curvature("ekfac"), W, G)
    keep, sums = cheapest(lambda way: float(saliency.double().flatten()[way].sum()), NofM(2, 4))
    found = summed_pattern(NofM(2, 4), BLOCK, saliency)
    assert torch.equal(found.keep_OI, keep)
    assert worst(found.saliency_OB, sums) < ROUNDED


def test_what_the_pattern_costs_together_is_not_what_its_weights_cost_one_by_one() -> None:
    block = curvature("ekfac")
    together = obs_pattern(NofM(2, 4), block, W, DAMPING)
    apart = summed_pattern(NofM(2, 4), BLOCK, block_obs(block, W, DAMPING))
    assert worst(together.saliency_OB, apart.saliency_OB) > 1e-2


def test_a_pattern_takes_what_had_gone_before_it() -> None:
    gone = numbers(D_OUT, D_IN, seed=11) > 0.8
    gone[:, -1] = False
    gone[0, :3] = True  # more than a run of 2:4 may lose
    w, block = torch.where(gone, 0, W), curvature("ekfac")
    found = obs_pattern(NofM(2, 4), block, w, DAMPING, ~gone)
    assert not bool((found.keep_OI & gone).any())
    assert found.keep_OI[0, :4].tolist() == [False, False, False, True]
    others = gone.clone()
    others[0, :3] = False
    inverse = torch.linalg.inv(quadratic("ekfac", None).damped)

    def costs(way: list[int]) -> float:
        own = w.flatten()[way]
        return float(own @ torch.linalg.solve(inverse[way][:, way], own)) / 2

    keep, _ = cheapest(costs, NofM(2, 4), others)
    assert torch.equal(found.keep_OI[1:], keep[1:])
    assert torch.equal(found.keep_OI[0, 4:], keep[0, 4:])
    assert not torch.equal(found.keep_OI, obs_pattern(NofM(2, 4), block, W, DAMPING).keep_OI)


def test_a_pattern_does_not_depend_on_how_many_outputs_are_looked_at_at_once(monkeypatch) -> None:
    block = curvature("tiles")
    whole = obs_pattern(NofM(2, 4), block, W, DAMPING)
    monkeypatch.setattr(patterns, "CHUNK", 1)
    one_by_one = obs_pattern(NofM(2, 4), block, W, DAMPING)
    assert torch.equal(whole.keep_OI, one_by_one.keep_OI)
    assert worst(whole.saliency_OB, one_by_one.saliency_OB) < ROUNDED


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:9", "4:9", "2-4", "2:4:8", "-1:4", ""])
def test_patterns_that_are_none_or_have_too_many_ways_are_refused(text) -> None:
    with pytest.raises(raycurv.UserError, match="pattern"):
        NofM.parse(text)


def test_inputs_that_do_not_divide_are_refused_by_the_blocks_name() -> None:
    with pytest.raises(raycurv.UserError, match=r"block layer.*multiple of 3.*got 8"):
        obs_pattern(NofM(2, 3), curvature("ekfac"), W, DAMPING)
    with pytest.raises(raycurv.UserError, match=r"block layer.*divides its 8 inputs.*got a width"):
        column_runs(BLOCK, 3)


def test_a_saliency_that_is_no_number_is_an_error_that_names_the_block() -> None:
    with pytest.raises(NumericalError, match="block layer, pattern 2:4"):
        summed_pattern(NofM(2, 4), BLOCK, torch.full((D_OUT, D_IN), torch.nan))


def test_a_block_without_curvature_costs_nothing() -> None:
    nothing = BlockCurvature(
        BLOCK, *[curvature("ekfac").input_basis, curvature("ekfac").output_basis], 0 * W
    )
    assert not block_obs(nothing, W, DAMPING, G).any()
    assert not block_obd(nothing, W).any()
    assert not row_saliencies(nothing, W, DAMPING).any()
    assert not column_saliencies(nothing, W, DAMPING, column_runs(BLOCK, 2)).any()
    assert not obs_pattern(NofM(2, 4), nothing, W, DAMPING).saliency_OB.any()


def test_no_damping_and_a_zero_in_the_curvature_are_refused_by_the_blocks_name() -> None:
    lam = torch.ones(D_OUT, D_IN)
    lam[1, 2] = 0
    block = BlockCurvature(BLOCK, Eigenbasis(), Eigenbasis(), lam)
    with pytest.raises(raycurv.UserError, match=r"block layer.*1 zeros"):
        block_obs(block, W, Damping(0.0))
    with pytest.raises(raycurv.UserError, match=r"block layer.*\[\.\.\., 4, 9\]"):
        block_obs(block, W[:, :8], DAMPING)


def test_columns_without_a_bias_are_all_inputs() -> None:
    assert column_runs(Block("o_proj", "linear", 6, 3, False), 3) == (range(3), range(3, 6))
