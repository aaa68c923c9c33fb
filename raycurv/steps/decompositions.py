"""Eigendecompositions of factors: one task each, the longest first, wherever there is room."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raycurv.files.artifacts import factor_file, read_factor, write_eigen
from raycurv.files.block_rows import SPECTRUM_FILE, write_spectrum
from raycurv.files.store import Store
from raycurv.mathematics.eigen import decompose
from raycurv.mathematics.factors import factors_of
from raycurv.planning.cost import TaskCost
from raycurv.planning.shapes import DataShape, Group, Recipe, factor_elements, squares
from raycurv.stages.dealing import eigh_cost, longest_first
from raycurv.stages.pool import Need
from raycurv.steps.covariances import factor_sum_bytes, undecomposed
from raycurv.steps.step import TaskStep, table_there


class DecompositionCost(TaskCost):
    """A factor and its decomposition; about 9 d³ FLOPs a tile."""

    phase = "eigendecompositions"

    def memory(self, tiles: Sequence[int], store_dtype: torch.dtype) -> int:
        # The sum and the mean of all tiles in float64; of one tile the symmetric matrix, the
        # eigenvectors (numpy has them twice) and LAPACK's workspace of 2 d² (dsyevd); the
        # eigenvectors so far as they are stored.
        whole, tile = squares(tiles), max(tiles) ** 2
        return 16 * whole + 40 * tile + store_dtype.itemsize * (whole - tile)

    def flops(self, tiles: Sequence[int]) -> float:
        return eigh_cost(tiles)

    def read(self, group: Group, recipe: Recipe) -> int:
        return factor_sum_bytes(group, recipe)

    def files(self, group: Group, recipe: Recipe, data: DataShape) -> int:
        return basis_bytes(group, recipe)

    def scored(self, group: Group, recipe: Recipe) -> int:
        return basis_bytes(group, recipe)

    def most(self, group: Group, recipe: Recipe) -> int:
        factors = [t for s in group for t in s.factors(recipe.max_factor_dim).values()]
        largest = recipe.store_dtype.itemsize * max(map(squares, factors), default=0)
        # A sum goes when its basis is there, unless it is kept with the files of its own step.
        sums = 0 if recipe.keep_sums else factor_sum_bytes(group, recipe)
        return max(sums + largest, basis_bytes(group, recipe))


def basis_bytes(group: Group, recipe: Recipe) -> int:
    """Bytes of ``eigen/``: bases in the store's dtype, eigenvalues in float64."""
    widths = sum(sum(t) for s in group for t in s.factors(recipe.max_factor_dim).values())
    return recipe.store_dtype.itemsize * factor_elements(group, recipe) + 8 * widths


class Decompositions(TaskStep):
    """Eigenbases into ``eigen/``, and their eigenvalues into ``tables/spectrum``."""

    name = "eigen"
    cost = DecompositionCost()

    def lacking(self, group: int) -> bool:
        # A run that extends another has taken over its bases.
        return self.fit.extends is None and bool(undecomposed(self.fit, group))

    def run(self, group: int) -> None:
        fit, recipe = self.fit, self.fit.recipe
        factors = factors_of(fit.blocks_of(group))
        missing = undecomposed(fit, group)
        tiles = {name: factors[name].tiles(recipe.max_factor_dim) for name in missing}
        order = longest_first({name: eigh_cost(widths) for name, widths in tiles.items()})
        needs = [
            Need(self.cost.memory(tiles[name], recipe.store_dtype), eigh_cost(tiles[name]), name)
            for name in order
        ]
        for place, outcome in fit.workers.run_tasks(
            self.cost.phase,
            decompose_factor,
            [(fit.store, name, recipe.store_dtype, fit.workers.device) for name in order],
            needs,
            "factors",
            fit.workers.named(group),
        ):
            if not recipe.keep_sums:
                # Not in the task: Ray may run that twice.
                fit.store.delete(factor_file(order[place]))
            if outcome != "ok":
                fit.workers.reporter.say(f"factor {order[place]}: {outcome}")

    def tables_there(self) -> bool:
        return table_there(self.fit.store, SPECTRUM_FILE)

    def write_tables(self) -> None:
        write_spectrum(self.fit.store, factors_of(self.fit.workers.blocks), self.fit.notes)


def decompose_factor(store: Store, name: str, store_dtype: torch.dtype, device: str) -> str:
    """Read a factor's sum, decompose it, write its eigenbasis; gives the outcome."""
    factor = read_factor(store, name)
    basis = decompose(name, factor.mean(), store_dtype, torch.device(device), factor.dtype)
    write_eigen(store, factor, basis)
    return basis.outcome
