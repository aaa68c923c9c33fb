"""Claims about run directories of strangers, and about bits that flip: they are read as they were
written, or refused in words."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pytest

import raycurv
from raycurv.files.store import Store
from raycurv.files.tables import TIMELINE, write_table
from raycurv.jobs.timeline.lanes import read_lanes

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from fuzz_runs import run_cases
from fuzzing import tried


def test_a_changed_file_is_refused_or_says_what_it_said(tmp_path: Path) -> None:
    outcome = tried(run_cases(tmp_path, seed=20), range(180))
    assert not outcome.faults, "\n".join(outcome.faults.values())
    # A change of what no reader looks at, such as sums that were kept, is none.
    assert outcome.ends["read"] > 5 and outcome.ends["DamagedFile"] > 60, outcome.ends


def test_a_timeline_without_times_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    row = dict.fromkeys(TIMELINE.names)
    write_table(store, "tables/timeline/a.parquet", pa.Table.from_pylist([row], schema=TIMELINE))
    with pytest.raises(raycurv.errors.DamagedFile, match="phase"):
        read_lanes(store)
