"""What was asked of raycurv, and whether what the benchmarks found reaches it.

    part -> figures (JSON of speed.py, growth.py, …) ─► a row a target: asked, found, reached

A target whose figures are missing, or there for some of the shapes only, is neither reached nor
missed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

SHAPES = ("a", "b", "c", "d", "e")
FLOOR_SHAPES = ("b", "c")
CPU, FASTEST, PHASE, PEAK, OVER_FLOOR = 0.50, 0.30, 1.05, 0.7, 1.5
SCORES = 0.9999  # Pearson
EXPONENT = 1.05
FLAT = 1.05  # memory of scoring, a hundred times the examples over one time
FLOAT32 = 1e-5
RANK = 0.99
LEAVE_ONE_OUT = 0.95
MINUTES = 40
OURS, THEIRS = "raycurv float32", "kronfluence float32"

# Figures of a part: those of its JSON file.
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One of them.

    Attributes:
        title: of what.
        asked: the limit.
        found: what was measured.
        reached: whether it keeps the limit; None where that was not measured.
    """

    title: str
    asked: str
    found: str
    reached: bool | None

    @property
    def verdict(self) -> str:
        """For a table."""
        return {True: "reached", False: "**MISSED**", None: "not measured"}[self.reached]

    def cells(self) -> list[str]:
        """Likewise."""
        return [self.title, self.asked, self.found, self.verdict]


def judge(figures: Mapping[str, Figures], seconds: float | None) -> list[Target]:
    """Every target.

    Args:
        figures: of the parts that are there.
        seconds: what the whole took, where it was the whole.
    """
    found = []
    for part, title, asked, make in _TARGETS:
        target = Target(title, asked, "", None)
        if part in figures:
            said, reached = make(figures[part])
            target = Target(title, asked, said, reached)
        found.append(target)
    asked = f"at most {MINUTES} min, kronfluence's environment included"
    if seconds is None:
        return [*found, Target("time of all this", asked, "", None)]
    said = f"{seconds / 60:.1f} min"
    return [*found, Target("time of all this", asked, said, seconds <= 60 * MINUTES)]


Verdict = tuple[str, bool | None]


def _over_shapes(
    figures: Figures,
    measure: Callable[[Figures], float],
    limit: float,
    wanted: tuple[str, ...] = SHAPES,
) -> Verdict:
    """A number a shape, none above the limit; those above it are named."""
    found = {name: measure(shape) for name, shape in figures["shapes"].items() if name in wanted}
    if not found:
        return "", None
    high = [name for name, value in found.items() if value > limit]
    said = ", ".join(f"({name}) {value:.2f}" for name, value in found.items())
    if high:
        return f"{said}; above: {', '.join(f'({name})' for name in high)}", False
    return _whole(said, found, True, wanted)


def _whole(
    said: str, found: Mapping[str, Any], reached: bool, wanted: tuple[str, ...] = SHAPES
) -> Verdict:
    """A verdict that holds only where all shapes were measured."""
    missing = [f"({name})" for name in wanted if name not in found]
    if missing:
        return f"{said}; without {', '.join(missing)}", None
    return said, reached


def _mean(figures: Figures, ratio: Callable[[Figures], float | None], limit: float) -> Verdict:
    """A geometric mean over shapes."""
    known = {name: ratio(shape) for name, shape in figures["shapes"].items()}
    found = {name: value for name, value in known.items() if value is not None}
    if not found:
        return "", None
    mean = geometric_mean(found.values())
    each = ", ".join(f"({name}) {value:.2f}" for name, value in found.items())
    return _whole(f"{mean:.2f}: {each}", found, mean <= limit)


def _of_cpu(shape: Figures) -> float:
    return shape["sides"][OURS]["cpu"] / shape["sides"][THEIRS]["cpu"]


def _of_fastest(shape: Figures) -> float | None:
    if "fastest" not in shape:
        return None
    mine, other = (shape["sides"][shape["fastest"][s]] for s in ("raycurv", "kronfluence"))
    return mine["cpu"] / other["cpu"]


def _of_peak(shape: Figures) -> float:
    return shape["sides"][OURS]["peak"] / shape["sides"][THEIRS]["peak"]


def _of_scores(figures: Figures) -> Verdict:
    found = {name: shape["Pearson"] for name, shape in figures["shapes"].items()}
    said = ", ".join(f"({name}) 1 - {1 - pearson:.0e}" for name, pearson in found.items())
    return _whole(said, found, min(found.values()) >= SCORES)


def _of_phases(figures: Figures) -> Verdict:
    worst, high = {}, []
    for name, shape in figures["shapes"].items():
        ours, theirs = (shape["sides"][side]["phases"] for side in (OURS, THEIRS))
        ratios = {phase: ours[phase] / theirs[phase] for phase in ours}
        worst[name] = max((ratio, phase) for phase, ratio in ratios.items())
        high += [f"({name}) {p} {r:.2f}" for p, r in ratios.items() if r > PHASE]
    said = "worst: " + ", ".join(f"({n}) {r:.2f} {p}" for n, (r, p) in worst.items())
    if high:
        return f"{said}; above: {', '.join(high)}", False
    return _whole(said, worst, True)


