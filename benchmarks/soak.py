"""Random kills over repeated small runs: no wrong result, no hang.

again and again: fit, influence        on a cluster of three nodes on this machine
meanwhile: a stage's actor, a task or, one time in eight, the driver itself is killed at random
in the end: every result equals the undisturbed one, bit for bit   ─► results/DATE-soak.md
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import tyro
from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
sys.path.insert(0, str(TESTS))

from commands import classified, flags_of, write_rows  # noqa: E402
from failures import lost, seconds_to_rebuild, timeline  # noqa: E402
from local_cluster import cluster, workers  # noqa: E402
from results import assert_same  # noqa: E402

# Of one job, killed however often: more than that is a hang.
_LONGEST = 300.0


@dataclass(frozen=True)
class Settings:
    """Kills processes of small jobs at random until so many were killed."""

    place: Path
    """Directory for the runs; its contents are replaced."""
    kills: int = 100
    """How many processes to kill."""
    minutes: float = 60.0
    """At most."""
    examples: int = 60
    """Training examples of a run."""
    seed: int = 0
    """Of when and whom."""


@dataclass
class Killer:
    """Kills at random moments, as long as it is told that a job runs.

    Attributes:
        made: the cluster.
        rng: when and whom.
        most: how many.
        killed: what was, and how often.
    """

    made: Cluster
    rng: random.Random
    most: int
    killed: Counter[str] = field(default_factory=Counter)
    driver: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Until ``most`` were killed."""
        while self.killed.total() < self.most:
            time.sleep(self.rng.uniform(0.5, 6.0))
            driver = self.driver
            if driver is None or driver.poll() is not None:
                continue
            if self.rng.random() < 1 / 8:
                driver.kill()
                self.killed["driver"] += 1
                continue
            found = workers(self.made)
            if not found:
                continue
            pid = self.rng.choice(sorted(found))
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            title = found[pid].removeprefix("ray::")
            self.killed["task" if title.startswith("run_task") else "stage"] += 1


def job(name: str, flags: dict[str, Any], killer: Killer | None, log: Path) -> int:
    """Run a job again until it is complete; gives how often it had to be started."""
    began = time.monotonic()
    for starts in range(1, 100):
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "jobs" / name), *flags_of(flags)],
                cwd=TESTS, stdout=subprocess.PIPE, stderr=file,
            )  # fmt: skip
            if killer is not None:
                killer.driver = process
            try:
                out, _ = process.communicate(timeout=_LONGEST)
            except subprocess.TimeoutExpired:
                process.kill()
                raise SystemExit(f"{name} hangs: {log}") from None
            finally:
                if killer is not None:
                    killer.driver = None
        if process.returncode == 0:
            return starts
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"{name} ended with {process.returncode}: {out.decode()} {log}")
        assert time.monotonic() - began < 3 * _LONGEST
    raise SystemExit(f"{name} does not come to an end")


def main(settings: Settings) -> None:
    """Run, kill, compare, report."""
    place = settings.place
    shutil.rmtree(place, ignore_errors=True)
    data = write_rows(place / "rows.parquet", classified(settings.examples))
    queries = write_rows(place / "queries.parquet", classified(6, seed=1))
    how = {"batch_tokens": 2, "commit_seconds": 0.2}
    fit = how | {
        "model": "commands:classifier", "data": data, "objective": "classification",
        "dtype": "float64",
    }  # fmt: skip
    score = how | {"queries": queries, "train": data, "rank": "full", "self": True, "ihvp": True}
    shapes = [{"replicas": 1, "stages": 2}, {"replicas": 2, "stages": 1}]
    began = time.monotonic()
    runs, starts, rebuilt, losses = 0, Counter(), [], 0
    with cluster(nodes=2, cores=2) as made:
        references = []
        for shape in shapes:
            out = place / f"reference-{len(references)}"
            here = shape | {"address": "none", "force": True}
            job("fit.py", fit | here | {"out": out / "run"}, None, place / "log")
            job(
                "influence.py", score | here | {"run": out / "run", "out": out / "scores"}, None,
                place / "log",
            )  # fmt: skip
            references.append(out)
        killer = Killer(made, random.Random(settings.seed), settings.kills)
        thread = threading.Thread(target=killer.run, daemon=True)
        thread.start()
        while thread.is_alive() and time.monotonic() - began < 60 * settings.minutes:
            number = runs % len(shapes)
            there = shapes[number] | {
                "address": made.address, "max_failures": 50, "max_actor_failures": 30,
            }  # fmt: skip
            out = place / f"run-{runs}"
            starts["fit"] += job(
                "fit.py", fit | there | {"out": out / "run"}, killer, place / "log"
            )
            starts["influence"] += job(
                "influence.py",
                score | there | {"run": out / "run", "out": out / "scores"},
                killer,
                place / "log",
            )
            for part in ("run", "scores"):
                assert_same(out / part, references[number] / part)
                rows = timeline(out / part)
                losses += len(lost(rows))
                rebuilt += seconds_to_rebuild(rows)
            shutil.rmtree(out)
            runs += 1
            print(json.dumps({"runs": runs, "killed": dict(killer.killed)}), flush=True)
    minutes = (time.monotonic() - began) / 60
    rebuilt.sort()
    of_whom = ", ".join(f"{count} of a {whom}" for whom, count in killer.killed.items())
    report = [
        f"# Random kills, {date.today()}",
        "",
        f"    python benchmarks/soak.py --place PLACE --kills {settings.kills}",
        "",
        f"- {killer.killed.total()} kills by SIGKILL ({of_whom}) in {minutes:.1f} "
        f"minutes, over {runs} fits and {runs} scorings of {settings.examples} examples, by "
        "turns 1 replica of 2 stages and 2 replicas of 1 stage, commits every 0.2 s, on a cluster "
        f"of three nodes on one machine of {os.cpu_count()} cores",
        f"- wrong results: 0 of {2 * runs} (bit for bit against undisturbed runs in one process); "
        "hangs: 0",
        f"- jobs started again because the driver was killed: {starts.total() - 2 * runs}; losses "
        f"that drivers saw and mended: {losses}",
        f"- seconds from a loss to its actor built again: median {rebuilt[len(rebuilt) // 2]:.1f}, "
        f"longest {rebuilt[-1]:.1f}" if rebuilt else "- no actor had to be built again",
        "",
    ]  # fmt: skip
    text = "\n".join(report)
    (ROOT / "benchmarks" / "results" / f"{date.today()}-soak.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Settings))
