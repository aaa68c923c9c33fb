"""Claims about Ray: it changes where things run, and neither numbers nor errors."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from commands import (
    ROOT,
    Squares,
    classified,
    classifier,
    failure_in,
    flags_of,
    infinite,
    open_losses,
    overflowing,
    run,
    run_here,
    write_rows,
)

import raycurv
from raycurv import NumericalError, UserError, errors
from raycurv.batch import Batch
from raycurv.jobs.evaluate.evaluate_settings import EvaluateSettings
from raycurv.mathematics.choice import choose_blocks
from raycurv.models.opening import open_model
from raycurv.models.patched import Patched
from raycurv.models.stored import Patch
from raycurv.onray.ray_pool import OnRay
from raycurv.stages.stage import StageSpec
from raycurv.stages.transport import Packed, pack, unpack

torch.set_num_threads(1)

ROWS = classified(19)
# float64 with another order of merging; max |difference| over max |reference|.
CLOSE = 1e-10
FIT: dict[str, Any] = {
    "objective": "classification",
    "dtype": "float64",
    "fisher": "sampled",  # labels are compared
    "batch_tokens": 4,
    "quiet": True,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for the whole file; raycurv finds the connection and uses it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        # Workers import by name what the tests hand them.
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            logging_level="warning",
            log_to_driver=False,
        )
        yield
        ray.shutdown()


def relative(mine: Any, reference: Any) -> float:
    a, b = np.asarray(mine, float), np.asarray(reference, float)
    return float(np.abs(a - b).max() / np.abs(b).max())


# The same numbers


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[raycurv.Run, raycurv.Scores]:
    """A fit and scores in this process."""
    folder = tmp_path_factory.mktemp("alone")
    fitted = raycurv.fit(classifier, ROWS, folder / "run", address="none", **FIT)
    return fitted, scored(fitted, folder / "scores", "none")


def scored(fitted: raycurv.Run, out: Path, address: str, **settings: Any) -> raycurv.Scores:
    return fitted.influence(
        ROWS[:4], ROWS, out, address=address, rank="full", batch_tokens=4, self_influence=True,
        quiet=True, **settings,
    )  # fmt: skip


def assert_fit_close(fitted: raycurv.Run, reference: raycurv.Run) -> None:
    """The same labels, and the same tables but for rounding."""
    labels = "labels/part-00000.parquet"
    assert pq.read_table(Path(fitted.path) / labels) == pq.read_table(Path(reference.path) / labels)
    for table, columns in (
        ("blocks", ["trace", "mean_eigenvalue", "input_effective_rank"]),
        ("spectrum", ["eigenvalue"]),
        ("examples", ["loss", "gradient_sq_norm"]),
    ):
        mine, theirs = getattr(fitted, table)(), getattr(reference, table)()
        for column in columns:
            assert relative(mine[column], theirs[column]) < CLOSE


def test_a_sweep_of_actors_gives_the_numbers_of_one_process(
    cluster: None, alone: tuple[raycurv.Run, raycurv.Scores], tmp_path: Path
) -> None:
    how: dict[str, Any] = {"schedule": "swept", "stages": 3, "homes": 2}
    fitted = raycurv.fit(classifier, ROWS, tmp_path / "run", address="local", **FIT, **how)
    assert relative(fitted.blocks()["trace"], alone[0].blocks()["trace"]) < CLOSE
    column = "gradient_sq_norm"
    assert relative(fitted.examples()[column], alone[0].examples()[column]) < CLOSE
    mine = scored(fitted, tmp_path / "scores", "local", **how)
    matrix, queries, examples = mine.matrix()
    reference, queries_alone, examples_alone = alone[1].matrix()
    assert (queries, examples) == (queries_alone, examples_alone)
    assert relative(matrix, reference) < CLOSE


def test_a_pruning_on_actors_is_that_of_one_process(
    cluster: None, alone: tuple[raycurv.Run, raycurv.Scores], tmp_path: Path
) -> None:
    here = alone[0].prune(tmp_path / "here", address="none", quiet=True)
    there = alone[0].prune(tmp_path / "there", address="local", quiet=True)
    assert here.saliency().equals(there.saliency())
    assert here.predicted == there.predicted
    assert relative(there.measured, here.measured) < CLOSE
    files = [Path(found.model) / "model.safetensors" for found in (here, there)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_actors_stay_from_one_group_of_stages_to_the_next(cluster: None) -> None:
    pool = OnRay("local")
    pool.start([_spec(), _spec()])
    before = pool.pids()
    pool.start([_spec()])
    assert pool.stages == 1 and pool.pids() == before
    # The stage that nobody asked for again is gone.
    with pytest.raises(AttributeError):
        ray.get(pool._actors[0][1].handle.call.remote("finish", 1, None))
    pool.start([_spec(), _spec()])
    assert pool.pids() == before
    pool.close()


def test_runs_are_put_together_by_tasks(cluster: None, tmp_path: Path) -> None:
    how: dict[str, Any] = {"keep_sums": True, **FIT}
    a, b = (
        raycurv.fit(classifier, rows, tmp_path / name, address="none", **how)
        for name, rows in (("a", ROWS[:9]), ("b", ROWS[9:]))
    )
    for name, follow in {
        "merge": lambda out, **more: a.merge(b, out=out, quiet=True, **more),
        "extend": lambda out, **more: a.extend(ROWS[9:], out, quiet=True, **more),
    }.items():
        mine = follow(tmp_path / name, address="local", stages=2)
        reference = follow(tmp_path / f"{name}-alone", address="none")
        for column in ("trace", "input_effective_rank", "examples"):
            assert relative(mine.blocks()[column], reference.blocks()[column]) < CLOSE
        column = "gradient_sq_norm"
        assert relative(mine.examples()[column], reference.examples()[column]) < CLOSE


def test_actors_give_the_numbers_of_one_process(
    cluster: None, alone: tuple[raycurv.Run, raycurv.Scores], tmp_path: Path
) -> None:
    fitted = raycurv.fit(classifier, ROWS, tmp_path / "run", address="local", stages=2, **FIT)
    assert_fit_close(fitted, alone[0])
    scores = scored(fitted, tmp_path / "scores", "local", stages=2)
    (mine, *names), (reference, *expected) = scores.matrix(), alone[1].matrix()
    assert names == expected
    assert relative(mine, reference) < CLOSE
    own = scores.self_influence(), alone[1].self_influence()
    assert own[0]["id"] == own[1]["id"]
    assert relative(own[0]["score"], own[1]["score"]) < CLOSE
    # And the comparison could fail: another seed draws other labels.
    other = raycurv.fit(classifier, ROWS, tmp_path / "other", address="none", **FIT, seed=1)
    assert relative(other.blocks()["trace"], alone[0].blocks()["trace"]) > 1e-3


def test_a_connection_that_was_there_is_left_alive_and_without_actors(
    cluster: None, alone: tuple[raycurv.Run, raycurv.Scores], tmp_path: Path
) -> None:
    # One stage, which has both ends of the model.
    fitted = raycurv.fit(classifier, ROWS, tmp_path / "run", address="local", **FIT)
    assert_fit_close(fitted, alone[0])
    assert ray.is_initialized()
    assert ray.get(ray.put("still there")) == "still there"
    pool = OnRay("local")
    pool.start([_spec()])
    actor = pool._actors[0][0].handle
    assert pool.stages == 1
    pool.close()
    assert pool.stages == 0 and ray.is_initialized()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actor.abort.remote(), timeout=30)


def test_patched_models_take_turns_on_the_same_actors(cluster: None, tmp_path: Path) -> None:
    model = open_model(classifier)
    blocks = choose_blocks(model.skeleton(), ())
    models = [
        Patched(model, [Patch.of(b, n * model.block_weight(b))]) for n, b in enumerate(blocks, 2)
    ]
    how: dict[str, Any] = {"batch_tokens": 4, "stages": 2}
    expected = open_losses(
        EvaluateSettings(address="none", **how), model, "classification", ROWS, tmp_path / "here"
    )
    mine = open_losses(
        EvaluateSettings(address="local", **how), model, "classification", ROWS, tmp_path / "ray"
    )
    assert relative(mine.of(model), expected.of(model)) < CLOSE
    pool = mine.workers.pool
    assert isinstance(pool, OnRay)
    before = pool.pids()
    assert relative(mine.of(models[0]), expected.of(models[0])) < CLOSE
    assert pool.pids() == before
    # An actor that is lost is built again as what the others have become.
    os.kill(next(iter(before.values())), signal.SIGKILL)
    assert relative(mine.of(models[2]), expected.of(models[2])) < CLOSE
    assert len(set(pool.pids().items()) & set(before.items())) == len(before) - 1
    assert relative(mine.of(models[1]), mine.of(models[2])) > 1e-3
    mine.workers.close()


def _spec() -> StageSpec:
    model = open_model(classifier)
    return StageSpec(
        index=0,
        model=model,
        units=range(model.units),
        blocks=(),
        objective="classification",
        dtype=torch.float64,
        seed=0,
        logits_chunk=1000,
    )


# Errors


def test_a_mistake_in_an_actor_arrives_as_itself(cluster: None, tmp_path: Path) -> None:
    settings = FIT | {"dtype": "float32"}
    with pytest.raises(UserError, match="finite weights") as caught:
        raycurv.fit(overflowing, ROWS, tmp_path / "run", address="local", **settings)
    assert type(caught.value) is UserError
    assert caught.value.where.endswith("tensor 0.weight")
    assert "float32" in caught.value.got


def test_a_numerical_failure_in_an_actor_arrives_as_itself(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match=r"factor unused\.input, example 'row ") as caught:
        raycurv.fit(infinite, ROWS, tmp_path / "run", address="local", **FIT)
    assert type(caught.value) is NumericalError
    with pytest.raises(NumericalError) as here:
        raycurv.fit(infinite, ROWS, tmp_path / "here", address="none", **FIT)
    assert str(here.value) == str(caught.value)


def test_a_mistake_in_an_actor_ends_a_job_with_2(cluster: None, tmp_path: Path) -> None:
    flags = {
        "model": "commands:overflowing",
        "data": write_rows(tmp_path / "rows.parquet", ROWS),
        "objective": "classification",
        "out": tmp_path / "run",
        "address": "local",
    }
    outcome = run_here("fit.py", flags_of(flags))
    assert outcome.code == 2 and failure_in(outcome)["error"]["kind"] == "UserError"
    assert "finite weights" in outcome.err and "Traceback" not in outcome.err


def test_the_death_of_an_actor_is_named_and_ends_with_1(cluster: None, tmp_path: Path) -> None:
    flags = {
        "model": "commands:deadly",
        "data": write_rows(tmp_path / "rows.parquet", ROWS),
        "objective": "classification",
        "out": tmp_path / "run",
        "address": "local",
    }
    begun = time.monotonic()
    outcome = run_here("fit.py", flags_of(flags))
    # Ray itself may tell of the death on the output.
    assert outcome.code == 1 and '"complete"' not in outcome.out
    # It is built again, until the cause is plain.
    assert (
        "replica 0, stage 0, discover of microbatch 0: expected to end, in 3 attempts"
        in outcome.err
    )
    assert "the same command goes on from there" in outcome.err
    assert "Traceback" not in outcome.err
    assert time.monotonic() - begun < 60


def _refuse(number: int) -> int:
    if number == 2:
        raise NumericalError("factor two", "a number", "two", "Take another.")
    return number


def test_an_error_in_a_task_arrives_as_itself(cluster: None) -> None:
    pool = OnRay("local")
    assert sorted(pool.map(_refuse, [(1,), (3,)])) == [(0, 1), (1, 3)]
    with pytest.raises(NumericalError, match="factor two: expected a number, got two"):
        dict(pool.map(_refuse, [(1,), (2,)]))
    pool.close()


ERRORS = [
    found
    for _, found in inspect.getmembers(errors, inspect.isclass)
    if issubclass(found, Exception) and found.__module__ == errors.__name__
]


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_survives_pickling(kind: type[errors.RaycurvError], protocol: int) -> None:
    assert len(ERRORS) >= 4
    for parts in (("a", "b", "c"), ("block 'x'", "Λ above 0", "nan\nmore", "Do this."), ("",) * 4):
        error = kind(*parts[: len(inspect.signature(kind).parameters)])
        error.__cause__ = ValueError("the reason")
        back = pickle.loads(pickle.dumps(error, protocol))
        assert type(back) is kind
        assert vars(back) == vars(error) and str(back) == str(error) and back.args == error.args
        assert isinstance(back, ValueError) == (kind is UserError)


# Transport

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip
SHAPES: dict[str, Any] = {
    "plain": lambda t: t,
    "empty": lambda t: t[:0],
    "empty inside": lambda t: t[:, :0],
    "one number": lambda t: t[0, 0],
    "a column": lambda t: t[:, 1],
    "transposed": lambda t: t.T,
    "strided": lambda t: t[::2, ::3],
    "expanded": lambda t: t[:1].expand(5, -1),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_arrive_as_they_went(dtype: torch.dtype, shape: str) -> None:
    tensor = SHAPES[shape]((torch.arange(24).reshape(4, 6) % 5).to(dtype))
    back = unpack(pickle.loads(pickle.dumps(pack(tensor))))
    assert back.dtype == tensor.dtype and back.shape == tensor.shape
    assert torch.equal(back, tensor)
    back.fill_(1)


def test_what_holds_tensors_arrives_as_it_went() -> None:
    batch = Batch(
        3,
        ("a", "b"),
        torch.tensor([[1, 2], [3, 0]]),
        mask=torch.tensor([[True, True], [True, False]]),
        drawn=torch.zeros(1, 2, 2, dtype=torch.int64),
    )
    value = {"batch": batch, "list": [torch.ones(2), None, "text"], "pair": (1, torch.zeros(()))}
    back = unpack(pickle.loads(pickle.dumps(pack(value))))
    assert isinstance(back["batch"], Batch)
    assert (back["batch"].index, back["batch"].ids, back["batch"].labels) == (3, ("a", "b"), None)
    for name in ("inputs", "mask", "drawn"):
        assert torch.equal(getattr(back["batch"], name), getattr(batch, name))
    assert torch.equal(back["list"][0], torch.ones(2)) and back["list"][1:] == [None, "text"]
    assert back["pair"][0] == 1 and back["pair"][1].shape == ()


def test_what_arrives_may_be_changed_and_nobody_else_sees_it(cluster: None) -> None:
    reference = ray.put(pack(torch.zeros(300_000)))
    first, second = unpack(ray.get(reference)), unpack(ray.get(reference))
    first += 1
    assert not second.any()
    assert not unpack(ray.get(reference)).any()
    assert first.all()
    # A bare view of the same object is what everyone sees.
    packed: Packed = ray.get(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        view = torch.from_numpy(packed.data).view(torch.float32)
    view += 1
    assert unpack(ray.get(reference)).all()


# A Ray of the job's own


def test_a_local_ray_of_the_default_kind_starts_though_an_address_is_set(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.parquet", ROWS)
    flags = {
        "model": "commands:classifier",
        "objective": "commands:Squares",
        "data": data,
        "out": tmp_path / "run",
        "dtype": "float64",
        "batch_tokens": 4,
        "method": "diagonal",
        "address": "local",
    }
    # Neither job nor actors nor tasks take what lies in the working directory for libraries.
    for name in ("torch", "numpy", "tempfile", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not a library')")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    outcome = run(
        "fit.py", flags_of(flags), folder=tmp_path, RAY_ADDRESS="127.0.0.1:1", RAY_AUTH_MODE=None,
        PYTHONPATH=path,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out.splitlines()[-1])["status"] == "complete"
    here = raycurv.fit(
        classifier, ROWS, tmp_path / "here", address="none", method="diagonal",
        **FIT | {"objective": Squares()},
    )  # fmt: skip
    there = raycurv.open(tmp_path / "run")
    assert relative(there.blocks()["trace"], here.blocks()["trace"]) < CLOSE
