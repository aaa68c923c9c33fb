"""Claims about quantised checkpoints: they are the model that their numbers and scales make."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import raycurv
from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.models import dequantised
from raycurv.models.config_print import config_changes
from raycurv.models.dequantised import DequantisedCheckpoint
from raycurv.models.model import Model
from raycurv.models.opening import open_model, open_outline
from raycurv.models.pieces import Place
from raycurv.models.quantisation import Quantisation

pytestmark = pytest.mark.usefixtures("quiet_transformers")
torch.set_num_threads(1)

CPU = torch.device("cpu")
E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
# No multiple of the cells' sides: some cells are cut off at the ends.
SMALL: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """A way to store a weight, by the straightest code.

    Attributes:
        said: the ``quantization_config``.
        cell: rows and columns that share a scale; 0 for all.
        kind: dtype of the numbers, or how many bits of packed ones.
        scale: behind the name of the weight for that of its scales.
        as_scales: what is stored of scales ``[r, c]``.
        zeros: whether there are zero points.
    """

    said: dict[str, Any]
    cell: tuple[int, int]
    kind: torch.dtype | int = E4M3
    scale: str = "_scale_inv"
    as_scales: Callable[[Tensor], Tensor] = field(default=lambda s: s)
    zeros: bool = False

    def quantise(self, name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The tensors that stand for a weight ``[R, C]``, and what they stand for in float32."""
        packed = isinstance(self.kind, int)
        most = 2.0 ** (self.kind - 1) - 1 if packed else 127 if self.kind == torch.int8 else 448.0
        m, n = (a or b for a, b in zip(self.cell, weight.shape, strict=True))
        grid = math.ceil(weight.shape[0] / m), math.ceil(weight.shape[1] / n)
        scales, zeros, made = torch.ones(grid), torch.zeros(grid), torch.zeros_like(weight)
        numbers = torch.zeros(weight.shape)
        for r, c in itertools.product(*map(range, grid)):
            here = slice(r * m, (r + 1) * m), slice(c * n, (c + 1) * n)
            # Powers of two, which every dtype of scales holds, but for the plain case.
            scale = weight[here].abs().max() / most
            scales[r, c] = scale if self.as_scales is plain else 2.0 ** scale.log2().ceil()
            zeros[r, c] = (r + 2 * c) % 3 - 1 if self.zeros else 0
            q = weight[here] / scales[r, c] + zeros[r, c]
            q = q.to(self.kind).float() if self.kind == E4M3 else q.round().clamp(-most - 1, most)
            numbers[here] = q
            made[here] = (q - zeros[r, c]) * scales[r, c]
        tensors = {f"{name}{self.scale}": self.as_scales(scales)}
        if packed:
            tensors[f"{name}_packed"] = packed_rows(numbers, self.kind)
            tensors[f"{name}_shape"] = torch.tensor(weight.shape)
        else:
            tensors[name] = numbers.to(self.kind)
        if self.zeros:
            asked = packed_rows(zeros.T, self.kind).T if packed else zeros.to(torch.int8)
            tensors[f"{name}_zero_point"] = asked.contiguous()
        return tensors, made


def plain(scales: Tensor) -> Tensor:
    return scales


def packed_rows(numbers: Tensor, bits: int) -> Tensor:
    """Each row as one long number of Python's, cut into words of 32 bits."""
    words = []
    for row in numbers.int().tolist():
        long = sum((q + 2 ** (bits - 1)) << (bits * i) for i, q in enumerate(row))
        count = math.ceil(len(row) * bits / 32)
        words.append([(long >> (32 * i)) & 0xFFFFFFFF for i in range(count)])
    return torch.tensor(words).to(torch.uint32).view(torch.int32)


