"""Whether a plan fits, by how much it does not, and what would fit instead. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raycurv.planning.plan import Plan
from raycurv.planning.supply import Supply

# Narrower tiles than these lose more of a factor than memory is worth.
_NARROWEST = 512

# Whether the job would fit with some settings changed.
Fits = Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Shortfall:
    """What a plan needs more of than there is.

    Attributes:
        what: ``memory``, ``GPU memory`` or ``disk``, and of what.
        phase: in which most is needed.
        needed, available: bytes.
    """

    what: str
    phase: str
    needed: int
    available: int


@dataclass(frozen=True)
class Bounds:
    """Where to look for settings that fit.

    Attributes:
        units: layers that the model can be cut behind.
        widest: columns of the widest factor, or of its tiles.
        batch_tokens: of a microbatch now.
        longest: tokens of the longest example: no microbatch is smaller.
        query_memory: bytes of fewer queries at once, most first.
    """

    units: int
    widest: int
    batch_tokens: int
    longest: int
    query_memory: Sequence[int] = ()


def shortfalls(plan: Plan, supply: Supply, existing: int = 0) -> list[Shortfall]:
    """Everything that a plan needs more of than there is.

    Args:
        existing: bytes of the plan's disk that the job's files take already.
    """
    found = []
    memory, gpu, disk = plan.memory, plan.gpu, plan.disk
    if memory.node > supply.memory:
        found.append(Shortfall(supply.limit, memory.name, memory.node, supply.memory))
    largest = plan.process
    if supply.process is not None and largest.peak.bytes > supply.process:
        found.append(
            Shortfall(
                "memory of a process (RLIMIT_DATA)",
                largest.name,
                largest.peak.bytes,
                supply.process,
            )
        )
    if supply.gpu is not None and gpu.gpu > supply.gpu:
        found.append(Shortfall("memory of a GPU", gpu.name, gpu.gpu, supply.gpu))
    if supply.disk is not None and disk.disk - existing > supply.disk:
        found.append(Shortfall("free disk", disk.name, disk.disk - existing, supply.disk))
    if supply.spool is not None and plan.spool > supply.spool:
        found.append(Shortfall("free disk for spools", "forward", plan.spool, supply.spool))
    return found


def advise(fits: Fits, now: Mapping[str, Any], bounds: Bounds) -> list[dict[str, Any]]:
    """Changes of settings that fit, each as ``{setting: value}``; none if nothing was found.

    A single change comes before several at once. Replicas are never among them: they divide the
    data, not the memory.

    Args:
        now: the settings that are looked at, as they are.
        bounds: where to look.
    """

    def first(options: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return next(([option] for option in options if fits(option)), [])

    stages = now.get("stages") or 1
    found = []
    if now.get("schedule") != "swept":
        fewest = fewest_stages(fits, stages, bounds.units)
        found += [] if fewest is None else [{"stages": fewest}]
    # Of products, which have no factors, the number of vectors takes their place.
    at_once = now.get("at_once")
    halved = [{"max_factor_dim": dim} for dim in _halvings(bounds.widest, _NARROWEST)]
    if at_once is not None:
        fewer = _most(lambda count: fits({"at_once": count}), at_once)
        halved = [{"at_once": max(1, fewer)}]
    found += first(halved)
    swept = {"schedule": "swept", "stages": bounds.units}
    if now.get("schedule") != "swept" or stages < bounds.units:
        found += first([swept])
    if now.get("store_dtype") == "float32":
        found += first([{"store_dtype": "bfloat16"}])
    found += first([{"query_memory": size} for size in bounds.query_memory])
    batches = _halvings(bounds.batch_tokens, bounds.longest)
    found += first([{"batch_tokens": tokens} for tokens in batches])
    if not found:
        base = [{}, {"store_dtype": "bfloat16"}] if now.get("store_dtype") == "float32" else [{}]
        for smaller in base:
            found += first([swept | smaller | option for option in ({}, *halved)])
            if found:
                break
    return found


def fewest_stages(fits: Fits, fewer: int, units: int) -> int | None:
    """The fewest stages above ``fewer`` that fit, as well as doubling and halving find them.

    More stages hold less each, but together more open microbatches: both ends may fail.
    """
    low = fewer
    while low < units:
        high = min(units, 2 * max(1, low))
        if fits({"stages": high}):
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if fits({"stages": middle}) else (middle, high)
            return high
        low = high
    return None


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to a limit that fits, of which every smaller one does; 0 if none."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _halvings(most: int, least: int) -> list[int]:
    found = []
    power = 1 << max(0, (most - 1).bit_length() - 1)
    while power >= max(1, least):
        found.append(power)
        power //= 2
    return found


def as_flags(changes: Mapping[str, Any]) -> str:
    """``{"stages": 6}`` as a person types it: ``--stages 6``."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changes.items())


def as_sentence(options: Sequence[Mapping[str, Any]]) -> str:
    """``At least --stages 6, or --max-factor-dim 8192, or --schedule swept.``"""
    if not options:
        return "Nothing that was tried fits: give it more memory or disk, or a smaller model."
    said = [f"at least {as_flags(o)}" if set(o) == {"stages"} else as_flags(o) for o in options]
    return f"It would fit with {', or '.join(said)}."
