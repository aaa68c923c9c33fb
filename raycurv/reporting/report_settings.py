"""The flags of `raycurv report`: what is shown, where the page goes, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from raycurv.driver.settings import Count, Place, Required, check_fields
from raycurv.errors import UserError


@dataclass(frozen=True)
class ReportSettings:
    """One page, in one HTML file that needs no network, of a finished fit or of finished scores:
    each query with the passages that matter most to it, where their influence lies, the curvature,
    the training examples, and what took how long."""

    results: Annotated[Place, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_SCORES")] = ""
    """What a finished `fit` or `influence` left in its --out."""
    out: Required[Place] = ""
    """Where the page goes, a .html file; one that is there is replaced."""
    passages: Count = 5
    """Training passages shown of each query, of the highest scores and of the lowest."""
    most_queries: Count = 100
    """Queries shown, the first ones: with its passages each takes up to 50 kB of the page."""
    characters: Count = 1200
    """Characters shown of a passage, and twice as many of a query; of a longer passage the part
    whose tokens' scores are largest, where they were written, else its beginning."""
    run: Place = ""
    """Of scores: where the fit's run directory lies by now. Default: where it lay."""
    queries: Place = ""
    """Of scores: where the queries lie by now. Default: where they lay."""
    train: Place = ""
    """Of scores: where the training examples lie by now. Default: where they lay."""

    def check(self) -> None:
        """Refuse what cannot work, with a UserError that names it."""
        if not self.results:
            raise UserError(
                "report", "the directory of a fit or of scores", "nothing",
                "Give it first: raycurv report RUN_OR_SCORES --out page.html.",
            )  # fmt: skip
        check_fields(self)
