"""Claims about evaluate.py: its numbers are those of plain PyTorch, however they are computed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import (
    classified,
    classifier,
    failure_in,
    flags_of,
    open_losses,
    run_here,
    write_rows,
)
from conftest import Fits
from dense import Truth, set_weight, worst
from networks import LLAMA, MLP, REGRESSION, VOCAB, Case
from torch import Tensor, nn

import raycurv
from raycurv import UserError
from raycurv.driver.settings import IN_MEMORY
from raycurv.files.store import Store
from raycurv.files.weights import write_checkpoint
from raycurv.jobs import check
from raycurv.jobs.evaluate.evaluate_settings import EvaluateSettings
from raycurv.jobs.evaluate.evaluating import evaluate
from raycurv.jobs.inputs import Inputs
from raycurv.mathematics.choice import choose_blocks
from raycurv.models.opening import open_model
from raycurv.models.patched import Patched
from raycurv.models.stored import Patch
from raycurv.progress.reporter import Reporter
from raycurv.stages.stage import Stage

# float64, where sums may be taken in another order; max |difference| over max |reference|.
CLOSE = 1e-10
HERE: dict[str, Any] = {"address": "none", "dtype": "float64", "quiet": True}
HOW: dict[str, dict[str, Any]] = {
    "one stage": {},
    "two stages": {"stages": 2},
    "swept": {"schedule": "swept", "stages": 2},
    "two replicas": {"replicas": 2, "stages": 2},
    "two positions at a time": {"logits_chunk": 2 * VOCAB},
}


def right(truth: Truth, row: dict[str, Any]) -> tuple[int, int]:
    """How many targets an example has, and how many of them are the most probable outcome."""
    outputs, own = truth.outputs(row).detach(), truth.own(row)
    if truth.case.objective == "classification":
        return 1, int(int(outputs.argmax()) == own)
    places = [t for t, counts in enumerate(truth.targets(row)) if counts]
    return len(places), sum(int(outputs[t - 1].argmax()) == own[t] for t in places)


# The numbers


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", [LLAMA, MLP], ids=lambda case: case.name)
def test_the_numbers_are_those_of_plain_torch(
    case: Case, how: str, fits: Fits, tmp_path: Path
) -> None:
    found = raycurv.evaluate(
        fits.source(case), list(case.data), tmp_path, case.objective,
        **HERE | {"batch_tokens": case.batch_tokens} | HOW[how],
    )  # fmt: skip
    truth = fits.truth(case)
    losses = truth.losses()
    targets, correct = zip(*(right(truth, row) for row in case.data), strict=True)
    table = found.examples()
    assert table["id"].to_pylist() == [row["id"] for row in case.data]
    assert worst(torch.tensor(table["loss"].to_pylist(), dtype=torch.float64), losses) < CLOSE
    assert table["targets"].to_pylist() == list(targets)
    assert table["correct"].to_pylist() == list(correct)
    assert table["tokens"].to_pylist() == [len(row.get("input_ids", [0])) for row in case.data]
    total = float(losses.sum())
    assert found.loss == pytest.approx(total / len(losses), rel=CLOSE)
    assert found.loss_per_target == pytest.approx(total / sum(targets), rel=CLOSE)
    assert found.accuracy == sum(correct) / sum(targets)
    assert 0 < sum(correct) < sum(targets), "an accuracy that a mistake could hit"
    assert (len(found), found.targets) == (len(losses), sum(targets))
    if case.objective == "causal-lm":
        assert found.perplexity == pytest.approx(math.exp(total / sum(targets)), rel=CLOSE)
        # An example of one token: no loss, no target, and counted.
        at = [len(row["input_ids"]) for row in case.data].index(1)
        assert (losses[at], targets[at], table["loss"][at].as_py()) == (0, 0, 0)
    else:
        assert found.perplexity is None
    assert not (tmp_path / "work").exists() and not (tmp_path / "data").exists()


def test_a_regression_has_neither_perplexity_nor_accuracy(fits: Fits, tmp_path: Path) -> None:
    found = raycurv.evaluate(
        REGRESSION.network, list(REGRESSION.data), tmp_path, "regression", **HERE
    )
    expected = float(fits.truth(REGRESSION).losses().mean())
    assert found.loss == pytest.approx(expected, rel=CLOSE)
    assert found.perplexity is None and found.accuracy is None
    assert found.examples()["correct"].null_count == len(REGRESSION.data)
    assert "accuracy" not in json.loads((tmp_path / "run.json").read_text())["facts"]


class Halved:
    """A classification of the user's, which says nothing of what is right."""

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return 0.5 * raycurv.Classification().loss(outputs, batch)

    def sample(self, outputs: Tensor, batch: Any, uniform: Any) -> Tensor:
        return raycurv.Classification().sample(outputs, batch, uniform)


