"""The phases of a fit, group of stages by group, and what each takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from raycurv.planning import moments as memory
from raycurv.planning.cost import PassPlan, StepCost, TaskCost, phases_of
from raycurv.planning.job import TOKEN, Job, Place
from raycurv.planning.plan import Phase, Plan
from raycurv.planning.shapes import DataShape, Group

_LOADING, _FORWARD = "loading", "forward"


def plan_fit(job: Job, data: DataShape, costs: Sequence[StepCost]) -> Plan:
    """What a fit takes, phase by phase.

    Args:
        job: what decides it.
        data: the examples.
        costs: of the steps of its method.
    """
    recipe, stages = job.recipe, job.stages
    on_disk, kept = _disk(job, data, costs)
    weights = sum(stage.weights for stage in stages)
    through = sum(stage.forward_flops(data) for stage in stages)
    spooled = (len(job.groups) - 1) * job.boundary(data)
    place = job.resident(lambda s: memory.loading(s, recipe), data)
    phases = [_phase(_LOADING, place, stored=weights, seconds=job.seconds(0.0, 0.0, weights))]
    if len(job.groups) > 1:
        place = job.resident(lambda s: memory.forward_only(s, recipe, data, False), data)
        stored = spooled + weights
        seconds = job.seconds(through, 0.0, stored)
        phases.append(_phase(_FORWARD, place, stored=stored, flops=through, seconds=seconds))
    for each in phases_of(costs, recipe, len(job.groups)):
        if isinstance(each, TaskCost):
            eigh = job.task_flops(each, stages)
            phases.append(
                _phase(
                    each.phase,
                    job.tasks(each),
                    stored=each.read(stages, recipe) + each.files(stages, recipe, data),
                    eigh_flops=sum(eigh),
                    seconds=job.task_seconds(each),
                )
            )
        elif each.leader.differentiates:
            work = replace(job, recipe=each.recipe)
            model = through + sum(each.recipe.back * s.forward_flops(data) for s in stages)
            gathered = sum(each.flops(stage, data) for stage in stages)
            stored = each.read(stages) + each.written(stages, data)
            stored += spooled * (1 + each.recipe.back)
            phases.append(
                _phase(
                    each.leader.phase,
                    work.resident(lambda s, p=each: p.moments(s, data), data),  # type: ignore[misc]
                    moved=work.moved(data, True),
                    stored=stored,
                    flops=model + gathered,
                    seconds=work.seconds(model, gathered, stored),
                )
            )
        else:
            place = job.resident(lambda s: memory.forward_only(s, recipe, data, True), data)
            moved, seconds = job.moved(data, False), job.seconds(through)
            phases.append(
                _phase(each.leader.phase, place, moved=moved, flops=through, seconds=seconds)
            )
    phases = [replace(phase, disk=on_disk[phase.name]) for phase in phases]
    return Plan("fit", tuple(phases), kept, job.most_spooled(data) if job.spool_apart else 0)


def _phase(
    name: str,
    place: Place,
    moved: int = 0,
    stored: int = 0,
    flops: float = 0.0,
    eigh_flops: float = 0.0,
    seconds: float | None = None,
) -> Phase:
    return Phase(
        name, place.peak, place.node, place.gpu, 0, moved, stored, flops, eigh_flops, seconds
    )


def _disk(job: Job, data: DataShape, costs: Sequence[StepCost]) -> tuple[dict[str, int], int]:
    """Phase -> bytes of the run's files at most; and bytes at the end.

    Groups go from the last to the first: spools shrink while bases and Λ grow.
    """
    recipe, groups = job.recipe, job.groups
    most: dict[str, int] = {}

    def at(phase: str, size: int) -> None:
        most[phase] = max(most.get(phase, 0), size)

    kept = 2 * TOKEN * data.tokens
    at(_LOADING, kept)
    at(_FORWARD, kept + (0 if job.spool_apart else (len(job.groups) - 1) * job.boundary(data)))
    for number in range(len(groups) - 1, -1, -1):
        group = groups[number]
        beside = 0 if job.spool_apart else job.spool(data, number)
        for each in phases_of(costs, recipe, len(groups)):
            if isinstance(each, TaskCost):
                at(each.phase, kept + beside + each.most(group, recipe))
                kept += each.files(group, recipe, data)
                continue
            beside += sum(cost.rows(group, each.recipe, data) for cost in each.costs)
            commit = _commit(job, data, group, each)
            # The old commit goes when the new one is whole; the last one when the results are.
            results = each.written(group, data)
            at(each.leader.phase, kept + beside + max(2 * commit, commit + results))
            kept += each.files(group, data)
    return most, kept


def _commit(job: Job, data: DataShape, group: Group, each: PassPlan) -> int:
    """Bytes of a commit of a pass over a group; 0 for a pass too short to write one."""
    model = sum(s.forward_flops(data) + each.recipe.back * s.forward_flops(data) for s in group)
    seconds = job.seconds(model, sum(each.leader.flops(s, each.recipe, data) for s in group))
    if seconds is None or seconds <= job.commit_seconds:
        return 0
    return each.commit(group, data)
