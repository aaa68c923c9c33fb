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
    curvature,
    numbers,
    quadratic,
    rank_quadratic,
    rank_surgeons,
    surgeon,
)
from torch import Tensor

import raycurv
from raycurv.errors import NumericalError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import BlockCurvature, Damping
from raycurv.mathematics.eigen import Eigenbasis
from raycurv.mathematics.pruning import pattern as patterns
from raycurv.mathematics.pruning.pattern import summed_pattern
from raycurv.mathematics.pruning.rank_surgeon import RankSurgeon
from raycurv.mathematics.pruning.saliency import magnitude
from raycurv.mathematics.pruning.structures import NofM, column_runs, column_sums, row_sums
from raycurv.mathematics.pruning.surgeon import BlockSurgeon
from raycurv.mathematics.rank.rank_inverse import GramInverse

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


@GRADIENTS
@EVERY_METHOD
def test_obs_is_the_least_rise_that_any_move_of_the_others_leaves(method, gradient) -> None:
    truth = quadratic(method, gradient)
    want = exact([truth.cost(W, [k]) for k in range(W.numel())]).view_as(W)
    assert worst(surgeon(method, W, gradient).obs(), want) < ROUNDED


@EVERY_METHOD
def test_obs_without_the_newton_step_is_another_number(method) -> None:
    truth = quadratic(method, G)
    want = exact([truth.cost(W, [k]) for k in range(W.numel())]).view_as(W)
    assert worst(surgeon(method, W).obs(), want) > 1e-2


@GRADIENTS
@EVERY_METHOD
def test_obd_is_the_rise_when_the_others_stay(method, gradient) -> None:
    truth = quadratic(method, gradient)
    steps = (-W.flatten()).diag()
    want = exact([truth.prediction(step) for step in steps]).view_as(W)
    found = surgeon(method, W, gradient).obd()
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
        got, want = (BlockSurgeon(c, W, DAMPING, gradient) for c in (narrow, wide))
        assert worst(got.obs(), want.obs()) < ROUNDED
        assert worst(got.obd(), want.obd()) < ROUNDED


@GRADIENTS
@EVERY_METHOD
def test_whole_outputs_cost_what_the_dense_model_says(method, gradient) -> None:
    truth, before = quadratic(method, gradient), W.clone()
    want = exact([truth.cost(W, row) for row in ROWS])
    assert worst(surgeon(method, W, gradient).outputs(), want) < ROUNDED
    assert torch.equal(W, before)


@GRADIENTS
@EVERY_METHOD
def test_heads_cost_what_the_dense_model_says(method, gradient) -> None:
    truth = quadratic(method, gradient)
    want = exact([truth.cost(W, head) for head in HEADS])
    found = surgeon(method, W, gradient).columns(column_runs(BLOCK, 4))
    assert worst(found, want) < ROUNDED


def test_a_set_does_not_cost_what_its_weights_cost_one_by_one() -> None:
    # Each alone is made up for by the others of its set; all at once are not.
    one_by_one = row_sums(surgeon("ekfac", W).obs())
    together = surgeon("ekfac", W).outputs()
    assert bool((together > 1.5 * one_by_one).any())
    plain = row_sums(surgeon("diagonal", W).obs())  # the control: nothing moves
    assert worst(surgeon("diagonal", W).outputs(), plain) < ROUNDED


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
    for part, own in enumerate(rank_surgeons(rows, w, LAM, g, outputs=3)):
        places = range(part * W.numel(), (part + 1) * W.numel())
        want = exact([truth.cost(w, [k]) for k in places]).view_as(W)
        assert worst(own.obs(), want) < ROUNDED
        want = exact([truth.prediction(-w[k] * EYE[k]) for k in places]).view_as(W)
        assert worst(own.obd(), want) < ROUNDED


@RANKS
@GRADIENTS
def test_sets_of_a_rank_m_fisher_cost_what_the_dense_model_says(m, gradient) -> None:
    rows, w = whole_rows(m), numbers(2 * W.numel(), seed=8)
    g = None if gradient is None else gradient.flatten().repeat(2)
    truth = rank_quadratic(rows, LAM, g)
    for part, own in enumerate(rank_surgeons(rows, w, LAM, g, outputs=3)):
        first = part * W.numel()
        want = exact([truth.cost(w, [first + k for k in row]) for row in ROWS])
        assert worst(own.outputs(), want) < ROUNDED
        want = exact([truth.cost(w, [first + k for k in head]) for head in HEADS])
        assert worst(own.columns(column_runs(BLOCK, 4)), want) < ROUNDED


def test_a_lone_output_costs_its_own_block_whatever_the_damping() -> None:
    # Nothing is left to move, so that the Gram matrix of what stays is nothing but rounding: with
    # λ at 1e-6 of the mean eigenvalue that leaves 1e-10 of it.
    rows, w = numbers(5, D_IN, seed=9), numbers(D_IN, seed=10)
    (own,) = rank_surgeons(rows, w, 1e-6)
    want = rank_quadratic(rows, 1e-6, None).value(w)
    assert worst(own.outputs(), exact([want])) < ROUNDED


