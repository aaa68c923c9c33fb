"""Claims about what is refused before a job uses a cluster: addresses, nodes, outputs, demands."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from commands import ROOT, classified, classifier, flags_of, run_here, write_rows
from ray.cluster_utils import Cluster

import raycurv
from raycurv import RaycurvError, UserError
from raycurv.files.store import Store
from raycurv.onray.address import check_answers
from raycurv.onray.connection import connect, nodes
from raycurv.onray.preflight import preflight

torch.set_num_threads(1)

FIT: dict[str, Any] = {"objective": "classification", "dtype": "float64", "batch_tokens": 4}


# Addresses


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def web() -> Iterator[str]:
    """A web server, as Ray's dashboard is one."""
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *said: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["nobody", "silent", "web", "far away", "no address", "a URL"])
def test_an_address_that_is_no_rays_is_refused_within_seconds(
    kind: str, request: pytest.FixtureRequest
) -> None:
    addresses = {
        "nobody": "127.0.0.1:1",
        "far away": "10.255.255.1:6379",  # belongs to nobody
        "no address": "head",
        "a URL": "http://127.0.0.1:8265",
    }
    address = addresses.get(kind) or request.getfixturevalue(kind)
    begun = time.monotonic()
    with pytest.raises(UserError, match="--address"):
        check_answers(address)
    assert time.monotonic() - begun < 5


