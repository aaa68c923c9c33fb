"""Folders and faults of a local disk: nothing is written or deleted through a link.

A directory of results may be shared, and hold links that somebody else has laid. So from its root
on every folder is opened by itself, without following a link, and a file is made, renamed and
deleted in the folder that is open: there is no moment in which a link could take its place. The
root itself may be a link, which its user chose.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from raycurv.errors import DiskError, NoSpace, RaycurvError, UserError

_AGAIN = "run the same command again: everything finished is whole, and the run goes on from there."
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What to do about a fault, by its number.
_REMEDIES = {
    errno.EFBIG: "Raise the limit of a file's size (ulimit -f), or take a disk whose file system "
    f"has larger files, and {_AGAIN}",
    errno.EROFS: f"Mount the disk for writing, and {_AGAIN}",
    errno.EACCES: f"Correct the permissions, and {_AGAIN}",
    errno.EPERM: f"Correct the permissions, and {_AGAIN}",
    errno.EMFILE: f"Raise the limit of open files (ulimit -n), and {_AGAIN}",
    errno.ENFILE: f"Raise the system's limit of open files, and {_AGAIN}",
    errno.ENAMETOOLONG: "Give a directory of a shorter name.",
    errno.ENOTDIR: f"Move away the file that stands in the place of a directory, and {_AGAIN}",
    errno.EEXIST: f"Move away what stands in the place of the file or directory, and {_AGAIN}",
    errno.EISDIR: f"Move away the directory that stands in the place of a file, and {_AGAIN}",
}


@contextmanager
def disk_errors(path: str, wanted: str) -> Iterator[None]:
    """What the system says of a file in the body becomes a :class:`DiskError` with a remedy; that
    there is no such file stays as it is.

    Args:
        path: of the file.
        wanted: what is done with it, such as ``a file that can be read``.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise told(path, wanted, error) from error


def no_space(path: str, directory: str, written: int, error: OSError) -> RaycurvError:
    """The error of a file that could not be written; a :class:`NoSpace` where room is missing.

    Args:
        path: of the file.
        directory: on the disk that is meant, perhaps not made yet.
        written: bytes, before it failed.
    """
    if error.errno not in _NO_ROOM:
        return told(path, "a file that can be written", error)
    there = directory
    while not os.path.exists(there):
        there = os.path.dirname(there)
    return NoSpace(
        path,
        f"room on the disk of {there} for the file",
        f"{error.strerror} after {written:,} bytes "
        f"({shutil.disk_usage(there).free:,} bytes are free)",
        _REMEDIES.get(error.errno, f"Make room and {_AGAIN}"),
    )


def told(path: str, wanted: str, error: OSError) -> DiskError:
    """What the system says of a file, with a remedy; see :func:`disk_errors`."""
    remedy = _REMEDIES.get(error.errno or 0, f"Look at the disk's state (dmesg), and {_AGAIN}")
    return DiskError(path, wanted, error.strerror or str(error), remedy)


@contextmanager
def folder(root: str, names: Sequence[str], make: bool, own: bool = False) -> Iterator[int]:
    """A descriptor of a folder below a root, to make, rename and delete files in.

    Args:
        root: where it lies.
        names: of the folders that lead there.
        make: make what is missing.
        own: the root is the user's alone: no link, nobody else's, and open to nobody else.

    Raises:
        UserError: a link stands in the place of a folder, or the root is not the user's own.
        FileNotFoundError: a folder is missing.
        OSError: what the system says.
    """
    if make:
        os.makedirs(root, mode=0o700 if own else 0o777, exist_ok=True)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    opened = _open(root, flags | (os.O_NOFOLLOW if own else 0), None, root)
    try:
        if own:
            _keep_private(root, opened)
        path = root
        for name in names:
            path = os.path.join(path, name)
            if make:
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=opened)
            deeper = _open(name, flags | os.O_NOFOLLOW, opened, path)
            os.close(opened)
            opened = deeper
        yield opened
    finally:
        os.close(opened)


def _open(name: str, flags: int, parent: int | None, path: str) -> int:
    try:
        return os.open(name, flags, dir_fd=parent)
    except OSError:
        if os.path.islink(path):
            raise _link(path) from None
        raise


def _link(path: str) -> UserError:
    return UserError(
        path, "a folder that is no link", f"a link to {os.readlink(path)}",
        "Remove the link: nothing is written or deleted through one, for it may be a stranger's.",
    )  # fmt: skip


def _keep_private(root: str, opened: int) -> None:
    owner = os.fstat(opened).st_uid
    if owner != os.geteuid():
        raise UserError(
            root, "a folder of your own", f"one of user {owner}", "Give another directory."
        )
    os.fchmod(opened, 0o700)


def remove_folder(name: str, parent: int, path: str) -> None:
    """Delete a folder with all in it, but nothing that links in it lead to; nothing happens when
    there is none.

    Args:
        name: of the folder.
        parent: descriptor of the one that it lies in.
        path: of the folder.

    Raises:
        UserError: it is a link.
        OSError: what the system says.
    """
    try:
        mode = os.lstat(name, dir_fd=parent).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise _link(path)
    if not stat.S_ISDIR(mode):
        return
    with suppress(FileNotFoundError):  # somebody else deletes it, too
        if sys.version_info >= (3, 11):
            shutil.rmtree(name, dir_fd=parent)
        else:
            shutil.rmtree(path)