class Judged(Halved):
    """The same, and what is right: everything."""

    def correct(self, outputs: Tensor, batch: Any) -> Tensor:
        return torch.ones(len(outputs))


@pytest.mark.parametrize(("objective", "accuracy"), [(Halved(), None), (Judged(), 1.0)])
def test_an_objective_of_ones_own_counts_what_is_right_or_does_not(
    objective: Any, accuracy: float | None, fits: Fits, tmp_path: Path
) -> None:
    found = raycurv.evaluate(MLP.network, list(MLP.data), tmp_path, objective, **HERE)
    assert found.loss == pytest.approx(float(fits.truth(MLP).losses().mean()) / 2, rel=CLOSE)
    assert found.accuracy == accuracy


class Steep(raycurv.CausalLM):
    """Losses whose exponential no float holds."""

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return 1e4 * super().loss(outputs, batch)


def test_a_perplexity_beyond_floats_is_left_out(fits: Fits, tmp_path: Path) -> None:
    found = raycurv.evaluate(fits.source(LLAMA), list(LLAMA.data), tmp_path, Steep(), **HERE)
    assert found.perplexity is None and found.loss_per_target > 1e4


# The job


def flags(folder: Path, **settings: Any) -> list[str]:
    own = {
        "model": "commands:classifier", "data": folder / "data.parquet", "out": folder / "out",
        "objective": "classification", "address": "none", "dtype": "float64", "batch_tokens": 4,
    }  # fmt: skip
    return flags_of(own | settings)


def test_the_job_says_the_numbers_to_people_machines_and_readers(tmp_path: Path) -> None:
    rows = classified(11)
    write_rows(tmp_path / "data.parquet", rows)
    outcome = run_here("evaluate.py", flags(tmp_path))
    assert outcome.code == 0, outcome.err
    said = json.loads(outcome.out.splitlines()[-1])
    truth = Truth(replace(MLP, network=classifier, data=tuple(rows)))
    assert said["loss"] == pytest.approx(float(truth.losses().mean()), rel=CLOSE)
    assert said["accuracy"] == sum(right(truth, row)[1] for row in rows) / len(rows)
    assert (said["status"], said["job"], said["out"]) == (
        "complete", "evaluate.py", str(tmp_path / "out"),
    )  # fmt: skip
    assert (said["examples"], said["targets"]) == (11, 11)
    assert f"loss {said['loss']:.6g}" in outcome.err
    facts = json.loads((tmp_path / "out" / "run.json").read_text())["facts"]
    assert facts["loss"] == said["loss"] and facts["accuracy"] == said["accuracy"]
    table = pq.read_table(tmp_path / "out" / "tables" / "examples")
    assert {field.name: field.type for field in table.schema} == {
        "id": pa.string(), "tokens": pa.int32(), "targets": pa.int32(), "loss": pa.float64(),
        "correct": pa.int32(),
    }  # fmt: skip
    assert table.schema.metadata.keys() >= {b"raycurv.schema", b"raycurv.run"}


