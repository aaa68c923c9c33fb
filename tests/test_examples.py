from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from byte_tokenizer import BOS, EOS, VOCAB, byte_ids, save_byte_tokenizer

from raycurv.data.examples import (
    EXAMPLES_SCHEMA,
    Example,
    examples_to_table,
    loss_terms,
    no_loss_terms,
    table_to_examples,
)
from raycurv.data.reading import ExampleReader
from raycurv.data.sources import fingerprint
from raycurv.data.tokenizer import LazyTokenizer
from raycurv.errors import UserError

FORMATS = ("list", "table", "parquet", "jsonl", "arrow")


def read(source: Any, **more: Any) -> list[Example]:
    settings: dict[str, Any] = {"tokenizer": None, "vocab_size": 100, "max_positions": None}
    settings |= more
    if isinstance(settings["tokenizer"], Path):
        settings["tokenizer"] = LazyTokenizer(settings["tokenizer"])
    return list(ExampleReader(source, **settings).examples())


def mistake(source: Any, **more: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        read(source, **more)
    error = caught.value
    assert error.where and error.expected and error.got and error.remedy.endswith(".")
    return error


def as_source(rows: list[dict[str, Any]], format: str, directory: Path) -> Any:
    if format == "list":
        return rows
    path = directory / f"data.{format}"
    if format == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    table = pa.Table.from_pylist(rows)
    if format == "table":
        return table
    if format == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


def plain(example: Example) -> dict[str, Any]:
    """An example with lists for arrays, so that examples can be compared."""

    def values(array: np.ndarray | None) -> Any:
        return None if array is None else (array.dtype.name, array.tolist())

    return {
        "index": example.index,
        "id": example.id,
        "input_ids": values(example.input_ids),
        "inputs": values(example.inputs),
        "labels": values(example.labels),
        "loss_mask": values(example.loss_mask),
    }


def ids_of(example: Example) -> list[int]:
    assert example.input_ids is not None and example.input_ids.dtype == np.int32
    return list(example.input_ids.tolist())


# What is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_token_ids_labels_and_masks_are_read_as_given(tmp_path: Path, format: str) -> None:
    rows = [
        {"id": "a", "input_ids": [1, 2, 3], "labels": [-100, 2, 4], "loss_mask": [1, 0, 1]},
        {"id": "b", "input_ids": [5], "labels": [5], "loss_mask": [1]},
    ]
    a, b = read(as_source(rows, format, tmp_path))
    assert plain(a) == {
        "index": 0,
        "id": "a",
        "input_ids": ("int32", [1, 2, 3]),
        "inputs": None,
        "labels": ("int64", [-100, 2, 4]),
        "loss_mask": ("bool", [False, False, True]),
    }
    assert (b.index, b.id, ids_of(b), b.length) == (1, "b", [5], 1)
    assert loss_terms(a) == 1 and loss_terms(b) == 0


@pytest.mark.parametrize("format", FORMATS)
def test_ids_default_to_path_and_row(tmp_path: Path, format: str) -> None:
    source = as_source([{"input_ids": [i]} for i in range(3)], format, tmp_path)
    prefix = "" if format in ("list", "table") else f"data.{format}:"
    assert [example.id for example in read(source)] == [f"{prefix}{i}" for i in range(3)]


def test_ids_are_paths_below_the_root_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("z.jsonl", "sub/a.jsonl"):
        (tmp_path / name).write_text('{"input_ids": [1]}\n{"input_ids": [2]}\n')
    expected = ["sub/a.jsonl:0", "sub/a.jsonl:1", "z.jsonl:0", "z.jsonl:1"]
    assert [example.id for example in read(tmp_path)] == expected
    assert [example.index for example in read(tmp_path)] == [0, 1, 2, 3]


@pytest.mark.parametrize("format", FORMATS)
def test_whole_numbers_are_ids(tmp_path: Path, format: str) -> None:
    rows = [{"id": 7, "input_ids": [1]}, {"id": -3, "input_ids": [1]}]
    assert [e.id for e in read(as_source(rows, format, tmp_path))] == ["7", "-3"]


@pytest.mark.parametrize(
    "type",
    [
        pa.list_(pa.int16()),
        pa.large_list(pa.uint64()),
        pa.list_(pa.int64(), 2),
        pa.list_view(pa.int32()),
        pa.large_list_view(pa.int32()),
    ],
    ids=str,
)
def test_every_kind_of_list_is_read(type: Any) -> None:
    table = pa.table({"input_ids": pa.array([[0, 0], [1, 2], [3, 4], [5, 6]], type)})
    assert [ids_of(e) for e in read(table.slice(1, 2))] == [[1, 2], [3, 4]]


def test_dictionaries_and_views_of_text_are_read(tmp_path: Path) -> None:
    tokenizer = save_byte_tokenizer(tmp_path)
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        table = pa.table({"text": pa.array(["a", "b", "a"], kind)})
        got = read(table, tokenizer=tokenizer, vocab_size=VOCAB)
        assert [ids_of(e) for e in got] == [byte_ids("a"), byte_ids("b"), byte_ids("a")]
    table = pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()})
    assert len(read(table, tokenizer=tokenizer, vocab_size=VOCAB)) == 3


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>"])
def test_text_gets_the_tokenizers_own_special_tokens(
    tmp_path: Path, format: str, template: str
) -> None:
    tokenizer = save_byte_tokenizer(tmp_path / "model", template)
    source = as_source([{"text": "hello"}, {"text": "né"}], format, tmp_path)
    for example, text in zip(
        read(source, tokenizer=tokenizer, vocab_size=VOCAB), ["hello", "né"], strict=True
    ):
        before = [BOS] if "<s>" in template else []
        after = [EOS] if "</s>" in template else []
        assert ids_of(example) == [*before, *byte_ids(text), *after]
        assert example.loss_mask is None and example.labels is None


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_the_loss_of_prompt_and_completion_is_on_the_completion(
    tmp_path: Path, template: str
) -> None:
    tokenizer = save_byte_tokenizer(tmp_path, template)
    rows = [{"prompt": "ask ", "completion": "me"}, {"prompt": "", "completion": "x"}]
    before = [BOS] if "<s>" in template else []
    after = [EOS] if "</s>" in template else []
    for example, row in zip(read(rows, tokenizer=tokenizer, vocab_size=VOCAB), rows, strict=True):
        prompt, completion = byte_ids(row["prompt"]), byte_ids(row["completion"])
        assert ids_of(example) == [*before, *prompt, *completion, *after]
        assert example.loss_mask is not None
        masked = len(before) + len(prompt)
        targets = [False] * masked + [True] * (len(completion) + len(after))
        assert example.loss_mask.tolist() == targets


