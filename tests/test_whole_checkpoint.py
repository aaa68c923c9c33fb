"""Claims about model directories: they are used whole, opened as what they are, or refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import raycurv
from raycurv.errors import UserError
from raycurv.models.checkpoint import Checkpoint
from raycurv.models.hf import HFModel
from raycurv.models.opening import open_model, open_outline
from raycurv.models.unused import listed

torch.set_num_threads(1)

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(folder)
    return folder


@pytest.fixture
def own(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def _weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def _config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _refused(folder: Path, *says: str, ignored: tuple[str, ...] = ()) -> UserError:
    with pytest.raises(UserError) as caught:
        open_model(str(folder), ignored=ignored)
    for text in says:
        assert text in str(caught.value), str(caught.value)
    assert len(str(caught.value)) < 1500
    return caught.value


def _logits(model: raycurv.models.model.Model) -> dict[str, Tensor]:
    assert isinstance(model, HFModel)
    segment = model.build(range(model.units), torch.float32, CPU)
    return dict(segment.module.state_dict())


PROJECTION = "model.layers.{}.mlp.up_proj"
FOREIGN: dict[str, tuple[dict[str, Tensor], tuple[str, ...], str]] = {
    "an adapter": (
        {f"model.layers.{n}.mlp.up_proj.lora_{x}.default.weight": torch.ones(2, 2)
         for n in range(2) for x in "AB"},
        ("lora_A", "merge_and_unload", "model.layers.{0..1}"),
        "*lora_*",
    ),
    "biases": (
        {f"{PROJECTION.format(n)}.bias": torch.ones(24) for n in range(2)},
        ("up_proj.bias", "biases that config.json does not know"),
        "*.bias",
    ),
    "layers": (
        {f"{PROJECTION.format(n)}.weight": torch.ones(24, 16) for n in (2, 3)},
        ("model.layers.{2..3}", "num_hidden_layers"),
        "model.layers.[23].*",
    ),
    "a reward head": ({"score.weight": torch.ones(1, 16)}, ("score", "reward"), "score.*"),
    "a scale beside a weight": (
        {f"{PROJECTION.format(0)}.weight_scale": torch.ones(1)}, ("quantised",), "*_scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_tensors_that_the_model_does_not_take_are_an_error_or_allowed(own: Path, case: str) -> None:
    extra, says, glob = FOREIGN[case]
    expected = _logits(open_model(str(own)))
    _weights(own, lambda w: w | extra)
    error = _refused(own, *says, "--ignore-tensors")
    _refused(own, *says, ignored=("nothing*",))
    proposed = error.remedy.rpartition("--ignore-tensors '")[2].split("'")[0]
    for globs in ((glob,), (proposed,)):
        model = open_model(str(own), ignored=globs)
        assert "--ignore-tensors" in model.notices[0]
        assert all(torch.equal(t, expected[n]) for n, t in _logits(model).items())


def test_what_cannot_matter_is_told_and_left(own: Path) -> None:
    extra = {
        "train_step": torch.tensor(7, dtype=torch.uint32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
        "lr": torch.tensor([0.1]),
    }
    _weights(own, lambda w: w | extra)
    told = " ".join(open_model(str(own)).notices)
    assert all(name in told for name in extra)
    prints = open_model(str(own)).fingerprint()
    assert prints["train_step"]["dtype"] == "U32"
    # A foreign dtype that is no integer is a weight as any other.
    _weights(own, lambda w: w | {"freqs": torch.ones(3, 2, dtype=torch.complex64)})
    _refused(own, "freqs")


def test_integers_in_place_of_a_weight_are_an_error(own: Path) -> None:
    _weights(own, lambda w: w | {"lm_head.weight": w["lm_head.weight"].to(torch.int8)})
    _refused(own, "lm_head.weight", "I8", "quantised")


PREFIXES = ("_orig_mod.", "module.", "base_model.model.", "module._orig_mod.", "model.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_wrappers_prefix_is_read_through_and_written_back(own: Path, prefix: str) -> None:
    expected = _logits(open_model(str(own)))
    _weights(own, lambda w: {prefix + name: t for name, t in w.items()})
    model = open_model(str(own))
    assert all(torch.equal(t, expected[n]) for n, t in _logits(model).items())
    # transformers reads a doubled `model.` by itself.
    assert (prefix == "model.") or "wrapper" in model.notices[0]
    assert all(key.startswith(prefix) for key in model.fingerprint())
    names = [file.name for file in model.files()]
    data = b"".join(bytes(c) for c in model.files()[names.index("model.safetensors")].chunks())
    assert data == (own / "model.safetensors").read_bytes()


def test_names_inside_a_wrapped_module_are_read_through(own: Path) -> None:
    expected = _logits(open_model(str(own)))
    inner = "model._fsdp_wrapped_module.layers.0._checkpoint_wrapped_module."
    _weights(own, lambda w: {n.replace("model.layers.0.", inner): t for n, t in w.items()})
    model = open_model(str(own))
    assert "wrapper" in model.notices[0]
    assert all(torch.equal(t, expected[n]) for n, t in _logits(model).items())


def test_a_checkpoint_of_no_tensors_lacks_all_weights(own: Path) -> None:
    _weights(own, lambda w: {})
    _refused(own, "config.json, num_hidden_layers")
    _config(own, num_hidden_layers=1)
    _refused(own, "12 missing")


def test_a_prefix_is_not_taken_off_where_more_differs(own: Path) -> None:
    _weights(own, lambda w: {f"_orig_mod.{n}": t for n, t in w.items() if "norm" not in n})
    _refused(own, "missing", "model.norm.weight")


def test_missing_weights_are_all_named_before_they_are_made(own: Path) -> None:
    _weights(own, lambda w: {n: t for n, t in w.items() if "up_proj" not in n})
    _config(own, intermediate_size=10**12)
    _refused(own, "intermediate_size", "down_proj")
    _config(own, intermediate_size=24)
    _refused(own, "2 missing", "model.layers.{0..1}.mlp.up_proj.weight")


def test_two_tensors_for_one_weight_are_an_error(own: Path) -> None:
    _weights(own, lambda w: w | {"norm.weight": w["model.norm.weight"] + 1})
    _refused(own, "norm.weight", "one tensor for each weight")


def test_weights_that_were_not_gathered_are_called_so(own: Path) -> None:
    _weights(own, lambda w: {n: torch.empty(0) if t.ndim == 2 else t for n, t in w.items()})
    _refused(own, "[0]", "zero_to_fp32.py")


OTHERS = {
    "LlamaModel": ("llama", "a bare model"),
    "WhisperForConditionalGeneration": ("whisper", "an encoder of speech"),
    "MistralForCausalLM": ("llama", "another model_type"),
    "LlamaForCausalLMEagle3": ("llama", "does not have"),
    "": ("llama", "a model without a name"),
}


def test_what_a_pretrained_encoder_has_beside_a_masked_language_model_is_told(
    tmp_path: Path,
) -> None:
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=16,
    )  # fmt: skip
    whole = transformers.BertForPreTraining(config)
    masked = transformers.BertForMaskedLM(config)
    masked.save_pretrained(tmp_path)
    kept = dict(load_file(tmp_path / "model.safetensors"))
    beside = {k: v.clone() for k, v in whole.state_dict().items() if k not in masked.state_dict()}
    assert set(beside) == {
        f"{name}.{part}" for name in ("bert.pooler.dense", "cls.seq_relationship")
        for part in ("weight", "bias")
    }  # fmt: skip
    save_file(kept | beside, tmp_path / "model.safetensors", {"format": "pt"})
    told = " ".join(open_model(str(tmp_path)).notices)
    assert all(name in told for name in ("bert.pooler.dense", "pretraining"))
    # Control: a layer that the configuration does not know is no part of its pretraining.
    strange = {"bert.encoder.layer.1.output.dense.weight": torch.ones(8, 8)}
    save_file(kept | beside | strange, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 that it does not take: bert\.encoder\.layer\.1"):
        open_model(str(tmp_path))


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_of_model_is_refused_by_its_name(own: Path, name: str) -> None:
    kind, *says = OTHERS[name]
    _config(own, architectures=[name], model_type=kind)
    _refused(own, name, *says)
    with pytest.raises(UserError, match=name):
        open_outline(str(own))
    _config(own, architectures=["LlamaForCausalLM"], model_type="llama")
    assert open_model(str(own)).units == 2


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaForTokenClassification"])
def test_the_weights_of_a_language_model_are_no_classifiers(own: Path, name: str) -> None:
    _config(own, architectures=[name])
    assert open_outline(str(own)).classes == 2
    _refused(own, name, "score.weight", "missing")


def _directory(folder: Path, *names: str, **content: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(content.get(name.replace(".", "_"), "{}"))


DIRECTORIES: dict[str, tuple[tuple[str, ...], str]] = {
    "adapter": (("adapter_config.json", "adapter_model.safetensors"), "an adapter"),
    "adapter with config": (("adapter_config.json", "config.json"), "this one as --adapter"),
    "gguf": (("model.gguf",), "GGUF"),
    "pickle": (("config.json", "pytorch_model.bin"), "pytorch_model.bin"),
    "original": (("params.json", "consolidated.00.pth"), "layout of its own"),
    "pipeline": (("model_index.json",), "pipeline"),
    "tokenizer": (("tokenizer.json", "tokenizer_config.json"), "a tokenizer without"),
    "data": (("dataset_info.json", "state.json"), "a data set"),
    "run": (("run.json", "blocks.json"), "results of"),
    "weights alone": (("model.safetensors",), "without config.json"),
    "something else": (("notes.txt",), "no config.json among notes.txt"),
}  # fmt: skip


@pytest.mark.parametrize("case", DIRECTORIES)
def test_a_directory_without_a_model_is_called_what_it_is(tmp_path: Path, case: str) -> None:
    names, says = DIRECTORIES[case]
    _directory(tmp_path / "it", *names)
    _refused(tmp_path / "it", says)


def test_files_beside_the_weights_are_told_and_an_adapter_is_refused(own: Path) -> None:
    save_file({"x": torch.ones(2)}, own / "consolidated.safetensors")
    assert "consolidated.safetensors" in open_model(str(own)).notices[0]
    save_file(
        {"base_model.model.x.lora_A.weight": torch.ones(2)}, own / "adapter_model.safetensors"
    )
    _refused(own, "an adapter", "--ignore-tensors adapter_model.safetensors")
    assert open_model(str(own), ignored=["adapter_model.safetensors"]).units == 2


def _sharded(folder: Path) -> dict[str, Any]:
    """Cut a checkpoint into two files; gives what their index says."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def test_an_index_names_what_its_files_hold(own: Path, tmp_path: Path) -> None:
    whole = shutil.copy(own / "model.safetensors", tmp_path / "whole")
    index = _sharded(own)
    assert open_model(str(own)).notices == ()
    extra = {"late.weight": torch.ones(2, 2)}
    save_file(load_file(own / "b.safetensors") | extra, own / "b.safetensors")
    _refused(own, "late.weight", "does not list")
    assert open_model(str(own), ignored=["late.*"]).notices
    key = next(key for key, file in index["weight_map"].items() if file == "a.safetensors")
    same = load_file(own / "a.safetensors")[key]
    rest = {n: t for n, t in load_file(own / "b.safetensors").items() if n not in extra}
    save_file(rest | {key: same}, own / "b.safetensors")
    assert open_model(str(own)).notices == ()
    save_file(rest | {key: same + 1}, own / "b.safetensors")
    _refused(own, key, "another one of that name")
    shutil.copy(whole, own / "model.safetensors")
    _refused(own, "both", INDEX)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/hostname", "pipe", "away", ".."])
