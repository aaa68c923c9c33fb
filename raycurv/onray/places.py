"""Where actors live: a placement group with the stages of a replica packed, the replicas spread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raycurv.errors import RaycurvError
from raycurv.onray.connection import nodes, supply

# Between two looks at whether there is room by now.
_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Demand:
    """What one stage's actor reserves.

    Attributes:
        cpus: cores, a fraction where actors share one.
        gpus: likewise; eigendecompositions, which run while stages wait, have half of it.
    """

    cpus: float
    gpus: float

    def times(self, count: int) -> dict[str, float]:
        """A bundle for so many actors."""
        bundle = {"CPU": _up(self.cpus * count), "GPU": _up(self.gpus * count)}
        return {what: amount for what, amount in bundle.items() if amount}


def demand_of(actors: int, cpus: float | None, gpu: bool, own: bool) -> Demand:
    """What each of so many actors reserves.

    Args:
        actors: resident stages x replicas.
        cpus: what the settings say; ``None`` for one core, or a part of one where a Ray of the
            job's own has fewer cores than there are actors.
        gpu: whether stages compute on GPUs: each has one, or its share of one.
        own: whether the cluster is the job's own.
    """
    there = nodes()
    if cpus is None:
        cores = sum(node.cpus for node in there)
        cpus = min(1.0, math.floor(1000 * cores / actors) / 1000) if own else 1.0
    gpus = sum(node.gpus for node in there)
    share = 1.0 / math.ceil(actors / gpus) if gpu and gpus else float(gpu)
    return Demand(cpus, share)


class Places:
    """The bundles of all actors: one a replica where nodes have room for all of its stages, else
    one an actor.

    Args:
        wait_seconds: for room, before it is an error.
        say: is told when there is none yet.
    """

    def __init__(
        self,
        replicas: int,
        stages: int,
        demand: Demand,
        wait_seconds: float,
        say: Callable[[str], None],
    ) -> None:
        self._demand, self._stages, self._replicas = demand, stages, replicas
        self._wait_seconds, self._say = wait_seconds, say
        whole = demand.times(stages)
        there = [{"CPU": node.cpus, "GPU": node.gpus} for node in nodes()]
        room = sum(int(min(has[what] / need for what, need in whole.items())) for has in there)
        self._packed = room >= replicas
        apart = [demand.times(1)] * (replicas * stages)
        self._bundles = [whole] * replicas if self._packed else apart
        strategy = "SPREAD" if self._packed else "PACK"
        self._group: PlacementGroup = placement_group(self._bundles, strategy=strategy)
        try:
            self.wait()
        except BaseException:
            # Whoever asked has not got this yet, to remove it.
            self.remove()
            raise

    def wait(self) -> None:
        """Wait until every bundle has a node; a RaycurvError of demand and supply if none has room
        within the time."""
        until = time.monotonic() + self._wait_seconds
        announced = False
        while not self._group.wait(timeout_seconds=_LOOK_SECONDS) or self._unplaced():
            if time.monotonic() > until:
                raise self._no_room()
            if not announced and until - time.monotonic() < self._wait_seconds - 2:
                self._say(f"waiting for room: {self.demanded()}; there is {supply()}")
                announced = True
            time.sleep(_LOOK_SECONDS)

    def options(self, replica: int, stage: int) -> dict[str, Any]:
        """Ray's options of a stage's actor."""
        bundle = replica if self._packed else replica * self._stages + stage
        return self._in(bundle, self._demand.cpus)

    def cores(self) -> dict[str, int]:
        """Node -> cores of it that are reserved for actors, at least one."""
        found: dict[str, float] = {}
        for number, node in self._nodes().items():
            found[node] = found.get(node, 0.0) + self._bundles[number].get("CPU", 0.0)
        return {node: max(1, int(cores + 0.01)) for node, cores in found.items()}

    def gpu_tasks(self) -> list[tuple[str, dict[str, Any]]]:
        """Where tasks find the other half of the actors' GPUs: a node, and Ray's options."""
        if not self._demand.gpus:
            return []
        found = []
        for number, node in self._nodes().items():
            count = round(self._bundles[number]["GPU"] / self._demand.gpus)
            found += [(node, self._in(number, 0))] * count
        return found

    def demanded(self) -> str:
        """The demand, as an error shows it."""
        one = self._demand.times(1)
        each = " and ".join(f"{amount:g} {what}" for what, amount in one.items()) or "no resources"
        return f"{self._replicas} x {self._stages} stages of {each} each"

    def remove(self) -> None:
        """Give the bundles back to the cluster."""
        remove_placement_group(self._group)

    def _in(self, bundle: int, cpus: float) -> dict[str, Any]:
        """Ray's options of what runs in a bundle, with half of an actor's GPU."""
        strategy = PlacementGroupSchedulingStrategy(self._group, bundle)
        gpus = self._demand.gpus / 2
        return {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": strategy}

    def _nodes(self) -> dict[int, str]:
        """Bundle -> the node that it has, of those that have one."""
        placed = placement_group_table(self._group)["bundles_to_node_id"]
        return {int(number): node for number, node in placed.items() if node}

    def _unplaced(self) -> bool:
        alive = {node.id for node in nodes()}
        there = self._nodes()
        return len(there) < len(self._bundles) or not set(there.values()) <= alive

    def _no_room(self) -> RaycurvError:
        return RaycurvError(
            f"the cluster at {ray.get_runtime_context().gcs_address}",
            f"room for {self.demanded()} within {self._wait_seconds:g} s",
            supply(),
            "Add nodes, or ask for fewer --stages, --replicas or --cpus-per-stage; then run the "
            "same command again: it goes on from what is there.",
        )


def _up(amount: float) -> float:
    # Ray counts resources in units of 0.0001; a sum of fractions must not come to a hair more.
    return math.ceil(amount * 1000 - 1e-6) / 1000
