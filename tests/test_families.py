"""Claims about every kind of decoder that HF has: cut between its layers it is the whole, bit for
bit, or it is refused when it is opened, with the reason; and about encoders and classifiers."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import raycurv
from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.models.opening import open_model

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from models_page import FAMILIES, PAGE, page
from tiny_families import tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("quiet_transformers")


def _saved(folder: Path, kind: str, **more: Any) -> str:
    tiny_model(tiny_config(kind, **more)).save_pretrained(folder)
    return str(folder)


def _batch(padded: bool) -> Batch:
    ids = torch.randint(3, 57, (3, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([9, 4, 7]) if padded else torch.full((3,), 9)
    mask = torch.arange(9) < lengths[:, None]
    return Batch(0, ("a", "b", "c"), torch.where(mask, ids, 0), mask)


def _logits(folder: str, batch: Batch, cuts: tuple[int, ...]) -> Tensor:
    model, hidden = open_model(folder), None
    for start, stop in itertools.pairwise(cuts):
        segment = model.build(range(start, stop), torch.float32, torch.device("cpu"))
        hidden = segment.forward(batch, hidden)
    assert hidden is not None
    return segment.head(hidden[0])


# What is particular about each: how it makes masks and positions, what its layers return, what its
# class reads off layers of other segments, what stands beside its layers.
PARTICULAR = {
    "bart": "positions looked up by a length",
    "pegasus": "positions looked up by a shape",
    "whisper": "positions looked up by hidden states",
    "xglm": "a mask of each example",
    "modernbert-decoder": "weights read off an absent embedding",
    "falcon_h1": "weights read off absent layers",
    "xlstm": "layers that return two values",
    "ctrl": "embeddings changed in place",
    "gemma3": "a vision tower",
    "gemma3n_text": "four streams, inputs of each layer, keys and values that later layers share",
    "gemma4": "a weight read off an absent embedding",
    "roformer": "sines that stand in a table",
    "openai-gpt": "layers that return lists, padding looked for among token ids",
    "zamba": "weights that layers share",
    "lfm2": "convolutions, which mix positions",
    "bert": "a head with a weight beside its parts",
}


# What attends both ways unless its configuration says that it is a decoder.
DECODERS = ("bert", "roformer")


@pytest.mark.parametrize("kind", PARTICULAR)
def test_a_cut_decoder_is_the_whole(tmp_path: Path, kind: str) -> None:
    more = {"is_decoder": True} if kind in DECODERS else {}
    folder = _saved(tmp_path / "model", kind, **more)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for padded in (False, True):
        batch = _batch(padded)
        assert batch.mask is not None
        given = {"attention_mask": batch.mask.long()} if padded else {}
        with torch.no_grad():
            expected = whole(input_ids=batch.inputs, use_cache=False, **given).logits
            one, two = (_logits(folder, batch, cuts) for cuts in ((0, 4), (0, 1, 3, 4)))
        assert torch.equal(one, two)
        live = batch.mask
        assert (one - expected)[live].abs().max() <= 1e-5 * expected.abs().max()


REFUSED = {
    "jetmoe": r"a mixture of others \(JetMoeMoA in model.layers.0.self_attention.experts\)",
    "rwkv": r"one that changes its own \(rwkv.blocks.0.attention.output.weight\)",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_cut_is_refused_with_its_reason(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=REFUSED[kind]):
        open_model(_saved(tmp_path / "model", kind))


# What runs as one stage, and why: a value between its layers, positions that are no tokens.
WHOLE = {
    "xlm": "layer 1 called with learned values (0)",
    "cpmant": "hidden states of shape [2, 35, 32] of 2 texts of 3 tokens",
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_decoder_that_cannot_be_cut_runs_as_one_stage(tmp_path: Path, kind: str) -> None:
    folder = _saved(tmp_path / "model", kind)
    model = open_model(folder)
    assert model.units == 1 and f"runs as one stage: {WHOLE[kind]}" in model.notices
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = whole(input_ids=_batch(False).inputs, use_cache=False).logits
        assert torch.equal(_logits(folder, _batch(False), (0, 1)), expected)


def test_a_vision_tower_is_not_loaded(tmp_path: Path) -> None:
    model = open_model(_saved(tmp_path / "model", "gemma3"))
    segment = model.build(range(0, 4), torch.float32, torch.device("cpu"))
    names = [name for name, _ in segment.module.named_parameters()]
    assert names and not any("vision" in name or "multi_modal" in name for name in names)


# What is particular about each, and whether it is cut.
TASKS = {
    ("bert", "SequenceClassification"): ("pools the first token, which it projects", True),
    ("distilbert", "SequenceClassification"): ("sizes of other names", True),
    ("llama", "SequenceClassification"): ("pools the last token, without padding", True),
    ("gpt2", "SequenceClassification"): (
        "pools the last token but padding, which texts hold",
        True,
    ),
    ("modernbert", "SequenceClassification"): ("a mean over tokens, windows", True),
    ("deberta-v2", "SequenceClassification"): (
        "one stage: learned positions in every layer",
        False,
    ),
    ("mpnet", "TokenClassification"): ("eager attention with a mask, a bias that travels", True),
    ("electra", "TokenClassification"): ("a narrow embedding", True),
    ("roberta", "MaskedLM"): ("positions behind padding, a tied decoder", True),
    ("albert", "MaskedLM"): ("one stage: one layer is used twice", False),
}
_MORE: dict[str, dict[str, Any]] = {
    "llama": {"pad_token_id": None},
    "gpt2": {"pad_token_id": 5},
    "modernbert": {"classifier_pooling": "mean"},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "roberta": {"pad_token_id": 1},
}
_LOSSES = {
    "SequenceClassification": raycurv.Classification(),
    "TokenClassification": raycurv.TokenClassification(),
    "MaskedLM": raycurv.MaskedLM(),
}


@pytest.mark.parametrize("kind, head", TASKS)
def test_a_text_is_what_it_is_alone_without_padding(tmp_path: Path, kind: str, head: str) -> None:
    made = getattr(transformers, f"AutoModelFor{head}")
    config = tiny_config(kind, num_labels=4, **_MORE.get(kind, {}))
    torch.manual_seed(0)
    whole = made.from_config(config)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    whole.save_pretrained(tmp_path)
    whole = made.from_pretrained(tmp_path, dtype=torch.float64).eval()
    batch, model = _batch(True), open_model(str(tmp_path))
    assert batch.mask is not None and (model.units > 1) == TASKS[kind, head][1]
    batch.inputs[0, -1] = batch.inputs[2, 6] = 5  # the last of two texts: padding of gpt2's
    lengths = batch.tokens().tolist()
    pooled = head == "SequenceClassification"
    labels = torch.tensor([3, 0, 2]) if pooled else torch.randint(4, (3, 9))
    if not pooled:
        labels = torch.where(batch.mask & (torch.rand(3, 9) < 0.7), labels, -100)
        batch = replace(batch, labels=labels.clamp_min(0), loss_mask=labels >= 0)
    batch = replace(batch, labels=labels) if pooled else batch
    own = [labels[n : n + 1] if pooled else labels[n : n + 1, :t] for n, t in enumerate(lengths)]
    with torch.no_grad():
        alone = [
            whole(batch.inputs[n : n + 1, :length], labels=own[n])
            for n, length in enumerate(lengths)
        ]
    for cuts in {(0, model.units), tuple(sorted({0, 1, model.units}))}:
        hidden = None
        for start, stop in itertools.pairwise(cuts):
            segment = model.build(range(start, stop), torch.float64, torch.device("cpu"))
            hidden = segment.forward(batch, hidden)
        assert hidden is not None
        outputs = segment.head(hidden[0], batch)
        losses = _LOSSES[head].loss(outputs, batch)
        for n, (length, one) in enumerate(zip(lengths, alone, strict=True)):
            got = outputs[n] if pooled else outputs[n, :length]
            assert (got - one.logits[0]).abs().max() <= 1e-10 * one.logits.abs().max()
            count = 1 if pooled else int((labels[n] >= 0).sum())
            # DeBERTa's own loss is of float32.
            assert abs(float(losses[n] - count * one.loss)) <= 1e-6 * float(losses[n])
    # The control: a text that sees its padding is another one.
    seen = replace(batch, mask=torch.ones_like(batch.mask))
    segment = model.build(range(model.units), torch.float64, torch.device("cpu"))
    other = segment.head(segment.forward(seen, None)[0], seen)[1]
    other = other if pooled else other[: lengths[1]]
    assert (other - alone[1].logits[0]).abs().max() > 1e-6


# ---- The page of models -----------------------------------------------------------------------


def models_page() -> str:
    """``docs/models.md``, from what was found of all types and the tables of the tests."""
    import test_experts
    import test_image_models
    import test_model
    import test_seq2seq

    here = "tests/test_families.py"
    tested = {make().model_type: "tests/test_model.py" for make in test_model.FAMILIES.values()}
    tested |= dict.fromkeys(test_experts.FAMILIES, "tests/test_experts.py")
    tested |= dict.fromkeys([*PARTICULAR, *WHOLE, *REFUSED], here)
    others = [[task, kind, "any" if TASKS[kind, task][1] else "one", here] for kind, task in TASKS]
    others += [
        ["ImageClassification", kind, "one", "tests/test_image_models.py"]
        for kind in test_image_models.FAMILIES
    ]
    others += [
        ["ConditionalGeneration", kind, "one", "tests/test_seq2seq.py"]
        for kind in test_seq2seq.FAMILIES
    ]
    return page(tested, others)


def test_the_page_of_models_is_what_was_found_and_what_tests_try() -> None:
    assert PAGE.read_text() == models_page(), "python benchmarks/models_page.py"
    found = {row["kind"]: row for row in json.loads(FAMILIES.read_text())}
    kinds = {kind if kind not in DECODERS else f"{kind} (is_decoder)" for kind in PARTICULAR}
    assert all(found[kind]["outcome"] == "right" and found[kind]["units"] > 1 for kind in kinds)
    assert all(found[kind]["outcome"] == "refused" for kind in REFUSED)
