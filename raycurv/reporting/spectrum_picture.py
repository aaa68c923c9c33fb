"""A picture of a spectrum: the density of eigenvalues, and the traces of blocks."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from raycurv.errors import UserError
from raycurv.files.store import Store
from raycurv.files.tables import read_table
from raycurv.jobs.inputs import Inputs
from raycurv.jobs.spectrum.measuring import Numbers, measure_spectrum, table_file
from raycurv.jobs.spectrum.spectrum_settings import SpectrumSettings
from raycurv.progress.reporter import Reporter
from raycurv.reporting.charts import SERIES, figure_class

# Blocks whose names stand below the axis; of more, their numbers.
_NAMED = 16
# Densities below this share of the highest are not drawn: smoothing has tails.
_LEAST = 1e-6


def measure_and_draw(
    settings: SpectrumSettings, inputs: Inputs | None = None, reporter: Reporter | None = None
) -> tuple[Store, Numbers]:
    """As :func:`~raycurv.jobs.spectrum.measuring.measure_spectrum`, with the picture that
    ``--picture`` asks for.

    Raises:
        UserError: also for a picture that is neither .png nor .svg, or without matplotlib; before
            anything is measured.
    """
    picture = settings.picture
    if picture is not None:
        if os.path.splitext(picture)[1].lower() not in (".png", ".svg"):
            raise UserError(
                f"--picture {picture}", "a name that ends in .png or .svg", "another one", ""
            )
        figure_class()
    store, numbers = measure_spectrum(settings, inputs, reporter)
    if picture is not None:
        _draw(store, settings).savefig(picture, dpi=110)
    return store, numbers


def _draw(store: Store, settings: SpectrumSettings) -> Any:
    panels = [_density] * (settings.steps > 0) + [_traces] * (settings.traces != "none")
    figure = figure_class()(figsize=(5.4 * max(1, len(panels)), 3.6), layout="constrained")
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        axes.spines[["top", "right"]].set_visible(False)
        panel(axes, store)
    return figure


def _columns(store: Store, name: str) -> dict[str, Any]:
    table = read_table(store, table_file(name))
    return {c: table[c].to_numpy(zero_copy_only=False) for c in table.column_names}


def _density(axes: Any, store: Store) -> None:
    found, pairs = _columns(store, "density"), _columns(store, "eigenvalues")
    x, y = found["eigenvalue"], found["density"]
    error = np.nan_to_num(np.asarray(found["standard_error"], np.float64))
    least = _LEAST * y.max()
    axes.set_yscale("log")
    axes.fill_between(
        x, np.maximum(y - error, least), np.maximum(y + error, least), color=SERIES[0], alpha=0.25,
        linewidth=0,
    )  # fmt: skip
    axes.plot(x, np.maximum(y, least), color=SERIES[0], linewidth=1.1)
    top = pairs["eigenvalue"]
    axes.plot(top, np.full(len(top), least), "|", color=SERIES[1], markersize=9, clip_on=False)
    axes.set(xlabel="eigenvalue", ylabel="density", ylim=(least, None))


def _traces(axes: Any, store: Store) -> None:
    found = _columns(store, "traces")
    place = np.arange(len(found["block"]))
    axes.errorbar(
        place, found["trace"], yerr=(found["high"] - found["low"]) / 2, fmt="o", markersize=3.5,
        color=SERIES[0], linewidth=1, label="exact products, 95 %",
    )  # fmt: skip
    fitted = np.asarray(found["fitted"], np.float64)
    if np.isfinite(fitted).any():
        axes.plot(place, fitted, "x", color=SERIES[1], markersize=5, label="fitted (ΣΛ)")
    axes.legend(frameon=False, fontsize=8)
    axes.set_ylabel("trace")
    if min(found["trace"]) >= 0:
        axes.set_ylim(0, None)
    if len(place) <= _NAMED:
        axes.set_xticks(place, found["block"], rotation=60, ha="right", fontsize=7)
    else:
        axes.set_xlabel("block")
