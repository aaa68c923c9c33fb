"""All comparisons and measurements of one machine, one after the other, in one file.

    speed.py ─► growth.py ─► scoring_memory.py ─► accuracy.py and numerics.py   a process each
        │ text, pictures, figures (JSON), in a directory each
        ▼
    targets.py: what was asked, what was found     bench_pictures.py
        └─► results/DATE-MACHINE.md, results/DATE-MACHINE-NAME.png

``make bench`` starts it, and makes kronfluence's environment before. Exit code 1 when a part fails:
the file has the others, and ``--keep`` goes on where it was.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from bench_pictures import PICTURES
from result_file import loads, machine_slug, modules_digest, processor, source_state, table
from targets import judge

HERE = Path(__file__).parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Part:
    """One of the scripts.

    Attributes:
        name: what it measures.
        script: its file.
        title: of its section.
        flags: what it is started with.
        small: likewise, where only the whole is tried.
        untimed: neither seconds nor memory are its results: runs beside others of the kind.
    """

    name: str
    script: str
    title: str
    flags: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    untimed: bool = False

    @property
    def place(self) -> str:
        """Its directory."""
        return self.name.replace(" ", "-")


PARTS = (
    Part(
        "speed", "speed.py", "Speed beside kronfluence",
        # For want of time (b), too, runs three times, and what misses the accuracy does not
        # (LOG.md): kronfluence's amp and bf16 on every shape, its medium on (b) and (c).
        flags=("--large", "b", "c", "--theirs", "float32", "medium", "--no-large-modes"),
        small=(
            "--shapes", "e", "--repeats", "1", "--ours", "float32", "--theirs", "float32",
            "--no-reference",
        ),
    ),
    Part(
        "growth", "growth.py", "How time and memory grow",
        small=("--axes", "examples", "--repeats", "1"),
    ),
    Part(
        "scoring memory", "scoring_memory.py", "Memory of scoring", ("--examples", "400"),
        small=("--examples", "8"),
    ),
    Part(
        "accuracy", "accuracy.py", "Accuracy against retraining",
        small=(
            "--subsets", "8", "--seeds", "2", "--networks", "1", "--byte-subsets", "6",
            "--byte-steps", "10", "--responses", "4", "--removals", "2",
        ),
        untimed=True,
    ),
    Part(
        "numerics", "numerics.py", "Numerics",
        small=("--examples", "64", "--steps", "10", "--layers", "1"),
        untimed=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Runs the benchmarks of this machine and writes one file."""

    kronfluence_python: Path
    """Interpreter of the environment that kronfluence is installed in (`make bench` makes it)."""
    parts: tuple[str, ...] = tuple(part.name for part in PARTS)
    """Which of them."""
    small: bool = False
    """Tiny sizes, to try the whole in some minutes: what is found means nothing."""
    keep: Path | None = None
    """Directory for the parts: those that are done there are not made again."""
    results: Path = HERE / "results"
    """Directory of the result file and its pictures."""
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    """Of the result file."""


@dataclass(frozen=True)
class Outcome:
    """How a part ended.

    Attributes:
        code: its exit code.
        seconds: what it took, with all times that it was started.
        starts: how often it was started.
        load: how busy the machine was before it.
        last: the last line that it said.
    """

    code: int
    seconds: float
    starts: int
    load: str
    last: str = ""


