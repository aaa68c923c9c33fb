"""The jobs by name, each declared once: what a command line starts imports nothing else before."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from raycurv.errors import UserError
from raycurv.jobs.last_line import LastLine, loading
from raycurv.jobs.requirements import explained
from raycurv.progress.streams import kept_for_results


@dataclass(frozen=True)
class Job:
    """One job of raycurv.

    Attributes:
        name: as a person calls it: `raycurv fit`, or `python jobs/fit.py`.
        help: one line that says what it does.
        settings: the dataclass of its flags, as ``module:name`` below ``raycurv``.
        function: the function that does the work, likewise.
        leaves: whether it leaves results in ``--out``, and shows progress of making them to a
            ``reporter``.
    """

    name: str
    help: str
    settings: str
    function: str
    leaves: bool = True

    @property
    def script(self) -> str:
        """What the job calls itself in its last line and in messages, however it is started."""
        return f"{self.name}.py"

    def load_settings(self) -> Any:
        """The dataclass of the job's settings, imported now."""
        return _load(self.settings)

    def load(self) -> tuple[Any, Callable[..., Any]]:
        """The settings' class, and a function of settings and ``reporter``; imports libraries."""
        settings, function = self.load_settings(), _load(self.function)
        if self.leaves:
            return settings, function
        return settings, partial(_without_reporter, function)


JOBS = {
    job.name: job
    for job in (
        Job(
            "fit", "the curvature of a model on a data set",
            "jobs.fit.fit_settings:FitSettings", "jobs.fit.fitting:fit_and_tell",
        ),
        Job(
            "influence", "scores of queries against training examples, and IHVPs",
            "jobs.influence.influence_settings:InfluenceSettings",
            "jobs.influence.scoring:influence_and_tell",
        ),
        Job(
            "plan", "what a fit and a scoring would take: memory, disk, time",
            "jobs.plan.plan_settings:PlanSettings", "jobs.plan.estimating:plan", leaves=False,
        ),
        Job(
            "prune", "weights removed where the loss needs them least, the others moved",
            "jobs.prune.prune_settings:PruneSettings", "jobs.prune.pruning:prune",
        ),
        Job(
            "evaluate", "loss, perplexity and accuracy of a model on a data set",
            "jobs.evaluate.evaluate_settings:EvaluateSettings", "jobs.evaluate.evaluating:evaluate",
        ),
        Job(
            "spectrum", "traces, eigenvalues and density of curvature, and the loss along a step",
            "jobs.spectrum.spectrum_settings:SpectrumSettings",
            "reporting.spectrum_picture:measure_and_draw",
        ),
        Job(
            "show-data", "what the first examples of data become, and which tokens carry the loss",
            "jobs.show_data.show_data_settings:ShowDataSettings",
            "jobs.show_data.showing:show_data", leaves=False,
        ),
        Job(
            "timeline", "what the actors of a run did, and how busy they were",
            "jobs.timeline.timeline_settings:TimelineSettings",
            "jobs.timeline.watching:show_timeline", leaves=False,
        ),
        Job(
            "report", "one page of a fit or of scores, to be read in a browser",
            "reporting.report_settings:ReportSettings", "reporting.writing:write_report",
            leaves=False,
        ),
        Job(
            "doctor", "what is installed, what this machine has, what a fit here could hold",
            "jobs.doctor.doctor_settings:DoctorSettings", "jobs.doctor.examining:examine",
            leaves=False,
        ),
    )
}  # fmt: skip


def start(name: str, arguments: Sequence[str] | None = None, program: str = "") -> None:
    """Run a job as a command: reads its flags, does the work, and prints its last line.

    Args:
        name: of the job.
        arguments: the flags; by default the process' own.
        program: what the command is called in ``--help``; by default the script.

    Raises:
        SystemExit: see :func:`raycurv.jobs.command.run_job`.
    """
    job = JOBS[name]
    line = LastLine(job.script)
    with kept_for_results(), loading(line):
        try:
            _check_working_directory()
            settings, function = job.load()
            from raycurv.jobs.command import run_job
        except BaseException as error:
            raise SystemExit(line.failed(explained(error))) from None
        run_job(settings, function, line, arguments, program or job.script, job.leaves)


def _check_working_directory() -> None:
    """Refuse, with a UserError, a working directory that was deleted: relative names mean nothing
    there, and libraries end the process that they are loaded in."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            "the working directory", "one that is there", str(error), "Change to another one."
        ) from None


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(f"raycurv.{module}"), name)


def _without_reporter(function: Callable[..., Any], settings: Any, reporter: object) -> Any:
    return function(settings)
