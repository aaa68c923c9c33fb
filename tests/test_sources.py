from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from raycurv.data.sources import fingerprint, open_parts
from raycurv.errors import UserError

TEXTS = [f"text {i}" for i in range(2500)]
TABLE = pa.table({"text": TEXTS, "other": list(range(2500))})


def write_parquet(path: Path) -> None:
    pq.write_table(TABLE, path, row_group_size=700)


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in TABLE.to_pylist()))


def write_ipc_file(path: Path) -> None:
    with pa.ipc.new_file(str(path), TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=900)


def write_ipc_stream(path: Path) -> None:
    with pa.ipc.new_stream(str(path), TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=900)


def write_feather(path: Path) -> None:
    pyarrow.feather.write_feather(TABLE, str(path), compression="uncompressed")


def write_csv(path: Path) -> None:
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    text = io.StringIO()
    rows = csv.writer(text, delimiter=delimiter)
    rows.writerow(TABLE.column_names)
    rows.writerows(row.values() for row in TABLE.to_pylist())
    _write_packed(path, text.getvalue().encode())


def write_json_array(path: Path) -> None:
    _write_packed(path, json.dumps(TABLE.to_pylist(), indent=1).encode())


def write_packed_jsonl(path: Path) -> None:
    _write_packed(path, "".join(json.dumps(row) + "\n" for row in TABLE.to_pylist()).encode())


def _write_packed(path: Path, content: bytes) -> None:
    """Content in two members, one after the other, where it is packed."""
    packed = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}.get(path.suffix)
    half, out = len(content) // 2, content
    if packed is not None:
        codec = pa.Codec(packed) if packed == "zstd" else None
        pack = {"gzip": gzip.compress, "bz2": bz2.compress}.get(packed)
        parts = (content[:half], content[half:])
        out = b"".join(
            codec.compress(part, asbytes=True) if codec else pack(part)  # type: ignore[misc]
            for part in parts
        )
    path.write_bytes(out)


WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "parquet": ("data.parquet", write_parquet),
    "jsonl": ("data.jsonl", write_jsonl),
    "ndjson": ("data.ndjson", write_jsonl),
    "json": ("data.JSON", write_jsonl),
    "arrow file": ("data.arrow", write_ipc_file),
    "arrow stream": ("data.arrow", write_ipc_stream),
    "feather": ("data.feather", write_feather),
    "csv": ("data.csv", write_csv),
    "tsv": ("data.tsv", write_csv),
    "csv.gz": ("data.csv.gz", write_csv),
    "json array": ("data.json", write_json_array),
    "json array.zst": ("data.json.zst", write_json_array),
    "jsonl.gz": ("data.jsonl.gz", write_packed_jsonl),
    "jsonl.zst": ("data.jsonl.zst", write_packed_jsonl),
    "jsonl.bz2": ("data.jsonl.bz2", write_packed_jsonl),
}


def read(source: Any, column: str = "text") -> list[tuple[str, int, Any]]:
    return [
        (part.name, int(number), value)
        for part in open_parts(source)
        if part.columns() is not None
        for rows in part.read((column,), ())
        for number, value in zip(rows.numbers, rows.columns[column].to_pylist(), strict=True)
    ]