def run_part(part: Part, settings: Settings, work: Path) -> Outcome:
    """Run a part that is not there yet, and write down how it ended."""
    place = work / part.place
    record = place / "outcome.json"
    before = Outcome(**json.loads(record.read_text())) if record.is_file() else None
    if before is not None and before.code == 0:
        print(f"{part.name}: there already", flush=True)
        return before
    results = place / "results"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    command = [sys.executable, str(HERE / part.script)]
    command += part.small if settings.small else part.flags
    command += ["--results", str(results), "--figures", str(place / "figures.json")]
    if part.name == "speed":
        command += ["--kronfluence-python", str(settings.kronfluence_python.absolute())]
        command += ["--keep", str(place / "runs")]
    if part.name == "scoring memory":
        command += ["--place", str(place / "runs")]
    print(f"\n=== {part.title}\n", flush=True)
    load, started, code, last = loads(), time.perf_counter(), -1, ""
    # Threads that wait for one another must not spin: both sides' would count as computing.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"PYTHONUNBUFFERED": "1"}
    try:
        with (
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
                env=environment, errors="replace",
            ) as running,
            (place / "log.txt").open("w") as log,
        ):  # fmt: skip
            assert running.stdout is not None
            for line in running.stdout:
                print(line, end="", flush=True)
                log.write(line)
                last = line.strip() or last
            code = running.wait()
    finally:
        seconds, starts = time.perf_counter() - started, 1
        if before is not None:
            seconds, starts = seconds + before.seconds, starts + before.starts
        outcome = Outcome(code, seconds, starts, load, last)
        record.write_text(json.dumps(asdict(outcome)))
    return outcome


def run_parts(parts: Sequence[Part], settings: Settings, work: Path) -> dict[Part, Outcome]:
    """One after the other those that are timed, then together those that are not."""
    outcomes = {p: run_part(p, settings, work) for p in parts if not p.untimed}
    together = [part for part in parts if part.untimed]
    with ThreadPoolExecutor(max(1, len(together))) as pool:
        running = {part: pool.submit(run_part, part, settings, work) for part in together}
        return outcomes | {part: found.result() for part, found in running.items()}


def body(part: Part, outcome: Outcome, work: Path, name: str, results: Path) -> list[str]:
    """The section of a part: its own text, one heading lower, and its pictures, put in place."""
    lines = [f"## {part.title}", ""]
    if outcome.code:
        # Paths are this machine's.
        last = re.sub(r"(?<![\w.])/\S*/", "…/", outcome.last).replace("`", "'")
        return [*lines, f"**Failed** with exit code {outcome.code}. Its last words: `{last}`", ""]
    found = work / part.place / "results"
    (text,) = found.glob("*.md")
    # The title is the section's.
    own = "\n".join(text.read_text().splitlines()[1:]).strip("\n")
    own = re.sub(r"^(#+ )", r"#\1", own, flags=re.MULTILINE)
    for picture in sorted(found.glob("*.png")):
        placed = f"{name}-{re.sub(r'^[-0-9]+-', '', picture.name)}"
        shutil.copyfile(picture, results / placed)
        own = own.replace(f"({picture.name})", f"({placed})")
    return [*lines, *own.splitlines(), ""]


def figures_of(part: Part, work: Path) -> dict[str, Any]:
    """What a finished part left for the targets."""
    found: dict[str, Any] = json.loads((work / part.place / "figures.json").read_text())
    return found


def environment_seconds(python: Path) -> float | None:
    """What making kronfluence's environment took, if its maker wrote that down."""
    stamp = python.parent.parent / "installed"
    said = stamp.read_text().strip() if stamp.is_file() else ""
    return float(said) if said.isdigit() else None


def write(settings: Settings, outcomes: dict[Part, Outcome], work: Path, state: str) -> Path:
    """The file: targets, then every part."""
    name = f"{settings.date}-{machine_slug()}" + ("-small" if settings.small else "")
    settings.results.mkdir(parents=True, exist_ok=True)
    made = environment_seconds(settings.kronfluence_python)
    total = _seconds(outcomes) + (made or 0)
    done = {part: figures_of(part, work) for part, o in outcomes.items() if o.code == 0}
    whole = not settings.small and len(done) == len(PARTS) and made is not None
    targets = judge({part.name: found for part, found in done.items()}, total if whole else None)
    lines = [
        f"# Benchmarks on {processor()}, {settings.date}",
        "",
        *_facts(settings, state),
        "",
        "## What was asked, and what was found",
        "",
        *table(["target", "asked", "found", ""], [target.cells() for target in targets]),
        "",
        "Letters are shapes of models, see below; ratios are raycurv's over kronfluence's.",
        "",
        "## What it took",
        "",
        *_taken(outcomes, made, total),
        "",
    ]
    for part, outcome in outcomes.items():
        section = body(part, outcome, work, name, settings.results)
        if part in done and part.name in PICTURES:
            about, draw = PICTURES[part.name]
            draw(done[part], settings.results / f"{name}-{about}.png")
            section[2:2] = [f"![{part.title}]({name}-{about}.png)", ""]
        lines += section
    path = settings.results / f"{name}.md"
    path.write_text("\n".join(lines).rstrip() + "\n")
    print("\n=== " + "\n".join(" | ".join(target.cells()) for target in targets))
    return path


