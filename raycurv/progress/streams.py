"""The standard streams of a job: stdout has its results and nothing else, and progress on a stderr
that cannot be written is not worth the job.

    descriptor   in a job's own process              what is written there
    kept         what stdout was                     results: tables, the last line
    1            the same as 2                       what libraries, C code and children print
    2            stderr; /dev/null once it fails     progress, messages, tracebacks
"""

from __future__ import annotations

import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

# All of C0 and C1 but for tabs and ends of lines.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

# For results: those of a reader who is slower have come in part.
_PATIENCE_SECONDS = 5.0

_own = False
_results: TextIO | None = None
_secrets: list[str] = []


class Forgiving(io.TextIOBase):
    """A text stream that never raises: the first failure to write (a closed pipe, a full disk)
    mutes it.

    Args:
        to: the stream beneath; ``None`` for none, as Python has it where a descriptor was closed.
        files: descriptors that point to /dev/null from that failure on, so that what else is
            written there, at the end of the process say, does not fail either.
    """

    def __init__(self, to: Any, files: Sequence[int] = ()) -> None:
        super().__init__()
        self._to, self._files = to, files
        self._muted = to is None

    def write(self, text: str) -> int:
        """Write a text without the secrets that were given to :func:`hide`."""
        clean = text
        for secret in _secrets:
            clean = clean.replace(secret, "***")
        try:
            self._try(lambda: self._to.write(clean))
        except UnicodeError:
            ascii_only = clean.encode("ascii", "backslashreplace").decode()
            self._try(lambda: self._to.write(ascii_only))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: self._to.flush())

    def isatty(self) -> bool:
        return not self._muted and bool(self._to.isatty())

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        if self._to is None:
            raise io.UnsupportedOperation("fileno")
        return int(self._to.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._to, "encoding", None) or "utf-8"

    @property
    def buffer(self) -> Any:
        """The bytes beneath, for libraries that write these."""
        return self._to.buffer

    def _try(self, write: Callable[[], object]) -> None:
        if self._muted:
            return
        try:
            write()
        except UnicodeError:
            raise
        except BlockingIOError:
            return  # a terminal that is slow: what did not go through is not shown
        except (OSError, ValueError):  # ValueError: the stream was closed
            self._muted = True
            if self._files:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                for file in self._files:
                    os.dup2(nowhere, file)
                os.close(nowhere)


class _Patient(io.FileIO):
    """Waits for whoever reads a pipe or a terminal that does not wait by itself, since somebody has
    set it so; TimeoutError where nobody does."""

    def write(self, data: Any) -> int:
        while (count := super().write(data)) is None:
            if not select.select([], [self], [], _PATIENCE_SECONDS)[1]:
                raise TimeoutError("nobody reads")
        return count


def on_descriptor(file: int, encoding: str) -> TextIO:
    """A stream of text for results, which closes the descriptor with it."""
    patient = io.BufferedWriter(_Patient(file, "w"))
    return io.TextIOWrapper(patient, encoding=encoding, errors="backslashreplace")


def own_process() -> bool:
    """Whether this process is a job and nothing else, which ends with it."""
    return _own


def results() -> TextIO:
    """Where results go: the stdout of a job's process, or of who called it."""
    return sys.stdout if _results is None else _results


def printable(text: str) -> str:
    """A text whose control characters, which a terminal would obey, are shown as escapes: names in
    messages may come from anybody's files."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def hide(secrets: Iterable[str]) -> None:
    """Show ``***`` in place of these texts from now on, in whatever the process writes to its
    standard streams."""
    # The longest first: one may be part of another.
    _secrets[:] = sorted({*_secrets, *secrets}, key=len, reverse=True)


@contextmanager
def kept_for_results() -> Iterator[None]:
    """Keep stdout for :func:`results` as long as this lasts: what anything else prints goes to
    stderr, where a failure to write is forgiven.

    In a process whose stdout is its own this holds for descriptors, too, and until the process
    ends: libraries may have something to say at the end. Standard streams that are closed are
    opened on /dev/null first, or a file opened later would get their numbers. Where a caller has
    put another stream into ``sys.stdout`` only Python's streams are exchanged, and put back.
    """
    global _own, _results
    if sys.stdout is None or sys.stdout is sys.__stdout__:
        _own = True
        _open_missing()
        Forgiving(sys.stdout).flush()
        kept = os.dup(1)
        os.dup2(2, 1)
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        _results = _stream(Forgiving(on_descriptor(kept, encoding), (kept,)))
        sys.stdout = sys.stderr = _stream(Forgiving(sys.stderr, (1, 2)))
        try:
            yield
        finally:
            _results.flush()
        return
    before = sys.stdout, sys.stderr, _results, list(_secrets)
    _results = _stream(Forgiving(sys.stdout))
    sys.stdout = sys.stderr = _stream(Forgiving(sys.stderr))
    try:
        yield
    finally:
        sys.stdout, sys.stderr, _results, _secrets[:] = before


def _stream(forgiving: Forgiving) -> Any:
    """For type checkers, to whom ``sys.stdout`` is more than text that can be written."""
    return forgiving


def _open_missing() -> None:
    """Open the standard streams that are closed, on /dev/null."""
    for file in range(3):
        try:
            os.fstat(file)
        except OSError:
            # The lowest number that is free, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(  # noqa: SIM115
            2, "w", errors="backslashreplace", buffering=1, closefd=False
        )
