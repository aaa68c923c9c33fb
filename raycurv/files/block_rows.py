"""The tables of blocks, of eigenvalues and of gradients, made from a run's files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from raycurv.errors import not_finite
from raycurv.files.artifacts import corrected_notes, gradient_notes, read_spectrum
from raycurv.files.row_files import open_rows
from raycurv.files.store import Store
from raycurv.files.tables import BLOCKS, GRADIENTS, SPECTRUM, write_table
from raycurv.mathematics.bases import Basis
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.eigen import effective_rank
from raycurv.mathematics.factors import Factor
from raycurv.mathematics.gradient_statistics import GradientNumbers
from raycurv.mathematics.methods import Method

BLOCKS_FILE = "tables/blocks/part-00000.parquet"
SPECTRUM_FILE = "tables/spectrum/part-00000.parquet"
GRADIENTS_FILE = "tables/gradients/part-00000.parquet"


def write_blocks(
    store: Store,
    blocks: Sequence[Block],
    stages: Mapping[str, int],
    method: Method,
    basis: Basis,
    examples: int,
    notes: Mapping[str, str],
) -> dict[str, Any]:
    """``tables/blocks``: one row a block. Gives what :func:`_unevenly_reached` says of them.

    ``trace`` is ΣΛ; of K-FAC tr A · tr G times the scale of its basis, rows an example by default;
    of M-FAC the mean squared norm of its rows; null for the identity. ``thin`` is a block that
    fewer rows reached than twice the longer of its axes.
    """
    rows = [_row(store, b, stages[b.name], method, basis, examples) for b in blocks]
    write_table(store, BLOCKS_FILE, pa.Table.from_pylist(rows, schema=BLOCKS), notes)
    return _unevenly_reached(blocks, rows)


def _unevenly_reached(blocks: Sequence[Block], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of blocks that share out rows among them, as experts do: how many there are (``blocks``), the
    names of those that no row reached, or no gradient (``unreached``; a run that is extended may
    reach what gave no row to its bases), and how many are ``thin`` besides; empty where there are
    none."""
    shared = [row for block, row in zip(blocks, rows, strict=True) if block.index is not None]
    if not shared:
        return {}
    none = [row["block"] for row in shared if row.get("mean_eigenvalue") == 0.0]
    thin = sum(bool(row.get("thin")) for row in shared if row["block"] not in set(none))
    return {"blocks": len(shared), "unreached": none, "thin": thin}


def unreached_blocks(store: Store) -> tuple[str, ...]:
    """The blocks of a fit without curvature: those that no row reached, or no gradient."""
    with store.reading(BLOCKS_FILE) as file:
        table = pq.read_table(file, columns=["block", "mean_eigenvalue"])
    return tuple(table.filter(pc.equal(table["mean_eigenvalue"], 0.0))["block"].to_pylist())


def _row(
    store: Store, block: Block, stage: int, method: Method, basis: Basis, examples: int
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "block": block.name,
        "module": block.module,
        "stage": stage,
        "input_factor": block.input_factor,
        "input_tiles": [block.d_in],
        "output_tiles": [block.d_out],
        "d_in": block.d_in,
        "d_out": block.d_out,
        "bias": block.bias,
        "examples": examples,
    }
    outcomes: list[str] = []
    rows = 0
    if method.factors:
        inputs = read_spectrum(store, block.input_factor, block.d_in)
        outputs = read_spectrum(store, block.output_factor, block.d_out)
        right, left, rows = inputs.values, outputs.values, inputs.rows
        row |= {
            "tokens": rows,
            "thin": rows < 2 * max(block.d_in, block.d_out),
            "input_tiles": inputs.tiles,
            "output_tiles": outputs.tiles,
            "input_effective_rank": effective_rank(torch.cat(list(right))),
            "output_effective_rank": effective_rank(torch.cat(list(left))),
            "eigh_seconds": inputs.seconds + outputs.seconds,
        }
        outcomes = [inputs.outcome, outputs.outcome]
        if not method.corrected:
            scale = basis.scale(rows / max(examples, 1), torch.cat(list(left)))
            traces = float(sum(t.sum() for t in right)), float(sum(t.sum() for t in left))
            row["trace"] = scale * traces[0] * traces[1]
            row["mean_eigenvalue"] = row["trace"] / (block.d_in * block.d_out)
    if method.corrected:
        said = corrected_notes(store, block)
        row |= {"trace": said.trace, "mean_eigenvalue": said.mean}
    if method.ranked:
        row["trace"] = open_rows(store, block).file.noted("trace")
        row["mean_eigenvalue"] = row["trace"] / (block.d_in * block.d_out)
    if row.get("mean_eigenvalue") == 0.0:
        outcomes.append("zero")
    worth_saying = list(dict.fromkeys(o for o in outcomes if o != "ok"))
    row["eigh_outcome"] = "+".join(worth_saying) or "ok"
    return row


def write_spectrum(store: Store, factors: Mapping[str, Factor], notes: Mapping[str, str]) -> None:
    """``tables/spectrum``: one row an eigenvalue, largest first in each tile.

    ``tile_start`` and ``tile_stop`` say which indices of the axis the tile holds.
    """
    parts = []
    for name, factor in factors.items():
        spectrum = read_spectrum(store, name, factor.width)
        widths = np.asarray(spectrum.tiles)
        stops = widths.cumsum()
        starts, falling = stops - widths, [values.flip(0) for values in spectrum.values]
        if spectrum.diagonal:
            falling = list(spectrum.values)
        count = int(widths.sum())
        parts.append(
            pa.table(
                {
                    "factor": [name] * count,
                    "block": [factor.block.name] * count,
                    "tile": np.arange(len(widths), dtype=np.int32).repeat(widths),
                    "tile_start": starts.astype(np.int32).repeat(widths),
                    "tile_stop": stops.astype(np.int32).repeat(widths),
                    "side": [factor.side] * count,
                    "index": (np.arange(count) - starts.repeat(widths)).astype(np.int32),
                    "eigenvalue": torch.cat(falling).numpy(),
                },
                schema=SPECTRUM,
            )
        )
    write_table(store, SPECTRUM_FILE, pa.concat_tables(parts), notes)


def write_gradients(
    store: Store, blocks: Sequence[Block], notes: Mapping[str, str]
) -> dict[str, Any]:
    """``tables/gradients``: one row a block; gives the numbers of all of them together."""
    rows, together = [], None
    for block in blocks:
        numbers, batches = gradient_notes(store, block.name)
        rows.append({"block": block.name, "batches": batches} | _numbers(numbers))
        together = numbers if together is None else together.plus(numbers)
    write_table(store, GRADIENTS_FILE, pa.Table.from_pylist(rows, schema=GRADIENTS), notes)
    assert together is not None
    found = _numbers(together)
    for name, value in found.items():
        if value is not None and not math.isfinite(value):
            raise not_finite("all blocks together", f"the gradients' {name}", str(value))
    return found


def _numbers(found: GradientNumbers) -> dict[str, Any]:
    return {
        "examples": found.examples,
        "mean_sq_norm": found.mean_sq_norm,
        "sq_norm": found.sq_norm,
        "noise": found.noise,
        "signal": found.signal,
        "noise_scale": found.scale,
        "fisher_trace_empirical": found.sq_norm,
        "fisher_trace_sampled": found.sampled_trace,
        "gauss_newton_bartlett_trace": found.bartlett_trace,
    }
