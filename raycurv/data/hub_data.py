"""The files of one split of a data set on the hub, by the rules of Hugging Face datasets.

Which files make which split of which configuration is said by the repository's card (the YAML at
the head of its README.md) and by the names of its files. datasets knows the rules: it is shown a
folder of empty files of the same names, with what the card says of files, and asks nobody. Then the
files of the split are fetched, no others, and read as files of this machine are.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raycurv.data.formats.file_formats import FORMATS, READABLE, ending
from raycurv.errors import UserError, in_words, shortened, user_errors
from raycurv.hub import Commit, Snapshot
from raycurv.jsonfile import misfit, read_bytes
from raycurv.names import plain_name

INSTALL = "pip install 'raycurv[hub]'"
# A card, and what datasets reads in its place.
_CARDS = ("README.md", ".huggingface.yaml")
_MOST_BYTES, _MOST_FILES = 4 << 20, 50_000
# What datasets reads of a folder beside the card, or would run.
_NOT_SHOWN = (".py", "dataset_infos.json")
_HEAD = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_OTHERWISE = "Download the files that you want (hf download), and give those to read."
# Of a builder's configuration: what says which files there are, and of which type columns are.
_WITHOUT_EFFECT = ("name", "version", "data_dir", "data_files", "description", "features")


def bring_split(commit: Commit, split: str, flag: str) -> Snapshot:
    """Have the files of a split on this machine.

    Args:
        commit: of the data set.
        split: its name, such as ``train``; empty where there must be one alone.
        flag: that names a split, for messages.

    Raises:
        UserError: no such split or configuration, several of them and none named, a card that
            says more of how files are read than raycurv knows, or files that are not to be had.
    """
    found = _splits(commit)
    if not split and len(found) > 1:
        raise UserError(
            commit.where, "one split", f"several, and none named: {', '.join(found)}",
            f"Name one: {flag} {'train' if 'train' in found else next(iter(found))}.",
        )  # fmt: skip
    chosen = split or next(iter(found))
    if chosen not in found:
        raise UserError(
            f"{flag} {split}", f"a split of {commit.where}: {', '.join(found)}", "no such one",
            f"Give {flag} {next(iter(found))}, say.",
        )  # fmt: skip
    others = [name for name in found[chosen] if ending(name) not in FORMATS]
    if others:
        raise UserError(
            commit.where, f"{READABLE} files", f"{shortened(others[0])}, for example",
            "Load it with Hugging Face datasets, save it (to_parquet, to_json) and give that file.",
        )  # fmt: skip
    snapshot = commit.snapshot(found[chosen])
    snapshot.bring()
    return snapshot


def _splits(commit: Commit) -> dict[str, list[str]]:
    """The names of the files of each split."""
    names = [name for name in commit.files if not name.endswith(_NOT_SHOWN)]
    if len(names) > _MOST_FILES:
        raise UserError(
            commit.where, f"at most {_MOST_FILES:,} files", f"{len(names):,}",
            "Download what you need of it (hf download), and give that directory.",
        )  # fmt: skip
    cards = commit.snapshot([name for name in _CARDS if name in names])
    cards.bring()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            place = Path(folder, plain_name(name, commit.where))
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        for name in cards.files:
            said = _configurations(cards.directory / name, f"{name} of {commit.where}")
            fence = "---\n" if name.endswith(".md") else ""
            if said is None:
                Path(folder, name).unlink()
            else:
                Path(folder, name).write_text(f"{fence}{json.dumps({'configs': said})}\n{fence}")
        builder = _builder(folder, commit)
        _check_options(builder.config, commit)
        root = os.path.realpath(folder)
        return {
            str(split): [plain_name(os.path.relpath(file, root), commit.where) for file in files]
            for split, files in builder.config.data_files.items()
        }


def _builder(folder: str, commit: Commit) -> Any:
    """What datasets would read the folder with."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            commit.where, f"the library datasets, which knows its splits ({INSTALL})", "none",
            "Install it, or download the files (hf download) and give their directory.",
        ) from None  # fmt: skip
    try:
        return datasets.load_dataset_builder(
            folder, commit.name.config or None, cache_dir=os.path.join(folder, ".cache")
        )
    except Exception as error:  # of the card's content, whatever that raises
        said = in_words(error).replace(folder, str(commit.name))
        said = said.replace(os.path.basename(folder), commit.name.repo)
        raise UserError(
            commit.where, "a data set whose splits Hugging Face datasets can tell",
            shortened(said, 400),
            "Name one of its configurations behind a colon (org/name:CONFIG), or download the "
            "files (hf download) and give those to read.",
        ) from None  # fmt: skip


def _check_options(config: Any, commit: Commit) -> None:
    """Refuse a card that says how files are read, but for what their names say, too."""
    plain = type(config)()
    changed = {
        one.name: getattr(config, one.name)
        for one in dataclasses.fields(config)
        if one.name not in _WITHOUT_EFFECT and getattr(config, one.name) != getattr(plain, one.name)
    }
    files = [str(file) for files in config.data_files.values() for file in files]
    if changed.get("sep") == "\t" and all(".tsv" in os.path.basename(file) for file in files):
        del changed["sep"]
    if changed:
        said = ", ".join(f"{name}: {value!r}" for name, value in changed.items())
        raise UserError(
            commit.where, "files that are read by what they are",
            f"a card that says how: {shortened(said, 200)}",
            "Load it with Hugging Face datasets, save it (to_parquet, to_json) and give that file.",
        )  # fmt: skip


def _configurations(place: Path, where: str) -> list[dict[str, Any]] | None:
    """What a card says of which files there are; nothing where it says nothing.

    Raises:
        UserError: no YAML, or names of files elsewhere.
    """
    import yaml

    text = read_bytes(place, _MOST_BYTES, where).decode("utf-8", "replace")
    if place.suffix == ".md":
        head = _HEAD.match(text)
        text = head[1] if head else ""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with user_errors(where, "YAML", _OTHERWISE, yaml.YAMLError, RecursionError, ValueError):
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, loader)):
            raise UserError(where, "YAML without references", "some (*)", _OTHERWISE)
        said = yaml.load(text, loader)  # a safe one, which makes texts, numbers, lists and dicts
    configurations: Any = said.get("configs") if isinstance(said, dict) else None
    if not configurations:
        return None
    wrong = misfit(configurations, list[dict[str, Any]])
    if wrong:
        raise UserError(where, "a list of configurations (configs)", wrong, _OTHERWISE)
    for one in configurations:
        for name in _texts([one.get("data_files"), one.get("data_dir")]):
            if "://" in name or name.startswith(("/", "~")) or ".." in name.split("/"):
                got = repr(shortened(name))
                raise UserError(where, "names of files of its repository", got, _OTHERWISE)
        one.pop("features", None)
    return list(configurations)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)
