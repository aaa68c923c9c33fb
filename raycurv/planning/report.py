"""A plan for a person, as tables, and for a machine, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from raycurv.planning.advice import Shortfall
from raycurv.planning.plan import Phase, Plan
from raycurv.planning.sizes import Sizes

# Parts of a process's memory that are worth a line.
_LARGEST_PARTS = 5


def size(count: float) -> str:
    """Bytes in powers of a thousand, three digits: ``9.22 GB``."""
    return f"{_short(count)}B"


def _short(count: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(count) < 999.5 or unit == "P":
            digits = 0 if not unit or count >= 99.95 else 1 if count >= 9.995 else 2
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    raise AssertionError


def operations(count: float) -> str:
    """FLOPs: ``45.9 GFLOP``."""
    return f"{_short(count)}FLOP"


def duration(seconds: float | None) -> str:
    """``42 s``, ``12 min``, ``7.4 h`` or ``3.1 d``."""
    if seconds is None:
        return "?"
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.{0 if seconds / length >= 10 else 1}f} {unit}"
    return f"{seconds / 86_400:.1f} d"


def sizes_line(sizes: Sizes) -> str:
    """A model's curvature in a few lines."""
    return (
        f"weights {size(sizes.weights)}; factors {size(sizes.factors)}, "
        f"{sizes.matrices} of them, the widest {sizes.widest:,}; "
        f"Λ {size(sizes.lam)}, as much as one dense gradient\n"
        f"a token: covariances {operations(sizes.covariance)}, forward and backward without "
        f"gradients of weights {operations(sizes.propagation)}"
    )


def phases_table(plan: Plan, gpu: bool) -> Table:
    """One line a phase; without times where none were measured."""
    table = Table(box=None, pad_edge=False)
    table.add_column(f"{plan.job}:")
    for name in ("GPU" if gpu else "node", "process", "disk", "moved", "FLOPs", "time"):
        table.add_column(name, justify="right")
    for phase in plan.phases:
        table.add_row(
            phase.name,
            size(phase.gpu if gpu else phase.node),
            size(phase.peak.bytes),
            size(phase.disk),
            size(phase.moved),
            operations(phase.flops + phase.eigh_flops),
            duration(phase.seconds),
        )
    return table


def process_line(phase: Phase) -> str:
    """What the largest process of a phase holds, largest first."""
    parts = sorted(phase.peak.parts.items(), key=lambda part: -part[1])
    said = ", ".join(f"{name} {size(count)}" for name, count in parts[:_LARGEST_PARTS])
    rest = sum(count for _, count in parts[_LARGEST_PARTS:])
    return f"{size(phase.peak.bytes)} in {phase.name}: {said}, others {size(rest)}"


def shortfall_line(shortfall: Shortfall) -> str:
    """By how much something does not fit."""
    return (
        f"{shortfall.what}: {size(shortfall.needed)} needed ({shortfall.phase}), "
        f"{size(shortfall.available)} there, {size(shortfall.needed - shortfall.available)} too "
        "little"
    )


def as_json(
    plans: Sequence[Plan], sizes: Sizes, short: Sequence[Shortfall], advice: Sequence[Any]
) -> dict[str, Any]:
    """Everything as plain values: bytes, FLOPs and seconds."""
    return {
        "sizes": asdict(sizes),
        "plans": {
            plan.job: {
                "memory": plan.memory.node,
                "disk": plan.disk.disk,
                "kept": plan.kept,
                "seconds": plan.seconds,
                "phases": [asdict(phase) for phase in plan.phases],
            }
            for plan in plans
        },
        "fits": not short,
        "short": [asdict(one) for one in short],
        "advice": list(advice),
    }
