"""Memory that a stage held and its process no longer needs goes back to the system."""

from __future__ import annotations

import ctypes
import gc

# From malloc.h: from which size an allocation has a mapping of its own, and how much may be free at
# the heap's end. Fixed ones also keep glibc from raising its own, to 32 and 64 MiB in the end.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Bytes from which a tensor goes back at once: where stages come and go, and where they stay (there
# a small model's passes take half as long again with the former: pages are made anew each time).
SWEPT, RESIDENT = 1 << 20, 1 << 24


def give_back_at_once(size: int = SWEPT) -> None:
    """Let every tensor of so many bytes or more go back to the system when it is freed.

    glibc would keep those below 32 MiB on its heap, in pieces that fit nothing: half as much again
    as what is alive. So many may stay free at the heap's end, or whether pages are made anew for
    every tensor would depend on what happens to lie behind it. Where there is no glibc nothing
    happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_THRESHOLD, size)
    mallopt(_M_TRIM_THRESHOLD, size)


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