def fp8(**more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", **more}


def compressed(stored: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": stored, "ignore": ["lm_head"],
        "config_groups": {"group_0": group}, "quantization_status": "compressed",
    }  # fmt: skip


def _float(**more: Any) -> dict[str, Any]:
    return compressed("float-quantized", num_bits=8, type="float", symmetric=True, **more)


def _int(stored: str, bits: int = 8, **more: Any) -> dict[str, Any]:
    return compressed(stored, num_bits=bits, type="int", **more)


FORMATS = {
    "fp8 blocks": Format(fp8(weight_block_size=[16, 16]), (16, 16), as_scales=plain),
    "fp8 oblong blocks": Format(fp8(weight_block_size=[16, 8]), (16, 8), as_scales=plain),
    "fp8 of the whole": Format(
        fp8(weight_block_size=None), (0, 0), as_scales=lambda s: s.reshape(())
    ),
    "fp8 without a block size": Format(fp8(), (0, 0), scale="_scale", as_scales=lambda s: s[0]),
    "fp8 exponents": Format(
        fp8(weight_block_size=[16, 16], scale_fmt="ue8m0"), (16, 16), as_scales=lambda s: s.to(E8M0)
    ),
    "mxfp8": Format(
        fp8(quant_method="mxfp8", weight_block_size=[1, 32]), (1, 32),
        as_scales=lambda s: (s.log2() + 127).to(torch.uint8),
    ),
    "fbgemm": Format({"quant_method": "fbgemm_fp8"}, (1, 0), scale="_scale", as_scales=plain),
    "compressed fp8 channels": Format(
        _float(strategy="channel"), (1, 0), scale="_scale", as_scales=lambda s: s.bfloat16()
    ),
    "compressed fp8 of the whole": Format(
        _float(strategy="tensor"), (0, 0), scale="_scale", as_scales=lambda s: s[0].half()
    ),
    "compressed fp8 blocks": Format(
        _float(strategy="block", block_structure=[16, 16]), (16, 16), scale="_scale",
        as_scales=plain,
    ),
    "compressed bytes": Format(
        _int("int-quantized", strategy="channel"), (1, 0), torch.int8, "_scale", plain
    ),
    "compressed bytes with zeros": Format(
        _int("int-quantized", strategy="channel", symmetric=False), (1, 0), torch.int8, "_scale",
        plain, True,
    ),
    "packed 4 bits": Format(
        _int("pack-quantized", 4, strategy="group", group_size=8), (1, 8), 4, "_scale",
        lambda s: s.bfloat16(),
    ),
    "packed 4 bits with zeros": Format(
        _int("pack-quantized", 4, strategy="group", group_size=8, symmetric=False), (1, 8), 4,
        "_scale", plain, True,
    ),
    "packed 3 bits": Format(
        _int("pack-quantized", 3, strategy="channel"), (1, 0), 3, "_scale", plain
    ),
    "packed 8 bits": Format(
        _int("pack-quantized", 8, strategy="channel"), (1, 0), 8, "_scale", plain
    ),
}  # fmt: skip
BLOCKS = FORMATS["fp8 blocks"]
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(folder)
    return folder


def quantised_and_copy(llama: Path, folder: Path, form: Format) -> tuple[Path, Path]:
    """A checkpoint with quantised linear layers, and a copy of it in floating point."""
    both = folder / "quantised", folder / "copy"
    stored, made = load_file(llama / "model.safetensors"), {}
    for name in [
        name for name in stored if re.search(r"1\.self_attn\..*proj\.weight|up_proj\.weight", name)
    ]:
        tensors, made[name] = form.quantise(name, stored.pop(name))
        stored |= tensors
    for place, tensors in zip(both, (stored, stored | made), strict=True):
        shutil.copytree(llama, place)
        kept = tensors if place == both[0] else {k: tensors[k] for k in load_file(llama / FILE)}
        save_file(kept, place / FILE, {"format": "pt"})
    _config(both[0], quantization_config=form.said)
    return both


FILE = "model.safetensors"


@pytest.fixture
def own(llama: Path, tmp_path: Path) -> Path:
    return quantised_and_copy(llama, tmp_path, BLOCKS)[0]


def _config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _change(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, {"format": "pt"})


def _tensors(folder: Path) -> dict[str, Tensor]:
    return _built(open_model(str(folder)), range(2), torch.float32)


def _built(model: Model, units: range, dtype: torch.dtype) -> dict[str, Tensor]:
    return dict(model.build(units, dtype, CPU).module.state_dict())


def _logits(folder: Path, dtype: torch.dtype, cuts: tuple[int, ...]) -> Tensor:
    ids = torch.arange(14).reshape(2, 7)
    model, hidden = open_model(str(folder)), None
    for start, stop in itertools.pairwise(cuts):
        segment = model.build(range(start, stop), dtype, CPU)
        hidden = segment.forward(Batch(0, ("a", "b"), ids, torch.ones(2, 7).bool()), hidden)
    assert hidden is not None
    return segment.head(hidden[0])


@pytest.mark.parametrize("form", FORMATS)
def test_a_quantised_checkpoint_is_its_copy_in_floating_point(
    llama: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dequantised, "_STRIP", 100)  # some rows at a time, no whole cells
    models = [
        open_model(str(folder)) for folder in quantised_and_copy(llama, tmp_path, FORMATS[form])
    ]
    for units, dtype in ((range(2), torch.float32), (range(1, 2), torch.bfloat16)):
        mine, expected = (_built(model, units, dtype) for model in models)
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[name], expected[name]) for name in mine)
    told = " ".join(models[0].notices)
    assert f"dequantised from {FORMATS[form].said['quant_method']} on loading (6 of" in told


