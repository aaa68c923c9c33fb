"""An adapter's model is PEFT's own, beside the base's weights and merged into them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from networks import ADAPTED, VOCAB, sentences
from safetensors.torch import load_file, save_file
from test_invariance import DOUBLE, result, same
from test_quantised import BLOCKS, quantised_and_copy
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)

import raycurv
from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.models.adapter import Adapters
from raycurv.models.model import Model
from raycurv.models.opening import open_model, open_outline

pytestmark = [
    pytest.mark.usefixtures("quiet_transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
CPU = torch.device("cpu")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        attention_bias=True, tie_word_embeddings=False,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=8, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=False
    ),
}  # fmt: skip
# What PEFT is asked for: the family of the base, and the adapter's configuration.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5}),
    "rslora": ("llama", {"target_modules": ["up_proj"], "use_rslora": True}),
    "dora": ("llama", {"target_modules": ["k_proj", "down_proj"], "use_dora": True}),
    "all linear layers": ("llama", {"target_modules": "all-linear"}),
    "a pattern": ("llama", {"target_modules": r".*layers\.[01]\.mlp\.(up|down)_proj"}),
    "ranks and alphas": ("llama", {
        "target_modules": ["q_proj", "o_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 4},
        "alpha_pattern": {"o_proj": 5},
    }),
    "one layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "biases of matrices": ("llama", {"target_modules": ["q_proj"], "lora_bias": True}),
    "biases of layers": ("llama", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "all biases": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "the head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "modules as a whole": ("llama", {
        "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "score"],
    }),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "dora of conv1d": ("gpt2", {"target_modules": ["c_fc"], "use_dora": True}),
}  # fmt: skip


def make(folder: Path, family: str, name: str = "adapter", seed: int = 0, **config: Any) -> Path:
    """Save a base, if it is not there, and an adapter of it; gives the adapter's directory."""
    base = folder / family
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if not base.exists():
            AutoModelForCausalLM.from_config(CONFIGS[family]).save_pretrained(base)
        torch.manual_seed(seed)
        config = {"r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM", **config}
        model = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**config)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        model.save_pretrained(str(folder / name))
    return folder / name


def theirs(folder: Path, family: str, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder / family, dtype=dtype)
    return peft.PeftModel.from_pretrained(base, str(adapter)).eval()


def ours(folder: Path, family: str, *adapters: Path, merged: bool = False) -> Model:
    given = Adapters(tuple(map(str, adapters)), merged)
    return open_model(str(folder / family), adapters=given)


