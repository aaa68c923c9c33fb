"""A lock on a run directory: one job at a time writes to it.

On a file system it is ``flock`` on ``run.lock``: the kernel lets go of it with the process, however
that ends, and on NFS the server does. The file says who holds it; left behind by a process that was
killed it locks nothing. Processes that this one starts do not inherit the lock. On a file system
without locks a warning says so, and the job goes on.

On an object store it is a lease (lease.py), which has to be renewed.

Readers take no lock: files are there whole or not at all.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import Any

from raycurv.errors import UserError, shortened, user_errors
from raycurv.files.lease import Lease
from raycurv.files.store import Store
from raycurv.jsonfile import strict_json
from raycurv.names import kind_of

NAME = "run.lock"

# A link is not followed, and a pipe does not make one wait.
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
# Bytes that are read of what another job wrote there.
_LARGEST = 4096

# A file may go while it is opened, when the job that held it ends; not again and again.
_TRIES = 100

# File descriptors of the locks that this process holds: a forked child closes its copies, which
# would hold a lock for as long as the child lives.
_descriptors: set[int] = set()


@contextmanager
def hold(
    store: Store, job: str, say: Callable[[str], None] | None = None, flag: str = "--out"
) -> Iterator[None]:
    """Hold the lock on a store while the body runs.

    Args:
        store: of the run. On an object store it is guarded: once the lease is lost, it refuses to
            write.
        say: tells the person why this waits (on an object store, for a lease that may be dead).

    Raises:
        UserError: another job holds it; says who.
        LostLock: from the body, at its next write: another job took the directory over, since this
            one was suspended for longer than its lease.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    owner = {"job": job, "host": socket.gethostname(), "pid": os.getpid(), "since": now}
    locked = _locked if store.local else _leased
    with locked(store, owner, f"{flag} {store.root}", say or (lambda text: None)):
        yield


@contextmanager
def _leased(
    store: Store, owner: Mapping[str, Any], where: str, say: Callable[[str], None]
) -> Iterator[None]:
    lease = Lease(store, NAME, owner, where)
    remedy = "Give another --out, or correct the credentials and their rights."
    with user_errors(where, "a directory that can be written", remedy, OSError, got="{error}"):
        store.make()
        holder = lease.take(say)
    if holder is not None:
        raise _held(where, holder)
    before, store.guard = store.guard, lease.check
    try:
        yield
    finally:
        store.guard = before
        lease.release()


# On a file system ------------------------------------------------------------------------------


@contextmanager
def _locked(
    store: Store, owner: Mapping[str, Any], where: str, say: Callable[[str], None]
) -> Iterator[None]:
    directory, path = store.path(), store.path(NAME)
    made = not os.path.isdir(directory)
    try:
        file = _take(store, where)
    except BlockingIOError:
        raise _held(where, _owner(path)) from None
    except OSError:
        yield  # where no file can be made no job can write, and its own first file says why
        return
    try:
        with suppress(OSError):  # a full disk, say: it locks all the same
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(owner).encode() + b"\n", 0)
        yield
    finally:
        if file in _descriptors:  # a forked child has none
            # While it is still locked: whoever has opened this file in the meantime finds that it
            # is not the one of that name any more.
            with suppress(OSError):
                os.unlink(path)
                if made:
                    os.rmdir(directory)  # only if nothing was written
            _descriptors.discard(file)
            os.close(file)


def _owner(path: str) -> Any:
    """What the lock of another job says of it, if it is readable."""
    with suppress(OSError, ValueError):
        file = os.open(path, _FLAGS | os.O_RDONLY)
        try:
            return strict_json(os.read(file, _LARGEST))
        finally:
            os.close(file)
    return None


def _take(store: Store, where: str) -> int:
    """A descriptor of the locked file.

    Raises:
        UserError: something else has that name.
        BlockingIOError: another descriptor holds it, in this process or another one; or others take
            it and let it go all the time.
        OSError: there can be no file, or no lock on it.
    """
    path = store.path(NAME)
    for _ in range(_TRIES):
        store.make()
        try:
            file = os.open(path, _FLAGS | os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # a refused job has just taken its empty directory away
        except OSError as error:
            if error.errno in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
                raise _no_lock(where, path) from error
            if not isinstance(error, PermissionError):
                raise
            # Another person's file in a shared directory can be locked without writing to it.
            file = os.open(path, _FLAGS | os.O_RDONLY)
        taken = False
        try:
            status = os.fstat(file)
            # What is written into a file of two names is written into that of the other name.
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise _no_lock(where, path)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = _same(file, path)
        except BlockingIOError:
            raise
        except OSError as error:
            warnings.warn(
                f"{path} cannot be locked ({error.strerror}); see to it that no other job writes "
                "to this directory",
                RuntimeWarning,
                stacklevel=2,
            )
            raise
        finally:
            if not taken:  # perhaps its owner has just deleted it
                os.close(file)
        if taken:
            _descriptors.add(file)
            return file
    raise BlockingIOError(errno.EAGAIN, "a file that does not stay", path)


def _same(file: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except FileNotFoundError:
        return False


def _close_copies() -> None:
    # Not unlocked: that would be the parent's lock, which the two share.
    for file in _descriptors:
        with suppress(OSError):
            os.close(file)
    _descriptors.clear()


os.register_at_fork(after_in_child=_close_copies)


# Both --------------------------------------------------------------------------------------------


def _no_lock(where: str, path: str) -> UserError:
    kind = "something else"
    with suppress(OSError):
        status = os.lstat(path)
        kind = kind_of(status.st_mode)
        if stat.S_ISREG(status.st_mode):
            kind = "a file that has another name, too (a hard link)"
    return UserError(
        where, f"its lock, {NAME}, as a file that a job made", kind,
        f"Remove {path}: no job that runs has made it.",
    )  # fmt: skip


def _held(where: str, holder: Any) -> UserError:
    got = "one that another job has just taken"
    said = holder if isinstance(holder, Mapping) else {}
    if {"job", "host", "pid", "since"} <= said.keys():
        # Whoever may write there may write anything.
        job, host, pid, since = (_plain(said[key]) for key in ("job", "host", "pid", "since"))
        got = f"{job} in process {pid} on {host}, since {since}"
    return UserError(
        where,
        "a directory that no other job works on",
        got,
        "Wait for its end or stop it (the lock goes with it), or give another directory.",
    )


def _plain(value: Any) -> str:
    return shortened("".join(c if c.isprintable() else "?" for c in str(value)[:200]))
