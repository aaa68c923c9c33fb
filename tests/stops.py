"""Jobs that are stopped on their way, and go on from there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import snapshot
from results import changed

from raycurv.files.store import Store
from raycurv.stages.stage import Stage
from raycurv.steps import decompositions


def kind_of(name: str) -> str:
    """A file's name without its numbers: files of other blocks and microbatches are alike."""
    return re.sub(r"\d+", "#", name)


class Stop(BaseException):
    """What the injector raises, as a process that is killed: nothing in raycurv knows it."""


class StopAt:
    """Counts the calls of a function, and raises at one of them.

    Args:
        at: the number of that one, from 1.
        after: raise when the call is done, and not before it.
        met: kinds of files that a call was for (names without their numbers); a call for another
            one is a place to stop, too, and adds it. ``None`` for no such places.
    """

    def __init__(
        self, inner: Callable[..., Any], at: int, after: bool = False, met: set[str] | None = None
    ) -> None:
        self._inner, self._at, self._after, self._met = inner, at, after, met
        self._calls, self._stopped = 0, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._calls += 1
        due = not self._stopped and (self._is_new(args[1:]) or self._calls == self._at)
        self._stopped |= due
        if due and not self._after:
            raise Stop
        result = self._inner(*args, **kwargs)
        if due:
            raise Stop
        return result

    def _is_new(self, args: tuple[Any, ...]) -> bool:
        if self._met is None or not args or not isinstance(args[0], str):
            return False
        kind = kind_of(args[0])
        new = kind not in self._met
        self._met.add(kind)
        return new


POINTS: dict[str, tuple[Any, str]] = {
    "a write": (Store, "write"),
    "a deletion": (Store, "delete"),
    "a deletion of a directory": (Store, "delete_directory"),
    "a forward": (Stage, "forward"),
    "a backward": (Stage, "backward"),
    "a stage's commit": (Stage, "commit"),
    "a decomposition": (decompositions, "decompose_factors"),
}


def stopped(
    point: str, at: int, after: bool, job: Callable[[], Any], met: set[str] | None = None
) -> bool:
    """Whether the job was stopped at a call of the point, see :class:`StopAt`; if not, it has come
    to its end."""
    owner, name = POINTS[point]
    stop = StopAt(getattr(owner, name), at, after, met)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, lambda *args, **kwargs: stop(*args, **kwargs))
        if point == "a decomposition":
            # One by one, or there are fewer calls than places to stop at.
            patch.setattr(decompositions, "_TASK_FACTORS", 1)
        try:
            job()
        except Stop:
            return True
    return False


FINISHED = ("eigen/", "corrected/", "labels/", "data/", "ihvp/", "gradients/")


def stopped_everywhere(
    point: str, after: bool, job: Callable[[Path], Any], out: Path, step: int = 1
) -> int:
    """Stop a job at its first call of a point, at the next one of where it goes on from there, and
    so on, every time ``step`` calls later, until it ends; and at every kind of file besides. Gives
    how often it was stopped.

    What is finished is never written again.
    """
    stops, met = 0, set[str]()
    before: dict[str, Any] = {}
    while stopped(point, 1 + stops * step, after, lambda: job(out), met):
        stops += 1
        rewritten = changed(before, out) & before.keys()
        # An example's data and what is finished stay; a corpus that was half written does not.
        kept = [name for name in rewritten if name.startswith(FINISHED)]
        assert not kept or "data/corpus.json" not in before, (stops, kept)
        before = snapshot(out)
        assert stops < 200, "it does not come to an end"
    return stops