def logits(model: Model, dtype: torch.dtype = torch.float32, cuts: int = 1) -> Tensor:
    """Through segments of one layer each, or of so many."""
    hidden = None
    for start in range(0, model.units, cuts):
        segment = model.build(range(start, min(start + cuts, model.units)), dtype, CPU)
        batch = Batch(0, ("a", "b"), IDS, torch.ones_like(IDS, dtype=torch.bool))
        hidden = segment.forward(batch, hidden)
    return segment.head(hidden[0]).detach()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_merged_weights_are_those_of_peft(tmp_path: Path, kind: str) -> None:
    family, config = KINDS[kind]
    adapter = make(tmp_path, family, **config)
    model, merged = ours(tmp_path, family, adapter), ours(tmp_path, family, adapter, merged=True)
    whole = theirs(tmp_path, family, adapter)
    want = whole(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.detach()
    with whole.disable_adapter():
        base = whole(input_ids=IDS).logits.detach()
    # Bit for bit, but DoRA's product of its two matrices, which PEFT makes by calling them.
    bound = 1e-6 * float(want.abs().max()) if config.get("use_dora") else 0.0
    got = logits(model)
    assert float((got - want).abs().max()) <= bound
    assert not torch.allclose(got, base)  # the control
    built = merged.build(range(merged.units), torch.float32, CPU).module.state_dict()
    for name, weight in whole.merge_and_unload().state_dict().items():
        assert torch.equal(built[name], weight), name


def test_in_bfloat16_matrices_and_merged_weights_are_as_in_peft(tmp_path: Path) -> None:
    adapter = make(tmp_path, "llama", target_modules="all-linear")
    whole = theirs(tmp_path, "llama", adapter, torch.bfloat16)
    want = whole(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert torch.equal(logits(ours(tmp_path, "llama", adapter), torch.bfloat16, 2), want)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "llama")
    weights = theirs(tmp_path, "llama", adapter, torch.bfloat16).merge_and_unload().state_dict()
    model = ours(tmp_path, "llama", adapter, merged=True)
    for dtype in (torch.bfloat16, torch.float32):
        built = model.build(range(2), dtype, CPU).module.state_dict()
        assert all(torch.equal(built[name], w.to(dtype)) for name, w in weights.items())


def test_several_adapters_are_active_together(tmp_path: Path) -> None:
    one = make(tmp_path, "llama", "one", target_modules=["q_proj"])
    other = make(tmp_path, "llama", "other", 1, target_modules=["q_proj", "up_proj"], r=3)
    whole = theirs(tmp_path, "llama", one)
    whole.load_adapter(str(other), "adapter2")
    whole.base_model.set_adapter(["default", "adapter2"])
    assert torch.equal(logits(ours(tmp_path, "llama", one, other)), whole(input_ids=IDS).logits)
    merged = logits(ours(tmp_path, "llama", one, other, merged=True))
    assert torch.equal(merged, whole.merge_and_unload()(input_ids=IDS).logits)
    (tmp_path / "link").symlink_to(one)
    for again in (one, tmp_path / "link"):
        with pytest.raises(UserError, match="one of them twice"):
            ours(tmp_path, "llama", one, again)


@pytest.mark.parametrize(
    "whole", [["norm", "score"], ["layernorm"], ["model.norm", "0.mlp"], ["up_proj"], ["head", "x"]]
)
def test_what_an_adapter_has_as_a_whole_is_what_peft_trains(
    tmp_path: Path, whole: list[str]
) -> None:
    adapter = make(tmp_path, "llama", target_modules=["q_proj", "up_proj"], modules_to_save=whole)
    trained = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "llama"), adapter, is_trainable=True
    )
    want = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        for name, parameter in trained.named_parameters() if parameter.requires_grad
    }  # fmt: skip
    model = ours(tmp_path, "llama", adapter)
    found = {name for name, p in model.skeleton().named_parameters() if p.requires_grad}
    assert found == want
    assert any(not re.search(r"\.lora_[AB]\.", name) for name in want)
    assert torch.equal(logits(model), trained.eval()(input_ids=IDS).logits)
    # Without one of these the adapter is not whole.
    _tensors(lambda t: t.pop(next(key for key in t if ".lora_" not in key)))(adapter)
    with pytest.raises(UserError, match="1 missing"):
        ours(tmp_path, "llama", adapter)


def test_of_adapters_that_replace_one_weight_one_is_taken(tmp_path: Path) -> None:
    one, other = (
        make(tmp_path, "llama", name, n, target_modules=["q_proj"], modules_to_save=["lm_head"])
        for n, name in enumerate(("one", "other"))
    )
    for merged in (False, True):
        with pytest.raises(UserError, match=r"lm_head.weight in it and in .*one\."):
            ours(tmp_path, "llama", one, other, merged=merged)
        ours(tmp_path, "llama", other, merged=merged)
    outline = Adapters((str(one), str(other)))
    with pytest.raises(UserError, match="Give one of them"):
        open_outline(str(tmp_path / "llama"), adapters=outline)


def test_an_adapters_own_tokenizer_is_told(tmp_path: Path) -> None:
    adapter = make(tmp_path, "llama", target_modules=["q_proj"])
    base = tmp_path / "llama" / "tokenizer.json"
    base.write_text("{}")
    for merged in (False, True):
        for own, told in (("{}", False), ('{"added_tokens": []}', True)):
            (adapter / base.name).write_text(own)
            notices = ours(tmp_path, "llama", adapter, merged=merged).notices
            assert any(f"by --tokenizer {adapter} alone" in one for one in notices) == told


