"""The phases of a fit, group of stages by group, and what each takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from raycurv.planning import disk, flops
from raycurv.planning import moments as memory
from raycurv.planning.job import Group, Job, Place
from raycurv.planning.plan import Phase, Plan
from raycurv.planning.shapes import DataShape

FORWARD = "forward"
FIRST, EIGEN, SECOND, ROWS, LOSSES = (
    "first pass: A and G",
    "eigendecompositions",
    "second pass: Λ",
    "gradients",
    "losses",
)
GRADIENTS = "gradient statistics"


def plan_fit(job: Job, data: DataShape) -> Plan:
    """What a fit takes, phase by phase."""
    recipe, stages = job.recipe, job.stages
    on_disk, kept = _disk(job, data)
    weights = sum(stage.weights for stage in stages)
    through = sum(flops.forward(stage, data) for stage in stages)

    def passed(work: Job, *gathering: Callable[..., float]) -> tuple[float, float]:
        """FLOPs of a pass: forward and backward, and of what it gathers."""
        back = sum(flops.backward(stage, work.recipe, data) for stage in stages)
        sums = (flops.gradient_statistics, *gathering)
        gathered = sum(f(stage, work.recipe, data) for f in sums for stage in stages)
        return through + back, gathered

    def back_and_forth(
        name: str, work: Job, place: Place, model: float, gathered: float, stored: int
    ) -> Phase:
        """A pass: all data forward and backward."""
        return replace(
            _phase(name, place),
            moved=work.moved(data, True),
            stored=stored,
            flops=model + gathered,
            seconds=work.seconds(model, gathered, stored),
        )

    spooled = _spooled(job, data)
    phases = [_phase("loading", job.resident(lambda s: memory.loading(s, recipe), data))]
    phases[0] = replace(phases[0], stored=weights, seconds=job.seconds(0.0, 0.0, weights))
    if len(job.groups) > 1:
        place = job.resident(lambda s: memory.forward_only(s, recipe, data, False), data)
        phases.append(
            replace(
                _phase(FORWARD, place),
                stored=spooled + weights,
                flops=through,
                seconds=job.seconds(through, 0.0, spooled + weights),
            )
        )
    if recipe.has_factors:
        model, outer = passed(job, flops.covariance)
        place = job.resident(lambda s: memory.covariance(s, recipe, data), data)
        sums, bases = disk.factor_sums(stages, recipe), disk.eigenbases(stages, recipe)
        stored = sums + disk.gradients(stages, recipe, data) + spooled * (1 + recipe.back)
        phases.append(back_and_forth(FIRST, job, place, model, outer, stored))
        phases.append(
            replace(
                _phase(EIGEN, job.decomposing()),
                stored=sums + bases,
                eigh_flops=sum(flops.decompositions(stages, recipe)),
                seconds=job.decomposition_seconds(),
            )
        )
    if recipe.has_corrected:
        second = _second(job)
        model, rotated = passed(second, flops.gradients)
        place = second.resident(lambda s: memory.corrected(s, second.recipe, data), data)
        stored = disk.eigenbases(stages, recipe) + disk.corrected(stages, recipe)
        stored += disk.gradients(stages, second.recipe, data)
        stored += spooled * (1 + second.recipe.back)
        phases.append(back_and_forth(SECOND, second, place, model, rotated, stored))
    if recipe.method == "mfac":
        model, gathered = passed(job)
        formed = sum(flops.gradients(stage, recipe, data) for stage in stages) + gathered
        place = job.resident(lambda s: memory.rank_rows(s, recipe, data), data)
        stored = disk.rank_rows(stages, recipe) + disk.gradients(stages, recipe, data)
        stored += spooled * (1 + recipe.back)
        phases.append(back_and_forth(ROWS, job, place, model, formed, stored))
    if recipe.method == "identity" and recipe.gradients:
        model, gathered = passed(job)
        place = job.resident(lambda s: memory.gradient_statistics(s, recipe, data), data)
        stored = disk.gradients(stages, recipe, data) + spooled * (1 + recipe.back)
        phases.append(back_and_forth(GRADIENTS, job, place, model, gathered, stored))
    elif recipe.method == "identity":
        place = job.resident(lambda s: memory.forward_only(s, recipe, data, True), data)
        phases.append(
            replace(
                _phase(LOSSES, place),
                moved=job.moved(data, False),
                flops=through,
                seconds=job.seconds(through),
            )
        )
    phases = [replace(phase, disk=on_disk[phase.name]) for phase in phases]
    return Plan("fit", tuple(phases), kept, job.most_spooled(data) if job.spool_apart else 0)


def _phase(name: str, place: Place) -> Phase:
    return Phase(name, place.peak, place.node, place.gpu, 0)


def _second(job: Job) -> Job:
    """The job in its second pass: what the first one has gathered is not gathered again.

    The passes of a sweep share the spooled gradients, those of the data's own labels with them.
    """
    if not job.recipe.has_factors:
        return job
    own = job.recipe.own and len(job.groups) > 1
    return replace(job, recipe=replace(job.recipe, gradients=False, own=own))


def _spooled(job: Job, data: DataShape) -> int:
    """Bytes of hidden states that a sweep writes, once."""
    width = max(stage.width for stage in job.stages)
    return (len(job.groups) - 1) * data.positions * width * job.recipe.dtype.itemsize


def _disk(job: Job, data: DataShape) -> tuple[dict[str, int], int]:
    """Phase -> bytes of the run's files at most; and bytes at the end.

    Groups go from the last to the first: spools shrink while bases and Λ grow.
    """
    recipe, groups = job.recipe, job.groups
    most: dict[str, int] = {}

    def at(phase: str, size: int) -> None:
        most[phase] = max(most.get(phase, 0), size)

    kept = 2 * disk.TOKEN * data.tokens
    at("loading", kept)
    at(FORWARD, kept + (0 if job.spool_apart else _spooled(job, data)))
    for number in range(len(groups) - 1, -1, -1):
        group = groups[number]
        beside = 0 if job.spool_apart else job.spool(data, number)
        at(LOSSES, kept + beside)
        statistics = disk.gradients(group, recipe, data)
        beside += disk.norms(group, recipe, data)
        if recipe.method == "identity":
            commit = _commit(job, data, group, flops.gradient_statistics, disk.gradient_commit)
            at(GRADIENTS, kept + beside + max(2 * commit, commit + statistics))
            kept += statistics
        if recipe.has_factors:
            sums, bases = disk.factor_sums(group, recipe), disk.eigenbases(group, recipe)
            commit = _commit(job, data, group, flops.covariance, disk.factor_commit)
            # The old commit goes when the new one is whole; the last one when the results are.
            at(FIRST, kept + beside + max(2 * commit, commit + sums + statistics))
            kept += statistics
            stays = sums if recipe.keep_sums else 0
            # A sum goes when its basis is there.
            largest = disk.largest_basis(group, recipe)
            at(EIGEN, kept + beside + max(sums + largest, bases + stays))
            kept += bases + stays
        if recipe.has_corrected:
            lam = disk.corrected(group, recipe)
            lam += disk.gradients(group, _second(job).recipe, data)
            commit = _commit(_second(job), data, group, flops.gradients, disk.corrected_commit)
            at(SECOND, kept + beside + max(2 * commit, commit + lam))
            kept += lam
        if recipe.method == "mfac":
            rows = disk.rank_rows(group, recipe) + statistics
            commit = _commit(job, data, group, flops.gradients, disk.rows_commit)
            at(ROWS, kept + beside + max(2 * commit, commit + rows))
            kept += rows
    return most, kept


def _commit(
    job: Job,
    data: DataShape,
    group: Group,
    gathering: Callable[..., float],
    size: Callable[..., int],
) -> int:
    """Bytes of a commit of a pass over a group; 0 for a pass too short to write one."""
    recipe = job.recipe
    model = sum(flops.forward(s, data) + flops.backward(s, recipe, data) for s in group)
    other = sum(gathering(s, recipe, data) for s in group)
    seconds = job.seconds(model, other)
    if seconds is None or seconds <= job.commit_seconds:
        return 0
    return size(group, recipe, data)
