"""Which microbatches the sums of a stage contain: a bit each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class Seen:
    """A set of microbatches, counted from 0."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def __contains__(self, microbatch: int) -> bool:
        at = microbatch >> 3
        return at < len(self._bits) and bool(self._bits[at] >> (microbatch & 7) & 1)

    def __iter__(self) -> Iterator[int]:
        """Ascending."""
        return (8 * at + k for at, bits in enumerate(self._bits) for k in range(8) if bits >> k & 1)

    def add(self, microbatch: int) -> None:
        """One more."""
        at = microbatch >> 3
        if at >= len(self._bits):
            self._bits.extend(bytes(at + 1 - len(self._bits)))
        self._bits[at] |= 1 << (microbatch & 7)

    def update(self, microbatches: Iterable[int]) -> None:
        """Some more."""
        for microbatch in microbatches:
            self.add(microbatch)