def test_a_loss_mask_narrows_the_completion(tmp_path: Path) -> None:
    tokenizer = save_byte_tokenizer(tmp_path)
    rows = [{"prompt": "a", "completion": "bc", "loss_mask": [True, False, True]}]
    (example,) = read(rows, tokenizer=tokenizer, vocab_size=VOCAB)
    assert example.loss_mask is not None
    assert example.loss_mask.tolist() == [False, False, True]


def test_a_tokenizer_need_only_encode() -> None:
    class Lengths:
        calls = 0

        def encode(self, texts: list[str], *, special: bool) -> list[list[int]]:
            self.calls += 1
            return [[len(text)] for text in texts]

        def describe(self) -> dict[str, Any]:
            return {}

    tokenizer = Lengths()
    got = read([{"text": "x" * (i % 50)} for i in range(3000)], tokenizer=tokenizer)
    assert [ids_of(e) for e in got] == [[i % 50] for i in range(3000)]
    assert tokenizer.calls == 3  # whole chunks at a time


def test_a_tokenizer_is_loaded_only_for_text(tmp_path: Path) -> None:
    assert len(read([{"input_ids": [1]}], tokenizer=tmp_path)) == 1


PREFERENCES = [
    ({"input_ids": [1], "text": "x", "inputs": [1.0]}, None, "input_ids"),
    ({"prompt": "x", "completion": "y", "text": "xyz"}, None, "prompt"),
    ({"prompt": "x", "text": "xyz"}, None, "text"),
    ({"text": "xyz", "inputs": [1.0]}, None, "text"),
    ({"text": "xyz", "inputs": [1.0]}, False, "inputs"),
    ({"text": "xyz", "inputs": [1.0]}, True, "text"),
]


@pytest.mark.parametrize("row,token_inputs,used", PREFERENCES)
def test_columns_are_preferred_in_order(
    tmp_path: Path, row: dict[str, Any], token_inputs: bool | None, used: str
) -> None:
    tokenizer = save_byte_tokenizer(tmp_path)
    (example,) = read([row], tokenizer=tokenizer, vocab_size=VOCAB, token_inputs=token_inputs)
    length = {"input_ids": 1, "prompt": 2, "text": 3}
    if used == "inputs":
        assert example.inputs is not None and example.input_ids is None
    else:
        assert len(ids_of(example)) == length[used]


