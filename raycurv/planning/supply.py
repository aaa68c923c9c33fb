"""What this machine has left: memory under its limits, disk, and what this process takes itself."""

from __future__ import annotations

import os
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
# Control groups of version 2, then 1: limit, use, and the key of the use that is cache.
_GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


@dataclass(frozen=True)
class Supply:
    """What a node can give.

    Attributes:
        memory: bytes of memory, this process's own counted in.
        disk: free bytes where results go; ``None`` where that cannot be told (an object store).
        gpu: bytes of a GPU's memory, if stages compute there.
        process: bytes that one process may take, if there is such a limit.
        limit: which limit the memory is of.
        spool: free bytes where spools go, if that is another disk.
    """

    memory: int
    disk: int | None
    gpu: int | None = None
    process: int | None = None
    limit: str = "memory of a node"
    spool: int | None = None


def supply_here(directory: Path | None) -> Supply:
    """Of this machine, now."""
    memory, limit = memory_here()
    disk = None if directory is None else free_disk(directory)
    return Supply(memory, disk, None, process_here(), limit)


def memory_here(root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> tuple[int, str]:
    """Bytes that a job may take on this machine, this process's own included; and which limit."""
    own = resident(proc)
    limits = [(_available(proc) + own, "free memory of this machine")]
    for limit, use, stat, key in _GROUPS:
        most, used = _number(root / limit), _number(root / use)
        if most is not None and used is not None:
            free = most - used + (_entry(root / stat, key) or 0)
            limits.append((max(0, free) + own, "memory limit of this control group"))
    return min(limits)


def cores_here(root: Path = Path("/sys/fs/cgroup")) -> tuple[int, float | None]:
    """Cores that this process may run on; and how many of them its control group gives it time of,
    if that is limited."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            return cores or 1, None
    limited = quota.strip().isdecimal()
    return cores or 1, int(quota) / int(period) if limited else None


def process_here(proc: Path = Path("/proc")) -> int | None:
    """Resident bytes that this process may come to under ``RLIMIT_DATA``, if that is set.

    The limit counts what is reserved: what this process has reserved beyond what it uses is lost.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY:
        return None
    reserved = 1024 * (_entry(proc / "self/status", "VmData:") or 0)
    return max(0, soft - max(0, reserved - resident(proc)))


def resident(proc: Path = Path("/proc")) -> int:
    """Anonymous resident bytes of this process."""
    try:
        fields = (proc / "self/statm").read_text().split()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (int(fields[1]) - int(fields[2])) * _PAGE


def free_disk(directory: Path) -> int:
    """Free bytes of the file system that a directory is on or will be."""
    return shutil.disk_usage(existing_parent(directory)).free


def existing_parent(directory: Path) -> Path:
    """The directory, or the nearest above it that is there."""
    while not directory.exists():
        directory = directory.parent
    return directory


def _available(proc: Path) -> int:
    found = _entry(proc / "meminfo", "MemAvailable:")
    return os.sysconf("SC_PHYS_PAGES") * _PAGE if found is None else found * 1024


def _entry(path: Path, key: str) -> int | None:
    try:
        for line in path.read_text().splitlines():
            words = line.split()
            if words and words[0] == key:
                return int(words[1])
    except OSError:
        pass
    return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        # No such control group, or "max".
        return None
