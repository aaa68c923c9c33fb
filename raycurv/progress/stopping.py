"""Stopping on request: SIGTERM (`ray job stop`), SIGINT (Ctrl-C) or SIGHUP (its terminal goes away)
ends a job at the next point worth keeping.

A pass commits what it has done and stops there; everywhere else results are whole files already,
and the job stops at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# How long a call that Python cannot interrupt (a decomposition in this process) is waited for:
# `ray job stop` kills after three seconds.
_SECONDS = 1.5

_asked = 0
_deferred = 0
_seen = threading.Event()


class Stopped(KeyboardInterrupt):
    """The job was asked to stop; the same command goes on. Not an error, which might be caught.

    A ``KeyboardInterrupt``, since no other exception of a signal's gets out of a wait of Ray's;
    what arrives from there is a plain one.
    """


def heard() -> list[signal.Signals]:
    """Signals that a job answers: all that ask it to stop, but for a SIGHUP that is ignored, as
    nohup has it."""
    return [
        number
        for number in _SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    ]


@contextmanager
def listening(at_once: Callable[[int], None] | None = None) -> Iterator[None]:
    """Take signals (see :func:`heard`) for a request to stop, as long as this lasts (in the main
    thread).

    Args:
        at_once: ends the process with that exit code, from another thread: for when the main one is
            within a call that it cannot leave, and nothing is under way that is worth a commit.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked = 0
    _seen.clear()
    before = [(number, signal.signal(number, _on_signal)) for number in heard()]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading, at_once), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        os.close(writing)
        for number, handler in before:
            signal.signal(number, handler)
        _asked = 0


@contextmanager
def deferred() -> Iterator[None]:
    """Only note a request as long as this lasts: who runs it looks at :func:`asked` at moments that
    suit it, and is stopped at the end of this at the latest."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1
    stop_unless_deferred()


def asked() -> bool:
    """Whether the job was asked to stop, deferred or not."""
    return bool(_asked)


def exit_code() -> int:
    """The exit code of a job that was stopped: 128 and the signal's number, as shells have it."""
    return 128 + (_asked or signal.SIGINT)


def stop_if_asked() -> None:
    """Raise Stopped here, if that was asked for."""
    if _asked:
        raise Stopped


def stop_unless_deferred() -> None:
    """Raise Stopped here if that was asked for and is not deferred: Python may have ignored the
    exception of the signal, if it came in a destructor, say."""
    if not _deferred:
        stop_if_asked()


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _asked
    again = bool(_asked)
    _asked = _asked or number
    _seen.set()
    if again or not _deferred:
        # Asked twice, or with nothing under way that is worth a commit.
        raise Stopped


def _watch(reading: int, at_once: Callable[[int], None] | None) -> None:
    """Wait for signals beside the main thread, until the other end of the pipe is closed."""
    answered = heard()
    with os.fdopen(reading, "rb", buffering=0) as arriving:
        while found := arriving.read(1):
            if found[0] not in answered or _deferred or at_once is None:
                continue
            if not _seen.wait(_SECONDS) and not _deferred:
                at_once(128 + found[0])
