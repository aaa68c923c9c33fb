"""raycurv: curvature of neural networks on Ray, with influence scores in Parquet."""

from raycurv.curvature import BlockCurvature, Damping
from raycurv.errors import DamagedFile, NumericalError, RaycurvError, UserError
from raycurv.objective import CausalLM, Classification, Objective, Regression
from raycurv.run import Products, Run, Scores, fit, open_scores
from raycurv.run import open_run as open
from raycurv.settings import FitSettings, InfluenceSettings

__all__ = [
    "BlockCurvature",
    "CausalLM",
    "Classification",
    "DamagedFile",
    "Damping",
    "FitSettings",
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
