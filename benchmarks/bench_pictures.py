"""Pictures of what the benchmarks found, made of their figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from targets import OURS, THEIRS

matplotlib.use("Agg")

from matplotlib import pyplot

Figures = Mapping[str, Any]
TABULAR = "LDS of "


def speed_picture(figures: Figures, path: Path) -> None:
    """CPU seconds of both sides, a panel a shape, a pair of bars a phase."""
    shapes = figures["shapes"]
    figure, plots = pyplot.subplots(
        1, len(shapes), figsize=(2.2 + 2.3 * len(shapes), 3.9), layout="constrained", squeeze=False
    )
    for plot, (name, shape) in zip(plots.flat, shapes.items(), strict=True):
        ours, theirs = (shape["sides"][side] for side in (OURS, THEIRS))
        phases = [*ours["phases"], "total"]
        where = np.arange(len(phases))
        pair = [[*side["phases"].values(), side["cpu"]] for side in (ours, theirs)]
        plot.bar(where - 0.2, pair[0], 0.4, color="C0", label="raycurv")
        plot.bar(where + 0.2, pair[1], 0.4, color="0.65", label="kronfluence")
        for x, mine, other in zip(where, *pair, strict=True):
            plot.annotate(
                f"{mine / other:.2f}", (x, max(mine, other)), xytext=(0, 2),
                textcoords="offset points", ha="center", fontsize=8,
            )  # fmt: skip
        plot.set_xticks(where, phases, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
        plot.set_title(f"({name})", fontsize=11)
        plot.margins(y=0.12)
        plot.tick_params(axis="y", labelsize=8)
    plots.flat[0].set_ylabel("CPU s, float32; above: ratio")
    bars, names = plots.flat[0].get_legend_handles_labels()
    figure.legend(bars, names, fontsize=9, ncols=2, loc="outside lower center")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def lds_picture(figures: Figures, path: Path) -> None:
    """LDS of every method, a panel a task; lines are the intervals over queries and subsets."""
    tasks = {name: found for name, found in figures.items() if name.startswith(TABULAR)}
    figure, plots = pyplot.subplots(
        1, len(tasks), figsize=(4.2 * len(tasks), 3.7), layout="constrained", squeeze=False
    )
    for plot, (name, found) in zip(plots.flat, tasks.items(), strict=True):
        methods = found["methods"]
        where = np.arange(len(methods))[::-1]
        for over, shift, colour in (("over queries", 0.12, "C0"), ("over subsets", -0.12, "C1")):
            ends = np.array([lds[over] for lds in methods.values()])
            plot.hlines(where + shift, ends[:, 0], ends[:, 1], color=colour, label=over, lw=2)
        plot.plot([lds["mean"] for lds in methods.values()], where, "k|", markersize=12)
        plot.set_yticks(where, methods, fontsize=9)
        plot.set_title(name.removeprefix(TABULAR), fontsize=11)
        plot.set_xlabel("LDS")
        plot.grid(True, axis="x", alpha=0.3)
    lines, names = plots.flat[0].get_legend_handles_labels()
    figure.legend(lines, names, fontsize=9, ncols=2, loc="outside lower center")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def steps_picture(figures: Figures, path: Path) -> None:
    """Cosine to the solution and relative residual by step, a column a task."""
    figure, plots = pyplot.subplots(
        2, len(figures), figsize=(0.6 + 2.9 * len(figures), 5.2), layout="constrained",
        sharex=True, sharey="row", squeeze=False,
    )  # fmt: skip
    for column, (name, curves) in zip(plots.T, figures.items(), strict=True):
        dampings = list(dict.fromkeys(title.rpartition(", ")[2] for title in curves))
        for title, curve in curves.items():
            how, _, damping = title.rpartition(", ")
            style = {"color": f"C{dampings.index(damping)}", "lw": 1.6,
                     "ls": "--" if how == "plain" else "-"}  # fmt: skip
            for plot, measure in zip(column, ("cosine", "residual"), strict=True):
                steps = np.arange(1, len(curve[measure]) + 1)
                plot.plot(steps, curve[measure], label=f"{how}, damping {damping}", **style)
        column[0].set_title(name, fontsize=11)
        column[0].set_ylim(0, 1.02)
        column[1].set_yscale("log")
        column[1].set_ylim(1e-4, 3)
        column[1].set_xlabel("products")
        for plot in column:
            plot.grid(True, alpha=0.3)
            plot.tick_params(labelsize=8)
    plots[0, 0].set_ylabel("cosine to the exact solution")
    plots[1, 0].set_ylabel("relative residual, median")
    lines, names = plots[0, 0].get_legend_handles_labels()
    figure.legend(lines, names, fontsize=9, ncols=4, loc="outside lower center")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# Part -> the pictures that are made of its figures: name, how.
PICTURES = {"speed": ("speed", speed_picture), "accuracy": ("lds", lds_picture)}
