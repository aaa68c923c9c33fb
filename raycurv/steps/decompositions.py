"""Eigendecompositions of factors: one task each, the longest first, wherever there is room."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from raycurv.driver.workers import Workers
from raycurv.files.artifacts import factor_file, read_factor, write_eigen
from raycurv.files.store import Store
from raycurv.mathematics.eigen import decompose
from raycurv.mathematics.factors import Factor
from raycurv.planning.moments import decomposition
from raycurv.progress.reporter import Reporter
from raycurv.stages.dealing import eigh_cost, longest_first
from raycurv.stages.pool import Need


def decompose_factors(
    store: Store,
    factors: Mapping[str, Factor],
    max_factor_dim: int | None,
    store_dtype: torch.dtype,
    keep_sums: bool,
    workers: Workers,
    where: str,
    reporter: Reporter,
) -> None:
    """Decompose factors whose sums are in the store.

    Args:
        store: of the run.
        factors: by name.
        max_factor_dim: widest tile.
        store_dtype: of the written bases.
        keep_sums: whether sums stay once they are decomposed.
        workers: run the tasks.
        where: which stages the factors are of, for the progress.
        reporter: says which went otherwise than they should.
    """
    tiles = {name: factor.tiles(max_factor_dim) for name, factor in factors.items()}
    order = longest_first({name: eigh_cost(widths) for name, widths in tiles.items()})
    arguments = [(store, name, store_dtype, workers.device) for name in order]
    needs = [
        Need(decomposition(tiles[name], store_dtype), eigh_cost(tiles[name]), name)
        for name in order
    ]
    for place, outcome in workers.run_tasks(
        "eigendecompositions", decompose_factor, arguments, needs, "factors", where
    ):
        if not keep_sums:
            # Not in the task: Ray may run that twice.
            store.delete(factor_file(order[place]))
        if outcome != "ok":
            reporter.say(f"factor {order[place]}: {outcome}")


def decompose_factor(store: Store, name: str, store_dtype: torch.dtype, device: str) -> str:
    """Read a factor's sum, decompose it, write its eigenbasis; gives the outcome."""
    factor = read_factor(store, name)
    basis = decompose(name, factor.mean(), store_dtype, torch.device(device), factor.dtype)
    write_eigen(store, factor, basis)
    return basis.outcome
