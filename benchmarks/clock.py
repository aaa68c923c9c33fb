"""What phases of this process take: processor seconds, wall seconds, peak memory.

Imports nothing but Python's own library: both sides of a comparison read it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """Of one phase.

    Attributes:
        cpu: user and system seconds of all threads of the process.
        wall: seconds.
        peak: highest resident memory within it, in bytes, of the whole process.
    """

    cpu: float = 0.0
    wall: float = 0.0
    peak: int = 0


class Clock:
    """Costs of named phases, one after the other; a name that comes again is added to."""

    def __init__(self) -> None:
        self.phases: dict[str, Cost] = {}
        self._name: str | None = None
        self._since = (0.0, 0.0)

    def begin(self, name: str) -> None:
        """End the phase under way, and start this one."""
        self.end()
        # "5" sets the peak back to what is resident now.
        _CLEAR.write_text("5")
        self._name, self._since = name, (_cpu(), time.perf_counter())

    def end(self) -> None:
        """End the phase under way, if there is one."""
        if self._name is None:
            return
        cost = self.phases.setdefault(self._name, Cost())
        cost.cpu += _cpu() - self._since[0]
        cost.wall += time.perf_counter() - self._since[1]
        cost.peak = max(cost.peak, resident("VmHWM"))
        self._name = None

    def write(self, path: Path, held: int, packages: Sequence[str]) -> None:
        """The costs as JSON.

        Args:
            held: bytes in memory before the first phase.
            packages: those whose versions are told.
        """
        said = {
            "phases": {name: asdict(cost) for name, cost in self.phases.items()},
            "held": held,
            "versions": {name: version(name) for name in packages},
        }
        path.write_text(json.dumps(said))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures what is inside."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process that are in memory, now or (``VmHWM``) at most."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _cpu() -> float:
    times = os.times()
    return times.user + times.system
