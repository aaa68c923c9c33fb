"""Claims about the doctor: what is missing is named, and what a fit could hold is the planner's."""

from __future__ import annotations

import json
from dataclasses import replace
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from commands import ROOT, Outcome, run_here

import raycurv
from raycurv.jobs import registry, requirements
from raycurv.jobs.doctor import examining
from raycurv.jobs.plan import estimating
from raycurv.planning.rates import H100, Rates
from raycurv.planning.supply import Supply, cores_here

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
QUICK = Rates(H100[torch.float32], 1e12, 1e12, 1e9, 1e9, "not measured")


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> Message:
    """The metadata of this raycurv, to be changed; nothing else is imported for it."""
    said = Message()
    said["Version"], said["Requires-Python"] = raycurv.__version__, PROJECT["requires-python"]
    for name, texts in {"": PROJECT["dependencies"], **EXTRAS}.items():
        if name:
            said["Provides-Extra"] = name
        for text in texts:
            said["Requires-Dist"] = f'{text}; extra == "{name}"' if name else text
    monkeypatch.setattr(requirements.metadata, "metadata", lambda name: said)
    monkeypatch.setattr(requirements, "import_module", lambda name: None)
    for module in (examining, estimating):
        monkeypatch.setattr(module, "measure", lambda dtype, place: QUICK)
    monkeypatch.setattr(examining, "_WIDTHS", (128, 256))
    return said


def doctor(*flags: Any) -> tuple[Outcome, dict[str, Any]]:
    outcome = run_here("doctor", ["--address", "none", *flags])
    return outcome, json.loads(outcome.out.splitlines()[-1])


def test_every_extra_that_is_not_for_who_edits_has_a_purpose() -> None:
    assert {*requirements.PURPOSES, "test", "check", "docs"} == EXTRAS.keys()


def test_a_machine_that_has_all_is_told_what_it_holds(
    declared: Message, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, memory = {}, {}
    for width in (128, 256):
        (tmp_path / "config.json").write_text(json.dumps(examining._llama(width)))
        planned = raycurv.plan(str(tmp_path), examples=1000, stages=1, address="none").details
        sizes[width] = planned["sizes"]["weights"] // 4
        memory[width] = max(one["memory"] for one in planned["plans"].values())
    between = Supply((memory[128] + memory[256]) // 2, 10**15)
    monkeypatch.setattr(estimating, "supply_here", lambda place: between)
    outcome, said = doctor()
    assert outcome.code == 0 and said["status"] == "complete", outcome.err
    assert set(PROJECT["dependencies"]) <= {
        text.replace("ray>", "ray[default]>") for text in said["versions"]
    }
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**examining._llama(128)))
    assert said["holds"]["resident"] == sizes[128] == sum(p.numel() for p in model.parameters())
    assert "the next larger one lacks memory of a node" in outcome.out
    # A control: with the memory of the larger one that is what fits.
    enough = replace(between, memory=2 * memory[256])
    monkeypatch.setattr(estimating, "supply_here", lambda place: enough)
    assert doctor()[1]["holds"]["resident"] == sizes[256]
    found = doctor("--model", tmp_path)[1]
    assert found["holds"] == {"resident": True, "swept": True}


BROKEN: dict[str, tuple[str, str, int, str]] = {
    "too old": ("Requires-Dist", "torch>=99", 2, "torch>=99: expected"),
    "not there": ("Requires-Dist", "no-such-package>=1", 2, "got not installed"),
    "does not load": ("Requires-Dist", "rich>=1", 2, "cannot be imported: no such symbol"),
    "Python": ("Requires-Python", ">=4", 2, "Python>=4: expected"),
    "an extra's": ("Requires-Dist", 'rich>=1; extra == "report"', 0, "'raycurv[report]'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_missing_is_named_with_what_to_do(
    declared: Message, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    field, value, code, says = BROKEN[name]

    def load(module: str) -> None:
        if module == "rich":
            raise OSError("no such symbol")

    kept = [one for one in declared.get_all("Requires-Dist") or () if not one.startswith("rich")]
    del declared["Requires-Dist"]
    for one in kept:
        declared["Requires-Dist"] = one
    if field == "Requires-Python":
        del declared[field]
    declared[field] = value
    monkeypatch.setattr(requirements, "import_module", load)
    monkeypatch.setattr(examining, "_capacity", lambda found, settings: None)
    outcome, said = doctor()
    assert outcome.code == code and "Traceback" not in outcome.err
    problem = said["message"] if code else " ".join(said["to_do"])
    assert says in problem and problem in outcome.out


@pytest.mark.parametrize("kind", [ImportError, OSError])
def test_a_job_whose_libraries_are_missing_says_which(
    declared: Message, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(job: registry.Job) -> Any:
        raise kind("no module of this name")

    monkeypatch.setattr(registry.Job, "load", load)
    outcome, said = doctor()
    assert outcome.code == 1 and said["error"]["kind"] == kind.__name__
    declared["Requires-Dist"] = "no-such-package>=1"
    outcome, said = doctor()
    assert outcome.code == 2 and said["error"]["where"] == "no-such-package>=1"


def test_places_and_clusters_that_cannot_be_used_are_named(
    declared: Message, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examining, "_capacity", lambda found, settings: None)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "file").write_text("")
    outcome, said = doctor("--out", tmp_path / "file" / "run")
    assert outcome.code == 2 and said["error"]["where"] == "--out"
    assert doctor("--out", tmp_path / "new" / "run")[0].code == 0
    for address, got in (("127.0.0.1:1", "refused"), ("auto", "got none")):
        outcome = run_here("doctor", ["--address", address])
        assert outcome.code == 2 and got in outcome.out
    # One that was there is not one that is.
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1\n")
    outcome = run_here("doctor", [])
    assert outcome.code == 0 and "none runs on this machine" in outcome.out


def test_cores_are_those_of_the_control_group(tmp_path: Path) -> None:
    cores = cores_here(tmp_path)[0]
    assert cores >= 1 and cores_here(tmp_path)[1] is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cores_here(tmp_path)[1] is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("150000\n")
    assert cores_here(tmp_path) == (cores, 1.5)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores_here(tmp_path)[1] is None
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert cores_here(tmp_path) == (cores, 0.5)
