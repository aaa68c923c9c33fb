"""Which steps make a fit, by what its method has."""

from __future__ import annotations

from raycurv.planning.cost import StepCost
from raycurv.planning.shapes import Recipe
from raycurv.steps.corrections import Corrections
from raycurv.steps.covariances import Covariances, PowerIterations
from raycurv.steps.decompositions import Decompositions
from raycurv.steps.example_losses import ExampleLosses
from raycurv.steps.rank_rows import RankRows
from raycurv.steps.statistics import Statistics
from raycurv.steps.step import Fit, Step


def steps_of(fit: Fit) -> list[Step]:
    """The steps of a fit, in the order in which a group of stages goes through them."""
    steps = _steps(fit.recipe)
    # A run that extends another has taken over its bases.
    return [
        step(fit, 1 + steps[:place].count(step))
        for place, step in enumerate(steps)
        if fit.extends is None or not issubclass(step, Covariances)
    ]


def costs_of(recipe: Recipe) -> list[StepCost]:
    """What the steps of a fit take."""
    return [step.cost for step in _steps(recipe)]


def _steps(recipe: Recipe) -> list[type[Step]]:
    method = recipe.kind
    steps: list[tuple[bool, type[Step]]] = [
        (method.factors, Covariances),
        *[(method.factors, PowerIterations)] * (recipe.basis_passes - 1),
        (method.factors, Decompositions),
        (method.corrected, Corrections),
        (method.ranked, RankRows),
        (recipe.gradients, Statistics),
        (True, ExampleLosses),
    ]
    return [step for wanted, step in steps if wanted]