def test_a_quantised_base_is_frozen_below_its_adapter(tmp_path: Path) -> None:
    adapter = make(tmp_path, "llama", target_modules=["q_proj", "down_proj"])
    both = quantised_and_copy(tmp_path / "llama", tmp_path, BLOCKS)
    for merged in (False, True):
        given = Adapters((str(adapter),), merged)
        one, other = (logits(open_model(str(folder), adapters=given)) for folder in both)
        assert torch.equal(one, other)
    given = {"address": "none", "quiet": True, "adapter": [adapter], "dtype": "float64"}
    rows = [*sentences((5, 2, 7, 4), False)]
    runs = [raycurv.fit(folder, rows, f"{folder}-run", **given) for folder in both]
    assert runs[0].blocks()["trace"] == runs[1].blocks()["trace"]
    assert all(".lora_" in name for name in runs[0].block_names())


def test_results_do_not_depend_on_stages(fits: Any) -> None:
    how = {"schedule": "swept", "stages": 2, "batch_tokens": 9}
    same(result(fits, ADAPTED, "float64", **how), result(fits, ADAPTED, "float64"), DOUBLE)


def test_an_adapters_matrices_have_the_blocks_and_all_of_it_is_covered(fits: Any) -> None:
    run = fits.run(ADAPTED)
    assert all(".lora_" in name for name in run.block_names())
    covered = run.manifest.facts["coverage"]
    assert covered["covered"] == covered["trainable"] > 0
    assert {"model.layers.*.self_attn.q_proj.base_layer.weight"} <= covered["frozen"].keys()
    named = fits.run(ADAPTED, blocks=("model.layers.0.mlp.down_proj",))
    inside = ("base_layer", "lora_A.default", "lora_B.default")
    assert named.block_names() == [f"model.layers.0.mlp.down_proj.{name}" for name in inside]


def _fit(tmp_path: Path, *adapters: Path, out: str = "run", **settings: Any) -> raycurv.Run:
    rows = [*sentences((5, 2, 7, 4), False)]
    chosen = {"address": "none", "quiet": True, "adapter": adapters, **settings}
    return raycurv.fit(tmp_path / "llama", rows, tmp_path / out, **chosen)


@pytest.mark.parametrize(
    "kind, blocks", [("dora", 12), ("the head", 6), ("modules as a whole", 10)]
)
def test_gradients_are_autograds(tmp_path: Path, kind: str, blocks: int) -> None:
    # The fit itself holds them against autograd's own for the weights (`check_capture`).
    adapter = make(tmp_path, "llama", **KINDS[kind][1])
    run = _fit(tmp_path, adapter, dtype="float64", stages=2, blocks=["all"])
    facts = run.manifest.facts
    assert facts["capture_check"]["worst"] < 1e-10
    assert facts["coverage"]["covered"] == facts["coverage"]["trainable"]
    assert len(run.block_names()) == blocks


def test_biases_of_frozen_layers_are_named_where_all_is_asked_for(tmp_path: Path) -> None:
    adapter = make(tmp_path, "llama", **KINDS["all biases"][1])
    with pytest.raises(UserError, match="a trainable bias of a layer whose weight is frozen") as no:
        _fit(tmp_path, adapter, blocks=["all"])
    left = re.findall(r"--blocks '(\S+)'", no.value.remedy)
    assert len(_fit(tmp_path, adapter, blocks=["all", *left]).block_names()) == 4


def test_rows_of_doras_own_products_are_no_rows_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The control of the case above: by itself PEFT sends the identity through the matrices.
    def calls(lora_A: Any, lora_B: Any, adapter_name: str | None = None) -> Tensor:
        weight = lora_A.weight
        return lora_B(
            lora_A(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device))
        ).T

    adapter = make(tmp_path, "llama", **KINDS["dora"][1])
    monkeypatch.setattr("raycurv.models.lora._product", calls)
    with pytest.raises(UserError):
        _fit(tmp_path, adapter, dtype="float64")


