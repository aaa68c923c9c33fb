"""Who runs where: stages in groups that are resident together, in processes, on nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raycurv.planning.moments import Bytes, Moment
from raycurv.planning.shapes import StageShape
from raycurv.stages.dealing import group_stages

Moments = Callable[[StageShape], Sequence[Moment]]


@dataclass(frozen=True)
class Arrangement:
    """How a job is spread.

    Attributes:
        homes: stages that are resident at once; ``None`` for all of them.
        replicas: copies of every stage, each on its own part of the data.
        ray: stages are actors, and eigendecompositions tasks; otherwise one process does it all.
        nodes: machines that share the resident stages evenly.
        cores: of a node: so many eigendecompositions run at once on it.
        gpus: of all nodes together; 0 where stages compute on CPUs.
    """

    homes: int | None = None
    replicas: int = 1
    ray: bool = True
    nodes: int = 1
    cores: int = 1
    gpus: int = 0

    def groups(self, stages: Sequence[StageShape]) -> list[Sequence[StageShape]]:
        """Runs of stages that are resident together."""
        runs = group_stages(len(stages), self.homes or len(stages))
        return [stages[run.start : run.stop] for run in runs]


@dataclass(frozen=True)
class Peak:
    """The most that one process holds in a phase.

    Attributes:
        stage: the stage that it is about.
        moment: when.
        parts: bytes by what they are.
    """

    stage: int
    moment: str
    parts: Bytes

    @property
    def bytes(self) -> int:
        """In all."""
        return sum(self.parts.values())


def stage_peaks(group: Sequence[StageShape], moments: Moments, microbatches: int) -> list[Peak]:
    """The peak of each stage of a group, each in a process of its own."""
    peaks = []
    for place, stage in enumerate(group):
        found = []
        for moment in moments(stage):
            graphs = 0
            if moment.graphs:
                # One forward, one backward: so many microbatches are alive in a stage at most.
                graphs = min(len(group) - place, microbatches) - moment.open_below
            parts = _add(moment.held, {"open graphs": max(0, graphs) * stage.graph}, moment.passing)
            found.append(Peak(stage.index, moment.name, parts))
        peaks.append(max(found, key=lambda peak: peak.bytes))
    return peaks


def process_peak(group: Sequence[StageShape], moments: Moments, microbatches: int) -> Peak:
    """The peak of a group whose stages take turns in one process."""
    found = []
    by_stage = [moments(stage) for stage in group]
    for number in range(len(by_stage[0])):
        held = _add(*(of[number].held for of in by_stage))
        for place, stage in enumerate(group):
            moment = by_stage[place][number]
            graphs = 0
            if moment.graphs:
                for other, shape in enumerate(group):
                    # Stages behind this one have finished the microbatch that it works on.
                    most = min(len(group) - other - (other > place), microbatches)
                    graphs += max(0, most - moment.open_below * (other == place)) * shape.graph
            parts = _add(held, {"open graphs": graphs}, moment.passing)
            found.append(Peak(stage.index, moment.name, parts))
    return max(found, key=lambda peak: peak.bytes)


def _add(*parts: Bytes) -> Bytes:
    total: Bytes = {}
    for some in parts:
        for name, size in some.items():
            if size:
                total[name] = total.get(name, 0) + size
    return total
