"""Before a job uses a cluster: every node has the driver's raycurv and torch, and sees the output.

A node that joins later is not asked; what is wrong there shows when a stage is built on it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, NodeDiedError, RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycurv.errors import RaycurvError, UserError, in_words
from raycurv.files.store import Store
from raycurv.onray.connection import Node, nodes

# For a process to start on a node, and the environment of a submitted job to be unpacked there.
PATIENCE_SECONDS = 90.0


@dataclass(frozen=True)
class NodeReport:
    """What a node reports of itself.

    Attributes:
        versions: of what is installed; ``None`` for what is not.
        source: a digest of raycurv's source code.
        read: what it found in the driver's file, ``None`` when it sees none.
        failure: why it could not write a file beside that; empty when it could.
    """

    versions: dict[str, str | None]
    source: str
    read: str | None
    failure: str


def preflight(store: Store, own: bool, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """Ask every node that can hold a stage, all at once; a cluster of the job's own is not asked.

    Raises:
        UserError: a node has another raycurv or torch, or none; or it does not reach the results.
        RaycurvError: a node does not answer.
    """
    there = [node for node in nodes() if node.cpus]
    if own and len(there) < 2:
        return
    token = uuid.uuid4().hex
    place = f"work/preflight-{token}"
    before = store.there("work")
    if store.local:
        store.write(f"{place}/driver", [token.encode()])
    try:
        directory = store.path(place) if store.local else ""
        mine = NodeReport(*_probe()(directory, "here"))
        for node, report in _ask(there, directory, patience_seconds):
            _compare(node, report, mine)
            if store.local:
                _check_shared(node, report, token, store, f"{place}/{node.id}")
    finally:
        if store.local:
            store.delete_directory(place)
            if not before and not store.names("work"):
                store.delete_directory("work")


def _ask(
    there: list[Node], directory: str, patience_seconds: float
) -> list[tuple[Node, NodeReport]]:
    """The answers of all nodes; one that has gone meanwhile gives none."""
    handles = {}
    for node in there:
        here = NodeAffinitySchedulingStrategy(node.id, soft=False)
        remote = ray.remote(num_cpus=0, max_retries=3, scheduling_strategy=here)(_probe())
        handles[remote.remote(directory, node.id)] = node
    answered, _ = ray.wait(list(handles), num_returns=len(handles), timeout=patience_seconds)
    found = []
    for handle, node in handles.items():
        try:
            if handle not in answered:
                raise GetTimeoutError(f"none within {patience_seconds:g} s")
            found.append((node, NodeReport(*ray.get(handle))))
        except (NodeDiedError, TaskUnschedulableError):
            continue
        except RayError as error:
            ray.cancel(handle, force=False)
            raise RaycurvError(
                str(node), "an answer to a small task", in_words(error),
                "Look at that node (`ray status`, and its raylet's log), or take it away.",
            ) from error  # fmt: skip
    return found


def _compare(node: Node, report: NodeReport, mine: NodeReport) -> None:
    for package, wanted in mine.versions.items():
        version = report.versions[package]
        if version is None:
            got = f"no {package}"
        elif package == "raycurv" and report.source != mine.source:
            got = f"raycurv {version}, whose source code is another"
        # What follows the + of torch's is which devices it was built for.
        elif package != "raycurv" and _public(version) != _public(wanted):
            got = f"{package} {version}"
        else:
            continue
        raise UserError(
            str(node), f"{package} {wanted}, as the driver has", got,
            f"Install the driver's {package} on every node, or give all nodes one image.",
        )  # fmt: skip


def _public(version: str | None) -> str:
    return (version or "").partition("+")[0]


def _check_shared(node: Node, report: NodeReport, token: str, store: Store, name: str) -> None:
    failure = report.failure
    if report.read != token:
        failure = "it does not see what the driver wrote there"
    elif not failure and not store.exists(name):
        failure = "the driver does not see what it wrote there"
    if failure:
        raise UserError(
            f"--out {store.root}", f"a directory that {node} shares with the driver", failure,
            "A local path on a cluster of several nodes: give a path that all nodes share, or a "
            "URI such as s3://bucket/run.",
        )  # fmt: skip


def _probe() -> Callable[[str, str], tuple[Any, ...]]:
    """What a node runs: made in here, and needing nothing from outside, so that it is sent whole
    and runs where there is no raycurv."""

    def probe(directory: str, name: str) -> tuple[Any, ...]:
        import hashlib
        import importlib.metadata
        import importlib.util
        from pathlib import Path

        versions: dict[str, str | None] = {}
        for package in ("raycurv", "torch"):
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = None
        source = hashlib.blake2b(digest_size=8)
        try:
            spec = importlib.util.find_spec("raycurv")
        except ImportError:
            spec = None
        if spec is None or not spec.submodule_search_locations:
            versions["raycurv"] = None
        else:
            # Of a submitted job's own package there is no version.
            versions["raycurv"] = versions["raycurv"] or "unknown"
            root = Path(spec.submodule_search_locations[0])
            for path in sorted(root.rglob("*.py")):
                source.update(str(path.relative_to(root)).encode() + path.read_bytes())
        read, failure = None, ""
        if directory:
            try:
                read = Path(directory, "driver").read_text()
                Path(directory, name).write_text(name)
            except OSError as error:
                failure = f"{type(error).__name__}: {error}"
        return versions, source.hexdigest(), read, failure

    return probe
