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
    check_shards,
    holds_examples,
    not_read,
)
from raycurv.data.formats.file_formats import FORMATS, READABLE, ending
from raycurv.data.in_memory import RowsPart, TablePart
from raycurv.data.objects import Splits, part_of, settled
from raycurv.data.parts import Part
from raycurv.data.portion import Selection, select
from raycurv.data.rows import READ_ERRORS
from raycurv.data.splits import (
    SPLITS_FILE,
    Split,
    check_unnamed,
    choose,
    of_mapping,
    saved_split,
)
from raycurv.data.uri import check_endpoint, check_place, is_uri, redacted, shown
from raycurv.errors import RaycurvError, UserError, user_errors
from raycurv.hub import Snapshot
from raycurv.jsonfile import parse_json
from raycurv.names import kind_of, plain_name, regular_file

# And what else a Python caller holds, see objects.py.
Source: TypeAlias = (
    "str | Path | pa.Table | Sequence[Mapping[str, Any]] | Snapshot | Selection | Any"
)


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
    """The parts of a source, sorted by their names (of a split on the hub in the order that its
    card has them in), and what was left out.

    Args:
        source: a file, a directory (searched through all its subdirectories; names that begin with
            a dot or an underscore are left out), a glob, a URI of these that ``pyarrow.fs``
            understands, the files of a split on the hub, a ``pyarrow.Table``, a list of dicts, or
            another object (objects.py).

    Raises:
        UserError: there is no such data; nothing readable in it; a directory holds other files
            besides, several splits, or a link out of it.
    """
    wanted = source if isinstance(source, Selection) else Selection(source)
    return Found(*select(wanted, _found(wanted.source, wanted.parsed(), wanted.flag)))


def _found(source: Any, split: Split | None, flag: str) -> tuple[list[Part], Sequence[str]]:
    """The parts of a source of one split, and the names of files that were left out."""
    if isinstance(source, (str, Path)):
        check_place("data", str(source))
        return _files(str(source), split, flag)
    if isinstance(source, Snapshot):  # of one split
        listing = _Listing(pyarrow.fs.LocalFileSystem(), str(source.directory), [*source.files])
        for name in listing.files:
            _check_file(listing.root, name)
        return _parts_of(listing, listing.root, in_order=True)
    source = settled(source, split)
    if isinstance(source, Splits):
        return _found(of_mapping(source, split, flag), None, flag)
    check_unnamed("the data", split)
    if isinstance(source, pa.Table):
        return [TablePart(source)], ()
    if isinstance(source, (list, tuple)):
        return [RowsPart(source)], ()
    return [part_of(source)], ()


def fingerprint(source: Source) -> dict[str, Any]:
    """What tells this data from other data, without reading all of it.

    Returns:
        JSON-serialisable. Of files: ``{"files": [{"path", "size", "hash"}, ...]}`` in data order,
        ``path`` below the data's root, ``size`` in bytes, ``hash`` of sampled bytes: the first, the
        last and evenly spread ones between, at most 256 KiB, all of a smaller file. Of data in
        memory: ``{"rows", "hash"}``, the hash over all of its content. Beside these what a
        :class:`Selection` takes of it.

    Raises:
        UserError: there is no such data, or nothing readable in it.
    """
    found = [part.fingerprint() for part in open_parts(source)]
    wanted = source if isinstance(source, Selection) else Selection(source)
    own = {"files": found} if isinstance(wanted.source, (str, Path, Snapshot)) else found[0]
    return own | wanted.recorded()


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

    def add(
        self,
        where: str,
        below: str,
        files: Sequence[str],
        folders: Sequence[str],
        split: Split | None,
        flag: str,
    ) -> None:
        """Add the files of a folder that are of one split.

        Args:
            where: the folder, as a person gave it.
            below: its name below the root, with a slash at the end, or nothing.
            files: names of all files in it.
            folders: names of all folders in it.

        Raises:
            UserError: it holds the log of a table, several splits, a file in two formats, or
                not all shards.
        """
        check_folders(where, folders)
        own = [
            n for n in files if holds_examples(base := n.rpartition("/")[2]) or base == SPLITS_FILE
        ]
        chosen = choose(where, own, folders, self._saved(where, below, own), split, flag)
        readable = [name for name in chosen if ending(name) in FORMATS]
        _check_once(where, readable)
        check_shards(where, readable)
        self.files += [f"{below}{name}" for name in chosen]
        others = set(files) - set(own)
        self.left_out += [f"{below}{name}" for name in others if ending(name) in FORMATS]

    def keep(self, where: str, split: Split | None, flag: str) -> None:
        """Of files that were named one by one, keep those of a split that was asked for."""
        if split is not None:
            saved = self._saved(where, "", self.files)
            self.files = choose(where, self.files, (), saved, split, flag)

    def _saved(self, where: str, below: str, files: Sequence[str]) -> dict[str, str]:
        """The folders in which saved data sets lie, with the split that each says it is of."""
        folders = {n.rpartition("/")[0] for n in files if ending(n) == ".arrow"}
        states = {folder: self.state(where, f"{below}{folder}".rstrip("/")) for folder in folders}
        return {f: saved_split(said[1].get("_split")) for f, said in states.items() if said}

    def state(self, where: str, folder: str) -> tuple[str, dict[str, Any]] | None:
        """What the ``state.json`` in a folder says, and where it lies; ``None`` without one."""
        name = f"{folder}/{STATE_FILE}" if folder else STATE_FILE
        path = self.path(name)
        where = f"{name} in {where}" if is_uri(where) else path
        with user_errors(
            where, "a file that can be read", "Check it.", *READ_ERRORS, got="{error}"
        ):
            info = self.filesystem.get_file_info(path)
            if info.type != pyarrow.fs.FileType.File:
                return None
            with self.filesystem.open_input_stream(path) as file:
                data = bytes(file.read(STATE_BYTES + 1))
        wanted, remedy = "what Hugging Face datasets writes there", "Save the data set again."
        return where, parse_json(data, where, wanted, remedy)

    def path(self, name: str) -> str:
        """What the file system calls a file."""
        return f"{self.root.rstrip('/')}/{name}" if self.root else name


