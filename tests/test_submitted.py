"""Claims about jobs of a cluster: however one is submitted it gives the same tables, and a machine
can read how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT, classified, environment, flags_of, run, run_here, write_rows
from ray.job_submission import JobStatus, JobSubmissionClient
from test_resume import assert_same

torch.set_num_threads(1)

# One cluster a kind, and every job of it a process that loads its libraries: over 20 s each on a
# busy machine, 3 to 8 s on two quiet cores.
TOKEN = "of the tests, forty characters or more.."
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
SECONDS = 180.0
FIT = {
    "model": "commands:classifier",
    "objective": "classification",
    "dtype": "float64",
    "batch_tokens": 4,
    "stages": 2,
    "cpus_per_stage": 0.5,
}


@dataclass(frozen=True)
class Cluster:
    """A head node that takes jobs.

    Attributes:
        address: of Ray.
        dashboard: where jobs are submitted.
        token: that everybody must show; none if empty.
        trace: where its processes leave what they count.
    """

    address: str
    dashboard: str
    token: str
    trace: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to be let in."""
        if not self.token:
            return {"RAY_AUTH_MODE": "disabled"}
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    @property
    def headers(self) -> dict[str, str]:
        """What a request needs to be let in."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def client(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.dashboard, headers=self.headers)

    def ask(self, path: str, body: Any = None) -> Any:
        """Ray's REST API, with nothing but Python."""
        data = None if body is None else json.dumps(body).encode()
        headers = self.headers | {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.dashboard}/api/jobs/{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


def free_ports(count: int) -> list[int]:
    """Ports that nobody is given by chance in the meantime, as those the kernel hands out are."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(port)
    return found


def started(token: str) -> Iterator[Cluster]:
    """A head node with its dashboard, ended by its process."""
    # Short: the paths of Ray's sockets lie below.
    folder = Path(tempfile.mkdtemp(prefix="rj", dir="/tmp"))
    port, dashboard, client, agent, agent_grpc, runtime_env, metrics = free_ports(7)
    cluster = Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", token, folder / "trace")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = environment(
        **cluster.environment,
        PATH=path,
        PYTHONPATH=f"{Path(__file__).parent}:{ROOT}",
        PACED_TRACE=str(cluster.trace),
        RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0",
        RAY_worker_niceness="0",
        RAY_USAGE_STATS_ENABLED="0",
    )
    command = [
        "ray", "start", "--head", "--block", "--disable-usage-stats",
        f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2",
        "--object-store-memory=100000000", f"--temp-dir={folder}/r",
        "--include-dashboard=true", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}", f"--runtime-env-agent-port={runtime_env}",
        f"--metrics-export-port={metrics}",
    ]  # fmt: skip
    with (folder / "log").open("w+") as log:
        head = subprocess.Popen(command, env=own, stdout=log, stderr=log, start_new_session=True)
        try:
            until = time.monotonic() + SECONDS
            while True:
                try:
                    # The head takes jobs, and its agent starts them.
                    cluster.ask("")
                    urllib.request.urlopen(f"http://127.0.0.1:{agent}/api/healthz", timeout=10)
                    break
                except OSError:
                    assert head.poll() is None, (folder / "log").read_text()
                    assert time.monotonic() < until, (folder / "log").read_text()
                    time.sleep(0.1)
            yield cluster
        finally:
            head.terminate()
            try:
                head.wait(timeout=30)
            except subprocess.TimeoutExpired:
                head.kill()
                head.wait()
            # Processes of the node write their last lines while it goes.
            until = time.monotonic() + 10
            while folder.exists() and time.monotonic() < until:
                shutil.rmtree(folder, ignore_errors=True)
                time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    yield from started("")


@pytest.fixture(scope="module")
def guarded() -> Iterator[Cluster]:
    """A cluster that lets nobody in without a token."""
    yield from started(TOKEN)


@dataclass(frozen=True)
class Data:
    """Rows, and the run that one process made of them."""

    rows: Path
    whole: Path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("alone")
    rows = write_rows(folder / "rows.parquet", classified(19))
    flags = flags_of(FIT | {"data": rows, "out": folder / "whole", "address": "none"})
    assert run_here("fit.py", flags).code == 0
    return Data(rows, folder / "whole")


def entrypoint(out: Path, data: Path, python: str = sys.executable, **settings: Any) -> str:
    script = ROOT / "jobs" / "fit.py"
    flags = flags_of(FIT | {"data": data, "out": out} | settings)
    return shlex.join([python, str(script), *flags])


# Four ways; each gives the status and the log


def with_the_client(cluster: Cluster, out: Path, data: Data) -> tuple[str, str]:
    client = cluster.client()
    job = client.submit_job(entrypoint=entrypoint(out, data.rows))
    return wait(lambda: str(client.get_job_status(job).value)), client.get_job_logs(job)


def with_requests(cluster: Cluster, out: Path, data: Data) -> tuple[str, str]:
    job = cluster.ask("", {"entrypoint": entrypoint(out, data.rows)})["submission_id"]
    return wait(lambda: str(cluster.ask(job)["status"])), cluster.ask(f"{job}/logs")["logs"]


def on_the_command_line(cluster: Cluster, out: Path, data: Data) -> tuple[str, str]:
    folder = out.parent / "checkout"
    for name in ("jobs", "raycurv"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    flags = flags_of(FIT | {"data": data.rows, "out": out})
    command = [
        "ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", str(folder),
        "--", "python", "jobs/fit.py", *flags,
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command, env=environment(**cluster.environment, PATH=path), capture_output=True,
        text=True, timeout=SECONDS,
    )  # fmt: skip
    # The log, between what the command says of itself.
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return "SUCCEEDED" if done.returncode == 0 else "FAILED", "\n".join(lines) or done.stderr


def as_a_driver(cluster: Cluster, out: Path, data: Data) -> tuple[str, str]:
    flags = flags_of(FIT | {"data": data.rows, "out": out, "address": cluster.address})
    outcome = run("fit.py", flags, SECONDS, **cluster.environment)
    return "SUCCEEDED" if outcome.code == 0 else "FAILED", outcome.err + outcome.out


WAYS: dict[str, Callable[[Cluster, Path, Data], tuple[str, str]]] = {
    "the client": with_the_client,
    "requests": with_requests,
    "the command line": on_the_command_line,
    "a driver": as_a_driver,
}


def wait(status: Callable[[], str]) -> str:
    until = time.monotonic() + SECONDS
    while (found := status()) not in ENDED:
        assert time.monotonic() < until, found
        time.sleep(0.2)
    return found


def last_line(log: str) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(log.splitlines()[-1])
    return said


# Every way with a token. Without one the client follows below, with the jobs that fail and the one
# that is stopped, and a driver is what most tests of clusters are.
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_submitting_gives_the_same_results(
    way: str, guarded: Cluster, data: Data, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    status, log = WAYS[way](guarded, out, data)
    assert status == "SUCCEEDED", log
    said = last_line(log)
    assert (said["status"], said["job"], said["out"]) == ("complete", "fit.py", str(out))
    assert "second pass: Λ" in said["phases"]
    assert_same(out, data.whole)


def test_a_driver_without_the_token_is_not_let_in(
    guarded: Cluster, data: Data, tmp_path: Path
) -> None:
    flags = flags_of(FIT | {"data": data.rows, "out": tmp_path / "run"})
    begun = time.monotonic()
    outcome = run("fit.py", [*flags, "--address", guarded.address], RAY_AUTH_MODE="disabled")
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    said = last_line(outcome.out)["error"]
    assert said["where"] == f"--address {guarded.address}" and "RAY_AUTH_TOKEN" in said["remedy"]
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize(
    ("settings", "kind", "where"),
    [
        ({"method": "kfac", "draws": 0}, "UserError", "--draws"),
        ({"model": "commands:overflowing", "dtype": "float32"}, "UserError", "0.weight"),
    ],
    ids=["a mistake in the driver", "a mistake in an actor"],
)
def test_a_job_that_fails_says_why_in_its_last_line(
    settings: dict[str, Any], kind: str, where: str, cluster: Cluster, data: Data, tmp_path: Path
) -> None:
    client = cluster.client()
    job = client.submit_job(entrypoint=entrypoint(tmp_path / "run", data.rows, **settings))
    assert wait(lambda: str(client.get_job_status(job).value)) == "FAILED"
    assert client.get_job_info(job).driver_exit_code == 2
    said = last_line(client.get_job_logs(job))
    assert said["status"] == "failed" and said["out"] == str(tmp_path / "run")
    assert said["error"]["kind"] == kind and where in said["error"]["where"]
    assert said["error"]["remedy"] is not None and said["error"]["got"] in said["message"]


# Over 20 s on a busy machine: it fits twice, and is stopped in the midst of a slow one.
def test_a_job_that_is_stopped_commits_and_goes_on_when_it_is_submitted_again(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, trace = write_rows(tmp_path / "rows.parquet", classified(80)), tmp_path / "trace"
    monkeypatch.setenv("PACED_TRACE", str(trace))
    # Forwards are counted, and a resumed pass checks captured gradients again.
    settings = {"model": "commands:paced", "batch_tokens": 2, "no_check_capture": True}
    whole = flags_of(FIT | settings | {"data": rows, "out": tmp_path / "whole"})
    assert run_here("fit.py", [*whole, "--address", "none"]).code == 0
    client, out = cluster.client(), tmp_path / "run"
    command = entrypoint(out, rows, **settings)
    # Ray kills after three seconds, which on a busy machine is too soon.
    patient = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}
    job = client.submit_job(entrypoint=command, runtime_env=patient)
    until = time.monotonic() + SECONDS
    while not cluster.trace.exists() or cluster.trace.stat().st_size < 20:
        assert time.monotonic() < until, client.get_job_logs(job)
        time.sleep(0.01)
    assert client.stop_job(job)
    assert wait(lambda: str(client.get_job_status(job).value)) == JobStatus.STOPPED
    said = last_line(client.get_job_logs(job))
    assert said["status"] == "stopped" and said["out"] == str(out)
    done = json.loads((out / "work" / "covariance" / "commit.json").read_bytes())["done"]
    assert 5 < done < 40
    again = client.submit_job(entrypoint=command)
    assert wait(lambda: str(client.get_job_status(again).value)) == JobStatus.SUCCEEDED
    assert_same(out, tmp_path / "whole")
    # Not one example went through twice.
    assert cluster.trace.stat().st_size == trace.stat().st_size
