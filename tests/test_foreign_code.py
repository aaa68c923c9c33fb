"""Claims about directories that come from somebody else: nothing in them is run, asked about,
imported or fetched, unless a flag of the caller's says so."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import (
    ROOT,
    Squares,
    classified,
    classifier,
    environment,
    failure_in,
    flags_of,
    rewritten,
    run_here,
    save_llama,
    texts,
    write_rows,
)
from torch import nn

import raycurv
from raycurv.data.tokenizer import LazyTokenizer
from raycurv.errors import UserError
from raycurv.models.hf import HFModel
from raycurv.models.opening import open_model, open_outline
from raycurv.named_objects import import_named

HERE: dict[str, Any] = {"address": "none", "quiet": True}


# Code of a model directory

CONFIGURATION = """
import pathlib
from transformers import LlamaConfig
(pathlib.Path({trace!r}) / "config").touch()
class OwnConfig(LlamaConfig):
    model_type = "own_for_this_test"
"""
MODELING = """
import pathlib
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
(pathlib.Path({trace!r}) / "model").touch()
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output
"""
TOKENIZATION = """
import pathlib
from transformers import PreTrainedTokenizerFast
(pathlib.Path({trace!r}) / "tokenizer").touch()
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


class Directory:
    """A model with code of its own, which leaves a trace where it runs."""

    def __init__(self, folder: Path) -> None:
        self.model, self.trace = save_llama(folder / "model", layers=2), folder / "trace"
        self.trace.mkdir()
        for name, text in (
            ("configuration_own", CONFIGURATION), ("modeling_own", MODELING),
            ("tokenization_own", TOKENIZATION),
        ):  # fmt: skip
            path = self.model / f"{name}.py"
            path.write_text(text.format(trace=str(self.trace)))

    @property
    def ran(self) -> set[str]:
        return {path.name for path in self.trace.iterdir()}

    def change(self, file: str, **values: Any) -> Directory:
        path = self.model / file
        said = json.loads(path.read_text()) | values
        path.write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
        return self

    def with_own_model(self) -> Directory:
        return self.change(
            "config.json",
            model_type="own_for_this_test",
            architectures=["OwnForCausalLM"],
            auto_map={
                "AutoConfig": "configuration_own.OwnConfig",
                "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
            },
        )

    def with_own_tokenizer(self) -> Directory:
        named = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
        return self.change("tokenizer_config.json", auto_map=named, tokenizer_class="OwnTokenizer")


