"""Errors that a person can act on: where, what was expected, what arrived, what to do next."""

from __future__ import annotations


class RaycurvError(Exception):
    """Base of every error that raycurv raises on purpose.

    All four parts are positional arguments of ``Exception``, so that the error survives pickling
    on its way from an actor to the driver.

    Args:
        where: the block, stage, file or flag at fault.
        expected: what should have been there.
        got: what was there.
        remedy: what to do next, as a full sentence.
    """

    def __init__(self, where: str, expected: str, got: str, remedy: str = "") -> None:
        super().__init__(where, expected, got, remedy)
        self.where, self.expected, self.got, self.remedy = where, expected, got, remedy

    def __str__(self) -> str:
        message = f"{self.where}: expected {self.expected}, got {self.got}."
        return f"{message} {self.remedy}".rstrip()


class UserError(RaycurvError, ValueError):
    """A mistake in what the caller gave (flags, files, data, model): a job exits with code 2."""


class NumericalError(RaycurvError):
    """A computation whose result cannot be trusted (not finite, or a failed decomposition)."""


class NoSpace(RaycurvError):
    """A disk had no room for a file; what was finished before is whole."""


class DamagedFile(RaycurvError):
    """A result file whose content does not match its own checksum or length."""


class LostLock(RaycurvError):
    """Another job took a directory over while this one did not give a sign of life."""
