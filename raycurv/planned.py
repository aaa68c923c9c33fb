"""Planning from Python: what a fit and a scoring would take, without running them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raycurv.errors import counted
from raycurv.jobs.inputs import AnyModel, AnySource, settings_and_inputs
from raycurv.jobs.plan.estimating import plan as run_plan
from raycurv.jobs.plan.plan_settings import PlanSettings
from raycurv.mathematics.loss.objective import Objective
from raycurv.planning.advice import as_sentence
from raycurv.planning.report import duration, size
from raycurv.summary_html import summary_html


@dataclass(frozen=True, repr=False)
class Planned:
    """What a fit and a scoring would take.

    Attributes:
        details: as ``raycurv plan --json`` prints it: bytes, FLOPs and seconds, of each job
            (``plans``, ``fit`` and ``influence``) and its phases; ``sizes`` of the model's
            curvature; what is ``short``, and ``advice``.
    """

    details: dict[str, Any]

    @property
    def fits(self) -> bool:
        """Whether memory and disk are enough."""
        return bool(self.details["fits"])

    @property
    def stages(self) -> int:
        """Into how many stages the model is cut."""
        return int(self.details["stages"])

    def __repr__(self) -> str:
        jobs = "; ".join(f"{job} {said}" for job, said in self._jobs().items())
        return f"<raycurv plan: {self._verdict()}, {counted(self.stages, 'stage')}; {jobs}>"

    def _repr_html_(self) -> str:
        advice = "" if self.fits else as_sentence(self.details["advice"])
        facts = {"stages": self.stages, **self._jobs(), "advice": advice}
        return summary_html("plan", self._verdict(), facts)

    def _verdict(self) -> str:
        return "fits" if self.fits else "does not fit"

    def _jobs(self) -> dict[str, str]:
        return {
            job: f"{size(of['memory'])} of memory on a node, {size(of['disk'])} of disk, "
            f"{duration(of['seconds'])}"
            for job, of in self.details["plans"].items()
        }


def plan(
    model: AnyModel,
    data: AnySource | None = None,
    objective: str | Objective | None = None,
    **settings: Any,
) -> Planned:
    """What a fit of a model and a scoring would take: memory, disk and time, without running them.

    Of an HF directory ``config.json`` is enough.

    Args:
        model: as for :func:`raycurv.fit`.
        data: as for :func:`raycurv.fit`; by default ``examples`` of ``tokens`` each.
        objective: as for :func:`raycurv.fit`.
        **settings: the fields of :class:`raycurv.FitSettings`, and of the scoring and the machine:
            ``queries``, ``train_examples``, ``rank``, ``memory="128GB"``, ``gpus`` and what else
            ``raycurv plan --help`` lists.

    Raises:
        UserError: a mistake in settings, model or data.
    """
    given = {"model": model, "data": data, "objective": objective, "json": True} | settings
    chosen, inputs = settings_and_inputs(PlanSettings, given)
    return Planned(run_plan(chosen, inputs))
