"""``tables/timeline``: what every actor and task did, and when; one row an operation.

Of an actor that is lost there is what it had answered; its loss and its rebuilding are rows too.
"""

from __future__ import annotations

from datetime import datetime, timezone

import pyarrow as pa

from raycurv.files.store import Store
from raycurv.files.tables import TIMELINE, footer, write_table
from raycurv.stages.pool import Pool
from raycurv.stages.spans import Span

DIRECTORY = "tables/timeline"
# Spans that may wait in memory for the next commit.
_FULL = 4096


def write_long_timeline(store: Store, pool: Pool, phase: str) -> None:
    """As :func:`write_timeline`, if so much was done that it must not wait for a commit."""
    if len(pool.spans) > _FULL:
        write_timeline(store, pool, phase)


def write_timeline(store: Store, pool: Pool, phase: str) -> None:
    """Write down what a pool has done since the last time."""
    spans = pool.spans.take()
    if not spans:
        return
    number = len(store.names(DIRECTORY, ".parquet"))
    rows = [{"phase": phase} | vars(span) | _times(span) for span in spans]
    table = pa.Table.from_pylist(rows, schema=TIMELINE)
    write_table(store, f"{DIRECTORY}/part-{number:05d}.parquet", table, footer({}))


def _times(span: Span) -> dict[str, datetime]:
    return {
        name: datetime.fromtimestamp(getattr(span, name), timezone.utc) for name in ("start", "end")
    }
