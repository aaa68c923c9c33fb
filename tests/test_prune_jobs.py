"""Claims about prune.py as a job: what it leaves, how it stops and goes on, what it refuses."""

from __future__ import annotations

import json
import math
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
import torch
from commands import (
    Outcome,
    classified,
    classifier,
    dead,
    failure_in,
    flags_of,
    rewritten,
    run_here,
    snapshot,
    write_rows,
)
from dense import Truth
from networks import LLAMA, MLP, arrays
from results import changed
from s3 import ENVIRONMENT, Server, server
from safetensors.torch import load_file
from test_resume import delete, truncate
from torch import nn

import raycurv
from raycurv import UserError
from raycurv.jobs.losses import Losses
from raycurv.jobs.prune import pruning, surgery
from raycurv.pruned import Pruned
from raycurv.stages.pool import InProcess

torch.set_num_threads(1)

ROWS = classified(11)
HERE: dict[str, Any] = {"address": "none", "quiet": True}
FIT: dict[str, Any] = HERE | {"objective": "classification", "dtype": "float64", "batch_tokens": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fits of a classifier that has a name: EK-FAC, and others of other methods."""
    folder = tmp_path_factory.mktemp("pruning")
    data = write_rows(folder / "data.parquet", ROWS)
    for method in ("ekfac", "mfac", "identity"):
        more = {"rows": 4} if method == "mfac" else {}
        raycurv.fit("commands:classifier", data, folder / method, method=method, **more, **FIT)
    return folder


def given_again(run: Path) -> Settings:
    """The model of a run, where it is a factory that has a name."""
    recorded = json.loads((run / "run.json").read_text())["facts"]["model"]
    return {"model": recorded} if ":" in recorded else {}


def prune(run: Path, out: Any, **settings: Any) -> Pruned:
    return raycurv.open(run, **given_again(run)).prune(out, **HERE | settings)


def job(run: Path, out: Path, **settings: Any) -> Outcome:
    base = {"run": run, "out": out, "address": "none"} | given_again(run)
    return run_here("prune.py", flags_of(base | settings))


# What it leaves


def test_the_job_says_what_it_found_to_people_machines_and_readers(
    place: Path, tmp_path: Path
) -> None:
    outcome = job(place / "ekfac", tmp_path / "out", measure="blocks", sparsity=0.3)
    assert outcome.code == 0, outcome.err
    said = json.loads(outcome.out.splitlines()[-1])
    assert (said["status"], said["job"], said["out"]) == (
        "complete", "prune.py", str(tmp_path / "out"),
    )  # fmt: skip
    found = raycurv.open_pruned(tmp_path / "out")
    assert (said["sparsity"], said["predicted"], said["measured"]) == (
        found.sparsity, found.predicted, found.measured,
    )  # fmt: skip
    assert said["pruned_loss"] - said["loss"] == said["measured"]
    assert "29.7% of 91 weights removed" not in outcome.err
    assert f"{found.sparsity:.1%} of 95 weights removed" in outcome.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "run.json", "model", "saliency", "tables",
    }  # fmt: skip
    assert found.path == str(tmp_path / "out") and "29.5%" in repr(found)
    assert {p.name for p in (tmp_path / "out" / "tables").iterdir()} == {"pruned", "timeline"}


SALIENCY = {
    "block": pa.string(), "row": pa.int32(), "saliency": pa.list_(pa.float32()),
    "keep": pa.list_(pa.bool_()), "unit_saliency": pa.list_(pa.float32()),
}  # fmt: skip
PRUNED = {
    "block": pa.string(), "weights": pa.int64(), "removed": pa.int64(), "sparsity": pa.float64(),
    "saliency": pa.float64(), "predicted": pa.float64(), "measured": pa.float64(),
    "update": pa.string(), "iterations": pa.int32(), "residual": pa.float64(),
    "seconds": pa.float64(), "zero_before": pa.int64(),
}  # fmt: skip
HEADS = {
    "block": pa.string(), "head": pa.int32(), "start": pa.int32(), "stop": pa.int32(),
    "saliency": pa.float32(), "keep": pa.bool_(),
}  # fmt: skip


def columns(table: pa.Table) -> dict[str, pa.DataType]:
    return {field.name: field.type for field in table.schema}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16, in several files, and a fit of it."""
    folder = tmp_path_factory.mktemp("pruning-llama")
    network: Any = LLAMA.network().to(torch.bfloat16)
    network.save_pretrained(folder / "model", max_shard_size="1KB")
    assert len(list((folder / "model").glob("*.safetensors"))) == 3
    (folder / "model" / "tokenizer_config.json").write_text("{}")
    raycurv.fit(
        folder / "model", list(LLAMA.data), folder / "run", batch_tokens=14, **HERE
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("structure", ["2:4", "heads"])
def test_transformers_alone_load_the_checkpoint(
    structure: str, llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    found = prune(llama / "run", tmp_path, structure=structure, scope="block")
    model, notes = AutoModelForCausalLM.from_pretrained(
        found.model, output_loading_info=True, dtype="auto"
    )
    assert not any(notes[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    old, new = (
        {
            k: t
            for file in sorted(Path(folder).glob("*.safetensors"))
            for k, t in load_file(file).items()
        }
        for folder in (llama / "model", found.model)
    )
    assert {p.name for p in Path(found.model).iterdir()} == {
        p.name for p in (llama / "model").iterdir()
    }
    blocks = found.blocks()["block"].to_pylist()
    assert len(blocks) == (2 if structure == "heads" else 14)
    own = {f"{name}.weight" for name in blocks}
    assert old.keys() == new.keys() and own <= old.keys()
    for key in old:
        assert old[key].dtype == new[key].dtype == torch.bfloat16
        assert torch.equal(old[key], new[key]) == (key not in own), key
    for name in blocks:
        keep = torch.tensor(found.saliency(name)["keep"].to_pylist())
        # What stays is zero by chance alone, which float arithmetic does not give here.
        assert torch.equal(new[f"{name}.weight"] != 0, keep), name
        assert torch.equal(model.get_submodule(name).weight != 0, keep)
        if structure == "2:4":
            assert (keep.unflatten(1, (-1, 4)).sum(dim=2) == 2).all()
    assert found.sparsity == 0.5
    # As rows of tables, for others.
    folder = tmp_path / "saliency"
    ((rows, zeros),) = duckdb.sql(
        "select count(*), sum(len(keep) - list_sum(list_transform(keep, lambda x: x::int))) "
        f"from '{folder}/*.parquet'"
    ).fetchall()
    assert rows == sum(new[k].shape[0] for k in own)
    assert zeros == sum(int((new[k] == 0).sum()) for k in own)
    ((removed, weights),) = duckdb.sql(
        f"select sum(removed), sum(weights) from '{tmp_path}/tables/pruned/*.parquet'"
    ).fetchall()
    assert (removed, weights) == (zeros, sum(new[k].numel() for k in own))
    assert columns(found.saliency(blocks[0])) == SALIENCY
    assert columns(found.blocks()) == PRUNED
    if structure == "heads":
        assert columns(found.heads()) == HEADS and len(found.heads()) == 4
    else:
        assert len(found.heads()) == 0


def test_a_factorys_checkpoint_is_its_state_dict(place: Path, tmp_path: Path) -> None:
    found = prune(place / "ekfac", tmp_path, structure="rows", measure="none")
    made = classifier()
    made.load_state_dict(load_file(Path(found.model) / "model.safetensors"))
    for name in found.blocks()["block"].to_pylist():
        layer: Any = made.get_submodule(name)
        rows = torch.tensor(found.saliency(name)["keep"].to_pylist()).any(dim=1)
        assert torch.equal(layer.weight.any(dim=1), rows)
        # A bias goes with its row, and with nothing else.
        assert layer.bias is None or torch.equal(layer.bias != 0, rows)


@pytest.mark.parametrize("method", ["ekfac", "mfac", "identity"])
def test_magnitudes_need_no_curvature_and_use_what_there_is(
    method: str, place: Path, tmp_path: Path
) -> None:
    found = prune(place / method, tmp_path, saliency="magnitude", steps=2)
    old, new = classifier().state_dict(), load_file(Path(found.model) / "model.safetensors")
    moved = any((new[k] != old[k])[new[k] != 0].any() for k in new if k.endswith("weight"))
    assert moved == (method != "identity")
    assert (found.predicted is None) == (method == "identity")
    assert set(found.blocks()["update"].to_pylist()) == ({"none"} if not moved else {"ok"})
    assert found.measured is not None and found.sparsity == 47 / 95


# Stopped, and run again

PHASES: dict[str, tuple[Any, str]] = {
    "saliencies": (pruning, "score_block"),
    "masks": (pruning, "mask_block"),
    "update": (pruning, "update_block"),
    "solution": (pruning, "solve_kept"),
    "checkpoint": (pruning, "write_checkpoint"),
    "losses": (Losses, "of"),
    "tables": (pruning, "write_table"),
    "a block's table": (surgery, "write_table"),
    "a block's outcome": (surgery, "asdict"),
    "curvature": (pruning, "run_fit"),
    "the end": (pruning._Prune, "_record"),
}


def failing(owner: Any, name: str, patch: pytest.MonkeyPatch, at: int) -> None:
    """The process dies in the nth call."""
    function, calls = getattr(owner, name), []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == at:
            raise MemoryError(name)
        return function(*args, **kwargs)

    patch.setattr(owner, name, dies)


def same(out: Path, reference: Path) -> None:
    """All results but the times that they took."""

    def results(folder: Path) -> dict[str, bytes]:
        there = {n: data for n, (_, data) in snapshot(folder).items()}
        return {n: d for n, d in there.items() if n.startswith(("model/", "saliency/"))}

    a, b = results(out), results(reference)
    assert a.keys() == b.keys() and a
    tables = []
    for folder in (out, reference):
        found = raycurv.open_pruned(folder)
        tables.append(found.blocks().replace_schema_metadata(None).drop(["seconds"]))
        tables.append(found.saliency().replace_schema_metadata(None))
    assert tables[0].equals(tables[2]) and tables[1].equals(tables[3])
    assert all(a[n] == b[n] for n in a if n.startswith("model/"))
    facts = [json.loads((f / "run.json").read_text())["facts"] for f in (out, reference)]
    for name in ("sparsity", "predicted", "measured", "correlation", "weights", "removed"):
        assert facts[0].get(name) == facts[1].get(name), name
    assert not (out / "work").exists() and not list(out.rglob("*.part"))


STOPPED: dict[str, dict[str, Any]] = {
    "ekfac": {"measure": "blocks", "steps": 2},
    "mfac": {"steps": 2},
}


@pytest.fixture(scope="module")
def whole(place: Path) -> Callable[[str], Path]:
    """Prunings that nothing disturbed."""

    def made(method: str) -> Path:
        out = place / f"whole-{method}"
        if not out.exists():
            prune(place / method, out, **STOPPED[method])
        return out

    return made


@pytest.mark.parametrize("phase", PHASES)
def test_what_stopped_anywhere_goes_on_to_the_same_results(
    phase: str, place: Path, tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    method = "mfac" if phase == "solution" else "ekfac"
    reference = whole(method)
    at = {"solution": 2, "curvature": 1, "checkpoint": 1, "tables": 1, "the end": 2}.get(phase, 5)
    if phase == "a block's table":
        at = 2
    with pytest.MonkeyPatch.context() as patch:
        failing(*PHASES[phase], patch, at)
        with pytest.raises(MemoryError):
            prune(place / method, tmp_path, **STOPPED[method])
    done = {n for n in snapshot(tmp_path) if n.startswith(("work/step", "work/losses", "saliency"))}
    # A block is done when it is said what became of it, and a fit says more at each start.
    for name in list(done):
        place_of, _, block = name.removesuffix(Path(name).suffix).rpartition("/")
        under_way = f"work/step-2/pruned/{block}.safetensors" not in done
        if place_of in ("saliency", "work/step-2/weights") and under_way:
            done.remove(name)
    done = {n for n in done if not n.endswith("run.json")}
    assert done
    written: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        write = raycurv.files.store.Store.write

        def watched(self: Any, name: str, chunks: Any) -> None:
            written.append(os.path.relpath(self.path(name), tmp_path))
            write(self, name, chunks)

        patch.setattr("raycurv.files.store.Store.write", watched)
        prune(place / method, tmp_path, **STOPPED[method])
    same(tmp_path, reference)
    # Nothing that was finished was made again.
    assert not done & set(written)
    if phase in ("losses", "tables", "the end"):
        assert not any(n.startswith(("model/", "saliency/")) for n in written)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("work/step-1/saliency/2", truncate),
        ("work/step-1/keep/0", truncate),
        ("work/step-1/weights/4", truncate),
        ("work/step-1/weights/2", delete),
        ("work/step-1/pruned/2", truncate),
        ("saliency/2", truncate),
        ("saliency/0", delete),
    ],
)
def test_a_file_that_was_damaged_under_way_is_made_again_alone(
    name: str, damage: Callable[[Path], None], place: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"measure": "none"}
    if not (place / "plain").exists():
        prune(place / "mfac", place / "plain", **settings)
    with pytest.MonkeyPatch.context() as patch:
        failing(pruning, "write_checkpoint", patch, 1)
        with pytest.raises(MemoryError):
            prune(place / "mfac", tmp_path, **settings)
        before = snapshot(tmp_path)
        damage(tmp_path / f"{name}{'.safetensors' if 'work' in name else '.parquet'}")
        failing(pruning, "write_checkpoint", patch, 1)
        with pytest.raises(MemoryError):
            prune(place / "mfac", tmp_path, **settings)
    again = {n for n in changed(before, tmp_path) if not n.startswith("tables/")}
    block = name.rpartition("/")[2]
    assert all(n.split("/")[-1].split(".")[0] == block for n in again)
    prune(place / "mfac", tmp_path, **settings)
    same(tmp_path, place / "plain")


def test_a_rerun_says_the_same_and_does_nothing(
    place: Path, tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    shutil.copytree(whole("ekfac"), tmp_path / "out")
    before = snapshot(tmp_path / "out")
    outcome = job(place / "ekfac", tmp_path / "out", **STOPPED["ekfac"], stages=2)
    assert outcome.code == 0 and snapshot(tmp_path / "out") == before
    said, found = json.loads(outcome.out.splitlines()[-1]), raycurv.open_pruned(tmp_path / "out")
    assert (said["predicted"], said["measured"]) == (found.predicted, found.measured)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("saliency/2.parquet", delete),
        ("tables/pruned/part-00000.parquet", truncate),
        ("model/model.safetensors", truncate),
    ],
)
def test_a_result_that_is_damaged_is_made_again(
    file: str,
    damage: Callable[[Path], None],
    place: Path,
    tmp_path: Path,
    whole: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole("mfac"), out)
    damage(out / file)
    prune(place / "mfac", out, **STOPPED["mfac"] | {"quiet": False})
    assert "gone or damaged" in capsys.readouterr().err
    same(out, whole("mfac"))


# Tasks elsewhere


class Elsewhere(InProcess):
    """Tasks as another process would run them, the last one ending first."""

    def map(self, function: Any, arguments: Any, needs: Any = None) -> Iterator[tuple[int, Any]]:
        given = [pickle.loads(pickle.dumps(args)) for args in arguments]
        for place, value in reversed(list(super().map(function, given, needs))):
            yield place, pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize(
    "settings", [{"steps": 2}, {"inverse": "block"}, {"structure": "rows"}], ids=str
)
def test_tasks_may_run_anywhere_and_end_in_any_order(
    settings: dict[str, Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(place / "mfac", tmp_path / "here", measure="none", **settings)
    monkeypatch.setattr("raycurv.driver.workers.InProcess", Elsewhere)
    prune(place / "mfac", tmp_path / "there", measure="none", **settings)
    same(tmp_path / "there", tmp_path / "here")


# Mistakes

Settings = dict[str, Any]


def _statistics(place: Path, folder: Path) -> Settings:
    return {"first_order": True}


def _unfinished(place: Path, folder: Path) -> Settings:
    shutil.copytree(place / "ekfac", folder / "run")
    with rewritten(folder / "run") as said:
        said["complete"] = ["layout", "factors"]
    return {"run": folder / "run"}


def _changed_model(place: Path, folder: Path) -> Settings:
    shutil.copytree(place / "ekfac", folder / "run")
    with rewritten(folder / "run") as said:
        said["facts"]["model"] = "test_prune_jobs:others"
    return {"run": folder / "run", "model": "test_prune_jobs:others"}


def others() -> nn.Module:
    """A classifier of which one weight has changed."""
    network = classifier()
    with torch.no_grad():
        network[2].weight[0, 0] += 1
    return network


def _another(place: Path, folder: Path) -> Settings:
    prune(place / "ekfac", folder / "out", measure="none")
    return {"scope": "block", "damping": "0.2"}


def _another_fit(place: Path, folder: Path) -> Settings:
    prune(place / "ekfac", folder / "out", measure="none")
    return {"run": place / "mfac"}


def _another_model(place: Path, folder: Path) -> Settings:
    raycurv.fit("test_prune_jobs:others", place / "data.parquet", folder / "run", **FIT)
    prune(place / "ekfac", folder / "out", measure="none")
    return {"run": folder / "run", "model": "test_prune_jobs:others"}


MISTAKES: dict[str, tuple[Callable[[Path, Path], Settings] | Settings, tuple[str, ...]]] = {
    "a sparsity of one": ({"sparsity": 1.0}, ("--sparsity", "below 1")),
    "a negative sparsity": ({"sparsity": -0.1}, ("--sparsity", "from 0 on")),
    "a sparsity that is no number": ({"sparsity": "nan"}, ("--sparsity", "nan")),
    "no structure": ({"structure": "columns"}, ("--structure", "N:M such as 2:4", "'columns'")),
    "half a pattern": ({"structure": "2:"}, ("--structure", "N:M", "'2:'")),
    "three numbers": ({"structure": "1:2:4"}, ("--structure", "N:M", "'1:2:4'")),
    "a pattern of everything": ({"structure": "4:4"}, ("0 < N < M", "4 of 4")),
    "a pattern of too many ways": ({"structure": "8:16"}, ("at most 70 ways",)),
    "a pattern that does not divide": (
        {"structure": "2:4"}, ("block 0", "a multiple of 4 inputs", "got 5", "'!0'")
    ),
    "a pattern and a sparsity": (
        {"structure": "1:7", "sparsity": 0.5}, ("--sparsity", "says its own")
    ),
    "a pattern in steps": ({"structure": "1:7", "steps": 2}, ("--steps", "1 with --structure")),
    "no steps": ({"steps": 0}, ("--steps", "at least 1")),
    "no iterations": ({"iterations": 0}, ("--iterations", "at least 1")),
    "no tolerance": ({"tolerance": 0.0}, ("--tolerance", "above 0")),
    "a sample of nothing": ({"measure_examples": 0}, ("--measure-examples",)),
    "no curvature": (
        lambda place, folder: {"run": place / "identity"},
        ("--saliency obs", "identity", "--method ekfac", "--saliency magnitude"),
    ),
    "no gradients": ({"first_order": True}, ("--first-order", "--gradients")),
    "no run": ({"run": None}, ("--run",)),
    "no out": ({"out": None}, ("--out",)),
    "a run that is not there": ({"run": "/nothing-here"}, ("fit.py", "no run.json")),
    "a run that is not finished": (_unfinished, ("a finished fit", "layout, factors")),
    "another checkpoint": (_changed_model, ("was fitted on", "1 other tensors", "2.weight")),
    "an inverse of another method": ({"inverse": "block"}, ("--inverse", "mfac", "ekfac")),
    "blocks that match nothing": ({"blocks": ["*gates*"]}, ("--blocks '*gates*'", "no match")),
    "exclusions that match nothing": ({"blocks": ["!9"]}, ("--blocks '9'", "no match")),
    "no block left": ({"blocks": ["!*"]}, ("--blocks", "at least one")),
    "heads where there are none": ({"structure": "heads"}, ("--structure heads", "config.json")),
    "a negative damping": ({"damping": "-1"}, ("--damping", "'-1'")),
    "no damping of a rank-m Fisher": (
        lambda place, folder: {"run": place / "mfac", "damping": "abs:0"},
        ("the model's Fisher", "positive damping"),
    ),
    "other settings": (
        _another, ("--scope was 'global' and is now 'block'", "--damping was '0.1' and is now")
    ),
    "another fit": (_another_fit, ("the fit is another one",)),
    "another model": (_another_model, ("the model is another one", "2.weight")),
    "the run as --out": (
        lambda place, folder: {"out": shutil.copytree(place / "ekfac", folder / "copy")},
        ("job fit",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_ends_with_2(mistake: str, place: Path, tmp_path: Path) -> None:
    given, says = MISTAKES[mistake]
    settings = given(place, tmp_path) if callable(given) else given
    base = {"run": place / "ekfac", "out": tmp_path / "out", "measure": "none"}
    base |= {"model": "commands:classifier"}
    outcome = run_here("prune.py", flags_of({"address": "none"} | base | settings))
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    error = failure_in(outcome)["error"]
    assert error["kind"] == "UserError"
    assert all(error[key] for key in ("where", "expected", "got")), error
    message = outcome.err.strip().splitlines()[-1]
    assert message.endswith(error["remedy"])
    for piece in says:
        assert piece in message, message


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("ekfac", {"first_order": True}), ("identity", {}), ("mfac", {"first_order": True})],
)
def test_the_command_that_a_remedy_gives_makes_what_is_missing(
    kind: str, settings: Settings, place: Path, tmp_path: Path
) -> None:
    run = tmp_path / "a run"
    shutil.copytree(place / kind, run)
    outcome = job(run, tmp_path / "out", measure="none", **settings)
    assert outcome.code == 2
    command = failure_in(outcome)["error"]["remedy"]
    command = command.partition(", or --saliency")[0].partition(": it makes")[0]
    python, script, *flags = shlex.split(command)
    assert (python, script) == ("python", "jobs/fit.py")
    made = tmp_path / "RUN" if kind == "identity" else run
    flags = [str(made) if flag == "RUN" else flag for flag in flags]
    fitted = run_here("fit.py", [*flags, "--address", "none", "--batch-tokens", "4"])
    assert fitted.code == 0, fitted.err
    assert job(made, tmp_path / "out", measure="none", **settings).code == 0


def test_the_command_of_a_run_that_was_put_together_is_its_own(tmp_path: Path) -> None:
    parts = []
    for name, rows in (("a", ROWS[:6]), ("b", ROWS[6:])):
        data = write_rows(tmp_path / f"{name}.parquet", rows)
        parts.append(
            raycurv.fit("commands:classifier", data, tmp_path / name, keep_sums=True, **FIT)
        )
    merged = parts[0].merge(parts[1], out=tmp_path / "merged", quiet=True, address="none")
    outcome = job(tmp_path / "merged", tmp_path / "out", first_order=True, steps=2)
    assert outcome.code == 2
    command = failure_in(outcome)["error"]["remedy"].partition(": it makes")[0]
    flags = shlex.split(command)[2:]
    assert run_here("fit.py", [*flags, "--address", "none"]).code == 0
    found = merged.prune(tmp_path / "out", **HERE, first_order=True, steps=2)
    assert found.manifest.facts["loss"] == pytest.approx(_mean_loss(), rel=1e-10)
    # The directory of an extended run has the examples alone that it was extended by.
    parts[0].extend(tmp_path / "b.parquet", tmp_path / "extended", quiet=True, address="none")
    for settings, says in (({"steps": 2}, "--steps"), ({"first_order": True}, "all its data")):
        outcome = job(tmp_path / "extended", tmp_path / "out 2", **settings)
        assert outcome.code == 2 and says in outcome.err


def _mean_loss() -> float:
    return float(Truth(replace(MLP, network=classifier, data=tuple(ROWS))).losses().mean())


def test_a_damping_that_leaves_no_inverse_names_the_block(place: Path, tmp_path: Path) -> None:
    # The last layer's gradients sum to zero over classes: its curvature has no inverse.
    outcome = job(place / "ekfac", tmp_path, damping="0", measure="none")
    assert outcome.code == 2 and "block 4" in outcome.err and "Traceback" not in outcome.err
    assert "--damping" in failure_in(outcome)["error"]["remedy"]


# What is left, where little is


def test_a_model_without_weights_and_one_that_keeps_none_are_pruned(tmp_path: Path) -> None:
    def empty() -> nn.Module:
        network = classifier()
        for name, parameter in network.named_parameters():
            if name.endswith("weight"):
                nn.init.zeros_(parameter)
        return network

    run = raycurv.fit(empty, ROWS, tmp_path / "empty", **FIT)
    assert run.prune(tmp_path / "revived", **HERE, revive=True).sparsity == 47 / 95
    found = run.prune(tmp_path / "a", **HERE)
    assert found.sparsity == 1.0
    assert all(r["update"] in ("ok", "zero") for r in found.blocks().to_pylist())
    made = load_file(Path(found.model) / "model.safetensors")
    assert not any(t.any() for k, t in made.items() if k.endswith("weight"))
    assert found.measured == found.predicted == 0.0
    for method in ("ekfac", "mfac"):
        run = raycurv.fit(
            classifier, ROWS, tmp_path / method, method=method, **FIT, **_rows(method)
        )
        for scope in ("global", "block"):
            found = run.prune(tmp_path / f"{method} {scope}", **HERE, sparsity=0.99, scope=scope)
            assert found.sparsity == pytest.approx(0.98, abs=0.02)
            assert math.isfinite(found.measured or math.nan)


def _rows(method: str) -> dict[str, Any]:
    return {"rows": 4} if method == "mfac" else {}


def test_a_job_says_of_which_blocks_nothing_is_left(place: Path, tmp_path: Path) -> None:
    outcome = job(place / "ekfac", tmp_path, sparsity=0.99, measure="none", saliency="magnitude")
    assert outcome.code == 0 and "nothing is left of 2 blocks" in outcome.err


def test_a_job_says_which_updates_have_not_converged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broad() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3))

    run = raycurv.fit(broad, arrays(9, (40,), "classes"), tmp_path / "run", **FIT)
    settings = {"address": "none", "measure": "none", "damping": "1e-3"}
    few = run.prune(tmp_path / "few", **settings, iterations=2)
    assert few.blocks()["update"].to_pylist() == ["not converged", "ok"]
    assert "the update of 1 blocks has not converged" in capsys.readouterr().err
    enough = run.prune(tmp_path / "enough", **settings)
    assert enough.blocks()["update"].to_pylist() == ["ok", "ok"]
    assert max(enough.blocks()["residual"].to_pylist()) <= 1e-4
    assert "converged" not in capsys.readouterr().err


@pytest.mark.parametrize("method", ["ekfac", "diagonal", "mfac"])
def test_blocks_that_no_loss_reaches_go_first_and_stay_where_they_are(
    method: str, tmp_path: Path
) -> None:
    run = raycurv.fit(dead, ROWS, tmp_path / "run", method=method, **FIT, **_rows(method))
    inverse = {"inverse": "block"} if method == "mfac" else {}
    found = run.prune(tmp_path / "out", **HERE, sparsity=0.5, measure="blocks", **inverse)
    rows = {row["block"]: row for row in found.blocks().to_pylist()}
    assert {n for n, r in rows.items() if r["update"] == "zero"} == {"silenced", "unused"}
    for name in ("silenced", "unused"):
        assert rows[name]["predicted"] == rows[name]["measured"] == 0.0
        assert rows[name]["saliency"] == 0.0
    assert rows["silenced"]["removed"] + rows["unused"]["removed"] == 54 == 0.5 * 108
    assert rows["first"]["removed"] == rows["last"]["removed"] == 0
    assert found.measured == found.predicted == 0.0


def test_a_model_of_one_block_is_pruned(tmp_path: Path) -> None:
    def one() -> nn.Module:
        return nn.Sequential(classifier()[0])

    for method in ("ekfac", "mfac"):
        run = raycurv.fit(one, ROWS, tmp_path / method, method=method, **FIT, **_rows(method))
        found = run.prune(tmp_path / f"{method}-out", **HERE, measure="blocks")
        (row,) = found.blocks().to_pylist()
        assert row["removed"] == 17 and row["measured"] == found.measured
        assert row["predicted"] == pytest.approx(found.predicted, rel=1e-12)


def test_a_pruning_is_opened_by_its_directory_alone(place: Path, tmp_path: Path) -> None:
    found = prune(place / "ekfac", tmp_path / "out", measure="none", blocks=("0", "2"))
    assert raycurv.open_pruned(tmp_path / "out").blocks().equals(found.blocks())
    with pytest.raises(UserError, match="block '4'"):
        found.saliency("4")
    with pytest.raises(UserError, match=r"prune\.py"):
        raycurv.open_pruned(place / "ekfac")


# On an object store


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with server() as one:
        one.system().create_dir("bucket")
        yield one


def test_a_pruning_lies_on_an_object_store_as_on_a_disk(
    s3: Server, place: Path, tmp_path: Path
) -> None:
    out, settings = s3.uri("bucket/pruned"), HERE | {"blocks": ("0", "4")}
    near = prune(place / "ekfac", tmp_path, **settings)
    with pytest.MonkeyPatch.context() as patch:
        failing(pruning, "write_checkpoint", patch, 1)
        with pytest.raises(MemoryError):
            prune(place / "ekfac", out, **settings)
    far = prune(place / "ekfac", out, **settings)
    store = far._store
    ours = {"model", "saliency", "tables", "run.json"}
    assert {n.split("/")[0] for n in store.names()} == ours
    assert (far.predicted, far.measured) == (near.predicted, near.measured)
    assert far.saliency()["keep"].equals(near.saliency()["keep"])
    reference = Path(near.model) / "model.safetensors"
    assert bytes(store.open("model/model.safetensors").read()) == reference.read_bytes()


# Memory

# Megabytes for a model of twice as many and more; a stage takes nine of them.
MEMORY = 24
CAPPED = """
import gc, resource, sys
import raycurv

folder, megabytes = sys.argv[1], float(sys.argv[2])
rows = [{"id": str(n), "input_ids": [(7 * n + t) % 50 for t in range(8)]} for n in range(4)]
# The kernel watches; a plan, which may be a fifth above what is used, need not agree.
how = {"quiet": True, "address": "none", "batch_tokens": 32, "force": True}
swept = how | {"schedule": "swept"}


def job(model):
    run = raycurv.fit(
        f"{folder}/{model}", rows, f"{folder}/{model}-run", blocks=("*k_proj", "*v_proj"),
        method="diagonal", fisher="empirical", **swept,
    )
    return run, run.prune(f"{folder}/{model}-pruned", sparsity=0.25, **swept)


def data_bytes():
    (line,) = [s for s in open("/proc/self/status") if s.startswith("VmData")]
    return int(line.split()[1]) * 1024


# An idle worker has its libraries loaded, and their kernels for a layer of this shape.
job("idle")
gc.collect()
gc.freeze()  # libraries, which every stage's end would look through
cap = data_bytes() + int(megabytes * 2**20)
resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
run, found = job("model")
print(found.sparsity, len(found.blocks()), found.measured > -1)
run.prune(f"{folder}/resident", **how)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 53 MiB beside one of a single layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    shape = {
        "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4,
        "num_key_value_heads": 1, "vocab_size": 64,
    }  # fmt: skip
    for name, layers in (("model", 6), ("idle", 1)):
        config = LlamaConfig(num_hidden_layers=layers, **shape)
        LlamaForCausalLM(config).save_pretrained(folder / name, max_shard_size="20MB")
    return folder


def test_a_model_of_more_than_the_memory_is_pruned_swept_and_only_so(
    large: Path, tmp_path: Path
) -> None:
    weights = sum(path.stat().st_size for path in (large / "model").glob("*.safetensors"))
    assert weights > 2 * MEMORY * 2**20
    for name in ("model", "idle"):
        (tmp_path / name).symlink_to(large / name)
    made = subprocess.run(
        [sys.executable, "-c", CAPPED, str(tmp_path), str(MEMORY)],
        env=dict(os.environ) | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert made.stdout == "0.25 12 True\n", made.stderr[-2000:]
    # With all stages resident it is not: what is measured does not fit, and the rest does.
    assert made.returncode != 0 and "memory" in made.stderr.lower()
    assert (tmp_path / "resident" / "model" / "config.json").exists()
    after = sum(p.stat().st_size for p in (tmp_path / "model-pruned/model").glob("*.safetensors"))
    assert after == weights
