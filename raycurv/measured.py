"""Measuring curvature from Python, and reading what a measurement left."""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa

from raycurv.files.store import Store
from raycurv.files.tables import read_directory
from raycurv.jobs.inputs import AnyModel, AnySource, settings_and_inputs
from raycurv.jobs.spectrum.spectrum_settings import SpectrumSettings
from raycurv.mathematics.loss.objective import Objective
from raycurv.progress.reporter import Reporter
from raycurv.reporting.spectrum_picture import measure_and_draw
from raycurv.summary_html import summary_html


def spectrum(
    model: AnyModel | None = None,
    data: AnySource | None = None,
    out: str | os.PathLike[str] = "",
    run: str | os.PathLike[str] = "",
    objective: str | Objective | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Spectrum:
    """Traces, extreme eigenvalues and the density of a model's curvature; the same call continues
    one that stopped.

    Args:
        model: as for :func:`raycurv.fit`, as are the data; with ``run`` only where a fit's model
            has to be given again.
        data: see there; by default those of ``run``.
        out: where the results go.
        run: directory of a fit, whose blocks are measured.
        objective: its name, or the object itself; by default the fit's, or what the model was
            trained for.
        quiet: show no progress.
        **settings: the fields of :class:`raycurv.SpectrumSettings`; ``address="none"`` runs without
            Ray.

    Raises:
        UserError: a mistake in settings, model or data.
        NumericalError: a product is not finite.
    """
    given = {"model": model, "data": data, "out": out, "run": run, "objective": objective}
    chosen, inputs = settings_and_inputs(SpectrumSettings, given | settings)
    return Spectrum(*measure_and_draw(chosen, inputs, Reporter(quiet, chosen.log)))


class Spectrum:
    """What was found of a model's curvature.

    Attributes:
        numbers: by name: ``trace`` with ``trace_margin`` (half of its 95 % interval), ``largest``
            and ``smallest`` eigenvalue with their residuals, ``largest_rate``, …; those that were
            measured.
    """

    def __init__(self, store: Store, numbers: dict[str, Any]) -> None:
        self._store, self.numbers = store, numbers

    def __repr__(self) -> str:
        return f"<raycurv spectrum {self._store.root}: {self.numbers['weights']:,} weights>"

    def _repr_html_(self) -> str:
        facts = {
            name.replace("_", " "): f"{value:.6g}"
            for name, value in self.numbers.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        return summary_html("spectrum", self._store.root, facts)

    @property
    def path(self) -> str:
        """The directory of the spectrum, as an absolute path or a URI."""
        return self._store.root

    def traces(self) -> pa.Table:
        """A row for each block: ``block``, ``weights``, ``trace``, ``standard_error``, ``low`` and
        ``high`` (95 %), ``fitted`` (ΣΛ of the fit)."""
        return read_directory(self._store, "tables/traces")

    def eigenvalues(self) -> pa.Table:
        """A row for each: ``end`` (``top`` or ``bottom``), ``index``, ``eigenvalue``,
        ``residual``."""
        return read_directory(self._store, "tables/eigenvalues")

    def density(self) -> pa.Table:
        """A row for each point: ``eigenvalue``, ``density``, ``standard_error``."""
        return read_directory(self._store, "tables/density")

    def sizes(self) -> pa.Table:
        """The largest eigenvalue on parts of the examples: ``examples``, ``eigenvalue``,
        ``residual``."""
        return read_directory(self._store, "tables/sizes")
