"""What lies in a folder of data: which files are read, and what must not be passed over in silence.

Every file of a folder is read, or is known to hold no examples (``NO_DATA``), or is refused by its
name. So are folders that hold several data sets: splits, a saved ``DatasetDict``, the log of a
table format. A glob that names files is the caller's own choice of them, and what it does not match
is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from raycurv.errors import UserError, user_errors
from raycurv.jsonfile import parse_json

# Files beside data that hold no examples, by their names in small letters, and why they are there.
NO_DATA = {
    "readme*": "a data set's card",
    "*.md": "text about the data",
    "*.rst": "text about the data",
    "licen[cs]e*": "its licence",
    "copying*": "its licence",
    "notice*": "its licence",
    "citation*": "how it is cited",
    "*.bib": "how it is cited",
    "*.md5": "checksums",
    "*.sha1": "checksums",
    "*.sha256": "checksums",
    "*.sha512": "checksums",
    "*.crc": "checksums",
    "md5sum*": "checksums",
    "sha*sum*": "checksums",
    "checksum*": "checksums",
    "*.lock": "a lock of Hugging Face datasets",
    "*.py": "a program, which is never run",
    "state.json": "of a saved data set of Hugging Face's, and looked at",
    "dataset_info.json": "of a saved data set of Hugging Face's",
    "dataset_infos.json": "of a saved data set of Hugging Face's",
    "cache-*.arrow": "a cache of map and filter of Hugging Face datasets: the same examples again",
}
# Says that the folders beside it are the splits of one data set.
SPLITS_FILE = "dataset_dict.json"
STATE_FILE = "state.json"
STATE_BYTES = 4 << 20
# Names of splits, in a step of a path: train/a.parquet, data/train-00000-of-00002.parquet.
_SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "eval": "evaluation", "evaluation": "evaluation",
}  # fmt: skip
_SPLIT = re.compile(rf"(?:^|[-._ ])({'|'.join(_SPLITS)})(?=[-._ ]|$)")
# Directories of table formats, in whose data files are rows that were deleted.
_LOGS = {"_delta_log": "a Delta table", ".hoodie": "a Hudi table"}
_PACKED = {".gz": "gunzip", ".zst": "zstd -d --rm", ".bz2": "bunzip2", ".xz": "unxz"}


def holds_examples(name: str) -> bool:
    """Whether a file in a folder of data is to be read, or refused: not one of ``NO_DATA``, and
    not hidden (a name that begins with a dot or an underscore)."""
    known = any(fnmatchcase(name.lower(), pattern) for pattern in NO_DATA)
    return not (known or name.startswith((".", "_")) or name == SPLITS_FILE)


def check_folders(where: str, folders: Sequence[str], files: Sequence[str]) -> None:
    """Refuse a folder that holds several data sets, or the log of a table.

    Args:
        where: the folder, as a person gave it.
        folders: names of all folders below it.
        files: names of all files below it, also of those that are not read.

    Raises:
        UserError: names what is there, and what to give instead.
    """
    for folder in folders:
        kind = _LOGS.get(folder.rpartition("/")[2])
        if kind is not None:
            raise UserError(
                f"{where}, {folder}",
                "a folder of files that hold examples",
                f"the log of {kind}, whose files hold rows that were deleted, too",
                "Write the table's rows as Parquet or JSONL files of their own, or give a glob of "
                "the files to read.",
            )
    for name in files:
        if name.rpartition("/")[2] == SPLITS_FILE:
            at = name.rpartition("/")[0]
            inner = sorted(f for f in folders if f.rpartition("/")[0] == at)
            given = next((f for f in inner if f.endswith("train")), (*inner, "SPLIT")[0])
            raise _several(where, name, inner, given)


def check_splits(where: str, readable: Sequence[str]) -> None:
    """Refuse files of several splits, told by the names of files and folders.

    Args:
        where: the folder, as a person gave it.
        readable: names of the files that would be read.

    Raises:
        UserError: names the splits, and what to give instead.
    """
    found: dict[str, str] = {}
    for name in readable:
        parts = (name.rpartition(".")[0] or name).split("/")
        for depth, part in enumerate(parts):
            match = _SPLIT.search(part.lower())
            if match:
                last = depth == len(parts) - 1
                give = "/".join(parts[: depth + (not last)])
                word = part[: match.end(1)]
                pattern = f"{give}/{word}*" if last and give else f"{word}*" if last else give
                found.setdefault(_SPLITS[match[1]], pattern)
                break
    if len(found) > 1:
        given = found.get("train", min(found.values()))
        ending = readable[0].rpartition(".")[2]
        deep = "**/" if any("/" in name for name in readable) else ""
        glob = f"{where}/{deep}*.{ending}"
        raise _several(where, "the names of its files", sorted(found.values()), given, glob)


def _several(where: str, by: str, splits: Sequence[str], given: str, glob: str = "") -> UserError:
    together = f" To read all of them together, name the files by a glob: '{glob}'." if glob else ""
    quoted = f"'{where}/{given}'" if "*" in given else f"{where}/{given}"
    return UserError(
        where,
        "one data set",
        f"several splits by {by}: {', '.join(splits)}",
        f"Give one of them, such as {quoted}.{together}",
    )


def not_read(
    where: str, root: str, names: Sequence[str], readable: Sequence[str], formats: str
) -> UserError:
    """The mistake of files that are not read, beside ones that are or alone.

    Args:
        where: what a person gave.
        root: the folder that the names are below.
        names: of files that are not read.
        readable: of files that would be.
        formats: what is read, in words.
    """
    some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    below = f"{root.rstrip('/')}/" if root else ""
    steps = ["Convert them, or move them elsewhere."]
    for name in names:
        tool = _PACKED.get(f".{name.rpartition('.')[2]}")
        if tool is not None:
            steps.insert(0, f"Unpack what is compressed: {tool} {below}{name}.")
            break
    if readable:
        deep = "**/" if any("/" in name for name in readable) else ""
        pattern = f"{below}{deep}*.{readable[0].rpartition('.')[2]}"
        steps.append(f"Or name the files to read by a glob, in quotes: '{pattern}'.")
    beside = f" beside {len(readable)} that would be" if readable else ""
    return UserError(
        where,
        f"{formats} files",
        f"{len(names)} other file{'s' if len(names) > 1 else ''}{beside} ({some})",
        " ".join(steps),
    )


def check_saved(where: str, folder: str, arrow: Sequence[str], state: bytes) -> None:
    """Hold a data set that Hugging Face datasets saved against its ``state.json``.

    Args:
        where: of the file, for messages.
        folder: its folder, as a person gave it.
        arrow: the Arrow files in the folder that would be read.
        state: what the file holds, as bytes.

    Raises:
        UserError: it is of a selection of rows, or of other files.
    """
    expected, remedy = "what Hugging Face datasets writes there", "Save the data set again."
    said = parse_json(state, where, expected, remedy)
    chosen = sorted(key for key, value in said.items() if key.startswith("_indices") and value)
    if chosen:
        raise UserError(
            where,
            "a data set whose files hold its rows, as they are",
            f"a selection of their rows ({chosen[0]})",
            f"Write the rows themselves: datasets.load_from_disk({folder!r}).flatten_indices()"
            ".save_to_disk(NEW), or .to_parquet(NEW).",
        )
    files = said.get("_data_files")
    if files is None:
        return
    with user_errors(where, "a list of files", "Save the data set again.", TypeError, ValueError):
        named = [dict(file) for file in files]
    names = {str(file.get("filename")) for file in named}
    parts = sorted(str(f.get("filename")) for f in named if f.get("skip") or f.get("take"))
    for wrong, got in (
        (sorted(names - set(arrow)), "none of the name {}"),
        (sorted(set(arrow) - names), "{} besides"),
        (parts, "a part of {} only"),
    ):
        if wrong:
            raise UserError(
                where,
                f"the files that it names ({len(names)}), whole, and no other Arrow files",
                got.format(repr(wrong[0])),
                "Save the data set again (save_to_disk or to_parquet), or give the files to read "
                "by a glob.",
            )