@pytest.mark.parametrize("format", FORMATS)
def test_nested_inputs_and_classes_are_read(tmp_path: Path, format: str) -> None:
    images = [[[[0.5, 1.0, 2.0], [3.0, 4.0, 5.0]]], [[[6.0, 7.0, 8.0], [9.0, 1.0, 2.0]]]]
    rows = [{"inputs": image, "labels": k} for k, image in enumerate(images)]
    for k, example in enumerate(read(as_source(rows, format, tmp_path), vocab_size=None)):
        assert example.input_ids is None and example.loss_mask is None
        assert example.inputs is not None and example.inputs.shape == (1, 2, 3)
        assert example.inputs.tolist() == images[k]
        assert example.labels is not None and example.labels.dtype == np.int64
        assert example.labels.shape == () and int(example.labels) == k
        assert (example.length, loss_terms(example)) == (1, 1)


@pytest.mark.parametrize("labels", [[0.5, 2.0], [[0.5], [2.0]], [[1, 2], [3, 4]]])
@pytest.mark.parametrize("format", FORMATS)
def test_labels_of_a_regression_are_float64(tmp_path: Path, format: str, labels: list[Any]) -> None:
    rows = [{"inputs": [1.0], "labels": label} for label in labels]
    got = read(as_source(rows, format, tmp_path), vocab_size=None)
    for example, label in zip(got, labels, strict=True):
        assert example.labels is not None and example.labels.dtype == np.float64
        assert example.labels.tolist() == label


@pytest.mark.parametrize(
    "type,dtype",
    [
        (pa.float32(), np.float32),
        (pa.float64(), np.float64),
        (pa.float16(), np.float32),
        (pa.uint8(), np.float32),
        (pa.int64(), np.float64),
        (pa.bool_(), np.float32),
    ],
    ids=str,
)
def test_inputs_keep_what_they_can_hold(type: Any, dtype: Any) -> None:
    values = pa.array([0, 1, 1, 0]).cast(type if type != pa.float16() else pa.float32())
    column = pa.FixedSizeListArray.from_arrays(values.cast(type), 2)
    for example in read(pa.table({"inputs": column}), vocab_size=None):
        assert example.inputs is not None and example.inputs.dtype == dtype
        assert sorted(example.inputs.tolist()) == [0, 1]


def test_arrow_tensors_and_numpy_arrays_are_inputs() -> None:
    arrays = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    table = pa.table({"inputs": pa.FixedShapeTensorArray.from_numpy_ndarray(arrays)})
    rows = [{"inputs": array} for array in arrays]
    for source in (table, rows):
        got = [e.inputs.tolist() for e in read(source, vocab_size=None) if e.inputs is not None]
        assert got == arrays.tolist()


def test_numpy_ids_are_tokens() -> None:
    (example,) = read([{"id": np.int64(4), "input_ids": np.array([1, 2])}])
    assert (example.id, ids_of(example)) == ("4", [1, 2])


def test_reading_streams(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"input_ids": [1]}\n' * 5000 + "broken")
    examples = ExampleReader(path, None, vocab_size=9, max_positions=None).examples()
    assert next(examples).id == "a.jsonl:0"  # the broken line has not been met
    with pytest.raises(UserError, match="line 5001"):
        list(examples)


# Lengths --------------------------------------------------------------------------------------

LONG = [
    {"id": "short", "input_ids": [1, 2]},
    {
        "id": "long",
        "input_ids": [1, 2, 3, 4, 5],
        "labels": [9, 8, 7, -100, 5],
        "loss_mask": [1, 0, 1, 1, 1],
    },
]


def test_truncation_cuts_the_end() -> None:
    short, long = read(LONG, max_length=3, long="truncate")
    assert (short.id, ids_of(short)) == ("short", [1, 2])
    assert plain(long) | {"index": 0} == {
        "index": 0,
        "id": "long",
        "input_ids": ("int32", [1, 2, 3]),
        "inputs": None,
        "labels": ("int64", [9, 8, 7]),
        "loss_mask": ("bool", [True, False, True]),
    }


