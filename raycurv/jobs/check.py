"""The check at the start of a job: what cannot fit on this machine is refused, by how much."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from raycurv.data.microbatch import Lengths
from raycurv.errors import UserError
from raycurv.files.store import Store
from raycurv.jobs.drafts import Drafts, of_lengths, with_spool
from raycurv.planning import report
from raycurv.planning.advice import advise, as_flags, as_sentence, shortfalls
from raycurv.planning.plan import Plan
from raycurv.planning.supply import supply_here


def check_plan(
    drafts: Drafts, store: Store, data: Lengths | None, queries: Lengths | None = None
) -> None:
    """Refuse a job that cannot fit on this machine's memory or disk.

    Args:
        drafts: plans of the job.
        store: of the run; what it holds already need not be written again.
        data: tokens of every example of a fit, or of every training example of a scoring, if any.
        queries: tokens of every query of a scoring; a fit has none.

    Raises:
        UserError: by how much it does not fit, and what would.
    """
    trained = None if data is None else of_lengths(data)
    asked = None if queries is None else of_lengths(queries)
    largest = trained or asked
    assert largest is not None

    def attempt(changes: Mapping[str, Any]) -> Plan:
        if asked is not None:
            return drafts.influence(asked, trained, changes)
        assert trained is not None
        if drafts.recipe.directions:
            return drafts.products(trained, changes)
        return drafts.fit(trained, changes)

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
        drafts.bounds(largest),
    )
    flags, said = as_flags(drafts.now()), as_sentence(options)
    for option in options:
        if "query_memory" in option:
            many = drafts.queries_in(option["query_memory"], largest)
            said += f" That is {many:,} queries at a time."
    raise UserError(
        f"the plan of this job ({flags})",
        "; ".join(f"at most {report.size(m.available)} of {m.what}" for m in missing),
        "; ".join(
            f"{report.size(m.needed)} in the phase '{m.phase}', "
            f"{report.size(m.needed - m.available)} too much"
            for m in missing
        ),
        f"{said} Or start it all the same with --force.",
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
