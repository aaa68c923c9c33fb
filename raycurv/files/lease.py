"""A lease: the lock of a directory on an object store, which has no locks.

An object says who holds it and counts heartbeats. Nobody compares the clocks of two machines:

- alive is a lease that changes while one watches; that takes a heartbeat at most,
- dead is one that does not change for as long as it says that it is good for, by the clock of who
  watches; or one whose object is more than twice as old as that, beside a fresh object of who
  watches: both times are the store's own.

Object stores can write conditionally, but pyarrow cannot ask for it. So who takes a free or dead
lease writes it, waits a moment and reads it back: of several at once the last writer has it. Should
two pass even so (one took longer to write than the other waited), the next heartbeat of one of them
finds the other's: every heartbeat reads before it writes, and a lease that is another's is lost.
Until then both wrote the same: files of a run are whole, and follow from the settings in run.json.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from raycurv.errors import DamagedFile, LostLock
from raycurv.files.store import Store
from raycurv.jsonfile import misfit

# Seconds that a lease may be good for.
_LONGEST = 86_400.0

# Leases that this process holds: to ask for one of them again needs no watching.
_mine: set[str] = set()


@dataclass(frozen=True)
class Rhythm:
    """The times of a lease, in seconds.

    Attributes:
        beat: between two heartbeats.
        good: without a heartbeat the lease is dead after so long.
        settle: from writing a lease to reading it back; longer than an object takes to be written.
    """

    beat: float = 5.0
    good: float = 30.0
    settle: float = 1.0


RHYTHM = Rhythm()


class Lease:
    """A lease under one name of a store, held or about to be; it tells others of its ``owner``."""

    def __init__(self, store: Store, name: str, owner: Mapping[str, Any], where: str) -> None:
        # A store of its own: the job's refuses to write once the lease is lost.
        self._store, self._name, self._where = Store(store.uri), name, where
        self._owner, self._rhythm = dict(owner), RHYTHM
        self._id = uuid.uuid4().hex
        self._beats = 0
        self._seen = _now()
        self._lost = ""
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def take(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        """Take the lease; gives what the lease says of its holder where another has it. OSError if
        the store cannot be written or read.

        ``say`` is told of a lease that may be dead, and how long that takes to find out.
        """
        there = self._read()
        if there is not None and self._alive(there, say):
            return there
        try:
            self._write()
            time.sleep(self._rhythm.settle)
            there = self._read()
        except BaseException:
            self.release()
            raise
        if there is None or there.get("lease") != self._id:
            # One that is gone by now was the winner's, who has ended since.
            return there or {}
        self._seen = _now()
        _mine.add(self._id)
        self._thread = threading.Thread(target=self._beat, name="raycurv lease", daemon=True)
        self._thread.start()
        return None

    def check(self) -> None:
        """Refuse to go on, with a LostLock, when another job has the lease."""
        if _now() - self._seen > self._rhythm.good:
            # Suspended: the thread may not have looked yet.
            with suppress(OSError):
                self._renew()
        if self._lost:
            raise LostLock(
                self._where, "the lease that this job holds on its directory", self._lost,
                "It was taken over while this job gave no sign of life for "
                f"{self._rhythm.good:g} s. Stop one of the two; what is finished is whole.",
            )  # fmt: skip

    def release(self) -> None:
        """Stop the heartbeat, and delete the lease if it still is this one's."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        _mine.discard(self._id)
        # A store that does not answer any more finds the lease dead by and by.
        with suppress(OSError):
            there = self._read()
            if there is not None and there.get("lease") == self._id:
                self._store.delete(self._name)

    def _alive(self, there: dict[str, Any], say: Callable[[str], None]) -> bool:
        """Whether a lease is renewed; watches it for as long as it takes to tell."""
        if there.get("lease") in _mine:
            return True
        good = _seconds(there, "good", self._rhythm.good)
        if self._age() > 2 * good:
            return False
        say(
            f"{self._where}: {_holder(there)} holds it, or died; watching its lease for up to "
            f"{good:g} s"
        )
        end = _now() + good
        while _now() < end:
            time.sleep(min(_seconds(there, "beat", self._rhythm.beat), good) / 4)
            now = self._read()
            if now is None:
                return False
            if now != there:
                return True
        return False

    def _age(self) -> float:
        """Seconds since the lease was written, both times by the store's clock; 0 if unknown."""
        probe = f"{self._name}.{self._id}"
        self._store.write(probe, [b"\n"])
        try:
            then, now = self._store.written(self._name), self._store.written(probe)
        finally:
            self._store.delete(probe)
        return 0.0 if then is None or now is None else now - then

    def _beat(self) -> None:
        while not self._ended.wait(self._rhythm.beat):
            with suppress(OSError):  # the next one may do
                self._renew()
            if self._lost:
                return

    def _renew(self) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            there = self._read()
            if there is None:
                self._lost = "no lease any more"
            elif there.get("lease") != self._id:
                self._lost = f"that of {_holder(there)}"
            else:
                self._write()
                self._seen = _now()

    def _write(self) -> None:
        self._beats += 1
        times = {"beat": self._rhythm.beat, "good": self._rhythm.good, "beats": self._beats}
        content = self._owner | {"lease": self._id} | times
        self._store.write(self._name, [json.dumps(content).encode() + b"\n"])

    def _read(self) -> dict[str, Any] | None:
        try:
            content = self._store.read_json(self._name)
        except FileNotFoundError:
            return None  # deleted between the two looks at it
        except DamagedFile:
            return {}
        return content if isinstance(content, dict) or content is None else {}


def _holder(lease: Mapping[str, Any]) -> str:
    return f"{lease.get('job')} in process {lease.get('pid')} on {lease.get('host')}"


def _seconds(lease: Mapping[str, Any], name: str, usual: float) -> float:
    """A time that a lease gives, if it is one: nobody is to wait for ever."""
    given: Any = lease.get(name)
    return usual if misfit(given, float) or not 0 < given <= _LONGEST else float(given)


def _now() -> float:
    """Seconds that go on while the machine is suspended, where the system has them."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)
