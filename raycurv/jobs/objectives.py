"""Which objective a model has: the one that is given, or the one that it was trained for."""

from __future__ import annotations

from raycurv.errors import UserError
from raycurv.mathematics.loss.objective import Objective
from raycurv.mathematics.loss.shipped import open_objective, shipped_name
from raycurv.models.model import Outline


def objective_for(network: Outline, given: str | Objective | None) -> str | Objective:
    """The objective of a model.

    Args:
        given: its name, or itself; ``None`` for the one that the model's task has.

    Raises:
        UserError: an objective that does not fit the task; names those that do.
    """
    task = network.task
    if given is None:
        return "causal-lm" if task is None else task.objectives[0]
    if task is None:
        return given
    check_fits(network, given)
    if shipped_name(given) is None and task.pooled and open_objective(given).per_token:
        raise UserError(
            f"--objective {given if isinstance(given, str) else type(given).__name__}",
            f"an objective of whole texts, for {network.name} is {task.what}",
            "one that is called on positions (per_token)",
            "Leave per_token out: its methods are then given outputs [examples, classes].",
        )
    return given


def check_fits(network: Outline, given: str | Objective) -> None:
    """Refuse one of raycurv's objectives that is none of the model's task; UserError, which names
    those that fit."""
    task, name = network.task, shipped_name(given)
    if task is not None and name is not None and name not in task.objectives:
        wanted = " or ".join(task.objectives)
        raise UserError(
            f"--objective {name}",
            f"{wanted}, for {network.name} is {task.what}",
            name,
            f"Give --objective {task.objectives[0]}, or leave the flag out.",
        )
