"""Stages, microbatches and passes are how the work is run, never what comes out of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from dense import worst
from networks import (
    ALL,
    CLASSIFIER,
    DEEP,
    IN_PLACE,
    LLAMA_4,
    MASKED,
    REWARD,
    VOCAB,
    Case,
    Mixer,
    sentences,
)
from test_corrected import recorded_labels
from test_objectives import numbers
from test_scores import by_id, own_scores
from torch import nn

# Other batches and cuts add the same float64 numbers in another order.
DOUBLE = 1e-10
# In float32 eigenvectors of near-equal eigenvalues turn; what is applied does not. Rounding of
# 6e-8 grows through some layers and a damped inverse with a condition number of some hundreds.
SINGLE = 1e-4


def _chain() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Embedding(VOCAB, 6), Mixer(6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6), Mixer(6),
        nn.Linear(6, VOCAB),
    ).eval()  # fmt: skip


CHAIN = Case(
    "chain of mixers", _chain, sentences((5, 2, 7, 1, 4, 7, 3, 6), True), "causal-lm",
    ALL | {"draws": 2}, batch_tokens=14,
)  # fmt: skip
PLAIN = (DEEP, CHAIN)
CHAINS = (*PLAIN, LLAMA_4)
HOW: tuple[dict[str, Any], ...] = (
    {"stages": 2},
    {"stages": 4},
    {"batch_tokens": 1},
    {"batch_tokens": 4096, "stages": 2},
    {"batch_tokens": 9, "stages": 4},
    {"schedule": "swept", "stages": 2},
    {"schedule": "swept", "stages": 4, "homes": 3},
    {"schedule": "swept", "batch_tokens": 9},
)
# Experts that share out rows: other batches, and cuts of every kind, without all of them together.
PAIRS = [
    *((case, how) for case in PLAIN for how in HOW), *((LLAMA_4, HOW[n]) for n in (2, 4, 6)),
]  # fmt: skip


def result(fits: Any, case: Case, dtype: str, **how: Any) -> dict[str, torch.Tensor]:
    """Everything that comes out, as tensors."""
    run = fits.run(case, dtype=dtype, **how)
    how = {"batch_tokens": case.batch_tokens} | how
    found = {
        "traces": numbers(run.blocks(), "trace"),
        "norms": numbers(run.examples(), "gradient_sq_norm"),
        "losses": numbers(run.examples(), "loss"),
    }
    scores = fits.scores(case, {"dtype": dtype, **how}, self_influence=True, **how)
    found["scores"], found["self"] = by_id(scores, case), own_scores(scores, case)
    for name in run.block_names():
        block = run.curvature(name)
        x = torch.ones(block.block.d_out, block.block.d_in, dtype=torch.float64)
        x[0] = torch.arange(x.shape[1])
        lam = 0.1 * float(block.eigenvalues.double().mean()) or 1.0
        found[f"IHVP {name}"] = block.apply(x, lambda values, lam=lam: 1 / (values + lam))
    return found


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert worst(got[key], value) < tolerance, key


@pytest.mark.parametrize(
    ("case", "how"), PAIRS, ids=lambda value: getattr(value, "name", str(value))
)
def test_results_do_not_depend_on_stages_or_batches(fits, case: Case, how: dict[str, Any]) -> None:
    same(result(fits, case, "float64", **how), result(fits, case, "float64"), DOUBLE)
    got = recorded_labels(fits.run(case, **how))
    want = recorded_labels(fits.run(case, dtype="float64"))
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("case", [CLASSIFIER, REWARD, MASKED], ids=lambda case: case.name)
def test_whole_texts_do_not_depend_on_stages_or_batches(fits, case: Case) -> None:
    want = result(fits, case, "float64")
    same(result(fits, case, "float64", stages=2, batch_tokens=23), want, DOUBLE)
    # Control: what is compared is not the same for all examples.
    assert len(want["scores"].flatten().unique()) > len(case.data)


def test_a_stage_may_begin_with_an_operation_in_place(fits) -> None:
    # Cut between a layer and the ReLU that overwrites its output.
    want = result(fits, IN_PLACE, "float64")
    for stages in (2, 4, 5):
        same(result(fits, IN_PLACE, "float64", stages=stages), want, DOUBLE)


@pytest.mark.parametrize("how", [HOW[1], HOW[3]], ids=str)
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_float32_results_do_not_depend_on_stages_or_batches(
    fits, case: Case, how: dict[str, Any]
) -> None:
    same(result(fits, case, "float32", **how), result(fits, case, "float32"), SINGLE)


@pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.name)
def test_float32_results_are_those_of_float64(fits, case: Case) -> None:
    # The labels are drawn alike (none of these lies within float32's rounding of an edge).
    same(result(fits, case, "float32"), result(fits, case, "float64"), SINGLE)


# Controls: what must change the numbers does.


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_another_seed_draws_other_labels(fits, case: Case) -> None:
    one, other = recorded_labels(fits.run(case)), recorded_labels(fits.run(case, seed=1))
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    traces = [fits.run(case, seed=s).blocks()["trace"].to_pylist() for s in (0, 1)]
    assert worst(torch.tensor(traces[0]), torch.tensor(traces[1])) > 1e-3


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_another_weight_changes_scores(fits, case: Case) -> None:
    def nudged() -> nn.Module:
        network = case.network()
        with torch.no_grad():
            next(m for m in network.modules() if isinstance(m, nn.Linear)).weight[0, 0] += 1e-3
        return network

    changed = replace(case, name=f"{case.name}, nudged", network=nudged)
    settings = {"fisher": "empirical", "draws": 1}
    one = by_id(fits.scores(case, settings), case)
    other = by_id(fits.scores(changed, settings), changed)
    assert 1e-6 < worst(other, one) < 0.5


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_labels_belong_to_ids_and_not_to_places(fits, case: Case) -> None:
    order = [*range(1, len(case.data)), 0]
    moved = replace(case, name=f"{case.name}, moved", data=tuple(case.data[n] for n in order))
    want = recorded_labels(fits.run(case))
    got = recorded_labels(fits.run(moved))
    assert all(np.array_equal(got[i], want[n]) for i, n in enumerate(order))
    # The control: the same places under each other's ids.
    ids = [row["id"] for row in case.data]
    renamed = replace(
        case,
        name=f"{case.name}, renamed",
        data=tuple({**row, "id": ids[n]} for row, n in zip(case.data, order, strict=True)),
    )
    got = recorded_labels(fits.run(renamed))
    assert any(not np.array_equal(a, b) for a, b in zip(got, want, strict=True))
