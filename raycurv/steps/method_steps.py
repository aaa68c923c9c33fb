"""Which steps make a fit, by what its method has."""

from __future__ import annotations

from raycurv.steps.corrections import Corrections
from raycurv.steps.covariances import Covariances
from raycurv.steps.decompositions import Decompositions
from raycurv.steps.example_losses import ExampleLosses
from raycurv.steps.rank_rows import RankRows
from raycurv.steps.statistics import Statistics
from raycurv.steps.step import Fit, Step


def steps_of(fit: Fit) -> list[Step]:
    """The steps of a fit, in the order in which a group of stages goes through them."""
    method = fit.method
    steps: list[tuple[bool, type[Step]]] = [
        # A run that extends another has taken over its bases.
        (method.factors and fit.extends is None, Covariances),
        (method.factors, Decompositions),
        (method.corrected, Corrections),
        (method.ranked, RankRows),
        (fit.gradients, Statistics),
        (True, ExampleLosses),
    ]
    return [step(fit) for wanted, step in steps if wanted]
