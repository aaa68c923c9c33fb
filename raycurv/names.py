"""Names of files that a file gives, such as those of an index: plain, and below their root.

A directory may come from a stranger, so a name in it, or a link, must not lead to another place.
This is the one place that checks it, before anything is read, written or copied:

    plain_name(name, where) -> str            as text alone (an object store has no links)
    inside(root, name, where) -> Path         also after links; there need be no such file
    regular_file(root, name, where) -> Path   also a file that is there, and no pipe or device

All raise a ``UserError`` that begins with ``where``, the file that gives the name. The path that
comes back has no links in it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from raycurv.errors import UserError, shortened, user_errors

# What file systems hold: bytes of a part of a name.
MAX_PART_BYTES = 255
_CACHES = ("models--", "datasets--", "spaces--")


def plain_name(name: object, where: str) -> str:
    """A relative name of parts with ``/`` between them, none of them ``..``; as it was given."""
    parts = name.split("/") if isinstance(name, str) else []
    if not parts or not all(map(_plain, parts)):
        raise UserError(
            where,
            "plain names of files below it, such as a/b.safetensors",
            shortened(repr(name), 200) if isinstance(name, str) else f"a {type(name).__name__}",
            "A name must not lead out of its directory: get it from a source that you trust.",
        )
    return str(name)


def inside(root: str | os.PathLike[str], name: object, where: str) -> Path:
    """What a plain name leads to, which must lie below the root after links are followed.

    A snapshot of the Hugging Face hub's cache may link to the files (``blobs``) of its own
    repository there.
    """
    base = os.path.realpath(root)
    plain = plain_name(name, where)
    # A ring of links, or one that may not be looked at.
    with user_errors(where, f"the file {plain}", "Replace the link by the file.", OSError):
        path = os.path.realpath(os.path.join(base, plain))
    if not any(_below(path, allowed) for allowed in (base, *_blobs(base))):
        raise UserError(
            where,
            f"{plain} as a file of this directory",
            f"a link to {path}",
            "A link must not lead out of its directory: replace it by the file (cp -L), if you "
            "trust where it comes from.",
        )
    return Path(path)


def regular_file(root: str | os.PathLike[str], name: object, where: str) -> Path:
    """As :func:`inside`, for a file that is there; a directory, a pipe, a device is refused."""
    path = inside(root, name, where)
    with user_errors(where, f"the file {name}", "Copy it again.", OSError, got="{error}"):
        mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise UserError(where, f"{name} as a file", kind_of(mode), "Replace it by the file.")
    return path


def kind_of(mode: int) -> str:
    """What a file of a mode is, in words."""
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFLNK: "a link",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def _plain(part: str) -> bool:
    """Whether a part of a name names something in its directory, on every system."""
    try:
        size = len(part.encode())
    except UnicodeEncodeError:
        return False
    return (
        0 < size <= MAX_PART_BYTES and part not in (".", "..") and part.isprintable()
        and "\\" not in part
    )  # fmt: skip


def _below(path: str, root: str) -> bool:
    return path.startswith(root.rstrip("/") + "/")


def _blobs(base: str) -> list[str]:
    """Where the files of a snapshot in the hub's cache lie."""
    snapshots, repository = os.path.dirname(base), os.path.dirname(os.path.dirname(base))
    cached = os.path.basename(repository).startswith(_CACHES)
    return [f"{repository}/blobs"] if cached and os.path.basename(snapshots) == "snapshots" else []
