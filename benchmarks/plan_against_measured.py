"""Plans against what jobs then take: memory and disk of five settings, planned and measured.

    checkpoint, examples ─► jobs/plan.py --json ─► planned ┐
                        └─► jobs/fit.py, influence.py ─► footprint.py ─► measured ┴─► table

Each job runs as a person would start it. Results: ``results/DATE-plan.md``.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
import tyro
from footprint import Footprint, measure

ROOT = Path(__file__).resolve().parent.parent
# How far a plan may be from what is measured.
MOST = 0.20


@dataclass(frozen=True)
class Case:
    """One setting.

    Attributes:
        name: what is special about it.
        width, ff, layers, vocab: of the model.
        examples: how many, of ``shortest`` to ``longest`` tokens.
        flags: of the fit, and of its plan.
        queries: of a scoring; 0 for none.
        scoring: flags of the scoring, and of its plan.
    """

    name: str
    width: int
    ff: int
    layers: int
    vocab: int
    examples: int
    shortest: int
    longest: int
    flags: tuple[str, ...]
    queries: int = 0
    scoring: tuple[str, ...] = ()


CASES = (
    Case(
        "one process, pipelined, float32, padding",
        *(1536, 2048, 6, 4096),
        *(24, 32, 64),
        ("--address", "none", "--batch-tokens", "512"),
    ),
    Case(
        "two actors, pipelined, float32",
        *(1536, 2048, 6, 4096),
        *(16, 64, 64),
        ("--address", "local", "--stages", "2", "--batch-tokens", "512"),
    ),
    Case(
        "one process, swept, bfloat16, tiles of 512",
        *(4096, 8192, 2, 16384),
        *(16, 64, 64),
        (
            *("--address", "none", "--schedule", "swept", "--dtype", "bfloat16"),
            *("--store-dtype", "bfloat16", "--max-factor-dim", "512", "--batch-tokens", "512"),
        ),
    ),
    Case(
        "one process, K-FAC, sums kept, three stages in a pipeline",
        *(1536, 2048, 6, 4096),
        *(24, 32, 32),
        (
            *("--address", "none", "--method", "kfac", "--keep-sums", "--stages", "3"),
            *("--batch-tokens", "256"),
        ),
    ),
    Case(
        "one process, scoring at rank 128, of the diagonal",
        *(2048, 4096, 4, 4096),
        *(16, 64, 64),
        ("--address", "none", "--method", "diagonal", "--batch-tokens", "512"),
        queries=8,
        scoring=("--rank", "128"),
    ),
)


@dataclass(frozen=True)
class Settings:
    """Measures jobs against their plans, and writes the table."""

    only: tuple[int, ...] = ()
    """Numbers of the cases to run, from 0; all by default."""
    place: Path | None = None
    """Directory to work in; a temporary one by default."""
    out: Path | None = None
    """Markdown file; results/DATE-plan.md by default, when all cases run."""


@dataclass(frozen=True)
class Row:
    """Bytes, planned and measured."""

    case: str
    job: str
    phase: str
    memory: tuple[int, int]
    disk: tuple[int, int]

    @property
    def ratios(self) -> tuple[float, float]:
        """Planned over measured."""
        return self.memory[0] / self.memory[1], self.disk[0] / self.disk[1]


def write_examples(path: Path, case: Case, count: int, seed: int) -> Path:
    """Random tokens, lengths spread evenly."""
    rng = np.random.default_rng(seed)
    lengths = np.linspace(case.shortest, case.longest, count).astype(int)
    rows = [{"input_ids": rng.integers(0, case.vocab, n).tolist()} for n in lengths]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def run(job: str, *flags: str | Path) -> str:
    """Standard output of a job that nobody watches."""
    command = [sys.executable, str(ROOT / "jobs" / job), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def watched(job: str, watch: Path, log: Path, *flags: str | Path) -> Footprint:
    """What a job takes."""
    command = [sys.executable, str(ROOT / "jobs" / job), *map(str, flags)]
    taken = measure(command, [watch], every=0.05, log=log)
    if taken.returncode:
        raise SystemExit(f"{job} failed:\n{log.read_text()}")
    return taken


def compare(case: Case, place: Path) -> list[Row]:
    """Plan and run one case."""
    model = place / "model"
    shape = {"width": case.width, "ff": case.ff, "layers": case.layers, "vocab": case.vocab}
    maker = [sys.executable, str(ROOT / "benchmarks/llama_checkpoint.py"), "--out", str(model)]
    maker += [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    subprocess.run(maker, check=True, capture_output=True)
    data = write_examples(place / "train.parquet", case, case.examples, 0)
    common = ("--model", model, "--data", data, *case.flags)
    asked = ("--queries", str(case.queries or 1), "--tokens", str(case.longest))
    planned = json.loads(
        run("plan.py", "--json", "--out", place, *common, *asked, *case.scoring).splitlines()[-1]
    )["plans"]
    fitted = place / "run"
    taken = watched("fit.py", fitted, place / "fit.log", *common, "--out", fitted)
    rows = [_row(case, "fit", planned["fit"], taken)]
    if case.queries:
        queries = write_examples(place / "queries.parquet", case, case.queries, 1)
        out = place / "scores"
        here = [w for w in case.flags if w not in ("--method", "diagonal", "kfac")]
        taken = watched(
            "influence.py", out, place / "influence.log", "--run", fitted, "--queries", queries,
            "--train", data, "--out", out, *here, *case.scoring,
        )  # fmt: skip
        rows.append(_row(case, "influence", planned["influence"], taken))
    return rows


def _row(case: Case, job: str, planned: dict[str, object], taken: Footprint) -> Row:
    phases = planned["phases"]
    assert isinstance(phases, list)
    (directory,) = taken.directories.values()
    most = max(phases, key=lambda phase: phase["node"])
    return Row(
        case.name,
        job,
        most["name"],
        (int(str(planned["memory"])), taken.memory_bytes),
        (int(str(planned["disk"])), directory.peak),
    )


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    lines = [
        "| setting | job | memory planned | measured | ratio | disk planned | measured | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory, disk = row.ratios
        lines.append(
            f"| {row.case} | {row.job} | {_mb(row.memory[0])} ({row.phase}) | "
            f"{_mb(row.memory[1])} | {memory:.2f} | {_mb(row.disk[0])} | {_mb(row.disk[1])} | "
            f"{disk:.2f} |"
        )
    return "\n".join(lines)


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def main(settings: Settings) -> int:
    """0 when every plan is near enough, else 1."""
    chosen = settings.only or range(len(CASES))
    rows: list[Row] = []
    for number in chosen:
        place = settings.place or Path(tempfile.mkdtemp(prefix="plan-"))
        folder = place / f"case-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        rows += compare(CASES[number], folder)
        print(table(rows[-1:]), flush=True)
        if settings.place is None:
            shutil.rmtree(place)
    worst = max(abs(ratio - 1) for row in rows for ratio in row.ratios)
    today = date.today().isoformat()
    text = f"""# Plans against measurement, {today}

    python benchmarks/plan_against_measured.py

- torch {torch.__version__}, transformers {transformers.__version__}, Python \
{platform.python_version()}; {os.cpu_count()} cores, OMP_NUM_THREADS \
{os.environ.get("OMP_NUM_THREADS", "unset")}
- memory: anonymous resident bytes of all the job's processes and the growth of /dev/shm, read
  every 0.05 s; disk: bytes of the job's directory, read every 2 s
- furthest from measurement: {worst:.0%}; target at most {MOST:.0%}: \
**{"reached" if worst <= MOST else "missed"}**

{table(rows)}
"""
    print(text)
    if not settings.only:
        out = settings.out or ROOT / "benchmarks/results" / f"{today}-plan.md"
        out.write_text(text)
    return 0 if worst <= MOST else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings)))
