"""The settings of a plan: those of the jobs that it plans, and the machine that they would have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from raycurv.driver.settings import Count, FromZero, Place, Rank, Required, Size
from raycurv.jobs.fit.fit_settings import FitSettings


@dataclass(frozen=True)
class PlanSettings(FitSettings):
    """What a fit and a scoring would take, without running them: takes every flag of fit.py.

    Of an HF model, config.json is enough. Without --stages, as few as fit.
    """

    out: Required[Place] = "."
    """Where results would go: its free disk is what there is, its speed is measured."""
    examples: Count = 10_000
    """Examples of the fit, without --data."""
    tokens: Count = 512
    """Tokens of each example, without --data."""
    queries: Count = 100
    """Queries of the scoring, of --tokens each."""
    train_examples: Count | None = None
    """Training examples of the scoring. Default: those of the fit."""
    rank: Rank = "32"
    """Rank that IHVPs are truncated to, or `full`."""
    query_memory: Size = "2GiB"
    """Memory of a stage for IHVPs in the scoring, as --query-memory of influence."""
    self_influence: Annotated[bool, tyro.conf.arg(name="self")] = False
    """Also score every training example against itself."""
    ihvp: bool = False
    """Also write the queries' IHVPs."""
    solver: Literal["ekfac", "cg", "astra"] = "ekfac"
    """How the scoring makes IHVPs, as --solver of influence, from all of the fit's examples."""
    steps: Count = 10
    """Steps that `--solver` takes for every query at most, each a pass over the examples."""
    minibatch: Count | None = None
    """Examples of a step's minibatch, as --minibatch of influence."""
    coupling: Literal["model", "blocks"] | None = None
    """What it solves, as --coupling of influence."""
    nodes: Count | None = None
    """Machines that share the stages. Default: this one; with --memory, one for each stage."""
    memory: Size | None = None
    """Memory of a node, such as 128GB. Default: what this machine has left."""
    disk: Size | None = None
    """Disk for the results. Default: what is free at --out."""
    gpus: FromZero = 0
    """GPUs that stages compute on, evenly shared; 0 for CPUs."""
    gpu_memory: Size = "80GB"
    """Memory of a GPU, such as 80GB."""
    json: bool = False
    """Print nothing but the plan as one line of JSON."""

    def _check_data(self) -> None:
        """None is needed: --examples and --tokens stand for it."""