def test_splitting_names_the_pieces() -> None:
    got = read(LONG, max_length=2, long="split")
    assert [(e.index, e.id, ids_of(e)) for e in got] == [
        (0, "short", [1, 2]),
        (1, "long#0", [1, 2]),
        (2, "long#1", [3, 4]),
        (3, "long#2", [5]),
    ]
    assert [e.labels.tolist() for e in got if e.labels is not None] == [[9, 8], [7, -100], [5]]
    masks = [e.loss_mask.tolist() for e in got if e.loss_mask is not None]
    assert masks == [[True, False], [True, False], [True]]


@pytest.mark.parametrize(
    "max_length,max_positions,limit", [(3, None, 3), (None, 3, 3), (3, 4, 3), (4, 3, 3), (5, 9, 5)]
)
def test_the_smaller_limit_counts(
    max_length: int | None, max_positions: int | None, limit: int
) -> None:
    limits = {"max_length": max_length, "max_positions": max_positions}
    assert read(LONG, **limits, long="truncate")[1].length == limit
    if limit == 5:
        assert len(read(LONG, **limits)) == 2
        return
    error = mistake(LONG, **limits)
    assert "'long'" in error.where and "the list, row 1" in error.where
    assert error.got == "5 tokens" and f"at most {limit} tokens" in error.expected
    assert "--long truncate" in error.remedy and "--long split" in error.remedy
    by_model = max_positions == limit
    assert ("the model's positions" in error.expected) == by_model
    assert ("larger --max-length" in error.remedy) == (not by_model)
    if max_positions == 4:
        assert "(the model takes 4)" in error.remedy


def test_pieces_may_not_take_another_examples_id() -> None:
    long = {"id": "a", "input_ids": [1, 2, 3]}
    taken = {"id": "a#1", "input_ids": [1]}
    for rows in ([long, taken], [taken, long]):
        for limits in ({}, {"max_examples": 2}):
            error = mistake(rows, max_length=2, long="split", **limits)
            assert "'a#1'" in error.where and "piece" in error.got


# Samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_a_sample_is_seeded_and_in_data_order(tmp_path: Path, format: str) -> None:
    rows = [{"id": f"x{i}", "input_ids": [i % 100]} for i in range(3000)]
    source = as_source(rows, format, tmp_path)
    samples = [read(source, max_examples=40, seed=seed) for seed in (0, 0, 1)]
    names = [[e.id for e in sample] for sample in samples]
    assert names[0] == names[1] != names[2]
    for sample in samples:
        rows_ = [int(e.id[1:]) for e in sample]
        assert len(rows_) == 40 and rows_ == sorted(rows_)
        assert [e.index for e in sample] == list(range(40))
        assert [ids_of(e) for e in sample] == [[i % 100] for i in rows_]
        assert max(rows_) > 1500  # and not the first 40


def test_every_row_is_as_likely_in_a_sample() -> None:
    rows, seeds, size = [{"input_ids": [1]} for _ in range(60)], 300, 15
    counts = np.zeros(len(rows))
    for seed in range(seeds):
        for example in read(rows, max_examples=size, seed=seed):
            counts[int(example.id.rpartition(":")[2])] += 1
    # Chi-square of 59 degrees of freedom, of draws without replacement; 112 is seen once in 30,000.
    share = size / len(rows)
    assert counts.sum() == seeds * size
    statistic = ((counts - seeds * share) ** 2).sum() / (seeds * share * (1 - share))
    assert 30 < statistic < 112
    # The control: the first rows are not the ones.
    assert abs(counts[:size].sum() / counts.sum() - share) < 0.03


def test_a_sample_depends_on_ids_alone_and_grows() -> None:
    rows = [{"id": f"x{i}", "input_ids": [1]} for i in range(500)]
    small = {e.id for e in read(rows, max_examples=20)}
    assert {e.id for e in read(rows[::-1], max_examples=20)} == small
    assert small < {e.id for e in read(rows, max_examples=30)}


def test_a_sample_of_more_than_there_is_is_all() -> None:
    assert len(read(LONG, max_examples=9)) == 2


def test_a_sample_counts_rows_before_they_are_split() -> None:
    assert len(read(LONG[1:], max_examples=1, max_length=2, long="split")) == 3


def test_duplicates_are_found_outside_the_sample_too() -> None:
    rows = [{"id": f"x{i % 499}", "input_ids": [1]} for i in range(500)]
    assert "'x0'" in mistake(rows, max_examples=1).where


# Mistakes -------------------------------------------------------------------------------------

