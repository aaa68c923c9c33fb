"""Masks: exactly as many weights as asked for, whichever way the numbers are divided."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pruning import BLOCK, D_IN, D_OUT, numbers
from torch import Tensor

import raycurv
from raycurv.errors import NumericalError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.pruning import selection
from raycurv.mathematics.pruning.masks import (
    all_kept,
    candidates,
    columns_mask,
    count_gone,
    rows_mask,
    sets_kept,
    single_weights,
)
from raycurv.mathematics.pruning.selection import (
    below,
    count_ties,
    find_prefix,
    find_threshold,
    histogram,
    share_ties,
    smallest,
)
from raycurv.mathematics.pruning.structures import column_runs

SALIENCY = numbers(D_OUT, D_IN, seed=5).square().float()


def values(kind: str, count: int = 3000) -> Tensor:
    """Float32 numbers that are hard to tell apart, or too easy."""
    drawn = numbers(count, seed=1)
    return {
        "normal": drawn.float(),
        "positive": drawn.square().float(),
        "ties": (drawn * 3).round().float(),
        "zeros": torch.where(drawn > 0.5, drawn, torch.where(drawn > 0, 0.0, -0.0)).float(),
        "near": (1 + drawn * 1e-6).float(),  # one bin of upper halves, or two
        "far": (drawn * 10 ** (20 * numbers(count, seed=2))).float(),
        "infinite": torch.where(drawn > 1, torch.inf, torch.where(drawn < -1, -torch.inf, drawn))
        .float(),
        "denormal": (drawn * 1e-42).float(),
    }[kind]  # fmt: skip


KINDS = ("normal", "positive", "ties", "zeros", "near", "far", "infinite", "denormal")


def select(blocks: list[Tensor], may_go: list[Tensor], count: int) -> list[Tensor]:
    """As a job over many blocks does it."""
    pairs = list(zip(blocks, may_go, strict=True))
    prefix = find_prefix(sum(histogram(x, c) for x, c in pairs), count)
    threshold = find_threshold(sum(histogram(x, c, prefix) for x, c in pairs), prefix)
    shares = share_ties(threshold, [count_ties(x, c, threshold) for x, c in pairs])
    return [below(x, c, threshold, n) for (x, c), n in zip(pairs, shares, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_selection_over_blocks_is_that_of_all_numbers_together(kind, monkeypatch) -> None:
    monkeypatch.setattr(selection, "_CHUNK", 700)
    x = values(kind)
    may_go = numbers(len(x), seed=3) > -0.5
    total = int(may_go.sum())
    place = may_go.numpy().nonzero()[0]
    # A stable sort takes the first of equal numbers first; both zeros are equal.
    order = place[np.argsort(x.numpy()[place], kind="stable")]
    for count in (0, 1, total // 3, total // 2, total - 1, total):
        want = torch.zeros(len(x), dtype=torch.bool)
        want[torch.from_numpy(order[:count])] = True
        if 0 < count < total:
            part = np.partition(x.numpy()[place], count - 1)
            prefix = find_prefix(histogram(x, may_go), count)
            threshold = find_threshold(histogram(x, may_go, prefix), prefix)
            assert threshold.value == part[count - 1]
        for cuts in ((3000,), (1, 2999), (1200, 900, 900), (500,) * 6):
            found = select(list(x.split(cuts)), list(may_go.split(cuts)), count)
            assert torch.equal(torch.cat(found), want), (count, cuts)


def test_ties_go_in_the_order_of_the_blocks() -> None:
    blocks = [torch.zeros(2, 2), torch.zeros(3, 1), torch.ones(2)]
    found = select(blocks, [torch.ones_like(b, dtype=torch.bool) for b in blocks], 5)
    assert [f.tolist() for f in found] == [
        [[True, True], [True, True]], [[True], [False], [False]], [False, False],
    ]  # fmt: skip


def test_a_saliency_that_is_no_number_is_refused_where_it_counts() -> None:
    x = torch.tensor([1.0, torch.nan, 0.0])
    with pytest.raises(NumericalError, match="1 NaN"):
        histogram(x)
    assert smallest(x, ~x.isnan(), 1).tolist() == [False, False, True]


def test_more_than_there_are_cannot_be_selected() -> None:
    with pytest.raises(ValueError, match="4-th smallest of 3"):
        smallest(torch.ones(3), None, 4)


@pytest.mark.parametrize("sparsity, gone", [(0, 0), (0.29, 9), (0.5, 16), (0.99, 31), (1, 32)])
def test_a_share_of_the_weights_goes_and_the_bias_stays(sparsity, gone) -> None:
    keep = single_weights(BLOCK, SALIENCY, sparsity, all_kept(BLOCK))
    assert int((~keep).sum()) == gone
    assert bool(keep[:, -1].all())
    inputs = SALIENCY[:, :-1]
    assert not gone or inputs[~keep[:, :-1]].max() == inputs.flatten().sort()[0][gone - 1]


def test_shares_are_of_decimals() -> None:
    assert int(0.29 * 100) == 28  # what binary fractions make of it
    assert count_gone(0.29, 100) == 29
    assert count_gone(0.9, 10**10) == 9 * 10**9


def test_what_went_before_stays_away_and_counts() -> None:
    early = single_weights(BLOCK, SALIENCY, 0.25, all_kept(BLOCK))
    upside_down = -SALIENCY
    later = single_weights(BLOCK, upside_down, 0.5, early)
    assert int((~later).sum()) == 16
    assert not bool((later & ~early).any())
    assert torch.equal(single_weights(BLOCK, upside_down, 0.1, early), early)
    assert int(candidates(BLOCK, later).sum()) == 16


def test_single_weights_do_not_depend_on_numbers_that_stay_away() -> None:
    early = single_weights(BLOCK, SALIENCY, 0.25, all_kept(BLOCK))
    marked = torch.where(early, SALIENCY, torch.nan)
    assert torch.equal(
        single_weights(BLOCK, marked, 0.5, early), single_weights(BLOCK, SALIENCY, 0.5, early)
    )


@pytest.mark.parametrize("sparsity", [-0.1, 1.5, float("nan")])
def test_a_sparsity_that_is_no_share_is_refused(sparsity) -> None:
    with pytest.raises(raycurv.UserError, match="--sparsity"):
        single_weights(BLOCK, SALIENCY, sparsity, all_kept(BLOCK))


def test_whole_outputs_go_with_their_bias() -> None:
    kept = sets_kept(torch.tensor([3.0, 1.0, 2.0, 1.0]), 0.5, torch.ones(4, dtype=torch.bool))
    assert kept.tolist() == [True, False, True, False]
    mask = rows_mask(BLOCK, kept)
    assert mask.shape == (D_OUT, D_IN)
    assert mask.all(dim=1).tolist() == kept.tolist() == mask.any(dim=1).tolist()
    again = sets_kept(torch.tensor([0.0, 9.0, 1.0, 9.0]), 0.75, kept)
    assert again.tolist() == [False, False, True, False]


def test_heads_go_without_the_bias() -> None:
    block = Block("o_proj", "linear", 9, 2, True)
    mask = columns_mask(block, column_runs(block, 4), torch.tensor([False, True]))
    assert mask.tolist() == [[False] * 4 + [True] * 5] * 2