def test_matrices_beside_bfloat16_are_fitted_in_float32(tmp_path: Path) -> None:
    adapter = make(tmp_path, "llama", target_modules=["q_proj", "down_proj"])
    half, full = (
        _fit(tmp_path, adapter, out=dtype, dtype=dtype, fisher="empirical").blocks()["trace"]
        for dtype in ("bfloat16", "float32")
    )
    for a, b in zip(half.to_pylist(), full.to_pylist(), strict=True):
        assert abs(a - b) < 0.05 * b


def test_a_run_knows_its_adapter(tmp_path: Path) -> None:
    adapter = make(tmp_path, "llama", target_modules=["q_proj"])
    other = make(tmp_path, "llama", "other", 1, target_modules=["q_proj"])
    run, rows = _fit(tmp_path, adapter), [*sentences((5, 3), False, 1)]
    scores = run.influence(rows, rows, tmp_path / "scores", quiet=True, address="none").matrix()
    with pytest.raises(UserError, match="adapter default base_model"):
        _fit(tmp_path, other)
    # Another factor in the configuration is another model.
    changed = shutil.copytree(adapter, tmp_path / "changed")
    _rewrite(changed, lora_alpha=4)
    with pytest.raises(UserError, match="adapter default changed"):
        _fit(tmp_path, changed)
    with pytest.raises(UserError, match="merge-adapter was False"):
        _fit(tmp_path, adapter, merge_adapter=True)
    moved = adapter.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="Give --adapter with where it lies"):
        run.influence(rows, rows, tmp_path / "again", quiet=True, address="none")
    again = run.influence(
        rows, rows, tmp_path / "again", quiet=True, address="none", adapter=[str(moved)]
    )
    assert (again.matrix()[0] == scores[0]).all()


def test_merged_weights_are_pruned_and_saved_and_matrices_are_not(tmp_path: Path) -> None:
    adapter = make(tmp_path, "llama", target_modules=["q_proj", "down_proj"])
    run = _fit(tmp_path, adapter, merge_adapter=True)
    assert not any(".lora_" in name for name in run.block_names())
    pruned = run.prune(tmp_path / "pruned", quiet=True, address="none", sparsity=0.0)
    saved = load_file(Path(pruned.path) / "model" / "model.safetensors")
    for name, weight in theirs(tmp_path, "llama", adapter).merge_and_unload().state_dict().items():
        assert torch.equal(saved[name], weight), name
    # Where the adapter lies beside its base, what is saved is a model by itself all the same.
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / file, tmp_path / "llama")
    run = _fit(tmp_path, tmp_path / "llama", out="within", merge_adapter=True)
    again = run.prune(tmp_path / "pruned-within", quiet=True, address="none", sparsity=0.0)
    folder = Path(again.path) / "model"
    assert not [*folder.glob("adapter*")]
    for name, weight in AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        assert torch.equal(saved[name], weight), name
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "llama" / file).unlink()
    beside = _fit(tmp_path, adapter, out="beside")
    with pytest.raises(UserError, match="Fit with --merge-adapter"):
        beside.prune(tmp_path / "no", quiet=True, address="none", sparsity=0.5)


def test_a_plan_counts_an_adapters_matrices(tmp_path: Path) -> None:
    adapter = make(tmp_path, "llama", target_modules=["q_proj", "lm_head"])
    (tmp_path / "llama" / "model.safetensors").unlink()
    outline = open_outline(str(tmp_path / "llama"), adapters=Adapters((str(adapter),)))
    base = open_outline(str(tmp_path / "llama"))
    more = [
        outline.weight_bytes(range(n, n + 1), torch.float32)
        - base.weight_bytes(range(n, n + 1), torch.float32)
        for n in range(2)
    ]
    assert more == [4 * 2 * (8 + 8), 4 * 2 * (8 + 8 + 8 + VOCAB)]
    assert outline.unit_of("lm_head.lora_A.default") == 1


