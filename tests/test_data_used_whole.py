"""Data is used whole: what is given is read as it is meant, or named; nothing is passed over."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch
from byte_tokenizer import BOS, VOCAB, byte_ids, save_byte_tokenizer
from commands import run_here, save_llama, write_rows
from test_examples import ids_of, mistake, plain, read
from torch import Tensor, nn

import raycurv
from raycurv import UserError
from raycurv.data import bounds
from raycurv.data.sources import find_parts, open_parts
from raycurv.data.tokenizer import LazyTokenizer

HERE: dict[str, Any] = {"address": "none", "quiet": True, "dtype": "float64"}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def named(source: Any, *parts: str) -> UserError:
    """The mistake of a source that is not opened; its message has these parts."""
    with pytest.raises(UserError) as caught:
        open_parts(source)
    assert all(part in str(caught.value) for part in parts), caught.value
    return caught.value


def test_labels_that_are_shifted_already_are_refused_where_the_loss_is_of_tokens() -> None:
    ids = [5, 6, 7, 8, 9, 5]
    shifted = [{"input_ids": ids, "labels": [*ids[1:], -100]}]
    assert "shifted already" in str(mistake(shifted, per_token=True))
    # Controls: an objective of the user may pair them itself; and the remedies.
    read(shifted, per_token=False)
    for labels in (ids, [-100, *ids[1:]], [-100, 6, 9, 9, 9, 5]):
        read([{"input_ids": ids, "labels": labels}], per_token=True)
    read([{"input_ids": [5] * 6, "labels": [5] * 6}], per_token=True)


def test_a_mask_beside_numbers_is_refused() -> None:
    rows = [{"inputs": [1, 2, 0], "attention_mask": [1, 1, 0], "labels": 1}]
    assert "`attention_mask`" in mistake(rows, token_inputs=False).got


# Attention masks ----------------------------------------------------------------------------

SHORT = [
    {"id": "a", "input_ids": [5, 6, 7], "labels": [5, -100, 7], "loss_mask": [1, 1, 1]},
    {"id": "b", "input_ids": [8, 9], "labels": [8, 9], "loss_mask": [1, 1]},
    {"id": "c", "input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "loss_mask": [0, 0, 1, 1]},
]


def padded(row: dict[str, Any], left: int, right: int, label: int = -100) -> dict[str, Any]:
    """A row as a tokenizer pads it, with the mask beside."""

    def around(values: list[int], pad: int) -> list[int]:
        return [pad] * left + values + [pad] * right

    ones = [1] * len(row["input_ids"])
    return {
        "id": row["id"],
        "input_ids": around(row["input_ids"], 0),
        "labels": around(row["labels"], label),
        "loss_mask": around(row["loss_mask"], 1),
        "attention_mask": around(ones, 0),
    }


@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("format", ["list", "parquet", "jsonl"])
def test_padding_that_a_mask_marks_is_cut_off(tmp_path: Path, side: str, format: str) -> None:
    left, right = {"right": (0, 5), "left": (5, 0), "both": (2, 3)}[side]
    rows: Any = [padded(row, left, right) for row in SHORT]
    if format == "jsonl":
        rows = write_jsonl(tmp_path / "a.jsonl", rows)
    elif format == "parquet":
        rows = write_rows(tmp_path / "a.parquet", rows)
    assert [plain(e) for e in read(rows)] == [plain(e) for e in read(SHORT)]
    without = [{k: v for k, v in padded(row, left, right).items() if k != "attention_mask"}
               for row in SHORT]  # fmt: skip
    assert [plain(e) for e in read(without)] != [plain(e) for e in read(SHORT)]  # the control


def test_rows_with_and_without_a_mask_stand_side_by_side() -> None:
    rows = [padded(SHORT[0], 0, 4), SHORT[1]]
    assert [ids_of(e) for e in read(rows)] == [[5, 6, 7], [8, 9]]


MASKS: dict[str, tuple[list[Any], str]] = {
    "a gap": ([1, 0, 1], "0 at position 1"),
    "another length": ([1, 1], "`attention_mask` of 3 entries"),
    "other numbers": ([1, 2, 1], "zeros and ones"),
    "nothing but padding": ([0, 0, 0], "none but padding"),
    "fractions": ([1.0, 1.0, 0.0], "zeros and ones"),
}


@pytest.mark.parametrize("case", MASKS)
def test_a_mask_that_cannot_be_meant_is_named(case: str) -> None:
    mask, part = MASKS[case]
    error = mistake([{"id": "odd", "input_ids": [1, 2, 3], "attention_mask": mask}])
    assert "'odd'" in error.where and part in str(error)


BESIDE: dict[str, tuple[dict[str, Any], bool]] = {
    "positions as they are": ({"position_ids": [0, 1, 2]}, True),
    "positions of padding": ({"position_ids": [1, 0, 1], "attention_mask": [0, 1, 1]}, True),
    "packed positions": ({"position_ids": [0, 1, 0]}, False),
    "shifted positions": ({"position_ids": [4, 5, 6]}, False),
    "kinds of one text": ({"token_type_ids": [0, 0, 0]}, True),
    "kinds of two texts": ({"token_type_ids": [0, 1, 1]}, False),
    "special tokens": ({"special_tokens_mask": [1, 0, 0]}, True),
    "a mask of the completion": ({"completion_mask": [0, 1, 1]}, False),
    "a mask of the assistant": ({"assistant_masks": [0, 1, 1]}, False),
    "packed lengths": ({"seq_lengths": [2, 1]}, False),
    "pixels": ({"pixel_values": [0.5]}, False),
    "other things": ({"source": "web", "score": 0.25}, True),
}  # fmt: skip


@pytest.mark.parametrize("case", BESIDE)
def test_columns_that_would_change_a_number_are_followed_or_refused(case: str) -> None:
    more, taken = BESIDE[case]
    # Also where only a later row has them.
    for first in ([], [{"input_ids": [4]}]):
        rows = [*first, {"input_ids": [1, 2, 3], **more}]
        if taken:
            assert len(read(rows)) == len(rows)
        else:
            assert next(iter(more)) in str(mistake(rows))


def test_a_model_that_sees_images_is_given_texts_alone() -> None:
    rows = [{"input_ids": [4, 5]}, {"input_ids": [1, 9, 3], "images": ["a.png"]}]
    # A model of text alone has nothing that they could go to.
    assert len(read(rows)) == 2
    assert "`images`" in mistake(rows, placeholders=()).got
    assert (
        "token 9 at position 1" in mistake([rows[0], {"input_ids": [1, 9]}], placeholders={9}).got
    )
    assert len(read(rows[:1], placeholders={9})) == 1


def test_a_padded_file_gives_the_numbers_of_the_text_bit_for_bit(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model", tokenizer=False)
    rng = np.random.default_rng(0)
    rows = [
        {"id": str(n), "input_ids": rng.integers(3, 50, length).tolist()}
        for n, length in enumerate((9, 4, 7, 12))
    ]
    for row in rows:
        row |= {"labels": row["input_ids"], "loss_mask": [1] * len(row["input_ids"])}
    whole = [padded(row, n % 3, 12 - n, label=0) for n, row in enumerate(rows)]
    runs = [
        raycurv.fit(model, data, tmp_path / name, fisher="empirical", blocks=["*down_proj"], **HERE)
        for name, data in (("a", rows), ("b", whole))
    ]
    a, b = (run.blocks().drop_columns(["eigh_seconds"]) for run in runs)
    assert a.equals(b) and runs[0].examples().equals(runs[1].examples())
    reading = runs[1].manifest.facts["reading"]["data"]
    assert reading["padded_examples"] == 4 and reading["targets_at_padding"] > 0


# Files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other", ["b.parquet.gz", "b.jsonl.xz", "b.csv.zip", "b.txt", "b.bin", "sub/b.xls", "b"]
)
@pytest.mark.parametrize("uri", [False, True])
def test_a_file_that_is_not_read_is_named(tmp_path: Path, other: str, uri: bool) -> None:
    write_jsonl(tmp_path / "a.jsonl", SHORT)
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_bytes(b"what")
    error = named(tmp_path.as_uri() if uri else tmp_path, other, "1 other file beside 1")
    if other.endswith(".gz") and not uri:
        assert f"gunzip {tmp_path}/{other}" in error.remedy
    # What a remedy says works.
    assert len(open_parts(f"{tmp_path}/*.jsonl")) == 1


@pytest.mark.parametrize("other", ["a.jsonl.gz", "a.csv", "a.JSON"])
def test_a_file_in_two_formats_is_not_read_twice(tmp_path: Path, other: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", SHORT)
    write_jsonl(tmp_path / other, SHORT)
    for source in (tmp_path, tmp_path.as_uri()):
        named(source, "a.jsonl", other, "every file in one format")
    assert len(open_parts(f"{tmp_path}/*.jsonl")) == 1
    # The control: another name, or another folder.
    (tmp_path / other).rename(tmp_path / f"b{other[1:]}")
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "sub" / "a.jsonl", SHORT)
    assert len(open_parts(tmp_path)) == 3


def test_files_that_are_no_data_are_known(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", SHORT)
    for name in ("README.md", "LICENSE", "a.jsonl.sha256", "SHA256SUMS", "dataset_info.json",
                 "dataset_infos.json", "CITATION.cff", ".gitattributes", "loader.py"):  # fmt: skip
        (tmp_path / name).write_text("{}")
    assert [part.name for part in open_parts(tmp_path)] == ["a.jsonl"]


def test_hidden_data_is_told(tmp_path: Path) -> None:
    for name in ("a.jsonl", "_part.jsonl", ".b.jsonl", "cache-12.arrow"):
        write_jsonl(tmp_path / name, SHORT)
    assert find_parts(tmp_path).left_out == (".b.jsonl", "_part.jsonl", "cache-12.arrow")


SPLITS: dict[str, tuple[list[str], str]] = {
    "folders": (["train/a.jsonl", "test/a.jsonl"], "/train "),
    "a folder of the hub": (
        ["data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl"],
        "/data/train-*'",
    ),
    "files": (["train.jsonl", "dev.jsonl"], "/train*'"),
    "a cache": (["imdb-train.jsonl", "imdb-test.jsonl"], "/imdb-train*'"),
}


@pytest.mark.parametrize("case", SPLITS)
@pytest.mark.parametrize("uri", [False, True])
def test_splits_are_not_mixed(tmp_path: Path, case: str, uri: bool) -> None:
    names, given = SPLITS[case]
    for name in names:
        write_jsonl(tmp_path / name, SHORT)
    source = tmp_path.as_uri() if uri else str(tmp_path)
    error = named(source, "several splits")
    assert f"{tmp_path}{given}" in error.remedy
    assert len(open_parts(source + given.rstrip(" '"))) == 1
    # On purpose, by a glob, all are read.
    glob = error.remedy.rpartition(": '")[2].removesuffix("'.")
    assert len(open_parts(glob)) == 2
    # The control: words within a name are no splits.
    for name, other in zip(names, ("attest.jsonl", "developed/retrain.jsonl"), strict=True):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / other)
    assert len(open_parts(source)) == 2


def save_to_disk(folder: Path, state: Any = None, rows: int = 3) -> Path:
    """A data set as Hugging Face datasets saves it."""
    folder.mkdir(parents=True)
    table = pa.table({"input_ids": [[n, n + 1] for n in range(rows)]})
    name = "data-00000-of-00001.arrow"
    with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
        writer.write_table(table)
    said = {"_data_files": [{"filename": name}], "_split": folder.name} | (state or {})
    (folder / "state.json").write_text(json.dumps(said))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_saved_dict_of_splits_is_refused(tmp_path: Path) -> None:
    for name in ("one", "other"):
        save_to_disk(tmp_path / name)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["one", "other"]}')
    error = named(tmp_path, "several splits", "one, other")
    assert f"{tmp_path}/one" in error.remedy
    assert [part.name for part in open_parts(tmp_path / "one")] == ["data-00000-of-00001.arrow"]


STATES: dict[str, tuple[dict[str, Any], str]] = {
    "a selection": ({"_indices_files": [{"filename": "i.arrow"}]}, "a selection of their rows"),
    "an old selection": ({"_indices_data_files": [{"filename": "i.arrow"}]}, "a selection"),
    "a file that is gone": (
        {"_data_files": [{"filename": "data-00000-of-00001.arrow"}, {"filename": "b.arrow"}]},
        "none of the name 'b.arrow'",
    ),
    "another file": ({"_data_files": []}, "besides"),
    "a part of a file": (
        {"_data_files": [{"filename": "data-00000-of-00001.arrow", "take": 2}]}, "a part of",
    ),
    "nonsense": ({"_data_files": 7}, "a list of files"),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_a_saved_data_set_is_held_against_its_state(tmp_path: Path, case: str) -> None:
    state, part = STATES[case]
    folder = save_to_disk(tmp_path / "saved", state)
    for source in (folder, f"{folder}/*.arrow", next(folder.glob("*.arrow")), folder.as_uri()):
        named(source, "state.json", part)
    assert len(read(save_to_disk(tmp_path / "right", {"_indices_files": None}))) == 3


def test_a_table_with_a_log_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "part-0.parquet", SHORT)
    (tmp_path / "_delta_log").mkdir()
    named(tmp_path, "a Delta table", "rows that were deleted")
    assert len(read(f"{tmp_path}/*.parquet")) == 3


# Links --------------------------------------------------------------------------------------


def test_links_that_leave_a_folder_are_refused(tmp_path: Path) -> None:
    secret = write_jsonl(tmp_path / "private" / "secret.jsonl", [{"input_ids": [9]}])
    folder = tmp_path / "data"
    write_jsonl(folder / "a.jsonl", SHORT)
    link = folder / "b.jsonl"
    link.symlink_to(secret)
    for source in (folder, folder.as_uri(), f"{tmp_path}/d*"):
        named(source, "b.jsonl", "a link to")
    # What a person names is theirs to name.
    assert len(read(f"{folder}/*.jsonl")) == 4 and len(read(link)) == 1
    link.unlink()
    link.symlink_to("a.jsonl")  # within
    assert len(open_parts(folder)) == 2
    link.unlink()
    (folder / "sub").symlink_to(secret.parent)
    named(folder, "a link to one")


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(tmp_path: Path) -> None:
    cache = tmp_path / "datasets--a--b"
    blob = write_jsonl(cache / "blobs" / "0123abc", SHORT)
    snapshot = cache / "snapshots" / "fed"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data" / "a.jsonl").symlink_to(f"../../../blobs/{blob.name}")
    for source in (snapshot, snapshot / "data"):
        assert len(read(source)) == 3
    outside = write_jsonl(tmp_path / "other.jsonl", SHORT)
    (snapshot / "data" / "b.jsonl").symlink_to(outside)
    named(snapshot, "a link to")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "a.jsonl")
    for source in (tmp_path, f"{tmp_path}/*.jsonl", tmp_path / "a.jsonl"):
        with pytest.raises(UserError):
            open_parts(source)


# Empty rows and targets that are cut off ----------------------------------------------------

WIKI = [{"text": ""}, {"text": " = Title = \n"}, {"text": ""}, {"text": "Body."}]


@pytest.mark.parametrize("template", ["$A", "<s> $A"])
def test_empty_texts_are_skipped_when_asked(tmp_path: Path, template: str) -> None:
    how: dict[str, Any] = {
        "tokenizer": LazyTokenizer(save_byte_tokenizer(tmp_path / "m", template)),
        "vocab_size": VOCAB,
    }
    found = read(WIKI, empty="skip", **how)
    assert [(e.index, e.id) for e in found] == [(0, "1"), (1, "3")]
    before = [BOS] if "<s>" in template else []
    assert ids_of(found[1]) == [*before, *byte_ids("Body.")]
    if template == "$A":
        assert "--empty skip" in mistake(WIKI, **how).remedy
    else:  # an example of a special token alone
        assert len(read(WIKI, **how)) == 4
    assert "2 empty ones" in str(mistake([WIKI[0], WIKI[2]], empty="skip", **how))


def test_rows_without_tokens_are_skipped_when_asked() -> None:
    rows = [{"input_ids": []}, {"input_ids": [1, 2]},
            {"input_ids": [7, 7], "attention_mask": [0, 0]}]  # fmt: skip
    assert [e.id for e in read(rows, empty="skip")] == ["1"]
    assert [e.id for e in read(rows, empty="skip", max_examples=3)] == ["1"]
    assert "at least one token" in mistake(rows).expected


TARGETS_BEHIND = [
    {"id": "cut", "input_ids": [1, 2, 3, 4], "loss_mask": [0, 0, 0, 1]},
    {"id": "kept", "input_ids": [1, 2, 3, 4], "loss_mask": [0, 1, 0, 1]},
]


def test_every_job_tells_of_targets_that_were_cut_off(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model", tokenizer=False)
    data = write_jsonl(tmp_path / "data.jsonl", [*TARGETS_BEHIND, {"input_ids": [5, 6]}])
    kept = write_jsonl(tmp_path / "kept.jsonl", TARGETS_BEHIND[1:])
    cut = ["--long", "truncate", "--max-length", 3, "--address", "none"]
    run = tmp_path / "run"
    said = "all targets of 1 were cut off by --long truncate"
    for job, more in (
        ("fit", ["--model", model, "--data", data, "--out", run]),
        ("evaluate", ["--model", model, "--data", data, "--out", tmp_path / "e"]),
        ("influence", ["--run", run, "--queries", kept, "--train", data, "--out", tmp_path / "i"]),
    ):
        outcome = run_here(job, [*more, *cut])
        assert outcome.code == 0, outcome.err
        assert said in " ".join(outcome.err.split()), outcome.err
        facts = json.loads((Path(str(more[-1])) / "run.json").read_text())["facts"]["reading"]
        counted = facts["train" if "train" in facts else "data"]
        assert counted["examples_without_loss"] == counted["targets_cut_off"] == 1
    # A query that measures nothing is a mistake, not a row of zeros.
    flags = ["--run", run, "--queries", data, "--train", data, "--out", tmp_path / "q", *cut]
    outcome = run_here("influence", flags)
    assert outcome.code == 2
    assert "'cut' of --queries" in outcome.err and "1 of 3 examples" in outcome.err
    # The control: without the cut, all is well.
    clean = write_jsonl(tmp_path / "clean.jsonl", TARGETS_BEHIND)
    outcome = run_here("evaluate", ["--model", model, "--data", clean, "--out", tmp_path / "f",
                                    "--address", "none"])  # fmt: skip
    assert outcome.code == 0 and "cut off" not in outcome.err


def test_columns_that_are_not_read_are_told(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model", tokenizer=False)
    rows = [{"input_ids": [1, 2], "source": "x"}, {"input_ids": [3, 4], "\x1b[31m": 1}]
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    flags = ["--model", model, "--data", data, "--out", tmp_path / "o", "--address", "none"]
    outcome = run_here("evaluate", flags)
    assert outcome.code == 0 and "columns that were not read" in outcome.err
    assert "source" in outcome.err and "\x1b[31m" not in outcome.err


# Classes of texts -----------------------------------------------------------------------------


class TextClassifier(nn.Module):
    """Looks token ids up, as they are."""

    def __init__(self, embedding_first: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        embedding, out = nn.Embedding(300, 6), nn.Linear(6, 3)
        if embedding_first:
            self.embedding = embedding
        self.out = out
        if not embedding_first:
            self.embedding = embedding

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.out(self.embedding(ids).mean(1))
        return logits


CLASSES = [{"inputs": [n, 2 * n, 290], "labels": n % 3} for n in range(6)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_classifier_of_texts_takes_token_ids_and_a_class(tmp_path: Path, dtype: str) -> None:
    found = []
    for first in (True, False):
        run = raycurv.fit(
            lambda first=first: TextClassifier(first), CLASSES, tmp_path / f"{first}",
            objective="classification", fisher="empirical", blocks=["out"],
            **HERE | {"dtype": dtype},
        )  # fmt: skip
        found.append(run.examples())
    assert found[0].equals(found[1])
    # The numbers are those of the ids, which bfloat16 cannot hold.
    network = TextClassifier(True).to(getattr(torch, dtype))
    ids = torch.tensor([row["inputs"] for row in CLASSES])
    labels = torch.tensor([row["labels"] for row in CLASSES])
    loss = nn.functional.cross_entropy(network(ids).float(), labels, reduction="none")
    assert np.allclose(found[0]["loss"].to_numpy(), loss.detach(), atol=1e-5)


def test_what_is_no_class_of_a_text_is_named(tmp_path: Path) -> None:
    def fit(rows: list[dict[str, Any]], objective: str = "classification") -> None:
        raycurv.fit(lambda: TextClassifier(True), rows, tmp_path, objective=objective,
                    blocks=["out"], **HERE)  # fmt: skip

    with pytest.raises(UserError, match=r"'0'.*a number in `labels`.*got 'no'"):
        fit([{"input_ids": [1, 2, 3], "labels": "no"}])
    with pytest.raises(UserError, match=r"'1'.*from 0 to 299.*got 300"):
        fit([*CLASSES[:1], {"inputs": [1, 2, 300], "labels": 0}])
    with pytest.raises(UserError, match=r"whole numbers in `inputs`.*double"):
        fit([*CLASSES[:1], {"inputs": [1.5, 2.0, 3.0], "labels": 0}])
    with pytest.raises(UserError, match="`input_ids` or"):
        fit(CLASSES, "causal-lm")


def test_whole_numbers_stay_numbers_for_a_model_of_numbers(tmp_path: Path) -> None:
    class Positions(nn.Module):
        """Has an embedding, of positions, and no use for whole numbers."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.out, self.positions = nn.Linear(4, 3), nn.Embedding(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.out(x / 255) + self.positions(torch.arange(3)).squeeze(1)
            return logits

    rows = [{"inputs": [n, 255, 3, 7], "labels": n % 3} for n in range(4)]
    how: dict[str, Any] = HERE | {"objective": "classification", "blocks": ["out"]}
    run = raycurv.fit(Positions, rows, tmp_path, **how)
    assert len(run.examples()) == 4


