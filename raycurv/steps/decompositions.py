"""Eigendecompositions of factors as tasks: the longest first, wherever there is room, and several
small ones in one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raycurv.errors import some_of
from raycurv.files.artifacts import factor_file, read_factor, write_eigen
from raycurv.files.block_rows import SPECTRUM_FILE, write_spectrum
from raycurv.files.store import Store
from raycurv.files.together import together
from raycurv.mathematics.eigen import Eigenbasis, decompose
from raycurv.mathematics.factors import FactorSum, factors_of
from raycurv.planning.cost import TaskCost
from raycurv.planning.shapes import DataShape, Group, Recipe, factor_elements, squares
from raycurv.stages.dealing import eigh_cost, longest_first, runs
from raycurv.stages.pool import Need
from raycurv.steps.covariances import factor_sum_bytes, undecomposed
from raycurv.steps.step import TaskStep, table_there

# A task takes factors up to so many FLOPs, some hundredths of a second, and so many in number: to
# send one out takes some thousandths.
_TASK_FLOPS, _TASK_FACTORS = 2e9, 64


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
    widths = sum(sum(t) * count for s in group for t, count in s.tiles(recipe.max_factor_dim))
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
        costs = {name: eigh_cost(widths) for name, widths in tiles.items()}
        tasks = runs(longest_first(costs), costs, _TASK_FLOPS, _TASK_FACTORS)
        needs = [
            Need(
                max(self.cost.memory(tiles[name], recipe.store_dtype) for name in names),
                sum(costs[name] for name in names),
                some_of(names, 1),
                len(names),
            )
            for names in tasks
        ]
        for place, outcomes in fit.workers.run_tasks(
            self.cost.phase,
            decompose_factors,
            [(fit.store, names, recipe.store_dtype, fit.workers.device) for names in tasks],
            needs,
            "factors",
            fit.workers.named(group),
        ):
            if not recipe.keep_sums:
                # Not in the task: Ray may run that twice.
                together(fit.store.delete, [factor_file(name) for name in tasks[place]])
            for name, outcome in zip(tasks[place], outcomes, strict=True):
                if outcome != "ok":
                    fit.workers.reporter.say(f"factor {name}: {outcome}")

    def tables_there(self) -> bool:
        return table_there(self.fit.store, SPECTRUM_FILE)

    def write_tables(self) -> None:
        write_spectrum(self.fit.store, factors_of(self.fit.workers.blocks), self.fit.notes)


def decompose_factors(
    store: Store, names: Sequence[str], store_dtype: torch.dtype, device: str
) -> list[str]:
    """Read the sums of factors, decompose them, write their eigenbases; gives the outcomes."""

    def decomposed(name: str) -> tuple[FactorSum, Eigenbasis]:
        factor = read_factor(store, name)
        return factor, decompose(
            name, factor.mean(), store_dtype, torch.device(device), factor.dtype
        )

    found = [decomposed(name) for name in names]
    together(lambda pair: write_eigen(store, *pair), found)
    return [basis.outcome for _, basis in found]
