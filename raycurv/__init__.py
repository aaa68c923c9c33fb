"""raycurv: curvature of neural networks on Ray, with influence scores in Parquet.

Importing this package takes milliseconds: torch, Ray and Arrow are imported when a name that needs
them is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raycurv.errors import DamagedFile as DamagedFile
    from raycurv.errors import NumericalError as NumericalError
    from raycurv.errors import RaycurvError as RaycurvError
    from raycurv.errors import UserError as UserError
    from raycurv.evaluation import Evaluation as Evaluation
    from raycurv.evaluation import evaluate as evaluate
    from raycurv.jobs.evaluate.evaluate_settings import EvaluateSettings as EvaluateSettings
    from raycurv.jobs.fit.fit_settings import FitSettings as FitSettings
    from raycurv.jobs.influence.influence_settings import InfluenceSettings as InfluenceSettings
    from raycurv.jobs.prune.prune_settings import PruneSettings as PruneSettings
    from raycurv.mathematics.curvature import BlockCurvature as BlockCurvature
    from raycurv.mathematics.curvature import Damping as Damping
    from raycurv.mathematics.gradient_statistics import GradientStatistics as GradientStatistics
    from raycurv.mathematics.loss.objective import CausalLM as CausalLM
    from raycurv.mathematics.loss.objective import Classification as Classification
    from raycurv.mathematics.loss.objective import Objective as Objective
    from raycurv.mathematics.loss.objective import Regression as Regression
    from raycurv.mathematics.rank.rank_curvature import RankCurvature as RankCurvature
    from raycurv.mathematics.rank.rank_fisher import RankFisher as RankFisher
    from raycurv.pruned import Pruned as Pruned
    from raycurv.pruned import open_pruned as open_pruned
    from raycurv.run import Products as Products
    from raycurv.run import Run as Run
    from raycurv.run import Scores as Scores
    from raycurv.run import fit as fit
    from raycurv.run import open_run
    from raycurv.run import open_scores as open_scores

    open = open_run

__version__ = "0.1.0"

# Where each name is, as `package.module:name`.
_PLACES = {
    "BlockCurvature": "mathematics.curvature:BlockCurvature",
    "CausalLM": "mathematics.loss.objective:CausalLM",
    "Classification": "mathematics.loss.objective:Classification",
    "DamagedFile": "errors:DamagedFile",
    "Damping": "mathematics.curvature:Damping",
    "EvaluateSettings": "jobs.evaluate.evaluate_settings:EvaluateSettings",
    "Evaluation": "evaluation:Evaluation",
    "FitSettings": "jobs.fit.fit_settings:FitSettings",
    "GradientStatistics": "mathematics.gradient_statistics:GradientStatistics",
    "InfluenceSettings": "jobs.influence.influence_settings:InfluenceSettings",
    "NumericalError": "errors:NumericalError",
    "Objective": "mathematics.loss.objective:Objective",
    "Products": "run:Products",
    "PruneSettings": "jobs.prune.prune_settings:PruneSettings",
    "Pruned": "pruned:Pruned",
    "RankCurvature": "mathematics.rank.rank_curvature:RankCurvature",
    "RankFisher": "mathematics.rank.rank_fisher:RankFisher",
    "RaycurvError": "errors:RaycurvError",
    "Regression": "mathematics.loss.objective:Regression",
    "Run": "run:Run",
    "Scores": "run:Scores",
    "UserError": "errors:UserError",
    "evaluate": "evaluation:evaluate",
    "fit": "run:fit",
    "open": "run:open_run",
    "open_pruned": "pruned:open_pruned",
    "open_scores": "run:open_scores",
}
# `raycurv.open` is no part of `from raycurv import *`, which would put it in place of Python's own.
__all__ = [name for name in _PLACES if name != "open"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    found = globals()[name] = getattr(import_module(f"{__name__}.{module}"), attribute)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
