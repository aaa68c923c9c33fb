"""Splits of a data set: which of them is read, and which of its rows.

A split is named as Hugging Face datasets name it: ``train``, or a slice ``train[:1000]``,
``train[10%:20%]``, ``train[-100:]``. What lies in a folder is told by its names:

    train/a.parquet, validation.jsonl, imdb-test.csv     a word for a split, in the first step
    data/train_sft-00000-of-00003.parquet                what stands before the shard's number
    ONE/data-00000-of-00001.arrow                        folders beside dataset_dict.json

Data in which no name says a split is the one split ``train``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raycurv.errors import UserError, some_of

# Says that the folders beside it are the splits of one data set.
SPLITS_FILE = "dataset_dict.json"
UNNAMED = "train"
# Names of splits, in a step of a path: train/a.parquet, data/train-00000-of-00002.parquet.
_SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "eval": "evaluation", "evaluation": "evaluation",
}  # fmt: skip
_SPLIT = re.compile(rf"(?:^|[-._ ])({'|'.join(_SPLITS)})(?=[-._ ]|$)")
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5,}-of-\d{5,}(?=[-._]|$)")
# Before a shard's number these say nothing.
_ANY = ("data", "dataset", "part", "shard", "chunk", "file")
_EDGE = r"-?\d{1,15}%?"
_ASKED = re.compile(rf"(?P<name>\w[\w.-]*)(?P<cut>\[(?P<start>{_EDGE})?:(?P<stop>{_EDGE})?\])?")


@dataclass(frozen=True)
class Split:
    """A split, or a part of one.

    Attributes:
        flag: what it was asked for by, for messages.
        text: as it was asked for.
        name: of the split.
        start: the first row, from the end where it is negative, or per cent of all.
        stop: the row behind the last, likewise.
    """

    flag: str
    text: str
    name: str
    start: str = ""
    stop: str = ""

    @classmethod
    def parse(cls, flag: str, text: str) -> Split:
        """The split that a text names; UserError for what is none."""
        found = _ASKED.fullmatch(text)
        start, stop = ("", "") if found is None else (found["start"] or "", found["stop"] or "")
        percents = [edge.strip("-%") for edge in (start, stop) if edge.endswith("%")]
        mixed = bool(start and stop) and len(percents) == 1
        if found is None or mixed or any(int(percent) > 100 for percent in percents):
            raise UserError(
                flag, "a split such as train, train[:1000] or train[10%:20%]", repr(text),
                "Give a name, and one slice at most, in rows or in per cent from -100 to 100.",
            )  # fmt: skip
        return cls(flag, text, found["name"], start, stop)

    @property
    def whole(self) -> bool:
        """Whether all rows of the split are meant."""
        return not (self.start or self.stop)

    @property
    def at_most(self) -> int | None:
        """How many first rows hold all of it; ``None`` where that depends on how many there are."""
        counted = any(edge.endswith("%") or edge[:1] == "-" for edge in (self.start, self.stop))
        return int(self.stop) if self.stop and not counted else None

    def rows(self, count: int) -> range:
        """The numbers of its rows, of a split of so many; per cent are rounded to the nearest
        row, as Hugging Face datasets round them."""
        edges = []
        for edge, default in ((self.start, 0), (self.stop, count)):
            at = int(edge.rstrip("%")) if edge else default
            if edge.endswith("%"):
                at = round(at * count / 100.0)
            edges.append(min(at, count) if at >= 0 else max(count + at, 0))
        return range(edges[0], max(edges))


def choose(
    where: str,
    names: Sequence[str],
    folders: Sequence[str],
    saved: Mapping[str, str],
    split: Split | None,
    flag: str,
) -> list[str]:
    """The files of one split.

    Args:
        where: the folder, as a person gave it.
        names: of all files below it that are to be read or refused, and of ``SPLITS_FILE``.
        folders: of all folders below it.
        saved: folders of saved data sets, with the split that each says it is of.
        split: the one that is wanted; ``None`` where none was named, and there must be one alone.
        flag: that names a split, for the message.

    Raises:
        UserError: several splits and none named, none of that name, or files of which it cannot be
            told.
    """
    for name in names:
        at, _, file = name.rpartition("/")
        if file != SPLITS_FILE:
            continue
        inner = sorted(f for f in folders if f.rpartition("/")[0] == at)
        if split is None or at:
            steps = [f.rpartition("/")[2] for f in inner]
            given = next((f for f in inner if f.endswith("train")), (*inner, "SPLIT")[0])
            raise _several(where, name, steps, given, "" if at else flag)
        if split.name not in inner:
            raise _no_split(where, inner, split)
        others = tuple(f"{one}/" for one in inner if one != split.name)
        return [one for one in names if one != name and not one.startswith(others)]
    return _by_names(where, names, saved, split, flag)


def _by_names(
    where: str, names: Sequence[str], saved: Mapping[str, str], split: Split | None, flag: str
) -> list[str]:
    below = where.rstrip("/")
    of: dict[str, list[str]] = {}
    patterns: dict[str, str] = {}
    for name in names:
        said, pattern = _said(name)
        folder = name.rpartition("/")[0]
        if not said and saved.get(folder):
            said = _SPLITS.get(saved[folder], saved[folder])
            pattern = folder or name
        of.setdefault(said, []).append(name)
        patterns.setdefault(said, pattern)
    found = sorted(of.keys() - {""})
    usual = set(found) & set(_SPLITS.values())
    if len(found) > 1 and split is None:
        given = patterns.get("train", min(patterns[one] for one in found))
        deep = "**/" if any("/" in name for name in names) else ""
        together = f"{below}/{deep}*.{names[0].rpartition('.')[2]}"
        several = sorted(patterns[one] for one in found)
        raise _several(where, "the names of its files", several, given, flag, found, together)
    wanted = "" if split is None else _SPLITS.get(split.name, split.name)
    if found and "" in of and (split is not None or usual):
        one = wanted if wanted in of else found[0]
        raise UserError(
            where, "files that all say which split they are of, or none",
            f"{of[''][0]}, which does not, beside {of[one][0]}",
            f"Name the files to read by a glob, such as '{below}/{patterns[one]}'.",
        )  # fmt: skip
    if split is None:
        return list(names)
    if wanted in of:
        return of[wanted]
    # One that has a name of its own, such as corpus-00000-of-00002, is no other split by that; the
    # folder that was given may say one.
    own = _SPLITS.get(below.rpartition("/")[2].lower(), UNNAMED)
    if wanted == own and len(found) < 2 and not usual and not saved:
        return list(names)
    raise _no_split(where, found or [own], split)


def check_unnamed(where: str, split: Split | None) -> None:
    """Refuse a split of data in which nothing is named, unless it is that of all; UserError."""
    if split is not None and split.name != UNNAMED:
        raise _no_split(where, [UNNAMED], split)


def of_mapping(source: Mapping[str, object], split: Split | None, flag: str) -> object:
    """One of several data sets by their names; UserError if none, or no such one, is named."""
    names = sorted(map(str, source))
    if split is None:
        raise UserError(
            "data", "one data set", f"several splits by name: {', '.join(names)}",
            f"Name one by {flag}, such as {(*names, UNNAMED)[0]}.",
        )  # fmt: skip
    if split.name not in source:
        raise _no_split("data", names, split)
    return source[split.name]


def saved_split(said: object) -> str:
    """The split that a saved data set says it is of; empty if it says none."""
    return re.split(r"[\[+]", said)[0] if isinstance(said, str) else ""


def _said(name: str) -> tuple[str, str]:
    """The split that a file's name says, or nothing, and a glob of the files that say the same."""
    steps = (name.rpartition(".")[0] or name).split("/")
    for depth, step in enumerate(steps):
        last = depth == len(steps) - 1
        shard = _SHARD.search(step) if last else None
        match = _SPLIT.search(step.lower())
        if shard is not None and shard[1].lower() not in _ANY:
            said, word = _SPLITS.get(shard[1].lower(), shard[1]), f"{step[: shard.end(1)]}-"
        elif match:
            said, word = _SPLITS[match[1]], step[: match.end(1)]
        else:
            continue
        above = "/".join(steps[: depth + (not last)])
        return said, (f"{above}/{word}*" if above else f"{word}*") if last else above
    return "", ""


def _several(
    where: str,
    by: str,
    found: Sequence[str],
    given: str,
    flag: str,
    names: Sequence[str] = (),
    together: str = "",
) -> UserError:
    """The mistake of several splits where one is wanted."""
    path = f"{where.rstrip('/')}/{given}"
    quoted = f"'{path}'" if "*" in given else path
    name = (*(one for one in names or found if one == UNNAMED), *(names or found), "SPLIT")[0]
    remedy = f"Give one of them, such as {quoted}" + (f" or {flag} {name}." if flag else ".")
    if together:
        remedy += f" To read all of them together, name the files by a glob: '{together}'."
    return UserError(where, "one data set", f"several splits by {by}: {', '.join(found)}", remedy)


def _no_split(where: str, names: Sequence[str], split: Split) -> UserError:
    remedy = f"Give {split.flag} {names[0]}, or another one of these." if names else ""
    return UserError(
        f"{split.flag} {split.text}", f"a split of {where}: {some_of(names, 8) or 'it has none'}",
        f"no {split.name} there", remedy or "Save the data set again.",
    )  # fmt: skip