def turns(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[int]:
    """The microbatches that come to the model's end; the process dies at one of them."""
    seen: list[int] = []
    turn = Stage.turn

    def counted(self: Stage, batch: Any, *args: Any) -> Any:
        if self._segment.last:
            if batch.index == fail_at:
                raise MemoryError
            seen.append(batch.index)
        return turn(self, batch, *args)

    monkeypatch.setattr(Stage, "turn", counted)
    return seen


@pytest.mark.parametrize("how", ["one stage", "swept"])
def test_what_stopped_goes_on_from_its_last_commit(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "data.parquet", classified(23))
    settings = HOW[how] | {"commit_seconds": 1e-9}
    assert run_here("evaluate.py", flags(tmp_path, out=tmp_path / "whole")).code == 0
    with monkeypatch.context() as patch:
        turns(patch, fail_at=3)
        assert run_here("evaluate.py", flags(tmp_path, **settings)).code == 1
    with monkeypatch.context() as patch:
        seen = turns(patch)
        assert run_here("evaluate.py", flags(tmp_path, **settings)).code == 0
    assert seen == [3, 4, 5]
    tables = [pq.read_table(tmp_path / name / "tables/examples") for name in ("out", "whole")]
    assert tables[0].equals(tables[1])


def test_what_is_complete_is_said_again_and_what_is_damaged_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "data.parquet", classified(9))
    first = run_here("evaluate.py", flags(tmp_path))
    file = tmp_path / "out/tables/examples/part-00000.parquet"
    before = file.read_bytes()
    seen = turns(monkeypatch)

    def numbers(out: str) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(out.splitlines()[-1])
        return {key: said[key] for key in ("loss", "accuracy", "examples", "out")}

    again = run_here("evaluate.py", flags(tmp_path, batch_tokens=2))
    assert again.code == 0 and not seen and numbers(again.out) == numbers(first.out)
    file.write_bytes(before[:-9])
    again = run_here("evaluate.py", flags(tmp_path))
    assert again.code == 0 and seen and file.read_bytes() == before
    # Another question is another directory.
    refused = run_here("evaluate.py", flags(tmp_path, dtype="float32"))
    assert refused.code == 2 and "--dtype was 'float64'" in refused.err


def not_a_number() -> nn.Module:
    network = classifier()
    network[0].weight.data[2, 1] = math.nan
    return network