def test_logits_of_stages_equal_those_of_the_copy(llama: Path, tmp_path: Path) -> None:
    own, copy = quantised_and_copy(llama, tmp_path, BLOCKS)
    assert open_outline(str(own)).units == 2
    for dtype in (torch.float32, torch.bfloat16):
        expected = _logits(copy, dtype, (0, 2))
        assert torch.equal(_logits(own, dtype, (0, 2)), expected)
        assert torch.equal(_logits(own, dtype, (0, 1, 2)), expected)
    _change(own, lambda w: w[f"{WEIGHT}_scale_inv"].mul_(1.25))
    assert not torch.equal(_logits(own, torch.bfloat16, (0, 2)), expected)


def test_a_fit_is_that_of_the_copy(llama: Path, tmp_path: Path) -> None:
    own, copy = quantised_and_copy(llama, tmp_path, BLOCKS)
    rows = [{"input_ids": list(range(n, n + 6))} for n in range(4)]
    runs = [
        raycurv.fit(
            str(folder), rows, str(tmp_path / f"run-{n}"), address="none", stages=2,
            dtype="float64", blocks=["model.layers.*.mlp"], quiet=True,
        )
        for n, folder in enumerate((own, copy))
    ]  # fmt: skip
    traces = [run.blocks().column("trace").to_pylist() for run in runs]
    assert traces[0] == traces[1] and len(traces[0]) == 6
    facts = json.loads((tmp_path / "run-0" / "run.json").read_text())["facts"]
    assert "dequantised" in " ".join(facts["model_notes"])


def test_transformers_make_the_same_of_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = Fp8Dequantize(SimpleNamespace())
    tensors, made = BLOCKS.quantise("a.weight", torch.randn(64, 32))
    stack = torch.randn(3, 16, 32).to(E4M3), torch.rand(3, 1, 2)
    blocks = torch.randint(256, (3, 6, 2, 16), dtype=torch.uint8)
    exponents = torch.randint(100, 150, (3, 6, 2), dtype=torch.uint8)
    tensors |= {"experts.up": stack[0], "experts.up_scale_inv": stack[1]}
    save_file(tensors, tmp_path / FILE)
    checkpoint = _checkpoint(tmp_path, BLOCKS.said)
    mine, theirs = checkpoint.read("a.weight"), dense._dequantize_one(
        tensors["a.weight"], tensors["a.weight_scale_inv"], torch.float32
    )  # fmt: skip
    assert torch.equal(mine, theirs) and torch.equal(mine, made)
    column = checkpoint.read_part(Place("a.weight", (64, 32), 5, (64,), (32,)))
    assert torch.equal(column, made[:, 5])
    theirs = dense._dequantize_one(*stack, torch.float32)
    assert torch.equal(checkpoint.read("experts.up"), theirs)
    save_file({"experts.up_blocks": blocks, "experts.up_scales": exponents}, tmp_path / FILE)
    checkpoint = _checkpoint(tmp_path, {"quant_method": "mxfp4"})
    for dtype in (torch.float32, torch.bfloat16):
        theirs = convert_moe_packed_tensors(blocks, exponents, dtype=dtype)
        assert torch.equal(checkpoint.read("experts.up", dtype), theirs)