def test_an_index_cannot_lead_out_of_its_directory(own: Path, name: str) -> None:
    index = _sharded(own)
    shutil.copy(own / "a.safetensors", own.parent / "secret.safetensors")
    os.mkfifo(own / "pipe")
    (own / "away").symlink_to("../secret.safetensors")
    index["weight_map"] = {k: name if f[0] == "a" else f for k, f in index["weight_map"].items()}
    (own / INDEX).write_text(json.dumps(index))
    _refused(own, INDEX)


def test_a_link_beside_the_weights_is_not_copied(own: Path) -> None:
    (own.parent / "private.txt").write_text("secret")
    (own / "notes.txt").symlink_to("../private.txt")
    with pytest.raises(UserError, match=r"notes\.txt.*link to"):
        open_model(str(own)).files()
    (own / "notes.txt").unlink()
    (own / "notes.txt").symlink_to("config.json")
    assert "notes.txt" in {file.name for file in open_model(str(own)).files()}


BOMBS: dict[str, dict[str, Any]] = {
    "layers": {"num_hidden_layers": 20_000},
    "more layers": {"num_hidden_layers": 900},
    "no layers": {"num_hidden_layers": -2},
    "words": {"vocab_size": 10**15},
    "width": {"hidden_size": 10**9},
    "labels": {"num_labels": 10**9},
    "text": {"num_hidden_layers": "2"},
    "nested": {"x": json.loads("[" * 200 + "]" * 200)},
    "not a number": {"rms_norm_eps": float("nan")},
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_configuration_that_the_weights_contradict_is_refused_first(own: Path, case: str) -> None:
    _config(own, **BOMBS[case])
    _refused(own, "config.json")


def test_what_stays_in_float32_does_so_as_transformers_has_it(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SMALL)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    held = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = open_model(str(tmp_path))
    module = model.build(range(model.units), torch.bfloat16, CPU).module
    mine = dict(module.named_parameters()) | dict(module.named_buffers())
    theirs = dict(held.named_parameters()) | dict(held.named_buffers())
    assert mine.keys() == theirs.keys() and any("inv_freq" in name for name in mine)
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name


def test_a_configuration_of_an_ordinary_kind_is_no_mistake(own: Path) -> None:
    # A layer counted from the end, what FSDP calls a class, outputs as a tuple.
    said = {"vision_feature_layer": -2, "embed_dim_per_stage": [1152], "return_dict": False}
    _config(own, architectures=["FSDPLlamaForCausalLM"], **said)
    assert open_model(str(own)).units == 2


@pytest.mark.parametrize(
    ("field", "said"),
    [("hidden_act", {"hidden_act": "foo"}),
     ("rope_scaling.rope_type", {"rope_scaling": {"rope_type": "foo", "factor": 2.0}})],
)  # fmt: skip
def test_a_value_that_transformers_does_not_know_is_named_with_its_field(
    own: Path, field: str, said: dict[str, Any]
) -> None:
    _config(own, **said)
    _refused(own, f"KeyError: 'foo' (see {field})")


def test_names_that_differ_by_numbers_are_shown_as_one() -> None:
    names = [f"layers.{n}.w{m}" for n in range(3) for m in "ab"] + ["a.1.b", "a.4.b"]
    assert listed(names) == "a.{1,4}.b, layers.{0..2}.wa, layers.{0..2}.wb"


def test_hostile_headers_are_refused(tmp_path: Path) -> None:
    for header in (
        {"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [2**62, 4, 0], "data_offsets": [0, 0]}},
        {"w": {"dtype": "F32", "shape": [1] * 40, "data_offsets": [0, 4]}},
        {"w\n": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    ):
        raw = json.dumps(header).encode()
        data = len(raw).to_bytes(8, "little") + raw + bytes(4)
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(UserError):
            Checkpoint(tmp_path)
    entry = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    raw = f'{{"w": {entry}, "w": {entry}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    with pytest.raises(UserError, match="'w' twice"):
        Checkpoint(tmp_path)


def test_a_job_records_what_was_left_and_what_follows_it_leaves_it_too(
    own: Path, tmp_path: Path
) -> None:
    _weights(own, lambda w: w | {"score.weight": torch.ones(1, 16)})
    rows = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6, 7]}]
    given: dict[str, Any] = {"address": "none", "method": "identity", "quiet": True}
    with pytest.raises(UserError, match="--ignore-tensors"):
        raycurv.fit(str(own), rows, tmp_path / "run", **given)
    run = raycurv.fit(str(own), rows, tmp_path / "run", ignore_tensors=["score.*"], **given)
    assert run.manifest.settings["ignore_tensors"] == ["score.*"]
    assert "score.weight" in run.manifest.facts["model_notes"][0]
    opened = raycurv.open(tmp_path / "run")
    scores = opened.influence(rows, rows, tmp_path / "scores", address="none", quiet=True)
    assert scores.table().num_rows == 4
