"""The k smallest of numbers that are never together: those of one block, or of all blocks.

Float32 numbers have an order-preserving integer. A histogram of its upper 16 bits finds the run of
numbers that the k-th lies in, one of the lower 16 bits within that run finds the k-th itself.
Histograms add up over blocks, in any order, so the threshold is exact however the numbers are
divided, at two passes over them and 512 KiB a histogram. Numbers that equal the threshold go in
the order of the blocks, and of their places within a block, until k are gone.

A job over many blocks:

    upper = Σ histogram(saliency_b, candidates_b)
    prefix = find_prefix(upper, k)
    lower = Σ histogram(saliency_b, candidates_b, prefix)
    threshold = find_threshold(lower, prefix)
    shares = share_ties(threshold, [count_ties(saliency_b, candidates_b, threshold) for all b])
    smallest_b = below(saliency_b, candidates_b, threshold, shares[b])
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raycurv.errors import NumericalError

BINS = 2**16
# Numbers at once: their integers are as large again.
_CHUNK = 2**22


@dataclass(frozen=True)
class Prefix:
    """Where the k-th smallest number lies.

    Attributes:
        bin: upper 16 bits of its integer.
        rank: its place, from 1, among the numbers of that bin; 0 if k is 0.
    """

    bin: int
    rank: int


@dataclass(frozen=True)
class Threshold:
    """The k-th smallest number.

    Attributes:
        key: its integer.
        ties: how many of the numbers equal to it are among the k smallest; 0 if k is 0.
    """

    key: int
    ties: int

    @property
    def value(self) -> float:
        """The number itself; -inf if k is 0."""
        if not self.ties:
            return -math.inf
        bits = self.key if self.key >= 0 else self.key ^ 0x7FFFFFFF
        return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def histogram(
    saliency: Tensor, candidates: Tensor | None = None, prefix: Prefix | None = None
) -> Tensor:
    """How many numbers have each value of their integer's upper 16 bits, int64 ``[65536]``.

    Args:
        saliency: float32, of any shape.
        candidates: bool, of that shape: those that count; all by default.
        prefix: to count values of the lower 16 bits instead, of the numbers in this bin.

    Raises:
        NumericalError: a number that counts is NaN.
    """
    total = torch.zeros(BINS, dtype=torch.int64, device=saliency.device)
    for numbers in _chunks(saliency, candidates):
        key = _integers(numbers)
        # The sign bit is the highest: negative numbers come first.
        upper = (key >> 16) + BINS // 2
        found = upper if prefix is None else (key & (BINS - 1))[upper == prefix.bin]
        total += torch.bincount(found, minlength=BINS)
    return total


def find_prefix(histogram: Tensor, count: int) -> Prefix:
    """The bin of the ``count``-th smallest number, from the sum of the upper histograms.

    Raises:
        ValueError: there are fewer numbers.
    """
    return Prefix(*_locate(histogram, count))


def find_threshold(histogram: Tensor, prefix: Prefix) -> Threshold:
    """The number itself, from the sum of the lower histograms of its bin."""
    lower, ties = _locate(histogram, prefix.rank)
    return Threshold(((prefix.bin - BINS // 2) << 16) | lower, ties)


def count_ties(saliency: Tensor, candidates: Tensor | None, threshold: Threshold) -> int:
    """How many numbers of a block equal the threshold."""
    chunks = _chunks(saliency, candidates)
    return sum(int((_integers(numbers) == threshold.key).sum()) for numbers in chunks)


def share_ties(threshold: Threshold, counts: Sequence[int]) -> tuple[int, ...]:
    """How many of the numbers that equal the threshold each block gives, the first blocks first."""
    left, shares = threshold.ties, []
    for count in counts:
        shares.append(min(count, left))
        left -= shares[-1]
    assert left == 0, "a threshold of other numbers"
    return tuple(shares)


def below(saliency: Tensor, candidates: Tensor | None, threshold: Threshold, ties: int) -> Tensor:
    """Which numbers of a block are among the k smallest, bool, of the saliencies' shape.

    Args:
        saliency: float32.
        candidates: bool, of that shape; the others are not among them.
        threshold: over all blocks.
        ties: this block's share of them: the first of its numbers that equal the threshold.
    """
    key = _integers(saliency.reshape(-1))
    # With a count of 0 the threshold is the least number that can be, and so below none.
    found = key < threshold.key
    equal = key == threshold.key
    if candidates is not None:
        found &= candidates.reshape(-1)
        equal &= candidates.reshape(-1)
    found[equal.nonzero()[:ties, 0]] = True
    return found.view(saliency.shape)


def smallest(saliency: Tensor, candidates: Tensor | None, count: int) -> Tensor:
    """Which numbers of one block are its ``count`` smallest, bool; of equal ones the first.

    Raises:
        NumericalError: a number that counts is NaN.
        ValueError: there are fewer candidates.
    """
    prefix = find_prefix(histogram(saliency, candidates), count)
    threshold = find_threshold(histogram(saliency, candidates, prefix), prefix)
    return below(saliency, candidates, threshold, threshold.ties)


def _locate(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the ``rank``-th number, and its rank within the bin."""
    if rank == 0:
        return 0, 0
    upto = histogram.cumsum(0)
    if not 0 < rank <= int(upto[-1]):
        raise ValueError(f"the {rank}-th smallest of {int(upto[-1])} numbers")
    found = int(torch.searchsorted(upto, torch.tensor(rank, device=upto.device)))
    return found, rank - int(upto[found] - histogram[found])


def _chunks(saliency: Tensor, candidates: Tensor | None) -> Iterator[Tensor]:
    """Those that count, some at a time."""
    chosen = None if candidates is None else candidates.reshape(-1).split(_CHUNK)
    for n, numbers in enumerate(saliency.reshape(-1).split(_CHUNK)):
        some = numbers if chosen is None else numbers[chosen[n]]
        if bool(some.isnan().any()):
            raise NumericalError(
                "saliencies",
                "numbers",
                f"{int(some.isnan().sum())} NaN",
                "Look for values that are not finite in the weights and the curvature.",
            )
        yield some


def _integers(numbers: Tensor) -> Tensor:
    """Signed 32-bit integers in the order of float32 numbers; both zeros are one."""
    assert numbers.dtype == torch.float32
    bits = (numbers + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
