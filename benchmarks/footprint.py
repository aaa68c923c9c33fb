"""What a command takes: memory, disk, seconds; of all its processes, Ray's daemons included.

    command ─► its processes, by a mark in their environment ─► peaks and curves ─► one line of JSON

A process belongs to the command when its environment holds the mark, or its parent belongs: so a
daemon counts when its parent is gone, and one that has overwritten its environment (as a process
that sets its title does) counts by its parent. Linux only: everything is read from /proc.

    memory = Σ anonymous resident bytes of the processes + growth of /dev/shm since the start

Growth of /dev/shm counts a page once, however many processes map it, and files that are mapped
though their names are gone, such as Ray's object store. It is the machine's: what other programs
put there in the meantime counts as well. Pages of mapped files (libraries) are left out; they are
in PSS, which divides a page by the number of processes that map it.
"""

from __future__ import annotations

import json
import os
import resource
import select
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro

MARK = "RAYCURV_FOOTPRINT"  # environment variable: the marks of the measurements around a process
SHARED_MEMORY = "/dev/shm"
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")  # a second, in /proc/PID/stat
POINTS = 2000  # of a curve
SHARE = 0.01  # of a core, at most, for each of the three kinds of reading
FIRST_PSS, EVERY_PSS, EVERY_DIRECTORY = 0.5, 5.0, 2.0  # seconds