# Bounds -------------------------------------------------------------------------------------


def small(monkeypatch: pytest.MonkeyPatch, **limits: int) -> None:
    """Bounds that a test's data can go beyond."""
    for name, value in limits.items():
        for module in [m for n, m in sys.modules.items() if n.startswith("raycurv.data.")]:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


def test_a_line_and_a_text_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, LINE_BYTES=1 << 20, TEXT_BYTES=1 << 19)
    model = LazyTokenizer(save_byte_tokenizer(tmp_path / "m"))
    for size, part in ((1 << 20, "line 2"), (700_000, "a text of at most"), (400_000, "")):
        rows = [{"text": "a"}, {"text": "b" * size}]
        source = write_jsonl(tmp_path / "a.jsonl", rows)
        how: dict[str, Any] = {"tokenizer": model, "vocab_size": VOCAB}
        if part:
            assert part in str(mistake(source, **how))
        else:
            assert [e.length for e in read(source, **how)] == [1, size]


def test_texts_are_tokenised_some_at_a_time() -> None:
    class Watched:
        most = 0

        def encode(self, texts: list[str], *, special: bool) -> list[list[int]]:
            self.most = max(self.most, sum(map(len, texts)))
            return [[len(text) % 100] for text in texts]

    tokenizer = Watched()
    rows = [{"text": "x" * (n % 977)} for n in range(1500)]
    found = read(rows, tokenizer=tokenizer)
    assert [ids_of(e) for e in found] == [[n % 977 % 100] for n in range(1500)]
    assert 100_000 < tokenizer.most <= bounds.TOKENISED_BYTES


