"""``tables/timeline``: what every actor and task did, when; one row an operation.

Rows of an actor that is lost end with what it had answered; that it was lost, and built again, are
rows as well.
"""

from __future__ import annotations

from datetime import datetime, timezone

import pyarrow as pa

from raycurv.files.store import Store
from raycurv.files.tables import TIMELINE, footer, write_table
from raycurv.stages.pool import Pool

DIRECTORY = "tables/timeline"
# Spans that may wait in memory for the next commit.
_FULL = 4096


def write_long_timeline(store: Store, pool: Pool, phase: str) -> None:
    """Write down what was done since the last time if it has become much."""
    if len(pool.spans) > _FULL:
        write_timeline(store, pool, phase)


def write_timeline(store: Store, pool: Pool, phase: str) -> None:
    """Write down what was done since the last time.

    Args:
        store: of the run.
        pool: that did it.
        phase: in which.
    """
    spans = pool.spans.take()
    if not spans:
        return
    number = len(store.names(DIRECTORY, ".parquet"))
    columns = {"phase": [phase] * len(spans)} | {
        name: [getattr(span, name) for span in spans] for name in TIMELINE.names[1:]
    }
    for name in ("start", "end"):
        columns[name] = [_when(seconds) for seconds in columns[name]]
    table = pa.table(columns, schema=TIMELINE)
    write_table(store, f"{DIRECTORY}/part-{number:05d}.parquet", table, footer({}))


def _when(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)
