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
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import Any

from raycurv.errors import UserError, user_errors
from raycurv.files.lease import Lease
from raycurv.files.store import Store

NAME = "run.lock"

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
        file = _take(store)
    except BlockingIOError:
        holder: Any = None
        with suppress(OSError, ValueError), open(path) as text:
            holder = json.load(text)
        raise _held(where, holder) from None
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


def _take(store: Store) -> int:
    """A descriptor of the locked file.

    Raises:
        BlockingIOError: another descriptor holds it, in this process or another one; or others take
            it and let it go all the time.
        OSError: there can be no file, or no lock on it.
    """
    path = store.path(NAME)
    for _ in range(_TRIES):
        store.make()
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # a refused job has just taken its empty directory away
        except PermissionError:
            # Another person's file in a shared directory can be locked without writing to it.
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        taken = False
        try:
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
        return os.path.samestat(os.fstat(file), os.stat(path))
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


def _held(where: str, holder: Any) -> UserError:
    got = "one that another job has just taken"
    if isinstance(holder, Mapping) and {"job", "host", "pid", "since"} <= holder.keys():
        got = "{job} in process {pid} on {host}, since {since}".format(**holder)
    return UserError(
        where,
        "a directory that no other job works on",
        got,
        "Wait for its end or stop it (the lock goes with it), or give another directory.",
    )