def one_row_of_zeros(path: Path, tokens: int, **how: Any) -> Path:
    row = pa.LargeListArray.from_arrays([0, tokens], pa.array(np.zeros(tokens, np.int64)))
    pq.write_table(pa.table({"input_ids": row}), path, **how)
    return path


def test_a_parquet_file_of_much_from_little_is_refused_by_its_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, EXPANDED=1 << 20)
    path = one_row_of_zeros(tmp_path / "a.parquet", 1 << 20)
    assert path.stat().st_size < 4096
    decoded = []
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: decoded.append(1))
    assert "row group 0" in str(mistake(path)) and not decoded
    monkeypatch.undo()
    small(monkeypatch, EXPANDED=1 << 20)
    # As much is read in row groups of a bearable size, and so are numbers that take their bytes.
    table = pa.table({"input_ids": [[0] * 1000] * 1000})
    pq.write_table(table, path, row_group_size=100)
    assert len(read(path)) == 1000
    random = np.random.default_rng(0).integers(0, 100, (300, 1000)).tolist()
    pq.write_table(pa.table({"input_ids": random}), path)
    assert len(read(path)) == 300


def test_one_text_for_many_rows_is_read_in_bounded_chunks(tmp_path: Path) -> None:
    text = "x" * (1 << 20)
    table = pa.table({"text": [text] * 64})
    pq.write_table(table, tmp_path / "a.parquet", dictionary_pagesize_limit=1 << 24)
    pyarrow.feather.write_feather(
        pa.table({"text": table["text"].combine_chunks().dictionary_encode()}),
        str(tmp_path / "b.feather"),
    )
    views = pa.array([text] * 64, pa.string_view())
    for source in (tmp_path / "a.parquet", tmp_path / "b.feather", pa.table({"text": views})):
        (part,) = open_parts(source)
        sizes = [len(rows.numbers) for rows in part.read(("text",), ())]
        assert sum(sizes) == 64 and max(sizes) <= 4, source


