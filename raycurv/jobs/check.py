"""The check at the start of a job: what cannot fit on this machine is refused, by how much."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from raycurv.data.microbatch import Lengths
from raycurv.driver.settings import (
    DTYPES,
    EvaluateSettings,
    FitSettings,
    InfluenceSettings,
    parse_bytes,
)
from raycurv.errors import UserError
from raycurv.files.store import Store
from raycurv.jobs.drafts import Drafts, ShapeOf, arrangement_of, of_lengths, recipe_of, with_spool
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.methods import open_method
from raycurv.models.model import Outline
from raycurv.planning import report
from raycurv.planning.advice import (
    advise,
    as_flags,
    as_sentence,
    shortfalls,
)
from raycurv.planning.plan import Plan
from raycurv.planning.shapes import Recipe
from raycurv.planning.supply import supply_here


def check_fit(
    settings: FitSettings,
    network: Outline,
    blocks: Sequence[Block],
    lengths: Lengths,
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
    drafts = Drafts(network, blocks, settings, recipe_of(settings), arrangement_of(settings))
    data = of_lengths(lengths)
    _refuse(drafts, data, store, lambda changes: drafts.fit(data, changes))


def check_influence(
    settings: InfluenceSettings,
    fitted: Mapping[str, Any],
    network: Outline,
    blocks: Sequence[Block],
    queries: Lengths,
    train: Lengths | None,
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
        rows=fitted.get("rows") or 0,
        max_factor_dim=fitted["max_factor_dim"],
        dtype=DTYPES[settings.dtype or fitted["dtype"]],
        store_dtype=DTYPES[fitted["store_dtype"]],
        logits_chunk=settings.logits_chunk,
        # Products of M-FAC are whole until they are truncated.
        rank=None if open_method(fitted["method"]).ranked else settings.rank_number(),
        query_memory=parse_bytes("--query-memory", settings.query_memory),
        self_influence=settings.self_influence,
        ihvp=settings.ihvp,
    )
    drafts = Drafts(network, blocks, settings, recipe, arrangement_of(settings))
    asked, trained = of_lengths(queries), None if train is None else of_lengths(train)
    _refuse(
        drafts,
        asked if trained is None else trained,
        store,
        lambda changes: drafts.influence(asked, trained, changes),
    )


def check_evaluate(
    settings: EvaluateSettings, network: Outline, lengths: Lengths, store: Store
) -> None:
    """Refuse an evaluation that cannot fit on this machine's memory or disk.

    Args:
        lengths: tokens of every example.

    Raises:
        UserError: by how much it does not fit, and what would.
    """
    if settings.force:
        return
    dtype = DTYPES[settings.dtype]
    # What an identity fit does, which is to compute the losses.
    recipe = Recipe(
        method="identity", dtype=dtype, store_dtype=dtype, logits_chunk=settings.logits_chunk
    )
    drafts = Drafts(network, (), settings, recipe, arrangement_of(settings))
    data = of_lengths(lengths)
    _refuse(drafts, data, store, lambda changes: drafts.fit(data, changes))


def _refuse(
    drafts: Drafts, data: ShapeOf, store: Store, attempt: Callable[[Mapping[str, Any]], Plan]
) -> None:
    settings = drafts.settings
    directory = Path(store.path()) if store.local else None
    supply = with_spool(supply_here(directory), settings, directory)
    drafts.spool_apart = supply.spool is not None
    if settings.cluster not in ("local", "none"):
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
