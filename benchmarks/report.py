"""What the result files are made of: tables, the machine, and which source was measured."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path

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


def source_state() -> str:
    """Commit of raycurv, whether files differ from it, and a digest of its modules as they lie."""
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(Path(raycurv.__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    said = subprocess.run(
        ["git", "-C", HERE, "describe", "--always", "--dirty=, with uncommitted changes"],
        capture_output=True,
        text=True,
        check=False,
    )
    commit = said.stdout.strip() or "not a git checkout"
    return f"{commit}; blake2b of its modules {digest.hexdigest()}"
