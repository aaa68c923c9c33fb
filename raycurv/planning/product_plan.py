"""What products of curvature with vectors take: a pass at a time, and the files of vectors.

    held       V, its tangents of the parameters, and the sums of products: Q times the blocks
    passing    hidden states with their tangents, results of one layer with theirs: 1 + Q times

Of a byte-level Llama of 1.9 million weights and microbatches of 2,056 tokens, 2 and 8 vectors were
measured at 982 and 1,525 MB where this says 971 and 1,607 (2026-11-30).

Axis letters as in :mod:`raycurv.planning.shapes`; Q vectors at once.
"""

from __future__ import annotations

import math
from dataclasses import replace

from raycurv.planning.job import TOKEN, Job
from raycurv.planning.moments import Moment, loading, sum_bytes, weights_of
from raycurv.planning.plan import Phase, Plan
from raycurv.planning.shapes import DataShape, Recipe, StageShape

# Results of a layer that are alive at once where tangents go forward, each as wide as the widest
# product's; and what torch's transforms and the like take once they are used.
_ALIVE, _LIBRARIES = 16, 150 * 1000**2


def plan_products(job: Job, data: DataShape) -> Plan:
    """What it takes to multiply by ``recipe.directions`` vectors at once, with
    ``recipe.vectors`` of them in files.

    Args:
        job: what decides it.
        data: the examples.
    """
    recipe, stages = job.recipe, job.stages
    # What goes back between stages is a gradient a direction.
    work = replace(job, recipe=replace(recipe, draws=recipe.directions))
    one = replace(job, recipe=replace(recipe, draws=1, own=False))
    flops = sum(stage.forward_flops(data) for stage in stages)
    passed = work.resident(lambda s: _moments(s, recipe, data), data)
    loaded = job.resident(lambda s: loading(s, recipe), data)
    kept = 2 * TOKEN * data.tokens
    vectors = recipe.computed * recipe.vectors * sum(stage.elements for stage in stages)
    # A sweep spools hidden states with their tangents, and gradients.
    spool = one.most_spooled(data) * (1 + recipe.directions)
    beside = 0 if job.spool_apart else spool
    phases = (
        Phase("loading", loaded.peak, loaded.node, loaded.gpu, kept),
        Phase(
            "products", passed.peak, passed.node, passed.gpu, kept + vectors + beside,
            moved=work.moved(data, True), stored=2 * spool,
            # A tangent takes two products of a layer, its own and the weight's; so does going back.
            flops=flops * (2 + 4 * recipe.directions),
        ),
    )  # fmt: skip
    return Plan("spectrum", phases, kept, spool if job.spool_apart else 0)


def _moments(stage: StageShape, recipe: Recipe, data: DataShape) -> tuple[Moment, ...]:
    q, item, rows = recipe.directions, recipe.dtype.itemsize, data.rows
    held = weights_of(stage) | {
        "vectors": q * recipe.computed * stage.elements,
        "tangents of weights": q * item * stage.elements,
        "sums of products": q * sum_bytes(recipe, data.microbatches) * stage.elements,
    }
    widest = max((max(b.d_in, b.d_out) for b in stage.blocks), default=stage.width)
    passing = {
        "hidden states and tangents": 2 * (1 + q) * rows * item * stage.width,
        "results of a layer and tangents": _ALIVE * (1 + q) * rows * item * widest,
        "libraries": _LIBRARIES,
        "gradient of all weights": item * stage.elements,
    }
    if stage.vocabulary:
        slices = max(1, recipe.logits_chunk // (data.batch_examples * stage.vocabulary))
        numbers = data.batch_examples * min(slices, data.batch_positions) * stage.vocabulary
        passing["logits, tangents and cotangents"] = math.ceil((3 + 2 * q) * numbers * item)
    read = {"libraries": _LIBRARIES}
    written = {"a block's products in float64": q * (8 + recipe.computed) * stage.largest_block}
    if recipe.solving is not None:
        # Six as they are read, and as many one step on.
        block = {"a solver's vectors of a block": 12 * q * recipe.computed * stage.largest_block}
        read, written = read | block, written | block
    return (
        Moment("opening", held, read),
        Moment("products", held, passing, graphs=True),
        Moment("writing products", held, written),
    )