@pytest.fixture
def directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> Iterator[Directory]:
    # Where transformers puts the code that it runs.
    cache = str(tmp_path / "cache")
    for module in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_MODULES_CACHE", cache, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    # Who asks is answered with yes.
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    yield Directory(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach a network fails, as no error that a library would expect."""

    def refuse(*args: Any, **options: Any) -> Any:
        pytest.fail(f"the network was asked for {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_code_of_a_model_runs_with_the_flag_alone(
    directory: Directory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.parquet", texts(4))
    plain = raycurv.evaluate(directory.model, data, tmp_path / "plain", **HERE)
    directory.with_own_model()
    flags = {"model": directory.model, "data": data, "address": "none"}
    for job, more in (("evaluate.py", {}), ("fit.py", {}), ("plan.py", {"data": None})):
        outcome = run_here(job, flags_of(flags | {"out": tmp_path / job} | more))
        assert outcome.code == 2, outcome.err
        error = failure_in(outcome)["error"]
        assert error["where"].endswith("config.json")
        assert "modeling_own.OwnForCausalLM" in error["got"]
        assert "--trust-remote-code" in error["remedy"]
        assert "trust_remote_code=True" not in outcome.err
    assert not directory.ran and not capfd.readouterr().out
    found = raycurv.evaluate(
        directory.model, data, tmp_path / "own", trust_remote_code=True, **HERE
    )
    assert directory.ran == {"config", "model"}
    assert found.loss != pytest.approx(plain.loss, rel=1e-3), "it is the directory's own forward"
    said = json.loads((tmp_path / "own" / "run.json").read_text())
    assert said["facts"]["trust_remote_code"] is True
    assert "code modeling_own.py" in said["fingerprints"]["model"]


def test_a_run_of_trusted_code_grants_no_trust(directory: Directory, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.parquet", texts(4))
    directory.with_own_model()
    trusted = {"trust_remote_code": True}
    raycurv.fit(directory.model, data, tmp_path / "run", **trusted, **HERE)
    for path in directory.trace.iterdir():
        path.unlink()
    run = raycurv.open(tmp_path / "run")
    for name in [n for n in sys.modules if n.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]
    out = tmp_path / "scores"
    with pytest.raises(UserError, match=r"code of its own.*--trust-remote-code"):
        run.influence(data, data, out, **HERE)
    # Neither does the flag trust a directory that only the run names.
    with pytest.raises(UserError, match=r"--trust-remote-code.*by --model"):
        run.influence(data, data, out, **trusted, **HERE)
    with pytest.raises(UserError, match=r"--trust-remote-code.*by --model"):
        run.prune(tmp_path / "pruned", **trusted, **HERE)
    assert not directory.ran
    again = {"model": directory.model} | trusted | HERE
    assert len(run.influence(data, data, out, **again).table()) == 16
    pruned = run.prune(tmp_path / "pruned", measure="none", **again)
    assert {p.name for p in Path(pruned.model).glob("*.py")} == {
        p.name for p in directory.model.glob("*.py")
    }
    loss = raycurv.evaluate(pruned.model, data, tmp_path / "loss", **trusted, **HERE).loss
    assert loss > 0
    # The code is part of what was fitted.
    path = directory.model / "modeling_own.py"
    path.write_text(path.read_text().replace("2 * ", "3 * "))
    with pytest.raises(UserError, match=r"code modeling_own\.py"):
        run.influence(data, data, tmp_path / "other", **again)


def test_a_model_of_trusted_code_is_opened_in_another_process(directory: Directory) -> None:
    """An actor is given bytes, and has not imported the directory's code."""
    ignored = ("nothing.of.that.name",)
    model = open_model(str(directory.with_own_model().model), None, True, ignored)
    packed = pickle.dumps(model)
    for name in [n for n in sys.modules if n.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]
    again = pickle.loads(packed)
    assert isinstance(again, HFModel) and again.trust_remote_code and again.ignored == ignored
    segment = again.build(range(2), torch.float32, torch.device("cpu"))
    assert type(segment.module).__name__ == "OwnForCausalLM"
    plain = pickle.loads(pickle.dumps(open_model(str(save_llama(directory.trace / "plain")))))
    assert not plain.trust_remote_code


def test_code_that_is_not_needed_is_told_and_does_not_run(directory: Directory) -> None:
    named = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    directory.change("config.json", auto_map=named)
    (notice,) = open_model(str(directory.model)).notices
    assert "modeling_own.OwnForCausalLM" in notice and not directory.ran
    trusted = open_model(str(directory.model), trust_remote_code=True)
    assert not trusted.notices and "model" in directory.ran


def test_code_of_a_tokenizer_runs_with_the_flag_alone(
    directory: Directory, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = LazyTokenizer(directory.model).encode(["abc"], special=True)
    directory.with_own_tokenizer()
    try:
        found = LazyTokenizer(directory.model).encode(["abc"], special=True)
    except UserError as error:
        assert "tokenization_own.OwnTokenizer" in error.got
        assert "--trust-remote-code" in error.remedy
    else:
        assert found == expected
    assert not directory.ran and not capfd.readouterr().out
    assert LazyTokenizer(directory.model, True).encode(["abc"], special=True) == expected
    assert directory.ran == {"tokenizer"}


def test_nothing_is_fetched_because_a_file_names_it(directory: Directory) -> None:
    """Kernels, code and a base model of the hub; a tokenizer that is elsewhere."""
    expected = open_model(str(directory.model)).fingerprint()
    for named in ({"attn_implementation": "org/kernel"}, {"_attn_implementation": "org/kernel:f"}):
        directory.change("config.json", **named)
        model = open_model(str(directory.model))
        assert model.fingerprint() == expected
        held = model.build(range(2), torch.float32, torch.device("cpu")).module
        assert held.config._attn_implementation in ("eager", "sdpa")
    directory.change("config.json", attn_implementation=None, _attn_implementation=None)
    adapter = {"base_model_name_or_path": "org/base", "peft_type": "LORA"}
    (directory.model / "adapter_config.json").write_text(json.dumps(adapter))
    (directory.model / "generation_config.json").write_text('{"custom_generate": "org/code"}')
    directory.change("config.json", name_or_path="org/else", _name_or_path="org/else")
    assert open_model(str(directory.model)).fingerprint() == expected
    directory.change("tokenizer_config.json", name_or_path="org/else")
    assert LazyTokenizer(directory.model).encode(["a"], special=False)
    directory.with_own_model().change(
        "config.json", auto_map={"AutoConfig": "org/code--configuration_own.OwnConfig"}
    )
    for trusted in (False, True):
        with pytest.raises(UserError):
            open_outline(str(directory.model), trusted)
    assert not directory.ran


def test_pickles_are_never_loaded(directory: Directory) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (directory.trace / "pickle").touch, ()

    weights = directory.model / "model.safetensors"
    torch.save({"lm_head.weight": Trap()}, directory.model / "pytorch_model.bin")
    assert open_model(str(directory.model)).units == 2
    weights.unlink()
    with pytest.raises(UserError, match="safetensors"):
        open_model(str(directory.model))
    assert not directory.ran


# What a run directory names


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trace of a module in the working directory, which is left where it is imported."""
    (tmp_path / "here").mkdir()
    trace = tmp_path / "trace"
    text = f"import pathlib\npathlib.Path({str(trace)!r}).touch()\ndef run(): return None\n"
    (tmp_path / "here" / "laid_by_a_stranger.py").write_text(text)
    monkeypatch.chdir(tmp_path / "here")
    return trace


def changed(run: Path, folder: Path, **values: str) -> Path:
    """A copy of a run of which ``facts.model`` or ``settings.objective`` is another."""
    shutil.copytree(run, folder)
    with rewritten(folder) as said:
        said["facts"] |= {k: v for k, v in values.items() if k == "model"}
        said["settings"] |= {k: v for k, v in values.items() if k == "objective"}
    return folder


ROWS = classified(6)
FIT: dict[str, Any] = {"objective": "classification"} | HERE


def test_a_run_directory_names_nothing_that_is_imported(trap: Path, tmp_path: Path) -> None:
    raycurv.fit("commands:classifier", ROWS, tmp_path / "run", **FIT)
    name = "laid_by_a_stranger:run"
    for number, values in enumerate(({"model": name}, {"objective": name})):
        folder = changed(tmp_path / "run", tmp_path / f"changed-{number}", **values)
        given = HERE if "model" in values else HERE | {"model": "commands:classifier"}
        run = raycurv.open(folder)
        with pytest.raises(UserError, match="names nothing that is imported"):
            run.influence(ROWS, ROWS, tmp_path / "out", **given)
        with pytest.raises(UserError, match="names nothing that is imported"):
            run.prune(tmp_path / "out", **given)
        with pytest.raises(UserError, match="names nothing that is imported"):
            run.extend(ROWS, tmp_path / "out", **HERE)
    assert not trap.exists()
    import_named(name)
    assert trap.exists(), "the trap works"


def test_what_is_from_python_is_given_again_by_flags_that_the_mistake_names(
    tmp_path: Path,
) -> None:
    data = write_rows(tmp_path / "rows.parquet", ROWS)
    flags = {
        "model": "commands:classifier", "objective": "commands:Squares", "data": data,
        "out": tmp_path / "run", "address": "none",
    }  # fmt: skip
    assert run_here("fit.py", flags_of(flags)).code == 0
    for job, objective in (("influence.py", "fit_objective"), ("prune.py", "objective")):
        more = {"queries": data, "train": data} if job == "influence.py" else {"measure": "none"}
        flags = {"run": tmp_path / "run", "out": tmp_path / job, "address": "none"} | more
        for name, value in (("model", "commands:classifier"), (objective, "commands:Squares")):
            outcome = run_here(job, flags_of(flags))
            assert outcome.code == 2, outcome.err
            flag = f"--{name.replace('_', '-')} {value}"
            assert flag in failure_in(outcome)["error"]["remedy"], outcome.err
            flags[name] = "commands:dead" if name == "model" else "commands:Raising"
            outcome = run_here(job, flags_of(flags))
            assert outcome.code == 2 and f"Give {flag}" in outcome.err
            flags[name] = value
        outcome = run_here(job, flags_of(flags))
        assert outcome.code == 0, outcome.err


def test_python_gives_again_what_it_holds(tmp_path: Path) -> None:
    fitted = raycurv.fit(classifier, ROWS, tmp_path / "run", **FIT | {"objective": Squares()})
    own = {"model": classifier, "objective": Squares()}
    scores = fitted.influence(ROWS, ROWS, tmp_path / "first", **HERE).table()
    opened = raycurv.open(tmp_path / "run", **own)
    assert opened.influence(ROWS, ROWS, tmp_path / "second", **HERE).table().equals(scores)
    bare = raycurv.open(tmp_path / "run")
    with pytest.raises(UserError, match=r"give it again as model="):
        bare.influence(ROWS, ROWS, tmp_path / "third", **HERE)
    again = {"model": classifier, "fit_objective": Squares()}
    assert bare.influence(ROWS, ROWS, tmp_path / "third", **again, **HERE).table().equals(scores)
    assert bare.prune(tmp_path / "pruned", measure="none", **own, **HERE).sparsity > 0
    with pytest.raises(UserError, match="other tensors"):
        raycurv.open(tmp_path / "run", model=lambda: nn.Linear(5, 3)).influence(
            ROWS, ROWS, tmp_path / "fourth", fit_objective=Squares(), **HERE
        )


def test_a_directory_that_has_moved_is_given_again(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.parquet", texts(4))
    model = save_llama(tmp_path / "model")
    raycurv.fit(model, data, tmp_path / "run", **HERE)
    model.rename(tmp_path / "moved")
    run = raycurv.open(tmp_path / "run")
    with pytest.raises(UserError, match=r"no such directory.*--model"):
        run.influence(data, data, tmp_path / "out", **HERE)
    found = run.influence(data, data, tmp_path / "out", model=tmp_path / "moved", **HERE)
    assert len(found.table()) == 16


# Where an import looks


def test_the_working_directory_is_searched_for_what_a_flag_names_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a module and its siblings; not for a library that asks for one of these names."""
    for name, text in {
        "named_for_this_test": "import sibling_for_this_test\ndef late():\n    import late_sibling"
        "\n    return late_sibling\nclass Deep:\n    value = 3\n",
        "sibling_for_this_test": "",
        "late_sibling": "",
        "optional_library": "raise AssertionError('taken for a library')",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "elsewhere").mkdir()
    library = "try:\n    import optional_library\nexcept ImportError:\n    found = False\n"
    (tmp_path / "elsewhere" / "library_for_this_test.py").write_text(library)
    (tmp_path / "uses_a_library.py").write_text("import library_for_this_test as library\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p] + [str(tmp_path / "elsewhere")])
    before = list(sys.path)
    assert import_named("named_for_this_test:Deep.value") == 3
    assert import_named("named_for_this_test:late")().__name__ == "late_sibling"
    assert import_named("uses_a_library:library.found") is False
    assert sys.path == before
    for name in ("optional_library", "late_sibling_two"):
        with pytest.raises(ModuleNotFoundError):
            __import__(name)
    with pytest.raises(AssertionError, match="taken for a library"):
        import_named("optional_library:anything")


@pytest.mark.parametrize("how", ["-m raycurv", "-u -X utf8 -mraycurv", "script"])
def test_a_command_does_not_take_files_of_the_working_directory_for_libraries(
    how: str, tmp_path: Path
) -> None:
    for name in ("typing", "torch", "tyro", "json", "evaluate"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} of the working directory')")
    script = [str(ROOT / "jobs" / "timeline.py"), "--run", "/nowhere"]
    command = script if how == "script" else [*how.split(), "--version"]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, text=True, capture_output=True,
        env=environment(PYTHONPATH=str(ROOT)),
    )  # fmt: skip
    assert "of the working directory" not in done.stderr
    assert done.returncode == (2 if how == "script" else 0), done.stderr
    # Another program finds what lies beside it, also one that imports raycurv at its beginning.
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text("import raycurv")
    (tmp_path / "own" / "__main__.py").write_text("import torch")
    control = subprocess.run(
        [sys.executable, "-m", "own"], cwd=tmp_path, text=True, capture_output=True,
        env=environment(PYTHONPATH=str(ROOT)),
    )  # fmt: skip
    assert "of the working directory" in control.stderr