@dataclass
class Settings:
    """Runs a command (behind `--`) and prints what it took, as JSON on the last line."""

    watch: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Directory whose bytes on disk are followed; repeatable."""
    every: float = 0.2
    """Seconds between two readings of memory."""
    out: Path | None = None
    """JSON file for all of it, with the curves; the printed line goes without them."""


@dataclass
class Curve:
    """``(seconds since the start, bytes)``, at most ``POINTS`` of them.

    When it is full, each pair of neighbours becomes the larger of the two: a peak is never lost.
    """

    points: list[tuple[float, int]] = field(default_factory=list)
    _step: float = 0.0

    def add(self, seconds: float, size: int) -> None:
        """A new reading, later than all others."""
        if self.points and seconds - self.points[-1][0] < self._step:
            self.points[-1] = (self.points[-1][0], max(self.points[-1][1], size))
            return
        if len(self.points) == POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(one[0], max(one[1], two[1])) for one, two in pairs]
            self._step = 2 * seconds / POINTS
        self.points.append((round(seconds, 3), size))

    @property
    def peak(self) -> int:
        """The largest reading; 0 without one."""
        return max((size for _, size in self.points), default=0)


@dataclass(frozen=True)
class Directory:
    """Bytes on disk of a watched directory, holes of sparse files left out."""

    start: int
    peak: int
    end: int
    curve: list[tuple[float, int]]


@dataclass(frozen=True)
class Footprint:
    """What a command took. Bytes are peaks over the readings.

    Attributes:
        command: as given.
        returncode: the command's; negative for the signal that ended it.
        seconds: wall clock, until the command's own end.
        cpu_seconds: user and system, of all its processes.
        memory_bytes: of anonymous and shared memory together, at one moment.
        anonymous_bytes: of anonymous memory alone.
        shared_bytes: of the growth of /dev/shm alone.
        pss_bytes: of proportional set sizes, read seldom (every 5 s); 0 if the command was too
            short for one reading.
        processes: most at one moment.
        left_running: processes of the command that were there after its end.
        directories: by the path as given.
        sampling_seconds: CPU that the readings took, not part of ``cpu_seconds``.
        curve: of memory: seconds since the start, bytes.
    """

    command: tuple[str, ...]
    returncode: int
    seconds: float
    cpu_seconds: float
    memory_bytes: int
    anonymous_bytes: int
    shared_bytes: int
    pss_bytes: int
    processes: int
    left_running: int
    directories: dict[str, Directory]
    sampling_seconds: float
    curve: list[tuple[float, int]]

    def as_json(self, curves: bool = True) -> str:
        """One line."""
        said = asdict(self)
        if not curves:
            del said["curve"]
            for directory in said["directories"].values():
                del directory["curve"]
        return json.dumps(said)

    def summary(self) -> str:
        """For a person."""
        lines = [
            f"{shlex.join(self.command)}: exit code {self.returncode}",
            f"time     {self.seconds:.1f} s, {self.cpu_seconds:.1f} s of CPU",
            f"memory   {_mb(self.memory_bytes)} at most: anonymous {_mb(self.anonymous_bytes)}, "
            f"shared {_mb(self.shared_bytes)}; PSS {_mb(self.pss_bytes)}; "
            f"{self.processes} processes, {self.left_running} left running",
        ]
        lines += [
            f"disk     {_mb(d.peak)} at most, from {_mb(d.start)} to {_mb(d.end)}: {path}"
            for path, d in self.directories.items()
        ]
        return "\n".join(lines)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


Key = tuple[int, int]  # of a process: its number, which may be given again, and its start time


@dataclass
class Process:
    """The last that was seen of a process: CPU ticks of its own and of children it waited for.

    ``parent`` is ``None`` when it does not belong to the command.
    """

    parent: Key | None
    own: int
    waited: int
    alive: bool = True


class Processes:
    """The processes of one mark, now and before."""

    def __init__(self, mark: str) -> None:
        self._mark = mark.encode()
        self._ours: dict[int, Key] = {}  # by number, those that are there
        self._others: set[int] = set()
        self._seen: dict[Key, Process] = {}

    def __len__(self) -> int:
        return len(self._ours)

    def read(self) -> int:
        """Look for new processes, and at all of them; anonymous resident bytes of those there."""
        pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        # A number is free for another process once its own is gone.
        self._others &= pids
        for pid in self._ours.keys() - pids:
            self._forget(pid)
        size = sum(self._look(pid) for pid in list(self._ours))
        # A parent comes before its children, whichever number the children got.
        unknown, found = pids - self._ours.keys() - self._others, True
        while found:
            born = [pid for pid in unknown if self._belongs(pid)]
            unknown, found = unknown.difference(born), bool(born)
            size += sum(self._look(pid) for pid in born)
        self._others |= unknown
        return size

    def pss(self) -> int:
        """Σ of proportional set sizes, in bytes."""
        rollups = (_read(f"/proc/{pid}/smaps_rollup") for pid in self._ours)
        lines = (line for said in rollups for line in said.splitlines())
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(b"Pss:"))

    def cpu_seconds(self, command: int, waited: float) -> float:
        """User and system time of all processes there were.

        What a process waited for is in its own books, unless it had the kernel reap its children;
        what was seen of the children misses their last moments. The larger of the two counts.

        Args:
            command: the command's process id.
            waited: seconds of the command and all it waited for, from its end.
        """
        children = defaultdict(list)
        for key, process in self._seen.items():
            children[process.parent].append(key)

        def total(key: Key) -> float:
            process = self._seen[key]
            gone = sum(total(k) for k in children[key] if not self._seen[k].alive)
            there = sum(total(k) for k in children[key] if self._seen[k].alive)
            known = waited if key[0] == command else 0.0
            return max(known, process.own / TICKS + max(process.waited / TICKS, gone)) + there

        # A command too short to be seen has at least what it was waited for.
        return max(waited, sum(total(key) for key in children[None]))

    def _belongs(self, pid: int) -> bool:
        stat = _stat(pid)
        marked = self._mark in _read(f"/proc/{pid}/environ")
        if not stat or not (marked or int(stat[1]) in self._ours):
            return False
        self._ours[pid] = (pid, int(stat[19]))
        return True

    def _look(self, pid: int) -> int:
        stat, statm = _stat(pid), _read(f"/proc/{pid}/statm").split()
        key = self._ours[pid]
        if not stat or int(stat[19]) != key[1]:
            self._forget(pid)
            return 0
        times = [int(ticks) for ticks in stat[11:15]]
        parent = self._ours.get(int(stat[1]))
        self._seen[key] = Process(parent, times[0] + times[1], times[2] + times[3])
        return (int(statm[1]) - int(statm[2])) * PAGE if statm else 0

    def _forget(self, pid: int) -> None:
        key = self._ours.pop(pid)
        if key in self._seen:
            self._seen[key].alive = False


def _read(path: str) -> bytes:
    """What a file of /proc says; nothing when its process is gone, or another user's."""
    try:
        with open(path, "rb", buffering=0) as file:
            said = b""
            while more := file.read(1 << 16):
                said += more
            return said
    except OSError:
        return b""


