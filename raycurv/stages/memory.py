"""Memory that a stage held and its process no longer needs goes back to the system."""

from __future__ import annotations

import ctypes
import gc

# From malloc.h. A fixed threshold also keeps glibc from raising its own, to 32 MiB in the end.
_M_MMAP_THRESHOLD, _AT_ONCE = -3, 1 << 20


def give_back_at_once() -> None:
    """Let every tensor of a MiB or more go back to the system when it is freed.

    glibc would keep those below 32 MiB on its heap, in pieces that fit nothing: half as much again
    as what is alive. Costs 2 % of a fit's CPU time. Where there is no glibc nothing happens.
    """
    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _AT_ONCE)
    except (AttributeError, OSError):
        return


def give_back() -> None:
    """Collect garbage, and hand free memory of the C heap back to the system.

    glibc keeps what was freed for itself: a process that loads one stage after the other would hold
    the largest of each size that it ever needed. Where there is no glibc this collects garbage.
    """
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return
    trim(0)
