"""raycurv: curvature of neural networks on Ray, with influence scores in Parquet."""

from raycurv.driver.settings import EvaluateSettings, FitSettings, InfluenceSettings
from raycurv.errors import DamagedFile, NumericalError, RaycurvError, UserError
from raycurv.evaluation import Evaluation, evaluate
from raycurv.jobs.prune.prune_settings import PruneSettings
from raycurv.mathematics.curvature import BlockCurvature, Damping
from raycurv.mathematics.gradient_statistics import GradientStatistics
from raycurv.mathematics.loss.objective import CausalLM, Classification, Objective, Regression
from raycurv.mathematics.rank.rank_curvature import RankCurvature
from raycurv.mathematics.rank.rank_fisher import RankFisher
from raycurv.pruned import Pruned, open_pruned
from raycurv.run import Products, Run, Scores, fit, open_scores
from raycurv.run import open_run as open

__all__ = [
    "BlockCurvature",
    "CausalLM",
    "Classification",
    "DamagedFile",
    "Damping",
    "EvaluateSettings",
    "Evaluation",
    "FitSettings",
    "GradientStatistics",
    "InfluenceSettings",
    "NumericalError",
    "Objective",
    "Products",
    "PruneSettings",
    "Pruned",
    "RankCurvature",
    "RankFisher",
    "RaycurvError",
    "Regression",
    "Run",
    "Scores",
    "UserError",
    "evaluate",
    "fit",
    "open",
    "open_pruned",
    "open_scores",
]
