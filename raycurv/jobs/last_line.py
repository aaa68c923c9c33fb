"""The last line of a job's output: JSON, said once, whatever befalls."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal, NoReturn

from raycurv.data.uri import hidden
from raycurv.errors import RaycurvError, UserError
from raycurv.progress.stopping import heard
from raycurv.progress.streams import printable, results

AGAIN = "What was done is kept: the same command goes on from there."


@dataclass
class LastLine:
    """The last line of a job, said once.

    Attributes:
        name: of the job.
        out: the run directory, once it is known.
        seconds: of each phase; the reporter of the job fills them in.
        log: how the job speaks to whoever looks on.
    """

    name: str
    out: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    log: Literal["text", "json"] = "text"
    _once: threading.Lock = field(default_factory=threading.Lock)

    @property
    def said(self) -> bool:
        """Whether it has been said, or is being said."""
        return self._once.locked()

    def say(self, more: Mapping[str, Any]) -> None:
        """Print the line: whatever else there is to print must have been.

        Args:
            more: the status, and what else is to be known.
        """
        if not self._once.acquire(blocking=False):
            return
        where = {} if self.out is None else {"out": self.out}
        phases = {phase: round(s, 3) for phase, s in self.seconds.items()}
        line = {"status": "failed", "job": self.name, **where, "phases": phases, **more}
        try:
            text = json.dumps(_plain(line), default=str)
        except Exception:  # out of memory, or a value that cannot be shown
            text = json.dumps({"status": line["status"], "job": self.name})
        print(text, file=results(), flush=True)

    def complain(self, event: str, message: str) -> None:
        """Tell a person, or whoever reads the log, why the job does not go on."""
        text = printable(f"{self.name}: {message}")
        if self.log == "json":
            from raycurv.progress.displays import Event, json_line

            text = json_line(Event(message, event, "error", {"job": self.name}))
        print(text, file=sys.stderr, flush=True)

    def stopped(self, message: str = AGAIN) -> None:
        """Say that the job was stopped on request."""
        self.say({"status": "stopped", "message": message})

    def failed(self, error: BaseException) -> int:
        """Tell a person of a failure, and say the line; a mistake in one message, what is not
        raycurv's own with its traceback. Gives the exit code."""
        if isinstance(error, RaycurvError):
            self.complain("failed", hidden(error))
        else:
            lines = traceback.format_exception(type(error), error, error.__traceback__)
            print(printable(hidden("".join(lines))), end="", file=sys.stderr, flush=True)
        self.say(parts(error))
        return error.exit_code if isinstance(error, RaycurvError) else 1

    def refuse(self, error: UserError) -> NoReturn:
        """End as a job ends that a mistake keeps from beginning: one message, the line, code 2."""
        raise SystemExit(self.failed(error))


def parts(error: BaseException) -> dict[str, Any]:
    """A failure for machines, without credentials; of one that is not raycurv's own, where it
    happened."""
    if isinstance(error, RaycurvError):
        texts = (error.where, error.expected, error.got, error.remedy)
        message = str(error)
    else:
        frames = traceback.extract_tb(error.__traceback__)
        last = f"{frames[-1].filename}:{frames[-1].lineno}, {frames[-1].name}" if frames else ""
        message = _text(error)
        texts = (last, "no error", message, "")
    named = zip(("where", "expected", "got", "remedy"), map(hidden, texts), strict=True)
    kind = UserError.__name__ if isinstance(error, UserError) else type(error).__name__
    return {"status": "failed", "error": {"kind": kind, **dict(named)}, "message": hidden(message)}


@contextmanager
def loading(line: LastLine) -> Iterator[None]:
    """End at once when asked to stop, as long as nobody else listens: while libraries load, which
    takes seconds, and again when all is said."""

    def end(number: int, frame: FrameType | None) -> None:
        if line.said:
            return  # the process is about to end by itself, with the job's own exit code
        line.stopped("Nothing was begun.")
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(number, signal.signal(number, end)) for number in heard()]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _text(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"code that the job ran asked the process to exit, with {error.code!r}"
    try:
        return str(error)
    except Exception:
        return "an error that cannot be shown"


def _plain(value: Any) -> Any:
    """A value with ``null`` for numbers that JSON has not: NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
