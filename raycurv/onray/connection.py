"""Connecting to a Ray cluster, and what the cluster has."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import ray

from raycurv.errors import UserError

_CONNECT_SECONDS = 3.0


def address_of(address: str | None) -> str:
    """What ``--address`` says, or ``RAY_ADDRESS``, or ``local``."""
    return address or os.environ.get("RAY_ADDRESS") or "local"


def connect(address: str | None) -> bool:
    """Connect to Ray, unless this process already is.

    Args:
        address: ``local`` for a Ray of this process's own, ``auto``, ``HOST:PORT``, or ``None`` for
            ``RAY_ADDRESS`` when set, else ``local``.

    Returns:
        Whether this call made the connection, so that its maker can end it.

    Raises:
        UserError: nothing answers at the address.
    """
    if ray.is_initialized():
        return False
    address = address_of(address)
    # A call whose actor is lost is seen to by whoever waits for the calls behind it.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    quiet = {"logging_level": "warning", "log_to_driver": False}
    if address == "local":
        ray.init(address="local", include_dashboard=False, **quiet)
        return True
    if address != "auto" and "://" not in address:
        _check_answers(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"--address {address}",
            "a running Ray cluster that lets this process in",
            str(error),
            "Start one with `ray start --head`, or leave --address out for a Ray of its own.",
        ) from error
    return True


def _check_answers(address: str) -> None:
    """``ray.init`` to a dead address never returns: try a socket first."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError("--address", "local, auto, none or HOST:PORT", repr(address), "")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"--address {address}",
            "a Ray cluster that answers",
            str(error),
            "Check the address with `ray status --address`, or use --address local.",
        ) from error


@dataclass(frozen=True)
class Node:
    """A node that is alive.

    Attributes:
        id: Ray's.
        host: its name.
        cpus, gpus: in all.
        memory: bytes that Ray gives out.
    """

    id: str
    host: str
    cpus: float
    gpus: float
    memory: int


def nodes() -> list[Node]:
    """The nodes that are alive."""
    found = []
    for said in ray.nodes():
        if said["Alive"]:
            has = said["Resources"]
            memory = int(has.get("memory", 0))
            host = said["NodeManagerHostname"]
            found.append(
                Node(said["NodeID"], host, has.get("CPU", 0.0), has.get("GPU", 0.0), memory)
            )
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
    unused = f"{free.get('CPU', 0.0):g} CPU" + (f" {free['GPU']:g} GPU" if "GPU" in free else "")
    return f"{unused} free of {len(each)} nodes ({', '.join(each)})"
