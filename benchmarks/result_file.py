"""What the result files are made of: tables, the machine, the command, the source measured."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import raycurv

HERE = Path(__file__).parent


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, its columns padded."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return [line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)]


def processor() -> str:
    """The processor's own name, and how many cores are here."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        names = [value.strip() for key, _, value in lines if key.strip() == "model name"]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


def machine_slug() -> str:
    """The same for the name of a file: ``amd-epyc-2-cores``."""
    plain = re.sub(r"\((R|TM)\)|\bCPU\b|@ [\d.]+GHz", "", processor())
    return "-".join(re.findall(r"[a-z0-9]+", plain.lower()))


def modules_digest() -> str:
    """Of raycurv's modules as they lie."""
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(Path(raycurv.__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def source_state() -> str:
    """Commit of raycurv, whether files differ from it, and the digest of its modules."""
    describe = ["git", "-C", HERE, "describe", "--always", "--dirty=, with uncommitted changes"]
    # A copy may lie on a machine that has no git.
    said = shutil.which("git") and subprocess.run(
        describe, capture_output=True, text=True, check=False
    )
    commit = (said and said.stdout.strip()) or "not a git checkout"
    return f"{commit}; blake2b of its modules {modules_digest()}"


def loads() -> str:
    """How busy the machine is."""
    return ", ".join(f"{load:.1f}" for load in os.getloadavg())


# Where results go is no part of what was measured.
_WHERE = ("results", "figures", "date", "keep")


def made_with(*versions: str) -> list[str]:
    """Lines for a report: of which source and versions it is, and on what machine."""
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    return [
        f"- raycurv at {source_state()}; {', '.join(versions)}",
        f"- machine: {processor()}; load at the end {loads()}; OMP_NUM_THREADS {threads}",
    ]


def command_line(script: str, settings: Any, plain: Any) -> str:
    """The command, with every flag that differs from ``plain``'s.

    A path is this machine's, so its flag's name stands for it: ``--place PLACE``.
    """
    flags = []
    for name, value in vars(settings).items():
        if name in _WHERE or value == getattr(plain, name):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            said = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            said = name.upper() if isinstance(value, Path) else said
            flags.append(f"--{flag} {said}")
    return " ".join([f"python benchmarks/{script}", *flags])


def write_figures(path: Path | None, figures: Mapping[str, Any]) -> None:
    """What others compute with, as JSON, if anybody asked for it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")


# A section's lines, which targets it reaches, and the figures that this rests on.
Judged = tuple[list[str], Mapping[str, bool], Mapping[str, Any]]


@dataclass
class Report:
    """A result file under way: sections, what they took, which targets were reached.

    Attributes:
        figures: what the judged sections found, by section.
    """

    body: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    reached: dict[str, bool] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    processor_seconds: float = 0.0

    def add(self, name: str, make: Callable[[], Sequence[str]]) -> None:
        """Make a section, and print it."""
        started, used = time.perf_counter(), time.process_time()
        lines = make()
        self.seconds[name] = time.perf_counter() - started
        self.processor_seconds += time.process_time() - used
        print("\n".join(lines), flush=True)
        self.body.extend(lines)

    def judge(self, name: str, make: Callable[[], Judged]) -> None:
        """Likewise, of a section that also says which targets are reached, and by what."""

        def judged() -> list[str]:
            lines, reached, self.figures[name] = make()
            self.reached.update(reached)
            return lines

        self.add(name, judged)

    def write(self, path: Path, title: str, command: str, facts: Sequence[str]) -> None:
        """The file: title, command, facts, seconds, targets, sections."""
        each = ", ".join(f"{name} {taken:.0f}" for name, taken in self.seconds.items())
        targets = [
            f"- {target}: **{'reached' if yes else 'MISSED'}**"
            for target, yes in self.reached.items()
        ]
        total = (
            f"- {sum(self.seconds.values()):.0f} s in all, processor seconds "
            f"{self.processor_seconds:.0f}; {each}"
        )
        lines = [title, "", f"    {command}", "", *facts, total, "", *targets, "", *self.body]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines).rstrip() + "\n")
        print(path)