def test_an_arrow_file_of_much_from_little_is_refused_by_its_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, EXPANDED=1 << 20)
    row = pa.LargeListArray.from_arrays([0, 1 << 20], pa.array(np.zeros(1 << 20, np.int64)))
    table = pa.table({"input_ids": row})
    for suffix, new in (("arrow", pa.ipc.new_stream), ("feather", pa.ipc.new_file)):
        path = tmp_path / f"a.{suffix}"
        for codec in ("zstd", "lz4"):
            with new(
                str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)
            ) as w:
                w.write_table(table)
            assert "record batch 0" in str(mistake(path))
        with new(str(path), table.schema) as w:
            w.write_table(table)
        assert read(path)[0].length == 1 << 20


def test_an_arrow_file_without_a_batch_of_its_footer_is_damaged(tmp_path: Path) -> None:
    table = pa.table({"input_ids": [[n] for n in range(90)]})
    path = tmp_path / "a.feather"
    pyarrow.feather.write_feather(table, str(path), chunksize=30, compression="uncompressed")
    assert len(read(path)) == 90
    content = path.read_bytes()
    end = content.index(b"\xff\xff\xff\xff\x00\x00\x00\x00")  # the end of the stream in it
    with pa.memory_map(str(path)) as file:
        batch = pa.ipc.open_file(file).get_batch(0)
    more = batch.serialize().to_pybytes()
    path.write_bytes(content[:end] + more + content[end:])
    assert "record batches" in str(mistake(path)) or "Arrow" in str(mistake(path))


