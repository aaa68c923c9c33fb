"""Connecting to a Ray cluster, and what the cluster has."""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.exceptions import AuthenticationError
from ray.job_config import JobConfig

from raycurv.errors import UserError, in_words
from raycurv.onray.address import check_answers


def connect(address: str) -> bool:
    """Connect to Ray, unless this process already is.

    Args:
        address: ``local`` for a Ray of this process's own, ``auto``, or ``HOST:PORT``.

    Returns:
        Whether this call made the connection, so that its maker can end it.

    Raises:
        UserError: no Ray answers at the address, it is of another version, or does not let this
            process in.
    """
    if ray.is_initialized():
        return False
    # A call whose actor is lost is seen to by whoever waits for the calls behind it.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    quiet = {"logging_level": "warning", "log_to_driver": False}
    with _listeners_kept():
        if address == "local":
            try:
                with _deaf_to_hangups():
                    ray.init(
                        address="local", include_dashboard=False, job_config=_own_path(), **quiet
                    )
            except (OSError, AuthenticationError) as error:
                # A token or a directory for sockets that the environment names.
                raise UserError(
                    "--address local", "a Ray that starts on this machine",
                    in_words(error),
                    "Set right, or unset, RAY_AUTH_TOKEN_PATH, RAY_TMPDIR and TMPDIR; or use "
                    "--address none.",
                ) from error  # fmt: skip
            return True
        check_answers(address)
        try:
            ray.init(address=address, job_config=_own_path(), **quiet)
        except (ConnectionError, RuntimeError, AuthenticationError) as error:
            raise _refused(address, error) from error
    return True


def tried() -> int:
    """Start a Ray of this process's own, and end it; gives its cores.

    Raises:
        UserError: none starts.
    """
    own = connect("local")
    try:
        return cluster_cores()
    finally:
        if own:
            ray.shutdown()


class _PathAsGiven(JobConfig):  # type: ignore[misc]
    """A job whose processes are not given the working directory as a place of modules."""

    def _runtime_env_has_working_dir(self) -> bool:
        # Asked by ray.init alone, before it puts that directory in front of all libraries.
        return True


def _own_path() -> JobConfig | None:
    """Where the job's processes look for modules: in the working directory only if this one does,
    too, or has this package from there."""
    here = os.path.realpath(os.getcwd())
    package = os.path.realpath(os.path.join(os.path.dirname(__file__), os.pardir, os.pardir))
    if here in (package, *map(os.path.realpath, sys.path)):
        return None
    script = os.path.dirname(os.path.realpath(sys.argv[0]))
    return _PathAsGiven(_py_driver_sys_path=[script] if script in sys.path else [])


@contextmanager
def _listeners_kept() -> Iterator[None]:
    """``ray.init`` takes SIGTERM for itself, as a ``sys.exit``: who listened to it before goes on
    to, and hears what came meanwhile."""
    before = signal.getsignal(signal.SIGTERM)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        yield
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        signal.signal(signal.SIGTERM, before)
        ray.shutdown()
        before(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _deaf_to_hangups() -> Iterator[None]:
    """Processes that are started here never hear a SIGHUP, which a terminal that goes away sends to
    all that is in it: the job commits what they hold, and ends them. This one hears it later."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _refused(address: str, error: Exception) -> UserError:
    """What Ray says when it does not let this process in, as ours."""
    where, got = f"--address {address}", " ".join(str(error).split())
    if isinstance(error, AuthenticationError):
        return UserError(
            where, "a cluster that takes this process's token", got,
            "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) as on the "
            "cluster.",
        )  # fmt: skip
    if "ersion mismatch" in got:
        return UserError(
            where, f"a cluster of Ray {ray.__version__} and Python {platform.python_version()}",
            got, "Run the job with the versions that the cluster has, from its own image say.",
        )  # fmt: skip
    return UserError(
        where, "a running Ray cluster that lets this process in", got,
        "If the cluster wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as there; or "
        "leave --address out for a Ray of its own.",
    )  # fmt: skip


@dataclass(frozen=True)
class Node:
    """A node that is alive.

    Attributes:
        cpus: cores that Ray gives out, whether or not they are in use.
        gpus: the same of GPUs.
        memory: the same of memory, in bytes.
    """

    id: str
    host: str
    cpus: float
    gpus: float
    memory: int

    def __str__(self) -> str:
        return f"node {self.host} ({self.id[:8]})"


def nodes() -> list[Node]:
    """The nodes that are alive."""
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            has, host = node["Resources"], node["NodeManagerHostname"]
            cpus, gpus, memory = (has.get(what, 0.0) for what in ("CPU", "GPU", "memory"))
            found.append(Node(node["NodeID"], host, cpus, gpus, int(memory)))
    return found


def cluster_cores() -> int:
    """CPU cores of the cluster."""
    return max(1, int(sum(node.cpus for node in nodes())))


def smallest_node_cores() -> int:
    """CPU cores of the node that has the fewest (of those that have any)."""
    return min((int(node.cpus) for node in nodes() if node.cpus >= 1), default=1)


def cluster_gpus() -> int:
    """GPUs of the cluster."""
    return int(sum(node.gpus for node in nodes()))


def supply() -> str:
    """What the cluster has, node by node, as an error shows it."""
    each = [
        f"{node.host} {node.cpus:g} CPU" + (f" {node.gpus:g} GPU" if node.gpus else "")
        for node in nodes()
    ]
    free = ray.available_resources()
    unused = f"{free.get('CPU', 0.0):g} CPU"
    if cluster_gpus():
        unused += f" {free.get('GPU', 0.0):g} GPU"
    return f"{unused} free of {len(each)} nodes ({', '.join(each)})"
