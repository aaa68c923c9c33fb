"""Claims about encoders with a decoder: they are run as transformers train them, on sources and
targets, whatever goes into a microbatch together."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from byte_tokenizer import BOS, EOS, VOCAB, byte_ids, save_byte_tokenizer
from torch import Tensor, nn

import raycurv
from raycurv.batch import Batch
from raycurv.data.examples import Example, examples_to_table, table_to_examples
from raycurv.data.microbatch import make_batch
from raycurv.data.reading import ExampleReader
from raycurv.data.tokenizer import LazyTokenizer
from raycurv.errors import UserError
from raycurv.mathematics.loss.objective import Seq2SeqLM
from raycurv.models.opening import open_model, open_outline

pytestmark = pytest.mark.usefixtures("quiet_transformers")
torch.set_num_threads(1)

SMALL: dict[str, Any] = {"vocab_size": VOCAB}
T5: dict[str, Any] = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    **SMALL,
}
BART: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "max_position_embeddings": 32, **SMALL,
}  # fmt: skip
PAD = VOCAB - 1
# How each is particular: positions, what begins a target, what is tied, biases behind the head.
FAMILIES: dict[str, Callable[[], Any]] = {
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(decoder_start_token_id=0, **T5)
    ),
    "mt5": lambda: transformers.MT5ForConditionalGeneration(
        transformers.MT5Config(decoder_start_token_id=0, tie_word_embeddings=False, **T5)
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
    "mbart": lambda: transformers.MBartForConditionalGeneration(transformers.MBartConfig(**BART)),
    "marian": lambda: transformers.MarianMTModel(
        transformers.MarianConfig(pad_token_id=PAD, decoder_start_token_id=PAD, **BART)
    ),
    "pegasus": lambda: transformers.PegasusForConditionalGeneration(
        transformers.PegasusConfig(**BART)
    ),
}
# Sources and targets of all lengths; some as long as each other.
LENGTHS = ((5, 3), (3, 5), (4, 4), (6, 2), (2, 6), (5, 5))


def _rows() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = [
        {"id": f"r{n}", "input_ids": rng.integers(3, 250, a).tolist(),
         "labels": rng.integers(3, 250, b).tolist()}
        for n, (a, b) in enumerate(LENGTHS)
    ]  # fmt: skip
    rows[1]["labels"][2] = -100
    return rows


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def save(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            FAMILIES[kind]().save_pretrained(made[kind])
        return made[kind]

    return save


def _loaded(folder: Path) -> nn.Module:
    auto = transformers.AutoModelForSeq2SeqLM
    return auto.from_pretrained(folder, dtype=torch.float64).eval()  # type: ignore[no-any-return]


def _read(rows: list[dict[str, Any]], **settings: Any) -> list[Example]:
    given = {"tokenizer": None, "vocab_size": VOCAB, "max_positions": None} | settings
    reader = ExampleReader(
        rows, token_inputs=True, per_token=True, shift=0, reads="sources", **given
    )
    return list(reader.examples())


def _batch(rows: list[dict[str, Any]]) -> Batch:
    return make_batch(0, _read(rows), torch.float64)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_microbatch_has_the_logits_of_each_example_alone(
    saved: Callable[[str], Path], kind: str
) -> None:
    folder, rows = saved(kind), _rows()
    whole = _loaded(folder)
    # As another process has it.
    model = pickle.loads(pickle.dumps(open_model(str(folder))))
    segment = model.build(range(1), torch.float64, torch.device("cpu"))
    batch = _batch(rows)
    with torch.no_grad():
        (left,) = segment.forward(batch, None)
        parts = [segment.head(left[:, start : start + 4], batch) for start in (0, 4)]
        logits = torch.cat(parts, dim=1)
        for n, row in enumerate(rows):
            given = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
            expected = whole(**given).logits[0]
            found = logits[n, : len(expected)]
            assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
            loss = whole(**given).loss * (given["labels"] != -100).sum()
            mine = Seq2SeqLM().loss(logits[n : n + 1, : len(expected)], _targets(batch, n))
            assert float(mine) == pytest.approx(float(loss), rel=1e-12)
    # Without its mask, the padding of a source is read.
    assert batch.source_mask is not None
    unmasked = Batch(0, batch.ids, batch.inputs, batch.mask, source=batch.source,
                     source_mask=torch.ones_like(batch.source_mask))  # fmt: skip
    with torch.no_grad():
        (other,) = segment.forward(unmasked, None)
    assert (other - left)[batch.mask].abs().max() > 1e-6


def _targets(batch: Batch, n: int) -> Batch:
    one = batch.part([n], int(batch.tokens()[n]))
    counts = one.mask if one.loss_mask is None else one.loss_mask
    return Batch(0, one.ids, one.inputs, one.mask, labels=one.inputs, loss_mask=counts)


def test_curvature_and_scores_are_of_the_gradients_that_autograd_gives(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, rows = saved("t5"), _rows()
    settings: dict[str, Any] = {"address": "none", "dtype": "float64", "quiet": True}
    run = raycurv.fit(
        str(folder), rows, str(tmp_path / "run"), fisher="empirical", batch_tokens=30, **settings
    )
    whole, blocks = _loaded(folder), run.blocks().to_pylist()
    gradients: dict[str, list[Tensor]] = {block["module"]: [] for block in blocks}
    for row in rows:
        whole.zero_grad()
        labels = torch.tensor([row["labels"]])
        loss = whole(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
        (loss * (labels != -100).sum()).backward()
        for name, found in gradients.items():
            found.append(whole.get_submodule(name).weight.grad.clone())
    # Six linear layers in each of an encoder's layers, ten in each of a decoder's.
    assert len(blocks) == 2 * 6 + 2 * 10
    sources, targets = (sum(column) for column in zip(*LENGTHS, strict=True))
    for block in blocks:
        name = block["module"]
        mean = sum(float(g.square().sum()) for g in gradients[name]) / len(rows)
        assert block["trace"] == pytest.approx(mean, rel=1e-10)
        of_sources = name.startswith("encoder") or name.endswith(
            ("EncDecAttention.k", "EncDecAttention.v")
        )
        assert block["tokens"] == (sources if of_sources else targets), name
    plain = raycurv.fit(str(folder), rows, str(tmp_path / "plain"), method="identity", **settings)
    scores = plain.influence(
        rows[:2], rows, str(tmp_path / "scores"), rank="full", address="none", quiet=True
    )
    for found in scores.table().to_pylist():
        pair = [int(found[key][1:]) for key in ("query_id", "train_id")]
        exact = sum(float((g[pair[0]] * g[pair[1]]).sum()) for g in gradients.values())
        assert found["score"] == pytest.approx(exact, rel=1e-9)


def test_a_pair_with_another_source_is_another_example(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = _rows()
    other = [rows[0] | {"input_ids": [9, 9, 9]}]
    how: dict[str, Any] = {"keep_sums": True, "address": "none", "quiet": True}
    without = tmp_path / "without"
    runs = [
        raycurv.fit(saved("t5"), data, tmp_path / str(n), **how)
        for n, data in enumerate((rows, rows[:1], other))
    ]
    with pytest.raises(UserError, match=r"'r0'.*the same content"):
        runs[0].subtract(runs[2], out=without, **how)
    left = runs[0].subtract(runs[1], out=without, **how)
    assert left.manifest.facts["examples"] == len(rows) - 1


def test_sources_and_targets_are_never_as_long_as_each_other() -> None:
    batch = _batch(_rows()[2:])
    assert batch.source is not None and batch.source_mask is not None and batch.mask is not None
    assert batch.inputs.shape[1] == 6 and batch.source.shape[1] == 7
    for part in (batch.part([0]), batch.part([0, 3], 4), batch.part([3, 0])):
        assert part.source is not None and part.source_mask is not None
        assert part.source.shape[1] != part.inputs.shape[1]
        assert part.mask_of(torch.zeros(part.size, part.source.shape[1], 5)) is part.source_mask
        assert part.mask_of(torch.zeros(part.inputs.numel(), 5)) is part.mask
        assert part.mask_of(part.source) is part.source_mask


def test_examples_are_stored_whole() -> None:
    examples = _read(_rows())
    again = table_to_examples(examples_to_table(examples))
    assert all(np.array_equal(a.source, b.source) for a, b in zip(examples, again, strict=True))
    assert [one.positions for one in again] == [a + b for a, b in LENGTHS]


def _sides(example: Example) -> tuple[list[int], list[int], list[bool] | None]:
    assert example.source is not None and example.input_ids is not None
    counts = None if example.loss_mask is None else example.loss_mask.tolist()
    return example.source.tolist(), example.input_ids.tolist(), counts


def test_the_columns_of_sources_and_targets(tmp_path: Path) -> None:
    tokenizer = LazyTokenizer(save_byte_tokenizer(tmp_path, "<s> $A </s>"))
    source, target = [BOS, *byte_ids("ab"), EOS], [BOS, *byte_ids("c"), EOS]
    for row in ({"text": "ab", "target": "c"}, {"prompt": "ab", "completion": "c"}):
        (example,) = _read([row], tokenizer=tokenizer)
        assert _sides(example) == (source, target, None)
    padded = {"input_ids": [0, 7, 8], "attention_mask": [0, 1, 1], "labels": [5, -100, 6, -100]}
    assert _sides(_read([padded])[0]) == ([7, 8], [5, 0, 6], [True, False, True])
    short = _read([padded], max_length=1, long="truncate")[0]
    assert _sides(short) == ([7], [5], None)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a mask of the loss": ({"loss_mask": [1, 1]}, {}, "`loss_mask`"),
    "no target": ({"labels": [-100]}, {}, "`labels`, got none"),
    "no source": ({"input_ids": []}, {}, "`input_ids`, got none"),
    "a word that there is not": ({"labels": [VOCAB, 1]}, {}, "`labels`"),
    "too long": ({}, {"max_length": 1}, "at most 1 tokens"),
    "pieces": ({}, {"long": "split"}, "--long split"),
    "inputs of a decoder": ({"decoder_input_ids": [1, 2]}, {}, "`decoder_input_ids`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_source_and_target_is_refused(case: str) -> None:
    changed, settings, says = REFUSED[case]
    with pytest.raises(UserError, match=says):
        _read([{"input_ids": [3, 4], "labels": [5, 6]} | changed], **settings)


def test_it_is_one_stage_and_says_so(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = saved("bart")
    assert "one stage" in " ".join(open_outline(str(folder)).notices)
    with pytest.raises(UserError, match="--stages: expected at most 1"):
        raycurv.fit(str(folder), _rows(), str(tmp_path / "run"), stages=2, address="none")
    with pytest.raises(UserError, match=r"seq2seq-lm, for .* an encoder with a decoder"):
        raycurv.fit(
            str(folder), _rows(), str(tmp_path / "run"), objective="causal-lm", address="none"
        )


def test_a_decoder_that_transformers_count_among_them_is_none(tmp_path: Path) -> None:
    config = transformers.Qwen2AudioConfig()
    config.architectures = ["Qwen2AudioForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a decoder alone"):
        open_outline(str(tmp_path))


def test_a_missing_weight_is_an_error_but_for_tables_of_the_class(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved("marian"), tmp_path / "model"))
    assert open_model(str(folder)).units == 1  # its positions are computed, and not saved
    config = json.loads((folder / "config.json").read_text()) | {"decoder_layers": 3}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"decoder_layers|decoder\.layers\.2"):
        open_model(str(folder))
