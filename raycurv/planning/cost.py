"""What a step of a fit takes: declared beside the buffers that cause it, and added up here.

A pass has the costs of the step that leads it and of those that ride on it. Sizes are bytes; axis
letters as in :mod:`raycurv.planning.shapes`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from raycurv.planning.moments import Bytes, Moment, larger, running, weights_of
from raycurv.planning.shapes import DataShape, Group, Recipe, StageShape


class StepCost:
    """What a step takes; the defaults are those of a step that takes nothing.

    Attributes:
        phase: its name in a plan, as the job's progress shows it.
    """

    phase: ClassVar[str] = ""

    def files(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        """Bytes of the results that stay at the end of the fit."""
        return 0

    def scored(self, group: Group, recipe: Recipe) -> int:
        """Bytes of the results that a scoring reads."""
        return 0


class TaskCost(StepCost, ABC):
    """What a step takes that makes its results by a task for each factor."""

    @abstractmethod
    def memory(self, tiles: Sequence[int], store_dtype: torch.dtype) -> int:
        """Bytes of the task for a factor with these tiles."""

    @abstractmethod
    def flops(self, tiles: Sequence[int]) -> float:
        """FLOPs of that task."""

    def read(self, group: Group, recipe: Recipe) -> int:
        """Bytes of the files that the tasks read."""
        return 0

    def most(self, group: Group, recipe: Recipe) -> int:
        """Bytes of what the tasks read and make, at most: a file goes when what is made of it is
        there."""
        return 0


class PassCost(StepCost):
    """What a step takes of a pass that gathers for it.

    Attributes:
        writing_name: of the moment in which results are written.
        rides: whether it shares the first pass that another step leads.
        differentiates: whether a pass that it leads goes back through the stages.
    """

    writing_name: ClassVar[str] = ""
    rides: ClassVar[bool] = False
    differentiates: ClassVar[bool] = True

    def held(self, stage: StageShape, recipe: Recipe, data: DataShape) -> Bytes:
        """What a stage holds from the beginning of the pass to its end."""
        return {}

    def passing(self, stage: StageShape, recipe: Recipe, data: DataShape) -> Bytes:
        """What exists while a microbatch is gathered."""
        return {}

    def writing(self, stage: StageShape, recipe: Recipe) -> Bytes:
        """What exists while a result is written."""
        return {}

    def flops(self, stage: StageShape, recipe: Recipe, data: DataShape) -> float:
        """FLOPs of gathering all data."""
        return 0.0

    def written(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        """Bytes of the results when the pass ends."""
        return self.files(group, recipe, data)

    def read(self, group: Group, recipe: Recipe) -> int:
        """Bytes of the files that stages read when the pass begins."""
        return 0

    def commit(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        """Bytes of its sums in a commit."""
        return 0

    def rows(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        """Bytes of what waits for other groups of stages."""
        return 0


@dataclass(frozen=True)
class PassPlan:
    """A pass of a fit: the step that leads it, those that ride on it, and its settings.

    Attributes:
        costs: of these steps, the leader's first.
        recipe: of the job, as far as it concerns this pass.
    """

    costs: tuple[PassCost, ...]
    recipe: Recipe

    @property
    def leader(self) -> PassCost:
        """The step that the phase is named for."""
        return self.costs[0]

    def moments(self, stage: StageShape, data: DataShape) -> tuple[Moment, ...]:
        """The moments at which a stage may hold most."""
        held, passing = weights_of(stage), dict[str, int]()
        for cost in self.costs:
            held |= cost.held(stage, self.recipe, data)
            passing = larger(passing, cost.passing(stage, self.recipe, data))
        writing = [(cost, cost.writing(stage, self.recipe)) for cost in self.costs]
        return (
            *running(stage, self.recipe, data, held, passing),
            *(Moment(cost.writing_name, held, found) for cost, found in writing if found),
        )

    def flops(self, stage: StageShape, data: DataShape) -> float:
        """FLOPs of what is gathered."""
        return sum(cost.flops(stage, self.recipe, data) for cost in self.costs)

    def written(self, group: Group, data: DataShape) -> int:
        """Bytes of the results when the pass ends."""
        return sum(cost.written(group, self.recipe, data) for cost in self.costs)

    def files(self, group: Group, data: DataShape) -> int:
        """Bytes of the results that stay at the end of the fit."""
        return sum(cost.files(group, self.recipe, data) for cost in self.costs)

    def read(self, group: Group) -> int:
        """Bytes of the files that stages read when the pass begins."""
        return sum(cost.read(group, self.recipe) for cost in self.costs)

    def commit(self, group: Group, data: DataShape) -> int:
        """Bytes of a commit."""
        return sum(cost.commit(group, self.recipe, data) for cost in self.costs)


def phases_of(
    costs: Sequence[StepCost], recipe: Recipe, groups: int
) -> Iterator[PassPlan | TaskCost]:
    """The passes and tasks of a fit, in order.

    Args:
        costs: of its steps.
        recipe: of the job.
        groups: how many groups of stages there are.
    """
    riders = [c for c in costs if isinstance(c, PassCost) and c.rides]
    leaders = [c for c in costs if c not in riders] or riders[:1]
    for cost in leaders:
        if isinstance(cost, TaskCost):
            yield cost
        elif isinstance(cost, PassCost):
            yield PassPlan((cost, *(r for r in riders if r is not cost)), recipe)
            # What rides on the first pass is not gathered again; but the passes of a sweep share
            # the spooled gradients, those of the data's own labels with them.
            riders, recipe = [], replace(recipe, gradients=False, own=recipe.own and groups > 1)
