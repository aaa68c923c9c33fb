"""What lies in a folder of data: which files are read, and what must not be passed over in silence.

Every file of a folder is read, or is known to hold no examples (``NO_DATA``), or is refused by its
name. So are folders that hold several data sets (splits.py), or the log of a table format. A glob
that names files is the caller's own choice of them, and what it does not match is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from raycurv.data.splits import SPLITS_FILE
from raycurv.errors import UserError, counted, some_of, user_errors

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
    SPLITS_FILE: "of saved data sets of Hugging Face's, and looked at",
    "dataset_info.json": "of a saved data set of Hugging Face's",
    "dataset_infos.json": "of a saved data set of Hugging Face's",
    "cache-*.arrow": "a cache of map and filter of Hugging Face datasets: the same examples again",
}
STATE_FILE = "state.json"
STATE_BYTES = 4 << 20
# Directories of table formats, in whose data files are rows that were deleted.
_LOGS = {"_delta_log": "a Delta table", ".hoodie": "a Hudi table"}
# A file that is numbered as one of so many.
_SHARD = re.compile(r"(.*?)(\d{5,9})-of-(\d{5,9})(.*)")
_PACKED = {".gz": "gunzip", ".zst": "zstd -d --rm", ".bz2": "bunzip2", ".xz": "unxz"}


def holds_examples(name: str) -> bool:
    """Whether a file in a folder of data is to be read, or refused: not one of ``NO_DATA``, and
    not hidden (a name that begins with a dot or an underscore)."""
    known = any(fnmatchcase(name.lower(), pattern) for pattern in NO_DATA)
    return not (known or name.startswith((".", "_")))


def check_folders(where: str, folders: Sequence[str]) -> None:
    """Refuse a folder that holds the log of a table.

    Args:
        where: the folder, as a person gave it.
        folders: names of all folders below it.

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


def check_shards(where: str, names: Sequence[str]) -> None:
    """Refuse files that are numbered as some of so many, of which others are not there.

    Args:
        where: the folder, as a person gave it.
        names: of all files below it that are read.

    Raises:
        UserError: names the first that is missing.
    """
    there: dict[tuple[str, ...], set[int]] = {}
    for name in names:
        found = _SHARD.fullmatch(name)
        if found:
            there.setdefault(found.group(1, 3, 4), set()).add(int(found[2]))
    for (before, total, behind), numbers in there.items():
        missing = int(total) - len(numbers)
        if missing > 0:
            first = next(number for number in range(int(total)) if number not in numbers)
            gone = f"{before}{first:0{len(total)}}-of-{total}{behind}"
            raise UserError(
                where, f"all of the {int(total):,} files {before}…-of-{total}{behind}",
                f"{len(numbers):,} of them; {gone} is not there",
                "Fetch the others, or name those to read by a glob: "
                f"'{where.rstrip('/')}/{before}*{behind}'.",
            )  # fmt: skip


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
        f"{counted(len(names), 'other file')}{beside} ({some_of(names, 5)})",
        " ".join(steps),
    )


def check_saved(where: str, folder: str, arrow: Sequence[str], said: Mapping[str, Any]) -> None:
    """Hold a data set that Hugging Face datasets saved against its ``state.json``.

    Args:
        where: of the file, for messages.
        folder: its folder, as a person gave it.
        arrow: the Arrow files in the folder that would be read.
        said: what the file says.

    Raises:
        UserError: it is of a selection of rows, or of other files.
    """
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