ROW = {"id": "a", "inputs": [1.0] * 5, "labels": 1}
MISTAKES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str]] = {
    "no model": ({"model": None}, [ROW], "--model"),
    "no data": ({"data": None}, [ROW], "--data"),
    "no out": ({"out": None}, [ROW], "--out"),
    "a model that is not there": ({"model": "nowhere/at/all"}, [ROW], "no such directory"),
    "an unknown objective": ({"objective": "hinge"}, [ROW], "--objective"),
    "no stages": ({"stages": 0}, [ROW], "--stages"),
    "a label out of range": ({}, [ROW, ROW | {"id": "b", "labels": 3}], "a class from 0 to 2"),
    "no labels": ({}, [{k: v for k, v in ROW.items() if k != "labels"}], "labels"),
    "an id twice": ({}, [ROW, ROW], "'a'"),
    "weights that are not finite": ({"model": "test_evaluate:not_a_number"}, [ROW], "finite"),
    "inputs that are not finite": ({}, [ROW | {"inputs": [math.nan] * 5}], "finite"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_ends_with_2(mistake: str, tmp_path: Path) -> None:
    settings, rows, says = MISTAKES[mistake]
    write_rows(tmp_path / "data.parquet", rows)
    outcome = run_here("evaluate.py", flags(tmp_path, **settings))
    assert outcome.code == 2, outcome.err
    error = failure_in(outcome)["error"]
    assert error["kind"] == "UserError" and says in " ".join(error.values())
    assert "Traceback" not in outcome.err


def test_tokens_without_a_target_are_a_mistake(fits: Fits, tmp_path: Path) -> None:
    rows = [{"input_ids": [3]}, {"input_ids": [3, 4], "loss_mask": [True, False]}]
    with pytest.raises(UserError, match="loss term"):
        raycurv.evaluate(fits.source(LLAMA), rows, tmp_path, **HERE)


def test_what_cannot_fit_is_refused_unless_forced(
    fits: Fits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = check.supply_here
    monkeypatch.setattr(check, "supply_here", lambda where: replace(there(where), memory=1000))
    given = (fits.source(LLAMA), list(LLAMA.data), tmp_path)
    with pytest.raises(UserError, match="--force"):
        raycurv.evaluate(*given, **HERE)
    assert len(raycurv.evaluate(*given, **HERE, force=True)) == len(LLAMA.data)


# Patched models


def patches_of(model: Any) -> list[Patch]:
    """Every block without the smaller half of its weights."""
    found = []
    for block in choose_blocks(model.skeleton(), (), model.default_scope, model.tied_head):
        own = model.block_weight(block)
        found.append(Patch.of(block, own * (own.abs() > own.abs().median())))
    return found


def test_a_patched_model_is_evaluated_as_the_one_that_is_saved(fits: Fits, tmp_path: Path) -> None:
    model = open_model(fits.source(LLAMA))
    patched = Patched(model, patches_of(model))
    write_checkpoint(Store(str(tmp_path / "saved")), patched)
    saved = raycurv.evaluate(tmp_path / "saved", list(LLAMA.data), tmp_path / "a", **HERE)
    settings = EvaluateSettings(
        model=IN_MEMORY, data=IN_MEMORY, out=str(tmp_path / "b"), address="none", dtype="float64",
        stages=2,
    )  # fmt: skip
    inputs = Inputs(network=patched, data=list(LLAMA.data))
    _, numbers = evaluate(settings, inputs, Reporter(quiet=True))
    assert numbers["loss"] == pytest.approx(saved.loss, rel=CLOSE)
    # Another weight in it is another model, and the directory another run's.
    other = Patched(patched, [Patch.of(b.block, b.read() * 2) for b in patches_of(model)[:1]])
    with pytest.raises(UserError, match="the model is another one"):
        evaluate(settings, replace(inputs, network=other), Reporter(quiet=True))


def by_hand(case: Case, model: Any) -> Tensor:
    """The losses of a model, patched or not, of plain torch."""

    def network() -> nn.Module:
        made = case.network()
        for name, patch in getattr(model, "patches", {}).items():
            set_weight(made.get_submodule(name), patch.read())
        return made

    return Truth(replace(case, network=network)).losses()


@pytest.mark.parametrize("how", ["one stage", "two stages", "swept", "two replicas"])
@pytest.mark.parametrize("case", [LLAMA, MLP], ids=lambda case: case.name)
def test_models_in_turn_have_the_losses_that_each_has_alone(
    case: Case, how: str, fits: Fits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(fits.source(case))
    patches = patches_of(model)
    models: list[Any] = [model, *(Patched(model, [patch]) for patch in patches[:3])]
    models += [Patched(model, patches), model]
    built: list[Stage] = []
    build = Stage.__init__

    def counted(self: Stage, spec: Any) -> None:
        built.append(self)
        build(self, spec)

    monkeypatch.setattr(Stage, "__init__", counted)
    settings = EvaluateSettings(address="none", batch_tokens=case.batch_tokens, **HOW[how])
    losses = open_losses(settings, model, case.objective, case.data, tmp_path)
    for each in models:
        assert worst(losses.of(each), by_hand(case, each)) < CLOSE
    if how != "swept":
        # All models went through the stages of the first.
        assert len(built) == len(losses.workers.cuts) * settings.replicas
    # Control: the patches matter, and a pass that is finished is not repeated.
    assert worst(losses.of(models[1]), by_hand(case, model)) > 1e-6
    seen = turns(monkeypatch)
    losses.of(models[2])
    assert not seen
