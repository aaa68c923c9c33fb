"""Plan: what a fit and a scoring would take; and the same check at the start of each of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from raycurv.data.reading import read_examples
from raycurv.data.tokenizer import LazyTokenizer
from raycurv.driver.corpus import WINDOW
from raycurv.driver.pipeline import COMMIT_SECONDS
from raycurv.driver.settings import (
    DTYPES,
    Execution,
    FitSettings,
    InfluenceSettings,
    PlanSettings,
    parse_bytes,
    rank_number,
)
from raycurv.errors import UserError
from raycurv.files.store import Store
from raycurv.mathematics.blocks import Block, choose_blocks
from raycurv.models.model import Outline, open_outline
from raycurv.planning import report
from raycurv.planning.advice import (
    Bounds,
    Shortfall,
    advise,
    as_flags,
    as_sentence,
    fewest_stages,
    shortfalls,
)
from raycurv.planning.arrangement import Arrangement
from raycurv.planning.fit import plan_fit
from raycurv.planning.influence import plan_influence
from raycurv.planning.job import Job
from raycurv.planning.plan import Plan
from raycurv.planning.rates import Rates, measure, on_h100
from raycurv.planning.shapes import DataShape, Recipe, stage_shapes
from raycurv.planning.sizes import sizes
from raycurv.planning.supply import Supply, existing_parent, free_disk, resident, supply_here
from raycurv.planning.trace import Trace, trace
from raycurv.stages.placement import cut_stages

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
    _traces: dict[tuple[int, int], Trace] = field(default_factory=dict)

    def fit(self, data: ShapeOf, changes: Mapping[str, Any]) -> Plan:
        """The plan of a fit."""
        shape = data(changes.get("batch_tokens", self.settings.batch_tokens))
        return plan_fit(self.job(shape, changes), shape)

    def influence(
        self, queries: ShapeOf, train: ShapeOf | None, changes: Mapping[str, Any]
    ) -> Plan:
        """The plan of a scoring."""
        tokens = changes.get("batch_tokens", self.settings.batch_tokens)
        asked, trained = queries(tokens), None if train is None else train(tokens)
        largest = max((s for s in (asked, trained) if s is not None), key=lambda s: s.rows)
        return plan_influence(self.job(largest, changes), asked, trained)

    def job(self, data: DataShape, changes: Mapping[str, Any]) -> Job:
        """The job with some settings changed."""
        execution = {k: v for k, v in changes.items() if hasattr(self.settings, k)}
        numbers = {k: v for k, v in changes.items() if k in ("max_factor_dim", "store_dtype")}
        if "store_dtype" in numbers:
            numbers["store_dtype"] = DTYPES[numbers["store_dtype"]]
        settings = replace(self.settings, **execution)
        count = settings.stage_count(self.outline.units)
        homes = settings.homes if settings.schedule == "swept" else count
        place = replace(self.arrangement, homes=homes)
        if self.nodes_follow:
            place = replace(place, nodes=min(homes, count) * place.replicas)
        cuts = cut_stages(self.outline.unit_costs, count)
        traced = self._traced(data)
        stages = stage_shapes(self.outline, cuts, traced, self.recipe.dtype, data.rows)
        recipe = replace(self.recipe, **numbers)
        seconds = settings.commit_seconds or COMMIT_SECONDS
        return Job(stages, recipe, place, self.base, self.rates, seconds, self.spool_apart)

    def _traced(self, data: DataShape) -> Trace:
        key = (data.batch_examples, data.batch_positions)
        if key not in self._traces:
            self._traces[key] = trace(self.outline, self.blocks, *key, self.recipe.dtype)
        return self._traces[key]

    def bounds(self, data: ShapeOf) -> Bounds:
        """Where to look for settings that fit."""
        widest = max(max(b.d_in, b.d_out) for b in self.blocks)
        tokens = self.settings.batch_tokens
        return Bounds(
            self.outline.units,
            min(widest, self.recipe.max_factor_dim or widest),
            tokens,
            data(tokens).longest,
        )

    def now(self) -> dict[str, Any]:
        """The settings that advice may change."""
        settings = self.settings
        store = next(name for name, dtype in DTYPES.items() if dtype == self.recipe.store_dtype)
        return {
            "stages": settings.stage_count(self.outline.units),
            "schedule": settings.schedule,
            "store_dtype": store,
        }


# The job


def plan(settings: PlanSettings) -> dict[str, Any]:
    """Show what a fit and a scoring would take; gives the same for machines.

    Raises:
        UserError: a mistake in settings, model or data.
    """
    settings.check()
    outline = open_outline(settings.model)
    blocks = choose_blocks(
        outline.skeleton(), settings.blocks, outline.default_scope, outline.tied_head
    )
    directory = Path(settings.out).absolute() if "://" not in settings.out else None
    supply = _with_spool(_supply(settings, directory), settings, directory)
    drafts = Drafts(
        outline,
        blocks,
        settings,
        _recipe(settings),
        _arrangement(settings),
        nodes_follow=settings.nodes is None and settings.memory is not None,
        rates=_rates(settings, directory),
        spool_apart=supply.spool is not None,
    )
    data = _data(settings, outline)
    queries = _uniform(settings.queries, settings.tokens)
    train = data
    if settings.train_examples is not None:
        train = _uniform(settings.train_examples, settings.tokens)

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
    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    recipe, place, groups = job.recipe, job.arrangement, len(job.groups)
    say(f"{drafts.outline.name}: {recipe.method} of {len(drafts.blocks)} blocks")
    say(report.sizes_line(sizes(job.stages, recipe)))
    resident_at_once = "all resident" if groups == 1 else f"{len(job.groups[0])} resident"
    where = f"{place.gpus} GPUs" if place.gpus else f"{place.nodes} nodes"
    say(
        f"{len(job.stages)} stages, {resident_at_once}, on {where}; {data.examples:,} examples, "
        f"{data.tokens:,} tokens; times: {'' if job.rates is None else job.rates.where}"
    )
    if not drafts._traced(data).seen:
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


def _recipe(settings: FitSettings) -> Recipe:
    settings = settings.resolved()
    assert settings.store_dtype is not None
    recipe = Recipe(
        method=settings.method,
        draws=settings.draws,
        max_factor_dim=settings.max_factor_dim,
        dtype=DTYPES[settings.dtype],
        store_dtype=DTYPES[settings.store_dtype],
        keep_sums=settings.keep_sums,
        logits_chunk=settings.logits_chunk,
    )
    if not isinstance(settings, PlanSettings):
        return recipe
    return replace(
        recipe,
        rank=rank_number(settings.rank),
        query_memory=parse_bytes("--query-memory", settings.query_memory),
        self_influence=settings.self_influence,
        ihvp=settings.ihvp,
    )


def _arrangement(settings: Execution) -> Arrangement:
    place = Arrangement(ray=settings.address != "none", cores=os.cpu_count() or 1)
    if isinstance(settings, PlanSettings):
        return replace(
            place, replicas=settings.replicas, nodes=settings.nodes or 1, gpus=settings.gpus
        )
    if settings.device != "cpu" and torch.cuda.is_available():
        return replace(place, gpus=torch.cuda.device_count())
    return place


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


def _with_spool(supply: Supply, settings: Execution, directory: Path | None) -> Supply:
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


def _rates(settings: PlanSettings, directory: Path | None) -> Rates:
    dtype = DTYPES[settings.dtype]
    here = measure(dtype, directory)
    return on_h100(dtype, here) if settings.gpus else here


def _uniform(examples: int, tokens: int) -> ShapeOf:
    return lambda batch_tokens: DataShape.uniform(examples, tokens, batch_tokens)


def _lengths(lengths: Sequence[int]) -> ShapeOf:
    return lambda batch_tokens: DataShape.of_lengths(lengths, batch_tokens, WINDOW)


def _data(settings: PlanSettings, outline: Outline) -> ShapeOf:
    if not settings.data:
        return _uniform(settings.examples, settings.tokens)
    directory = outline.tokenizer_dir
    found = read_examples(
        settings.data,
        tokenizer=None if directory is None else LazyTokenizer(directory),
        vocab_size=outline.vocab_size,
        max_positions=outline.max_positions,
        max_length=settings.max_length,
        long=settings.long,
        max_examples=settings.max_examples,
        seed=settings.seed,
        token_inputs=outline.token_inputs,
    )
    return _lengths([example.length for example in found])


# The check at the start of a job


def check_fit(
    settings: FitSettings,
    network: Outline,
    blocks: Sequence[Block],
    lengths: Sequence[int],
    store: Store,
) -> None:
    """Refuse a fit that cannot fit on this machine's memory or disk.

    Args:
        blocks: chosen; which share an input is seen on the way.
        lengths: tokens of every example.
        store: of the run; what it holds already need not be written again.

    Raises:
        UserError: by how much it does not fit, and what would.
    """
    if settings.force:
        return
    drafts = Drafts(network, blocks, settings, _recipe(settings), _arrangement(settings))
    data = _lengths(lengths)
    _refuse(drafts, data, store, lambda changes: drafts.fit(data, changes))


def check_influence(
    settings: InfluenceSettings,
    fitted: Mapping[str, Any],
    network: Outline,
    blocks: Sequence[Block],
    queries: Sequence[int],
    train: Sequence[int] | None,
    store: Store,
) -> None:
    """Refuse a scoring that cannot fit on this machine's memory or disk.

    Args:
        fitted: the fit's settings.
        queries, train: tokens of every query and of every training example.

    Raises:
        UserError: by how much it does not fit, and what would.
    """
    if settings.force:
        return
    recipe = Recipe(
        method=fitted["method"],
        max_factor_dim=fitted["max_factor_dim"],
        dtype=DTYPES[settings.dtype or fitted["dtype"]],
        store_dtype=DTYPES[fitted["store_dtype"]],
        logits_chunk=settings.logits_chunk,
        rank=settings.rank_number(),
        query_memory=parse_bytes("--query-memory", settings.query_memory),
        self_influence=settings.self_influence,
        ihvp=settings.ihvp,
    )
    drafts = Drafts(network, blocks, settings, recipe, _arrangement(settings))
    asked, trained = _lengths(queries), None if train is None else _lengths(train)
    _refuse(
        drafts,
        asked if trained is None else trained,
        store,
        lambda changes: drafts.influence(asked, trained, changes),
    )


def _refuse(
    drafts: Drafts, data: ShapeOf, store: Store, attempt: Callable[[Mapping[str, Any]], Plan]
) -> None:
    settings = drafts.settings
    directory = Path(store.path()) if store.local else None
    supply = _with_spool(supply_here(directory), settings, directory)
    drafts.spool_apart = supply.spool is not None
    address = settings.address or os.environ.get("RAY_ADDRESS") or "local"
    if address not in ("local", "none"):
        # Stages lie on other machines, whose memory Ray shares out.
        supply = replace(supply, memory=2**62, process=None)
    if drafts.arrangement.gpus:
        supply = replace(supply, gpu=torch.cuda.get_device_properties(0).total_memory)
    existing = 0 if directory is None else _bytes_below(directory)
    missing = shortfalls(attempt({}), supply, existing)
    if not missing:
        return
    options = advise(
        lambda changes: not shortfalls(attempt(changes), supply, existing),
        drafts.now(),
        drafts.bounds(data),
    )
    flags = as_flags(drafts.now())
    raise UserError(
        f"the plan of this job ({flags})",
        "; ".join(f"at most {report.size(m.available)} of {m.what}" for m in missing),
        "; ".join(
            f"{report.size(m.needed)} in the phase '{m.phase}', "
            f"{report.size(m.needed - m.available)} too much"
            for m in missing
        ),
        f"{as_sentence(options)} Or start it all the same with --force.",
    )


def _bytes_below(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total