def _stat(pid: int) -> list[bytes]:
    """/proc/PID/stat from the third field on (the second, a name, may hold anything)."""
    return _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()


def disk_bytes(directory: str | Path) -> int:
    """Bytes of disk below a directory, a file with several names once; 0 when it is not there."""
    return sum({(s.st_dev, s.st_ino): 512 * s.st_blocks for s in _stats(directory)}.values())


def _stats(directory: str | Path) -> Iterator[os.stat_result]:
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                # What goes away while it is looked at has no size.
                try:
                    yield entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    yield from _stats(entry.path)
    except (FileNotFoundError, NotADirectoryError):
        return


def shared_memory_bytes() -> int:
    """Bytes in use of /dev/shm, whoever uses them; 0 on a machine without it."""
    try:
        said = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return (said.f_blocks - said.f_bfree) * said.f_frsize


@dataclass
class Clock:
    """When a reading is due: every so often, and later when it is costly."""

    every: float
    due: float = 0.0

    def tick(self, now: float, cost: float) -> None:
        """A reading was taken, which cost seconds of CPU."""
        self.due = now + max(self.every, cost / SHARE)


class Readings:
    """The curves of one command: ``read`` takes those that are due."""

    def __init__(self, mark: str, watch: Sequence[str], every: float) -> None:
        self.processes = Processes(mark)
        self.memory, self.anonymous, self.shared, self.pss = Curve(), Curve(), Curve(), Curve()
        self.directories = {path: Curve() for path in watch}
        self.most_processes = 0
        self.cost = 0.0
        self._memory_clock = Clock(every)
        self._pss_clock = Clock(EVERY_PSS, FIRST_PSS)
        self._directory_clock = Clock(EVERY_DIRECTORY)
        self._shared_before = shared_memory_bytes()

    def read(self, now: float, all_due: bool = False) -> float:
        """Take what is due at ``now``; gives the moment at which the next is due."""
        kinds = (
            (self._memory_clock, self._read_memory, all_due),
            (self._pss_clock, self._read_pss, False),
            (self._directory_clock, self._read_directories, all_due),
        )
        for clock, reading, wanted in kinds:
            if wanted or now >= clock.due:
                before = time.thread_time()
                reading(now)
                cost = time.thread_time() - before
                clock.tick(now, cost)
                self.cost += cost
        return min(clock.due for clock, _, _ in kinds)

    def _read_memory(self, now: float) -> None:
        anonymous = self.processes.read()
        shared = max(0, shared_memory_bytes() - self._shared_before)
        self.anonymous.add(now, anonymous)
        self.shared.add(now, shared)
        self.memory.add(now, anonymous + shared)
        self.most_processes = max(self.most_processes, len(self.processes))

    def _read_pss(self, now: float) -> None:
        self.pss.add(now, self.processes.pss())

    def _read_directories(self, now: float) -> None:
        for path, curve in self.directories.items():
            curve.add(now, disk_bytes(path))


def measured(
    file: Path,
    command: Sequence[str],
    watched: Sequence[Path],
    curves: bool = False,
    **env: str,
) -> dict[str, Any]:
    """What a command took, measured now or, where ``file`` is there, before.

    Args:
        file: JSON that it is written to; what the command writes stands beside it, in a ``.log``.
        curves: whether the file has them.
        env: variables beside this process's own environment.

    Raises:
        SystemExit: the command failed.
    """
    if not file.exists():
        log, here = file.with_suffix(".log"), {"PYTHONPATH": str(Path(__file__).parents[1])}
        found = measure(command, watched, dict(os.environ) | here | env, log=log)
        if found.returncode:
            raise SystemExit(f"{file.stem} ended with {found.returncode}: {log}")
        file.write_text(found.as_json(curves))
    said: dict[str, Any] = json.loads(file.read_text())
    return said


