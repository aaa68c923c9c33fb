"""Data as it lies about: CSV, packed text, JSON arrays, and objects that Python callers hold."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from networks import MLP
from test_examples import read
from test_selection import Bytes, names_of

import raycurv
from raycurv import UserError
from raycurv.data import bounds
from raycurv.data.objects import settled
from raycurv.data.portion import Selection
from raycurv.data.sources import fingerprint, open_parts

TEXTS: dict[str, Any] = {"tokenizer": Bytes(), "vocab_size": 300}
NUMBERS: dict[str, Any] = {"token_inputs": False}


def values(source: Any, *names: str) -> list[dict[str, Any]]:
    """The rows of a source, as its parts hand them out."""
    found: list[dict[str, Any]] = []
    for part in open_parts(source):
        for rows in part.read(names, ("id", "labels")):
            columns = {name: column.to_pylist() for name, column in rows.columns.items()}
            found += [{n: own[i] for n, own in columns.items()} for i in range(len(rows.numbers))]
    return found


def mistake(source: Any, *parts: str) -> str:
    with pytest.raises(UserError) as caught:
        values(source, "text")
    assert all(part in str(caught.value) for part in parts), caught.value
    return str(caught.value)


# CSV ------------------------------------------------------------------------------------------


CSV: dict[str, tuple[bytes, list[dict[str, str]]]] = {
    "ids that look like numbers": (
        b"id,text\n007,a\n1e3,b\n1.0,c\n", [
            {"id": "007", "text": "a"}, {"id": "1e3", "text": "b"}, {"id": "1.0", "text": "c"},
        ],
    ),
    "texts that look like something else": (
        b"text\nNA\nnull\ntrue\n3\n2024-01-01\n",
        [{"text": t} for t in ("NA", "null", "true", "3", "2024-01-01")],
    ),
    "quotes, delimiters and line breaks": (
        b'text\n"a, ""b""\r\nc"\n5" disk\n', [{"text": 'a, "b"\r\nc'}, {"text": '5" disk'}],
    ),
    "a mark, ends of Windows, an empty line, no end": (
        b"\xef\xbb\xbftext\r\na\r\n\r\n\xc3\xa9", [{"text": "a"}, {"text": "\u00e9"}],
    ),
    "spaces stay": (b"text\n  a \n", [{"text": "  a "}]),
    "a long text": (b'text\n"' + b"a" * 200_000 + b'"\n', [{"text": "a" * 200_000}]),
}  # fmt: skip


@pytest.mark.parametrize("case", CSV)
def test_values_of_a_csv_stay_what_they_are(tmp_path: Path, case: str) -> None:
    content, rows = CSV[case]
    (tmp_path / "a.csv").write_bytes(content)
    assert values(tmp_path / "a.csv", "text") == rows
    (tmp_path / "b.tsv").write_bytes(content.replace(b",", b"\t"))
    found = values(tmp_path / "b.tsv", "text")
    assert found == [{n: value.replace(",", "\t") for n, value in row.items()} for row in rows]


BROKEN: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "a quote that is not closed": (
        b'id,text\n0,a\n1,"b\n2,"c"\n3,"d"\n', ("row 1 (line 3 to 4)", "expected after"),
    ),
    "one that nothing closes": (b'text\na\n"b\nc\n', ("row 1 (line 3 to 4)", "end of data")),
    "a backslash before a quote": (b'text\n"a \\"b\\" c"\n', ("row 0 (line 2)", "expected after")),
    "a value too many": (b"id,text\n1,a,b\n", ("row 0 (line 2)", "3 values under 2 names")),
    "a value too few": (b"id,text\n1,a\n2\n", ("row 1 (line 3)", "1 values under 2 names")),
    "two columns of a name": (b"text,text\na,b\n", ("line 1", "two columns `text`")),
    "other bytes": (b"text\na\n\xff\n", ("row 1 (line 3)", "can't decode")),
    "UTF-16": ("text\na\n".encode("utf-16"), ("line 1", "can't decode")),
    "another delimiter": (b"id;text\n1;a\n", ("`text`", "found id;text")),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_csv_whose_quotes_break_is_named_by_row_and_line(tmp_path: Path, case: str) -> None:
    content, parts = BROKEN[case]
    (tmp_path / "a.csv").write_bytes(content)
    mistake(tmp_path / "a.csv", "a.csv", *parts)


def test_quotes_of_a_tsv_that_swallow_rows_are_refused(tmp_path: Path) -> None:
    """Tables without quotes of their own have them in texts; then two of them are a pair."""
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"Good movie\t1\nbad one\t0\nend"\t1\n')
    mistake(path, "row 0 (line 2 to 4)", "each is a row by itself")
    # The control: a text of several lines.
    path.write_text('text\tlabel\n"Good movie\nbad one\nend"\t1\n"a\t\tb\nc"\t0\n')
    assert [row["text"] for row in values(path, "text")] == [
        "Good movie\nbad one\nend",
        "a\t\tb\nc",
    ]
    path.write_text('text\n"Good movie\nbad one"\n')
    assert len(values(path, "text")) == 1


LABELS: dict[str, tuple[str, dict[str, int], Any]] = {
    "numbers": ("2 0 1", {}, [2, 0, 1]),
    "fractions": ("0.5 1e-3 2", {}, [0.5, 1e-3, 2.0]),
    "names": ("no yes no", {"no": 0, "yes": 1}, [0, 1, 0]),
    "numbers of classes that have names": ("1 0 1", {"no": 0, "yes": 1}, [1, 0, 1]),
    "names that are their numbers": ("1 0 1", {"0": 0, "1": 1}, [1, 0, 1]),
    "names that are other numbers": ("1 2 1", {"1": 0, "2": 1}, "may be class 0, of that name"),
    "neither": ("1 maybe 0", {"no": 0, "yes": 1}, "row 1.*a class of the model"),
    "words without names": ("a b a", {}, "a number in `label`"),
    "nothing": ("1  0", {}, "a number in `label`"),
    "no number": ("1 nan 0", {}, "row 1.*a number in `label`.*'nan'"),
}  # fmt: skip


@pytest.mark.parametrize("case", LABELS)
def test_labels_of_a_csv_are_numbers_or_names_of_classes(tmp_path: Path, case: str) -> None:
    given, names, wanted = LABELS[case]
    lines = [f"t{n},{label}\n" for n, label in enumerate(given.split(" "))]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(lines))
    how: dict[str, Any] = TEXTS | {"labels_of": "text", "label_names": names, "reads": "texts"}
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=wanted):
            read(tmp_path / "a.csv", **how)
        return
    found = [example.labels for example in read(tmp_path / "a.csv", **how)]
    assert [label.item() for label in found] == wanted
    assert {type(label.item()) for label in found} == {type(wanted[0])}
    # The control: JSON says itself what a text is.
    rows = [{"text": "t", "label": label} for label in given.split()]
    if not names:
        with pytest.raises(UserError, match="a number in `label`"):
            read(rows, **how)


# Packed files and JSON arrays ------------------------------------------------------------------

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress, "bz2": bz2.compress,
    "zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}  # fmt: skip


@pytest.mark.parametrize("packed", PACKERS)
def test_a_packed_file_that_is_not_whole_is_no_part_of_the_data(
    tmp_path: Path, packed: str
) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % n for n in range(5000))
    whole = PACKERS[packed](lines)
    path = tmp_path / f"a.jsonl.{packed}"
    for content in (whole[:-1], whole[: len(whole) // 2], whole + b"something behind it"):
        path.write_bytes(content)
        mistake(path, path.name, "a whole file packed by", "again")
    path.write_bytes(whole)
    assert len(values(path, "text")) == 5000
    # A slice of one, from a row on.
    assert [row["text"] for row in values(Selection(path, "train[4000:4002]"), "text")] == [
        "4000", "4001",
    ]  # fmt: skip
    assert fingerprint(path)["files"][0]["size"] == len(whole)


@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_a_bomb_in_a_packed_file_is_not_unpacked(
    tmp_path: Path, packed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raycurv.data.formats import csv_part, json_array, lines

    for module in (bounds, lines, csv_part, json_array):
        monkeypatch.setattr(module, "LINE_BYTES", 1 << 18)
    size = 1 << 20
    for name, content, said in (
        ("a.jsonl", b'{"text": "' + b"a" * size, "line 1: expected a line of at most"),
        ("b.jsonl", b'{"text": "a"}\n' + b"\n" * size, "nothing but empty ones"),
        ("a.json", b'[{"text": "' + b"a" * size + b'"}]', "row 0"),
        ("a.csv", b'text\n"' + b"a" * size + b'"', "line 2: expected a line of at most"),
        ("b.csv", b'text\n"' + b"a\n" * size + b'"', "is a quote not closed?"),
    ):
        path = tmp_path / f"{name}.{packed}"
        path.write_bytes(PACKERS[packed](content))
        mistake(path, path.name, said, "MiB")


ARRAYS: dict[str, tuple[bytes, Any]] = {
    "lines": (b'[\n{"text": "a"},\n{"text": "b"}\n]\n', ["a", "b"]),
    "one line": (b' [{"text": "a"} ,{"text": "\xc3\xa9"}]', ["a", "\u00e9"]),
    "nothing": (b"[]", []),
    "a line each, without commas": (b'{"text": "a"}\n{"text": "b"}', ["a", "b"]),
    "no comma": (b'[{"text": "a"} {"text": "b"}]', "row 1", "instead of a comma"),
    "a comma too many": (b'[{"text": "a"},]', "row 1", "Expecting value"),
    "no end": (b'[{"text": "a"}', "row 1", "JSON array"),
    "something behind it": (b'[{"text": "a"}] {}', "row 1", "behind its end"),
    "no objects": (b"[1, 2]", "row 0", "a int"),
    "a key twice": (b'[{"text": "a", "text": "b"}]', "row 0", "twice"),
    "other bytes": (b'[{"text": "\xff"}]', "row 0", "can't decode"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARRAYS)
@pytest.mark.parametrize("at_once", [1 << 20, 3])
def test_an_array_of_json_is_read_element_by_element(
    tmp_path: Path, case: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raycurv.data.formats import json_array

    monkeypatch.setattr(json_array, "READ_BYTES", at_once)
    content, *wanted = ARRAYS[case]
    path = tmp_path / "a.json"
    path.write_bytes(content)
    if isinstance(wanted[0], list):
        assert [row["text"] for row in values(path, "text")] == wanted[0]
    else:
        mistake(path, *wanted)


# Objects --------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"id": f"{n:02}", "inputs": [n / 8, 1.0, -0.1, 1e-7, 3.0], "labels": n % 3} for n in range(9)
]


def frame_of_pandas() -> Any:
    import pandas

    return pandas.DataFrame(ROWS)


def frame_of_polars() -> Any:
    import polars

    return polars.DataFrame(ROWS)


def dataset() -> Any:
    from datasets import Dataset

    return Dataset.from_list(ROWS)


def selected_dataset() -> Any:
    from datasets import Dataset

    shuffled = Dataset.from_list(ROWS[::-1] + ROWS)
    return shuffled.select(range(8, -1, -1))


def generated() -> Iterator[dict[str, Any]]:
    for row in ROWS:
        yield {"labels": row["labels"], "id": row["id"], "inputs": np.array(row["inputs"])}


class OfTorch:
    """What torch takes as a data set: rows by number."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return ROWS[number]


