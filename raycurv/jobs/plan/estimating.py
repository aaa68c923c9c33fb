"""The job of plan.py: what a fit and a scoring would take, for a person or a machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from raycurv.data.tokenizer import LazyTokenizer
from raycurv.driver.corpus import positions_of, reader_for
from raycurv.driver.settings import DTYPES, parse_bytes
from raycurv.errors import counted
from raycurv.jobs.drafts import Drafts, ShapeOf, arrangement_of, of_lengths, recipe_of, with_spool
from raycurv.jobs.inputs import Inputs
from raycurv.jobs.objectives import objective_for
from raycurv.jobs.on_hub import brought
from raycurv.jobs.plan.plan_settings import PlanSettings
from raycurv.mathematics.choice import choose_blocks
from raycurv.mathematics.loss.objective import Objective
from raycurv.mathematics.loss.shipped import open_objective
from raycurv.mathematics.methods import open_method
from raycurv.mathematics.tiles import decomposable
from raycurv.models.model import Outline
from raycurv.models.opening import open_outline
from raycurv.planning import report
from raycurv.planning.advice import (
    Shortfall,
    advise,
    as_sentence,
    fewest_stages,
    shortfalls,
)
from raycurv.planning.job import Job
from raycurv.planning.plan import Plan
from raycurv.planning.rates import Rates, measure, on_h100
from raycurv.planning.shapes import DataShape
from raycurv.planning.sizes import sizes
from raycurv.planning.supply import Supply, supply_here
from raycurv.progress.reporter import Reporter
from raycurv.progress.streams import printable, results


def plan(
    settings: PlanSettings, inputs: Inputs | None = None, rates: Rates | None = None
) -> dict[str, Any]:
    """Show what a fit and a scoring would take; gives the same for machines.

    Args:
        settings: of the job.
        inputs: model, data and objective, where they are in memory.
        rates: of the machine. Default: measured, which takes seconds.

    Raises:
        UserError: a mistake in settings, model or data.
    """
    settings.check()
    # Of the hub no weights are fetched, but those of adapters, whose headers say what they are of.
    settings, inputs = brought(settings, inputs or Inputs(), Reporter(log=settings.log).say, False)
    outline = open_outline(
        inputs.or_named("model", settings),
        settings.trust_remote_code,
        inputs.placed(settings.adapters()),
    )
    outline.tokenizer_dir = inputs.at(settings.tokenizer) or outline.tokenizer_dir
    blocks = choose_blocks(
        outline.skeleton(), settings.blocks, outline.default_scope, outline.tied_head,
        outline.idle, outline.held,
    )  # fmt: skip
    if open_method(settings.method).factors:
        blocks = decomposable(blocks, settings.max_factor_dim, outline.vocab_size)
        blocks = settings.factored(blocks)
    directory = Path(settings.out).absolute() if "://" not in settings.out else None
    supply = with_spool(_supply(settings, directory), settings, directory)
    drafts = Drafts(
        outline,
        blocks,
        settings,
        recipe_of(asdict(settings.resolved()), settings.logits_chunk, settings),
        replace(arrangement_of(settings), nodes=settings.nodes or 1, gpus=settings.gpus),
        nodes_follow=settings.nodes is None and settings.memory is not None,
        rates=rates or _rates(settings, directory),
        spool_apart=supply.spool is not None,
    )
    objective = objective_for(outline, inputs.or_named("objective", settings))
    each = positions_of(outline)
    tokens = settings.tokens if each == 1 else each
    data = _data(inputs.source("data", settings), settings, outline, objective, tokens)
    queries = _uniform(settings.queries, tokens)
    train = data
    if settings.train_examples is not None:
        train = _uniform(settings.train_examples, tokens)

    if drafts.recipe.solving is not None:
        drafts.multiplied = data

    def both(changes: Mapping[str, Any]) -> tuple[Plan, Plan]:
        return drafts.fit(data, changes), drafts.influence(queries, train, changes)

    def short(plans: Sequence[Plan]) -> list[Shortfall]:
        # The scoring finds the fit's files beside its own.
        kept = -plans[0].kept
        return shortfalls(plans[0], supply) + shortfalls(plans[1], supply, kept)

    chosen: dict[str, Any] = {}
    if settings.stages is None and settings.schedule == "pipelined":
        chosen = {"stages": _few_stages(lambda changes: short(both(changes)), outline.units)}
        drafts.settings = replace(settings, **chosen)
    plans = both({})
    missing = short(plans)
    advice: list[dict[str, Any]] = []
    if missing:
        advice = advise(lambda changes: not short(both(changes)), drafts.now(), drafts.bounds(data))
    largest = data(settings.batch_tokens)
    job = drafts.job(largest, {})
    of_model = sizes(job.stages, job.recipe)
    if not settings.json:
        _show(drafts, job, plans, data(settings.batch_tokens), supply, missing, advice)
    said = report.as_json(plans, of_model, missing, advice)
    counts = {"stages": len(job.stages), "nodes": job.arrangement.nodes}
    return {"fits": not missing} | counts | (said if settings.json else {})


def _few_stages(short: Callable[[Mapping[str, Any]], Sequence[Shortfall]], units: int) -> int:
    """The fewest stages that fit, or those that lack least."""
    found = fewest_stages(lambda changes: not short(changes), 0, units)
    if found is not None:
        return found
    tried = sorted({min(units, 1 << power) for power in range(units.bit_length() + 1)})
    lacks = {k: sum(s.needed / max(1, s.available) for s in short({"stages": k})) for k in tried}
    return min(tried, key=lambda stages: lacks[stages])


def _show(
    drafts: Drafts,
    job: Job,
    plans: Sequence[Plan],
    data: DataShape,
    supply: Supply,
    short: Sequence[Any],
    advice: Sequence[dict[str, Any]],
) -> None:
    console = Console(file=results(), highlight=False)

    def say(text: str) -> None:
        console.print(printable(text), markup=False, soft_wrap=True)

    recipe, place, groups = job.recipe, job.arrangement, len(job.groups)
    say(f"{drafts.outline.name}: {recipe.method} of {len(drafts.blocks)} blocks")
    say(report.sizes_line(sizes(job.stages, recipe)))
    resident_at_once = "all resident" if groups == 1 else f"{len(job.groups[0])} resident"
    where = counted(place.gpus, "GPU") if place.gpus else counted(place.nodes, "node")
    say(
        f"{counted(len(job.stages), 'stage')}, {resident_at_once}, on {where}; "
        f"{data.examples:,} examples, {data.tokens:,} tokens; "
        f"times: {'' if job.rates is None else job.rates.where}"
    )
    if not drafts.traced(data).seen:
        say("inputs are not known without data: none are taken as shared, activations as guessed")
    for plan in plans:
        say("")
        console.print(report.phases_table(plan, bool(place.gpus)))
        say(f"largest process: {report.process_line(plan.process)}")
        say(
            f"most: {report.size(plan.memory.node)} of memory on a node, "
            f"{report.size(plan.disk.disk)} of disk, of which {report.size(plan.kept)} stay; "
            f"{report.duration(plan.seconds)} in all"
        )
    say("")
    if not short:
        say(f"fits: {report.size(supply.memory)} of memory on a node" + _disk_there(supply))
        return
    for one in short:
        say(f"does not fit: {report.shortfall_line(one)}")
    say(as_sentence(advice))


def _disk_there(supply: Supply) -> str:
    return "" if supply.disk is None else f", {report.size(supply.disk)} of disk"


def _supply(settings: PlanSettings, directory: Path | None) -> Supply:
    supply = supply_here(directory)
    if settings.memory is not None:
        memory = parse_bytes("--memory", settings.memory)
        supply = Supply(memory, supply.disk)
    if settings.disk is not None:
        supply = replace(supply, disk=parse_bytes("--disk", settings.disk))
    elif settings.memory is not None:
        # The disk of other nodes is not known.
        supply = replace(supply, disk=None)
    if settings.gpus:
        supply = replace(supply, gpu=parse_bytes("--gpu-memory", settings.gpu_memory))
    return supply


def _rates(settings: PlanSettings, directory: Path | None) -> Rates:
    dtype = DTYPES[settings.dtype]
    here = measure(dtype, directory)
    return on_h100(dtype, here) if settings.gpus else here


def _uniform(examples: int, tokens: int) -> ShapeOf:
    return lambda batch_tokens: DataShape.uniform(examples, tokens, batch_tokens)


def _data(
    source: Any, settings: PlanSettings, outline: Outline, objective: str | Objective, tokens: int
) -> ShapeOf:
    if not settings.data:
        return _uniform(settings.examples, tokens)
    directory = outline.tokenizer_dir
    tokenizer = None
    if directory is not None:
        tokenizer = LazyTokenizer(directory, settings.trust_remote_code)
    reader = reader_for(
        source, outline, tokenizer, settings, open_objective(objective),
        settings.max_examples, settings.seed, settings.seed,
    )  # fmt: skip
    each = positions_of(outline)
    positions = (max(each, one.positions) for one in reader.examples())
    return of_lengths(np.fromiter(positions, np.int32))
