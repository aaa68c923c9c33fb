"""How well chosen dampings foretell retraining: LDS under `evidence` and `heldout` beside a sweep.

    tasks, networks, subsets of accuracy.py -> LDS under each damping of a grid, and those chosen

`heldout` chooses on half of the subsets, and every LDS is of the other half.
"""

from __future__ import annotations

import datetime
import platform
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from accuracy import Bench
from accuracy import Settings as AccuracySettings
from agreement import in_order
from attribution import BATCH, Method
from datamodel import GroundTruth
from result_file import command_line, processor, source_state, table
from tasks import Task

HERE = Path(__file__).parent
FACTORS = ("0.001", "0.003", "0.01", "0.03", "0.1", "0.3", "1", "3", "10")


@dataclass(frozen=True)
class Settings:
    """Measures what chosen dampings are worth."""

    results: Path = HERE / "results"
    """Directory of the result file."""
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    """Of the result file."""
    byte_subsets: int = 32
    """Subsets of the language model."""
    byte_seeds: int = 2
    """Times that each of them is trained on."""
    threads: int = 1
    """Threads of torch."""


def removal_rows(task: Task, truth: GroundTruth) -> list[dict[str, Any]]:
    """What training on each subset did, as ``--removals`` takes it."""
    ids = [row["id"] for row in task.train.rows("example")]
    queries = [row["id"] for row in task.queries.rows("query")]
    losses_SQ = truth.losses_RSQ.mean(dim=0)
    return [
        {
            "removed": [one for one, kept in zip(ids, mask_N.tolist(), strict=True) if not kept],
            "query_ids": queries,
            "measured": losses_Q.tolist(),
        }
        for mask_N, losses_Q in zip(truth.masks_SN, losses_SQ, strict=True)
    ]


def measured(bench: Bench, task: Task) -> list[str]:
    """The section of a task."""
    truth, lines = bench.truth(task)
    half = len(truth.masks_SN) // 2
    seen = GroundTruth(truth.masks_SN[:half], truth.losses_RSQ[:, :half])
    held = GroundTruth(truth.masks_SN[half:], truth.losses_RSQ[:, half:])
    ways: dict[str, dict[str, Any]] = {one: {"damping": one} for one in FACTORS}
    ways["evidence"] = {"damping": "evidence"}
    ways["heldout"] = {"damping": "heldout", "removals": removal_rows(task, seen)}
    ekfac = Method("EK-FAC", {"method": "ekfac"})
    rows = []
    for number, (name, asked) in enumerate(ways.items()):
        found, said = [], []
        for attribution in bench.attributions(task):
            scores = attribution.run(ekfac).influence(
                task.queries.rows("query"), task.train.rows("example"),
                attribution.place / f"damping-{number}", quiet=True, address="none",
                batch_tokens=BATCH, rank="full", **asked,
            )  # fmt: skip
            found.append(torch.from_numpy(in_order(scores)).double())
            said.append(scores.manifest.facts.get("damping", {}).get("value", ""))
        lds = held.lds(torch.stack(found).mean(dim=0))
        rows.append([name, ", ".join(filter(None, said)), *lds.cells()])
    header = ["--damping", "chosen, of each network", "LDS", "over queries", "over subsets"]
    return [f"## {task.title}", "", *lines[:2], "", *table(header, rows), ""]


def main(settings: Settings) -> None:
    """Measure, print and write the report."""
    torch.set_num_threads(settings.threads)
    of = AccuracySettings(byte_subsets=settings.byte_subsets, byte_seeds=settings.byte_seeds)
    with TemporaryDirectory() as directory:
        bench = Bench(of, Path(directory))
        tasks = (*bench.tasks.values(), bench.bytes)
        sections = [line for task in tasks for line in measured(bench, task)]
    text = "\n".join([
        f"# Chosen dampings, {settings.date}", "",
        f"    {command_line('damping.py', settings, Settings())}", "",
        f"- torch {torch.__version__}, Python {platform.python_version()}; {processor()}, "
        f"{settings.threads} thread(s)",
        f"- raycurv's source: {source_state()}",
        "- EK-FAC, rank full; scores are means over 2 networks. `heldout` chooses on the first "
        "half of the subsets; LDS is of the other half",
        "- intervals hold 95 % of a bootstrap: over queries, and over subsets", "", *sections,
    ])  # fmt: skip
    print(text)
    (settings.results / f"{settings.date}-damping.md").write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
