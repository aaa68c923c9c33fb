"""Settings of scoring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from raycurv.driver.settings import (
    Count,
    DampingText,
    DtypeName,
    Execution,
    Identity,
    InputPath,
    Rank,
    Reading,
    Required,
    Size,
    rank_number,
)
from raycurv.errors import UserError


@dataclass(frozen=True)
class InfluenceSettings(Execution, Reading):
    """Scores of every query against every training example."""

    run: Required[InputPath] = ""
    """Run directory of a fit."""
    queries: Required[InputPath] = ""
    """Queries: file, directory or glob, as for the fit's data."""
    train: InputPath = ""
    """Training examples, likewise."""
    objective: Identity[str | None] = None
    """What of a query is measured: the `measurement` of your own `package.module:Name`, which may
    read further columns of the queries (see raycurv.Objective). Default: the fit's objective, whose
    loss training examples have in any case."""
    out: Required[str] = ""
    """Where scores go: an absolute path, or a URI that pyarrow.fs understands."""
    damping: Identity[DampingText] = "0.1"
    """A factor of each block's mean eigenvalue, or `abs:1e-6` for one number."""
    rank: Identity[Rank] = "32"
    """Rank that IHVPs are truncated to, or `full`."""
    query_memory: Size = "2GiB"
    """Memory of a stage for IHVPs; as many queries share a pass over the training data as fit."""
    inverse: Identity[Literal["model", "block"] | None] = None
    """Of a fit with `--method mfac`: the inverse of the whole model's Fisher, or of each block's
    own. Default: model."""
    top_k: Identity[Count | None] = None
    """Keep only each query's k highest and k lowest scores."""
    per_block: Identity[bool] = False
    """Also write every block's own scores."""
    per_token: Identity[bool] = False
    """Also write the scores of a training example's tokens."""
    self_influence: Identity[Annotated[bool, tyro.conf.arg(name="self")]] = False
    """Also score every training example against itself (full rank), to `self/`."""
    ihvp: Identity[bool] = False
    """Also write the queries' IHVPs, one safetensors file a block, to `ihvp/`."""
    seed: Identity[int] = 0
    """Of the truncated SVD's test matrices."""
    max_examples: Identity[Count | None] = None
    """Score a seeded sample of so many training examples."""
    dtype: Identity[DtypeName | None] = None
    """Of the model's computation; by default the fit's."""

    def check(self) -> None:
        super().check()
        if not self.train and not self.ihvp:
            raise UserError("--train", "training examples", "nothing", "Give --train, or --ihvp.")

    def rank_number(self) -> int | None:
        """The rank that IHVPs are truncated to; ``None`` for full."""
        return rank_number(self.rank)
