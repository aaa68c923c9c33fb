"""What a command takes, measured on commands that take a known amount."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "footprint.py"
MB = 10**6
HELD = 64 * MB  # what the commands below take; the interpreter itself takes 10 MB at most
PYTHON = [sys.executable, "-S", "-E", "-c"]  # without site: it starts in some 20 ms
ALLOCATE = f"import time; held = bytearray({HELD}); held[::4096] = held[::4096]; time.sleep(1.0)"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("footprint", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


footprint = load()


def measure(source: str, *arguments: str, **settings: Any) -> Any:
    return footprint.measure([*PYTHON, source, *arguments], every=0.05, **settings)


def start(*lines: str) -> str:
    """Python that runs ALLOCATE in a process of its own, and then these lines."""
    words = [*PYTHON, ALLOCATE]
    return "\n".join(["import os, subprocess, sys, time", f"words = {words!r}", *lines])


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(ALLOCATE, id="its own"),
        pytest.param(start("subprocess.run(words)"), id="of a child"),
        pytest.param(
            start(
                "if not os.fork():",
                "    os.setsid()",
                "    os.fork() or os.execv(words[0], words)",
                "    os._exit(0)",
                "os.wait()",
                "time.sleep(1.1)",
            ),
            id="of a daemon whose parent is gone",
        ),
        pytest.param(
            start("subprocess.Popen(words, env={})", "time.sleep(1.1)"),
            id="of a child with another environment",
        ),
    ],
)
def test_memory_counts(source: str) -> None:
    taken = measure(source)
    assert HELD <= taken.anonymous_bytes < HELD + 40 * MB
    assert taken.memory_bytes >= taken.anonymous_bytes
    assert max(size for _, size in taken.curve) == taken.memory_bytes


def test_memory_of_other_processes_does_not_count() -> None:
    other = subprocess.Popen([*PYTHON, ALLOCATE])
    taken = measure("import time; time.sleep(0.2)")
    other.wait()
    assert 0 < taken.anonymous_bytes < HELD // 2


def test_pages_that_processes_share_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Other programs use the machine's /dev/shm as well.
    in_use = iter([5 * MB, 5 * MB, 9 * MB])
    monkeypatch.setattr(footprint, "shared_memory_bytes", lambda: next(in_use, 4 * MB))
    taken = measure(
        f"import mmap, os, time; m = mmap.mmap(-1, {HELD}); m.write(bytes({HELD}))\n"
        "pid = os.fork(); n = sum(m[::4096]); time.sleep(1.0); pid and os.wait()"
    )
    assert taken.shared_bytes == 4 * MB
    assert taken.processes == 2
    assert taken.anonymous_bytes < HELD + 40 * MB  # while the bytes that are written are made


def test_dev_shm_counts() -> None:
    path = Path(footprint.SHARED_MEMORY) / f"raycurv-test-{id(object())}"
    try:
        taken = measure(
            "import sys, time; open(sys.argv[1], 'wb').write(bytes(int(sys.argv[2])))\n"
            "time.sleep(0.2)",
            str(path),
            str(HELD),
        )
    finally:
        path.unlink(missing_ok=True)
    assert taken.shared_bytes > HELD // 2  # others may give some back in the meantime


def test_files_that_are_gone_at_the_end_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "EVERY_DIRECTORY", 0.05)
    (tmp_path / "before").write_bytes(bytes(MB))
    taken = measure(
        "import os, sys, time; p = os.path.join(sys.argv[1], 'a', 'b'); os.makedirs(p)\n"
        "f = os.path.join(p, 'c'); file = open(f, 'wb'); file.write(bytes(20_000_000))\n"
        "file.flush(); os.fsync(file.fileno()); os.link(f, f + '2'); time.sleep(0.4)\n"
        "os.unlink(f); os.unlink(f + '2')",
        str(tmp_path),
        watch=[tmp_path, tmp_path / "absent"],
    )
    directory = taken.directories[str(tmp_path)]
    assert 20 * MB <= directory.peak - directory.start < 22 * MB
    assert directory.end - directory.start < MB
    assert taken.directories[str(tmp_path / "absent")].peak == 0


def test_cpu_of_children_that_nobody_waits_for_counts() -> None:
    # A child is last read a reading before it ends, which on a busy machine may be long.
    spin = "import time\nwhile time.process_time() < 0.5: pass\ntime.sleep(1)"
    taken = measure(
        f"import signal, subprocess, time; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        f"child = subprocess.Popen({[*PYTHON, spin]!r}); child.wait()"
    )
    assert 0.3 < taken.cpu_seconds < 1.2
    assert measure("import time; time.sleep(0.5)").cpu_seconds < 0.3


def test_a_curve_keeps_its_peak_whatever_its_length() -> None:
    curve = footprint.Curve()
    for n in range(10 * footprint.POINTS):
        curve.add(n / 10, 7 if n == 12_345 else n % 5)
    assert len(curve.points) <= footprint.POINTS
    assert curve.peak == 7
    assert curve.points == sorted(curve.points)


def test_the_last_line_is_json_and_the_exit_code_the_commands_own(tmp_path: Path) -> None:
    out = tmp_path / "taken.json"
    job = [sys.executable, str(SCRIPT), "--out", str(out), "--watch", str(tmp_path), "--"]
    done = subprocess.run(
        [*job, *PYTHON, "import sys; print('--watch'); sys.exit(3)"], capture_output=True, text=True
    )
    printed = json.loads(done.stdout.splitlines()[-1])
    written = json.loads(out.read_text())
    assert done.returncode == printed["returncode"] == 3
    assert done.stdout.startswith("--watch\n")
    assert written["curve"] and "curve" not in printed
    assert list(written["directories"]) == [str(tmp_path)]


def test_a_command_ended_by_a_signal_is_measured() -> None:
    assert measure("import os; os.kill(os.getpid(), 9)").returncode == -9


@pytest.mark.parametrize(
    "command, every, said", [([], 0.2, "expected a command"), (["true"], 0.0, "above 0")]
)
def test_mistakes_say_what_to_do(command: list[str], every: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        footprint.measure(command, every=every)