HOSTILE: dict[str, bytes] = {
    "a key twice": b'{"input_ids": [1], "input_ids": [2]}',
    "deep": b'{"input_ids": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "less deep": b'{"input_ids": ' + b"[" * 300 + b"]" * 300 + b"}",
    "a huge number": b'{"input_ids": [' + b"9" * 5000 + b"]}",
    "a large number": b'{"input_ids": [18446744073709551616]}',
    "a large float": b'{"inputs": [1e999]}',
    "not a number": b'{"inputs": [NaN]}',
    "no token": b'{"input_ids": [NaN]}',
    "no UTF-8": b'{"text": "\xff"}',
    "a lone surrogate": b'{"text": "\\ud800"}',
    "a lone surrogate's id": b'{"id": "\\ud800", "input_ids": [1]}',
    "a bare zero byte": b'{"text": "\x00"}',
    "a long id": b'{"id": "' + b"a" * 5000 + b'", "input_ids": [1]}',
    "mixed": b'{"input_ids": [1, "a", null]}',
    "an object": b'{"input_ids": {"a": 1}}',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_line_is_named(tmp_path: Path, case: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(HOSTILE[case] + b"\n")
    error = mistake(path, tokenizer=save_byte_tokenizer(tmp_path / "m"))
    assert "a.jsonl" in error.where and len(str(error)) < 1500


def test_text_of_other_bytes_is_named(tmp_path: Path) -> None:
    wrong = pa.StringArray.from_buffers(
        2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff")
    )
    table = pa.table({"text": wrong})
    pq.write_table(table, tmp_path / "a.parquet")
    for source in (table, tmp_path / "a.parquet"):
        assert "UTF" in str(mistake(source, tokenizer=save_byte_tokenizer(tmp_path / "m")))


def test_offsets_outside_a_column_are_named(tmp_path: Path) -> None:
    """What is not checked here is read from outside the file."""
    table = pa.table({"input_ids": pa.array([[1, 2], [3]], pa.large_list(pa.int64()))})
    path = tmp_path / "a.arrow"
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    content = path.read_bytes()
    offsets = np.array([0, 2, 3], np.int64).tobytes()
    assert content.count(offsets) == 1
    for wrong in ([0, 1 << 40, 3], [0, 2, 1 << 40], [-8, 2, 3], [2, 0, 3]):
        path.write_bytes(content.replace(offsets, np.array(wrong, np.int64).tobytes()))
        assert "a.arrow" in str(mistake(path))