def test_a_job_with_an_address_that_is_no_rays_ends_with_2(silent: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.parquet", classified(9))
    settings = {"model": "commands:classifier", "data": rows, "out": tmp_path / "run"}
    outcome = run_here("fit.py", flags_of(FIT | settings | {"address": silent}))
    assert outcome.code == 2
    said = json.loads(outcome.out.splitlines()[-1])
    assert said["error"]["where"] == f"--address {silent}"
    # Before anything took time.
    assert not (tmp_path / "run" / "data").exists()


# Nodes


@dataclass
class Nodes:
    """A cluster whose nodes are processes of this machine, each in a folder of its own."""

    cluster: Cluster
    here: Path

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    @contextmanager
    def with_one_more(
        self, path: Path | None = None, cwd: Path | None = None, **what: Any
    ) -> Iterator[Any]:
        """One more node, with a folder before all others on the path of its Pythons."""
        with pytest.MonkeyPatch.context() as patch:
            if path is not None:
                patch.setenv("PYTHONPATH", f"{path}:{ROOT}:{Path(__file__).parent}")
            patch.chdir(cwd or self.here)
            node = self.cluster.add_node(num_cpus=1, object_store_memory=80_000_000, **what)
        try:
            yield node
        finally:
            self.cluster.remove_node(node)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    here = tmp_path_factory.mktemp("driver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", f"{ROOT}:{Path(__file__).parent}")
        patch.chdir(here)
        head = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield Nodes(cluster, here)
        finally:
            ray.shutdown()
            cluster.shutdown()


def test_another_version_of_ray_is_named(two: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "__version__", "2.49.0")
    with pytest.raises(UserError, match=r"Ray 2\.49\.0 and Python 3") as caught:
        connect(two.address)
    monkeypatch.undo()
    assert ray.__version__ in caught.value.got
    assert not ray.is_initialized()


@pytest.fixture
def joined(two: Nodes) -> Iterator[Nodes]:
    """The driver on the cluster."""
    connect(two.address)
    yield two


def test_nodes_that_are_alike_pass_and_leave_nothing(joined: Nodes, tmp_path: Path) -> None:
    with joined.with_one_more():
        preflight(Store(str(tmp_path / "run")), own=False)
        assert not list((tmp_path / "run").iterdir())
        # A cluster that this process had before, and takes for its own, is asked just the same.
        with pytest.raises(RaycurvError, match="an answer to a small task"):
            preflight(Store(str(tmp_path / "run")), own=True, patience_seconds=0.0)


def _without_raycurv(folder: Path) -> str:
    code = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "raycurv":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
"""
    (folder / "sitecustomize.py").write_text(code)
    return "got no raycurv"


def _other_raycurv(folder: Path) -> str:
    shutil.copytree(ROOT / "raycurv", folder / "raycurv")
    with (folder / "raycurv" / "errors.py").open("a") as file:
        file.write("\n# another\n")
    return "source code is another"


def _other_torch(folder: Path) -> str:
    (folder / "torch-9.8.7.dist-info").mkdir()
    said = "Metadata-Version: 2.1\nName: torch\nVersion: 9.8.7\n"
    (folder / "torch-9.8.7.dist-info" / "METADATA").write_text(said)
    return "got torch 9.8.7"


@pytest.mark.parametrize("make", [_without_raycurv, _other_raycurv, _other_torch])
def test_a_node_with_other_software_is_named(
    make: Callable[[Path], str], joined: Nodes, tmp_path: Path
) -> None:
    (tmp_path / "path").mkdir()
    says = make(tmp_path / "path")
    with joined.with_one_more(tmp_path / "path") as node:
        with pytest.raises(UserError, match=says) as caught:
            preflight(Store(str(tmp_path / "run")), own=False)
        assert node.node_id[:8] in caught.value.where
    assert not list((tmp_path / "run").iterdir())


def test_a_directory_that_a_node_does_not_share_is_refused(
    joined: Nodes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Every process finds another directory there: its own.
    out = "/proc/self/cwd/run"
    monkeypatch.chdir(joined.here)
    preflight(Store(out), own=False)
    (tmp_path / "elsewhere").mkdir()
    rows = write_rows(tmp_path / "rows.parquet", classified(9))
    with joined.with_one_more(cwd=tmp_path / "elsewhere") as node:
        with pytest.raises(UserError, match="does not see what the driver wrote") as caught:
            preflight(Store(out), own=False)
        assert caught.value.where == f"--out {out}" and node.node_id[:8] in caught.value.expected
        assert "all nodes share" in caught.value.remedy
        # And a job refuses it before it builds a stage.
        settings = {"model": "commands:classifier", "data": rows, "out": out}
        outcome = run_here("fit.py", flags_of(FIT | settings | {"address": joined.address}))
    assert outcome.code == 2 and "Traceback" not in outcome.err
    said = json.loads(outcome.out.splitlines()[-1])
    assert said["error"]["where"] == f"--out {out}" and "loading" in said["phases"]
    assert "first pass: A and G" not in said["phases"]


def test_a_node_that_does_not_answer_is_named(joined: Nodes, tmp_path: Path) -> None:
    with pytest.raises(RaycurvError, match="an answer to a small task"):
        preflight(Store(str(tmp_path / "run")), own=False, patience_seconds=0.0)


# Demands


def test_too_few_cores_are_an_error_with_demand_and_supply(joined: Nodes, tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(RaycurvError, match="2 x 3 stages of 7 CPU each") as caught:
        raycurv.fit(
            classifier, classified(9), tmp_path / "run", address=joined.address, stages=3,
            replicas=2, cpus_per_stage=7, place_seconds=2, quiet=True, **FIT,
        )  # fmt: skip
    assert "1 CPU free of 1 nodes" in caught.value.got
    assert time.monotonic() - begun < 40
    # Nothing of the demand is left in the cluster.
    there = ray.util.placement_group_table().values()
    assert all(group["state"] == "REMOVED" for group in there)


def test_too_few_gpus_are_an_error_with_demand_and_supply(joined: Nodes, tmp_path: Path) -> None:
    with joined.with_one_more(num_gpus=1):
        until = time.monotonic() + 30
        while not sum(node.gpus for node in nodes()):
            assert time.monotonic() < until
            time.sleep(0.1)
        taken = ray.remote(num_gpus=1, num_cpus=0)(_Holder).remote()
        ray.get(taken.ready.remote())
        with pytest.raises(RaycurvError, match="1 x 1 stages of 1 CPU and 1 GPU each") as caught:
            raycurv.fit(
                classifier, classified(9), tmp_path / "run", address=joined.address, device="cuda",
                place_seconds=2, quiet=True, **FIT,
            )  # fmt: skip
    assert "0 GPU free" in caught.value.got and "1 CPU 1 GPU" in caught.value.got


class _Holder:
    """Takes what it is given."""

    def ready(self) -> None:
        return None


def test_the_last_line_of_an_error_that_nobody_foresaw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: object, outputs: object, batch: object) -> None:
        raise ZeroDivisionError("of our own")

    monkeypatch.setattr(raycurv.Classification, "loss", wrong)
    rows = write_rows(tmp_path / "rows.parquet", classified(9))
    out = tmp_path / "run"
    settings = {"model": "commands:classifier", "data": rows, "out": out, "address": "none"}
    outcome = run_here("fit.py", flags_of(FIT | settings))
    assert outcome.code == 1 and "Traceback" in outcome.err
    said = json.loads(outcome.out.splitlines()[-1])
    assert said["status"] == "failed" and said["out"] == str(out)
    assert said["error"]["kind"] == "ZeroDivisionError"
    assert "test_preflight.py:" in said["error"]["where"]
