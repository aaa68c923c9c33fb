"""raycurv: curvature of neural networks on Ray, with influence scores in Parquet."""

from raycurv.driver.settings import FitSettings, InfluenceSettings
from raycurv.errors import DamagedFile, NumericalError, RaycurvError, UserError
from raycurv.mathematics.curvature import BlockCurvature, Damping
from raycurv.mathematics.gradient_statistics import GradientStatistics
from raycurv.mathematics.objective import CausalLM, Classification, Objective, Regression
from raycurv.run import Products, Run, Scores, fit, open_scores
from raycurv.run import open_run as open

__all__ = [
    "BlockCurvature",
    "CausalLM",
    "Classification",
    "DamagedFile",
    "Damping",
    "FitSettings",
    "GradientStatistics",
    "InfluenceSettings",
    "NumericalError",
    "Objective",
    "Products",
    "RaycurvError",
    "Regression",
    "Run",
    "Scores",
    "UserError",
    "fit",
    "open",
    "open_scores",
]
