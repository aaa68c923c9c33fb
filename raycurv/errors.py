"""Errors that a person can act on: where, what was expected, what arrived, what to do next."""

from __future__ import annotations

import re
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar


class RaycurvError(Exception):
    """Base of every error that raycurv raises on purpose.

    All four parts are positional arguments of ``Exception``, so that the error survives pickling
    on its way from an actor to the driver.

    Args:
        where: the block, stage, file or flag at fault.
        expected: what should have been there.
        got: what was there.
        remedy: what to do next, as a full sentence.

    Attributes:
        exit_code: of a job that ends by it: 2 where what it was given is at fault, 1 otherwise.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, where: str, expected: str, got: str, remedy: str = "") -> None:
        super().__init__(where, expected, got, remedy)
        self.where, self.expected, self.got, self.remedy = where, expected, got, remedy

    def __str__(self) -> str:
        message = f"{self.where}: expected {self.expected}, got {self.got}."
        return f"{message} {self.remedy}".rstrip()


class UserError(RaycurvError, ValueError):
    """A mistake in what the caller gave (flags, files, data, model)."""

    exit_code = 2


def shortened(text: str, most: int = 100) -> str:
    """A text of somebody else's, short enough for a message."""
    return text if len(text) <= most else f"{text[:most]}…"


def some_of(names: Sequence[str], most: int, form: Callable[[str], str] = str) -> str:
    """The first of some names, each as ``form`` writes it, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(form, names[:most])) + more


def counted(count: int, noun: str) -> str:
    """``1 file``, ``1,200 files``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def in_words(error: Exception) -> str:
    """What a library says of an error, as a part of a sentence: its kind where it says nothing, and
    the head of a long text, of whole words (part of one might be of a secret)."""
    text = textwrap.shorten(str(error), 400, placeholder=" …").rstrip(". ")
    return text or type(error).__name__


@contextmanager
def user_errors(
    where: str, expected: str, remedy: str, *kinds: type[Exception], got: str = "{kind}: {error}"
) -> Iterator[None]:
    """What libraries raise in the body becomes a :class:`UserError`; what is one stays as it is, as
    does what says that there is no memory.

    Args:
        kinds: of exceptions that a mistake of the caller's explains.
        got: how the error is worded, with the exception's ``kind`` and its text, ``error``.
    """
    try:
        yield
    except RaycurvError:
        raise
    except kinds as error:
        if says_no_memory(error):
            raise
        text = got.format(kind=type(error).__name__, error=in_words(error))
        raise UserError(where, expected, text, remedy) from error


@contextmanager
def users_code(where: str, expected: str, remedy: str) -> Iterator[None]:
    """What a network or an objective of the user's raises in the body becomes a UserError.

    It has the exception's own words, and the line of the user's code where it came from. A body
    that runs out of memory, or into raycurv's own code and fails there, raises what it raised.
    """
    try:
        yield
    except RaycurvError:
        raise
    except Exception as error:
        line = _line_of(error)
        if says_no_memory(error) or line is None:
            raise
        raise UserError(
            where, expected, f"{type(error).__name__}: {error}{line}".rstrip("."), remedy
        ) from error


def says_no_memory(error: Exception) -> bool:
    """Whether an exception says that there is no memory, of a GPU or of the CPU."""
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


_PACKAGE = str(Path(__file__).parent)
# torch's words for memory that is not there, of a GPU or of the CPU.
_NO_MEMORY = re.compile("out of memory|allocate memory")
# Stand for functions of torch's, and so raise what those would of the user's tensors.
_FOR_TORCH = ("frozen_linear.py", "products.py")


def _line_of(error: Exception) -> str | None:
    """Where in the user's code an exception came from: ` (FILE, line N)`, or an empty string where
    it called nothing but torch; ``None`` if it is of raycurv's own code, which the user's called.
    """
    # The first frame is that of `users_code`, the second its body.
    for frame in reversed(traceback.extract_tb(error.__traceback__)[2:]):
        path = Path(frame.filename)
        if "torch" in path.parts or path.name in _FOR_TORCH:
            continue
        if path.is_relative_to(_PACKAGE):
            return None
        return f" ({path.name}, line {frame.lineno})"
    return ""


class NumericalError(RaycurvError):
    """A computation whose result cannot be trusted (not finite, or a failed decomposition)."""

    exit_code = 2


def not_finite(where: str, what: str, got: str = "NaN or infinity") -> NumericalError:
    """The error of a result that is no number, or too large for its dtype."""
    return NumericalError(
        where,
        f"finite numbers in {what}",
        got,
        "Give --dtype float64 (for scores, IHVPs and pruning also a --damping nearer to the "
        "eigenvalues), or leave out the examples of extreme values.",
    )


class DiskError(RaycurvError):
    """A file that the system would not read or write; what was finished before is whole."""


class NoSpace(DiskError):
    """A disk had no room for a file."""


class DamagedFile(RaycurvError):
    """A result file whose content does not match its own checksum or length."""

    exit_code = 2


class LostPeer(RaycurvError):
    """The process at the other end of a link is gone or silent: what was under way is lost.

    Args:
        rank: of that process in its chain.
        operation: what was being done when it was missed.
        got: how it was missed.
    """

    def __init__(self, rank: int, operation: str, got: str) -> None:
        super().__init__(
            f"{operation}, rank {rank}",
            "an answer",
            got,
            "Run the same command again: it goes on from the last commit.",
        )
        self.rank, self.operation = rank, operation

    def __reduce__(self) -> tuple[type[LostPeer], tuple[int, str, str]]:
        return type(self), (self.rank, self.operation, self.got)


class OutOfOrder(RaycurvError):
    """A tensor was asked for before one that was sent earlier, twice, or of another chain."""


class LostLock(RaycurvError):
    """Another job took a directory over while this one did not give a sign of life."""
