"""Claims about code that has no fingerprint: what follows a fit computes what the fit computed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import vectors
from torch import Tensor, nn

import raycurv
from raycurv import Classification, UserError

torch.set_num_threads(1)
ROWS = vectors(12, 5, "classes")
HERE: dict[str, Any] = {"address": "none", "quiet": True}


def network(slope: float = 0.1, random: float = 0.0) -> nn.Module:
    """The same weights whatever the slope."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Linear(5, 6), nn.LeakyReLU(slope), AlwaysOn(random), nn.Linear(6, 3)
    return nn.Sequential(*layers)


class AlwaysOn(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p) if self.p else x


class Own(Classification):
    """Of one name, whatever it multiplies the loss by."""

    times = 1.0

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return self.times * super().loss(outputs, batch)


def times(factor: float) -> Classification:
    found = Own()
    found.times = factor
    return found


def follow(
    out: Path,
    model: Callable[[], nn.Module],
    again: Callable[[], nn.Module],
    fit: dict[str, Any],
    **more: Any,
) -> raycurv.Scores:
    """Scores of a fit whose model, and objective, are given again."""
    raycurv.fit(model, ROWS, out / "run", **({"objective": "classification"} | fit), **HERE)
    return raycurv.open(out / "run", model=again).influence(
        ROWS[:2], ROWS, out / "scores", **more, **HERE
    )


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_another_forward_of_the_same_weights_is_refused(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(UserError, match=r"an example of .*run: expected .*the model's code"):
        follow(tmp_path / "other", network, partial(network, 0.9), {"dtype": dtype})
    for n, how in enumerate(({}, {"stages": 2}, {"dtype": "float32"}, {"batch_tokens": 1})):
        scores = follow(tmp_path / str(n), network, network, {"dtype": dtype}, **how)
        said = scores.manifest.facts["loss_check"]
        assert said["difference"] <= said["tolerance"] / 10
    # A model that takes random numbers has no loss of its own: that is told elsewhere.
    noisy = partial(network, random=0.5)
    scores = follow(
        tmp_path / "noisy",
        noisy,
        noisy,
        {"dtype": dtype, "check_capture": False},
        check_capture=False,
    )
    assert "loss_check" not in scores.manifest.facts


def test_another_objective_of_the_same_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="or the objective's, is another one by now"):
        follow(tmp_path / "a", network, network, {"objective": times(1)}, fit_objective=times(2))
    scores = follow(
        tmp_path / "b", network, network, {"objective": times(1)}, fit_objective=times(1)
    )
    # What is measured of queries is not what was fitted.
    more = {"fit_objective": times(1), "objective": times(3)}
    other = follow(tmp_path / "c", network, network, {"objective": times(1)}, **more)
    assert scores.manifest.facts["loss_check"] == other.manifest.facts["loss_check"]
    assert np.allclose(3 * scores.matrix()[0], other.matrix()[0], rtol=1e-3)


def test_what_follows_an_extended_fit_is_held_to_it_as_well(tmp_path: Path) -> None:
    run = raycurv.fit(network, ROWS[:6], tmp_path / "run", objective="classification", **HERE)
    run.extend(ROWS[6:], tmp_path / "more", **HERE)
    with pytest.raises(UserError, match=r"an example of .*more: expected .*the model's code"):
        raycurv.open(tmp_path / "more", model=partial(network, 0.9)).influence(
            ROWS[:2], ROWS, tmp_path / "scores", **HERE
        )


@pytest.mark.parametrize("gone", ["data", "losses", "no labels"])
def test_without_a_loss_on_record_nothing_is_held(tmp_path: Path, gone: str) -> None:
    rows = [{k: v for k, v in row.items() if gone != "no labels" or k != "labels"} for row in ROWS]
    run = raycurv.fit(network, rows, tmp_path / "run", objective="classification", **HERE)
    if gone != "no labels":
        shutil.rmtree(tmp_path / "run" / {"data": "data", "losses": "tables/examples"}[gone])
    scores = run.influence(ROWS[:2], ROWS[:5], tmp_path / "scores", **HERE)
    assert "loss_check" not in scores.manifest.facts
