"""Claims about SIGTERM, SIGINT and SIGHUP: a job keeps what it has done, says so, and is gone in
seconds.

What must be equal is equal bit for bit: one thread a process, float64, the same microbatches.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import classified, flags_of, run_here, start, write_rows
from failures import timeline
from test_resume import assert_same

from raycurv.jobs import last_line
from raycurv.progress import stopping

torch.set_num_threads(1)

ROWS = 80
# On two quiet cores it takes less than the three seconds that `ray job stop` waits; others may be
# at work on the machine of the tests.
SECONDS = 10.0
# 127.0.0.1, as itself and within IPv6, and ::1, as Linux has them: words whose last byte is first.
OWN_ADDRESSES = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")


def token_of(pid: int) -> str | None:
    """The token of Ray's in a process's environment, where Ray asks for it."""
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    found = dict(word.partition("=")[::2] for word in words)
    return found.get("RAY_AUTH_TOKEN") if found.get("RAY_AUTH_MODE") == "token" else None


@dataclass(frozen=True)
class Job:
    """A fit that is disturbed, and the same undisturbed.

    Attributes:
        settings: flags but for the directory and the address.
        whole: the undisturbed run.
        forwards: how many times it took an example through the model's first layer.
    """

    settings: dict[str, Any]
    whole: Path
    forwards: int

    def flags(self, out: Path, address: str) -> list[str]:
        return flags_of(self.settings | {"out": out, "address": address})


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = {
        "model": "commands:paced",
        "data": write_rows(folder / "rows.parquet", classified(ROWS)),
        "objective": "classification",
        "dtype": "float64",
        "batch_tokens": 2,
        "stages": 2,
        # Forwards are counted, and a resumed pass checks again.
        "no_check_capture": True,
    }
    trace = folder / "trace"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACED_TRACE", str(trace))
        flags = flags_of(settings | {"out": folder / "whole", "address": "none"})
        assert run_here("fit.py", flags).code == 0
    return Job(settings, folder / "whole", trace.stat().st_size)


def below(pid: int) -> list[int]:
    """All processes that a process has started, and those that they have."""
    said = subprocess.run(
        ["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    pairs = [tuple(map(int, line.split())) for line in said.splitlines()]
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in pairs if its_parent == parent]
    return found[1:]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def beyond_this_machine(pids: list[int]) -> list[str]:
    """Addresses other than this machine's own at which processes listen."""
    sockets = set()
    for link in (link for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir()):
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(link))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            # 127.0.0.1, as itself and within IPv6, and ::1; words of four bytes, the last first.
            own = words[1].startswith(
                ("0100007F:", "0000000000000000FFFF00000100007F:", 24 * "0" + "01000000:")
            )
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets and not own:
                found.append(words[1])
    return found


def stop(
    name: str,
    flags: list[str],
    ready: Callable[[], bool],
    number: int = signal.SIGTERM,
    look: Callable[[list[int]], None] = lambda pids: None,
    **environment: str | None,
) -> dict[str, Any]:
    """Send a job a signal as soon as the moment has come; gives what its last line says.

    Args:
        look: is given the job's processes at that moment.
    """
    process = start(name, flags, RAY_worker_niceness="0", **environment)
    until = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "the moment did not come"
        time.sleep(0.002)
    started = below(process.pid)
    look([process.pid, *started])
    # A terminal that goes away tells everybody.
    for pid in started if number == signal.SIGHUP else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    process.send_signal(number)
    sent = time.monotonic()
    process.wait(timeout=60)
    took = time.monotonic() - sent
    out, err = process.communicate()
    assert process.returncode == 128 + number, err
    assert took < SECONDS
    assert "Traceback" not in err and "Exception ignored" not in err
    said: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert said["status"] == "stopped" and said["job"] == name
    until = time.monotonic() + 15
    while left := [pid for pid in started if alive(pid)]:
        assert time.monotonic() < until, f"processes {left} outlive the job"
        time.sleep(0.05)
    return said


def done(out: Path, name: str) -> int:
    """Microbatches in the last commit of a pass."""
    return int(json.loads((out / "work" / name / "commit.json").read_bytes())["done"])


