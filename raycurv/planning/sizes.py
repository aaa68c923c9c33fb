"""The sizes of a model's curvature: what decides where it can run at all."""

from __future__ import annotations

from dataclasses import dataclass

from raycurv.planning.shapes import Group, Recipe, factor_elements, squares


@dataclass(frozen=True)
class Sizes:
    """Shared inputs count once.

    Attributes:
        blocks: how many.
        weights: bytes of the whole model in its dtype.
        factors: bytes of all factors as they are summed, float32 (or float64).
        lam: bytes of Λ in the same dtype, and of one query's dense gradient.
        matrices: how many factors.
        widest: columns of the widest factor, before it is cut into tiles.
        covariance: FLOPs of A and G for a token.
        propagation: FLOPs of the blocks forward and backward for a token.
    """

    blocks: int
    weights: int
    factors: int
    lam: int
    matrices: int
    widest: int
    covariance: float
    propagation: float


def sizes(stages: Group, recipe: Recipe) -> Sizes:
    """Of all stages together."""
    tiles = [found for stage in stages for found in stage.tiles(recipe.max_factor_dim)]
    elements = sum(stage.elements for stage in stages)
    return Sizes(
        blocks=sum(stage.alike.counts.total() for stage in stages),
        weights=sum(s.weights for s in stages),
        factors=recipe.computed * factor_elements(stages, recipe),
        lam=recipe.computed * elements,
        matrices=sum(count for _, count in tiles),
        widest=max((sum(widths) for widths, _ in tiles), default=0),
        covariance=2.0
        * sum(
            squares(t) * s.factor_count(name) * s.factor_shares[name]
            for s in stages
            for name, t in s.factors(recipe.max_factor_dim).items()
        ),
        propagation=4.0 * sum(stage.active_elements for stage in stages),
    )
