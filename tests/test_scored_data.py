"""Claims about the data of finished scores, read again by id: texts, columns, tokens; and refusals
where it is not what was scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from byte_tokenizer import byte_ids, save_byte_tokenizer
from commands import flags_of, run_here, save_llama, texts, write_rows

import raycurv
from raycurv.data.formats.parquet_part import ParquetPart
from raycurv.data.row_text import row_text, text_columns
from raycurv.data.rows_by_id import rows_by_id
from raycurv.errors import UserError

ROWS = [row | {"source": f"book {n % 3}"} for n, row in enumerate(texts(9))]
HERE: dict[str, Any] = {"address": "none", "quiet": True}


class Scored:
    """A fit, and what makes scores of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_llama(folder / "model", layers=1)
        self.train = write_rows(folder / "train" / "a.parquet", ROWS[:5]).parent
        (self.train / "b.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in ROWS[5:]))
        self.fitted = raycurv.fit(self.model, self.train, folder / "run", **HERE)

    def scores(self, queries: Any, train: Any, out: Path, **settings: Any) -> raycurv.Scores:
        return self.fitted.influence(queries, train, out, **HERE, **settings)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    return Scored(tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="module")
def plain(scored: Scored) -> raycurv.Scores:
    """Scores of files, by a command that names them from where it runs."""
    out = scored.folder / "scores"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(scored.folder)
        flags = {"run": "run", "queries": "train/b.jsonl", "train": "train", "out": out}
        done = run_here("influence.py", flags_of(flags | {"address": "none"}))
    assert done.code == 0, done.err
    return raycurv.open_scores(out)


def test_rows_are_those_of_the_ids_in_their_order(plain: raycurv.Scores) -> None:
    ids = ["text 7", "text 0", "text 7", "text 4"]
    found = plain.data("train").rows(ids, ["source"])
    by_id = {row["id"]: row for row in ROWS}
    assert found.to_pylist() == [by_id[id] for id in ids]
    assert plain.data("queries").rows(["text 6"], text=False).to_pylist() == [{"id": "text 6"}]
    with pytest.raises(UserError, match=r"example 'text 0': expected one of the queries of"):
        plain.data("queries").rows(["text 0"])


def test_top_has_texts_beside_ids(plain: raycurv.Scores) -> None:
    top, bare = plain.top("text 5", 4), plain.top("text 5", 4, text=False)
    by_id = {row["id"]: row["text"] for row in ROWS}
    assert top["text"].to_pylist() == [by_id[id] for id in top["train_id"].to_pylist()]
    assert top.drop(["text"]).equals(bare)


def test_rows_without_ids_are_found_by_file_and_number(tmp_path: Path) -> None:
    rows = [{"text": f"line {n}", "n": n} for n in range(3000)]
    write_rows(tmp_path / "in" / "a.parquet", rows[:2500])
    (tmp_path / "b.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows[2500:]))
    found = rows_by_id(str(tmp_path), ["in/a.parquet:2049", "b.jsonl:3", "b.jsonl:900"], ["n"])
    assert found == {"in/a.parquet:2049": {"n": 2049}, "b.jsonl:3": {"n": 2503}}
    assert rows_by_id(pa.Table.from_pylist(rows), ["7"], ["text"]) == {"7": {"text": "line 7"}}


def test_a_few_rows_are_read_without_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        write_rows(tmp_path / f"{name}.parquet", [{"text": f"{name}{n}"} for n in range(4000)])
    read: list[tuple[str, int]] = []
    before = ParquetPart.read

    def counted(part: Any, required: Any, optional: Any) -> Any:
        for rows in before(part, required, optional):
            read.append((part.name, "text" in rows.columns))
            yield rows

    monkeypatch.setattr(ParquetPart, "read", counted)
    assert rows_by_id(str(tmp_path), ["b.parquet:5"], ["text"]) == {"b.parquet:5": {"text": "b5"}}
    # Texts of one chunk of one file; and the file behind it is not opened.
    assert [name for name, texts in read if texts] == ["b.parquet"]
    assert "c.parquet" not in {name for name, _ in read}


def test_a_column_that_is_not_there_is_named_with_those_that_are(plain: raycurv.Scores) -> None:
    with pytest.raises(UserError, match=r"column `author`, got the columns `id`, `source`, `text`"):
        plain.data("train").rows(["text 1"], ["author"], text=False)
    with pytest.raises(UserError, match=r"b\.jsonl, row 1.* a column `author`"):
        plain.data("queries").rows(["text 6"], ["author"])


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_data_that_is_not_what_was_scored_is_refused(
    scored: Scored, tmp_path: Path, how: str
) -> None:
    train = write_rows(tmp_path / "rows.parquet", ROWS)
    scores = scored.scores(ROWS[:2], train, tmp_path / "scores")
    assert scores.top("text 0", 2, text=True)["text"].null_count == 0
    if how == "changed":
        write_rows(train, [row | {"text": row["text"].upper()} for row in ROWS])
        said = r"train of .*scores: .* other data in .*rows\.parquet .its files have other names or"
    else:
        (tmp_path / "there").mkdir()
        train = train.rename(tmp_path / "there" / train.name)
        said = r"train of .*scores: .* data in .*rows\.parquet, got .*nothing of that name"
    with pytest.raises(UserError, match=said) as error:
        raycurv.open_scores(scores.path).top("text 0", 2, text=True)
    assert f"open_scores('{scores.path}', train=…)" in str(error.value)
    with pytest.warns(UserWarning, match=r"no texts: .*rows\.parquet"):
        top = raycurv.open_scores(scores.path).top("text 0", 2)
    assert top["text"].null_count == 2 and top["score"].null_count == 0
    again = raycurv.open_scores(scores.path, train=train)
    if how == "gone":
        assert again.top("text 0", 2, text=True)["text"].null_count == 0
    else:
        with pytest.raises(UserError, match="other names or contents"):
            again.top("text 0", 2, text=True)


def test_data_in_memory_is_at_hand_and_else_given_again(scored: Scored, tmp_path: Path) -> None:
    scores = scored.scores(ROWS[:2], ROWS, tmp_path / "scores")
    assert scores.data("queries").rows(["text 1"])["text"].to_pylist() == [ROWS[1]["text"]]
    later = raycurv.open_scores(scores.path)
    with pytest.raises(UserError, match=r"got it was in memory\. Give it again: .*queries=…"):
        later.data("queries").rows(["text 1"])
    again = raycurv.open_scores(scores.path, queries=ROWS[:2], train=pa.Table.from_pylist(ROWS))
    assert again.data("queries").rows(["text 1"], ["source"])["source"].to_pylist() == ["book 1"]
    with pytest.raises(UserError, match="got other data"):
        again.data("train").rows(["text 1"])


def test_a_place_in_a_network_is_not_gone_to_because_a_file_says_so(
    plain: raycurv.Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plain.manifest.facts, "train", "s3://bucket/train")
    with pytest.raises(UserError, match=r"got s3://bucket/train\. Give it again"):
        plain.data("train").rows(["text 1"])


def test_tokens_and_pieces_are_those_that_were_scored(scored: Scored, tmp_path: Path) -> None:
    ids = [{"id": f"row {n}", "input_ids": byte_ids(r["text"])} for n, r in enumerate(ROWS)]
    long = "a\nlong row of 33 characters\tends."
    named = [*ROWS[:3], {"id": "x#1", "text": "whole"}, {"id": "y", "text": long}]
    scores = scored.scores(ids, named, tmp_path / "scores", long="split", max_length=12)
    (n, most) = max(enumerate(ROWS), key=lambda one: len(one[1]["text"]))
    found = scores.data("queries").rows([f"row {n}#1"])["text"].to_pylist()
    assert found == [most["text"][12:24]]
    found = scores.data("train").rows(["y#1", "x#1", "y#2", "y#0"])["text"].to_pylist()
    assert found == [long[12:24], "whole", long[24:], long[:12]]
    for wrong in ("y#3", "z#0", "z"):
        with pytest.raises(UserError, match=f"example '{wrong}': .* no such id"):
            scores.data("train").rows([wrong])
    assert ["".join(t) for t in scores.data("train").tokens(["y#2", "x#1"])] == [long[24:], "whole"]
    monkeyed = scores.data("train")
    del monkeyed.manifest.facts["longest"]
    with pytest.raises(UserError, match="scores of an earlier version"):
        monkeyed.rows(["y#1"])


def test_tokens_of_a_truncated_example_end_where_it_was_cut(scored: Scored, tmp_path: Path) -> None:
    scores = scored.scores(
        ROWS[:1], ROWS, tmp_path / "scores", long="truncate", max_length=12, per_token=True
    )
    data = scores.data("train")
    for row in scores.table().to_pylist():
        (tokens,) = data.tokens([row["train_id"]])
        assert len(tokens) == len(row["token_scores"])
        whole = data.rows([row["train_id"]])["text"].to_pylist()[0]
        assert "".join(tokens) == whole[:12]


def test_tokens_of_a_conversation_are_those_with_its_tools(scored: Scored, tmp_path: Path) -> None:
    """And turns that cannot be told apart matter to none who reads tokens alone."""
    folder = save_byte_tokenizer(tmp_path / "chat", chat=TURNS)
    asks, says = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    talk = [asks, says, asks, says]
    rows = [{"id": f"{n}", "messages": talk[:n], "tools": [{"name": "f"}]} for n in (2, 4)]
    how: dict[str, Any] = {"tokenizer": folder, "loss_on": "last-assistant", "method": "identity"}
    run = raycurv.fit(scored.model, rows, tmp_path / "run", **HERE, **how)
    scores = run.influence(rows[:1], rows, tmp_path / "scores", **HERE)
    found = scores.data("train").tokens(["2", "4"])
    assert list(map("".join, found)) == ['[{"name": "f"}]<a>b', '[{"name": "f"}]<a>-<a>b']


# An answer that others follow is left out.
TURNS = (
    "{{ tools | tojson }}{% for m in messages %}{% if m.role == 'user' %}<{{ m.content }}>"
    "{% else %}{{ m.content if loop.last else '-' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "2 + 2 =", "completion": " 4", "text": "no"}, "2 + 2 = 4"),
        ({"text": "a <b>", "input_ids": [1]}, "a <b>"),
        ({"text": "one", "text_pair": "two"}, "one\ntwo"),
        ({"text": "one", "target": 7}, "one"),
        ({"prompt": "p ", "chosen": "a", "rejected": "b"}, "chosen: p a\nrejected: p b"),
        ({"input_ids": [1, 2]}, "[1, 2]"),
        ({"inputs": [1.0]}, None),
        (
            {"messages": [{"role": "user", "content": "hi"},
                          {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]},
            'user: hi\nassistant:  {"tool_calls": [{"name": "f"}]}',
        ),
        ({"chat": [{"from": "human", "value": [{"text": "é"}]}]}, 'human: [{"text": "é"}]'),
        (
            {"prompt": [{"role": "user", "content": "hi"}],
             "completion": [{"role": "assistant", "content": "ho"}]},
            "user: hi\nassistant: ho",
        ),
    ],
)  # fmt: skip
def test_a_row_is_read_as_a_person_would(row: dict[str, Any], text: str | None) -> None:
    kept = {name: row[name] for name in text_columns(row)}
    assert row_text(kept, str) == text


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        ("causal-lm", "one"), ("classification", "one\ntwo"), ("seq2seq-lm", "one\nthree"),
        ("preference", "chosen: a\nrejected: b"), ("own:Own", "one\ntwo"),
    ],
)  # fmt: skip
def test_the_text_of_a_row_is_of_what_was_read(objective: str, text: str) -> None:
    row = {"text": "one", "text_pair": "two", "target": "three", "chosen": "a", "rejected": "b"}
    assert row_text(row, str, (), objective) == text


def test_columns_that_were_not_read_are_no_part_of_a_text(scored: Scored, tmp_path: Path) -> None:
    rows = [{"id": "0", "text": "a cat", "target": "other"}, {"id": "1", "text": "a sea"}]
    scores = scored.scores(rows[1:], rows[:1], tmp_path / "scores")
    assert scores.data().rows(["0"])["text"].to_pylist() == ["a cat"]
