from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from raycurv.data.examples import Example
from raycurv.data.microbatch import Microbatches, make_batch, padding_share, plan_microbatches
from raycurv.errors import UserError
from raycurv.stages.transport import pack, unpack

SEEDS = range(20)


def random_plan(seed: int) -> tuple[list[int], int, int, Microbatches]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 80, size=int(rng.integers(0, 300))).tolist()
    batch_tokens, window = int(rng.integers(1, 400)), int(rng.integers(1, 100))
    return lengths, batch_tokens, window, plan_microbatches(lengths, batch_tokens, window)


def planned(microbatches: Sequence[tuple[int, ...]]) -> Microbatches:
    order = [n for members in microbatches for n in members]
    starts = np.cumsum([0, *map(len, microbatches)])
    return Microbatches(np.array(order, np.int64), starts)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_example_is_in_one_microbatch(seed: int) -> None:
    lengths, _, _, plan = random_plan(seed)
    assert sorted(n for members in plan for n in members) == list(range(len(lengths)))
    assert all(plan)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_microbatch_exceeds_its_tokens_unless_it_is_one_example(seed: int) -> None:
    lengths, batch_tokens, _, plan = random_plan(seed)
    for members in plan:
        padded = len(members) * max(lengths[n] for n in members)
        assert padded <= batch_tokens or len(members) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_microbatches_of_a_window_stand_together(seed: int) -> None:
    _, _, window, plan = random_plan(seed)
    windows = [{n // window for n in members} for members in plan]
    assert all(len(one) == 1 for one in windows)
    order = [one.pop() for one in windows]
    assert order == sorted(order)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_plan_of_some_examples_is_a_plan_of_their_own_in_every_window(seed: int) -> None:
    lengths, batch_tokens, window, _ = random_plan(seed)
    rng = np.random.default_rng(seed)
    some = rng.permutation(len(lengths))[: len(lengths) // 3]
    plan = plan_microbatches(lengths, batch_tokens, window, some)
    want = []
    for first in range(0, len(lengths), window):
        here = sorted(n for n in some.tolist() if first <= n < first + window)
        alone = plan_microbatches([lengths[n] for n in here], batch_tokens, window)
        want += [tuple(here[n] for n in members) for members in alone]
    assert list(plan) == want


@pytest.mark.parametrize("seed", SEEDS)
def test_no_microbatch_could_take_the_next_example(seed: int) -> None:
    lengths, batch_tokens, window, plan = random_plan(seed)
    for members, following in pairwise(plan):
        if members[0] // window == following[0] // window:
            assert (len(members) + 1) * lengths[members[0]] > batch_tokens


def test_sorting_is_longest_first_and_stable() -> None:
    assert list(plan_microbatches([2, 5, 2, 5, 9], 10)) == [(4,), (1, 3), (0, 2)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_part_of_a_plan_has_its_microbatches_without_the_other_examples(seed: int) -> None:
    lengths, _, _, plan = random_plan(seed)
    wanted = range(len(lengths) // 3, len(lengths) // 2)
    left = [tuple(n for n in members if n in wanted) for members in plan]
    assert list(plan.only(wanted)) == [members for members in left if members]
    assert plan.longest(lengths).tolist() == [max(lengths[n] for n in m) for m in plan]
    assert plan.sizes.tolist() == [len(members) for members in plan]


def test_a_plan_ends() -> None:
    with pytest.raises(IndexError, match="microbatch 2 of 2"):
        plan_microbatches([1, 1], 1)[2]


def test_sorting_in_windows_saves_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, size=2000).tolist()
    share = {w: padding_share(lengths, plan_microbatches(lengths, 2048, w)) for w in (1, 16, 1024)}
    unsorted = planned([tuple(range(a, a + 10)) for a in range(0, 2000, 10)])
    assert share[1] == 0.0  # one example a microbatch
    assert share[1024] < 0.05 < padding_share(lengths, unsorted)


def test_padding_share_is_of_the_padded_positions() -> None:
    assert padding_share([1, 3], planned([(0, 1)])) == pytest.approx(2 / 6)
    assert padding_share([1, 3], planned([(1,), (0,)])) == 0.0
    assert padding_share([], planned([])) == 0.0


@pytest.mark.parametrize("arguments", [([1], 0, 8), ([1], 8, 0)])
def test_limits_below_one_are_a_mistake(arguments: tuple[list[int], int, int]) -> None:
    with pytest.raises(UserError, match="a number from 1 on, got 0"):
        plan_microbatches(*arguments)


def tokens(id: str, ids: list[int], **more: object) -> Example:
    return Example(0, id, np.array(ids, np.int32), **more)  # type: ignore[arg-type]


def test_tokens_are_padded_on_the_right() -> None:
    batch = make_batch(3, [tokens("a", [5, 6]), tokens("b", [7, 8, 9])], torch.float32)
    assert (batch.index, batch.ids, batch.size) == (3, ("a", "b"), 2)
    assert batch.inputs.dtype == torch.int64
    assert batch.inputs.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch.mask is not None
    assert batch.mask.tolist() == [[True, True, False], [True] * 3]
    assert batch.tokens().tolist() == [2, 3]
    assert batch.labels is None and batch.loss_mask is None and batch.drawn is None


def test_a_loss_mask_is_true_where_an_example_has_none() -> None:
    masked = tokens("a", [5, 6], loss_mask=np.array([False, True]))
    batch = make_batch(0, [masked, tokens("b", [7, 8, 9])], torch.float32)
    assert batch.loss_mask is not None
    assert batch.loss_mask.tolist() == [[False, True, False], [True, True, True]]


def test_labels_of_minus_100_become_no_targets() -> None:
    labelled = tokens("a", [5, 6, 7], labels=np.array([-100, 3, 4]))
    batch = make_batch(0, [labelled, tokens("b", [8])], torch.float32)
    assert batch.labels is not None and batch.loss_mask is not None
    assert batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == [[0, 3, 4], [8, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, True, True], [True, False, False]]


def test_labels_without_a_mask_leave_none() -> None:
    batch = make_batch(0, [tokens("a", [5, 6], labels=np.array([1, 2]))], torch.float32)
    assert batch.labels is not None and batch.labels.tolist() == [[1, 2]]
    assert batch.loss_mask is None


def test_drawn_labels_are_padded_like_their_tokens() -> None:
    drawn = [np.array([[1, 2], [3, 4]], np.int32), np.array([[5, 6, 7], [8, 9, 1]], np.int32)]
    pair = [tokens("a", [5, 6]), tokens("b", [7, 8, 9])]
    batch = make_batch(0, pair, torch.float32, drawn)
    assert batch.drawn is not None and batch.drawn.dtype == torch.int64
    assert batch.drawn.tolist() == [[[1, 2, 0], [5, 6, 7]], [[3, 4, 0], [8, 9, 1]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_take_the_models_dtype(dtype: torch.dtype) -> None:
    image = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    pair = [
        Example(n, str(n), inputs=image + n, labels=np.array([0.5, n], np.float64))
        for n in range(2)
    ]
    drawn = [np.zeros((3, 2)), np.ones((3, 2))]
    batch = make_batch(0, pair, dtype, drawn)
    assert batch.inputs.shape == (2, 1, 2, 3) and batch.inputs.dtype == dtype
    # Labels stay as fine as float32: a bf16 target near 1,000 is off by up to 4.
    fine = torch.promote_types(dtype, torch.float32)
    assert batch.labels is not None and batch.labels.dtype == fine
    assert batch.labels.tolist() == [[0.5, 0.0], [0.5, 1.0]]
    assert batch.drawn is not None and batch.drawn.dtype == fine
    assert batch.drawn.shape == (3, 2, 2) and batch.drawn[:, 1].eq(1).all()
    assert batch.mask is None and batch.loss_mask is None
    assert batch.tokens().tolist() == [1, 1]


def test_classes_stay_whole_numbers() -> None:
    pair = [Example(n, str(n), inputs=np.ones(2), labels=np.array(n)) for n in range(2)]
    drawn = [np.array([1, 0]), np.array([0, 1])]
    batch = make_batch(0, pair, torch.float32, drawn)
    assert batch.labels is not None and batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == [0, 1]
    assert batch.drawn is not None and batch.drawn.tolist() == [[1, 0], [0, 1]]
    assert batch.drawn.dtype == torch.int64


def test_a_batch_shares_no_memory_with_its_examples() -> None:
    numbers = Example(0, "a", inputs=np.ones(2, np.float32))
    batch = make_batch(0, [numbers], torch.float32)
    batch.inputs.zero_()
    assert numbers.inputs is not None and numbers.inputs.tolist() == [1.0, 1.0]


def test_further_columns_are_packed_and_travel() -> None:
    examples = [
        tokens("a", [1, 2, 3], columns={"right": np.array(3), "answer": "yes", "w": np.ones(2)}),
        tokens("b", [4], columns={"right": np.array(5), "answer": "no", "w": np.zeros(2)}),
    ]
    batch = make_batch(0, examples, torch.float32)
    for found in (batch, batch.to(torch.device("cpu")), unpack(pack(batch))):
        assert found.columns["right"].dtype == torch.int64
        assert found.columns["right"].tolist() == [3, 5]
        assert found.columns["answer"] == ["yes", "no"]
        assert found.columns["w"].dtype == torch.float32 and found.columns["w"].shape == (2, 2)