def _seconds(outcomes: dict[Part, Outcome]) -> float:
    """What all took: of those that ran together, the longest."""
    timed = [o.seconds for part, o in outcomes.items() if not part.untimed]
    together = [o.seconds for part, o in outcomes.items() if part.untimed]
    return sum(timed) + max(together, default=0.0)


def _facts(settings: Settings, state: str) -> list[str]:
    command = "make bench"
    if settings.small or set(settings.parts) != {part.name for part in PARTS}:
        parts = " ".join(f'"{p}"' if " " in p else p for p in settings.parts)
        command = "python benchmarks/bench.py --kronfluence-python KRONFLUENCE_PYTHON"
        command += f" --parts {parts}" + (" --small" if settings.small else "")
    small = ["", "**Tiny sizes, to try the whole: nothing here is a measurement.**"]
    return [
        f"    {command}",
        "",
        f"- torch {torch.__version__}, Python {platform.python_version()}; one process after the "
        "other and nothing beside them, but for accuracy and numerics, which ran together",
        f"- raycurv's source: {state}",
        *(small if settings.small else []),
    ]


def _taken(outcomes: dict[Part, Outcome], made: float | None, total: float) -> list[str]:
    rows = [["kronfluence's environment", "", f"{made:.0f}", "", ""]] if made is not None else []
    rows += [
        [part.name, part.script, f"{o.seconds:.0f}", str(o.starts), o.load]
        for part, o in outcomes.items()
    ]
    rows.append(["all", "", f"{total:.0f}", "", ""])
    return table(["part", "script", "seconds", "starts", "load before"], rows)


def open_work(settings: Settings) -> Path:
    """The directory for the parts.

    Raises:
        SystemExit: it holds parts of another source, or of other sizes.
    """
    if settings.keep is None:
        return Path(tempfile.mkdtemp(prefix="raycurv-bench-"))
    work = settings.keep.resolve()
    work.mkdir(parents=True, exist_ok=True)
    of, record = {"modules": modules_digest(), "small": settings.small}, work / "of.json"
    if record.is_file() and json.loads(record.read_text()) != of:
        raise SystemExit(
            f"{work} holds parts that were measured with other modules of raycurv, or other "
            "sizes. Give another directory with --keep, or delete this one."
        )
    record.write_text(json.dumps(of))
    return work


def main(settings: Settings) -> int:
    """Run what is missing, write the file, say where it is."""
    chosen: Sequence[Part] = [part for part in PARTS if part.name in settings.parts]
    unknown = set(settings.parts) - {part.name for part in PARTS}
    if unknown:
        raise SystemExit(f"No such part: {', '.join(sorted(unknown))}. See --help.")
    if not settings.kronfluence_python.is_file():
        raise SystemExit(f"{settings.kronfluence_python} is not there; `make bench` makes it.")
    work, state = open_work(settings), source_state()
    try:
        outcomes = run_parts(chosen, settings, work)
        path = write(settings, outcomes, work, state)
    except BaseException:
        print(f"\nParts that are done stay in {work}; go on with --keep {work}", flush=True)
        raise
    failed = [part.name for part, outcome in outcomes.items() if outcome.code]
    print(path)
    if failed:
        print(f"Failed: {', '.join(failed)}. Logs are in {work}; go on with --keep {work}")
    elif settings.keep is None:
        shutil.rmtree(work)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings)))
