"""The phases of a scoring and what each takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.gradients import PIECE
from raycurv.mathematics.influence.ihvp import kept_rank, product_elements
from raycurv.mathematics.influence.scores import TOGETHER, score_through_gradients
from raycurv.planning.cost import StepCost
from raycurv.planning.job import TOKEN, Job
from raycurv.planning.moments import (
    Moment,
    bases_of,
    cast_elements,
    gradient_flops,
    gradients_of,
    running,
    weights_of,
)
from raycurv.planning.plan import Phase, Plan
from raycurv.planning.product_plan import plan_products
from raycurv.planning.shapes import DataShape, Recipe, StageShape

QUERIES, SCORES = "queries: IHVPs", "scores"
# Bytes of a number of a direction in a pass of products: its tangent, and the product's running sum
# with its wider master.
VECTOR = 16
# Vectors that a solver keeps of each query: x, r, p, s, u and w.
_VECTORS = 6
# Bytes of a score with its two ids (dictionary-coded) in Parquet.
_SCORE = 6


def plan_influence(
    job: Job,
    queries: DataShape,
    train: DataShape | None,
    costs: Sequence[StepCost],
    products: DataShape | None = None,
) -> Plan:
    """What a scoring takes; disk is that of its own directory, the fit's beside it.

    Queries that do not fit together take several passes over the training examples.

    Args:
        job: what decides it.
        queries: the queries.
        train: the training examples; ``None`` where IHVPs alone are wanted.
        costs: of the fit's steps, whose files are read.
        products: the examples that a solver's products are made of, if there is one.
    """
    recipe, stages, groups = job.recipe, job.stages, job.groups
    together = min(queries_at_once(stages, recipe), queries.examples)
    passes = -(-queries.examples // together)
    of_fit = sum(cost.scored(stages, recipe) for cost in costs)
    held = sum(
        products_bytes(stage, recipe, queries.examples if recipe.ihvp else together)
        for stage in stages
    )
    tokens = TOKEN * (queries.tokens + (0 if train is None else train.tokens))
    spooled = job.most_spooled(queries) + (0 if train is None else job.most_spooled(train))
    here = 0 if job.spool_apart else spooled
    weights = sum(stage.weights for stage in stages)

    whole = queries.batch_examples * queries.batch_positions * max(s.vocabulary for s in stages)
    chunk = max(whole, recipe.logits_chunk) if recipe.whole_queries else recipe.logits_chunk
    # What a solver begins with are whole gradients.
    rank = recipe.rank if recipe.solving is None else None
    asked = replace(recipe, logits_chunk=chunk, rank=rank)
    place = job.resident(lambda s: _query_moments(s, asked, queries, together), queries)
    model = 2 * sum(stage.forward_flops(queries) for stage in stages)
    other = sum(_query_flops(stage, recipe, queries) for stage in stages)
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
    if products is not None and recipe.solving is not None:
        phase, spool = _products(job, products, together, passes, tokens + held)
        phases.append(phase)
        spooled = max(spooled, spool)
    kept = held if recipe.ihvp else 0
    if train is not None:
        rows = _SCORE * queries.examples * train.examples
        place = job.resident(lambda s: _score_moments(s, recipe, train, together), train)
        model = passes * 2 * sum(stage.forward_flops(train) for stage in stages)
        other = passes * sum(_score_flops(stage, recipe, train, together) for stage in stages)
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


def _products(
    job: Job, data: DataShape, queries: int, passes: int, beside: int
) -> tuple[Phase, int]:
    """The steps of a solver, a pass of products each, and its vectors on disk; and its spool, on
    a disk apart."""
    recipe = job.recipe
    assert recipe.solving is not None
    elements = sum(stage.elements for stage in job.stages)
    blocks = 1 if recipe.solving.coupled else sum(
        stage.count(b) for stage in job.stages for b in stage.blocks
    )  # fmt: skip
    directions = queries * blocks
    if blocks > 1:
        largest = max(stage.elements for stage in job.stages)
        directions = max(queries, min(directions, recipe.query_memory // (VECTOR * largest)))
    vectors = recipe.computed * queries * elements
    # On disk gradients and the vectors of two steps.
    work = replace(recipe, directions=directions, vectors=(1 + 2 * _VECTORS) * queries)
    of_pass = plan_products(replace(job, recipe=work), data)
    one = of_pass.phases[-1]
    steps = recipe.solving.steps * passes * -(-queries * blocks // directions)
    taken = min(recipe.solving.minibatch or data.examples, data.examples)
    examples = max(1, data.examples)
    flops = steps * one.flops * taken / examples
    stored = steps * (one.stored * taken // examples + 3 * _VECTORS * vectors)
    phase = replace(
        one,
        disk=beside + one.disk,
        moved=steps * one.moved * taken // examples,
        stored=stored,
        flops=flops,
        seconds=job.seconds(flops, 0.0, stored),
    )
    return phase, of_pass.spool


def _query_moments(
    stage: StageShape, recipe: Recipe, data: DataShape, queries: int
) -> tuple[Moment, ...]:
    """IHVPs of so many queries at once."""
    elements, largest = stage.elements, stage.largest_block
    # The products of M-FAC start as plain gradients.
    plain = not recipe.kind.spectral
    inverse = 0 if plain else recipe.computed * elements
    read = recipe.store_dtype.itemsize if recipe.kind.corrected else 8 * (not plain)
    held = (
        weights_of(stage)
        | bases_of(stage, recipe)
        | {
            "1 / (Λ + λ)": inverse,
            "IHVPs": products_bytes(stage, recipe, queries),
        }
    )
    # The gradient, the same over Λ + λ, and for whole products the way back from the eigenbasis.
    copies = 2 if recipe.rank is not None else 5
    passing = gradients_of(stage, recipe, data, copies, pieces=False)
    opening = {"Λ as read": read * elements, "a block in float64": 16 * largest if inverse else 0}
    return (
        Moment("reading curvature", held, opening),
        *running(stage, recipe, data, held, passing),
    )


def _score_moments(
    stage: StageShape, recipe: Recipe, data: DataShape, queries: int
) -> tuple[Moment, ...]:
    """Training examples against the IHVPs of so many queries."""
    held = weights_of(stage) | {"IHVPs": products_bytes(stage, recipe, queries)}
    most = max(
        (
            _scored(b, stage.columns(data, b), recipe, stage.active(data, b), queries)
            for b in stage.blocks
        ),
        default=0,
    )
    passing = {"gradients or projections of some examples": most}
    if recipe.rank is None and not recipe.kind.ranked:
        # Where examples are few, their rows are turned into the products' basis.
        held |= bases_of(stage, recipe)
    if recipe.self_influence:
        if recipe.kind.ranked:
            held |= {"rows": 8 * recipe.rows * stage.elements}
        else:
            held |= bases_of(stage, recipe) | {"1 / (Λ + λ)": recipe.computed * stage.elements}
        passing = gradients_of(stage, recipe, data, 1, pieces=True)
    return running(stage, recipe, data, held, passing)


def _scored(block: Block, d_in: int, recipe: Recipe, data: DataShape, queries: int) -> int:
    """What a block's scores pass through: whole gradients and products, or projected rows, of
    ``d_in`` columns."""
    item, rows, size = recipe.computed, data.rows, d_in * block.d_out
    cast = item * rows * cast_elements(recipe, d_in + block.d_out)
    examples = min(data.batch_examples, max(1, TOGETHER // size))
    kept = kept_rank(recipe.rank, block.d_out, block.d_in)
    if kept is None:
        # Some outputs' gradients of all examples.
        return cast + item * max(PIECE, data.batch_examples * d_in)
    if not score_through_gradients(
        data.batch_positions, block.d_out, d_in, queries, kept, examples
    ):
        # The left and the right projection, and their product.
        return cast + 3 * item * rows * kept * min(queries, max(1, TOGETHER // (rows * kept)))
    # Low-rank products are made whole, as many at a time as examples.
    whole = min(queries, max(1, TOGETHER // size))
    return cast + item * size * (examples + whole)


def products_bytes(stage: StageShape, recipe: Recipe, queries: int) -> int:
    """Bytes of the IHVPs of so many queries."""
    one = sum(product_elements(recipe.rank, b.d_out, b.d_in) * stage.count(b) for b in stage.blocks)
    return queries * one * recipe.computed


def query_bytes(stages: Sequence[StageShape], recipe: Recipe) -> int:
    """Bytes of one query's IHVPs in the stage that has most, of those that share its memory; with a
    solver those of a direction."""
    if recipe.solving is not None:
        return VECTOR * max(stage.elements for stage in stages)
    return max(products_bytes(stage, recipe, 1) for stage in stages)


def queries_at_once(stages: Sequence[StageShape], recipe: Recipe) -> int:
    """How many queries' IHVPs fit the memory that is set aside for them, in every stage."""
    largest = query_bytes(stages, recipe)
    return max(1, recipe.query_memory // max(1, largest))


def _query_flops(stage: StageShape, recipe: Recipe, queries: DataShape) -> float:
    """IHVPs of all queries: gradients, and their truncated SVD or the way back from the basis."""
    total = gradient_flops(stage, recipe, queries)
    factors = stage.factors(recipe.max_factor_dim)
    for b in stage.blocks:
        size = 2.0 * b.d_in * b.d_out * stage.count(b)
        kept = kept_rank(recipe.rank, b.d_out, b.d_in)
        if kept is not None:
            # The range, two power steps there and back, and the projection on it.
            total += queries.examples * size * min(kept + 8, b.d_in, b.d_out) * 6
        elif recipe.kind.factors:
            tiles = max(factors[b.input_factor]) + max(factors[b.output_factor])
            total += queries.examples * size * tiles
    return total


def _score_flops(stage: StageShape, recipe: Recipe, train: DataShape, queries: int) -> float:
    """All training examples against so many queries."""
    total = 0.0
    together = train.batch_examples
    for b in stage.blocks:
        length = stage.active(train, b).row_length
        rank = kept_rank(recipe.rank, b.d_out, b.d_in)
        d_in = stage.columns(train, b)
        size = 2.0 * d_in * b.d_out
        if rank is not None and not score_through_gradients(
            length, b.d_out, d_in, queries, rank, together
        ):
            one = 2.0 * length * queries * rank * (d_in + b.d_out)
        else:
            one = size * (length + queries + queries * (rank or 0) / together)
        total += one * stage.count(b)
    total *= train.examples
    if recipe.self_influence:
        total += gradient_flops(stage, recipe, train)
    return total
