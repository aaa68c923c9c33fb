"""FLOPs of each phase; a multiplication and an addition are two.

    covariance      2 Σ t²                      a position (input factors once, outputs a draw)
    propagation     2 (O·I), forward, and as much backward: no gradient of a weight is formed
    Λ               the rotations and outer products of :mod:`raycurv.mathematics.gradients`
    eigh            about 9 d³                  a factor, in float64

Axis letters as in :mod:`raycurv.planning.shapes`.
"""

from __future__ import annotations

from raycurv.mathematics.gradients import rotate_before
from raycurv.mathematics.influence.ihvp import kept_rank
from raycurv.mathematics.influence.scores import score_through_gradients
from raycurv.planning.shapes import DataShape, Recipe, StageShape, squares


def covariance_of_position(stage: StageShape, recipe: Recipe) -> float:
    """A and G, for one position and one draw."""
    return 2.0 * sum(squares(tiles) for tiles in stage.factors(recipe.max_factor_dim).values())


def propagation_of_position(stage: StageShape) -> float:
    """The blocks' products, forward and backward, for one position: ``4 Σ O·I``."""
    return 4.0 * sum(b.d_in * b.d_out for b in stage.blocks)


def forward(stage: StageShape, data: DataShape) -> float:
    """All data forward."""
    return stage.flops * data.positions


def backward(stage: StageShape, recipe: Recipe, data: DataShape) -> float:
    """All data backward, without gradients of weights."""
    return recipe.back * stage.flops * data.positions


def gradient_flops(stage: StageShape, recipe: Recipe, data: DataShape) -> float:
    """Per-example gradients of all data in the eigenbasis."""
    factors = stage.factors(recipe.max_factor_dim)
    sharing: dict[str, int] = {}
    for block in stage.blocks:
        sharing[block.input_factor] = sharing.get(block.input_factor, 0) + 1
    total = 0.0
    length = data.row_length
    for b in stage.blocks:
        outer = 2.0 * length * b.d_in * b.d_out
        if not recipe.kind.factors:
            total += outer
            continue
        # Tiles are as equal as they can be: d t is what a rotation of one row takes.
        t_in, t_out = max(factors[b.input_factor]), max(factors[b.output_factor])
        shared = sharing[b.input_factor]
        if rotate_before(length, b.d_in, b.d_out, t_in, t_out, shared):
            total += outer + 2.0 * length * (b.d_in * t_in / shared + b.d_out * t_out)
        else:
            total += outer + 2.0 * b.d_in * b.d_out * (t_in + t_out)
    return total * data.examples * recipe.draws


def query_products(stage: StageShape, recipe: Recipe, queries: DataShape) -> float:
    """IHVPs of all queries: gradients, and their truncated SVD or the way back from the basis."""
    total = gradient_flops(stage, recipe, queries)
    factors = stage.factors(recipe.max_factor_dim)
    for b in stage.blocks:
        size = 2.0 * b.d_in * b.d_out
        kept = kept_rank(recipe.rank, b.d_out, b.d_in)
        if kept is not None:
            # The range, two power steps there and back, and the projection on it.
            total += queries.examples * size * min(kept + 8, b.d_in, b.d_out) * 6
        elif recipe.kind.factors:
            tiles = max(factors[b.input_factor]) + max(factors[b.output_factor])
            total += queries.examples * size * tiles
    return total


def scores(stage: StageShape, recipe: Recipe, train: DataShape, queries: int) -> float:
    """All training examples against so many queries."""
    total = 0.0
    length, together = train.row_length, train.batch_examples
    for b in stage.blocks:
        rank = kept_rank(recipe.rank, b.d_out, b.d_in)
        size = 2.0 * b.d_in * b.d_out
        if rank is not None and not score_through_gradients(
            length, b.d_out, b.d_in, queries, rank, together
        ):
            total += 2.0 * length * queries * rank * (b.d_in + b.d_out)
        else:
            total += size * (length + queries + queries * (rank or 0) / together)
    total *= train.examples
    if recipe.self_influence:
        total += gradient_flops(stage, recipe, train)
    return total
