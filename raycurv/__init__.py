"""raycurv: curvature of neural networks on Ray, with influence scores in Parquet.

Importing this package takes milliseconds: torch, Ray and Arrow are imported when a name that needs
them is first asked for.
"""

import os
import sys

# Python searches the working directory (of `python -m raycurv`) or jobs/ (of a script there) before
# all libraries; a file that lies there and is called like one is not meant. These two modules are
# in memory already, all others are searched for.
_SCRIPTS = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "jobs")
_FIRST = sys.path[0] if sys.path else "."
# While what `-m` names is looked for the program is called so; the name stands before its words.
_NAMED = sys.orig_argv[-len(sys.argv)] if sys.argv[:1] == ["-m"] else ""
_AS_MODULE = _NAMED == "raycurv" or (_NAMED.startswith("-") and _NAMED.endswith("mraycurv"))
if not getattr(sys.flags, "safe_path", False) and (
    _AS_MODULE or os.path.realpath(_FIRST) == _SCRIPTS
):
    del sys.path[0]

from importlib import import_module  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from raycurv.errors import DamagedFile, NumericalError, RaycurvError, UserError
    from raycurv.evaluation import Evaluation, evaluate
    from raycurv.jobs.evaluate.evaluate_settings import EvaluateSettings
    from raycurv.jobs.fit.fit_settings import FitSettings
    from raycurv.jobs.influence.influence_settings import InfluenceSettings
    from raycurv.jobs.prune.prune_settings import PruneSettings
    from raycurv.jobs.spectrum.spectrum_settings import SpectrumSettings
    from raycurv.mathematics.curvature import BlockCurvature, Damping
    from raycurv.mathematics.gradient_statistics import GradientStatistics
    from raycurv.mathematics.loss.multi_label import MultiLabel
    from raycurv.mathematics.loss.objective import (
        CausalLM,
        Classification,
        MaskedLM,
        Objective,
        Regression,
        Seq2SeqLM,
        TokenClassification,
    )
    from raycurv.mathematics.loss.preference import Preference
    from raycurv.mathematics.rank.rank_curvature import RankCurvature
    from raycurv.mathematics.rank.rank_fisher import RankFisher
    from raycurv.measured import Spectrum, spectrum
    from raycurv.planned import Planned, plan
    from raycurv.pruned import Pruned, open_pruned
    from raycurv.reporting.report_settings import ReportSettings
    from raycurv.reporting.writing import report
    from raycurv.run import Run, fit, open_run
    from raycurv.scored import Products, Scores, open_scores

    open = open_run

__version__ = "0.1.0"

# `raycurv.open` is no part of `from raycurv import *`, which would put it in place of Python's own.
__all__ = [
    "BlockCurvature", "CausalLM", "Classification", "DamagedFile", "Damping", "EvaluateSettings",
    "Evaluation", "FitSettings", "GradientStatistics", "InfluenceSettings", "MaskedLM",
    "MultiLabel", "NumericalError", "Objective", "Planned", "Preference", "Products",
    "PruneSettings", "Pruned", "RankCurvature", "RankFisher", "RaycurvError", "Regression",
    "ReportSettings", "Run", "Scores", "Seq2SeqLM", "Spectrum", "SpectrumSettings",
    "TokenClassification", "UserError", "evaluate", "fit", "open_pruned", "open_scores", "plan",
    "report", "spectrum",
]  # fmt: skip

# Which module has which names.
_MODULES = {
    "errors": ("DamagedFile", "NumericalError", "RaycurvError", "UserError"),
    "evaluation": ("Evaluation", "evaluate"),
    "jobs.evaluate.evaluate_settings": ("EvaluateSettings",),
    "jobs.fit.fit_settings": ("FitSettings",),
    "jobs.influence.influence_settings": ("InfluenceSettings",),
    "jobs.prune.prune_settings": ("PruneSettings",),
    "jobs.spectrum.spectrum_settings": ("SpectrumSettings",),
    "mathematics.curvature": ("BlockCurvature", "Damping"),
    "mathematics.gradient_statistics": ("GradientStatistics",),
    "mathematics.loss.multi_label": ("MultiLabel",),
    "mathematics.loss.objective": (
        "CausalLM",
        "Classification",
        "MaskedLM",
        "Objective",
        "Regression",
        "Seq2SeqLM",
        "TokenClassification",
    ),
    "mathematics.loss.preference": ("Preference",),
    "mathematics.rank.rank_curvature": ("RankCurvature",),
    "mathematics.rank.rank_fisher": ("RankFisher",),
    "measured": ("Spectrum", "spectrum"),
    "planned": ("Planned", "plan"),
    "pruned": ("Pruned", "open_pruned"),
    "reporting.report_settings": ("ReportSettings",),
    "reporting.writing": ("report",),
    "run": ("Run", "fit", "open_run"),
    "scored": ("Products", "Scores", "open_scores"),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    asked = "open_run" if name == "open" else name
    if asked not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_PLACES[asked]}")
    found = globals()[name] = getattr(module, asked)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "open"})
