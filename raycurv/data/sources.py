"""Where examples come from: files, directories, globs, URIs and tables, as parts in data order."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.fs

from raycurv.data.parts import FORMATS, READ_ERRORS, Part, RowsPart, TablePart
from raycurv.data.uri import check_endpoint, check_place, is_uri, redacted, shown
from raycurv.errors import UserError

Source: TypeAlias = "str | Path | pa.Table | Sequence[Mapping[str, Any]]"

READABLE = "Parquet (.parquet), JSONL (.jsonl, .ndjson, .json) or Arrow (.arrow, .feather)"

# What Hugging Face datasets puts beside the data of a saved data set. The caches of its `map` are
# Arrow files too, and reading them would count every example twice.
BESIDE_THE_DATA = {"state.json", "dataset_info.json", "dataset_dict.json", "dataset_infos.json"}
CACHES = re.compile(r"cache-.*\.arrow")


def open_parts(source: Source) -> list[Part]:
    """The parts of a source, sorted by their names.

    Args:
        source: a file, a directory (searched through all its subdirectories; names that begin with
            a dot or an underscore are left out), a glob, a URI of these that ``pyarrow.fs``
            understands, a ``pyarrow.Table``, or a list of dicts.

    Raises:
        UserError: there is no such data, or nothing readable in it.
    """
    if isinstance(source, pa.Table):
        return [TablePart(source)]
    if isinstance(source, (str, Path)):
        check_place("data", str(source))
        return list(_files(str(source)))
    if isinstance(source, (list, tuple)):
        return [RowsPart(source)]
    raise UserError(
        "data",
        "a path, a glob, a URI, a pyarrow.Table or a list of dicts",
        f"a {type(source).__name__}",
        "Turn a pandas frame into a table with pyarrow.Table.from_pandas, a Hugging Face data set "
        "with dataset.with_format('arrow')[:].",
    )


def fingerprint(source: Source) -> dict[str, Any]:
    """What tells this data from other data, without reading all of it.

    Returns:
        JSON-serialisable. Of files: ``{"files": [{"path", "size", "hash"}, ...]}`` in data order,
        ``path`` below the data's root, ``size`` in bytes, ``hash`` of sampled bytes: the first, the
        last and evenly spread ones between, at most 256 KiB, all of a smaller file. Of data in
        memory: ``{"rows", "hash"}``, the hash over all of its content.

    Raises:
        UserError: there is no such data, or nothing readable in it.
    """
    found = [part.fingerprint() for part in open_parts(source)]
    return {"files": found} if isinstance(source, (str, Path)) else found[0]


# Files ---------------------------------------------------------------------------------------


def _files(source: str) -> Iterator[Part]:
    """The parts of a path, a glob or a URI of either, sorted by name."""
    remote = is_uri(source)
    filesystem, root, names = (
        _find_remote(source) if remote else _find_local(os.path.expanduser(source))
    )
    readable = [name for name in names if os.path.splitext(name)[1].lower() in FORMATS]
    if not readable:
        some = ", ".join(sorted(names)[:5])
        raise UserError(
            shown(source),
            f"{READABLE} files",
            f"none of these, but {len(names)} other files ({some})" if names else "no file at all",
            "Check the path; a glob needs quotes on the command line, and ** for subdirectories.",
        )
    for name in sorted(set(readable)):
        part = FORMATS[os.path.splitext(name)[1].lower()]
        path = f"{root.rstrip('/')}/{name}" if root else name
        # Of a URI pyarrow gives back a bare path; the message shows what the user typed.
        location = f"{name} in {shown(source)}" if remote else path
        yield part(name, location, path, filesystem)


def _find_local(source: str) -> tuple[Any, str, list[str]]:
    """File system, root, and names of the files below it; hidden and side files are left out."""
    filesystem = pyarrow.fs.LocalFileSystem()
    if os.path.isfile(source):
        return filesystem, os.path.dirname(source), [os.path.basename(source)]
    if os.path.isdir(source):
        return filesystem, source, _walk(source)
    if not glob.has_magic(source):
        raise _no_such_data(source)
    root = _glob_root(source)
    names = []
    for match in glob.glob(source, recursive=True):
        below = os.path.relpath(match, root or ".").replace(os.sep, "/")
        if os.path.isdir(match):
            names += [f"{below}/{name}" if below != "." else name for name in _walk(match)]
        elif _wanted(os.path.basename(match)):
            names.append(below)
    return filesystem, root, names


def _find_remote(source: str) -> tuple[Any, str, list[str]]:
    # What follows a question mark is the file system's options, not a glob.
    address, mark, options = source.partition("?")
    magic = re.search(r"[*\[]", address) is not None
    root = _glob_root(address) if magic else address
    check_endpoint(source, shown(source))
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(root + mark + options)
        info = filesystem.get_file_info(path)
        if info.type == pyarrow.fs.FileType.NotFound:
            raise _no_such_data(source)
        if info.type == pyarrow.fs.FileType.File:
            base, _, name = path.rpartition("/")
            return filesystem, base, [name]
        below = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    except (*READ_ERRORS, ImportError) as error:
        raise UserError(
            shown(source),
            "a URI that pyarrow.fs understands and may read",
            redacted(error, source),
            "Check the scheme, the address and the credentials, or copy the data to a local disk.",
        ) from None  # the error itself may show credentials
    start = len(path.rstrip("/")) + 1
    files = [info.path[start:] for info in below if info.type == pyarrow.fs.FileType.File]
    names = [name for name in files if all(_wanted(step) for step in name.split("/"))]
    if magic:
        pattern = _glob_pattern(address[len(root) :].lstrip("/"))
        names = [name for name in names if pattern.fullmatch(name)]
    return filesystem, path, names


def _walk(root: str) -> list[str]:
    names = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if _wanted(name)]
        below = os.path.relpath(directory, root).replace(os.sep, "/")
        names += [name if below == "." else f"{below}/{name}" for name in files if _wanted(name)]
    return names


def _wanted(name: str) -> bool:
    beside = name in BESIDE_THE_DATA or CACHES.fullmatch(name) is not None
    return not (beside or name.startswith((".", "_")))


def _glob_root(pattern: str) -> str:
    """The directory above the first step that has a wildcard."""
    fixed = pattern[: re.search(r"[*?\[]", pattern).start()]  # type: ignore[union-attr]
    return fixed[: fixed.rfind("/")] or "/" if "/" in fixed else ""


def _glob_pattern(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression: ``**`` for any number of directories, ``*`` within one."""
    steps = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    out = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|.", pattern):
        if len(token) > 2 and token[0] == "[":
            out += "[" + token[1:-1].replace("!", "^", 1) + "]" if token[1] == "!" else token
        else:
            out += steps.get(token, re.escape(token))
    return re.compile(out)


def _no_such_data(source: str) -> UserError:
    return UserError(
        shown(source),
        "a file, a directory, a glob or a URI of data",
        "nothing of that name",
        "Check the path; a relative one starts from the working directory of this process.",
    )