def _files(source: str, split: Split | None, flag: str) -> tuple[list[Part], Sequence[str]]:
    """The parts of a path, a glob or a URI of either, sorted by name, and what was left out."""
    remote = is_uri(source)
    find = _find_remote if remote else _find_local
    listing = find(source if remote else os.path.expanduser(source), split, flag)
    return _parts_of(listing, source)


def _parts_of(
    listing: _Listing, source: str, in_order: bool = False
) -> tuple[list[Part], Sequence[str]]:
    """The parts of files, sorted by name or in the order in which they are listed, and what was
    left out."""
    remote = is_uri(source)
    names = list(dict.fromkeys(listing.files)) if in_order else sorted(set(listing.files))
    readable = [name for name in names if ending(name) in FORMATS]
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
        parts.append(FORMATS[ending(name)](name, location, path, listing.filesystem))
    _check_states(listing, readable, shown(source))
    return parts, tuple(sorted(set(listing.left_out)))


def _check_states(listing: _Listing, readable: Sequence[str], where: str) -> None:
    """Hold the data sets that Hugging Face datasets saved against what is said of them."""
    folders: dict[str, list[str]] = {}
    for name in readable:
        if ending(name) == ".arrow":
            folder, _, file = name.rpartition("/")
            folders.setdefault(folder, []).append(file)
    for folder, files in folders.items():
        state = listing.state(where, folder)
        if state is not None:
            check_saved(state[0], os.path.dirname(listing.path(f"{folder}/_")), files, state[1])


def _check_once(where: str, names: Sequence[str]) -> None:
    """Refuse two files that differ in their format alone: the same examples again, it may be."""
    first: dict[str, str] = {}
    for name in sorted(names):
        other = first.setdefault(name[: -len(ending(name))], name)
        if other != name:
            raise UserError(
                where, "every file in one format", f"{other} and {name}",
                "Take one of the two away, or name the files to read by a glob, such as "
                f"'{where.rstrip('/')}/**/*{ending(name)}'.",
            )  # fmt: skip


def _find_local(source: str, split: Split | None, flag: str) -> _Listing:
    """What a path or a glob of this machine names."""
    filesystem = pyarrow.fs.LocalFileSystem()
    if os.path.isdir(source):
        listing = _Listing(filesystem, source)
        _add_folder(listing, source, "", split, flag)
        return listing
    if os.path.isfile(source):
        listing = _Listing(filesystem, os.path.dirname(source), [os.path.basename(source)])
        listing.keep(source, split, flag)
        return listing
    if not glob.has_magic(source):
        raise _no_such_data(source)
    listing = _Listing(filesystem, _glob_root(source))
    for match in glob.glob(source, recursive=True):
        below = os.path.relpath(match, listing.root or ".").replace(os.sep, "/")
        if os.path.isdir(match):
            _add_folder(listing, match, "" if below == "." else f"{below}/", split, flag)
        elif not holds_examples(os.path.basename(match)):
            listing.left_out += [below] if ending(below) in FORMATS else []
        elif os.path.isfile(match):
            listing.files.append(below)
        else:
            raise UserError(match, "a file", kind_of(os.lstat(match).st_mode), "Take it away.")
    listing.keep(source, split, flag)
    return listing


def _add_folder(listing: _Listing, folder: str, below: str, split: Split | None, flag: str) -> None:
    """Add the files of a folder of this machine; see :meth:`_Listing.add`."""
    files, folders = _walk(folder)
    before = len(listing.files)
    listing.add(folder, below, files, folders, split, flag)
    for name in listing.files[before:]:
        _check_file(folder, name[len(below) :])


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


def _find_remote(source: str, split: Split | None, flag: str) -> _Listing:
    """The data files that a URI (an object, a directory or a glob of them) names, of one split if
    it is named; UserError for one that cannot be read or does not exist."""
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
            listing = _Listing(filesystem, base, [name])
            listing.keep(source, split, flag)
            return listing
        local = isinstance(filesystem, pyarrow.fs.LocalFileSystem)
        listing = _Listing(filesystem, path)
        if local and not magic:
            _add_folder(listing, path, "", split, flag)
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
    if not magic:
        folders = [info.path[start:] for info in below if info.type == kinds.Directory]
        listing.add(shown(source), "", files, folders, split, flag)
        return listing
    pattern = _glob_pattern(address[len(root) :].lstrip("/"))
    files = [name for name in files if pattern.fullmatch(name)]
    listing.files = [name for name in files if holds_examples(name.rpartition("/")[2])]
    others = set(files) - set(listing.files)
    listing.left_out = [name for name in others if ending(name) in FORMATS]
    listing.keep(source, split, flag)
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
