"""A job before it runs: shapes, settings and places, and how they add up to memory and time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from raycurv.planning.arrangement import Arrangement, Moments, Peak, process_peak, stage_peaks
from raycurv.planning.cost import TaskCost
from raycurv.planning.rates import Rates
from raycurv.planning.shapes import DataShape, Group, Recipe, StageShape, squares
from raycurv.stages.dealing import makespan

# Bytes of a token in Parquet, int32, which zstd makes smaller; a drawn label likewise.
TOKEN = 4
# The head's daemons and the workers that Ray starts before there is work.
RAY_DAEMONS = 450 * 1000**2
# What a process takes of a GPU before its first tensor: context, and libraries' workspaces.
GPU_CONTEXT = 1000 * 1000**2


@dataclass(frozen=True)
class Place:
    """Memory of one phase: the largest process, the fullest node, the fullest GPU."""

    peak: Peak
    node: int
    gpu: int = 0


@dataclass(frozen=True)
class Job:
    """Everything that a plan is made from.

    Attributes:
        stages: of the model.
        recipe: settings that decide sizes.
        arrangement: who runs where.
        base: bytes of a process before it has a stage.
        rates: of a node (a GPU); ``None`` for a plan without times.
        commit_seconds: a pass that is expected to take longer writes commits.
        spool_apart: the spool has a disk of its own.
    """

    stages: tuple[StageShape, ...]
    recipe: Recipe
    arrangement: Arrangement
    base: int
    rates: Rates | None = None
    commit_seconds: float = 60.0
    spool_apart: bool = False

    @property
    def groups(self) -> list[Group]:
        """Runs of stages that are resident together."""
        return self.arrangement.groups(self.stages)

    # Memory

    def resident(self, moments: Moments, data: DataShape) -> Place:
        """A phase in which the stages work."""
        return most(self._resident(group, moments, data) for group in self.groups)

    def _resident(self, group: Group, moments: Moments, data: DataShape) -> Place:
        here = self.arrangement
        microbatches = -(-data.microbatches // here.replicas)
        if not here.ray:
            peak = process_peak(group, moments, microbatches)
            if here.gpus:
                return Place(peak, self.base, peak.bytes + GPU_CONTEXT)
            peak = self._with_base(peak)
            return Place(peak, peak.bytes)
        peaks = stage_peaks(group, moments, microbatches) * here.replicas
        beside = self._beside(group, data)
        if here.gpus:
            # What a stage writes passes through its process, a factor or block at a time.
            hosts = -(-len(peaks) // here.nodes) * (self.base + self._largest_written(group))
            peak = max(peaks, key=lambda p: p.bytes)
            gpu = self._fullest([p.bytes + GPU_CONTEXT for p in peaks], here.gpus)
            return Place(peak, hosts + beside, gpu)
        peaks = [self._with_base(p) for p in peaks]
        node = self._fullest([p.bytes for p in peaks], here.nodes)
        return Place(max(peaks, key=lambda p: p.bytes), node + beside)

    def tasks(self, cost: TaskCost) -> Place:
        """A phase of a task for each factor, beside resident stages."""
        return most(self._tasks(cost, group) for group in self.groups)

    def _tasks(self, cost: TaskCost, group: Group) -> Place:
        here, recipe = self.arrangement, self.recipe
        factors = [found for s in group for found in s.tiles(recipe.max_factor_dim)]
        tasks = [m for t, n in factors for m in [cost.memory(t, recipe.store_dtype)] * n]
        tasks.sort(reverse=True)
        weights = sum(stage.weights for stage in group)
        # A group may be layers without weights alone, and have nothing to decompose.
        largest = max(tasks, default=0)
        parts = {"this process": self.base, "a factor and its decomposition": largest}
        peak = Peak(group[0].index, "decomposition", parts)
        gpu = 0
        if here.gpus:
            # The matrix, its eigenvectors and the workspace of one tile a task.
            tile = max((max(t) for t, _ in factors), default=0) ** 2
            gpu = GPU_CONTEXT + 32 * tile + -(-weights // here.gpus)
            weights = 0
        if not here.ray:
            peak = replace(peak, parts=parts | ({"weights": weights} if weights else {}))
            return Place(peak, peak.bytes, gpu)
        actors = -(-len(group) * here.replicas // here.nodes)
        waiting = -(-weights * here.replicas // here.nodes) + actors * self.base
        at_once = tasks[: here.cores * here.nodes : here.nodes]
        node = waiting + sum(at_once) + len(at_once) * self.base
        return Place(peak, node + self._beside(group, None), gpu)

    def _with_base(self, peak: Peak) -> Peak:
        return replace(peak, parts={"this process": self.base, **peak.parts})

    def _beside(self, group: Group, data: DataShape | None) -> int:
        """The driver, Ray's daemons, and what lies in the object store of the fullest node."""
        beside = self.base + RAY_DAEMONS
        if data is not None:
            hidden = data.rows * max(s.width for s in group) * self.recipe.dtype.itemsize
            beside += 2 * (len(group) - 1) * hidden * (1 + self.recipe.back)
        return beside

    def _largest_written(self, group: Group) -> int:
        sizes = [
            8 * squares(t) for s in group for t in s.factors(self.recipe.max_factor_dim).values()
        ]
        sums = (4 if self.recipe.own else 2) if self.recipe.gradients else 0
        written = max(8, self.recipe.computed * sums)
        sizes += [written * b.d_in * b.d_out for s in group for b in s.blocks]
        return max(sizes, default=0)

    @staticmethod
    def _fullest(sizes: Sequence[int], places: int) -> int:
        """Processes are dealt out evenly; the fullest place has the largest of every round."""
        return sum(sorted(sizes, reverse=True)[::places])

    # Bytes and time

    def boundary(self, data: DataShape) -> int:
        """Bytes of the hidden states of all data between two stages."""
        return data.positions * self.recipe.dtype.itemsize * max(s.width for s in self.stages)

    def moved(self, data: DataShape, backward: bool) -> int:
        """Bytes between stages in a pass: hidden states forward, their gradients backward."""
        return (
            (len(self.stages) - 1)
            * self.boundary(data)
            * (1 + (self.recipe.back if backward else 0))
        )

    def seconds(self, model: float, other: float = 0.0, stored: int = 0) -> float | None:
        """Of a pass with so many FLOPs of the model's products and of others."""
        rates, here = self.rates, self.arrangement
        if rates is None:
            return None
        computed = model / rates.model + other / rates.covariance
        # Stages in a pipeline work side by side.
        most_at_once = max(map(len, self.groups)) * here.replicas
        side_by_side = min(here.gpus or (here.nodes if here.ray else 1), most_at_once)
        return computed / side_by_side + stored / min(rates.read, rates.write) / here.nodes

    def task_flops(self, cost: TaskCost, stages: Group) -> list[float]:
        """FLOPs of every task, largest first."""
        factors = (found for s in stages for found in s.tiles(self.recipe.max_factor_dim))
        return sorted((f for t, n in factors for f in [cost.flops(t)] * n), reverse=True)

    def task_seconds(self, cost: TaskCost) -> float | None:
        """Of all tasks, dealt out longest first."""
        rates, here = self.rates, self.arrangement
        if rates is None:
            return None
        at_once = here.gpus or (here.cores * here.nodes if here.ray else 1)
        ends = (makespan(self.task_flops(cost, group), at_once) for group in self.groups)
        return sum(end / rates.eigh for end in ends)

    def spool(self, data: DataShape, group: int) -> int:
        """Bytes of the spool at most while a group is resident on the way back."""
        groups = len(self.groups)
        if groups == 1:
            return 0
        # Hidden states that enter the group and those before it, the gradient that it reads, and
        # the one that it writes.
        kept = group + self.recipe.back * ((group < groups - 1) + (group > 0))
        return kept * self.boundary(data)

    def most_spooled(self, data: DataShape) -> int:
        """Bytes of the spool at most."""
        return max(self.spool(data, group) for group in range(len(self.groups)))


def most(places: Iterable[Place]) -> Place:
    """Of several groups of stages the one that takes most, place by place."""
    found = list(places)
    return Place(
        max(found, key=lambda place: place.peak.bytes).peak,
        max(place.node for place in found),
        max(place.gpu for place in found),
    )
