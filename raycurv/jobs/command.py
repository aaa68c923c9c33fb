"""Command lines made from the settings' dataclasses, and the exit codes of a job."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import tyro

from raycurv.data.uri import hidden, secrets_in
from raycurv.driver.settings import declarations, flag_of
from raycurv.errors import UserError
from raycurv.files.store import Store, open_store
from raycurv.jobs.last_line import AGAIN, LastLine, parts
from raycurv.progress import stopping
from raycurv.progress.reporter import Reporter
from raycurv.progress.streams import hide, printable, results

Settings = TypeVar("Settings")

# What a terminal needs and a reader of JSON does not: colours, and the lines of boxes.
_DECORATION = re.compile(r"\x1b\[[0-9;]*m|[\u2500-\u257f]")
# What looks like credentials and has no scheme before it.
_KEYS = re.compile(r"[^\s/@]*:[^\s@]*@")
# Names of what has a value that is nobody's to see.
_VARIABLE = re.compile(r"-{0,2}\w[\w-]*")
_SECRET = re.compile("token|secret|passw|credential|signature|(api|access)[-_]?key", re.IGNORECASE)


def run_job(
    settings: type[Settings],
    job: Callable[..., Any],
    line: LastLine,
    arguments: Sequence[str] | None,
    program: str,
    leaves: bool = True,
) -> None:
    """Read the command line, run the job, and exit.

    Exit code 0 when done, 2 for a user's mistake (one message, no traceback), 1 for anything else,
    143, 130 and 129 for a job that stopped because of a SIGTERM, SIGINT or SIGHUP. The last line of
    the output is JSON in every case: status, where the results lie or what was found, seconds of
    each phase; of a failure its parts as well.

    Args:
        settings: a dataclass, whose fields are the flags.
        job: takes the settings and ``reporter``; gives the store of its results, what it found, or
            both as a pair.
        line: the last one of the output.
        arguments: the flags; the process' own if ``None``.
        program: what the command is called in ``--help``.
        leaves: whether the job leaves results in ``--out``.

    Raises:
        SystemExit: with exit code 1 or 2; a job that stopped ends its process.
    """
    # Arrow's own allocator keeps tens of MB for itself, which all else could use.
    pa.set_memory_pool(pa.system_memory_pool())

    def at_once(code: int) -> None:
        line.stopped()
        os._exit(code)

    with stopping.listening(at_once):
        code = _run(lambda: _read(settings, arguments, program), job, line, leaves)
    if code:
        raise SystemExit(code)


def _run(read: Callable[[], Any], job: Callable[..., Any], line: LastLine, leaves: bool) -> int:
    """Run the job, and say its last line; gives its exit code."""
    try:
        chosen = read()
        line.log = getattr(chosen, "log", "text")
        reporter = Reporter(log=line.log)
        line.seconds = reporter.seconds
        line.out = _root(chosen.out) if leaves else None
        found = job(chosen, reporter=reporter)
        store, found = _store_and_found(found)
        if store is not None:
            line.out = store.root
        line.say({"status": "complete"} | found)
        return 0
    except KeyboardInterrupt:
        code = stopping.exit_code()
        line.complain("stopped", f"stopped. {AGAIN}")
        line.stopped()
        # Nothing is left to do, and who asked may not wait until Python has tidied up.
        os._exit(code)
    except _Unreadable as error:
        line.say(parts(error))
        return 2
    except SystemExit as end:
        if not end.code and isinstance(end, _Helped):
            raise
        return line.failed(end)
    except BaseException as error:
        return line.failed(error)


def _store_and_found(given: Any) -> tuple[Store | None, dict[str, Any]]:
    """What a job gives, as the pair that it may be."""
    if isinstance(given, Store):
        return given, {}
    return given if isinstance(given, tuple) else (None, given)


class _Unreadable(UserError):
    """A command line that cannot be read; a person has been told."""


class _Helped(SystemExit):
    """The help was asked for, and has been printed."""


def _read(settings: type[Settings], arguments: Sequence[str] | None, program: str) -> Settings:
    """The settings that the flags give.

    The parser, which shows what it does not understand, sees no credentials: a text takes their
    place until it is done.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    hide(secret for argument in given for secret in secrets_in(argument))
    hide(_foreign_secrets(settings, given))
    places: dict[str, str] = {}
    masked = [_masked(argument, places, given) for argument in given]
    heard = _Heard(sys.stderr)
    with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(results()):
        try:
            chosen = tyro.cli(
                settings,
                prog=program,
                args=masked,
                description=settings.__doc__,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
        except SystemExit as end:
            if not end.code:
                raise _Helped(0) from None
            chosen = None
    if chosen is None:
        text = " ".join(_DECORATION.sub(" ", heard.getvalue()).split())
        raise _Unreadable(
            "the command line", "flags as --help has them", text, f"See {program} --help."
        )
    _check_once(settings, masked)
    named: dict[str, Any] = {name: getattr(chosen, name) for name, _, _ in declarations(settings)}
    return settings(**{name: _unmasked(value, places) for name, value in named.items()})


def _foreign_secrets(settings: type, given: Sequence[str]) -> Iterator[str]:
    """Values of what is called a secret and is no flag, such as ``--token VALUE`` or
    ``SECRET_KEY=VALUE``."""
    flags = {flag_of(name) for name, _, _ in declarations(settings)}
    for word, following in zip(given, [*given, ""][1:], strict=True):
        name, mark, value = word.partition("=")
        # A value of a flag that is one may speak of tokens, too: a glob of modules, say.
        named = _VARIABLE.fullmatch(name) if mark else word.startswith("-")
        found = value if mark else following
        foreign = name.replace("_", "-") not in flags
        if named and foreign and _SECRET.search(name) and not found.startswith("-"):
            yield from [found] if len(found) > 2 else []


def _masked(argument: str, places: dict[str, str], given: Sequence[str]) -> str:
    """An argument without its credentials, and without what a terminal would obey; what it was is
    kept in ``places``."""
    flag, mark, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    shown = printable(_KEYS.sub("***@", hidden(value)))
    if shown == value:
        return argument
    # Another argument may be the same but for its credentials.
    while shown in places or any(shown in other for other in given):
        shown += "*"
    places[shown] = value
    return f"{flag}{mark}{shown}"


def _unmasked(value: Any, places: dict[str, str]) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_unmasked(one, places) for one in value)
    return places.get(value, value) if isinstance(value, str) else value


def _check_once(settings: type, given: Sequence[str]) -> None:
    """Refuse a flag that is given twice and takes one value: one of them would not count.

    Raises:
        UserError: names the flag.
    """
    repeatable = {
        f"--{name.replace('_', '-')}"
        for name, _, marks in declarations(settings)
        if tyro.conf.UseAppendAction in marks
    }
    flags = Counter(
        word.partition("=")[0].replace("_", "-") for word in given if word.startswith("--")
    )
    twice = [flag for flag, count in flags.items() if count > 1 and flag not in repeatable]
    if twice:
        raise UserError(
            twice[0], "one value", f"it is given {flags[twice[0]]} times", "Leave all but one out."
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
