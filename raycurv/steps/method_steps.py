"""Which steps make a fit, by what its method has."""

from __future__ import annotations

from raycurv.mathematics.methods import Method
from raycurv.planning.cost import StepCost
from raycurv.steps.corrections import Corrections
from raycurv.steps.covariances import Covariances
from raycurv.steps.decompositions import Decompositions
from raycurv.steps.example_losses import ExampleLosses
from raycurv.steps.rank_rows import RankRows
from raycurv.steps.statistics import Statistics
from raycurv.steps.step import Fit, Step


def steps_of(fit: Fit) -> list[Step]:
    """The steps of a fit, in the order in which a group of stages goes through them."""
    steps = _steps(fit.method, fit.recipe.gradients)
    # A run that extends another has taken over its bases.
    return [step(fit) for step in steps if fit.extends is None or step is not Covariances]


def costs_of(method: Method, gradients: bool) -> list[StepCost]:
    """What the steps of a fit take."""
    return [step.cost for step in _steps(method, gradients)]


def _steps(method: Method, gradients: bool) -> list[type[Step]]:
    steps: list[tuple[bool, type[Step]]] = [
        (method.factors, Covariances),
        (method.factors, Decompositions),
        (method.corrected, Corrections),
        (method.ranked, RankRows),
        (gradients, Statistics),
        (True, ExampleLosses),
    ]
    return [step for wanted, step in steps if wanted]
