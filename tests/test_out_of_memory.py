"""A claim about memory: an actor that Ray ends to save its node is named and built again.

On a Ray of its own whose threshold lies a little above what the machine uses now: the machine's own
memory is never filled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from commands import classified, greedy
from failures import lost, timeline
from results import assert_same

import raycurv

torch.set_num_threads(1)

GIB = 2**30
# Above what is used when the test starts, until Ray acts; and what the actor takes at most.
ROOM, MOST = 3 * GIB, 5 * GIB
FIT: dict[str, Any] = {
    "objective": "classification",
    "dtype": "float64",
    "batch_tokens": 4,
    "stages": 2,
    "quiet": True,
}


def _memory() -> tuple[int, int]:
    """Bytes in all and in use, as the kernel counts them."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(lines[k].split()[0]) * 1024 for k in ("MemTotal", "MemAvailable"))
    return total, total - available


def test_an_actor_out_of_memory_is_named_and_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total, used = _memory()
    if used + MOST > 0.9 * total:
        pytest.skip(f"needs {MOST / GIB:g} GiB of free memory")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{(used + ROOM) / total:.3f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    monkeypatch.setenv("GREEDY_MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("GREEDY_BYTES", str(MOST))
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, logging_level="error",
        log_to_driver=False,
    )  # fmt: skip
    try:
        raycurv.fit(greedy, classified(20), tmp_path / "run", address="local", **FIT)
    finally:
        ray.shutdown()
    rows = lost(timeline(tmp_path / "run"))
    # Ray may end the other one, too, before it sees that memory is free again.
    assert ("replica 0, stage 1", 0) in {(row["actor"], row["microbatch"]) for row in rows}
    assert all("memory" in row["note"].lower() for row in rows)
    # The mark is there by now: the same in one process takes no more than it should.
    raycurv.fit(greedy, classified(20), tmp_path / "alone", address="none", **FIT)
    assert_same(tmp_path / "run", tmp_path / "alone")
