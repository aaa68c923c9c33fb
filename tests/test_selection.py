"""One of several splits, a part of one, and columns under names of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import write_rows
from networks import MLP
from test_data_used_whole import save_to_disk, write_jsonl
from test_examples import read

import raycurv
from raycurv import UserError
from raycurv.data.portion import Selection
from raycurv.data.sources import fingerprint, open_parts
from raycurv.data.splits import Split
from raycurv.driver.settings import columns_of
from raycurv.files.store import open_store
from raycurv.jobs.recorded import read_run
from raycurv.jobs.scored_data import ScoredData

HERE: dict[str, Any] = {"address": "none", "quiet": True, "dtype": "float64"}
CLASSES: dict[str, Any] = HERE | {"objective": MLP.objective}
NUMBERS: dict[str, Any] = {"token_inputs": False}
ROWS = [{"input_ids": [n, n + 1]} for n in range(7)]


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def encode(self, texts: list[str], *, special: bool) -> list[list[int]]:
        return [[*text.encode()] for text in texts]


def names_of(examples: list[Any]) -> list[str]:
    return [example.id for example in examples]


def mistake(source: Any, *parts: str) -> UserError:
    with pytest.raises(UserError) as caught:
        read(source)
    assert all(part in str(caught.value) for part in parts), caught.value
    return caught.value


# Slices -------------------------------------------------------------------------------------

SLICES = [
    "train", "train[:]", "train[:3]", "train[3:]", "train[2:5]", "train[-2:]", "train[:-2]",
    "train[5:2]", "train[:99]", "train[-99:3]", "train[10%:50%]", "train[-30%:]", "train[:33%]",
    "train[0%:100%]",
]  # fmt: skip


@pytest.mark.parametrize("rows", [0, 7, 10, 1001])
def test_a_slice_is_the_one_that_datasets_means(rows: int) -> None:
    from datasets import ReadInstruction

    for text in SLICES:
        (wanted,) = ReadInstruction.from_spec(text).to_absolute({"train": rows})
        found = Split.parse("--split", text).rows(rows)
        edges = range(wanted.from_ or 0, rows if wanted.to is None else wanted.to)
        assert list(found) == list(edges), text


@pytest.mark.parametrize(
    "text",
    ["train[", "train[3]", "train[1:2:3]", "a+b", "train[:110%]", "train[10%:20]", "", "[:3]"],
)
def test_what_is_no_slice_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected a split such as"):
        Split.parse("--split", text)


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "arrow"])
def test_a_slice_goes_over_all_files_of_a_split_and_keeps_their_ids(
    tmp_path: Path, ending: str
) -> None:
    for name, some in (("a", ROWS[:3]), ("b", ROWS[3:])):
        path = tmp_path / f"{name}.{ending}"
        if ending == "jsonl":
            write_jsonl(path, some)
        elif ending == "parquet":
            write_rows(path, some)
        else:
            table = pa.Table.from_pylist(some)
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)
    every = names_of(read(tmp_path))
    for text in ("train[:2]", "train[2:5]", "train[-3:]", "train[50%:]", "train[:4]"):
        wanted = Split.parse("--split", text).rows(7)
        examples = read(Selection(tmp_path, text))
        assert names_of(examples) == [every[n] for n in wanted]
        assert [int(one.input_ids[0]) for one in examples] == list(wanted)
    mistake(Selection(tmp_path, "train[7:]"), "at least one example")
    # A slice and a seeded sample of it.
    some = read(Selection(tmp_path, "train[2:]"), max_examples=3)
    assert len(some) == 3 and set(names_of(some)) <= set(every[2:])


# Which files ---------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[list[str], str, list[str]]] = {
    "folders": (["train/a.jsonl", "test/a.jsonl"], "test", ["test/a.jsonl"]),
    "shards": (
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl",
         "data/test-00000-of-00001.jsonl"],
        "train", ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
    ),
    "splits of other names": (
        ["data/train_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl"],
        "train_sft", ["data/train_sft-00000-of-00001.jsonl"],
    ),
    "behind a name": (
        ["chat-train_sft-00000-of-00001.jsonl", "chat-train_gen-00000-of-00001.jsonl"],
        "train_gen", ["chat-train_gen-00000-of-00001.jsonl"],
    ),
    "another word for it": (["train.jsonl", "dev.jsonl"], "validation", ["dev.jsonl"]),
    "the same word": (["train.jsonl", "dev.jsonl"], "dev", ["dev.jsonl"]),
    "one without a name": (["a.jsonl", "b.jsonl"], "train", ["a.jsonl", "b.jsonl"]),
    "one of another name": (["part-00000-of-00001.jsonl"], "train", ["part-00000-of-00001.jsonl"]),
    "what is not read beside another split": (
        ["train/a.jsonl", "test/a.xml"], "train", ["train/a.jsonl"],
    ),
}  # fmt: skip


def lay(root: Path, names: list[str]) -> Path:
    for name in names:
        write_jsonl(root / name, ROWS)
    return root


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("how", ["folder", "uri", "glob"])
def test_a_split_is_read_alone(tmp_path: Path, case: str, how: str) -> None:
    names, split, wanted = LAYOUTS[case]
    lay(tmp_path, names)
    source = {"folder": str(tmp_path), "uri": tmp_path.as_uri(), "glob": f"{tmp_path}/**/*.*"}[how]
    parts = open_parts(Selection(source, split))
    assert [part.name for part in parts] == wanted
    assert fingerprint(Selection(source, split))["split"] == split


WRONG: dict[str, tuple[list[str], str, tuple[str, ...]]] = {
    "no such split": (["train/a.jsonl", "test/a.jsonl"], "val", ("--split val", "test, train")),
    "a file of another one": (["test.jsonl"], "train", ("test", "no train there")),
    "none is named": (["a.jsonl"], "test", ("no test there", "Give --split train")),
    "shards of several": (
        ["train_sft-00000-of-00001.jsonl", "train_gen-00000-of-00001.jsonl"], "",
        ("several splits", "--split train_gen"),
    ),
    "languages": (["en-00000-of-00001.jsonl", "fr-00000-of-00001.jsonl"], "", ("several splits",)),
    "some say none": (["train.jsonl", "more.jsonl"], "", ("more.jsonl, which does not",)),
    "some say none, and one is asked for": (
        ["train.jsonl", "more.jsonl"], "train", ("more.jsonl, which does not",),
    ),
}  # fmt: skip


def test_a_folder_that_says_its_split_is_no_other_one(tmp_path: Path) -> None:
    folder = lay(tmp_path / "imdb" / "test", ["a.jsonl", "b.jsonl"])
    for source in (folder, folder.as_uri()):
        mistake(Selection(source, "train"), "no train there", "Give --split test")
        assert len(read(Selection(source, "test[:10]"))) == 10
        assert len(read(source)) == 14


def test_shards_that_are_not_there_are_named(tmp_path: Path) -> None:
    names = [f"data/train-{n:05}-of-00003.jsonl" for n in range(3)]
    lay(tmp_path, [*names, "data/test-00000-of-00001.jsonl"])
    assert len(open_parts(Selection(tmp_path, "train"))) == 3
    (tmp_path / names[1]).unlink()
    for source in (str(tmp_path), tmp_path.as_uri()):
        error = mistake(
            Selection(source, "train"), "2 of them", "train-00001-of-00003.jsonl is not"
        )
        assert len(read(Selection(source, "test"))) == 7
    # The remedy: a glob names what is meant.
    assert len(open_parts(error.remedy.rpartition("glob: '")[2].removesuffix("'."))) == 2


@pytest.mark.parametrize("case", WRONG)
def test_what_is_ambiguous_is_refused_by_name(tmp_path: Path, case: str) -> None:
    names, split, parts = WRONG[case]
    error = mistake(Selection(f"{lay(tmp_path, names)}/", split), *parts)
    assert "//" not in error.remedy


def test_a_saved_dict_of_splits_is_read_by_one(tmp_path: Path) -> None:
    for name, rows in (("one", 3), ("other", 4)):
        save_to_disk(tmp_path / name, rows=rows)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["one", "other"]}')
    assert "--split one" in mistake(tmp_path, "several splits", "one, other").remedy
    for source in (tmp_path, tmp_path.as_uri()):
        assert len(read(Selection(source, "other[:2]"))) == 2
        assert names_of(read(Selection(source, "one"))) == [
            f"one/data-00000-of-00001.arrow:{n}" for n in range(3)
        ]
        mistake(Selection(source, "train"), "no train there", "one, other")
    # A data set that was saved alone says itself what it is.
    assert len(read(Selection(tmp_path / "one", "one"))) == 3
    mistake(Selection(tmp_path / "one", "train"), "no train there", "one")
    # Two of them beside one another without a dict are not mixed either.
    (tmp_path / "dataset_dict.json").unlink()
    mistake(tmp_path, "several splits", "--split one")
    assert len(read(Selection(tmp_path, "other"))) == 4


# Columns --------------------------------------------------------------------------------------

OURS = [
    {"id": f"{n:03}", "inputs": [n / 8, 1.0, 2.0, n / 4, -1.0], "labels": n % 3} for n in range(6)
]
THEIRS = [
    {"key": row["id"], "inputs": row["inputs"], "class": row["labels"], "labels": 9} for row in OURS
]
NAMES = {"id": "key", "labels": "class"}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Any:
    return write_jsonl(path / "a.jsonl", rows)


def parquet(path: Path, rows: list[dict[str, Any]]) -> Any:
    return write_rows(path / "a.parquet", rows)


def arrow(path: Path, rows: list[dict[str, Any]]) -> Any:
    table = pa.Table.from_pylist(rows)
    path.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(str(path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    return path / "a.arrow"


WAYS: dict[str, Callable[[Path, list[dict[str, Any]]], Any]] = {
    "jsonl": jsonl, "parquet": parquet, "arrow": arrow,
    "table": lambda path, rows: pa.Table.from_pylist(rows), "rows": lambda path, rows: rows,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_columns_of_other_names_are_read_as_those_of_ours(tmp_path: Path, way: str) -> None:
    own = read(WAYS[way](tmp_path / "own", OURS), **NUMBERS)
    source = Selection(WAYS[way](tmp_path / "theirs", THEIRS), columns=NAMES)
    found = read(source, **NUMBERS)
    assert names_of(found) == names_of(own) == [row["id"] for row in OURS]
    for one, other in zip(found, own, strict=True):
        assert (one.inputs == other.inputs).all() and one.labels == other.labels
    # The control: without the names other columns are meant.
    assert {int(one.labels) for one in read(source.source, **NUMBERS)} == {9}
    assert fingerprint(source) == fingerprint(source.source) | {"columns": NAMES}


def test_a_named_label_is_read_beside_one_of_the_usual_name() -> None:
    rows = [{"inputs": [1.0, 2.0], "label": 5, "fine_label": 1}] * 2
    found = read(Selection(rows, columns={"labels": "fine_label"}), **NUMBERS)
    assert [int(example.labels) for example in found] == [1, 1]
    assert int(read(Selection(rows, columns={"labels": "label"}), **NUMBERS)[0].labels) == 5


def test_a_named_column_decides_which_inputs_are_read() -> None:
    rows = [{"input_ids": [1, 2], "body": "ab", "text": "no"}]
    tokenizer = type(
        "T", (), {"encode": lambda self, texts, special: [[*t.encode()] for t in texts]}
    )()
    how: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": 300}
    (found,) = read(Selection(rows, columns={"text": "body"}), **how)
    assert found.input_ids.tolist() == [97, 98]
    with pytest.raises(UserError, match="name it by --completion-column"):
        read(Selection(rows, columns={"prompt": "body"}), **how)
    with pytest.raises(UserError, match="--text-column"):
        read(Selection(rows, columns={"text": "body"}), **NUMBERS)


@pytest.mark.parametrize("way", WAYS)
def test_a_column_that_is_missing_is_named_with_its_file(tmp_path: Path, way: str) -> None:
    bad = [{"key": "a", "inputs": [1.0]}]
    made = WAYS[way](tmp_path, bad)
    error = mistake(Selection(made, columns={"labels": "class"}), "`class` (--label-column)")
    assert Path(str(made)).name in error.where if isinstance(made, Path) else error.where


def test_a_label_that_one_file_lacks_is_named_with_the_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", THEIRS[:3])
    write_rows(
        tmp_path / "b.parquet", [{k: v for k, v in r.items() if k != "class"} for r in THEIRS]
    )
    mistake(Selection(tmp_path, columns={"labels": "class"}), "b.parquet", "`class`")
    # A row of JSON that lacks it is named, too, and so is a file without the flag.
    rows = [*OURS[:2], {k: v for k, v in OURS[2].items() if k != "labels"}]
    write_jsonl(tmp_path / "c" / "a.jsonl", rows)
    named = Selection(tmp_path / "c", columns={"labels": "labels"})
    mistake(named, "a.jsonl, row 2", "`labels` (--label-column)")
    write_rows(tmp_path / "d" / "a.parquet", OURS[:3])
    pq.write_table(pa.Table.from_pylist(OURS[3:]).drop(["labels"]), tmp_path / "d" / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet.*`labels` in all examples or in none"):
        read(tmp_path / "d", **NUMBERS)


def test_names_of_columns_are_checked() -> None:
    assert columns_of("--queries-columns", "text=a b,id=k") == {"text": "a b", "id": "k"}
    for wrong in ("text", "text=", "size=3"):
        with pytest.raises(UserError, match="--queries-columns"):
            columns_of("--queries-columns", wrong)
    settings = raycurv.FitSettings(text_column="a", id_column="a")
    with pytest.raises(UserError, match="--id-column: expected a column of its own, got `a`"):
        settings.select("data", "d")


# Runs -----------------------------------------------------------------------------------------


def test_a_run_is_of_its_split_and_its_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rows in (("train", THEIRS), ("test", THEIRS[:2])):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", rows)
    own = write_jsonl(tmp_path / "own.jsonl", OURS[:4])
    how: dict[str, Any] = CLASSES | {"id_column": "key", "label_column": "class"}
    data, train = tmp_path / "data", how | {"split": "train[:4]"}
    run = raycurv.fit(MLP.network, data, tmp_path / "run", **train)
    dense = raycurv.fit(MLP.network, own, tmp_path / "dense", **CLASSES)
    assert run.examples().equals(dense.examples()) and len(run.examples()) == 4
    said = json.loads((tmp_path / "run" / "run.json").read_text())["fingerprints"]["data"]
    assert said["split"] == "train[:4]" and said["columns"] == NAMES
    assert [file["path"] for file in said["files"]] == ["train.jsonl"]
    # The same goes on; another split or column is another run.
    raycurv.fit(MLP.network, data, tmp_path / "run", **train)
    for other, word in (({"split": "train"}, "split"), ({"label_column": "labels"}, "columns")):
        with pytest.raises(UserError, match=f"the data is another one .*{word} changed"):
            raycurv.fit(MLP.network, data, tmp_path / "run", **(train | other))

    # A scoring takes a split of each; that of the fit is not taken for another one.
    names = {"id_column": "key", "label_column": "class", "rank": "full"}
    scored = {
        split: run.influence(
            data, data, out=tmp_path / f"of {split}", split=split, queries_split="test", quiet=True,
            address="none", **names,
        ).table()
        for split in ("train[:4]", "train[2:]")
    }  # fmt: skip
    ids = [row["id"] for row in OURS]
    assert sorted(set(scored["train[:4]"]["train_id"].to_pylist())) == ids[:4]
    assert sorted(set(scored["train[2:]"]["train_id"].to_pylist())) == ids[2:]
    both = {
        split: {(r["query_id"], r["train_id"]): r["score"] for r in table.to_pylist()}
        for split, table in scored.items()
    }
    for pair in both["train[:4]"].keys() & both["train[2:]"].keys():
        assert both["train[:4]"][pair] == pytest.approx(both["train[2:]"][pair], rel=1e-9)
    # What was scored is read again as it was taken.
    of_scores = read_run(open_store(str(tmp_path / "of train[2:]"), "--out"))
    assert of_scores is not None
    found = ScoredData("train", "scores", of_scores).rows(ids[2:4], ("labels",), text=False)
    assert found["labels"].to_pylist() == [row["labels"] for row in OURS[2:4]]
    # Columns have the data's own names, too: whoever groups by one knows no others.
    data_again = ScoredData("train", "scores", of_scores)
    theirs = data_again.rows(ids[2:4], ("class", "key"), text=False)
    assert theirs["class"].equals(found["labels"]) and theirs["key"].to_pylist() == ids[2:4]
    with pytest.raises(UserError, match=r"got the columns `(class|key)`"):
        data_again.rows(ids[2:4], ("clas",), text=False)
    # Queries that have our names already.
    again = run.influence(
        OURS[:2], data, out=tmp_path / "again", split="train[:4]", address="none", quiet=True,
        queries_columns="id=id,labels=labels", **names,
    )  # fmt: skip
    assert again.table().num_rows == 8
    with pytest.raises(
        UserError, match=r"`key` \(--queries-columns\).*Name those that there are by"
    ):
        run.influence(OURS[:2], data, out=tmp_path / "no", split="train", address="none", **names)
    # What a scoring is not told again is said; here the data has other columns of our names.
    names.pop("label_column")
    names["queries_columns"] = "id=key,labels=class"
    with pytest.raises(UserError, match="label 9"):
        run.influence(
            data, data, out=tmp_path / "said", split="train", queries_split="train",
            address="none", **names | {"id_column": ""},
        )  # fmt: skip
    said = capsys.readouterr().err
    assert "train: the fit's data, which it read with --id-column key --label-column class" in said
    assert "queries: the fit's data" not in said
    new = [row | {"id": f"new {row['id']}"} for row in OURS]
    run.extend(new, tmp_path / "more", address="none")
    there = "the extended run read its data with --id-column key --label-column class"
    assert there in capsys.readouterr().err
