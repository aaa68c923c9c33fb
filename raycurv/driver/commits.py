"""Commits of a pass: points to which a run, or an actor that was lost, goes back.

    PLACE/commit.json                             microbatches done, the plan, the files
    PLACE/0000042/replica-0-stage-0.safetensors   sums, and the microbatches that they contain
    PLACE/0000042/rows.parquet                    what the driver collected

What is not in ``commit.json`` does not exist.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from raycurv.errors import DamagedFile
from raycurv.files.store import Store
from raycurv.jsonfile import made_of

# Of the sums in a commit. Version 1 had no such entry, and other names of the same sums.
FORMAT = 2


@dataclass(frozen=True)
class Committed:
    """What was committed of a pass.

    Attributes:
        done: the first so many microbatches.
        plan: mark of the plan that they are counted in.
        rows: files of the sink.
        sums: files of the stages, for each replica that there was.
        format: of the stages' files; sums of another format begin anew.
    """

    done: int
    plan: str
    rows: list[str] = field(default_factory=list)
    sums: list[list[str]] = field(default_factory=list)
    finished: bool = False
    format: int = FORMAT

    @property
    def files(self) -> list[str]:
        """Names of the files of all stages."""
        return [name for replica in self.sums for name in replica]


def read_commit(store: Store, place: str) -> Committed | None:
    """What is committed of a pass, of whatever plan; ``None`` when nothing is.

    Raises:
        DamagedFile: ``commit.json`` is not what was written.
    """
    name = f"{place}/commit.json"
    said = store.read_json(name)
    if said is None:
        return None
    try:
        found = made_of(Committed, {"format": 1} | said)
        if found.done < 0:
            raise ValueError(f"{found.done} microbatches")
    except ValueError as error:
        raise DamagedFile(
            store.path(name), "a commit", str(error), "Delete it and run the command again."
        ) from error
    return found


def last_commit(store: Store, place: str, mark: str) -> Committed | None:
    """A pass's last commit, if it is of the plan so marked and its files are there."""
    found = read_commit(store, place)
    if found is None or found.plan != mark:
        return None
    if found.format != FORMAT and not found.finished:
        return None
    if not all(store.exists(name) for name in (*found.rows, *found.files)):
        return None
    return found


def write_commit(store: Store, place: str, commit: Committed) -> None:
    """Say that a commit exists; its files are there."""
    store.write_json(f"{place}/commit.json", asdict(commit))


def sums_name(place: str, done: int, replica: int, stage: int) -> str:
    """Where a stage's sums of a commit lie."""
    return f"{place}/{done:07d}/replica-{replica}-stage-{stage}.safetensors"


def plan_mark(plan: Iterable[Sequence[int]]) -> str:
    """Tells plans apart: another --batch-tokens makes other microbatches."""
    # The hash of the plan as JSON, a microbatch at a time.
    digest = hashlib.blake2b(b"[", digest_size=16)
    for m, members in enumerate(plan):
        digest.update(f"{', ' if m else ''}{json.dumps(members)}".encode())
    digest.update(b"]")
    return digest.hexdigest()
