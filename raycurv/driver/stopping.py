"""Stopping on request: SIGTERM (`ray job stop`) ends a job at the next point worth keeping.

A pass commits what it has done and stops there; everywhere else results are whole files already,
and the job stops at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = False
_deferred = 0


class Stopped(BaseException):
    """The job was asked to stop; the same command goes on. Not an error, which might be caught."""


@contextmanager
def listening() -> Iterator[None]:
    """Take SIGTERM for a request to stop, as long as this lasts (in the main thread)."""
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked = False
    before = signal.signal(signal.SIGTERM, _on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _asked = False


@contextmanager
def deferred() -> Iterator[None]:
    """Only note a request: whoever runs this looks at :func:`asked`."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1


def asked() -> bool:
    """Whether the job was asked to stop."""
    return _asked


def stop_if_asked() -> None:
    """Stop here, if that was asked for.

    Raises:
        Stopped: it was.
    """
    if _asked:
        raise Stopped


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _asked
    if _asked or not _deferred:
        # Asked twice, or with nothing under way that is worth a commit.
        _asked = True
        raise Stopped
    _asked = True
