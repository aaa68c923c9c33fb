"""Eigenvalues of a run as curves, and blocks by their layer and their role in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from raycurv.mathematics.blocks import role
from raycurv.mathematics.eigen import effective_rank
from raycurv.mathematics.methods import open_method
from raycurv.reporting.charts import CURVES, Array, Curve
from raycurv.run import Run

# Points of a curve: more are not seen.
_POINTS = 48
# Numbers of Λ that are read for a page: half a minute, at most.
_NUMBERS = 1 << 28


def layer_of(block: str) -> int | None:
    """The first number in a block's name: that of its layer."""
    return next((int(part) for part in block.split(".") if part.isdecimal()), None)


def roles(blocks: Sequence[str]) -> dict[str, str]:
    """Of each block, its role in its layer: its name without numbers, and without what is before
    the layer's where all have the same; ``weight`` where nothing is left."""
    whole = {name: role(f".{name}")[1:] for name in blocks}
    heads = {name.partition("*")[0] for name in whole.values() if "*" in name}
    head = f"{heads.pop()}*" if len(heads) == 1 else ""
    return {
        block: name.removeprefix(head).removeprefix(".") or "weight"
        for block, name in whole.items()
    }


@dataclass(frozen=True)
class Corrected:
    """Λ of some blocks.

    Attributes:
        curves: one a block.
        effective_ranks: by block.
        blocks: how many the run has.
    """

    curves: list[Curve]
    effective_ranks: dict[str, float]
    blocks: int


def factor_curves(run: Run) -> dict[str, list[Curve]]:
    """The eigenvalues of A (``input``) and of G (``output``), falling, by the first block that uses
    the factor."""
    table = run.spectrum()
    found: dict[str, list[Curve]] = {"input": [], "output": []}
    if not len(table):
        return found
    coded = table["factor"].combine_chunks().dictionary_encode()
    bounds = np.flatnonzero(np.diff(coded.indices.to_numpy(), prepend=-1, append=-1))
    values = table["eigenvalue"].to_numpy()
    for start, stop in pairwise(bounds.tolist()):
        block, side = (table[name][start].as_py() for name in ("block", "side"))
        found[side].append(_curve(block, -np.sort(-values[start:stop])))
    return found


def corrected_curves(run: Run) -> Corrected:
    """Λ of the run's blocks: of all, or evenly out of them, as many as are read in half a
    minute."""
    names = run.block_names()
    if not open_method(run.manifest.settings["method"]).curved:
        return Corrected([], {}, len(names))
    table = run.blocks()
    sizes = table["d_in"].to_numpy().astype(np.int64) * table["d_out"].to_numpy()
    small = [name for name, size in zip(table["block"].to_pylist(), sizes, strict=True)
             if size <= _NUMBERS]  # fmt: skip
    every = max(1, -(-int(sizes[sizes <= _NUMBERS].sum()) // _NUMBERS), -(-len(small) // CURVES))
    found = Corrected([], {}, len(names))
    for name in small[::every]:
        values = run.curvature(name).eigenvalues.flatten().double()
        found.effective_ranks[name] = effective_rank(values)
        found.curves.append(_curve(name, torch.sort(values, descending=True).values.numpy()))
    return found


def _curve(block: str, falling: Array) -> Curve:
    """The values above zero at ranks ever further apart, the first and the last among them."""
    count = int(np.count_nonzero(falling > 0))
    ranks = np.unique(np.geomspace(1, max(count, 1), _POINTS).round().astype(np.int64))[:count]
    return Curve(block, ranks, falling[ranks - 1])