NUMBERS = {"vocab_size": None}
MISTAKES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[str]]] = {
    "no examples": ([], {}, ["at least one example", "the list"]),
    "no usable column": (
        [{"content": "x", "completion": "y"}],
        {},
        ["`content`, `completion`", "`text`", "`prompt` + `completion`", "`inputs`"],
    ),
    "tokens for a model of numbers": (
        [{"text": "x"}],
        {"token_inputs": False},
        ["`inputs`, for a model of numbers", "`text`"],
    ),
    "numbers for a model of tokens": (
        [{"inputs": [1.0]}],
        {"token_inputs": True},
        ["for a model of tokens", "`inputs`"],
    ),
    "text without a tokenizer": ([{"text": "x"}], {}, ["a tokenizer", "`text`", "`input_ids`"]),
    "token beyond the vocabulary": (
        [{"input_ids": [1]}, {"id": "bad", "input_ids": [1, 100]}],
        {},
        ["'bad'", "row 1", "0 to 99", "a vocabulary of 100", "100 at position 1"],
    ),
    "negative token": (
        [{"id": "bad", "input_ids": [1, -1]}],
        {"vocab_size": None},
        ["'bad'", "-1 at position 1"],
    ),
    "label beyond the vocabulary": (
        [{"id": "bad", "input_ids": [1, 2], "labels": [1, 100]}],
        {},
        ["'bad'", "`labels`", "100 at position 1", "-100 for no target"],
    ),
    "negative label": (
        [{"id": "bad", "input_ids": [1, 2], "labels": [1, -1]}],
        {},
        ["'bad'", "`labels`", "-1 at position 1"],
    ),
    "labels of another length": (
        [{"id": "bad", "input_ids": [1, 2], "labels": [1]}],
        {},
        ["'bad'", "`labels` of 2 entries", "got 1"],
    ),
    "mask of another length": (
        [{"id": "bad", "input_ids": [1, 2], "loss_mask": [1, 1, 1]}],
        {},
        ["'bad'", "`loss_mask` of 2 entries", "got 3"],
    ),
    "mask of other numbers": (
        [{"input_ids": [1], "loss_mask": [1]}, {"input_ids": [1, 2], "loss_mask": [1, 2]}],
        {},
        ["row 1", "zeros and ones", "got 2"],
    ),
    "mask of text": ([{"input_ids": [1], "loss_mask": ["a"]}], {}, ["booleans", "string"]),
    "text of numbers": ([{"text": 1.5}], {}, ["`text`", "1.5"]),
    "one label for tokens": (
        [{"input_ids": [1], "labels": 3}],
        {"per_token": True},
        ["whole numbers", "int64", "Rename"],
    ),
    "null token": ([{"input_ids": [1]}, {"input_ids": [1, None]}], {}, ["row 1", "null"]),
    "null example": ([{"input_ids": [1]}, {"input_ids": None}], {}, ["row 1", "null"]),
    "null id": ([{"id": None, "input_ids": [1]}], {}, ["row 0", "`id`", "null"]),
    "null labels": ([{"input_ids": [1], "labels": None}], {}, ["row 0", "`labels`", "null"]),
    "id of fractions": ([{"id": 1.5, "input_ids": [1]}], {}, ["`id`", "strings or whole"]),
    "no tokens": ([{"id": "bad", "input_ids": []}], {}, ["'bad'", "at least one token"]),
    "tokens of fractions": (
        [{"input_ids": [1.0]}, {"input_ids": [3.0, 1.5]}],
        {},
        ["row 1", "`input_ids`", "1.5"],
    ),
    "tokens of floats": ([{"input_ids": [1.0]}], {}, ["row 0", "`input_ids`", "got 1.0", "double"]),
    "tokens of text": ([{"input_ids": "abc"}], {}, ["row 0", "`input_ids`", "string"]),
    "a huge token": (
        [{"id": "a", "input_ids": [1]}, {"id": "b", "input_ids": [2**63 + 1]}],
        {},
        ["row 1", "`input_ids`", "9223372036854775809"],
    ),
    "same id": (
        [
            {"id": "a", "input_ids": [1]},
            {"id": "b", "input_ids": [1]},
            {"id": "a", "input_ids": [2]},
        ],
        {},
        ["'a'", "row 0 and in the list, row 2"],
    ),
    "ragged": (
        [{"id": "a", "inputs": [[1.0, 2.0]]}, {"id": "b", "inputs": [[1.0]]}],
        NUMBERS,
        ["'b'", "one shape", "2 numbers or lists on axis 1", "got 1"],
    ),
    "ragged in itself": (
        [{"id": "a", "inputs": [[1.0, 2.0], [1.0]]}],
        NUMBERS,
        ["'a'", "one shape"],
    ),
    "other depth": ([{"inputs": [1.0]}, {"inputs": [[1.0]]}], NUMBERS, ["row 1", "`inputs`"]),
    "no numbers": ([{"id": "a", "inputs": []}], NUMBERS, ["'a'", "at least one number"]),
    "one number": ([{"id": "a", "inputs": 1.0}], NUMBERS, ["'a'", "a list of numbers"]),
    "numbers of text": ([{"inputs": ["x"]}], NUMBERS, ["numbers or lists", "string"]),
    "null number": (
        [{"id": "a", "inputs": [1.0]}, {"id": "b", "inputs": [None]}],
        NUMBERS,
        ["'b'", "null"],
    ),
    "not a number": (
        [{"id": "a", "inputs": [1.0]}, {"id": "b", "inputs": [float("nan")]}],
        NUMBERS,
        ["'b'", "finite", "nan"],
    ),
    "infinite label": (
        [{"id": "a", "inputs": [1.0], "labels": float("inf")}],
        NUMBERS,
        ["'a'", "finite", "`labels`", "inf"],
    ),
    "labels of some": (
        [{"inputs": [1.0], "labels": 1}, {"id": "b", "inputs": [1.0]}],
        NUMBERS,
        ["'b'", "`labels`", "none"],
    ),
    "mask of numbers": (
        [{"inputs": [1.0], "loss_mask": [True]}],
        NUMBERS,
        ["`loss_mask`", "`inputs`"],
    ),
    "no length": ([{"input_ids": [1]}], {"max_length": 0}, ["--max-length", "got 0"]),
    "no sample": ([{"input_ids": [1]}], {"max_examples": 0}, ["--max-examples", "got 0"]),
    "unknown long": ([{"input_ids": [1]}], {"long": "cut"}, ["--long", "'cut'", "split"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_say_what_is_wrong_and_where(case: str) -> None:
    rows, settings, parts = MISTAKES[case]
    text = str(mistake(rows, **settings))
    missing = [part for part in parts if part not in text]
    assert not missing, text


# Parquet has no columns without rows, and one depth of lists in all of them.
NOT_IN_FILES = ("no examples", "other depth", "a huge token")


@pytest.mark.parametrize("case", [c for c in MISTAKES if c not in NOT_IN_FILES])
@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_mistakes_are_found_in_files(tmp_path: Path, case: str, format: str) -> None:
    rows, settings, _ = MISTAKES[case]
    mistake(as_source(rows, format, tmp_path), **settings)


def chunks(first: Any, then: Any) -> Iterator[list[dict[str, Any]]]:
    """The same mistake within a chunk and beyond one."""
    for count in (1, 1500):
        yield [*({"inputs": [1.0], **first} for _ in range(count)), {"inputs": [1.0], **then}]


def test_shapes_and_labels_agree_across_chunks() -> None:
    assert "one shape" in str(mistake(list(chunks({}, {"inputs": [1.0, 2.0]}))[1], **NUMBERS))
    assert "`labels`" in str(mistake(list(chunks({"labels": 1}, {}))[1], **NUMBERS))
    assert "`labels`" in str(mistake(list(chunks({}, {"labels": 1}))[1], **NUMBERS))
    assert "whole number" in str(mistake([*chunks({"labels": 1}, {"labels": 0.5})][1], **NUMBERS))
    for rows in chunks({"labels": 0.5}, {"labels": 1}):
        last = read(rows, **NUMBERS)[-1].labels
        assert last is not None and last.dtype == np.float64


def test_a_token_beyond_64_bits_is_beyond_the_vocabulary() -> None:
    table = pa.table({"input_ids": pa.array([[1], [2**63 + 1]], pa.list_(pa.uint64()))})
    for size in (100, None):
        error = mistake(table, vocab_size=size)
        assert "row 1" in error.where and "at position 0" in error.got


def test_tokens_and_numbers_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1]}')
    (tmp_path / "b.jsonl").write_text('{"inputs": [1.0]}')
    error = mistake(tmp_path)
    assert "b.jsonl" in error.where and "input_ids" in error.expected


def test_files_without_rows_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    pq.write_table(
        pa.table({"input_ids": pa.array([], pa.list_(pa.int64()))}), tmp_path / "b.parquet"
    )
    assert "2 files" in mistake(str(tmp_path)).got
    (tmp_path / "c.jsonl").write_text('{"input_ids": [1]}')
    assert [e.id for e in read(tmp_path)] == ["c.jsonl:0"]


def test_two_columns_of_one_name_are_a_mistake() -> None:
    column = pa.array([[1]])
    table = pa.Table.from_arrays([column, column], names=["input_ids", "input_ids"])
    assert "one column `input_ids`" in mistake(table).expected


def test_the_first_place_of_an_id_is_found_in_another_file(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"id": "x", "input_ids": [1]}')
    got = mistake(tmp_path).got
    assert "a.jsonl, row 0" in got and "b.jsonl, row 0" in got


def test_a_tokenizer_beyond_the_models_vocabulary_is_a_mistake(tmp_path: Path) -> None:
    tokenizer = save_byte_tokenizer(tmp_path, "<s> $A")
    error = mistake([{"text": "a"}], tokenizer=tokenizer, vocab_size=256)
    assert "256 at position 0" in error.got and "tokenizer" in error.remedy


def test_a_null_in_a_dictionary_is_a_mistake(tmp_path: Path) -> None:
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array(["a", None]))
    error = mistake(pa.table({"text": texts}), tokenizer=save_byte_tokenizer(tmp_path))
    assert "row 1" in error.where and error.got == "null"