def test_a_classifiers_head_is_the_adapters_and_trained(tmp_path: Path) -> None:
    # PEFT saves the head whole, and puts no matrices into it though all layers are asked for.
    config = RobertaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    auto, base = AutoModelForSequenceClassification, tmp_path / "base"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto.from_config(config).save_pretrained(base)
        wanted = peft.LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
        model = peft.get_peft_model(auto.from_pretrained(base), wanted)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3 * parameter.requires_grad)
        model.save_pretrained(str(tmp_path / "adapter"))
    rows = [row | {"labels": n % 3} for n, row in enumerate(sentences((5, 2, 7, 4), False))]
    run = raycurv.fit(
        base, rows, tmp_path / "run", adapter=[tmp_path / "adapter"], stages=2, dtype="float64",
        address="none", quiet=True,
    )  # fmt: skip
    whole = peft.PeftModel.from_pretrained(
        auto.from_pretrained(base, dtype=torch.float64), str(tmp_path / "adapter")
    ).eval()
    for row, loss in zip(rows, run.examples()["loss"].to_pylist(), strict=True):
        outputs = whole(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        assert abs(-float(outputs.log_softmax(0)[row["labels"]]) - loss) < 1e-12
    head = [name for name in run.block_names() if ".lora_" not in name]
    assert head == ["classifier.dense", "classifier.out_proj"]


# Bad input


def _rewrite(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def changed(adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return changed


def _fields(**fields: Any) -> Callable[[Path], None]:
    return lambda adapter: _rewrite(adapter, **fields)


_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another kind": (_fields(peft_type="IA3"), "peft_type: expected LORA"),
    "another rank": (_fields(r=3), r"rank 2, and not 3.*Take adapter_config.json"),
    "a rank of nought": (_fields(r=0), "a rank outside 1"),
    "a rank in words": (_fields(r="2"), "what PEFT writes there"),
    "layers that are not there": (_fields(target_modules=["c_attn"]), "Target modules.*not found"),
    "fewer layers": (_fields(target_modules=["q_proj"]), "4 that have no place.*v_proj"),
    "another task": (_fields(task_type="SEQ_CLS"), r"task \('SEQ_CLS'\).*AutoModelForSeq"),
    "a task in colours": (_fields(task_type="\x1b[31mX"), r"task \('\\x1b\[31mX'\)"),
    "another class": (
        _fields(task_type=None, auto_mapping={"base_model_class": "BertModel"}),
        "one of a BertModel",
    ),
    "experts' parameters": (_fields(target_parameters=["up"]), "target_parameters.*an option"),
    "tokens": (_fields(trainable_token_indices=[1]), "trainable_token_indices.*an option"),
    "layers twice": (_fields(layer_replication=[[0, 2]]), "layer_replication.*an option"),
    "code": (
        _fields(megatron_config={"x": 1}, megatron_core="os"), "megatron_config.*an option",
    ),
    "an option of tomorrow": (_fields(use_tomorrow=True), "use_tomorrow.*an option"),
    "a changed base": (_fields(init_lora_weights="pissa"), "changes the base's weights"),
    "a slow pattern": (_fields(target_modules="(a+)+$"), "takes no long time"),
    "many repeats": (_fields(target_modules=".*" * 7), "takes no long time"),
    "many that may be missing": (_fields(target_modules=".?" * 7), "takes no long time"),
    "many of several": (_fields(exclude_modules="(.|..)" * 17), "takes no long time"),
    "a slow pattern in a comment": (
        _fields(target_modules="(?#[)(a+)+(?#])"), "takes no long time",
    ),
    "a slow pattern with spaces": (
        _fields(rank_pattern={"(?x)([a-z.]+) +": 2}), "takes no long time",
    ),
    "a missing tensor": (_tensors(lambda t: t.pop(_A)), "1 missing.*lora_A"),
    "a stranger": (_tensors(lambda t: t.update(extra=torch.ones(2))), "no place there: extra"),
    "another width": (_tensors(lambda t: t.update({_A: torch.ones(2, 9)})), r"\[2, 9\] of F32"),
    "integers": (_tensors(lambda t: t.update({_A: t[_A].to(torch.int8)})), "of I8"),
    "no number": (_tensors(lambda t: t[_A].fill_(torch.nan)), "finite weights"),
    "a pickle": (
        lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"), "a pickle",
    ),
    "no configuration": (lambda a: (a / "adapter_config.json").unlink(), "no adapter_config.json"),
    "nothing": (shutil.rmtree, "no such directory"),
    "a link": (
        lambda a: (
            (a / "adapter_config.json").rename(a.parent / "x"),
            (a / "adapter_config.json").symlink_to(a.parent / "x"),
        ),
        "a link must not lead out|link to",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    make(folder, "llama", target_modules=["q_proj", "v_proj"])
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_adapter_that_does_not_fit_is_refused(lora: Path, tmp_path: Path, mistake: str) -> None:
    change, says = MISTAKES[mistake]
    adapter = Path(shutil.copytree(lora / "adapter", tmp_path / "adapter"))
    change(adapter)
    with pytest.raises(UserError, match=f"(?i){says}") as raised:
        ours(lora, "llama", adapter).build(range(1, 2), torch.float32, CPU)
    assert raised.value.remedy and raised.value.exit_code == 2


def test_an_adapter_of_another_base_is_refused(lora: Path, tmp_path: Path) -> None:
    wide = LlamaConfig(**{**CONFIGS["llama"].to_dict(), "hidden_size": 16})
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "llama")
    _rewrite(Path(shutil.copytree(lora / "adapter", tmp_path / "adapter")),
             base_model_name_or_path="org/narrow")  # fmt: skip
    with pytest.raises(UserError, match=r"the base that it was trained on.*'org/narrow'"):
        ours(tmp_path, "llama", tmp_path / "adapter")


def test_matrices_of_other_layers_than_linear_ones_are_refused(tmp_path: Path) -> None:
    adapter = make(tmp_path, "llama", target_modules=["embed_tokens"])
    with pytest.raises(UserError, match="expected LoRA on a linear layer, got LoRA on Embedding"):
        ours(tmp_path, "llama", adapter)


def test_tied_weights_are_not_changed_at_one_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied = LlamaConfig(**{**CONFIGS["llama"].to_dict(), "tie_word_embeddings": True})
    monkeypatch.setitem(CONFIGS, "tied", tied)
    whole = make(tmp_path, "tied", "whole", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(UserError, match="the head, which is the input embedding"):
        ours(tmp_path, "tied", whole)
    beside = make(tmp_path, "tied", "beside", target_modules=["lm_head"])
    want = theirs(tmp_path, "tied", beside)(input_ids=IDS).logits
    assert torch.equal(logits(ours(tmp_path, "tied", beside)), want)
    with pytest.raises(UserError, match=r"lm_head.weight, which is model.embed_tokens.weight, too"):
        ours(tmp_path, "tied", beside, merged=True)


def test_an_adapter_lies_beside_its_base_or_is_told_from_a_model(
    lora: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="Give the directory of its base as --model"):
        open_model(str(lora / "adapter"))
    with pytest.raises(UserError, match="an --adapter to merge"):
        ours(lora, "llama", merged=True)
    with pytest.raises(UserError, match="the factory networks:adapted"):
        open_model("networks:adapted", adapters=Adapters(("x",)))
    for opened in (open_model, open_outline):
        with pytest.raises(UserError, match="an --adapter to merge"):
            opened("networks:adapted", adapters=Adapters((), True))
    both = Path(shutil.copytree(lora / "llama", tmp_path / "llama"))
    for file in (lora / "adapter").iterdir():
        shutil.copy(file, both)
    with pytest.raises(UserError, match=f"give --adapter {both} as well"):
        ours(tmp_path, "llama")
    assert torch.equal(
        logits(ours(tmp_path, "llama", both)), logits(ours(lora, "llama", lora / "adapter"))
    )


def test_without_peft_a_person_is_told_how_to_get_it(
    lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'raycurv\[adapters\]'"):
        ours(lora, "llama", lora / "adapter")
    assert ours(lora, "llama").units == 2
