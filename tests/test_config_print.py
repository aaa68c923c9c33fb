"""Claims about what of a configuration is on record: what decides numbers, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import rewritten, save_llama, texts
from transformers import AutoConfig, AutoModelForCausalLM

import raycurv
from raycurv import UserError
from raycurv.models.config_print import config_changes
from raycurv.models.opening import open_model

pytestmark = pytest.mark.usefixtures("quiet_transformers")
torch.set_num_threads(1)
OTHER_ROPE = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("config") / "llama")


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "llama"))


def edit(model: Path, **changes: Any) -> None:
    file = model / "config.json"
    said = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in said.items() if v != "gone"}))


def configuration(model: Path) -> Any:
    """As a run has it on record."""
    return json.loads(json.dumps(open_model(str(model)).configuration()))


CHANGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "what it takes for granted": ({"rms_norm_eps": "gone", "hidden_act": "gone"}, []),
    "what changes no number": (
        {"use_cache": False, "attention_dropout": 0.5, "dtype": "bfloat16", "_name_or_path": "x",
         "transformers_version": "1.0", "initializer_range": 0.5, "output_attentions": True}, []
    ),
    "an epsilon": ({"rms_norm_eps": 1e-3}, ["rms_norm_eps was 1e-06 and is now 0.001"]),
    "what the file did not say": (
        OTHER_ROPE,
        ["rope_parameters.factor was not there and is now 2.0",
         "rope_parameters.rope_type was 'default' and is now 'linear'"],
    ),
    "an option of nobody's": ({"own": 3}, ["own was not there and is now 3"]),
    "more than a line": (
        {"architectures": ["LlamaForCausalLM", "x" * 300]},
        ["architectures was ['LlamaForCausalLM'] and is now '"],
    ),
    "many": (
        {"rms_norm_eps": 1.0, "hidden_act": "relu", "bos_token_id": 9, "eos_token_id": 9, "own": 0},
        ["bos_token_id was 1 and is now 9", "eos_token_id was", "hidden_act was", "2 more"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_numbers_is_named_and_nothing_else(name: str, model: Path) -> None:
    changes, says = CHANGES[name]
    before = configuration(model)
    edit(model, **changes)
    found = config_changes(before, configuration(model))
    assert len(found) == len(says)
    assert all(one.startswith(said) for one, said in zip(found, says, strict=True))


def test_a_file_that_is_saved_again_says_the_same(model: Path) -> None:
    edit(model, rms_norm_eps="gone", **OTHER_ROPE)
    before = configuration(model)
    AutoConfig.from_pretrained(model).save_pretrained(model)
    assert "rms_norm_eps" in (model / "config.json").read_text()
    assert configuration(model) == before


def test_options_of_another_version_are_no_difference(model: Path) -> None:
    here = configuration(model)
    before = {k: v for k, v in here.items() if k != "mlp_bias"} | {"old_option": 3}
    assert len(config_changes(before, here)) == 2
    before["transformers_version"] = "4.99.0"
    assert config_changes(before, here) == []
    assert config_changes(before | {"rms_norm_eps": 1.0}, here)
    # A run that has none on record, or a model without any.
    assert config_changes({}, here) == config_changes(here, {}) == []


def test_a_run_that_recorded_no_configuration_goes_on(model: Path, tmp_path: Path) -> None:
    def fit() -> raycurv.Run:
        return raycurv.fit(model, texts(4), tmp_path / "run", address="none", quiet=True)

    run = fit()
    edit(model, rms_norm_eps=1e-2)
    again = {"address": "none", "quiet": True}
    for attempt in (fit, lambda: run.influence(texts(1), texts(2), tmp_path / "s", **again)):
        with pytest.raises(UserError, match=r"rms_norm_eps was 1e-06 and is now 0\.01"):
            attempt()
    with rewritten(tmp_path / "run") as said:
        del said["fingerprints"]["config"]
    fit().influence(texts(1), texts(2), tmp_path / "s", **again)


def test_a_factory_of_a_model_of_transformers_has_its_configuration(model: Path) -> None:
    def wrapped() -> torch.nn.Module:
        return torch.nn.Sequential(AutoModelForCausalLM.from_pretrained(model))

    assert open_model(wrapped).configuration() == configuration(model)
    assert open_model(lambda: torch.nn.Sequential(torch.nn.Linear(2, 2))).configuration() == {}
