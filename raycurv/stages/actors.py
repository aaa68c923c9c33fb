"""Ray at the edge: stages as actors, tasks on whatever is idle."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from raycurv.errors import RaycurvError, UserError
from raycurv.stages.memory import give_back, give_back_at_once
from raycurv.stages.stage import Stage, StageSpec
from raycurv.stages.transport import pack, unpack

_CONNECT_SECONDS = 5.0
_PLACE_SECONDS = 300.0


class StageActor:
    """A stage behind the transport: what comes in is unpacked, what goes out is packed."""

    def __init__(self) -> None:
        self._stage: Stage | None = None

    def ready(self) -> None:
        """Answers once the actor has a place."""

    def build(self, spec: StageSpec) -> int:
        """Build the stage, once the one that was there has gone; gives the process id.

        Not in the constructor: of what that raises, Ray hands on the text alone.
        """
        self.drop()
        self._stage = Stage(spec)
        return os.getpid()

    def drop(self) -> None:
        """Let the stage go, and its memory."""
        if self._stage is not None:
            self._stage = None
            give_back()

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the stage."""
        return pack(getattr(self._stage, method)(*(unpack(arg) for arg in args)))


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
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    quiet = {"logging_level": "warning", "log_to_driver": False}
    if address == "local":
        ray.init(address="local", include_dashboard=False, **quiet)
        return True
    if address != "auto" and "://" not in address:
        _check_answers(address)
    try:
        ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise UserError(
            f"--address {address}",
            "a running Ray cluster",
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


class OnRay:
    """Stages as actors and functions as tasks of a Ray cluster.

    An actor dies for good: its sums would be lost, so Ray must not restart it. What was committed
    lies in the run directory.

    Args:
        address: see :func:`connect`.
    """

    def __init__(self, address: str | None) -> None:
        self._owner = connect(address)
        self._actors: list[Any] = []
        self._stages = 0

    @property
    def stages(self) -> int:
        return self._stages

    def start(self, specs: Sequence[StageSpec]) -> None:
        if len(specs) > len(self._actors):
            self.stop()
            self._place(specs)
        # Actors stay from one group of stages to the next: a process takes seconds to start.
        for handle in [actor.drop.remote() for actor in self._actors]:
            self.get(handle)
        actors = self._actors[: len(specs)]
        built = [actor.build.remote(spec) for actor, spec in zip(actors, specs, strict=True)]
        for handle in built:
            self.get(handle)
        self._stages = len(specs)

    def _place(self, specs: Sequence[StageSpec]) -> None:
        """An actor for each stage, with a place in the cluster."""
        supply = ray.cluster_resources()
        gpus = int(supply.get("GPU", 0))
        # Stages that share a GPU share it evenly, or one of them would find no place.
        share = 1.0 / -(-len(specs) // gpus) if gpus else 0.0
        # Actors reserve no CPU: they and the eigendecompositions take turns, never both at once.
        remote = ray.remote(
            num_cpus=0,
            num_gpus=share if specs[0].device.startswith("cuda") else 0,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )(StageActor)
        self._actors = [remote.remote() for _ in specs]
        alive = [actor.ready.remote() for actor in self._actors]
        _, waiting = ray.wait(alive, num_returns=len(alive), timeout=_PLACE_SECONDS)
        if waiting:
            demand = f"{len(specs)} stages of {share:g} GPU" if share else f"{len(specs)} stages"
            raise RaycurvError(
                f"{len(waiting)} of {len(specs)} stages",
                f"a place for each within {_PLACE_SECONDS:g} s ({demand})",
                f"none; free in the cluster: {ray.available_resources()}",
                "Free resources, add nodes, or ask for fewer --stages; then run the command again.",
            )

    def call(self, stage: int, method: str, *args: Any, returns: int = 1) -> Any:
        packed = tuple(a if isinstance(a, ray.ObjectRef) else pack(a) for a in args)
        handle = self._actors[stage].call.options(num_returns=returns).remote(method, *packed)
        return tuple(handle) if returns > 1 else handle

    def put(self, value: Any) -> Any:
        return ray.put(pack(value))

    def get(self, handle: Any) -> Any:
        try:
            return unpack(ray.get(handle))
        except RayTaskError as error:
            if isinstance(error.cause, RaycurvError):
                raise error.cause from None
            raise
        except RayActorError as error:
            raise RaycurvError(
                "a stage's actor",
                "to live to the end of the pass",
                f"it died ({error})",
                "Run the same command again: it goes on from the last commit.",
            ) from error

    def map(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, Any]]:
        # One core each: as many at once as there are cores beats one at a time on all of them.
        remote = ray.remote(num_cpus=1, max_retries=3)(_single_threaded)
        waiting = {remote.remote(function, *args): i for i, args in enumerate(arguments)}
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1)
            yield waiting.pop(done[0]), self.get(done[0])

    def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._stages = [], 0

    def close(self) -> None:
        self.stop()
        if self._owner:
            ray.shutdown()


def _single_threaded(function: Callable[..., Any], *args: Any) -> Any:
    torch.set_num_threads(1)
    give_back_at_once()
    return function(*args)


def cluster_cores() -> int:
    """CPU cores of the cluster."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def smallest_node_cores() -> int:
    """CPU cores of the node that has the fewest (of those that have any)."""
    cores = [int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if n["Alive"]]
    return min((c for c in cores if c), default=1)


def cluster_gpus() -> int:
    """GPUs of the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))
