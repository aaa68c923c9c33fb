"""The spool: what waits on a local disk while the stages that need it are not resident.

    STREAM/KIND/BOUNDARY/MICROBATCH.safetensors

A boundary is the group of stages that a file enters: ``hidden`` states come from the group before
it, ``gradient`` and ``results`` from its own first stage on their way back. Files are checksummed
and atomic, but not synced: a spool survives the death of a process, and what a power failure takes
is found missing or damaged and made again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from torch import Tensor

from raycurv.errors import DamagedFile, UserError
from raycurv.files.store import Store
from raycurv.files.tensorfile import is_complete, open_tensors, write_tensors
from raycurv.jsonfile import made_of

Kind = Literal["hidden", "gradient", "results"]
KINDS: tuple[Kind, ...] = ("hidden", "gradient", "results")


class LostSpool(Exception):
    """A spool file that is gone or damaged, and has to be made again."""

    def __init__(self, stream: str, kind: Kind, boundary: int, microbatch: int) -> None:
        super().__init__(stream, kind, boundary, microbatch)
        self.stream, self.kind = stream, kind
        self.boundary, self.microbatch = boundary, microbatch


@dataclass(frozen=True)
class _State:
    """What ``state.json`` says: whose spool it is, and the group that is next."""

    mark: str
    level: int


class Spool:
    """The spooled tensors of one sweep.

    Args:
        store: of a local directory, made when it is first written to.
        mark: of the run, its plans and its groups: files of another mark are of no use.
    """

    def __init__(self, store: Store, mark: str, groups: int) -> None:
        self._store = store
        self.directory = self._store.root
        self._mark, self._groups = mark, groups
        state = self._state()
        if state is not None and state.mark == mark and 0 <= state.level < groups:
            self.level = state.level
            self._forget_above()
        else:
            self.delete()
            self.level = groups - 1

    def _state(self) -> _State | None:
        """What an earlier run said of this spool, if that is readable."""
        try:
            said = self._store.read_json("state.json")
            return None if said is None else made_of(_State, said)
        except (DamagedFile, ValueError):
            return None

    def write(
        self, stream: str, kind: Kind, boundary: int, microbatch: int, tensors: Mapping[str, Tensor]
    ) -> None:
        """Write a file; NoSpace if the disk is full."""
        if not self._store.exists("state.json"):
            self._write_state()
        name = _name(stream, kind, boundary, microbatch)
        write_tensors(self._store, name, tensors, {}, finite=False)

    def read(self, stream: str, kind: Kind, boundary: int, microbatch: int) -> dict[str, Tensor]:
        """Read a file; LostSpool if it is gone, truncated or altered: what is left is deleted."""
        name = _name(stream, kind, boundary, microbatch)
        try:
            return open_tensors(self._store, name).read_all()
        except (DamagedFile, FileNotFoundError):
            self._store.delete(name)
            raise LostSpool(stream, kind, boundary, microbatch) from None

    def has(self, stream: str, kind: Kind, boundary: int, microbatch: int) -> bool:
        """Whether the file is there with its full length."""
        return is_complete(self._store, _name(stream, kind, boundary, microbatch))

    def forget(self, stream: str, kind: Kind, boundary: int, microbatch: int) -> None:
        self._store.delete(_name(stream, kind, boundary, microbatch))

    def descend(self, level: int) -> None:
        """Say that the groups above ``level`` are done, and delete what only they needed."""
        self.level = level
        self._write_state()
        self._forget_above()

    def delete(self) -> None:
        self._store.delete_directory("")

    def _forget_above(self) -> None:
        # The group of the level still reads its own hidden states and what the one above sent back.
        last = {"hidden": self.level, "gradient": self.level + 1, "results": self.level + 1}
        streams = {name.partition("/")[0] for name in self._store.directories()}
        for stream in streams:
            for kind in KINDS:
                for boundary in range(last[kind] + 1, self._groups):
                    self._store.delete_directory(_place(stream, kind, boundary))

    def _write_state(self) -> None:
        self._store.write_json("state.json", asdict(_State(self._mark, self.level)))


def _place(stream: str, kind: Kind, boundary: int) -> str:
    return f"{stream}/{kind}/{boundary:04d}"


def _name(stream: str, kind: Kind, boundary: int, microbatch: int) -> str:
    return f"{_place(stream, kind, boundary)}/{microbatch:07d}.safetensors"


def spool_store(run: Store, given: str | None) -> Store:
    """Where the spools of a run lie: below ``given``, for this user alone, or below the run itself;
    UserError if that is no local directory."""
    if given is None:
        if not run.local:
            raise UserError(
                "--spool-dir", "a local directory, since --out is on an object store", "nothing",
                "Give --spool-dir a directory on a fast disk of the machine that runs the job.",
            )  # fmt: skip
        found = run.inside("work/spool")
        found.lasting = False
        return found
    place = Store(os.path.abspath(os.path.expanduser(given)) if "://" not in given else given)
    if not place.local:
        raise UserError(
            "--spool-dir", "a local directory", repr(place.root), "Spools are never remote."
        )
    # Runs may share a disk for their spools; each has a directory of its own.
    own = hashlib.blake2b(run.root.encode(), digest_size=8).hexdigest()
    return Store(f"{place.path()}/raycurv-{own}", lasting=False, private=True)
