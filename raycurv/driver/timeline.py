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
from raycurv.stages.timeline import Span

DIRECTORY = "tables/timeline"


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
    table = pa.Table.from_pylist([_row(span, phase) for span in spans], schema=TIMELINE)
    write_table(store, f"{DIRECTORY}/part-{number:05d}.parquet", table, footer({}))


def _row(span: Span, phase: str) -> dict[str, object]:
    return {
        "phase": phase,
        "actor": span.actor,
        "operation": span.operation,
        "microbatch": span.microbatch,
        "start": _when(span.start),
        "end": _when(span.end),
        "transport": span.transport,
        "note": span.note,
        "node": span.node,
        "pid": span.pid,
        "memory": span.memory,
    }


def _when(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)
