"""Claims about classifiers, reward models and masked language models: what they are opened as, and
which columns their data has."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
import transformers
from commands import run_here
from networks import CLASSIFIER, LLAMA, MASKED, REWARD, VOCAB
from tokenizers import models, pre_tokenizers, processors
from torch import Tensor, nn

import raycurv
from raycurv.data.masking import Masking
from raycurv.data.microbatch import make_batch
from raycurv.data.portion import Selection
from raycurv.data.reading import ExampleReader
from raycurv.data.tokenizer import LazyTokenizer
from raycurv.errors import UserError
from raycurv.jobs.fitted import fit_command
from raycurv.models.model_task import IMAGE_CLASSIFICATION, class_names, refined
from raycurv.models.opening import open_outline

pytestmark = pytest.mark.usefixtures("quiet_transformers")
HERE: dict[str, Any] = {"address": "none", "quiet": True}
WORDS = ("[CLS]", "[SEP]", "[MASK]", "good", "bad", "news", "day", "very", "a")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of some words, with what stands around a text and between two of them."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 1)],
    )  # fmt: skip
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def read(rows: list[dict[str, Any]], **more: Any) -> list[Any]:
    settings: dict[str, Any] = {"tokenizer": None, "vocab_size": VOCAB, "max_positions": None}
    if isinstance(more.get("tokenizer"), Path):
        more["tokenizer"] = LazyTokenizer(more["tokenizer"])
    return list(ExampleReader(rows, **settings | more).examples())


# What a directory is opened as


OPENED = {
    "bert": (CLASSIFIER, "sequence-classification", "classification", "regression"),
    "qwen2": (REWARD, "reward", "preference", "preference"),
    "roberta": (MASKED, "masked-lm", "masked-lm", "masked-lm"),
    "llama": (LLAMA, "causal-lm", "causal-lm", "causal-lm"),
}


@pytest.mark.parametrize("name", OPENED)
def test_the_objective_follows_the_architecture(fits, name: str, tmp_path: Path) -> None:
    case, task, default, _ = OPENED[name]
    folder = fits.source(case)
    outline = open_outline(folder)
    assert outline.task is not None and outline.task.name == task
    settings = {"batch_tokens": case.batch_tokens, "method": "identity", **HERE}
    run = raycurv.fit(folder, list(case.data), tmp_path / "run", **settings)
    assert run.manifest.settings["objective"] == default
    # The same run, whether the objective is said or not; another one is refused by its name.
    raycurv.fit(folder, list(case.data), tmp_path / "run", objective=default, **settings)
    for other in ("causal-lm", "masked-lm", "preference", "classification"):
        if other == default:
            continue
        with pytest.raises(UserError) as caught:
            raycurv.fit(folder, list(case.data), tmp_path / "other", objective=other, **settings)
        assert other in caught.value.where and f"Give --objective {default}" in caught.value.remedy
        assert outline.task.what in caught.value.expected
        # So it is of what queries are measured by.
        with pytest.raises(UserError, match=f"Give --objective {default}"):
            run.influence(case.data[:1], case.data, tmp_path / "scores", objective=other, **HERE)


def test_an_objective_of_ones_own_takes_what_the_model_gives(fits, tmp_path: Path) -> None:
    class First:
        def __init__(self, per_token: bool = False) -> None:
            self.per_token = per_token

        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            assert outputs.shape == (batch.size, 3)
            return outputs[:, 0].square()

        def sample(self, outputs: Tensor, batch: Any, uniform: Any) -> Tensor:
            return batch.labels

    folder, data = fits.source(CLASSIFIER), list(CLASSIFIER.data)
    run = raycurv.fit(folder, data, tmp_path / "run", objective=First(), **HERE)
    assert len(run.block_names()) == 12
    with pytest.raises(UserError, match="an objective of whole texts"):
        raycurv.fit(folder, data, tmp_path / "other", objective=First(True), **HERE)


PROBLEMS = {
    "regression": ("regression", [0.5, -1.0, 2.0]),
    "multi_label_classification": ("multi-label", [1, 0, 1]),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_problem_that_a_classifier_is_trained_for_is_its_objective(
    tmp_path: Path, problem: str
) -> None:
    default, label = PROBLEMS[problem]
    network: Any = CLASSIFIER.network()
    network.config.problem_type = problem
    network.save_pretrained(tmp_path / "model")
    rows = [{"input_ids": [3, 4, 5 + n], "labels": label} for n in range(3)]
    settings = {"dtype": "float64", **HERE}
    found = raycurv.evaluate(tmp_path / "model", rows, tmp_path / "out", **settings)
    network.double()
    given = torch.tensor([label], dtype=torch.float64)
    want = [network(torch.tensor([row["input_ids"]]), labels=given).loss for row in rows]
    # transformers takes means over three outputs, and squares without a half.
    scale = 1.5 if problem == "regression" else 3
    assert abs(found.loss - scale * float(sum(want)) / 3) < 1e-10
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["settings"]["objective"] == default


def test_a_classifier_of_images_is_of_its_problem_too() -> None:
    config = transformers.ViTConfig(num_labels=3, problem_type="multi_label_classification")
    assert refined(IMAGE_CLASSIFICATION, config).objectives[0] == "multi-label"
    config = transformers.ViTConfig(num_labels=3)
    assert refined(IMAGE_CLASSIFICATION, config) == IMAGE_CLASSIFICATION
    config = transformers.ViTConfig(num_labels=1)
    assert refined(IMAGE_CLASSIFICATION, config).objectives == ("regression",)


# Columns


# What both tables of a configuration say, and the names that classes have.
NAMED: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "both": ({"a": 0, "b": 1}, {0: "a", 1: "b"}, {"a": 0, "b": 1}),
    "one": (None, {0: "a", 1: "b"}, {"a": 0, "b": 1}),
    "texts": ({"a": "0", "b": "1"}, {0: "a", 1: "b"}, {"a": 0, "b": 1}),
    "other ones": ({"a": 1, "b": 0, "c": 1}, {0: "a", 1: "b"}, {"c": 1}),
    "one name of two": ({"a": 1}, {0: "a", 1: "a"}, {}),
    "no class": ({"a": 7, "c": -1, "d": None, "e": "x", "f": 1.5}, {0: "b", 1: "c"}, {"b": 0}),
    "no table": ("a", {0: "a", 1: "b"}, {"a": 0, "b": 1}),
}


@pytest.mark.parametrize("case", NAMED)
def test_a_name_is_of_one_class_or_of_none(case: str) -> None:
    label2id, id2label, want = NAMED[case]
    config = SimpleNamespace(num_labels=2, label2id=label2id, id2label=id2label)
    assert class_names(config) == want


def test_probabilities_of_classes_lack_none() -> None:
    rows = [{"input_ids": [3], "labels": [0.5, 0.5]}, {"input_ids": [4], "labels": [1.0, 0.0]}]
    for labels, lacking in (([0.5, 0.5], []), (1, ["0"])):
        reader = ExampleReader(
            [row | {"labels": labels} for row in rows], None, VOCAB, None, classes=2,
            labels_of="text",
        )  # fmt: skip
        assert len(list(reader.examples())) == 2
        assert reader.findings.classes_lacking == lacking


def test_a_part_of_a_microbatch_has_whole_labels_of_texts() -> None:
    """As many positions as classes do not make them labels of tokens."""
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [0.5, 0.5, 0.0, 0.0]}] * 2
    batch = make_batch(0, read(rows, labels_of="text"), torch.float64)
    drawn = torch.ones(3, 2, 4, dtype=torch.int64)
    part = replace(batch, drawn=drawn).part([1], 2)
    assert part.labels is not None and part.labels.tolist() == [[0.5, 0.5, 0.0, 0.0]]
    assert part.drawn is not None and part.drawn.shape == (3, 1, 4)
    assert part.inputs.shape == (1, 2)
    tokens = make_batch(0, read([{"input_ids": [3, 4], "labels": [3, 5]}] * 2), torch.float64)
    cut = tokens.part([0], 1)
    assert cut.labels is not None and cut.labels.tolist() == [[3]]


def test_a_class_may_be_named_and_what_lacks_is_told(fits, tmp_path: Path) -> None:
    named = [
        {**{k: v for k, v in row.items() if k != "labels"}, "label": f"LABEL_{row['labels'] % 2}"}
        for row in CLASSIFIER.data
    ]
    numbered = [{**row, "labels": row["labels"] % 2} for row in CLASSIFIER.data]
    folder = fits.source(CLASSIFIER)
    found = [
        raycurv.evaluate(folder, rows, tmp_path / str(n), **HERE)
        for n, rows in enumerate((named, numbered))
    ]
    assert found[0].loss == found[1].loss and found[0].accuracy is not None
    reading = json.loads((tmp_path / "0" / "run.json").read_text())["facts"]["reading"]
    assert reading["data"]["classes_lacking"] == ["LABEL_2"]
    named[4]["label"] = "LABEL_3"
    with pytest.raises(
        UserError, match=r"'text 4'.*'LABEL_0', 'LABEL_1', 'LABEL_2', got 'LABEL_3'"
    ):
        raycurv.evaluate(folder, named, tmp_path / "3", **HERE)
    both = [{**row, "label": 0} for row in numbered]
    with pytest.raises(UserError, match="one column of labels, got `labels` and `label`"):
        raycurv.evaluate(folder, both, tmp_path / "4", **HERE)
    none = [{k: v for k, v in row.items() if k != "labels"} for row in numbered]
    with pytest.raises(UserError, match=r"'text 0'.*a label.*got none"):
        raycurv.evaluate(folder, none, tmp_path / "5", **HERE)


CLASSES = {"label_names": {"NEG": 0, "POS": 1, "odd": 2}, "classes": 3, "labels_of": "text"}


def numbered(names: Any, name: str = "label") -> pa.Table:
    """Whole numbers with the names of their classes, as data sets of Hugging Face's have them."""
    feature = {"names": names, "_type": "ClassLabel"}
    said = {"info": {"features": {name: feature, "other": {"dtype": "int64", "_type": "Value"}}}}
    table = pa.table({"input_ids": [[3], [4]], name: [0, 1], "other": [0, 1]})
    return table.replace_schema_metadata({"huggingface": json.dumps(said)})