# Over 20 s on a busy machine: two jobs one after the other, one of which starts a Ray of its own.
@pytest.mark.parametrize(("address", "number"), [("none", signal.SIGINT), ("local", signal.SIGHUP)])
def test_a_pass_commits_what_it_has_done_and_goes_on_from_there(
    address: str, number: int, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, trace = tmp_path / "run", tmp_path / "trace"
    flags = job.flags(out, address)
    trace.touch()

    def look(pids: list[int]) -> None:
        # A Ray of its own is for this machine alone, and for who knows its token.
        assert beyond_this_machine(pids) == []
        # Titles that Ray gives to workers take the place of their environment.
        tokens = {token_of(pid) for pid in pids[1:]} - {None}
        assert len(tokens) == (address == "local")

    said = stop(
        "fit.py", flags, lambda: trace.stat().st_size > 20, number, look,
        PACED_TRACE=str(trace), RAY_AUTH_MODE=None, RAY_AUTH_TOKEN=None,
    )  # fmt: skip
    assert said["out"] == str(out) and "first pass: A and G" in said["phases"]
    # No commit was due for a minute.
    committed = done(out, "covariance")
    assert 5 < committed < ROWS / 2
    # Where it runs is free to change, and a Ray takes seconds to start.
    monkeypatch.setenv("PACED_TRACE", str(trace))
    outcome = run_here("fit.py", job.flags(out, "none"))
    assert outcome.code == 0, outcome.err
    assert_same(out, job.whole)
    # Not one example went through twice.
    assert trace.stat().st_size == job.forwards
    passed = [
        row["microbatch"]
        for row in timeline(out)
        if (row["phase"], row["operation"]) == ("first pass: A and G", "turn")
    ]
    assert sorted(passed) == list(range(ROWS // 2))


@pytest.mark.parametrize("address", ["none", "local"])
def test_decompositions_that_are_done_are_kept(
    address: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, trace = tmp_path / "run", tmp_path / "trace"
    flags = job.flags(out, address)
    stop("fit.py", flags, lambda: any(out.glob("eigen/*.safetensors")), PACED_TRACE=str(trace))
    kept = {path: path.stat().st_mtime_ns for path in out.glob("eigen/*.safetensors")}
    assert 0 < len(kept) < 6
    # Where it runs is free to change, and a Ray takes seconds to start.
    monkeypatch.setenv("PACED_TRACE", str(trace))
    outcome = run_here("fit.py", job.flags(out, "none"))
    assert outcome.code == 0, outcome.err
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert_same(out, job.whole)
    assert trace.stat().st_size == job.forwards


def test_a_job_stops_while_it_connects(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = job.flags(out, "local")
    stop("fit.py", flags, lambda: (out / "data").exists())
    assert not (out / "work" / "covariance").exists()


def test_a_job_stops_while_its_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "model": "commands:waiting",
        "data": write_rows(tmp_path / "rows.parquet", classified(9)),
        "objective": "classification",
        "out": tmp_path / "run",
        "address": "none",
    }
    trace = tmp_path / "trace"
    stop("fit.py", flags_of(settings), trace.exists, WAITING_TRACE=str(trace))
    # The second time it does not wait.
    monkeypatch.setenv("WAITING_TRACE", str(trace))
    assert run_here("fit.py", flags_of(settings)).code == 0


def test_a_job_that_only_loads_its_libraries_stops_too(job: Job, tmp_path: Path) -> None:
    begun = time.monotonic()
    flags = job.flags(tmp_path / "run", "none")
    said = stop("fit.py", flags, lambda: time.monotonic() > begun + 1, signal.SIGHUP)
    assert not (tmp_path / "run").exists() and "out" not in said


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    # As nohup starts a job.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stopping.heard()
        with stopping.listening(), last_line.loading(last_line.LastLine("fit.py")):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopping.asked()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(stopping.Stopped), stopping.listening():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_listens_to_everybody_is_seen() -> None:
    # The negative control of what is said of a job's ports.
    for host, seen in (("127.0.0.1", False), ("0.0.0.0", True), ("::1", False), ("::", True)):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family):
            assert bool(beyond_this_machine([os.getpid()])) == seen, host


def test_without_a_signal_nothing_stops(job: Job) -> None:
    # The negative control of all of the above: the undisturbed run came to its end.
    assert (job.whole / "tables" / "blocks").exists() and not (job.whole / "work").exists()
    assert job.forwards >= 2 * ROWS
