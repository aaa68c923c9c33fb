"""Plans of one model and its data under settings that may yet change."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from raycurv.data.microbatch import Lengths
from raycurv.driver.corpus import WINDOW
from raycurv.driver.pipeline import COMMIT_SECONDS
from raycurv.driver.settings import (
    DTYPES,
    Execution,
    parse_bytes,
    rank_number,
)
from raycurv.mathematics.bases import BASES
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.factors import Factor
from raycurv.mathematics.methods import open_method
from raycurv.models.model import Outline
from raycurv.planning.advice import Bounds
from raycurv.planning.arrangement import Arrangement
from raycurv.planning.cost import StepCost
from raycurv.planning.fit_plan import plan_fit
from raycurv.planning.influence_plan import plan_influence, queries_at_once, query_bytes
from raycurv.planning.job import Job
from raycurv.planning.plan import Plan
from raycurv.planning.product_plan import plan_products
from raycurv.planning.rates import Rates
from raycurv.planning.shapes import DataShape, Recipe, Solving, stage_shapes
from raycurv.planning.supply import Supply, existing_parent, free_disk, resident
from raycurv.planning.trace import Trace, trace
from raycurv.stages.dealing import cut_stages
from raycurv.steps.method_steps import costs_of

# Microbatches of so many tokens -> the shape of the data.
ShapeOf = Callable[[int], DataShape]


@dataclass
class Drafts:
    """Plans of one model and its data under changing settings.

    Attributes:
        outline: of the model.
        blocks: chosen of it.
        settings: how the job runs; a change may take the place of each.
        recipe: settings that decide sizes.
        arrangement: where it runs; homes are the settings'.
        nodes_follow: every resident stage has a node of its own.
        base: bytes of a process without a stage.
        rates: of a node; ``None`` for plans without times.
        spool_apart: the spool has a disk of its own.
        multiplied: the examples that a solver's products are made of, if there is one.
    """

    outline: Outline
    blocks: Sequence[Block]
    settings: Execution
    recipe: Recipe
    arrangement: Arrangement
    nodes_follow: bool = False
    base: int = field(default_factory=resident)
    rates: Rates | None = None
    spool_apart: bool = False
    multiplied: ShapeOf | None = None
    _traces: dict[tuple[int, int], Trace] = field(default_factory=dict)

    def fit(self, data: ShapeOf, changes: Mapping[str, Any]) -> Plan:
        """The plan of a fit."""
        shape = data(changes.get("batch_tokens", self.settings.batch_tokens))
        return plan_fit(self.job(shape, changes), shape, self._costs())

    def influence(
        self, queries: ShapeOf, train: ShapeOf | None, changes: Mapping[str, Any]
    ) -> Plan:
        """The plan of a scoring."""
        tokens = changes.get("batch_tokens", self.settings.batch_tokens)
        asked, trained = queries(tokens), None if train is None else train(tokens)
        made = None if self.multiplied is None else self.multiplied(tokens)
        largest = max((s for s in (asked, trained, made) if s is not None), key=lambda s: s.rows)
        job = self.job(largest, changes)
        # Of the fit alone.
        job = replace(job, recipe=replace(job.recipe, gradients=False, own=False))
        return plan_influence(job, asked, trained, self._costs(), made)

    def products(self, data: ShapeOf, changes: Mapping[str, Any]) -> Plan:
        """The plan of a job of products."""
        shape = data(changes.get("batch_tokens", self.settings.batch_tokens))
        return plan_products(self.job(shape, changes), shape)

    def _costs(self) -> list[StepCost]:
        return costs_of(self.recipe)

    def job(self, data: DataShape, changes: Mapping[str, Any]) -> Job:
        """The job with some settings changed."""
        execution = {k: v for k, v in changes.items() if hasattr(self.settings, k)}
        own = ("max_factor_dim", "store_dtype", "query_memory")
        numbers = {k: v for k, v in changes.items() if k in own}
        if "store_dtype" in numbers:
            numbers["store_dtype"] = DTYPES[numbers["store_dtype"]]
        settings = replace(self.settings, **execution)
        count = settings.stage_count(self.outline.units)
        homes = settings.homes if settings.schedule == "swept" else count
        place = replace(self.arrangement, homes=homes)
        if self.nodes_follow:
            place = replace(place, nodes=min(homes, count) * place.replicas)
        cuts = cut_stages(self.outline.unit_costs, count)
        self.outline.check_cuts(self.blocks, cuts)
        traced = self.traced(data)
        stages = stage_shapes(self.outline, cuts, traced, self.recipe.dtype, data.rows)
        if "at_once" in changes:
            numbers["directions"] = changes["at_once"]
        recipe = replace(self.recipe, **numbers)
        seconds = settings.commit_seconds or COMMIT_SECONDS
        return Job(stages, recipe, place, self.base, self.rates, seconds, self.spool_apart)

    def traced(self, data: DataShape) -> Trace:
        """What a forward of the largest microbatch keeps, run without values once."""
        key = (data.batch_examples, data.batch_positions)
        most, task = self.outline.max_positions, self.outline.task
        if most is not None and task is not None and not task.causal and key[1] > most:
            # Several texts of an example, or more tokens than a text may have.
            times = -(-key[1] // most)
            key = (key[0] * times, -(-key[1] // times))
        if key not in self._traces:
            self._traces[key] = trace(self.outline, self.blocks, *key, self.recipe.dtype)
        return self._traces[key]

    def bounds(self, data: ShapeOf) -> Bounds:
        """Where to look for settings that fit."""
        # A job without blocks has no axis to cut.
        sides = [Factor(b, side) for b in self.blocks for side in ("input", "output")]
        widest = max((f.width for f in sides if not f.diagonal), default=1)
        tokens = self.settings.batch_tokens
        together = any(
            len({self.outline.unit_of(name) for name in (b.module, *b.shared)}) > 1
            for b in self.blocks
        )
        return Bounds(
            1 if together else self.outline.units,
            min(widest, self.recipe.max_factor_dim or widest),
            tokens,
            data(tokens).longest,
            self._fewer_queries(data(tokens)),
        )

    def _fewer_queries(self, data: DataShape) -> list[int]:
        """Bytes for half of the queries that a solver has at once, for a quarter, and so on."""
        if self.recipe.solving is None:
            return []
        stages = self.job(data, {}).stages
        each, most = query_bytes(stages, self.recipe), queries_at_once(stages, self.recipe)
        return [each * (most >> power) for power in range(1, most.bit_length())]

    def queries_in(self, memory: int, data: ShapeOf) -> int:
        """How many queries a solver has at once with so many bytes for them."""
        stages = self.job(data(self.settings.batch_tokens), {}).stages
        return memory // query_bytes(stages, self.recipe)

    def now(self) -> dict[str, Any]:
        """The settings that advice may change."""
        settings = self.settings
        if self.recipe.directions:
            return {
                "stages": settings.stage_count(self.outline.units),
                "schedule": settings.schedule,
                "at_once": self.recipe.directions,
            }
        store = next(name for name, dtype in DTYPES.items() if dtype == self.recipe.store_dtype)
        return {
            "stages": settings.stage_count(self.outline.units),
            "schedule": settings.schedule,
            "store_dtype": store,
        }


class Scoring(Protocol):
    """The settings of a scoring that decide sizes."""

    @property
    def rank(self) -> str: ...
    @property
    def query_memory(self) -> str: ...
    @property
    def self_influence(self) -> bool: ...
    @property
    def ihvp(self) -> bool: ...
    @property
    def solver(self) -> str: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def minibatch(self) -> int | None: ...
    @property
    def coupling(self) -> str | None: ...


def recipe_of(fit: Mapping[str, Any], logits_chunk: int, scoring: Scoring | None = None) -> Recipe:
    """The settings that decide sizes.

    Args:
        fit: settings of a fit by name, defaults filled in: ``method``, ``dtype`` and
            ``store_dtype``, and what else there is.
        logits_chunk: logits formed at once.
        scoring: of what follows the fit; a fit has none.
    """
    gradients = fit.get("gradients", False)
    recipe = Recipe(
        method=fit["method"],
        draws=fit.get("draws", 1),
        max_factor_dim=fit.get("max_factor_dim"),
        dtype=DTYPES[fit["dtype"]],
        store_dtype=DTYPES[fit["store_dtype"]],
        keep_sums=fit.get("keep_sums", False),
        gradients=gradients,
        own=gradients and fit["fisher"] != "empirical",
        logits_chunk=logits_chunk,
        rows=fit.get("rows") or 0,
        basis=BASES[fit.get("basis", "kfac")],
        basis_passes=fit.get("basis_passes") or 1,
    )
    if scoring is None:
        return recipe
    return replace(
        recipe,
        # Products of M-FAC are whole until they are truncated.
        rank=None if open_method(recipe.method).ranked else rank_number(scoring.rank),
        query_memory=parse_bytes("--query-memory", scoring.query_memory),
        self_influence=scoring.self_influence,
        ihvp=scoring.ihvp,
        solving=None
        if scoring.solver == "ekfac"
        else Solving(
            scoring.steps or 1,
            scoring.coupling != "blocks",
            None if scoring.solver == "cg" else scoring.minibatch or 32,
        ),
    )


def arrangement_of(settings: Execution) -> Arrangement:
    """Where the settings let a job run: on this machine's cores, and GPUs if it has any."""
    place = Arrangement(
        replicas=settings.replicas, ray=settings.address != "none", cores=os.cpu_count() or 1
    )
    if settings.device != "cpu" and torch.cuda.is_available():
        return replace(place, gpus=torch.cuda.device_count())
    return place


def with_spool(supply: Supply, settings: Execution, directory: Path | None) -> Supply:
    """Counts the disk of the spool apart, if it has one of its own."""
    if settings.spool_dir is None:
        return supply
    place = existing_parent(Path(settings.spool_dir).expanduser().absolute())
    if (
        directory is not None
        and os.stat(existing_parent(directory)).st_dev == os.stat(place).st_dev
    ):
        return supply
    return replace(supply, spool=free_disk(place))


def of_lengths(lengths: Lengths) -> ShapeOf:
    """The shape of examples of so many tokens each."""
    return lambda batch_tokens: DataShape.of_lengths(lengths, batch_tokens, WINDOW)