def measure(
    command: Sequence[str | Path],
    watch: Sequence[str | Path] = (),
    env: Mapping[str, str] | None = None,
    every: float = 0.2,
    cwd: str | Path | None = None,
    log: str | Path | None = None,
) -> Footprint:
    """Run a command to its end and say what it took. A failed command is measured like any other.

    Args:
        command: program and arguments.
        watch: directories whose bytes on disk are followed; they may come to be later.
        env: the command's environment; this process's own when ``None``.
        every: seconds between two readings of memory.
        cwd: the command's working directory.
        log: file for what the command prints; it prints where this process does when ``None``.

    Raises:
        ValueError: no command, an interval that is not positive, or a machine without /proc.
        OSError: the command cannot be started.
    """
    if not command:
        raise ValueError("footprint: expected a command, got none. Put it behind `--`.")
    if not every > 0:
        raise ValueError(f"every: expected seconds above 0, got {every}. Take 0.2.")
    if not os.path.exists("/proc/self/statm"):
        raise ValueError(
            f"footprint: expected Linux with /proc, got {sys.platform} without it. Measure there."
        )
    mark = uuid.uuid4().hex
    around = dict(os.environ if env is None else env)
    # A measurement around this one keeps its own mark.
    around[MARK] = f"{around.get(MARK, '')} {mark}".strip()
    readings = Readings(mark, [str(path) for path in watch], every)
    start = {path: disk_bytes(path) for path in readings.directories}
    words = tuple(map(str, command))
    output = open(log, "wb") if log is not None else None  # noqa: SIM115
    try:
        began = time.monotonic()
        child = subprocess.Popen(
            words,
            env=around,
            cwd=cwd,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
        )
    finally:
        if output is not None:
            output.close()
    try:
        status, usage = _follow(child.pid, readings, began)
    except BaseException:
        child.terminate()
        child.wait()
        raise
    seconds = time.monotonic() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    readings.read(seconds, all_due=True)
    waited = usage.ru_utime + usage.ru_stime
    return Footprint(
        command=words,
        returncode=child.returncode,
        seconds=round(seconds, 3),
        cpu_seconds=round(readings.processes.cpu_seconds(child.pid, waited), 2),
        memory_bytes=readings.memory.peak,
        anonymous_bytes=readings.anonymous.peak,
        shared_bytes=readings.shared.peak,
        pss_bytes=readings.pss.peak,
        processes=readings.most_processes,
        left_running=len(readings.processes),
        directories={
            path: Directory(start[path], curve.peak, disk_bytes(path), curve.points)
            for path, curve in readings.directories.items()
        },
        sampling_seconds=round(readings.cost, 3),
        curve=readings.memory.points,
    )


def _follow(pid: int, readings: Readings, began: float) -> tuple[int, resource.struct_rusage]:
    """Read until the process ends; its wait status and what it used."""
    handle = os.pidfd_open(pid)
    try:
        ended = False
        while not ended:
            due = readings.read(time.monotonic() - began)
            pause = max(0.0, due - (time.monotonic() - began))
            ended = bool(select.select([handle], [], [], pause)[0])
    finally:
        os.close(handle)
    _, status, usage = os.wait4(pid, 0)
    return status, usage


def main(arguments: Sequence[str]) -> int:
    """The command's exit code, or as a shell has it 128 and the signal that ended it."""
    here = list(arguments).index("--") if "--" in arguments else len(arguments)
    settings = tyro.cli(Settings, args=arguments[:here], description=Settings.__doc__)
    # The terminal interrupts the command as well; how it takes that is part of what is measured.
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        footprint = measure(arguments[here + 1 :], settings.watch, every=settings.every)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if settings.out is not None:
        part = settings.out.with_name(settings.out.name + ".part")
        part.write_text(footprint.as_json() + "\n")
        part.replace(settings.out)
    print(footprint.summary(), file=sys.stderr, flush=True)
    print(footprint.as_json(curves=False))
    code = footprint.returncode
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