def test_text_in_a_directory_without_a_tokenizer_is_a_mistake(tmp_path: Path) -> None:
    assert "none of its files" in mistake([{"text": "a"}], tokenizer=tmp_path).got


def test_empty_text_without_special_tokens_is_a_mistake(tmp_path: Path) -> None:
    bare = save_byte_tokenizer(tmp_path / "bare")
    begun = save_byte_tokenizer(tmp_path / "begun", "<s> $A")
    settings = {"vocab_size": VOCAB}
    assert "at least one token" in mistake([{"text": ""}], tokenizer=bare, **settings).expected
    assert [ids_of(e) for e in read([{"text": ""}], tokenizer=begun, **settings)] == [[BOS]]


# Loss terms -----------------------------------------------------------------------------------

TERMS: list[tuple[Example, int]] = [
    (Example(0, "a", np.array([1], np.int32)), 0),
    (Example(0, "a", np.array([1, 2, 3], np.int32)), 2),
    (Example(0, "a", np.array([1, 2], np.int32), loss_mask=np.array([True, False])), 0),
    (Example(0, "a", np.array([1, 2], np.int32), loss_mask=np.array([False, True])), 1),
    (Example(0, "a", inputs=np.ones(3)), 1),
]


@pytest.mark.parametrize("example,terms", TERMS)
def test_the_first_token_has_no_loss_term(example: Example, terms: int) -> None:
    assert loss_terms(example) == terms


