"""A cluster of several nodes on this machine, and the processes that belong to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

# A node that goes is missed within a second or two.
_HEALTH = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


@contextmanager
def cluster(nodes: int, cores: int) -> Iterator[Cluster]:
    """A head without work and so many nodes of so many cores, to which this process connects.

    Workers import by name what the tests hand them, and the raycurv of this checkout.
    """
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        patch.setenv("PYTHONPATH", f"{here}:{here.parent}")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": _HEALTH},
        )
        try:
            for _ in range(nodes):
                made.add_node(num_cpus=cores)
            ray.init(address=made.address, logging_level="error", log_to_driver=False)
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


def workers(made: Cluster) -> dict[int, str]:
    """Processes of the cluster's workers that hold a stage or run a task: pid -> title."""
    daemons = {
        process.process.pid
        for node in made.worker_nodes
        for process in node.all_processes.get("raylet", [])
    }
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            title = (entry / "cmdline").read_bytes().split(b"\0")[0].decode()
        except (OSError, ValueError, IndexError):
            continue
        if parent in daemons and title.startswith(("ray::StageActor", "ray::run_task")):
            found[int(entry.name)] = title
    return found