def written(table: pa.Table, path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("form", ["table", "data.parquet", "data.arrow"])
def test_numbers_of_other_classes_than_the_models_are_refused(tmp_path: Path, form: str) -> None:
    def given(table: pa.Table) -> Any:
        return table if form == "table" else written(table, tmp_path / form)

    wrong = r"0 for 'pos', which is 1 in the model.*align_labels_with_mapping.*'label'"
    with pytest.raises(UserError, match=wrong):
        read(given(numbered(["pos", "neg"])), **CLASSES)
    assert [int(one.labels) for one in read(given(numbered(["neg", "pos"])), **CLASSES)] == [0, 1]
    with pytest.raises(UserError, match=r"0 for 'pos'.*cast_column\('mood'"):
        named = Selection(given(numbered(["pos", "neg"], "mood")), columns={"labels": "mood"})
        read(named, **CLASSES)
    # Names of other columns, or that nobody writes, say nothing of these numbers.
    for nothing in (numbered(["pos", "neg"], "other"), numbered("pos"), numbered([1, 0])):
        if "label" in nothing.column_names:
            assert len(read(given(nothing), **CLASSES)) == 2
    # A model that names no classes takes numbers; of other names it is told what they are taken as.
    assert len(read(given(numbered(["pos", "neg"])), labels_of="text")) == 2
    reader = ExampleReader(given(numbered(["no", "pos", "x"])), None, VOCAB, None, **CLASSES)
    assert len(list(reader.examples())) == 2
    assert reader.findings.classes_taken_as == ["no as NEG", "x as odd"]


def test_numbers_of_tokens_classes_are_held_against_the_models(tmp_path: Path) -> None:
    said = {"feature": {"names": ["O", "B"], "_type": "ClassLabel"}, "_type": "List"}
    table = pa.table({"input_ids": [[3, 4]], "labels": [[0, 1]]}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": {"labels": said}}})}
    )
    settings: dict[str, Any] = {"per_token": True, "shift": 0, "labels_of": "tokens", "classes": 2}
    settings |= {"labelled": True}
    assert len(read(table, label_names={"O": 0, "B": 1}, **settings)) == 1
    with pytest.raises(UserError, match="0 for 'O', which is 1 in the model"):
        read(table, label_names={"B": 0, "O": 1}, **settings)


def test_classes_of_tokens_may_be_named(tmp_path: Path) -> None:
    rows = [{"input_ids": [3, 4], "labels": ["B", "O"]}, {"input_ids": [5], "labels": ["O"]}]
    settings: dict[str, Any] = {"per_token": True, "shift": 0, "labels_of": "tokens", "classes": 2}
    settings |= {"label_names": {"O": 0, "B": 1}, "labelled": True}
    assert [list(one.labels) for one in read(rows, **settings)] == [[1, 0], [0]]
    with pytest.raises(UserError, match=r"row 1.*got 'I'"):
        read([rows[0], {"input_ids": [5], "labels": ["I"]}], **settings)
    with pytest.raises(UserError, match=r"classes from 0 to 1 in `labels`.*got 2 at position 0"):
        read([{"input_ids": [5], "labels": [2]}], **settings)
    with pytest.raises(UserError, match="a label of each token"):
        read([{"input_ids": [5]}], **settings)
    # Nor are tokens their own labels where nothing is known of classes.
    rows = [{"input_ids": [5, 3]}]
    with pytest.raises(UserError, match="a label of each token"):
        raycurv.evaluate(Positions, rows, tmp_path, objective="token-classification", **HERE)


class Positions(nn.Module):
    """As many outputs a token as there are words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.embedding(input_ids))


def test_a_text_alone_has_kinds_of_tokens_where_they_say_something(tmp_path: Path) -> None:
    """Those of XLNet and Funnel tell the token that stands for the whole."""
    words = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS]:2 $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, model_input_names=["input_ids", "token_type_ids"]
    ).save_pretrained(tmp_path)
    settings: dict[str, Any] = {"tokenizer": tmp_path, "whole_texts": True, "labels_of": "text"}
    rows = [{"text": "good day"}]
    (example,) = read(rows, **settings, takes={"token_type_ids"})
    assert example.named["token_type_ids"].tolist() == [2, 0, 0, 0]
    (example,) = read(rows, **settings)
    assert not example.named


def test_two_texts_have_kinds_of_tokens_and_a_cut_text_keeps_its_end(tokenizer: Path) -> None:
    rows = [{"text": "a good day", "text_pair": "bad", "label": 1}] * 2
    settings: dict[str, Any] = {
        "tokenizer": tokenizer, "whole_texts": True, "labels_of": "text",
        "takes": {"token_type_ids"}, "max_positions": 6,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"at most 6 tokens.*got 7 tokens"):
        read(rows, **settings)
    example, _ = read(rows, **settings, long="truncate")
    assert example.input_ids.tolist() == [0, 8, 3, 1, 4, 1]
    assert example.named["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1]
    (one,) = read([{"text": "very very very good news day"}], **settings, long="truncate")
    assert one.input_ids.tolist() == [0, 7, 7, 7, 3, 1] and not one.named
    batch = make_batch(0, [example, example], torch.float32)
    assert batch.named["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]] * 2
    with pytest.raises(UserError, match="--long split"):
        read(rows, **settings, long="split")


def test_kinds_of_tokens_reach_the_model(tmp_path: Path) -> None:
    network: Any = CLASSIFIER.network()
    network.save_pretrained(tmp_path / "model")
    rows = [{"input_ids": [3, 4, 5, 6][: 4 - n], "token_type_ids": [0, 0, 1, 1][: 4 - n],
             "labels": n} for n in range(2)]  # fmt: skip
    plain = [{k: v for k, v in row.items() if k != "token_type_ids"} for row in rows]
    network.double()
    for name, data in (("kinds", rows), ("plain", plain)):
        found = raycurv.evaluate(tmp_path / "model", data, tmp_path / name, dtype="float64", **HERE)
        want = [
            network(
                torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]),
                token_type_ids=torch.tensor([row["token_type_ids"]]) if name == "kinds" else None,
            ).loss
            for row in rows
        ]  # fmt: skip
        assert abs(found.loss - float(sum(want)) / 2) < 1e-12
    with pytest.raises(UserError, match="`token_type_ids` in all examples or in none"):
        read([rows[0], plain[1]], takes={"token_type_ids"}, labels_of="text")


def test_pairs_are_texts_or_ids_with_or_without_a_prompt(tokenizer: Path) -> None:
    pair = {"chosen": "good news", "rejected": "bad"}
    settings: dict[str, Any] = {"reads": "pairs", "tokenizer": tokenizer, "whole_texts": True}
    (example,) = read([pair], **settings)
    assert example.sequences == (4, 3) and example.input_ids.tolist() == [0, 3, 5, 1, 0, 4, 1]
    assert (example.length, example.positions, int(example.labels)) == (7, 8, 0)
    (prompted,) = read([{"prompt": "a ", **pair}], **settings)
    assert prompted.input_ids.tolist() == [0, 8, 3, 5, 1, 0, 8, 4, 1]
    (ids,) = read([{"chosen": [8, 3, 5], "rejected": [8, 4]}], **settings)
    assert ids.sequences == (3, 2) and ids.input_ids.tolist() == [8, 3, 5, 8, 4]
    batch = make_batch(0, [example, ids], torch.float32)
    assert (batch.size, batch.sequences) == (2, 2) and batch.tokens().tolist() == [7, 5]
    assert batch.inputs.tolist() == [[0, 3, 5, 1], [0, 4, 1, 0], [8, 3, 5, 0], [8, 4, 0, 0]]
    second = batch.part([1])
    assert second.inputs.tolist() == batch.inputs[2:].tolist() and second.labels.tolist() == [0]
    (cut,) = read([pair], **settings, max_length=3, long="truncate")
    assert cut.sequences == (3, 3)
    # A prompt that both texts of every pair begin with would stand there twice.
    repeated = {"prompt": "a ", "chosen": "a good news", "rejected": "a bad"}
    in_ids = {"prompt": [8], "chosen": [8, 3, 5], "rejected": [8, 4]}
    table = pa.Table.from_pylist
    for rows in ([repeated], table([in_ids]), table([in_ids, {**in_ids, "prompt": []}])):
        with pytest.raises(UserError, match=r"would stand there twice. Leave .*`prompt` out"):
            read(rows, **settings)
    # Controls: in one of the texts alone, or in some of the pairs.
    (chance,) = read(table([{**in_ids, "rejected": [4]}]), **settings)
    assert chance.input_ids.tolist() == [8, 8, 3, 5, 8, 4]
    assert len(read([repeated | {"id": "a"}, {"prompt": "a ", **pair, "id": "b"}], **settings)) == 2
    with pytest.raises(UserError, match="at least one token in `rejected`"):
        read([{"chosen": [3], "rejected": []}], **settings)
    with pytest.raises(UserError, match="`chosen` \\+ `rejected`"):
        read([{"text": "good"}], **settings)


# Masked language models


BESIDE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "`labels` beside": ({"chosen": [3, 4], "rejected": [5], "labels": 1}, {"reads": "pairs"}),
    "`loss_mask` beside": ({"chosen": [3], "rejected": [5], "loss_mask": [1]}, {"reads": "pairs"}),
    "texts with a label each": (
        {"input_ids": [3, 4], "labels": 1, "loss_mask": [0, 0]}, {"labels_of": "text"},
    ),
    "all of which count": ({"input_ids": [3, 4], "labels": 1, "loss_mask": [0, 0]}, {}),
}  # fmt: skip


@pytest.mark.parametrize("said", BESIDE)
def test_what_would_say_something_else_of_a_whole_example_is_refused(said: str) -> None:
    row, settings = BESIDE[said]
    with pytest.raises(UserError, match=said):
        read([row], **settings)
    for name in ("loss_mask", "labels") if "chosen" in row else ("loss_mask",):
        row.pop(name, None)
    assert len(read([row], **settings)) == 1


def test_tokens_are_hidden_by_a_counter_alone() -> None:
    masking = Masking(mask=2, special=frozenset({0, 1}), words=VOCAB, seed=3)
    ids_T = np.random.default_rng(0).integers(3, VOCAB, 20_000).astype(np.int32)
    ids_T[::100] = 0
    shown_T, labels_T = masking.hide("one", ids_T)
    targets = labels_T != -100
    assert not targets[::100].any() and (labels_T[targets] == ids_T[targets]).all()
    assert (shown_T[~targets] == ids_T[~targets]).all()
    assert abs(targets.mean() / 0.99 - 0.15) < 0.01
    hidden, kept = shown_T[targets] == 2, shown_T[targets] == ids_T[targets]
    assert abs(hidden.mean() - 0.8) < 0.02 and abs(kept.mean() - 0.1 - 0.1 / VOCAB) < 0.02
    again, _ = masking.hide("one", ids_T[:50])
    assert (again == shown_T[:50]).all(), "a token's fate depends on what is behind it"
    assert (masking.hide("other", ids_T)[0] != shown_T).any()


def test_hidden_tokens_are_words_that_the_model_knows(tokenizer: Path) -> None:
    found = LazyTokenizer(tokenizer)
    assert found.masking(0, None).words == len(WORDS) == found.masking(0, 99).words
    assert found.masking(0, 5).words == 5
    with pytest.raises(UserError, match="token 2, which is none of the model's 2"):
        found.masking(0, 2)


def test_texts_of_a_fit_and_of_what_follows_go_through_one_tokenizer(
    tokenizer: Path, tmp_path: Path
) -> None:
    folder, other = tmp_path / "model", tmp_path / "other"
    CLASSIFIER.network().save_pretrained(folder)
    for place in (folder, other):
        shutil.copytree(tokenizer, place, dirs_exist_ok=True)
    said = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(
        said.replace('"good": 3', '"good": 4').replace('"bad": 4', '"bad": 3')
    )
    rows = [{"id": "a", "text": "a good day", "label": 0}, {"id": "b", "text": "bad", "label": 1}]
    run = raycurv.fit(folder, rows, tmp_path / "run", **HERE)
    asked = [{"text": "good news", "label": 1}]
    with pytest.raises(UserError, match=r"the tokenizer of the fit.*got another one"):
        run.influence(asked, rows, tmp_path / "scores", tokenizer=other, **HERE)
    with pytest.raises(UserError, match=r"the tokenizer of the fit.*got another one"):
        run.extend(asked, tmp_path / "extended", tokenizer=other, **HERE)
    # What it says is done, in the same directory; how conversations are written is no matter.
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    run.influence(asked, rows, tmp_path / "scores", **HERE)
    # One that was given is missed where it is not given any more, and read by no other one.
    given = raycurv.fit(folder, rows, tmp_path / "given", tokenizer=tokenizer, **HERE)
    given.manifest.facts["data"] = "rows.jsonl"
    assert f"--tokenizer {tokenizer}" in fit_command(given.manifest, "RUN")
    with pytest.raises(UserError, match="the tokenizer is another one"):
        raycurv.fit(folder, rows, tmp_path / "given", **HERE)
    shutil.copy(other / "tokenizer.json", folder)
    with pytest.raises(UserError, match=r"the tokenizer of the fit.*got another one"):
        run.influence(asked, rows, tmp_path / "changed", **HERE)


def test_masked_positions_are_given_or_drawn(tokenizer: Path, tmp_path: Path) -> None:
    network: Any = MASKED.network()
    network.save_pretrained(tmp_path / "model")
    words = [{"id": f"t{n}", "text": "a very good news day " * (n + 2)} for n in range(4)]
    with pytest.raises(UserError, match="a tokenizer, since the data is text"):
        raycurv.fit(tmp_path / "model", words, tmp_path / "run", **HERE)
    settings = {"tokenizer": tokenizer, "seed": 5, **HERE}
    run = raycurv.fit(tmp_path / "model", words, tmp_path / "run", **settings)
    said = run.manifest.facts["reading"]["data"]["masking"]
    assert (said["mask"], said["special"], said["targets"], said["seed"]) == (2, [0, 1, 2], 0.15, 5)
    # Scored with the fit's masks, whatever the seed of the scoring.
    scores = run.influence(words[:2], words, tmp_path / "scores", seed=7, rank="full", **HERE)
    same = run.influence(words[:2], words[:2], tmp_path / "same", seed=8, rank="full", **HERE)
    want = {(r["query_id"], r["train_id"]): r["score"] for r in scores.table().to_pylist()}
    for row in same.table().to_pylist():
        assert abs(row["score"] - want[row["query_id"], row["train_id"]]) < 1e-5 * abs(row["score"])
    with pytest.raises(UserError, match="labels that all equal the tokens"):
        rows = [{"input_ids": [3] * 12, "labels": [3] * 12}]
        raycurv.evaluate(tmp_path / "model", rows, tmp_path / "shown", **HERE)


# Factories


class Words(nn.Module):
    """A mean of embeddings, of tokens that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.out = nn.Embedding(len(WORDS), 5), nn.Linear(5, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.embedding(input_ids) * mask[..., None]
        return self.out(torch.tanh(hidden.sum(1) / mask.sum(1)[:, None]))


def test_texts_reach_a_model_of_a_factory(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"text": "very " * n + "good day", "label": n % 2} for n in range(4)]
    ids = [{"input_ids": [0, *[7] * n, 3, 6, 1], "labels": n % 2} for n in range(4)]
    settings: dict[str, Any] = {"objective": "classification", "blocks": ["out"], **HERE}
    run = raycurv.fit(Words, rows, tmp_path / "run", tokenizer=tokenizer, **settings)
    same = raycurv.fit(Words, ids, tmp_path / "same", **settings)
    assert run.blocks()["trace"].equals(same.blocks()["trace"])
    # What follows the fit takes its tokenizer, and no other one.
    scores = run.influence(rows[:1], rows[1:], tmp_path / "scores", **HERE)
    assert len(scores.table()) == 3
    other = tmp_path / "other"
    other.mkdir()
    for file in tokenizer.iterdir():
        text = file.read_text().replace("news", "newz")
        (other / file.name).write_text(text)
    with pytest.raises(UserError, match="another one"):
        run.influence(rows[:1], rows[1:], tmp_path / "more", tokenizer=other, **HERE)
    with pytest.raises(UserError, match="--tokenizer DIR"):
        raycurv.fit(Words, rows, tmp_path / "without", **settings)


def test_a_reward_model_is_pruned_and_planned_as_others(fits, tmp_path: Path) -> None:
    run = fits.run(REWARD)
    pruned = run.prune(tmp_path / "pruned", sparsity=0.3, **HERE)
    assert pruned.blocks().num_rows == len(run.block_names())
    again = raycurv.evaluate(pruned.model, list(REWARD.data), tmp_path / "loss", **HERE)
    assert np.isfinite(again.loss) and again.accuracy is not None


def test_a_text_that_was_not_cut_is_not_shown_as_cut(tokenizer: Path, tmp_path: Path) -> None:
    CLASSIFIER.network().save_pretrained(tmp_path / "model")
    shutil.copytree(tokenizer, tmp_path / "model", dirs_exist_ok=True)
    rows = [{"text": "good news", "label": 0}, {"text": "a very very bad day", "label": 1}]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    flags = ["--model", tmp_path / "model", "--data", tmp_path / "a.jsonl", "--max-length", 5]
    outcome = run_here("show-data.py", [*flags, "--long", "truncate"])
    assert outcome.code == 0, outcome.err
    shown = json.loads(outcome.out.splitlines()[-1])["examples"]
    assert [one.get("truncated", False) for one in shown] == [False, True]