def _of_floors(figures: Figures) -> Verdict:
    found = {
        name: figures["shapes"][name]["over floor"]
        for name in FLOOR_SHAPES
        if figures["shapes"].get(name, {}).get("over floor")
    }
    if not found:
        return "", None
    phases = {name: max((r, p) for p, r in floors.items()) for name, floors in found.items()}
    high = [
        f"({name}) {phase} {ratio:.2f}"
        for name, floors in found.items()
        for phase, ratio in floors.items()
        if ratio > OVER_FLOOR
    ]
    said = "worst: " + ", ".join(f"({n}) {r:.2f} {p}" for n, (r, p) in phases.items())
    if high:
        return f"{said}; above: {', '.join(high)}", False
    return _whole(said, found, True, FLOOR_SHAPES)


def _of_tokens(figures: Figures) -> Verdict:
    known = figures["exponents"]
    if "examples" not in known:
        return "", None
    found = known["examples"]["seconds"]
    said = ", ".join(f"{phase} {p:.2f}" for phase, p in found.items())
    if "tokens" in known:
        longer = ", ".join(f"{phase} {p:.2f}" for phase, p in known["tokens"]["seconds"].items())
        said += f" (by longer examples, attention included: {longer})"
    return said, max(found.values()) <= EXPONENT


def _of_memory(figures: Figures) -> Verdict:
    ratios = figures["ratios"]
    each = ", ".join(f"{way} {ratio:.2f}" for way, ratio in ratios.items())
    said = f"{figures['few']:,} to {figures['many']:,} examples: {each}"
    return said, max(ratios.values()) <= FLAT


def _of_float32(figures: Figures) -> Verdict:
    found = figures["sums"]
    worst = found["float32"]
    return f"{worst:.0e} after {found['microbatches']:,}", worst <= FLOAT32


def _of_rank(figures: Figures) -> Verdict:
    pearson = figures["ranks"]["Pearson"]
    return f"{pearson:.4f}", pearson >= RANK


def _of_lds(figures: Figures, task: str) -> Verdict:
    found = figures[f"LDS of {task}"]
    methods, above = found["methods"], found["EK-FAC less"]
    less = [
        f"{other} {methods[other]['mean']:.3f} (by {a['mean']:.3f}, at least "
        f"{min(a['over queries'][0], a['over subsets'][0]):.3f})"
        for other, a in above.items()
    ]
    reached = all(a[over][0] > 0 for a in above.values() for over in a if over != "mean")
    return f"EK-FAC {methods['EK-FAC']['mean']:.3f} above {', '.join(less)}", reached


def _of_leaving_out(figures: Figures, kind: str, method: str) -> Verdict:
    found = figures["leave-one-out"][kind]
    name = next(name for name in found if name == method or name.startswith(f"{method}, "))
    return f"{found[name]:.4f}", found[name] >= LEAVE_ONE_OUT


def _targets() -> Iterator[tuple[str, str, str, Callable[[Figures], Verdict]]]:
    """Part, title, what is asked, how it is judged."""
    yield (
        "speed", "CPU seconds, raycurv / kronfluence, float32",
        f"geometric mean at most {CPU:.2f}", lambda f: _mean(f, _of_cpu, CPU),
    )  # fmt: skip
    yield "speed", "Pearson of scores with kronfluence's", f"at least {SCORES} each", _of_scores
    yield "speed", "CPU seconds of a phase, raycurv / kronfluence", f"at most {PHASE}", _of_phases
    yield (
        "speed", "peak memory, raycurv / kronfluence", f"at most {PEAK} each",
        lambda f: _over_shapes(f, _of_peak, PEAK),
    )  # fmt: skip
    yield (
        "speed", f"the same CPU seconds, each side's fastest mode that keeps {SCORES} of float64",
        f"geometric mean at most {FASTEST:.2f}", lambda f: _mean(f, _of_fastest, FASTEST),
    )  # fmt: skip
    yield "speed", "CPU seconds of a phase over its floor", f"at most {OVER_FLOOR}", _of_floors
    yield "growth", "exponent of time in tokens", f"at most {EXPONENT}", _of_tokens
    yield (
        "scoring memory", "memory of scoring a hundred times the examples",
        f"at most {FLAT} times, each schedule", _of_memory,
    )  # fmt: skip
    yield (
        "numerics", "float32 sums, difference from float64",
        f"at most {FLOAT32:.0e} after 40,000 microbatches", _of_float32,
    )  # fmt: skip
    yield "numerics", "Pearson of scores of rank 32 and full rank", f"at least {RANK}", _of_rank
    for task in ("diabetes", "breast cancer"):
        yield (
            "accuracy", f"LDS, {task}", "EK-FAC above identity and diagonal beyond intervals",
            functools.partial(_of_lds, task=task),
        )  # fmt: skip
    for kind in ("ridge regression", "logistic regression"):
        for method in ("EK-FAC", "M-FAC"):
            yield (
                "accuracy", f"leave-one-out Pearson, {kind}, {method}",
                f"at least {LEAVE_ONE_OUT}",
                functools.partial(_of_leaving_out, kind=kind, method=method),
            )  # fmt: skip


_TARGETS = tuple(_targets())
