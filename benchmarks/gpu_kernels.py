"""The parts of ``gpu.py`` about single kernels: the machine, covariance, eigendecompositions."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from clock import resident
from gpu import Notes, Place
from torch import Tensor

from raycurv.mathematics.eigen import decompose, eigh
from raycurv.mathematics.sums import RunningSum

_CLEAR = Path("/proc/self/clear_refs")
# Seconds of products that a rate is taken from.
_RATE_SECONDS = 0.3
# Share of a part's time that it plans with.
_PLANNED = 0.9


def machine(place: Place, notes: Notes) -> None:
    """What this runs on; fails where there is no such device."""
    facts: dict[str, Any] = {"device": "the CPU", "cores": os.cpu_count()}
    facts["memory, GB"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if place.device == "cuda":
        assert torch.cuda.is_available(), f"no GPU that torch {torch.__version__} can use"
        seen = torch.cuda.get_device_properties(0)
        facts |= {
            "device": seen.name,
            "GPUs": torch.cuda.device_count(),
            "GPU memory, GB": seen.total_memory / 1e9,
            "multiprocessors": seen.multi_processor_count,
            "CUDA": torch.version.cuda,
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        }
        # The first kernel of a machine may take seconds that belong to no part.
        torch.ones(8, 8, device="cuda").mm(torch.ones(8, 8, device="cuda")).sum().item()
    for package in ("torch", "transformers", "pyarrow", "numpy", "safetensors", "tyro"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    for fact, value in facts.items():
        notes.row("What there is", fact=fact, value=value)


def throughput(place: Place, notes: Notes) -> None:
    """Rates of what covariance is made of, over those of plain products of the same run."""
    size = 256 if place.small else 8192
    peaks = {kind: _peak_rate(kind, size, place, notes) for kind in ("bfloat16", "tf32", "float32")}
    shapes = [(4096, 896), (4096, 4864), (32768, 4864), (32768, 8192)]
    for rows, width in [(128, 64)] if place.small else shapes:
        _covariance_rates(rows, width, peaks, place, notes)


def _peak_rate(kind: str, size: int, place: Place, notes: Notes) -> float:
    """Operations a second of a large square product."""
    notes.at(f"the peak of {kind}")
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    left, right = (torch.randn(size, size, device=place.device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    with tf32(kind == "tf32"):
        rate = _rate(lambda: torch.mm(left, right, out=out), 2 * size**3, place)
    title = "Matrix products, the peaks"
    notes.row(title, kind=kind, size=size, **{"TFLOP/s": rate / 1e12})
    return rate


def _covariance_rates(
    rows: int, width: int, peaks: dict[str, float], place: Place, notes: Notes
) -> None:
    """Rates of adding ``xᵀ x`` of bfloat16 rows to a float32 sum, and how exact it is."""
    device = torch.device(place.device)
    x = torch.randn(rows, width, device=device).bfloat16()
    running, total = RunningSum((width, width), x.dtype, device), x.new_zeros(width, width).float()
    ways: dict[str, tuple[str, Callable[[], Any]]] = {
        "as fits do it, without tf32": ("float32", lambda: running.add_outer(x, x)),
        "as fits do it, with tf32": ("tf32", lambda: running.add_outer(x, x)),
    }
    straight = _straight(total, x)
    if straight is not None:
        ways["bfloat16 products, float32 out"] = ("bfloat16", straight)
    exact = x.double().T @ x.double()
    for what, (kind, add) in ways.items():
        notes.at(f"{what}, {rows} rows of {width}")
        running, total = RunningSum((width, width), x.dtype, device), total.zero_()
        with tf32(kind == "tf32"):
            add()
            once = total if add is straight else running.value(what)
            error = float((once - exact).abs().max() / exact.abs().max())
            rate = _rate(add, 2 * rows * width**2, place)
        notes.row(
            "Covariance of bfloat16 rows, summed in float32", rows=rows, width=width, how=what,
            **{
                "TFLOP/s": rate / 1e12,
                "over the bfloat16 peak": rate / peaks["bfloat16"],
                "over its own peak": rate / peaks[kind],
                "error": error,
            },
        )  # fmt: skip


def decompositions(place: Place, notes: Notes) -> None:
    """Seconds of eigendecompositions by size, as long as the next one fits into the time."""
    device, until = torch.device(place.device), time.monotonic() + _PLANNED * place.seconds
    sizes = (32, 64) if place.small else (1024, 2048, 4096, 8192, 16384)
    last: dict[tuple[str, str], tuple[int, float]] = {}

    def measure(what: str, size: int, dtype: torch.dtype, on: torch.device, solve: Any) -> None:
        key, name = (what, str(dtype)), str(dtype).removeprefix("torch.")
        before, seconds = last.get(key, (size, 0.0))
        # Work grows with the cube, and the matrices are to be made and looked at.
        expected = 1.3 * seconds * (size / before) ** 3
        left = until - time.monotonic()
        row = {"what": what, "size": size, "dtype": name}
        if expected > left or left <= 0:
            notes.row(
                "Eigendecompositions", **row,
                skipped=f"{left:.0f} s were left, and it takes {expected:.0f} s",
            )  # fmt: skip
            return
        notes.at(f"{what} of {size} in {name}")
        matrix = _covariance(size, on).to(dtype)
        with _measured(on) as found:
            values, vectors = solve(matrix)
        last[key] = size, found["seconds"]
        values, vectors = values.to(matrix), vectors.to(matrix)
        residual = (matrix @ vectors - vectors * values).abs().max() / values.abs().max()
        notes.row("Eigendecompositions", **row, **found, residual=float(residual))

    def whole(matrix: Tensor) -> tuple[Tensor, Tensor]:
        basis = decompose("it", [matrix.double().cpu()], matrix.dtype, device)
        assert basis.outcome == "ok", basis.outcome
        return basis.values[0], basis.vectors[0]

    for size in sizes:
        for dtype in (torch.float32, torch.float64):
            measure(f"eigh, {place.device}", size, dtype, device, eigh)
            # On the CPU raycurv's own is numpy's; on a GPU the two are the same.
            if device.type == "cpu":
                measure("torch.linalg.eigh, cpu", size, dtype, device, torch.linalg.eigh)
    cpu = torch.device("cpu")
    for size in sizes[:3]:
        measure("a factor, from float64 in memory to float32", size, torch.float32, device, whole)
        if device.type != "cpu":
            measure("eigh, the CPU beside it", size, torch.float64, cpu, eigh)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products may round their inputs to tf32, on a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def settle(device: torch.device) -> None:
    """Wait for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_peak(device: torch.device) -> None:
    """Measure the highest memory from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5")


def peak(device: torch.device) -> dict[str, float]:
    """The highest memory since :func:`start_peak`: of the GPU, or of this process where its system
    says so."""
    if device.type == "cuda":
        return {
            "peak GB": torch.cuda.max_memory_allocated(device) / 1e9,
            "reserved GB": torch.cuda.max_memory_reserved(device) / 1e9,
        }
    return {"peak GB (process)": resident("VmHWM") / 1e9} if _CLEAR.exists() else {}


@contextmanager
def _measured(device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds and highest memory of what is inside."""
    found: dict[str, float] = {}
    settle(device)
    start_peak(device)
    began = time.perf_counter()
    yield found
    settle(device)
    found["seconds"] = time.perf_counter() - began
    found |= peak(device)