def test_data_without_a_loss_term_is_counted_in_the_message() -> None:
    mistake = no_loss_terms("--train", 2)
    assert mistake.where == "--train"
    assert "2 examples" in mistake.got


def test_labels_of_minus_100_are_no_loss_terms() -> None:
    (example,) = read([{"input_ids": [1, 2], "labels": [1, -100]}])
    assert loss_terms(example) == 0


# Further columns, which an objective reads -----------------------------------------------------

FURTHER: list[dict[str, Any]] = [
    {"id": "a", "input_ids": [1, 2], "right": 3, "answer": "yes", "weights": [0.5, 1.0]},
    {"id": "b", "input_ids": [1, 2, 3, 4, 5], "right": 4, "answer": "né", "weights": [0.1, 2.0]},
]
NAMES = ("right", "answer", "weights")


def further(example: Example) -> dict[str, Any]:
    return {
        name: value if isinstance(value, str) else (value.dtype.name, value.tolist())
        for name, value in example.columns.items()
    }


@pytest.mark.parametrize("format", FORMATS)
def test_further_columns_are_read_and_kept(tmp_path: Path, format: str) -> None:
    examples = read(as_source(FURTHER, format, tmp_path), further=NAMES)
    assert [further(example) for example in examples] == [
        {"right": ("int64", 3), "answer": "yes", "weights": ("float64", [0.5, 1.0])},
        {"right": ("int64", 4), "answer": "né", "weights": ("float64", [0.1, 2.0])},
    ]
    table = examples_to_table(examples)
    pq.write_table(table, tmp_path / "part.parquet")
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    for kept in (table, chunked, pq.read_table(tmp_path / "part.parquet")):
        back = table_to_examples(kept)
        assert [plain(e) for e in back] == [plain(e) for e in examples]
        assert [further(e) for e in back] == [further(e) for e in examples]
    # Who does not ask for them does not get them.
    assert not any(e.columns for e in read(as_source(FURTHER, format, tmp_path)))


