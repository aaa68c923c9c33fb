"""Claims about mistakes: each gets one message that names what is wrong, and exit code 2."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
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
    run,
    run_here,
    save_llama,
    snapshot,
    texts,
    write_rows,
)
from safetensors.torch import load_file, save_file

import raycurv
from raycurv import UserError
from raycurv.files.store import open_store

torch.set_num_threads(1)


@dataclass(frozen=True)
class Place:
    """A folder of one case, and what all cases share: models, data and a finished fit."""

    folder: Path
    shared: Path

    @property
    def model(self) -> Path:
        """A copy of the checkpoint, to be spoilt."""
        copy = self.folder / "model"
        if not copy.exists():
            shutil.copytree(self.shared / "llama", copy)
        return copy

    def weights(self, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        """The checkpoint with changed weights."""
        file = self.model / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
        return self.model

    def config(self, **changes: Any) -> Path:
        """The checkpoint with other values in its configuration."""
        file = self.model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return self.model

    def rows(self, *rows: dict[str, Any]) -> Path:
        return write_rows(self.folder / "data.parquet", rows)

    def copy(self, name: str) -> Path:
        """A copy of the finished fit or of its scores, under the name of this case."""
        return Path(shutil.copytree(self.shared / name, self.folder / name))


Settings = dict[str, Any]


@dataclass(frozen=True)
class Mistake:
    """What is done wrongly, and what the message must say.

    Attributes:
        settings: on top of those that work; ``None`` takes one away.
        says: pieces of the message.
        environment: of the job.
    """

    settings: Callable[[Place], Settings]
    says: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def mistake(*says: str, **settings: Any) -> Mistake:
    """One that flags alone make."""
    return Mistake(lambda place: settings, says)


def data(*rows: dict[str, Any], says: tuple[str, ...], **more: Any) -> Mistake:
    """One in the data."""
    return Mistake(lambda place: {"data": place.rows(*rows), **more}, says)


def classes(*rows: dict[str, Any], says: tuple[str, ...], **more: Any) -> Mistake:
    """One in the data of a classifier."""
    own = {"model": "commands:classifier", "objective": "classification"} | more
    return data(*rows, says=says, **own)


def weights(change: Callable[[dict[str, torch.Tensor]], None], *says: str) -> Mistake:
    return Mistake(lambda place: {"model": place.weights(change)}, says)


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")


def _huge(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"][7] = 3e38
    tensors["model.norm.weight"] *= 1e6


def _incomplete(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.down_proj.weight"]


def _shorter(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name][:-1].clone()


def _empty_folder(place: Place) -> Settings:
    (place.folder / "empty").mkdir()
    return {"model": place.folder / "empty"}


def _not_parquet(place: Place) -> Settings:
    path = place.folder / "fake.parquet"
    path.write_text('{"text": "no Parquet at all"}\n' * 9)
    return {"data": path}


def _not_jsonl(place: Place) -> Settings:
    path = place.folder / "list.jsonl"
    path.write_text('[{"text": "one"}, {"text": "two"}]\n')
    return {"data": path}


def _empty_data(place: Place) -> Settings:
    path = place.folder / "empty.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    return {"data": path}


def _tied(place: Place) -> Settings:
    model = save_llama(place.folder / "tied", tie_word_embeddings=True)
    return {"model": model, "blocks": ["lm_head"]}


def _without_tokenizer(place: Place) -> Settings:
    return {"model": save_llama(place.folder / "mute", tokenizer=False)}


def _other_settings(place: Place) -> Settings:
    return {
        "out": place.copy("run"),
        "seed": 7,
        "method": "kfac",
        "draws": 2,
        "max_length": 31,
        "blocks": ["*mlp*"],
    }


def _other_model(place: Place) -> Settings:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] += 1

    return {"out": place.copy("run"), "model": place.weights(change)}


def _other_config(place: Place) -> Settings:
    model = place.config(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    return {"out": place.copy("run"), "model": model}


def _other_data(place: Place) -> Settings:
    return {"out": place.copy("run"), "data": place.rows(*texts(5, seed=9))}


def _foreign_folder(place: Place) -> Settings:
    folder = place.folder / "project"
    write_rows(folder / "data" / "mine.parquet", texts(4))
    return {"out": folder, "data": folder / "data"}


def _a_file_for_out(place: Place) -> Settings:
    path = place.folder / "file"
    path.write_text("already here")
    return {"out": path}


IDS = {"input_ids": [1, 2, 3]}
FIT: dict[str, Mistake] = {
    "no flags": mistake("--out", "a value", out=None, model=None, data=None),
    "no model": mistake("--model", "a value", model=None),
    "no such model": mistake("nowhere", "no such directory", model="nowhere"),
    "an empty model directory": Mistake(_empty_folder, ("empty", "config.json")),
    "no such factory": mistake("commands:nobody", "AttributeError", model="commands:nobody"),
    "a factory that fails": mistake("classified", "without arguments", model="commands:classified"),
    "a missing tensor": weights(
        _incomplete,
        "model.layers.1.mlp.down_proj.weight",
        "1 missing",
    ),
    "a misshapen tensor": weights(
        _shorter, "self_attn.q_proj.weight", "shape [16, 16]", "[15, 16]"
    ),
    "NaN in the weights": weights(_nan, "model.layers.1.mlp.up_proj.weight", "finite weights"),
    "a loss that overflows": weights(_huge, "example 'text", "a finite loss"),
    "a loss of an objective of one's own": classes(
        {"id": "fine", "inputs": [1.0] * 5, "labels": 0},
        {"id": "bad one", "inputs": [2.0] * 5, "labels": 1},
        says=("example 'bad one'", "a finite loss", "inf"),
        objective="commands:NotFinite",
    ),
    "no such data": mistake("missing.parquet", "nothing of that name", data="missing.parquet"),
    "a file that is no Parquet": Mistake(_not_parquet, ("fake.parquet", "a Parquet file")),
    "a file that is no JSONL": Mistake(_not_jsonl, ("list.jsonl, line 1", "one JSON object")),
    "no usable column": data(
        {"words": "some"}, says=("a column `input_ids`", "the columns `words`")
    ),
    "numbers for a model of tokens": data({"inputs": [1.0]}, says=("for a model of tokens",)),
    "tokens for a model of numbers": classes(IDS, says=("for a model of numbers",)),
    "empty data": Mistake(_empty_data, ("empty.parquet", "at least one example")),
    "ids beyond the vocabulary": data(
        {"id": "far", "input_ids": [1, 258]},
        says=("example 'far'", "from 0 to 257", "258 at position 1"),
    ),
    "negative token ids": data({"input_ids": [1, -2]}, says=("from 0 to 257", "-2 at position 1")),
    "ids twice": data(
        {"id": "same", "text": "one"},
        {"id": "same", "text": "two"},
        says=("example 'same'", "row 0", "row 1"),
    ),
    "an empty text": data(
        {"id": "full", "text": "some"},
        {"id": "void", "text": ""},
        says=("example 'void'", "at least one token"),
    ),
    "no example with a loss term": data(
        {"input_ids": [5]}, {"input_ids": [6]}, says=("a loss term", "2 examples without any")
    ),
    "nothing but prompts": data(
        {"input_ids": [1, 2], "loss_mask": [True, False]}, says=("a loss term",)
    ),
    "longer than the positions": data(
        {"id": "long", "input_ids": [1] * 33},
        says=("example 'long'", "at most 32 tokens (the model's positions)", "33", "--long"),
    ),
    "longer than --max-length": data(
        {"id": "long", "input_ids": [1] * 9},
        says=("at most 8 tokens (--max-length)", "the model takes 32"),
        max_length=8,
    ),
    "a null": data({"text": "some"}, {"text": None}, says=("row 1", "null")),
    "text without a tokenizer": Mistake(_without_tokenizer, ("a tokenizer", "`text`")),
    "NaN in the inputs": classes(
        *classified(2),
        {"id": "gap", "inputs": [1.0, float("nan"), 0.0, 0.0, 0.0], "labels": 1},
        says=("example 'gap'", "finite numbers in `inputs`"),
    ),
    "inputs of several shapes": classes(
        {"inputs": [1.0] * 5, "labels": 0},
        {"inputs": [1.0] * 4, "labels": 0},
        says=("`inputs` of one shape", "row 1"),
    ),
    "no labels for the empirical Fisher": classes(
        {"id": "bare", "inputs": [1.0] * 5},
        says=("example 'bare'", "a label"),
        fisher="empirical",
    ),
    "a class that the model has not": classes(
        {"id": "third", "inputs": [1.0] * 5, "labels": 3},
        says=("example 'third'", "from 0 to 2", "label 3"),
    ),
    "regression on labels of another shape": classes(
        {"inputs": [1.0] * 5, "labels": [1.0, 2.0]},
        says=("regression", "(1, 3)", "(1, 2)"),
        objective="regression",
    ),
    "causal-lm of numbers": classes(*classified(2), says=("a token axis",), objective="causal-lm"),
    "no such objective": mistake(
        "--objective", "causal-lm", "'perplexity'", objective="perplexity"
    ),
    "an objective that cannot be imported": mistake("nomodule", objective="nomodule:Name"),
    "an objective without methods": mistake("no loss", objective="commands:dead"),
    "an objective without a module": mistake(":Name", "or package.module:Name", objective=":Name"),
    "blocks that match nothing": mistake(
        "--blocks '*gates*'", "no match", "q_proj", blocks=["*gates*"]
    ),
    "an exclusion that matches nothing": mistake("--blocks '*heads*'", blocks=["!*heads*"]),
    "no block left": mistake("at least one linear", blocks=["!*"]),
    "a block on a tied head": Mistake(_tied, ("block lm_head", "tied")),
    "more stages than layers": mistake("--stages", "at most 2", "3", stages=3),
    "no stage": mistake("--stages", "at least 1", stages=0),
    "no tokens in a batch": mistake("--batch-tokens", batch_tokens=0),
    "a length of nothing": mistake("--max-length", "at least 1", max_length=0),
    "a factor of nothing": mistake("--max-factor-dim", "from 8 to", max_factor_dim=0),
    "tiles too narrow": mistake("--max-factor-dim", "from 8 to", "got 7", max_factor_dim=7),
    "tiles wider than LAPACK decomposes": mistake(
        "--max-factor-dim", "to 32766", "32767", max_factor_dim=32_767
    ),
    "an axis wider than LAPACK decomposes": mistake(
        "block 0",
        "an input axis of at most 32,766",
        "got 32,769",
        "--max-factor-dim",
        "'!0'",
        model="commands:wide",
        objective="classification",
    ),
    "a sample of nothing": mistake("--max-examples", max_examples=0),
    "no draws": mistake("--draws", draws=0),
    "several draws of the data's own labels": mistake(
        "--draws", "--fisher sampled", draws=2, fisher="empirical"
    ),
    "commits that never come": mistake("--commit-seconds", commit_seconds="nan"),
    "a relative --out in a submitted job": Mistake(
        lambda place: {"out": "results"},
        ("--out", "an absolute path or a URI", "submitted job"),
        # What Ray's job supervisor sets for every entry point.
        {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"},
    ),
    "an unknown kind of URI": mistake("elsewhere://x", out="elsewhere://x"),
    "a file as --out": Mistake(_a_file_for_out, ("--out", "can be written")),
    "a directory of somebody else": Mistake(_foreign_folder, ("holds data", "no run.json")),
    "another run": Mistake(
        _other_settings,
        (
            "--seed was 0 and is now 7",
            "--method was 'ekfac' and is now 'kfac'",
            "--draws was 1 and is now 2",
            "--max-length was None and is now 31",
            "--blocks was [] and is now ['*mlp*']",
        ),
    ),
    "another model": Mistake(_other_model, ("the model is another one", "layers.0.mlp.up_proj")),
    "another configuration": Mistake(
        _other_config, ("configuration is another one (rope_parameters.rope_theta was 10000.0 and",)
    ),
    "other data": Mistake(_other_data, ("the data is another one",)),
    "scores as --out": Mistake(lambda place: {"out": place.copy("scores")}, ("job influence",)),
    "an address without a port": mistake("HOST:PORT", "'somewhere'", address="somewhere"),
    "an address with a password": mistake("HOST:PORT", "got 'h:1'", address="me:secret@h:1"),
}


def _unfinished(place: Place) -> Settings:
    copy = place.copy("run")
    with rewritten(copy) as said:
        said["complete"] = ["layout", "factors"]
    return {"run": copy}


def _changed_checkpoint(place: Place) -> Settings:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] += 1

    copy = place.copy("run")
    with rewritten(copy) as said:
        said["facts"]["model"] = str(place.weights(change))
    return {"run": copy}


def _changed_config(place: Place) -> Settings:
    return {"model": place.config(rms_norm_eps=1e-3, hidden_act="relu", use_cache=False)}


def _lost_basis(place: Place) -> Settings:
    copy = place.copy("run")
    next(iter(sorted((copy / "eigen").iterdir()))).unlink()
    return {"run": copy}


INFLUENCE: dict[str, Mistake] = {
    "no run": mistake("--run", "a value", run=None),
    "no such run": mistake("nothing-here", "fit.py", "no run.json", run="/nothing-here"),
    "a run that is not finished": Mistake(_unfinished, ("a finished fit", "layout, factors")),
    "scores as --run": Mistake(
        lambda place: {"run": place.copy("scores")}, ("results of influence",)
    ),
    "a changed checkpoint": Mistake(
        _changed_checkpoint, ("fitted on", "1 other tensors", "layers.1.self_attn.v_proj")
    ),
    "a changed configuration": Mistake(
        _changed_config,
        ("hidden_act was 'silu' and is now 'relu'; rms_norm_eps was 1e-06 and is now 0.001. R",),
    ),
    "nothing to do": mistake("--train", "--ihvp", train=None),
    "no queries": mistake("--queries", "a value", queries=None),
    "self-influence alone": Mistake(
        lambda place: {"queries": None, "self": True},
        ("--queries", "a file of one example"),
    ),
    "no such queries": mistake("missing.parquet", queries="missing.parquet"),
    "a negative damping": mistake("--damping", "'-1'", damping="-1"),
    "a damping that is no number": mistake("--damping", "'much'", damping="much"),
    "a damping of nan": mistake("--damping", damping="nan"),
    "an absolute damping of nothing": mistake("--damping", damping="abs:"),
    "a rank of zero": mistake("--rank", "full", rank="0"),
    "a rank that is no number": mistake("--rank", "'most'", rank="most"),
    "a memory without a number": mistake("--query-memory", "'GiB'", query_memory="GiB"),
    "a memory of nothing": mistake("--query-memory", query_memory="0"),
    "a memory without end": mistake("--query-memory", query_memory="inf"),
    "a k of zero": mistake("--top-k", top_k=0),
    "the directory of the fit": Mistake(lambda place: {"out": place.copy("run")}, ("job fit",)),
    "other scores": Mistake(
        lambda place: {"out": place.copy("scores"), "rank": "3", "per_block": True},
        ("--rank was 'full' and is now '3'", "--per-block was False and is now True"),
    ),
    "other training examples": Mistake(
        lambda place: {"out": place.copy("scores"), "train": place.rows(*texts(3, seed=4))},
        ("the train is another one",),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    save_llama(folder / "llama")
    write_rows(folder / "texts.parquet", texts(8))
    run = raycurv.fit(
        folder / "llama", folder / "texts.parquet", folder / "run", address="none",
        batch_tokens=64, quiet=True,
    )  # fmt: skip
    run.influence(
        folder / "texts.parquet", folder / "texts.parquet", folder / "scores",
        address="none", rank="full", quiet=True,
    )  # fmt: skip
    return folder


@pytest.fixture
def place(tmp_path: Path, shared: Path) -> Place:
    return Place(tmp_path, shared)


def fit_flags(place: Place, settings: Settings) -> list[str]:
    base = {
        "model": place.shared / "llama",
        "data": place.shared / "texts.parquet",
        "out": place.folder / "out",
        "address": "none",
        "batch_tokens": 64,
    }
    return flags_of(base | settings)


def influence_flags(place: Place, settings: Settings) -> list[str]:
    base = {
        "run": place.shared / "run",
        "queries": place.shared / "texts.parquet",
        "train": place.shared / "texts.parquet",
        "out": place.folder / "out",
        "address": "none",
        "rank": "full",
    }
    return flags_of(base | settings)


def check(outcome: Outcome, says: tuple[str, ...]) -> None:
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    message = outcome.err.strip().splitlines()[-1]
    said = failure_in(outcome)
    assert message.endswith(said["message"]) and said["error"]["kind"] == "UserError"
    assert all(said["error"][part] in message for part in ("where", "expected", "got", "remedy"))
    assert message.count(": expected ") == 1 and ", got " in message
    for piece in says:
        assert piece in message


@pytest.mark.parametrize("name", FIT)
def test_a_mistake_in_a_fit_is_named_and_ends_with_2(
    name: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = FIT[name]
    for key, value in case.environment.items():
        monkeypatch.setenv(key, value)
    check(run_here("fit.py", fit_flags(place, case.settings(place))), case.says)


@pytest.mark.parametrize("name", INFLUENCE)
def test_a_mistake_in_scoring_is_named_and_ends_with_2(name: str, place: Place) -> None:
    case = INFLUENCE[name]
    check(run_here("influence.py", influence_flags(place, dict(case.settings(place)))), case.says)


def test_the_settings_that_the_mistakes_start_from_are_none(place: Place) -> None:
    assert run_here("fit.py", fit_flags(place, {})).code == 0
    assert (
        run_here(
            "influence.py",
            influence_flags(place, {"run": place.folder / "out", "out": place.folder / "s"}),
        ).code
        == 0
    )


# One that raycurv finds and one of the command line: all others end in the same two ways.
SUBPROCESSES: dict[str, Callable[[Place], tuple[Settings, str]]] = {
    "NaN weights": lambda place: ({"model": place.weights(_nan)}, "finite weights"),
    "an unknown flag": lambda place: ({"layers": 3}, "--layers"),
}


@pytest.mark.parametrize("name", SUBPROCESSES)
def test_a_mistake_in_a_process_of_its_own_ends_with_2_without_a_traceback(
    name: str, place: Place
) -> None:
    settings, says = SUBPROCESSES[name](place)
    outcome = run("fit.py", fit_flags(place, settings))
    assert outcome.code == 2 and failure_in(outcome)["error"]["kind"] == "UserError"
    assert says in outcome.err and "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("job", "flags", "says"),
    [
        ("fit.py", ["--layers", "3"], "--layers"),
        ("fit.py", ["--method", "full"], "ekfac"),
        ("fit.py", ["--stages", "two"], "two"),
        ("fit.py", ["--stages"], "--stages"),
        ("fit.py", ["somewhere"], "somewhere"),
        ("influence.py", ["--dtype", "float16"], "bfloat16"),
        ("influence.py", ["--long", "drop"], "truncate"),
    ],
)
def test_a_flag_that_cannot_be_read_ends_with_2(job: str, flags: list[str], says: str) -> None:
    outcome = run_here(job, flags)
    assert outcome.code == 2 and says in failure_in(outcome)["error"]["got"]
    assert says in outcome.err and "Traceback" not in outcome.err


def test_a_dead_address_fails_within_seconds(place: Place) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    begun = time.monotonic()
    outcome = run_here("fit.py", fit_flags(place, {"address": address}))
    check(outcome, (f"--address {address}", "a Ray cluster that answers"))
    assert time.monotonic() - begun < 10


def test_a_dead_address_from_the_environment_is_named(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    check(run_here("fit.py", fit_flags(place, {"address": None})), ("127.0.0.1:1",))


def test_a_relative_out_is_fine_outside_a_submitted_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("results", "--out").root == str(tmp_path / "results")


def test_ray_sets_the_variable_that_tells_a_submitted_job() -> None:
    supervisor = pytest.importorskip("ray.dashboard.modules.job.job_supervisor")
    assert supervisor.RAY_JOB_CONFIG_JSON_ENV_VAR == "RAY_JOB_CONFIG_JSON_ENV_VAR"


def test_a_refused_directory_is_left_as_it_was(place: Place) -> None:
    for settings in (_foreign_folder(place), _other_settings(place)):
        before = snapshot(settings["out"])
        check(run_here("fit.py", fit_flags(place, settings)), ("--out",))
        assert snapshot(settings["out"]) == before


CORRECTED = {
    "data": lambda place: {"data": place.rows({"input_ids": [1, 999]})},
    "weights": lambda place: {"model": place.weights(_nan)},
    "a loss": lambda place: {"model": place.weights(_huge)},
}


@pytest.mark.parametrize("what", CORRECTED)
def test_once_a_mistake_is_corrected_the_same_directory_may_be_used(
    what: str, place: Place
) -> None:
    check(run_here("fit.py", fit_flags(place, CORRECTED[what](place))), ())
    assert run_here("fit.py", fit_flags(place, {})).code == 0
    run = raycurv.open(place.folder / "out")
    assert run.examples()["id"].to_pylist() == [f"text {n}" for n in range(8)]
    assert run.blocks().drop(["eigh_seconds"]) == raycurv.open(place.shared / "run").blocks().drop(
        ["eigh_seconds"]
    )


def test_a_block_without_any_gradient_is_an_outcome_and_not_nan(tmp_path: Path) -> None:
    rows = classified(12)
    run = raycurv.fit(
        dead, rows, tmp_path / "run", objective="classification", address="none", quiet=True
    )
    blocks = {row["block"]: row for row in run.blocks().to_pylist()}
    for name in ("silenced", "unused"):
        assert "zero" in blocks[name]["eigh_outcome"].split("+")
        assert (blocks[name]["trace"], blocks[name]["mean_eigenvalue"]) == (0.0, 0.0)
    for name in ("first", "last"):
        assert "zero" not in blocks[name]["eigh_outcome"].split("+")
        assert blocks[name]["trace"] > 0
    scores = run.influence(
        rows[:3], rows, tmp_path / "scores", per_block=True, address="none", quiet=True
    )
    names = json.loads(
        pq.read_schema(next((tmp_path / "scores" / "scores").iterdir())).metadata[b"raycurv.blocks"]
    )
    by_block = torch.tensor(scores.table()["block_scores"].to_pylist())
    assert torch.isfinite(by_block).all()
    for place, name in enumerate(names):
        assert by_block[:, place].any().item() == (name in ("first", "last"))


# Through Python


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "full"}, "--method"),
        ({"fisher": "true"}, "--fisher"),
        ({"stages": "2"}, "--stages"),
        ({"stages": 6}, "at most 5"),
        ({"blocks": "2"}, "--blocks"),
        ({"dtype": "float16"}, "--dtype"),
        ({"address": "nowhere"}, "--address"),
        ({"max_examples": 0}, "--max-examples"),
        ({"objective": object()}, "the methods loss and sample"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_through_python_raise_user_error(
    settings: Settings, says: str, tmp_path: Path
) -> None:
    chosen = {"objective": "classification", "address": "none"} | settings
    with pytest.raises(UserError, match=says):
        raycurv.fit(classifier, classified(6), tmp_path / "run", quiet=True, **chosen)


def test_a_network_instead_of_its_factory_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the network"):
        raycurv.fit(classifier(), classified(6), tmp_path / "run", address="none")


def test_data_of_no_kind_is_a_mistake(tmp_path: Path) -> None:
    for rows, says in ((17, "a path, a glob"), ([3], "a dict"), ([], "at least one example")):
        with pytest.raises(UserError, match=says):
            raycurv.fit(
                classifier, rows, tmp_path / "run", objective="classification", address="none",
                quiet=True,
            )  # fmt: skip


def test_a_run_made_in_memory_says_how_to_get_its_model_back(tmp_path: Path) -> None:
    rows = classified(6)
    raycurv.fit(
        classifier, rows, tmp_path / "run", objective="classification", address="none", quiet=True
    )
    with pytest.raises(UserError, match=r"give it again as model=, or call raycurv\.fit"):
        raycurv.open(tmp_path / "run").influence(rows, rows, tmp_path / "scores", address="none")


def test_no_damping_of_a_block_with_a_zero_in_its_eigenvalues_is_a_mistake(tmp_path: Path) -> None:
    rows = [row | {"inputs": [0.0, *row["inputs"][1:]]} for row in classified(9)]
    run = raycurv.fit(
        classifier, rows, tmp_path / "run", objective="classification", method="diagonal",
        address="none", quiet=True,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"block 0: .*damping"):
        run.influence(rows, rows, tmp_path / "none", damping=0, address="none", quiet=True)
    scores = run.influence(rows, rows, tmp_path / "some", damping=1e-6, address="none", quiet=True)
    assert torch.isfinite(torch.from_numpy(scores.matrix()[0])).all()


def test_names_that_are_not_there_are_mistakes(shared: Path) -> None:
    with pytest.raises(UserError, match="no such name"):
        raycurv.open(shared / "run").curvature("model.layers.9.mlp.up_proj")
    scores = raycurv.open_scores(shared / "scores")
    with pytest.raises(UserError, match="no such id"):
        scores.top("nobody")
    with pytest.raises(UserError, match=r"finished scores"):
        raycurv.open_scores(shared / "run")
    with pytest.raises(UserError, match=r"fit\.py"):
        raycurv.open(shared / "scores")


def test_scores_of_the_extremes_make_no_matrix(shared: Path, tmp_path: Path) -> None:
    scores = raycurv.open(shared / "run").influence(
        texts(2), texts(8), tmp_path / "top", top_k=1, address="none", quiet=True
    )
    with pytest.raises(UserError, match="without --top-k"):
        scores.matrix()


def test_a_fit_that_lost_a_basis_is_named_with_the_remedy(place: Place) -> None:
    outcome = run_here("influence.py", influence_flags(place, _lost_basis(place)))
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert "Run the fit again" in outcome.err and "eigen/" in outcome.err