def _rate(call: Callable[[], Any], flops: int, place: Place) -> float:
    """Operations a second of a call that makes so many."""
    device, seconds = torch.device(place.device), 0.0
    call()
    settle(device)
    count, least = 1, 0.002 if place.small else _RATE_SECONDS
    while True:
        began = time.perf_counter()
        for _ in range(count):
            call()
        settle(device)
        seconds = time.perf_counter() - began
        if seconds >= least:
            return count * flops / seconds
        count = max(2 * count, int(1.2 * count * least / max(seconds, 1e-6)))


def _straight(total: Tensor, x: Tensor) -> Callable[[], Any] | None:
    """``total += xᵀ x`` of bfloat16 rows with a float32 result, where this torch has it."""

    def add() -> None:
        # An argument of torch's since 2.8, for GPUs.
        total.add_(torch.mm(x.T, x, out_dtype=torch.float32))

    try:
        add()
    except torch.cuda.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError):
        # Without the argument, or on a device that does not take it.
        return None
    return add


def _covariance(size: int, device: torch.device) -> Tensor:
    """One whose eigenvalues fall as those of a factor do, float64."""
    generator = torch.Generator(device).manual_seed(size)
    x = torch.randn(size, size, device=device, generator=generator)
    x *= torch.arange(1, size + 1, device=device).rsqrt()
    return (x.T @ x).double() / size
