"""Eigendecompositions of factors: one task each, the longest first, wherever there is room."""

from __future__ import annotations

import torch

from raycurv.errors import DamagedFile
from raycurv.files.artifacts import factor_file, read_factor, write_eigen
from raycurv.files.block_rows import SPECTRUM_FILE, write_spectrum
from raycurv.files.store import Store
from raycurv.files.tables import read_rows
from raycurv.mathematics.eigen import decompose
from raycurv.mathematics.factors import factors_of
from raycurv.planning.moments import decomposition
from raycurv.stages.dealing import eigh_cost, longest_first
from raycurv.stages.pool import Need
from raycurv.steps.covariances import undecomposed
from raycurv.steps.step import TaskStep


class Decompositions(TaskStep):
    """Eigenbases into ``eigen/``, and their eigenvalues into ``tables/spectrum``."""

    name = "eigen"

    def lacking(self, group: int) -> bool:
        # A run that extends another has taken over its bases.
        return self.fit.extends is None and bool(undecomposed(self.fit, group))

    def run(self, group: int) -> None:
        fit = self.fit
        factors = factors_of(fit.blocks_of(group))
        tiles = {name: factors[name].tiles(fit.max_factor_dim) for name in undecomposed(fit, group)}
        order = longest_first({name: eigh_cost(widths) for name, widths in tiles.items()})
        needs = [
            Need(decomposition(tiles[name], fit.store_dtype), eigh_cost(tiles[name]), name)
            for name in order
        ]
        for place, outcome in fit.workers.run_tasks(
            "eigendecompositions",
            decompose_factor,
            [(fit.store, name, fit.store_dtype, fit.workers.device) for name in order],
            needs,
            "factors",
            fit.workers.named(group),
        ):
            if not fit.keep_sums:
                # Not in the task: Ray may run that twice.
                fit.store.delete(factor_file(order[place]))
            if outcome != "ok":
                fit.reporter.say(f"factor {order[place]}: {outcome}")

    def tables_there(self) -> bool:
        try:
            return read_rows(self.fit.store, SPECTRUM_FILE) > 0
        except (DamagedFile, FileNotFoundError):
            return False

    def write_tables(self) -> None:
        write_spectrum(self.fit.store, factors_of(self.fit.blocks), self.fit.notes)


def decompose_factor(store: Store, name: str, store_dtype: torch.dtype, device: str) -> str:
    """Read a factor's sum, decompose it, write its eigenbasis; gives the outcome."""
    factor = read_factor(store, name)
    basis = decompose(name, factor.mean(), store_dtype, torch.device(device), factor.dtype)
    write_eigen(store, factor, basis)
    return basis.outcome
