"""Where examples come from: files, directories, globs, URIs and tables, as parts in data order."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.fs

from raycurv.data.folders import (
    STATE_BYTES,
    STATE_FILE,
    check_folders,
    check_saved,
    check_splits,
    holds_examples,
    not_read,
)
from raycurv.data.formats.file_formats import FORMATS, READABLE
from raycurv.data.in_memory import RowsPart, TablePart
from raycurv.data.parts import Part
from raycurv.data.rows import READ_ERRORS
from raycurv.data.uri import check_endpoint, check_place, is_uri, redacted, shown
from raycurv.errors import RaycurvError, UserError, user_errors
from raycurv.names import kind_of, plain_name, regular_file

Source: TypeAlias = "str | Path | pa.Table | Sequence[Mapping[str, Any]]"


@dataclass(frozen=True)
class Found:
    """What a source holds.

    Attributes:
        parts: in data order.
        left_out: names of files of a format that is read, which were left out of a folder: hidden
            ones, and caches.
    """

    parts: list[Part]
    left_out: tuple[str, ...] = ()


def open_parts(source: Source) -> list[Part]:
    """The parts of a source, sorted by their names; see :func:`find_parts`."""
    return find_parts(source).parts


def find_parts(source: Source) -> Found:
    """The parts of a source, sorted by their names, and what was left out.

    Args:
        source: a file, a directory (searched through all its subdirectories; names that begin with
            a dot or an underscore are left out), a glob, a URI of these that ``pyarrow.fs``
            understands, a ``pyarrow.Table``, or a list of dicts.

    Raises:
        UserError: there is no such data; nothing readable in it; a directory holds other files
            besides, several splits, or a link out of it.
    """
    if isinstance(source, pa.Table):
        return Found([TablePart(source)])
    if isinstance(source, (str, Path)):
        check_place("data", str(source))
        return _files(str(source))
    if isinstance(source, (list, tuple)):
        return Found([RowsPart(source)])
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


@dataclass
class _Listing:
    """Files of a source: a root, and names below it.

    Attributes:
        files: to be read if they are of a format that is.
        left_out: of such a format, and not to be read.
    """

    filesystem: Any
    root: str
    files: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def path(self, name: str) -> str:
        """What the file system calls a file."""
        return f"{self.root.rstrip('/')}/{name}" if self.root else name


def _files(source: str) -> Found:
    """The parts of a path, a glob or a URI of either, sorted by name."""
    remote = is_uri(source)
    listing = _find_remote(source) if remote else _find_local(os.path.expanduser(source))
    names = sorted(set(listing.files))
    readable = [name for name in names if _ending(name) in FORMATS]
    if not names:
        raise UserError(
            shown(source),
            f"{READABLE} files",
            "no file at all",
            "Check the path; a glob needs quotes on the command line, and ** for subdirectories.",
        )
    if len(readable) < len(names):
        others = [name for name in names if name not in set(readable)]
        raise not_read(shown(source), "" if remote else listing.root, others, readable, READABLE)
    parts: list[Part] = []
    for name in readable:
        path = listing.path(name)
        # Of a URI pyarrow gives back a bare path; the message shows what the user typed.
        location = f"{name} in {shown(source)}" if remote else path
        parts.append(FORMATS[_ending(name)](name, location, path, listing.filesystem))
    _check_states(listing, readable, shown(source) if remote else "")
    return Found(parts, tuple(sorted(set(listing.left_out))))


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _check_states(listing: _Listing, readable: Sequence[str], uri: str) -> None:
    """Hold the data sets that Hugging Face datasets saved against what is said of them."""
    folders: dict[str, list[str]] = {}
    for name in readable:
        if _ending(name) == ".arrow":
            folder, _, file = name.rpartition("/")
            folders.setdefault(folder, []).append(file)
    for folder, files in folders.items():
        name = f"{folder}/{STATE_FILE}" if folder else STATE_FILE
        path = listing.path(name)
        where = f"{name} in {uri}" if uri else path
        with user_errors(
            where, "a file that can be read", "Check it.", *READ_ERRORS, got="{error}"
        ):
            info = listing.filesystem.get_file_info(path)
            if info.type != pyarrow.fs.FileType.File:
                continue
            with listing.filesystem.open_input_stream(path) as file:
                state = bytes(file.read(STATE_BYTES + 1))
        check_saved(where, os.path.dirname(path), files, state)


def _find_local(source: str) -> _Listing:
    """What a path or a glob of this machine names."""
    filesystem = pyarrow.fs.LocalFileSystem()
    if os.path.isfile(source):
        return _Listing(filesystem, os.path.dirname(source), [os.path.basename(source)])
    if os.path.isdir(source):
        listing = _Listing(filesystem, source)
        _add_folder(listing, source, "")
        return listing
    if not glob.has_magic(source):
        raise _no_such_data(source)
    listing = _Listing(filesystem, _glob_root(source))
    for match in glob.glob(source, recursive=True):
        below = os.path.relpath(match, listing.root or ".").replace(os.sep, "/")
        if os.path.isdir(match):
            _add_folder(listing, match, "" if below == "." else f"{below}/")
        elif not holds_examples(os.path.basename(match)):
            listing.left_out += [below] if _ending(below) in FORMATS else []
        elif os.path.isfile(match):
            listing.files.append(below)
        else:
            raise UserError(match, "a file", kind_of(os.lstat(match).st_mode), "Take it away.")
    return listing


def _add_folder(listing: _Listing, folder: str, below: str) -> None:
    """Add the files of a folder of this machine.

    Args:
        below: its name below the listing's root, with a slash at the end, or nothing.
    """
    files, folders = _walk(folder)
    check_folders(folder, folders, files)
    wanted = [name for name in files if holds_examples(name.rpartition("/")[2])]
    for name in wanted:
        _check_file(folder, name)
    readable = [name for name in wanted if _ending(name) in FORMATS]
    check_splits(folder, readable)
    listing.files += [f"{below}{name}" for name in wanted]
    others = set(files) - set(wanted)
    listing.left_out += [f"{below}{name}" for name in others if _ending(name) in FORMATS]


def _walk(root: str) -> tuple[list[str], list[str]]:
    """Names of all files below a folder, but for those in hidden ones, and of all folders."""

    def refuse(error: OSError) -> None:
        remedy = "Check its permissions."
        raise UserError(str(error.filename), "a folder that can be read", str(error), remedy)

    found: list[str] = []
    folders: list[str] = []
    for directory, inner, files in os.walk(root, onerror=refuse):
        below = os.path.relpath(directory, root).replace(os.sep, "/")
        prefix = "" if below == "." else f"{below}/"
        folders += [f"{prefix}{name}" for name in inner]
        inner[:] = [name for name in inner if not name.startswith((".", "_"))]
        for name in inner:
            if os.path.islink(os.path.join(directory, name)):
                raise UserError(
                    os.path.join(directory, name),
                    "a folder",
                    "a link to one, which is not followed",
                    "Give the folder that it leads to, or a glob of the files to read.",
                )
        found += [f"{prefix}{name}" for name in files]
    return found, folders


def _check_file(root: str, name: str) -> None:
    """Refuse a name that is none, what is no file, and a link that leaves the folder."""
    plain_name(name, root)
    mode = os.lstat(os.path.join(root, name)).st_mode
    if stat.S_ISREG(mode):
        return
    base, snapshots, rest = os.path.realpath(root).rpartition("/snapshots/")
    if snapshots and os.path.isdir(f"{base}/blobs"):
        # Of the hub's cache a folder may be given that lies below a snapshot.
        revision, _, below = rest.partition("/")
        root, name = f"{base}/snapshots/{revision}", f"{below}/{name}" if below else name
    regular_file(root, name, root)


def _find_remote(source: str) -> _Listing:
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
            return _Listing(filesystem, base, [name])
        local = isinstance(filesystem, pyarrow.fs.LocalFileSystem)
        listing = _Listing(filesystem, path)
        if local and not magic:
            _add_folder(listing, path, "")
            return listing
        below = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    except RaycurvError:
        raise
    except Exception as error:  # of a file system of another library's, whatever that raises
        raise UserError(
            shown(source),
            "a URI that pyarrow.fs understands and may read",
            redacted(error, source),
            "Check the scheme, the address and the credentials, or copy the data to a local disk.",
        ) from None  # the error itself may show credentials
    start = len(path.rstrip("/")) + 1
    kinds = pyarrow.fs.FileType
    files = [info.path[start:] for info in below if info.type == kinds.File]
    hidden = [any(step.startswith((".", "_")) for step in f.split("/")[:-1]) for f in files]
    files = [name for name, under in zip(files, hidden, strict=True) if not under]
    if magic:
        pattern = _glob_pattern(address[len(root) :].lstrip("/"))
        files = [name for name in files if pattern.fullmatch(name)]
    else:
        folders = [info.path[start:] for info in below if info.type == kinds.Directory]
        check_folders(shown(source), folders, files)
    listing.files = [name for name in files if holds_examples(name.rpartition("/")[2])]
    others = set(files) - set(listing.files)
    listing.left_out = [name for name in others if _ending(name) in FORMATS]
    if not magic:
        check_splits(shown(source), [n for n in listing.files if _ending(n) in FORMATS])
    return listing


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
