"""Claims about names that come from files: none of them leads out of its directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raycurv.errors import UserError, in_words
from raycurv.names import inside, plain_name, regular_file

WHERE = "index.json"
HOSTILE = (
    "", "/", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "./x", "a//b", "a/", "a\\b",
    "x\0", "x\n", "\ud800", "x" * 256, None, 3, True, ["a"], {"a": "b"}, "~/../x/", "\u202ex",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_a_hostile_name_is_refused_with_where_it_came_from(name: object, tmp_path: Path) -> None:
    for check in (lambda: plain_name(name, WHERE), lambda: inside(tmp_path, name, WHERE)):
        with pytest.raises(UserError) as raised:
            check()
        assert raised.value.where == WHERE and len(raised.value.got) < 300


@pytest.mark.parametrize("name", ["a", "a/b.safetensors", "a b", ".cache", "...", "ü/模型", "~x"])
def test_a_plain_name_stays_as_it_is(name: str, tmp_path: Path) -> None:
    assert plain_name(name, WHERE) == name
    assert inside(tmp_path, name, WHERE) == tmp_path.resolve() / name


def test_links_may_lead_within_the_directory_and_not_out_of_it(tmp_path: Path) -> None:
    root = tmp_path / "model"
    (root / "deep").mkdir(parents=True)
    (tmp_path / "model-2").mkdir()
    for file in (tmp_path / "secret", tmp_path / "model-2" / "near", root / "file"):
        file.write_text(file.name)
    (root / "within").symlink_to("file")
    (root / "deep" / "up").symlink_to("../file")
    for name in ("within", "deep/up"):
        assert regular_file(root, name, WHERE) == root.resolve() / "file"
    (tmp_path / "alias").symlink_to(root)
    assert regular_file(tmp_path / "alias", "within", WHERE) == root.resolve() / "file"
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "near").symlink_to("../model-2/near")
    (root / "away").symlink_to(tmp_path)
    (root / "twice").symlink_to("out")
    (root / "dangling").symlink_to("../none")
    for name in ("out", "near", "away/secret", "away", "twice", "dangling"):
        with pytest.raises(UserError, match="link to"):
            inside(root, name, WHERE)


def test_the_hubs_cache_keeps_its_links(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "abc").write_text("weights")
    (repository / "refs").write_text("of others")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert regular_file(snapshot, "model.safetensors", WHERE).name == "abc"
    (snapshot / "other").symlink_to("../../refs")
    (repository / "blobs" / "evil").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("")
    (snapshot / "evil").symlink_to("../../blobs/evil")
    for name in ("other", "evil"):
        with pytest.raises(UserError, match="link to"):
            inside(snapshot, name, WHERE)


def test_only_a_regular_file_is_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "ring").symlink_to("ring")
    for name, got in (("pipe", "a pipe"), ("folder", "a directory"), ("none", "No such file")):
        with pytest.raises(UserError, match=got):
            regular_file(tmp_path, name, WHERE)
    with pytest.raises(UserError):
        regular_file(tmp_path, "ring", WHERE)


def test_what_libraries_say_is_told_in_one_line_of_whole_words() -> None:
    assert in_words(KeyError("x")) == "'x'" and in_words(StopIteration()) == "StopIteration"
    assert in_words(ValueError("of\n two   lines.")) == "of two lines"
    long = in_words(ValueError("word " * 70 + "https://me:SESAME@" + 200 * "x"))
    assert long == "word " * 69 + "word …" and "SESAME" not in long
