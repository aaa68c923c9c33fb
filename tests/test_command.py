"""Claims about the one command, and about what importing the package costs."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT, Outcome, environment, run_here

import raycurv
from raycurv import __main__ as command
from raycurv.driver.settings import Execution, Reading, identity
from raycurv.jobs.inputs import settings_and_inputs
from raycurv.jobs.registry import JOBS


def raycurv_here(*words: str) -> Outcome:
    """`raycurv WORDS…` in this process."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["raycurv", *words])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                command.main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Outcome(code, out.getvalue(), err.getvalue())


def python(code: str) -> str:
    """What a Python of its own prints."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60,
        env=environment(),
    ).stdout.strip()  # fmt: skip


def test_the_help_lists_every_job_with_a_line_that_says_what_it_does() -> None:
    for flag in ("--help", "-h"):
        outcome = raycurv_here(flag)
        assert outcome.code == 0 and not outcome.err
        lines = {
            words[0]: words[1:] for line in outcome.out.splitlines() if (words := line.split())
        }
        for name in JOBS:
            assert len(lines[name]) > 5, name


def test_every_job_has_a_script_and_every_script_starts_its_job() -> None:
    scripts = {path.stem: path.read_text() for path in (ROOT / "jobs").glob("*.py")}
    assert scripts.keys() == JOBS.keys()
    for name, text in scripts.items():
        assert f'start("{name}")' in text
        assert len(ast.parse(text).body) == 3, "the docstring, an import and the start"


def test_the_version_is_said() -> None:
    assert raycurv_here("--version").out == f"raycurv {raycurv.__version__}\n"


def test_a_job_that_there_is_not_is_a_mistake() -> None:
    for words, got in ((("fitt",), "'fitt'"), ((), "nothing"), (("--layers", "3"), "'--layers'")):
        outcome = raycurv_here(*words)
        said = json.loads(outcome.out.splitlines()[-1])
        assert outcome.code == 2 and said["status"] == "failed"
        assert said["error"]["got"] == got and all(name in said["message"] for name in JOBS)
        assert said["message"] in outcome.err and "Traceback" not in outcome.err
    assert "raycurv fit?" in raycurv_here("fitt").out


@pytest.mark.parametrize("name", JOBS)
def test_the_command_and_the_script_are_one_job(name: str) -> None:
    """Help, exit code and last line, but for what a person typed."""
    # The doctor alone needs no flag: without one it does its work.
    for flags in (["--help"], ["--layers", "3"], *([[]] if name != "doctor" else ())):
        one, other = raycurv_here(name, *flags), run_here(f"{name}.py", flags)
        assert one.code == other.code == (0 if flags == ["--help"] else 2)
        if flags == ["--help"]:
            # The usage wraps by the length of the program's name; what follows is the same.
            assert one.out.startswith(f"usage: raycurv {name}")
            assert other.out.startswith(f"usage: {name}.py")
            assert one.out.partition("\n\n")[2] == other.out.partition("\n\n")[2] != ""
        else:
            first, second = (json.loads(o.out.splitlines()[-1]) for o in (one, other))
            assert first["job"] == second["job"] == f"{name}.py"
            assert first["error"]["where"] == second["error"]["where"]


def test_python_m_raycurv_is_the_command() -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "raycurv", "timeline", "--run", "/nowhere"],
        capture_output=True, text=True, timeout=120, env=environment(),
    )  # fmt: skip
    assert outcome.returncode == 2
    said = json.loads(outcome.stdout.splitlines()[-1])
    assert said["job"] == "timeline.py" and "/nowhere" in said["message"]


def test_the_console_script_is_the_command() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'raycurv = "raycurv.__main__:main"' in text


def test_importing_the_package_loads_no_library() -> None:
    libraries = {"torch", "ray", "pyarrow", "numpy", "transformers", "tyro", "rich"}
    code = (
        "import sys, time; begun = time.perf_counter(); import raycurv; "
        "took = time.perf_counter() - begun; "
        f"print(sorted({libraries!r} & sys.modules.keys()), took); "
        "raycurv.UserError; "
        f"print(sorted({libraries!r} & sys.modules.keys()))"
    )
    first, second = python(code).splitlines()
    found, _, took = first.rpartition(" ")
    assert found == second == "[]"
    # 0.01 s where nothing else is at work.
    assert float(took) < 0.3


def test_every_name_of_the_package_is_there_and_known_to_type_checkers() -> None:
    for name in (*raycurv.__all__, "open"):
        assert getattr(raycurv, name) is not None and name in dir(raycurv)
    assert {*raycurv._PLACES} == {*raycurv.__all__, "open_run"}
    tree = ast.parse(Path(raycurv.__file__).read_text())
    typed = [node for node in tree.body if isinstance(node, ast.If)][-1]
    known = {
        alias.name: node.module.removeprefix("raycurv.")
        for node in typed.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert known == raycurv._PLACES
    with pytest.raises(AttributeError, match="no attribute 'fits'"):
        _ = raycurv.fits


def test_a_star_import_leaves_pythons_own_open_alone() -> None:
    names: dict[str, object] = {}
    exec("from raycurv import *", names)
    assert names["fit"] is raycurv.fit and "open" not in names
    assert raycurv.open is not open and callable(raycurv.open)


def test_the_help_of_the_command_waits_for_no_library() -> None:
    code = (
        "import sys; sys.argv = ['raycurv', '--help']; from raycurv.__main__ import main; main(); "
        "assert not {'torch', 'pyarrow', 'tyro'} & sys.modules.keys()"
    )
    assert "usage: raycurv" in python(code)


# What is taken of the data, which its fingerprint says.
TAKEN = {field.name for field in fields(Reading) if field.name.endswith(("split", "column"))}
# Settings that may change between a run and its continuation, beside how it is run.
FREE = {
    "fit": {
        "out", "adapter", "tokenizer", "keep_sums", "gradients", "check_capture", "check_causality",
        *TAKEN,
    },
    "influence": {
        "out", "adapter", "tokenizer", "query_memory", "fit_objective", "check_capture",
        "check_causality", "candidates_check", "certify", "certify_steps", "certify_examples",
        "certify_on", "queries_split", "queries_columns", *TAKEN,
    },
    "prune": {"out", "adapter", "objective"},
    "evaluate": {"out", "adapter", "tokenizer", "check_causality", *TAKEN},
    "spectrum": {"out", "adapter", "tokenizer", "check_causality", "at_once", "picture", *TAKEN},
}  # fmt: skip


@pytest.mark.parametrize("name", FREE)
def test_a_result_depends_on_every_setting_but_how_it_is_run(name: str) -> None:
    settings, _ = JOBS[name].load()
    how = {field.name for field in fields(Execution)}
    every = {field.name for field in fields(settings)}
    assert every - identity(settings()).keys() == how | FREE[name]
    assert not how & identity(settings()).keys()
    # Where inputs lie is recorded, and not compared.
    lie = identity(settings()).keys() - identity(settings(), inputs=False).keys()
    lies = {"model", "data", "run", "queries", "train", "candidates", "removals", "direction"}
    assert lie == every & lies


MISUSED: dict[str, tuple[str, Any, str]] = {
    "a count": ("batch_tokens", 0, "--batch-tokens: expected a number of at least 1, got 0"),
    "a fraction": ("stages", 1.5, "--stages: expected a whole number, got 1.5"),
    "a truth": ("stages", True, "--stages: expected a whole number, got True"),
    "a word for a truth": ("trust_remote_code", "no", "--trust-remote-code: expected True or Fal"),
    "a word for a number": ("commit_seconds", "5", "--commit-seconds: expected a number, got '5'"),
    "nothing for a text": ("out", None, "--out: expected a text, got None"),
    "a time": ("hang_seconds", 0.0, "--hang-seconds: expected above 0, got 0"),
    "failures": ("max_failures", -1, "--max-failures: expected a number of at least 0, got -1"),
    "a choice": ("long", "drop", "--long: expected one of error, truncate, split, got 'drop'"),
    "a list": ("blocks", "*.mlp.*", "--blocks: expected a list of globs, got '*.mlp.*'"),
    "what is not given": ("model", "", "--model: expected a value, got nothing"),
}


@pytest.mark.parametrize("name", MISUSED)
def test_what_a_field_declares_is_checked_of_values_from_python_too(name: str) -> None:
    field, value, says = MISUSED[name]
    settings = raycurv.FitSettings(model="m", data="d", out="/o")
    settings.check()
    with pytest.raises(raycurv.UserError) as caught:
        replace(settings, **{field: value}).check()
    assert str(caught.value).startswith(says)


def test_numbers_of_numpy_are_numbers() -> None:
    given = {"model": "m", "data": "d", "out": "/o", "draws": np.int64(2), "force": np.True_}
    settings, _ = settings_and_inputs(raycurv.FitSettings, given)
    settings.check()
    assert json.loads(json.dumps(identity(settings)))["draws"] == 2 and settings.force is True


def test_all_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(raycurv.UserError, match="--run, --queries, --out: expected a value"):
        raycurv.InfluenceSettings().check()
