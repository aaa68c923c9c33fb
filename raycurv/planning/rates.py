"""How fast this machine is, measured on the spot in about two seconds.

A rate is a fact of this moment on this machine; a plan for other machines says so.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from raycurv.mathematics.eigen import eigh
from raycurv.mathematics.products import add_gram

# What a measurement of a rate moves: large enough to leave the caches, small enough for half a
# second.
_FILE_BYTES = 32 * 1024**2
_EIGH_WIDTH = 768


@dataclass(frozen=True)
class Rates:
    """Of one node.

    Attributes:
        model: FLOP/s of the model's products in its dtype, all threads.
        covariance: FLOP/s of float32 (or float64) outer products, all threads.
        eigh: FLOP/s of one float64 eigendecomposition on one core (one GPU), at 9 d³.
        write, read: bytes/s of the results' directory.
        where: what was measured, for the report.
    """

    model: float
    covariance: float
    eigh: float
    write: float
    read: float
    where: str


# H100 SXM, modelled from its data sheet and from DESIGN-sized decompositions, not measured here:
# float32 products without TF32, and 9 d³ in float64 at 14,336.
H100 = {torch.float32: 4.0e13, torch.bfloat16: 5.0e14, torch.float64: 5.0e13}


def measure(dtype: torch.dtype, directory: Path | None) -> Rates:
    """Measure this machine.

    Args:
        dtype: of the model's computation.
        directory: where results go; ``None`` leaves the disk unmeasured (a temporary directory is
            taken instead).
    """
    size = 1024
    work = torch.float64 if dtype == torch.float64 else torch.float32
    x, w = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    rows, total = torch.ones(size, size, dtype=work), torch.zeros(size, size, dtype=work)
    flops = 2.0 * size**3
    with torch.no_grad():
        model = flops / _seconds(lambda: torch.nn.functional.linear(x, w))
        covariance = flops / _seconds(lambda: add_gram(total, rows))
    write, read = _disk(directory)
    threads = torch.get_num_threads()
    return Rates(model, covariance, _eigh(), write, read, f"measured here, {threads} threads")


def on_h100(dtype: torch.dtype, disk: Rates) -> Rates:
    """What an H100 would do, with the disk as measured."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return Rates(H100[dtype], H100[work], 4.0e12, disk.write, disk.read, "an H100, modelled")


def _seconds(run: Callable[[], object], least: float = 0.1) -> float:
    """Of one call, on the mean of as many as take ``least`` seconds."""
    run()
    calls, started = 0, time.perf_counter()
    while (took := time.perf_counter() - started) < least:
        run()
        calls += 1
    return took / max(1, calls)


def _eigh() -> float:
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_EIGH_WIDTH, _EIGH_WIDTH, dtype=torch.float64, generator=generator)
    matrix = rows @ rows.T
    # A decomposition is a task on one core.
    torch.set_num_threads(1)
    try:
        return 9.0 * _EIGH_WIDTH**3 / _seconds(lambda: eigh(matrix))
    finally:
        torch.set_num_threads(threads)


def _disk(directory: Path | None) -> tuple[float, float]:
    there = directory
    while there is not None and not there.is_dir():
        there = there.parent if there != there.parent else None
    data = os.urandom(_FILE_BYTES)
    try:
        with tempfile.NamedTemporaryFile(dir=there) as file:
            started = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            wrote = time.perf_counter() - started
            # What was just written would come from memory.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            started = time.perf_counter()
            file.read()
            read = time.perf_counter() - started
    except OSError:
        # A directory that cannot be written to shows when the job starts.
        return _disk(None) if there is not None else (1e9, 1e9)
    return _FILE_BYTES / wrote, _FILE_BYTES / read
