"""Command lines made from the settings' dataclasses, the exit codes of a job, and its last line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import pyarrow as pa
import tyro

from raycurv.errors import RaycurvError, UserError
from raycurv.files.store import Store, open_store
from raycurv.progress import stopping
from raycurv.progress.displays import Event, json_line
from raycurv.progress.reporter import Log, Reporter

Settings = TypeVar("Settings")

_AGAIN = "What was done is kept: the same command goes on from there."
# What a terminal needs and a reader of JSON does not: colours, and the lines of boxes.
_DECORATION = re.compile(r"\x1b\[[0-9;]*m|[\u2500-\u257f]")


def run_job(
    settings: type[Settings],
    job: Callable[..., Any],
    name: str,
    arguments: Sequence[str] | None = None,
    program: str = "",
    leaves: bool = True,
) -> None:
    """Read the command line, run the job, and exit.

    Exit code 0 when done, 2 for a user's mistake (one message, no traceback), 1 for anything else,
    143 and 130 for a job that stopped because of a SIGTERM or SIGINT. The last line of the output
    is JSON in every case: status, where the results lie or what was found, seconds of each phase;
    of a failure its parts as well.

    Args:
        settings: a dataclass, whose fields are the flags.
        job: takes the settings and ``reporter``; gives the store of its results, what it found, or
            both as a pair.
        name: of the job.
        arguments: the flags; by default the process' own.
        program: what the command is called in ``--help``; by default ``name``.
        leaves: whether the job leaves results in ``--out``.

    Raises:
        SystemExit: with exit code 1 or 2; a job that stopped ends its process.
    """
    # Arrow's own allocator keeps tens of MB for itself, which all else could use.
    pa.set_memory_pool(pa.system_memory_pool())
    ending = _Ending(name)
    with stopping.listening(ending.at_once):
        code, more = _run(lambda: _read(settings, arguments, program or name), job, ending, leaves)
        ending.say(more)
        if more["status"] == "stopped":
            # Nothing is left to do, and who asked may not wait until Python has tidied up.
            os._exit(code)
    if code:
        raise SystemExit(code)


@dataclass
class _Ending:
    """The last line of a job, said once.

    Attributes:
        name: of the job.
        reporter: knows the phases.
        log: how the job speaks to whoever looks on.
        out: the run directory, once it is known.
    """

    name: str
    reporter: Reporter = field(default_factory=Reporter)
    out: str | None = None
    log: Log = "text"
    _once: threading.Lock = field(default_factory=threading.Lock)

    def say(self, more: Mapping[str, Any]) -> None:
        """Print the line: whatever else there is to print must have been."""
        if not self._once.acquire(blocking=False):
            return
        where = {} if self.out is None else {"out": self.out}
        phases = {phase: round(s, 3) for phase, s in self.reporter.seconds.items()}
        said = {"status": "failed", "job": self.name, **where, "phases": phases, **more}
        sys.stderr.flush()
        print(json.dumps(said), flush=True)

    def complain(self, event: str, message: str) -> None:
        """Tell a person, or whoever reads the log, why the job does not go on."""
        if self.log == "json":
            text = json_line(Event(message, event, "error", {"job": self.name}))
        else:
            text = f"{self.name}: {message}"
        print(text, file=sys.stderr)

    def at_once(self, code: int) -> None:
        """End the process in the midst of what it does."""
        self.say(_stopped())
        os._exit(code)


def refuse(name: str, error: UserError) -> NoReturn:
    """End as a job ends that a mistake keeps from beginning: one message, the last line, code 2.

    Args:
        name: of the job, or of the command that runs none.
        error: the mistake.
    """
    ending = _Ending(name)
    ending.complain("failed", str(error))
    ending.say(_parts(error))
    raise SystemExit(2)


def _run(
    read: Callable[[], Any], job: Callable[..., Any], ending: _Ending, leaves: bool
) -> tuple[int, dict[str, Any]]:
    """Run the job; gives its exit code, and what the last line says of it."""
    try:
        chosen = read()
        ending.log = getattr(chosen, "log", "text")
        ending.reporter = Reporter(log=ending.log)
        ending.out = _root(chosen.out) if leaves else None
        found = job(chosen, reporter=ending.reporter)
        store, found = _store_and_found(found)
        if store is not None:
            ending.out = store.root
        return 0, {"status": "complete"} | found
    except KeyboardInterrupt:
        code = stopping.exit_code()
        ending.complain("stopped", f"stopped. {_AGAIN}")
        return code, _stopped()
    except _Unreadable as error:
        return 2, _parts(error)
    except RaycurvError as error:
        ending.complain("failed", str(error))
        return (2 if isinstance(error, UserError) else 1), _parts(error)
    except Exception as error:
        traceback.print_exc()
        return 1, _parts(error)


def _store_and_found(given: Any) -> tuple[Store | None, dict[str, Any]]:
    """What a job gives, as the pair that it may be."""
    if isinstance(given, Store):
        return given, {}
    return given if isinstance(given, tuple) else (None, given)


class _Unreadable(UserError):
    """A command line that cannot be read; a person has been told."""


def _read(settings: type[Settings], arguments: Sequence[str] | None, program: str) -> Settings:
    heard = _Heard(sys.stderr)
    with contextlib.redirect_stderr(heard):
        try:
            return tyro.cli(
                settings,
                prog=program,
                args=arguments,
                description=settings.__doc__,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
        except SystemExit as end:
            if not end.code:
                raise
    text = " ".join(_DECORATION.sub(" ", heard.getvalue()).split())
    raise _Unreadable(
        "the command line", "flags as --help has them", text, f"See {program} --help."
    )


class _Heard(io.StringIO):
    """Hands on what is written, and keeps it."""

    def __init__(self, to: Any) -> None:
        super().__init__()
        self._to = to

    def write(self, text: str) -> int:
        self._to.write(text)
        return super().write(text)

    def flush(self) -> None:
        self._to.flush()

    def isatty(self) -> bool:
        return bool(self._to.isatty())

    def fileno(self) -> int:
        return int(self._to.fileno())


def _root(out: str) -> str | None:
    """The run directory that a setting names; ``None`` if it names none."""
    try:
        return open_store(out, "--out").root
    except UserError:
        return None


def _stopped() -> dict[str, Any]:
    return {"status": "stopped", "message": _AGAIN}


def _parts(error: Exception) -> dict[str, Any]:
    """A failure for machines; of one that is not raycurv's own, where it happened."""
    kind = UserError.__name__ if isinstance(error, _Unreadable) else type(error).__name__
    if isinstance(error, RaycurvError):
        said = (error.where, error.expected, error.got, error.remedy)
    else:
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = (f"{last.filename}:{last.lineno}, {last.name}", "no error", str(error), "")
    parts = dict(zip(("where", "expected", "got", "remedy"), said, strict=True))
    return {"status": "failed", "error": {"kind": kind} | parts, "message": str(error)}
