"""Memory that a stage held and its process no longer needs goes back to the system."""

from __future__ import annotations

import ctypes
import gc

# From malloc.h. A fixed threshold also keeps glibc from raising its own, to 32 MiB in the end.
_M_MMAP_THRESHOLD = -3
# Bytes from which a tensor goes back at once: where stages come and go, and where they stay (there
# a small model's passes take half as long again with the former: pages are made anew each time).
SWEPT, RESIDENT = 1 << 20, 1 << 24


def give_back_at_once(size: int = SWEPT) -> None:
    """Let every tensor of so many bytes or more go back to the system when it is freed.

    glibc would keep those below 32 MiB on its heap, in pieces that fit nothing: half as much again
    as what is alive. Where there is no glibc nothing happens.
    """
    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, size)
    except (AttributeError, OSError):
        return


def give_back(collect: bool = True) -> None:
    """Collect garbage, and hand free memory of the C heap back to the system.

    glibc keeps what was freed for itself: a process that loads one stage after the other would hold
    the largest of each size that it ever needed. Where there is no glibc this collects garbage.

    Args:
        collect: whether there may be garbage: to look takes 0.2 s, for the imports' objects alone.
    """
    if collect:
        gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return
    trim(0)