def test_a_damping_that_rounding_swallows_is_an_error() -> None:
    rows = numbers(5, 12, seed=9)
    gram = rows @ rows.T - 1e-6 * torch.eye(5, dtype=torch.float64)
    with pytest.raises(NumericalError, match=r"Gram matrix of the weights that stay.*--damping"):
        RankSurgeon(
            BLOCK, numbers(1, 12), lambda: iter([(slice(0, 1), rows[:, None])]),
            GramInverse(gram, 1e-15, gram),
        ).outputs()  # fmt: skip


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
    truth, pattern = quadratic(method, gradient), NofM.parse(text)
    inverse = torch.linalg.inv(truth.damped)
    u = (W.flatten() - inverse @ truth.gradient).view_as(W)

    def costs(way: list[int]) -> float:
        own = u.flatten()[way]
        return float(own @ torch.linalg.solve(inverse[way][:, way], own)) / 2

    keep, saliency = cheapest(costs, pattern)
    found = surgeon(method, W, gradient).pattern(pattern)
    assert torch.equal(found.keep_OI, keep)
    assert worst(found.saliency_OB, saliency) < ROUNDED
    assert costs([0, 3]) == pytest.approx(truth.cost(W, [0, 3]))


@RANKS
def test_a_pattern_of_a_rank_m_fisher_is_the_cheapest_subset_of_every_run(m) -> None:
    rows, w, pattern = whole_rows(m), numbers(2 * W.numel(), seed=8), NofM(2, 4)
    own_w, second = w[W.numel() :], slice(W.numel(), None)
    dense = torch.linalg.inv(rank_quadratic(rows, LAM, None).damped)[second, second]

    def costs(way: list[int]) -> float:
        own = own_w[way]
        return float(own @ torch.linalg.solve(dense[way][:, way], own)) / 2

    keep, saliency = cheapest(costs, pattern)
    found = rank_surgeons(rows, w, LAM, outputs=3)[1].pattern(pattern)
    assert torch.equal(found.keep_OI, keep)
    assert worst(found.saliency_OB, saliency) < ROUNDED


def test_a_pattern_of_sums_keeps_the_largest_of_every_run() -> None:
    saliency = surgeon("ekfac", W, G).obd()
    keep, sums = cheapest(lambda way: float(saliency.double().flatten()[way].sum()), NofM(2, 4))
    found = summed_pattern(NofM(2, 4), BLOCK, saliency)
    assert torch.equal(found.keep_OI, keep)
    assert worst(found.saliency_OB, sums) < ROUNDED


def test_what_the_pattern_costs_together_is_not_what_its_weights_cost_one_by_one() -> None:
    together = surgeon("ekfac", W).pattern(NofM(2, 4))
    apart = summed_pattern(NofM(2, 4), BLOCK, surgeon("ekfac", W).obs())
    assert worst(together.saliency_OB, apart.saliency_OB) > 1e-2


def test_a_pattern_takes_what_had_gone_before_it() -> None:
    gone = numbers(D_OUT, D_IN, seed=11) > 0.8
    gone[:, -1] = False
    gone[0, :3] = True  # more than a run of 2:4 may lose
    w = torch.where(gone, 0, W)
    found = surgeon("ekfac", w).pattern(NofM(2, 4), ~gone)
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
    assert not torch.equal(found.keep_OI, surgeon("ekfac", W).pattern(NofM(2, 4)).keep_OI)


def test_a_pattern_does_not_depend_on_how_many_outputs_are_looked_at_at_once(monkeypatch) -> None:
    whole = surgeon("tiles", W).pattern(NofM(2, 4))
    monkeypatch.setattr(patterns, "CHUNK", 1)
    one_by_one = surgeon("tiles", W).pattern(NofM(2, 4))
    assert torch.equal(whole.keep_OI, one_by_one.keep_OI)
    assert worst(whole.saliency_OB, one_by_one.saliency_OB) < ROUNDED


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:9", "4:9", "2-4", "2:4:8", "-1:4", ""])
def test_patterns_that_are_none_or_have_too_many_ways_are_refused(text) -> None:
    with pytest.raises(raycurv.UserError, match="pattern"):
        NofM.parse(text)


def test_inputs_that_do_not_divide_are_refused_by_the_blocks_name() -> None:
    with pytest.raises(raycurv.UserError, match=r"block layer.*multiple of 3.*got 8"):
        surgeon("ekfac", W).pattern(NofM(2, 3))
    with pytest.raises(raycurv.UserError, match=r"block layer.*divides its 8 inputs.*got a width"):
        column_runs(BLOCK, 3)


def test_a_saliency_that_is_no_number_is_an_error_that_names_the_block() -> None:
    with pytest.raises(NumericalError, match="block layer, pattern 2:4"):
        summed_pattern(NofM(2, 4), BLOCK, torch.full((D_OUT, D_IN), torch.nan))


def test_a_block_without_curvature_costs_nothing() -> None:
    nothing = BlockCurvature(
        BLOCK, *[curvature("ekfac").input_basis, curvature("ekfac").output_basis], 0 * W
    )
    assert not BlockSurgeon(nothing, W, DAMPING, G).obs().any()
    still = BlockSurgeon(nothing, W, DAMPING)
    assert not still.obd().any()
    assert not still.outputs().any()
    assert not still.columns(column_runs(BLOCK, 2)).any()
    assert not still.pattern(NofM(2, 4)).saliency_OB.any()


def test_no_damping_and_a_zero_in_the_curvature_are_refused_by_the_blocks_name() -> None:
    lam = torch.ones(D_OUT, D_IN)
    lam[1, 2] = 0
    block = BlockCurvature(BLOCK, Eigenbasis(), Eigenbasis(), lam)
    with pytest.raises(raycurv.UserError, match=r"block layer.*1 zeros"):
        BlockSurgeon(block, W, Damping(0.0)).obs()
    with pytest.raises(raycurv.UserError, match=r"block layer.*\[\.\.\., 4, 9\]"):
        BlockSurgeon(block, W[:, :8], DAMPING)


def test_columns_without_a_bias_are_all_inputs() -> None:
    assert column_runs(Block("o_proj", "linear", 6, 3, False), 3) == (range(3), range(3, 6))
