"""Makes things fail at a chosen moment: the process that is about to do something is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raycurv.files.store import Store
from raycurv.files.tables import read_directory
from raycurv.onray.ray_pool import OnRay


@dataclass
class Strike:
    """A blow to the actor that is about to be asked for something.

    Attributes:
        method: what is asked for.
        microbatch: of which; any if ``None``.
        replica, stage: of whom.
        act: is given the actor, its ``pid`` and ``node``; kills it by default.
        skip: so many such calls pass before.
        after: only when that one has struck.
        done: whether it has struck.
    """

    method: str
    microbatch: int | None = None
    replica: int = 0
    stage: int = 0
    act: Callable[[Any], None] = lambda actor: os.kill(actor.pid, signal.SIGKILL)
    skip: int = 0
    after: Strike | None = None
    done: bool = field(default=False)

    def meets(self, method: str, microbatch: int, replica: int, stage: int) -> bool:
        """Whether this call is the moment."""
        if self.done or (method, replica, stage) != (self.method, self.replica, self.stage):
            return False
        if self.after is not None and not self.after.done:
            return False
        if self.microbatch is not None and self.microbatch != microbatch:
            return False
        self.skip -= 1
        return self.skip < 0


@contextmanager
def striking(*strikes: Strike) -> Iterator[None]:
    """Strike while the driver in this process works; each must have struck in the end."""
    called = OnRay.call

    def call(pool: OnRay, stage: int, replica: int, method: str, *args: Any, **how: Any) -> Any:
        microbatch = how.get("microbatch", -1)
        for strike in strikes:
            if strike.meets(method, microbatch, replica, stage):
                strike.done = True
                strike.act(pool._actors[replica][stage])
        return called(pool, stage, replica, method, *args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnRay, "call", call)
        yield
    assert all(strike.done for strike in strikes), "a strike found no moment"


def hang(actor: Any) -> None:
    """Stop a process without ending it."""
    os.kill(actor.pid, signal.SIGSTOP)


def timeline(folder: Path | str) -> list[dict[str, Any]]:
    """Rows of a directory's timeline."""
    found: pa.Table = read_directory(Store(str(folder)), "tables/timeline")
    return found.to_pylist()


def lost(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that say that an actor was lost."""
    return [row for row in rows if row["operation"] == "lost"]


def seconds_to_rebuild(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Of every time that an actor was built again."""
    return [
        (row["end"] - row["start"]).total_seconds() for row in rows if row["operation"] == "rebuild"
    ]