def test_experts_of_quantised_checkpoints_are_those_of_copies(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "num_experts_per_tok": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    small = transformers.Qwen3MoeConfig(**sizes, num_experts=3, moe_intermediate_size=20)
    base = tmp_path / "qwen"
    transformers.Qwen3MoeForCausalLM(small).save_pretrained(base)
    own, copy = quantised_and_copy(base, tmp_path, BLOCKS)
    assert any(".experts.2.up_proj.weight_scale_inv" in key for key in load_file(own / FILE))
    for cuts in ((0, 2), (0, 1, 2)):
        assert torch.equal(*(_logits(folder, torch.float32, cuts) for folder in (own, copy)))

    oss = transformers.GptOssConfig(**sizes, num_local_experts=3, intermediate_size=32)
    transformers.GptOssForCausalLM(oss).save_pretrained(tmp_path / "oss")
    stored = load_file(tmp_path / "oss" / FILE)
    for key in [key for key in stored if key.endswith("_proj")]:
        experts, columns, rows = stored.pop(key).shape
        shape = (experts, rows, columns // 32)
        stored[f"{key}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8)
        stored[f"{key}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8)
    save_file(stored, tmp_path / "oss" / FILE, {"format": "pt"})
    _config(tmp_path / "oss", quantization_config={"quant_method": "mxfp4"})
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "oss", quantization_config=transformers.Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16,
    )  # fmt: skip
    # The remedy of formats that are not understood: a copy in floating point.
    whole.save_pretrained(tmp_path / "plain", save_original_format=False)
    for cuts in ((0, 2), (0, 1, 2)):
        mine, theirs = (_logits(tmp_path / n, torch.bfloat16, cuts) for n in ("oss", "plain"))
        assert torch.equal(mine, theirs)


def _checkpoint(folder: Path, said: Any) -> DequantisedCheckpoint:
    quantisation = Quantisation.of({"quantization_config": said}, "config.json")
    assert quantisation is not None
    return DequantisedCheckpoint(folder, quantisation)


def test_groups_of_compressed_tensors_are_told_apart_by_name(tmp_path: Path) -> None:
    said = _int("pack-quantized", 4, strategy="group", group_size=8)
    narrow = said["config_groups"]["group_0"]
    wide = {"targets": [r"re:.*\.down$"], "weights": narrow["weights"] | {"num_bits": 8}}
    said["config_groups"]["group_1"] = wide
    tensors, made = {}, {}
    for name, bits in (("a.up.weight", 4), ("a.down.weight", 8)):
        form = Format(said, (1, 8), bits, "_scale")
        parts, made[name] = form.quantise(name, torch.randn(4, 16))
        tensors |= parts
    save_file(tensors, tmp_path / FILE)
    checkpoint = _checkpoint(tmp_path, said)
    assert all(torch.equal(checkpoint.read(name), made[name]) for name in made)
    wide["targets"] = ["Linear"]
    with pytest.raises(UserError, match=r"one group .* for a\.(up|down), got 2 that differ"):
        _checkpoint(tmp_path, said)


def test_scales_of_activations_are_told_and_left(own: Path) -> None:
    before = _tensors(own)
    scales = {f"model.layers.{n}.self_attn.k_scale": torch.ones(1) for n in range(2)}
    _change(own, lambda w: w.update(scales))
    assert "model.layers.{0..1}.self_attn.k_scale" in open_model(str(own)).notices[-1]
    after = _tensors(own)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_fingerprint_is_of_numbers_and_of_scales(own: Path) -> None:
    before = open_model(str(own)).fingerprint()
    assert before[WEIGHT]["dtype"] == "float8_e4m3fn"
    _change(own, lambda w: w[f"{WEIGHT}_scale_inv"].mul_(1.25))
    after = open_model(str(own)).fingerprint()
    assert [name for name in before if before[name] != after[name]] == [f"{WEIGHT}_scale_inv"]


def test_a_configuration_says_how_numbers_are_dequantised(own: Path) -> None:
    # As many cells of other sides: the same tensors make other weights.
    before, weights = open_model(str(own)), _tensors(own)
    _config(own, quantization_config=fp8(weight_block_size=[14, 16]))
    after = open_model(str(own))
    assert after.fingerprint() == before.fingerprint()
    assert not torch.equal(_tensors(own)[WEIGHT], weights[WEIGHT])
    (said,) = config_changes(before.configuration(), after.configuration())
    assert said == "quantization_config.weight_block_size was [16, 16] and is now [14, 16]"


def test_a_quantised_checkpoint_cannot_be_saved_with_other_weights(own: Path) -> None:
    with pytest.raises(UserError, match=r"quantised ones.*dequantize=True.*save_original_format"):
        open_model(str(own)).files()


def _scale(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    key = f"{WEIGHT}_scale_inv"
    return lambda w: w.update({key: change(w[key])})


def _with(value: float) -> Callable[[Tensor], Tensor]:
    def changed(scales: Tensor) -> Tensor:
        scales[1, 0] = value
        return scales

    return changed


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], tuple[str, ...]]] = {
    "no scales": (lambda w: w.pop(f"{WEIGHT}_scale_inv"), (WEIGHT, "scale", "none")),
    "two of scales": (lambda w: w.update({f"{WEIGHT}_scale": torch.ones(1)}), (WEIGHT, " and ")),
    "one scale less": (_scale(lambda s: s[1:].contiguous()), ("_scale_inv", "[3, 2]", "[2, 2]")),
    "one for all": (_scale(lambda s: s[0, 0].clone()), ("_scale_inv", "[3, 2]")),
    "transposed": (_scale(lambda s: s.T.contiguous()), ("_scale_inv", "[3, 2]", "[2, 3]")),
    "whole numbers": (_scale(lambda s: s.to(torch.int32)), ("_scale_inv", "I32")),
    "zero": (_scale(_with(0.0)), ("_scale_inv", "not zero")),
    "infinite": (_scale(_with(math.inf)), ("_scale_inv", "finite")),
    "no matrix": (lambda w: w.update({WEIGHT: w[WEIGHT][0].clone()}), (WEIGHT, "matrix")),
    "4 bits in bytes": (lambda w: w.update({WEIGHT: w[WEIGHT].view(torch.int8)}), (WEIGHT, "4 b")),
    "another shape": (
        lambda w: w.update({WEIGHT: w[WEIGHT].T.contiguous()}), ("_scale_inv", "[2, 3]"),
    ),
    "NaN": (lambda w: w[WEIGHT].view(torch.uint8)[0].fill_(127), (WEIGHT, "NaN")),
    "a scale beside nothing": (
        lambda w: w.update({"model.norm.weight_scale_inv": torch.ones(1, 1)}),
        ("model.norm.weight_scale_inv", "quantised"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_belong_to_its_numbers_is_named(own: Path, case: str) -> None:
    change, says = WRONG[case]
    _change(own, change)
    with pytest.raises(UserError) as caught:
        _tensors(own)
    assert all(text in str(caught.value) for text in says), str(caught.value)


def test_a_zero_scale_of_zeros_is_a_zero(own: Path) -> None:
    def emptied(tensors: dict[str, Tensor]) -> None:
        tensors[WEIGHT].view(torch.uint8)[16:32, :16] = 0
        tensors[f"{WEIGHT}_scale_inv"][1, 0] = 0.0

    _change(own, emptied)
    assert not _tensors(own)[WEIGHT][16:32, :16].any()


def _packed_wrong() -> Iterator[tuple[str, Callable[[dict[str, Tensor]], object], str]]:
    yield "_shape", lambda w: w.pop(f"{WEIGHT}_shape"), "its shape"
    yield "_shape", lambda w: w[f"{WEIGHT}_shape"].add_(8), "32-bit words"
    yield "_zero_point", lambda w: w.pop(f"{WEIGHT}_zero_point"), "zero points"
    yield "_zero_point", lambda w: w.update({f"{WEIGHT}_zero_point": torch.ones(2, 2)}), "shape"
    yield "_g_idx", lambda w: w.update(_groups(w, lambda n: n.flip(0))), "another order"


def _groups(
    tensors: dict[str, Tensor], order: Callable[[Tensor], Tensor] = lambda n: n
) -> dict[str, Tensor]:
    """The group of each column, in some order."""
    columns, scales = tensors[f"{WEIGHT}_shape"][1], tensors[f"{WEIGHT}_scale"].shape[1]
    numbers = torch.arange(int(columns), dtype=torch.int32) // (int(columns) // scales)
    return {f"{WEIGHT}_g_idx": order(numbers).contiguous()}


def test_packed_numbers_lack_nothing(llama: Path, tmp_path: Path) -> None:
    own, _ = quantised_and_copy(llama, tmp_path, FORMATS["packed 4 bits with zeros"])
    whole = (own / FILE).read_bytes()
    for key, change, says in _packed_wrong():
        (own / FILE).write_bytes(whole)
        _change(own, change)
        with pytest.raises(UserError, match=says) as caught:
            open_model(str(own))
        assert f"{WEIGHT}{key}" in str(caught.value)
    (own / FILE).write_bytes(whole)
    for order in (lambda n: n, lambda n: n - 99):
        _change(own, lambda w, order=order: w.update(_groups(w, order)))
        assert any("g_idx" in notice for notice in open_model(str(own)).notices)


def _group(**changed: Any) -> dict[str, Any]:
    said = _int("pack-quantized", 4, strategy="group", group_size=8)
    said["config_groups"]["group_0"]["weights"] |= changed
    return said


REFUSED: dict[str, tuple[Any, str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quantised from"),
    "awq": ({"quant_method": "awq", "bits": 4}, "quantised from"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "model.dequantize()"),
    "no method": ({"bits": 4}, "quant_method"),
    "text": ("int8", "'int8'"),
    "bitmask": (
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        "CompressedTensorsConfig(dequantize=True)",
    ),
    "nvfp4": (compressed("nvfp4-pack-quantized"), "nvfp4-pack-quantized"),
    "4 bits of floating point": (_group(type="float"), "'float' in 4 bits"),
    "many bits": (_group(num_bits=16), "16 bits"),
    "bits of no number": (_group(num_bits=[4]), "[4]"),
    "columns in another order": (_group(actorder="group"), "actorder"),
    "another strategy": (_group(strategy="tensor_group"), "tensor_group"),
    "no group size": (_group(group_size=None), "group_size"),
    "a bad block": (_float(strategy="block", block_structure="16x0"), "block_structure"),
    "a bad pattern": (
        _int("pack-quantized") | {"config_groups": {"a": {"targets": ["re:("], "weights": {}}}},
        "targets",
    ),
    "a slow pattern": (
        _int("pack-quantized") | {
            "config_groups": {"a": {"targets": ["re:(a+)+$"], "weights": {}}}
        },
        "targets",
    ),
    "a rotation": (_group() | {"transform_config": {"a": 1}}, "transform_config"),
    "a bad size": (fp8(weight_block_size=[128]), "weight_block_size"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_with_a_way_out(own: Path, case: str) -> None:
    said, says = REFUSED[case]
    _config(own, quantization_config=said)
    with pytest.raises(UserError) as caught:
        open_model(str(own))
    assert says in str(caught.value) and caught.value.remedy, str(caught.value)
    assert len(str(caught.value)) < 800


DENSE = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
FLOATING: dict[str, Any] = {
    "empty": {},
    "none": None,
    "sparse": DENSE | {"sparsity_config": {"format": "dense"}},
    "frozen": {"quant_method": "compressed-tensors", "quantization_status": "frozen"},
    "of activations alone": DENSE | {"config_groups": {"group_0": {"weights": None}}},
}


@pytest.mark.parametrize("case", FLOATING)
def test_a_description_of_nothing_quantised_is_none(llama: Path, tmp_path: Path, case: str) -> None:
    own = Path(shutil.copytree(llama, tmp_path / "model"))
    _config(own, quantization_config=FLOATING[case])
    model = open_model(str(own))
    assert model.units == 2 and not any("dequantised" in note for note in model.notices)
    assert model.files()
