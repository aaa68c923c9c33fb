"""Which texts have been met, in 16 bytes each: a set of digests that holds no Python objects."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

BYTES = 16
DTYPE = np.dtype(f"S{BYTES}")  # compares as the bytes themselves: a shorter one ends in zeros


def digest(text: str) -> bytes:
    """A text's hash, long enough that no two texts of any data share it."""
    return hashlib.blake2b(text.encode(), digest_size=BYTES).digest()


def digests(texts: Iterable[str]) -> np.ndarray:
    return np.array([digest(text) for text in texts], DTYPE)


class Digests:
    """A set of digests, to which many are added at a time.

    They lie in sorted runs of falling lengths; two of like length become one, so that a digest is
    moved as often as the number of digests can be halved.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(len(run) for run in self._runs)

    @property
    def nbytes(self) -> int:
        return sum(run.nbytes for run in self._runs)

    def add(self, texts: Sequence[str]) -> int | None:
        """Add texts; gives the position of the first that was in the set already, or that stands
        among ``texts`` before, ``None`` when all are new."""
        if not texts:
            return None
        new = digests(texts)
        order = np.argsort(new, kind="stable")
        run = new[order]
        # Of equal ones the first stands first.
        repeated = [order[1:][run[1:] == run[:-1]]]
        for held in self._runs:
            at = np.minimum(np.searchsorted(held, run), len(held) - 1)
            repeated.append(order[held[at] == run])
        found = np.concatenate(repeated)
        while self._runs and len(self._runs[-1]) <= len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")  # two runs, which it finds and merges
        self._runs.append(run)
        return int(found.min()) if len(found) else None


class Smallest:
    """The ``size`` texts with the smallest digests of all that are shown, by their numbers."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._digests = [np.empty(0, DTYPE)]
        self._numbers = [np.empty(0, np.int64)]
        self._waiting = 0

    def add(self, texts: Sequence[str], first: int) -> None:
        """Show the texts numbered from ``first`` on."""
        self._digests.append(digests(texts))
        self._numbers.append(np.arange(first, first + len(texts)))
        self._waiting += len(texts)
        if self._waiting > max(self._size, 1 << 16):
            self._choose()

    def numbers(self) -> np.ndarray:
        """Numbers of those with the smallest digests, ascending."""
        self._choose()
        return np.sort(self._numbers[0])

    def _choose(self) -> None:
        found, numbers = np.concatenate(self._digests), np.concatenate(self._numbers)
        kept = np.lexsort((numbers, found))[: self._size]
        self._digests, self._numbers, self._waiting = [found[kept]], [numbers[kept]], 0