def message(source: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        read(source)
    error = caught.value
    assert error.where and error.expected and error.got and error.remedy
    return error


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("uri", [False, True])
def test_every_format_gives_the_same_rows(tmp_path: Path, format: str, uri: bool) -> None:
    name, write = WRITERS[format]
    write(tmp_path / name)
    source = (tmp_path / name).as_uri() if uri else str(tmp_path / name)
    assert read(source) == [(name, i, text) for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("table", [TABLE, TABLE.slice(3, 9), pa.concat_tables([TABLE] * 2)])
def test_tables_and_lists_are_sources(table: Any) -> None:
    expected = [("", i, text) for i, text in enumerate(table["text"].to_pylist())]
    assert read(table) == expected
    assert read(table.to_pylist()) == expected
    assert read(tuple(table.to_pylist())) == expected


def test_chunks_are_bounded(tmp_path: Path) -> None:
    for name, write in WRITERS.values():
        write(tmp_path / name)
        (part,) = open_parts(tmp_path / name)
        assert max(len(rows.numbers) for rows in part.read(("text",), ())) <= 1024
        (tmp_path / name).unlink()
    wide = pa.table({"text": ["x" * (3 << 19)] * 5})
    pq.write_table(wide, tmp_path / "wide.parquet", use_dictionary=False)
    for source in (wide, wide.to_pylist(), tmp_path / "wide.parquet"):
        (part,) = open_parts(source)
        chunks = [len(rows.numbers) for rows in part.read(("text",), ())]
        assert sum(chunks) == 5
        if not isinstance(source, list):  # a list is in memory anyway
            assert max(chunks) == 2


def tree(root: Path) -> Path:
    """A directory with data at two depths, and with what must not be read as data."""
    names = ["b.jsonl", "a.jsonl", "sub/c.jsonl", "sub/deep/d.jsonl"]
    beside = [
        "README.md",
        ".hidden.jsonl",
        "_SUCCESS.json",
        ".cache/x.jsonl",
        "state.json",
        "dataset_info.json",
        "sub/cache-0123.arrow",
        "_temporary/0.json",
    ]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps({"text": name}) + "\n")
    for name in beside:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("not data")
    return root


ALL = ["a.jsonl", "b.jsonl", "sub/c.jsonl", "sub/deep/d.jsonl"]
PATTERNS: dict[str, list[str]] = {
    "": ALL,
    "/": ALL,
    "/*.jsonl": ALL[:2],
    "/**/*.jsonl": ALL,
    "/[!a].jsonl": ["b.jsonl"],
    "/[a-b].jsonl": ALL[:2],
    "/sub/*.jsonl": ["c.jsonl"],
    "/*/deep/*": ["sub/deep/d.jsonl"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("uri", [False, True])
def test_directories_and_globs_are_read_in_order(tmp_path: Path, pattern: str, uri: bool) -> None:
    tree(tmp_path)
    source = (tmp_path.as_uri() if uri else str(tmp_path)) + pattern
    root = "sub/" if pattern.startswith("/sub") else ""
    expected = [(name, 0, root + name) for name in PATTERNS[pattern]]
    assert read(source) == expected


def test_local_globs_take_one_character_and_directories(tmp_path: Path) -> None:
    tree(tmp_path)
    assert [name for name, _, _ in read(f"{tmp_path}/?.jsonl")] == ALL[:2]
    assert [name for name, _, _ in read(f"{tmp_path}/s*")] == ALL[2:]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_text('{"text": "x"}')
    assert read(tmp_path / "a[1].jsonl") == [("a[1].jsonl", 0, "x")]


def test_relative_paths_start_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    for source in (".", "*.jsonl", "a.jsonl", "sub"):
        expected = {".": ALL, "*.jsonl": ALL[:2], "a.jsonl": ["a.jsonl"]}
        expected["sub"] = ["c.jsonl", "deep/d.jsonl"]
        assert [name for name, _, _ in read(source)] == expected[source]


def test_a_saved_hugging_face_data_set_is_its_streams(tmp_path: Path) -> None:
    write_ipc_stream(tmp_path / "data-00000-of-00001.arrow")
    (tmp_path / "state.json").write_text('{\n  "_format_type": null\n}')
    (tmp_path / "dataset_info.json").write_text("{\n}")
    write_ipc_stream(tmp_path / "cache-aa11.arrow")
    assert len(read(tmp_path)) == len(TEXTS)


def test_jsonl_may_have_a_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "\xc3\xa9"}')
    assert read(path) == [("a.jsonl", 0, "a"), ("a.jsonl", 1, "é")]


def test_missing_optional_keys_are_null_and_rows_keep_their_numbers() -> None:
    (part,) = open_parts([{"text": "a"}, {"text": "b", "id": 7}, {"text": "c", "id": "x"}])
    (rows,) = part.read(("text",), ("id", "labels"))
    assert set(rows.columns) == {"text", "id"}
    assert rows.columns["id"].to_pylist() == [None, "7", "x"]
    taken = rows.take(pa.array([2]).to_numpy())
    assert taken.place(0) == "the list, row 2"
    assert taken.columns["text"].to_pylist() == ["c"]


# Mistakes: what the file is, and parts of what the message says.
BAD_FILES: dict[str, tuple[str, bytes, list[str]]] = {
    "parquet": ("a.parquet", b"not a parquet file", ["a.parquet", "a Parquet file"]),
    "empty parquet": ("a.parquet", b"", ["a.parquet", "a Parquet file"]),
    "arrow": ("a.arrow", b"certainly no arrow", ["a.arrow", "an Arrow IPC file or stream"]),
    "arrow file": ("a.arrow", b"ARROW1 no footer", ["a.arrow", "an Arrow IPC file or stream"]),
    "empty arrow": ("a.feather", b"", ["a.feather", "the file is empty"]),
    "json": ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["a.jsonl, line 2", "one JSON object"]),
    "json list": ("a.jsonl", b'[{"text": "a"}]\n', ["a.jsonl, line 1", "a list"]),
    "pretty json": ("a.json", b'{\n "text": "a"\n}\n', ["a.json, line 1", "line breaks inside"]),
    "not utf-8": ("a.jsonl", b'\n{"text": "\xff"}\n', ["a.jsonl, line 2", "utf-8"]),
    "deep json": ("a.jsonl", b"[" * 200_000, ["a.jsonl, line 1", "one JSON object"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, case: str) -> None:
    name, content, parts = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    text = str(message(tmp_path / name))
    assert all(part in text for part in parts), text
    assert str(tmp_path / name) in text


@pytest.mark.parametrize("format", ["parquet", "arrow file", "arrow stream"])
def test_a_damaged_file_is_named(tmp_path: Path, format: str) -> None:
    name, write = WRITERS[format]
    write(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    assert str(tmp_path / name) in message(tmp_path / name).where


def test_no_such_data_is_named(tmp_path: Path) -> None:
    for source in (str(tmp_path / "none.parquet"), (tmp_path / "none.parquet").as_uri()):
        error = message(source)
        assert error.where == source
        assert error.got == "nothing of that name"


def test_nothing_readable_is_named(tmp_path: Path) -> None:
    assert "no file at all" in str(message(tmp_path))
    assert "no file at all" in str(message(f"{tmp_path}/*.parquet"))
    assert "no file at all" in str(message(tmp_path.as_uri() + "/*.parquet"))
    (tmp_path / "a.xls").write_text("a,b")
    for source in (tmp_path, tmp_path / "a.xls"):
        error = message(source)
        assert ".parquet" in error.expected
        assert "1 other file (a.xls)" in error.got


def test_an_unknown_uri_is_named() -> None:
    error = message("nosuchscheme://bucket/data.parquet")
    assert error.where == "nosuchscheme://bucket/data.parquet"
    assert "pyarrow.fs" in error.expected


@pytest.mark.parametrize("source", [7, None, {"text": ["a"]}])
def test_other_objects_are_no_sources(source: Any) -> None:
    error = message(source)
    assert type(source).__name__ in error.got
    assert "Turn it into one of these" in error.remedy


BAD_ROWS: dict[str, tuple[list[Any], list[str]]] = {
    "no dict": ([{"text": "a"}, "b"], ["row 1", "a dict of columns", "a str"]),
    "missing": ([{"text": "a"}, {"other": 1}], ["row 1", "`text`", "found other"]),
    "null": ([{"text": "a"}, {"text": None}], ["row 1", "`text`", "null"]),
    "number": ([{"text": "a"}, {"text": 1}, {"text": 2}], ["row 1", "`text`", "got 1 "]),
    "lone surrogate": ([{"text": "a"}, {"text": "\ud800"}], ["row 1", "`text`"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_does_not_fit_is_named(case: str) -> None:
    rows, parts = BAD_ROWS[case]
    text = str(message(rows))
    assert all(part in text for part in parts), text


def test_a_null_in_a_column_is_named(tmp_path: Path) -> None:
    table = pa.table({"text": [*TEXTS[:1500], None]})
    pq.write_table(table, tmp_path / "a.parquet")
    for source in (table, tmp_path / "a.parquet"):
        error = message(source)
        assert "row 1500" in error.where and error.got == "null"


def test_a_fingerprint_is_json_and_the_same_again(tmp_path: Path) -> None:
    tree(tmp_path)
    first = fingerprint(tmp_path)
    assert [file["path"] for file in first["files"]] == ALL
    assert json.loads(json.dumps(first)) == first == fingerprint(str(tmp_path))
    assert fingerprint(tmp_path.as_uri()) == first


def test_a_fingerprint_sees_change(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    content = bytearray(b"x" * 5_000_000)
    path.write_bytes(content)
    seen = {json.dumps(fingerprint(path))}
    # The first, the last and a middle byte are sampled, and the size counts by itself.
    for at in (0, len(content) - 1, (len(content) - (16 << 10)) * 7 // 15 + 5):
        changed = content.copy()
        changed[at] = ord("y")
        path.write_bytes(changed)
        seen.add(json.dumps(fingerprint(path)))
    path.write_bytes(content + b"x")
    seen.add(json.dumps(fingerprint(path)))
    assert len(seen) == 5


def test_a_small_file_is_hashed_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    seen = set()
    for at in range(0, 100_000, 9_999):
        content = bytearray(100_000)
        content[at] = 1
        path.write_bytes(content)
        seen.add(fingerprint(path)["files"][0]["hash"])
    assert len(seen) == 11


def test_a_fingerprint_of_data_in_memory_is_of_its_content() -> None:
    chunked = pa.concat_tables([TABLE.slice(0, 7), TABLE.slice(7)])
    marked = TABLE.replace_schema_metadata({"a": "b"})
    assert fingerprint(TABLE) == fingerprint(chunked) == fingerprint(marked)
    middle = TABLE.slice(5, 5)
    rebuilt = pa.table({name: middle[name].to_pylist() for name in middle.column_names})
    assert fingerprint(middle) == fingerprint(rebuilt)
    assert fingerprint(TABLE.slice(0, 5)) != fingerprint(middle)
    rows = TABLE.to_pylist()
    assert fingerprint(rows) == fingerprint([dict(reversed(row.items())) for row in rows])
    assert fingerprint(rows) != fingerprint(rows[1:] + rows[:1])
    assert json.loads(json.dumps(fingerprint(rows))) == fingerprint(rows)


def test_no_fingerprint_of_no_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing of that name"):
        fingerprint(tmp_path / "none")
