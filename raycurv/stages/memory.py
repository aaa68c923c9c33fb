"""Memory that a stage held and its process no longer needs goes back to the system."""

from __future__ import annotations

import ctypes
import gc


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
