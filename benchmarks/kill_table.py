"""What is lost, how long it takes to be whole again, and what is done twice: one row a failure.

a fit and a scoring of 2 replicas of 2 stages, on a cluster of three nodes on this machine
one failure a run, at a chosen operation; results against the undisturbed run's, bit for bit
                                                                ─► results/DATE-kills.md
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import tyro
from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
sys.path.insert(0, str(TESTS))

from commands import classified, classifier, flags_of, start, write_rows  # noqa: E402
from failures import Strike, hang, seconds_to_rebuild, striking, timeline  # noqa: E402
from local_cluster import cluster  # noqa: E402
from results import assert_same  # noqa: E402

import raycurv  # noqa: E402
from raycurv.jobs.inputs import Inputs  # noqa: E402

HANG_SECONDS = 6.0
SHAPE: dict[str, Any] = {"replicas": 2, "stages": 2}
FIT: dict[str, Any] = SHAPE | {
    "objective": "classification", "dtype": "float64", "batch_tokens": 2, "quiet": True,
    "commit_seconds": 0.1,
}  # fmt: skip
SCORE: dict[str, Any] = SHAPE | {
    "rank": "full", "batch_tokens": 2, "self_influence": True, "ihvp": True, "quiet": True,
    "commit_seconds": 0.1,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Fails in every way once, and reports each."""

    place: Path
    """Directory for the runs; its contents are replaced."""
    examples: int = 120
    """Training examples."""


@dataclass(frozen=True)
class Row:
    """One failure.

    Attributes:
        what: was lost, and when.
        seconds: from the loss to everything being built again.
        redone: operations of stages that were done more than once, of how many.
        equal: how the results compare.
    """

    what: str
    seconds: float
    redone: str
    equal: str = "bit for bit"


def redone(folder: Path) -> str:
    """Operations done more than once, of all that were needed."""
    done = Counter(
        (row["phase"], row["actor"], row["operation"], row["microbatch"])
        for row in timeline(folder)
        if row["operation"] in ("forward", "turn", "backward")
    )
    return f"{done.total() - len(done)} of {len(done)}"


def main(settings: Settings) -> None:
    """Fail, compare, report."""
    place = settings.place
    shutil.rmtree(place, ignore_errors=True)
    rows, queries = classified(settings.examples), classified(12, seed=1)
    table: list[Row] = []
    with cluster(nodes=2, cores=2) as made:

        def fit(name: str, address: str = "", **more: Any) -> Path:
            raycurv.fit(
                classifier, rows, place / name, address=address or made.address, **(FIT | more)
            )
            return place / name

        def score(name: str, address: str = "") -> Path:
            run = raycurv.open(reference)
            run._inputs = Inputs(model=classifier)
            run.influence(queries, rows, place / name, address=address or made.address, **SCORE)
            return place / name

        reference = fit("reference", "none", force=True)
        scores = score("reference-scores", "none")

        def struck(what: str, strike: Strike, scoring: bool = False, **more: Any) -> None:
            name = f"run-{len(table)}"
            with striking(strike):
                found = score(name) if scoring else fit(name, **more)
            assert_same(found, scores if scoring else reference)
            took = seconds_to_rebuild(timeline(found))
            table.append(Row(what, max(took), redone(found)))
            print(table[-1], flush=True)

        struck("a stage's actor, first pass", Strike("turn", 30, replica=0, stage=1))
        struck("a stage's actor, adding up replicas", Strike("joined", replica=0, stage=1, skip=1))
        struck("a stage's actor, second pass", Strike("backward", 31, replica=1, stage=0, skip=1))
        struck("a stage's actor, queries", Strike("forward", 3, replica=1, stage=0), scoring=True)
        struck("a stage's actor, scores", Strike("turn", 30, replica=0, stage=1), scoring=True)
        struck(
            f"a stage's actor that hangs (--hang-seconds {HANG_SECONDS:g}), first pass",
            Strike("turn", 30, replica=0, stage=1, act=hang),
            hang_seconds=HANG_SECONDS,
        )
        table.append(task_killed(fit, reference))
        made.add_node(num_cpus=2)
        struck(
            "a node with both stages of a replica, with a spare, first pass",
            Strike("turn", 30, replica=0, stage=1, act=removing(made)),
            place_seconds=60,
        )
        table += driver_killed(made, place, rows, reference)
    lines = [
        f"# Failures, {date.today()}",
        "",
        "    python benchmarks/kill_table.py --place PLACE",
        "",
        f"- fits and scorings of {settings.examples} examples in microbatches of 2; 2 replicas of "
        "2 stages, commits every 0.1 s, a cluster of three nodes on one machine of "
        f"{os.cpu_count()} cores; SIGKILL; SIGSTOP for what hangs",
        "- seconds: from the moment that the loss was seen until all stages are built and "
        "restored (a process that imports torch takes most of it); of the driver, from its start "
        "to the first new microbatch",
        "",
        "| lost | seconds | operations done twice | results |",
        "|---|---|---|---|",
        *(f"| {r.what} | {r.seconds:.1f} | {r.redone} | {r.equal} |" for r in table),
        "",
    ]
    text = "\n".join(lines)
    (ROOT / "benchmarks" / "results" / f"{date.today()}-kills.md").write_text(text)
    print(text)


def removing(made: Cluster) -> Callable[[Any], None]:
    """Kills the node that an actor is on."""

    def remove(actor: Any) -> None:
        (node,) = [n for n in made.worker_nodes if n.node_id == actor.node]
        made.remove_node(node, allow_graceful=False)

    return remove


def task_killed(fit: Callable[..., Path], reference: Path) -> Row:
    """An eigendecomposition whose process is killed."""
    from test_kills import died_in_a_task

    from raycurv.steps import decompositions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decompositions, "decompose_factors", died_in_a_task)
        found = fit("task")
    assert_same(found, reference)
    assert (found.parent / "died").exists()
    lost = [row for row in timeline(found) if row["operation"] == "lost"]
    done = [row for row in timeline(found) if "more" in row["note"] and row not in lost]
    seen = min(row["start"] for row in lost)
    seconds = (max(row["end"] for row in done) - seen).total_seconds()
    return Row("an eigendecomposition's process", seconds, redone(found))


def driver_killed(
    made: Cluster, place: Path, rows: list[dict[str, Any]], reference: Path
) -> list[Row]:
    """The driver, within a pass and between phases."""
    data = write_rows(place / "rows.parquet", rows)
    found = []
    for name, moment in (
        ("first pass", "work/covariance/commit.json"),
        ("between phases, when the first eigenbasis is there", "eigen/*.safetensors"),
    ):
        out = place / f"driver-{len(found)}"
        flags = {k: v for k, v in FIT.items() if k != "quiet"} | {
            "model": "commands:classifier", "data": data, "out": out, "address": made.address,
        }  # fmt: skip
        process = start("fit.py", flags_of(flags), subprocess.DEVNULL)
        while not list(out.glob(moment)):
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.wait()
        before = len(timeline(out))
        began = time.time()
        process = start("fit.py", flags_of(flags), subprocess.DEVNULL)
        assert process.wait(timeout=300) == 0
        assert_same(out, reference)
        new = [
            row["start"].timestamp()
            for row in timeline(out)[before:]
            if row["operation"] in ("forward", "turn") and row["microbatch"] >= 0
        ]
        found.append(Row(f"the driver, {name}", min(new) - began, redone(out)))
        print(found[-1], flush=True)
    return found


if __name__ == "__main__":
    main(tyro.cli(Settings))