def test_further_columns_stand_beside_numbers_and_may_be_the_text_itself() -> None:
    rows = [{"inputs": [0.5, n], "labels": n, "favoured": 2 - n} for n in range(3)]
    assert [further(e) for e in read(rows, further=("favoured",))] == [
        {"favoured": ("int64", 2 - n)} for n in range(3)
    ]


def test_a_cut_example_keeps_its_further_columns_and_so_does_every_piece() -> None:
    whole = [further(example) for example in read(FURTHER, further=NAMES)]
    cut = read(FURTHER, further=NAMES, max_length=2, long="truncate")
    assert [further(e) for e in cut] == whole
    pieces = read(FURTHER, further=NAMES, max_length=2, long="split")
    assert [e.id for e in pieces] == ["a", "b#0", "b#1", "b#2"]
    assert [further(e) for e in pieces] == [whole[0]] + 3 * [whole[1]]


FURTHER_MISTAKES: dict[str, tuple[list[Any], tuple[str, ...]]] = {
    "missing in all": ([None, None], ("`more`, which the objective reads", "`input_ids`")),
    "missing in one": ([1, None], ("the column `more`", "row 1")),
    "of two shapes": ([[1, 2], [3]], ("`more` of one shape", "row 1")),
    "no numbers": ([{"a": 1}, {"a": 2}], ("numbers or lists of numbers", "struct")),
    "of two types": ([1, "one"], ("`more` of one type", "'one'")),
}


@pytest.mark.parametrize("name", FURTHER_MISTAKES)
def test_a_mistake_in_a_further_column_is_named(name: str) -> None:
    values, says = FURTHER_MISTAKES[name]
    rows: list[dict[str, Any]] = [{"input_ids": [1, 2]} for _ in values]
    for row, value in zip(rows, values, strict=True):
        row |= {} if value is None else {"more": value}
    text = str(mistake(rows, further=("more",)))
    assert all(piece in text for piece in says), text


def test_a_further_column_is_of_one_kind_in_all_files(tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", "one")):
        write = [{"input_ids": [1, 2], "more": value}]
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(write[0]) + "\n")
    error = mistake(tmp_path, further=("more",))
    assert "b.jsonl" in error.where and "numbers in `more`" in error.expected
    (tmp_path / "b.jsonl").write_text(json.dumps({"input_ids": [1, 2], "more": 0.5}) + "\n")
    assert "whole numbers in `more`" in mistake(tmp_path, further=("more",)).expected


# Keeping --------------------------------------------------------------------------------------

KEPT: dict[str, list[Example]] = {
    "none": [],
    "tokens": [
        Example(0, "a", np.array([1, 2], np.int32)),
        Example(
            1,
            "né",
            np.array([3], np.int32),
            labels=np.array([-100]),
            loss_mask=np.array([False]),
        ),
        Example(7, "c#0", np.array([4, 5], np.int32), loss_mask=np.array([False, True])),
    ],
    "classes": [
        Example(n, str(n), inputs=np.full((2, 1, 3), 0.1, np.float32), labels=np.array(n))
        for n in range(3)
    ],
    "regressions": [
        Example(0, "a", inputs=np.array([0.1, 1e-300]), labels=np.array(0.1)),
        Example(1, "b", inputs=np.array([0.1, 1.0]), labels=np.array([[0.1], [2.0]])),
        Example(2, "c", inputs=np.array([0.1, 1.0], np.float32)),
    ],
}


@pytest.mark.parametrize("case", KEPT)
def test_keeping_loses_nothing(tmp_path: Path, case: str) -> None:
    examples = KEPT[case]
    table = examples_to_table(examples)
    assert table.schema == EXAMPLES_SCHEMA
    pq.write_table(table, tmp_path / "part.parquet")
    stored = pq.read_table(tmp_path / "part.parquet")
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    for kept in (table, stored, chunked):
        assert [plain(e) for e in table_to_examples(kept)] == [plain(e) for e in examples]
    assert [plain(e) for e in table_to_examples(table.slice(1))] == [plain(e) for e in examples[1:]]


def test_what_was_read_is_kept(tmp_path: Path) -> None:
    examples = read(LONG, max_length=2, long="split")
    assert [plain(e) for e in table_to_examples(examples_to_table(examples))] == [
        plain(e) for e in examples
    ]


def test_fingerprint_is_at_hand() -> None:
    assert fingerprint(LONG)["rows"] == 2
