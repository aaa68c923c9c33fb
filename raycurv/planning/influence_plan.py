"""The phases of a scoring and what each takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from raycurv.planning import disk, flops
from raycurv.planning import moments as memory
from raycurv.planning.cost import StepCost
from raycurv.planning.job import Job
from raycurv.planning.plan import Phase, Plan
from raycurv.planning.shapes import DataShape

QUERIES, SCORES = "queries: IHVPs", "scores"


def plan_influence(
    job: Job, queries: DataShape, train: DataShape | None, costs: Sequence[StepCost]
) -> Plan:
    """What a scoring takes; disk is that of its own directory, the fit's beside it.

    Queries that do not fit together take several passes over the training examples.

    Args:
        job: what decides it.
        queries: the queries.
        train: the training examples; ``None`` where IHVPs alone are wanted.
        costs: of the fit's steps, whose files are read.
    """
    recipe, stages, groups = job.recipe, job.stages, job.groups
    together = min(memory.queries_at_once(stages, recipe), queries.examples)
    passes = -(-queries.examples // together)
    of_fit = sum(cost.scored(stages, recipe) for cost in costs)
    held = disk.products(stages, recipe, queries.examples if recipe.ihvp else together)
    tokens = disk.TOKEN * (queries.tokens + (0 if train is None else train.tokens))
    spooled = job.most_spooled(queries) + (0 if train is None else job.most_spooled(train))
    here = 0 if job.spool_apart else spooled
    weights = sum(stage.weights for stage in stages)

    whole = queries.batch_examples * queries.batch_positions * max(s.vocabulary for s in stages)
    chunk = max(whole, recipe.logits_chunk) if recipe.whole_queries else recipe.logits_chunk
    asked = replace(recipe, logits_chunk=chunk)
    place = job.resident(lambda s: memory.query_products(s, asked, queries, together), queries)
    model = 2 * sum(flops.forward(stage, queries) for stage in stages)
    other = sum(flops.query_products(stage, recipe, queries) for stage in stages)
    stored = passes * (weights * (1 + (len(groups) > 1)) + of_fit) + held + 2 * spooled
    phases = [
        Phase(
            QUERIES,
            place.peak,
            place.node,
            place.gpu,
            tokens + here + held,
            job.moved(queries, True),
            stored,
            model + other,
            seconds=job.seconds(model, other, stored),
        )
    ]
    kept = held if recipe.ihvp else 0
    if train is not None:
        rows = disk.SCORE * queries.examples * train.examples
        place = job.resident(lambda s: memory.scores(s, recipe, train, together), train)
        model = passes * 2 * sum(flops.forward(stage, train) for stage in stages)
        other = passes * sum(flops.scores(stage, recipe, train, together) for stage in stages)
        stored = passes * held + rows + 2 * passes * job.most_spooled(train)
        phases.append(
            Phase(
                SCORES,
                place.peak,
                place.node,
                place.gpu,
                # IHVPs that are asked for are joined from the passes' own files.
                tokens + max(here + held, 2 * held if recipe.ihvp else 0) + rows,
                passes * job.moved(train, True),
                stored,
                model + other,
                seconds=job.seconds(model, other, stored),
            )
        )
        kept += rows
    return Plan("influence", tuple(phases), kept, spooled if job.spool_apart else 0)
