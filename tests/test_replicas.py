"""Claims about replicas: how many there are changes where sums are gathered, and no number."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import EXACT_FIT, EXACT_INFLUENCE, classified
from results import assert_close, assert_same
from torch import nn

import raycurv
from raycurv.stages.stage import Stage

torch.set_num_threads(1)

ROWS = classified(23)


def deep() -> nn.Module:
    """A network of seven layers, four of them with weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(),
        nn.Linear(5, 3),
    )  # fmt: skip


def fit(out: Path, rows: list[dict[str, Any]] = ROWS, **settings: Any) -> raycurv.Run:
    return raycurv.fit(deep, rows, out, **(EXACT_FIT | settings))


def score(run: raycurv.Run, out: Path, queries: int = 5, **settings: Any) -> raycurv.Scores:
    return run.influence(ROWS[:queries], ROWS, out, **(EXACT_INFLUENCE | settings))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One replica of one stage."""
    folder = tmp_path_factory.mktemp("whole")
    score(fit(folder / "run"), folder / "scores")
    return folder / "run", folder / "scores"


@pytest.mark.parametrize(("replicas", "stages"), itertools.product((1, 2, 3), (1, 2, 4)))
def test_replicas_and_stages_give_the_same_numbers(
    replicas: int, stages: int, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    how = {"replicas": replicas, "stages": stages}
    run = fit(tmp_path / "run", **how)
    assert_close(tmp_path / "run", whole[0])
    score(run, tmp_path / "scores", **how)
    assert_close(tmp_path / "scores", whole[1])


@pytest.mark.parametrize("method", ["kfac", "diagonal", "identity"])
def test_other_methods_have_replicas_too(method: str, tmp_path: Path) -> None:
    one = fit(tmp_path / "one", method=method)
    three = fit(tmp_path / "three", method=method, replicas=3, stages=2)
    assert_close(tmp_path / "three", tmp_path / "one")
    for name, run in (("a", one), ("b", three)):
        # Not per block: products of K-FAC and of no curvature at all are scored as they are.
        score(run, tmp_path / name, self_influence=False, replicas=2)
    assert_close(tmp_path / "b", tmp_path / "a")


def test_replicas_take_turns_in_a_sweep(whole: tuple[Path, Path], tmp_path: Path) -> None:
    how: dict[str, Any] = {"schedule": "swept", "stages": 4, "homes": 2, "replicas": 2}
    run = fit(tmp_path / "run", **how)
    assert_close(tmp_path / "run", whole[0])
    score(run, tmp_path / "scores", **how)
    assert_close(tmp_path / "scores", whole[1])


def test_more_replicas_than_microbatches_are_no_mistake(tmp_path: Path) -> None:
    for rows in (ROWS[:1], ROWS[:6]):
        fit(tmp_path / f"{len(rows)}", rows)
        run = fit(tmp_path / f"{len(rows)}-3", rows, replicas=3)
        assert_close(tmp_path / f"{len(rows)}-3", tmp_path / f"{len(rows)}")
    scores = score(run, tmp_path / "scores", queries=1, replicas=3).matrix()[0]
    assert scores.shape == (1, len(ROWS)) and (scores != 0).any()


def test_each_replica_has_its_own_microbatches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: dict[int, list[int]] = {}
    turn = Stage.turn

    def noted(stage: Stage, batch: Any, *args: Any) -> Any:
        taken.setdefault(id(stage), []).append(batch.index)
        return turn(stage, batch, *args)

    monkeypatch.setattr(Stage, "turn", noted)
    fit(tmp_path / "run", replicas=3, method="kfac")
    assert sorted(taken.values()) == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("then", [1, 2, 3])
def test_a_run_goes_on_with_other_replicas_and_stages(
    then: int, whole: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = Stage.backward

    def stops(stage: Stage, index: int, *args: Any) -> Any:
        if index == 4:
            raise KeyboardInterrupt
        return backward(stage, index, *args)

    how: dict[str, Any] = {"commit_seconds": 1e-9}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Stage, "backward", stops)
        fit(tmp_path / "run", replicas=2, stages=2, **how)
    commits = sorted((tmp_path / "run" / "work" / "covariance").glob("*/replica-*.safetensors"))
    assert {path.name[:9] for path in commits} == {"replica-0", "replica-1"}
    begun: list[int] = []

    def noted(stage: Stage, index: int, *args: Any) -> Any:
        begun.append(index)
        return backward(stage, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "backward", noted)
        fit(tmp_path / "run", replicas=then, stages=4 - then, **how)
    # Nothing that was committed is taken through the first pass again.
    assert begun[0] == 4
    assert_close(tmp_path / "run", whole[0])


def test_sums_are_added_in_one_order(whole: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        fit(tmp_path / name, replicas=3, stages=2)
    assert_same(tmp_path / "a", tmp_path / "b")
    # In another order the last bits differ, as they may.
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "a", whole[0])


def test_no_replicas_are_refused(tmp_path: Path) -> None:
    with pytest.raises(raycurv.UserError, match=r"--replicas.*at least 1.*0"):
        fit(tmp_path / "run", replicas=0)