OBJECTS: dict[str, Callable[[], Any]] = {
    "pandas": frame_of_pandas,
    "polars": frame_of_polars,
    "reader": lambda: pa.Table.from_pylist(ROWS).to_reader(),
    "Dataset": dataset,
    "selected Dataset": selected_dataset,
    "IterableDataset": lambda: dataset().to_iterable_dataset(),
    "generator": generated,
    "torch": OfTorch,
}


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_gives_the_examples_of_its_rows(name: str) -> None:
    wanted = read(ROWS, **NUMBERS)
    source = settled(OBJECTS[name]())
    for _ in range(2):  # as often as one likes
        found = read(source, **NUMBERS)
        assert names_of(found) == names_of(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert (one.inputs == other.inputs).all() and one.labels == other.labels
    # Made again it is the same data; with another row, or in another order, it is not.
    same = fingerprint(source)
    assert same == fingerprint(settled(OBJECTS[name]())) and same["rows"] == len(ROWS)
    if name in ("IterableDataset", "generator", "torch"):
        assert same == fingerprint(ROWS)
    if name in ("Dataset", "selected Dataset"):
        assert same == fingerprint(dataset()) != fingerprint(dataset().select([*range(8), 0]))
    # A slice of it, under names of its own.
    some = read(Selection(source, "train[2:5]", {"labels": "labels"}), **NUMBERS)
    assert names_of(some) == names_of(wanted[2:5])


def test_a_dict_of_data_sets_is_read_by_one() -> None:
    import datasets

    both = datasets.DatasetDict({"train": dataset(), "test": dataset().select([1])})
    with pytest.raises(UserError, match="several splits by name: test, train"):
        read(both, **NUMBERS)
    assert names_of(read(Selection(both, "test"), **NUMBERS)) == ["01"]
    with pytest.raises(UserError, match="no dev there"):
        read(Selection(both, "dev"), **NUMBERS)
    once = datasets.IterableDatasetDict({"train": dataset().to_iterable_dataset()})
    assert len(read(settled(Selection(once, "train[:4]")), **NUMBERS)) == 4


def test_of_a_stream_no_more_is_gone_through_than_a_slice_needs() -> None:
    def endless() -> Iterator[dict[str, Any]]:
        number = 0
        while number < 1000:
            yield {"id": f"{number:03}", "inputs": [float(number)]}
            number += 1
        raise AssertionError("gone through to its end")

    source = settled(Selection(endless(), "train[5:20]"))
    assert source.source.rows == 20
    assert names_of(read(source, **NUMBERS)) == [f"{number:03}" for number in range(5, 20)]
    with pytest.raises(AssertionError):  # the control: the last rows are behind all others
        settled(Selection(endless(), "train[-5:]"))


def test_an_object_says_what_its_classes_are_called() -> None:
    import datasets

    classes = datasets.ClassLabel(names=["neg", "pos"])
    made = datasets.Dataset.from_dict(
        {"inputs": [[1.0], [2.0]], "sentiment": [0, 1]},
        datasets.Features({"inputs": [datasets.Value("float64")], "sentiment": classes}),
    )
    names: dict[str, Any] = {"columns": {"labels": "sentiment"}}
    for source in (made, made.to_iterable_dataset(), made.to_pandas()):
        given = Selection(settled(source), **names)
        how: dict[str, Any] = NUMBERS | {"label_names": {"neg": 1, "pos": 0}}
        if source is made or hasattr(source, "features"):
            with pytest.raises(UserError, match="0 for 'neg', which is 1 in the model"):
                read(given, **how)
        else:  # the control: a frame of pandas does not say it
            assert [int(example.labels) for example in read(given, **how)] == [0, 1]


def test_what_is_no_data_is_refused() -> None:
    class Picture:
        pass

    for wrong, part in (
        (7, "a int"),
        (Picture(), "a Picture"),
        ((n for n in (1, 2)), "row 0: expected a dict"),
        (iter([{"image": b"bytes"}]), "a bytes"),
        (torch.utils.data.DataLoader([{"inputs": [1.0]}]), "a DataLoader, which gives batches"),
        (iter([{"text": Picture()}]), "a Picture"),
    ):
        with pytest.raises(UserError, match=part):
            settled(wrong)
    settled(torch.utils.data.DataLoader([{"inputs": [1.0]}], batch_size=None))  # a row at a time
    transformed = dataset()
    transformed.set_transform(lambda rows: rows)
    with pytest.raises(UserError, match="a transform that makes others"):
        read(transformed, **NUMBERS)


def test_a_data_set_as_datasets_saves_it_is_read(tmp_path: Path) -> None:
    import datasets

    both = datasets.DatasetDict({"train": dataset(), "test": dataset().select([3, 4])})
    both.save_to_disk(tmp_path / "both", num_shards={"train": 2, "test": 1})
    for split, wanted in (("train", ROWS), ("test", ROWS[3:5]), ("train[7:]", ROWS[7:])):
        found = read(Selection(tmp_path / "both", split), **NUMBERS)
        assert names_of(found) == [row["id"] for row in wanted]
    with pytest.raises(UserError, match=r"several splits.*test, train"):
        read(tmp_path / "both", **NUMBERS)
    alone = datasets.Dataset.from_list(ROWS, split="test")
    alone.select([5, 1]).save_to_disk(tmp_path / "alone")
    for split in ("", "test"):
        assert names_of(read(Selection(tmp_path / "alone", split), **NUMBERS)) == ["05", "01"]
    with pytest.raises(UserError, match="no train there"):
        read(Selection(tmp_path / "alone", "train"), **NUMBERS)


def test_objects_are_fitted_and_scored_as_their_rows_are(tmp_path: Path) -> None:
    how: dict[str, Any] = {"address": "none", "quiet": True, "dtype": "float64"}
    fit = how | {"objective": MLP.objective}
    dense = raycurv.fit(MLP.network, ROWS, tmp_path / "dense", **fit)
    wanted = dense.influence(ROWS[:2], ROWS, tmp_path / "wanted", rank="full", **how).table()
    run = raycurv.fit(MLP.network, generated(), tmp_path / "run", **fit)
    assert run.examples().equals(dense.examples())
    # The same command goes on with the same rows, and refuses others.
    raycurv.fit(MLP.network, generated(), tmp_path / "run", **fit)
    with pytest.raises(UserError, match="the data is another one"):
        raycurv.fit(MLP.network, iter(ROWS[1:]), tmp_path / "run", **fit)
    scores = run.influence(
        frame_of_pandas()[:2], generated(), tmp_path / "scores", rank="full", **how
    )
    assert scores.table().equals(wanted)
    # What was gone through once is read again for its columns.
    assert scores.data().rows(["04"], ["labels"])["labels"].to_pylist() == [ROWS[4]["labels"]]
    said = json.loads((tmp_path / "scores" / "run.json").read_text())
    assert said["fingerprints"]["queries"]["rows"] == 2
