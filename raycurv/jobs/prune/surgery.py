"""The tasks of pruning, one a block: saliencies, masks, and the weights that remain.

    work/step-1/gradient/BLOCK    of M-FAC, with a first-order term: G times the mean gradient
    work/step-1/saliency/BLOCK    saliency [O, I], units (rows, heads, runs of N:M), keep (of N:M)
    work/step-1/keep/BLOCK        keep [O, I], the bias column included; of M-FAC what remains
    work/step-1/weights/BLOCK     the new weight
    saliency/BLOCK.parquet        saliencies and masks of the last step, a row an output
    work/step-1/pruned/BLOCK      what became of the block, once all of these are there

A task reads one block's weight and curvature, and no other's. What travels is a histogram, numbers
of whole sets, or as many numbers as a rank-m Fisher has rows. Each writes its file whole and looks
first whether it is there.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raycurv.errors import DamagedFile, NumericalError
from raycurv.files.artifacts import read_gradient
from raycurv.files.curvature_files import CurvatureFiles
from raycurv.files.row_files import open_rows
from raycurv.files.store import Store
from raycurv.files.tables import SALIENCY, read_rows, write_table
from raycurv.files.tensorfile import open_tensors, whole, write_tensors
from raycurv.files.weights import write_weight
from raycurv.jobs.prune.prune_settings import PruneSettings
from raycurv.jobs.rank_products import projected, rank_inverses
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import Damping
from raycurv.mathematics.pruning.masks import (
    all_kept,
    candidates,
    columns_mask,
    rows_mask,
    single_weights,
)
from raycurv.mathematics.pruning.selection import Prefix, Threshold, below, count_ties, histogram
from raycurv.mathematics.pruning.structures import column_runs, inputs_of
from raycurv.mathematics.pruning.surgeon import (
    BlockSurgeon,
    RankSurgeon,
    output_saliencies,
    pattern_of,
    run_saliencies,
    single_saliencies,
)
from raycurv.mathematics.pruning.update import Solver
from raycurv.mathematics.rank.rank_inverse import RankInverse
from raycurv.models.model import Model

# Elements of a table that are made at once: its lists count them in 32 bits.
_CHUNK = 2**24
# Largest block whose remaining weights are solved for in float64 whatever the model's dtype.
_DOUBLE = 2**20


@dataclass(frozen=True)
class Rank:
    """What is known to a block of a rank-m Fisher.

    Attributes:
        inverse: at the block's own columns; ``None`` where all rows are zero.
        gram: ``GGᵀ`` over all columns of the inverse.
        gradient: ``G`` times the mean gradient, over the same columns.
    """

    inverse: RankInverse | None
    gram: Tensor
    gradient: Tensor | None = None


@dataclass(frozen=True)
class Operation:
    """Pruning of one block in one step.

    Attributes:
        fitted: store of the fit.
        out: store of the results.
        step: number, from 1 on.
        network: whose weight it is.
        block: which.
        settings: of the job.
        share: what is gone after the step.
        curvature: of the fit.
        double: whether the fit is of float64.
        head: columns of a head, where heads go.
        rank: of M-FAC, where the inverse is that of all blocks together.
    """

    fitted: Store
    out: Store
    step: int
    network: Model
    block: Block
    settings: PruneSettings
    share: float
    curvature: CurvatureFiles
    double: bool
    head: int
    rank: Rank | None = None

    def file(self, kind: str, step: int | None = None) -> str:
        """Where something of the block lies."""
        place = step_place(self.step if step is None else step)
        return f"{place}/{kind}/{self.block.name}.safetensors"

    @property
    def last(self) -> bool:
        """Whether no step comes after."""
        return self.step == self.settings.steps

    @property
    def table(self) -> str:
        """Where the block's table lies."""
        return f"saliency/{self.block.name}.parquet"

    def weight(self) -> Tensor:
        """The weight before the step, ``[O, I]``."""
        return self.network.block_weight(self.block)

    def kept_before(self) -> Tensor:
        """What is still there before the step, bool ``[O, I]``."""
        if self.step == 1:
            return all_kept(self.block)
        return open_tensors(self.out, self.file("keep", self.step - 1)).read("keep")

    def units_before(self) -> Tensor:
        """Which rows or heads are still there before the step, bool."""
        keep = self.kept_before()
        if self.settings.structure == "rows":
            return keep.any(dim=1)
        return torch.stack([keep[:, run.start : run.stop].any() for run in self.columns()])

    def gradient(self) -> Tensor | None:
        """The mean gradient, where it counts."""
        if not self.settings.first_order:
            return None
        return read_gradient(self.fitted, self.block.name).mean

    def surgeon(self, w_OI: Tensor) -> BlockSurgeon | RankSurgeon | None:
        """What the fit's curvature says of the block; nothing without one."""
        if not self.curvature.method.curved:
            return None
        if self.curvature.method.ranked:
            rows, rank = open_rows(self.fitted, self.block), self.rank or self._own_rank()
            return RankSurgeon(
                self.block, w_OI, rows.runs, rank.inverse, rank.gram, self.gradient(),
                rank.gradient,
            )  # fmt: skip
        curvature = self.curvature.open_spectral(self.block, {})
        return BlockSurgeon(curvature, w_OI, self.damping, self.gradient())

    @property
    def damping(self) -> Damping:
        """Of the settings."""
        return Damping.parse(self.settings.damping)

    def _own_rank(self) -> Rank:
        """The Fisher of the block alone."""
        inverses = rank_inverses(self.fitted, (self.block,), self.damping, whole=False)
        inverse, gradient = inverses.by_block[self.block.name], self.gradient()
        gram = open_rows(self.fitted, self.block).gram()
        if gradient is None or inverse is None:
            return Rank(inverse, gram)
        return Rank(inverse, gram, projected(gradient[None], self.fitted, self.block, inverse))

    def solver(self) -> Solver:
        """How the equations of what remains are solved."""
        wide = self.double or self.block.d_out * self.block.d_in <= _DOUBLE
        dtype = torch.float64 if wide else torch.float32
        return Solver(self.settings.tolerance, self.settings.iterations, dtype)

    def columns(self) -> tuple[range, ...]:
        """The inputs of each head."""
        return column_runs(self.block, self.head)


def step_place(step: int) -> str:
    """Where what belongs to one step lies."""
    return f"work/step-{step}"


def project_mean_gradient(operation: Operation) -> Tensor | None:
    """A block's share of G times the mean gradient, as the inverse needs it."""
    op, gradient = operation, operation.gradient()
    assert op.rank is not None
    if gradient is None or op.rank.inverse is None:
        return None
    name = op.file("gradient")
    if not whole(op.out, name):
        share = projected(gradient[None], op.fitted, op.block, op.rank.inverse)
        write_tensors(op.out, name, {"share": share}, {"block": op.block.name})
    return open_tensors(op.out, name).read("share")


def score_block(operation: Operation) -> Tensor | None:
    """Make a block's saliencies; gives their histogram where all blocks are compared, or those of
    its whole rows or heads and which of these are still there, ``[2, units]``."""
    op, settings = operation, operation.settings
    name = op.file("saliency")
    if not whole(op.out, name):
        w_OI = op.weight()
        surgeon = None if settings.saliency == "magnitude" else op.surgeon(w_OI)
        joint = surgeon if settings.saliency == "obs" else None
        saliency = single_saliencies(settings.saliency, w_OI, surgeon)
        if bool(saliency.isnan().any()):
            raise NumericalError(
                f"block {op.block.name}", "saliencies that are numbers",
                f"{int(saliency.isnan().sum())} NaN",
                "Look for values that are not finite in its weights and its curvature.",
            )  # fmt: skip
        tensors = {"saliency": saliency[:, : inputs_of(op.block)].contiguous()}
        pattern = settings.pattern()
        if pattern is not None:
            found = pattern_of(pattern, op.block, saliency, op.kept_before(), joint)
            tensors |= {"keep": found.keep_OI, "units": found.saliency_OB}
        elif settings.structure == "rows":
            tensors["units"] = output_saliencies(saliency, joint)
        elif settings.structure == "heads":
            tensors["units"] = run_saliencies(saliency, op.columns(), joint)
        write_tensors(op.out, name, tensors, {"block": op.block.name})
    file = open_tensors(op.out, name)
    if settings.structure in ("rows", "heads"):
        return torch.stack([file.read("units"), op.units_before().float()])
    if settings.structure == "unstructured" and settings.scope == "global":
        return histogram(file.read("saliency"), _open_weights(op))
    return None


def refine_histogram(operation: Operation, prefix: Prefix) -> Tensor:
    """The histogram of a block's saliencies in one bin of the coarse one."""
    return histogram(_saliency(operation), _open_weights(operation), prefix)


def count_equal(operation: Operation, threshold: Threshold) -> int:
    """How many of a block's saliencies equal the threshold."""
    return count_ties(_saliency(operation), _open_weights(operation), threshold)


@dataclass(frozen=True)
class Cut:
    """What goes of a block.

    Attributes:
        threshold: of all blocks' saliencies.
        ties: how many of those that equal it.
        units: bool, which rows or heads stay.
    """

    threshold: Threshold | None = None
    ties: int = 0
    units: Tensor | None = None


def mask_block(operation: Operation, cut: Cut) -> tuple[Tensor, Tensor] | None:
    """Decide which weights of a block stay; gives its share of the equations of what remains where
    these are the whole model's."""
    op, name = operation, operation.file("keep")
    if not whole(op.out, name):
        tensors = {"keep": _mask(op, cut)}
        if not op.settings.no_update and op.rank is not None:
            surgeon = op.surgeon(op.weight())
            assert isinstance(surgeon, RankSurgeon)
            if surgeon.inverse is not None:
                tensors["gram"], tensors["removed"] = surgeon.kept(tensors["keep"])
        write_tensors(op.out, name, tensors, {"block": op.block.name})
    file = open_tensors(op.out, name)
    return (file.read("gram"), file.read("removed")) if "gram" in file.names else None


def _mask(op: Operation, cut: Cut) -> Tensor:
    before, block = op.kept_before(), op.block
    if op.settings.pattern() is not None:
        return open_tensors(op.out, op.file("saliency")).read("keep")
    if cut.units is not None:
        if op.settings.structure == "rows":
            return before & rows_mask(block, cut.units)
        return before & columns_mask(block, op.columns(), cut.units)
    saliency = _saliency(op)
    if cut.threshold is None:
        padded = torch.zeros(block.d_out, block.d_in, dtype=torch.float32)
        padded[:, : inputs_of(block)] = saliency
        return single_weights(block, padded, op.share, before)
    gone = below(saliency, _open_weights(op), cut.threshold, cut.ties)
    keep = before.clone()
    keep[:, : inputs_of(block)] &= ~gone
    return keep


@dataclass(frozen=True)
class Pruned:
    """What became of a block.

    Attributes:
        weights: how many there are, biases left out.
        removed: how many are gone.
        saliency: sum of those that went in this step.
        predicted: rise of the mean loss per example that the quadratic model predicts for the
            block's whole step; ``None`` without curvature.
        update: ``ok``, ``none``, ``zero`` or ``not converged``.
        iterations, residual: of the equations of what remains.
        seconds: the task took.
    """

    weights: int
    removed: int
    saliency: float
    predicted: float | None
    update: str
    iterations: int
    residual: float
    seconds: float


@dataclass(frozen=True)
class Updated:
    """A block that is done in a step.

    Attributes:
        pruned: what became of it.
        seen: of M-FAC its share of ``Gδ``, ``[M]``.
        first: its share of ``gᵀδ``.
    """

    pruned: Pruned
    seen: Tensor | None
    first: float


def updated(operation: Operation) -> Updated | None:
    """What an earlier run left of a step, if all of it is there."""
    op, name = operation, operation.file("pruned")
    if not (whole(op.out, name) and whole(op.out, op.file("weights")) and _has_table(op)):
        return None
    file = open_tensors(op.out, name)
    said = json.loads(file.metadata["pruned"])
    seen = file.read("seen") if "seen" in file.names else None
    return Updated(Pruned(**said), seen, float(file.metadata["first"]))


def update_block(operation: Operation, z_M: Tensor | None, notes: dict[str, str]) -> Updated:
    """Make and write the weights that remain, and in the last step the block's table.

    Args:
        z_M: the solution of the whole model's equations, of M-FAC.
        notes: footer of the table.
    """
    op, started = operation, time.perf_counter()
    found = updated(op)
    if found is not None:
        return found
    keep = open_tensors(op.out, op.file("keep")).read("keep")
    w_OI = op.weight()
    surgeon = op.surgeon(w_OI)
    outcome, iterations, residual = "none", 0, 0.0
    new = torch.where(keep, w_OI, 0)
    if not op.settings.no_update and surgeon is not None:
        # Solved in float32 at least, whatever the checkpoint's dtype.
        if isinstance(surgeon, BlockSurgeon):
            moved = surgeon.remaining(keep, op.solver())
            new, outcome = moved.w_OI, moved.outcome
            iterations, residual = moved.iterations, moved.residual
        else:
            new, outcome = _moved(op, surgeon, keep, z_M)
    predicted, seen, first = _predicted(surgeon, new.double() - w_OI.double())
    write_weight(op.out.inside(step_place(op.step)), op.block, new)
    if op.last:
        _write_saliencies(op, keep, notes)
    inputs = inputs_of(op.block)
    gone = ~keep[:, :inputs]
    now = gone & op.kept_before()[:, :inputs]
    pruned = Pruned(
        gone.numel(),
        int(gone.sum()),
        float(_saliency(op)[now].sum(dtype=torch.float64)),
        predicted,
        outcome,
        iterations,
        residual,
        time.perf_counter() - started,
    )
    said = {"pruned": json.dumps(asdict(pruned)), "first": repr(first)}
    write_tensors(op.out, op.file("pruned"), {} if seen is None else {"seen": seen}, said)
    return Updated(pruned, seen, first)


def _moved(
    op: Operation, surgeon: RankSurgeon, keep: Tensor, z_M: Tensor | None
) -> tuple[Tensor, str]:
    if surgeon.inverse is None:
        return torch.where(keep, surgeon.w_OI, 0), "zero"
    if z_M is None:
        return surgeon.alone(keep), "ok"
    return surgeon.moved(keep, z_M), "ok"


def _predicted(
    surgeon: BlockSurgeon | RankSurgeon | None, step: Tensor
) -> tuple[float | None, Tensor | None, float]:
    if surgeon is None:
        return None, None, 0.0
    if isinstance(surgeon, BlockSurgeon):
        return surgeon.increase(step), None, 0.0
    seen, first = surgeon.seen(step)
    return surgeon.increase(seen, first), seen, first


def _saliency(op: Operation) -> Tensor:
    return open_tensors(op.out, op.file("saliency")).read("saliency")


def _open_weights(op: Operation) -> Tensor:
    """Which weights may still go, bool, without the bias column."""
    return candidates(op.block, op.kept_before())[:, : inputs_of(op.block)]


def _write_saliencies(op: Operation, keep: Tensor, notes: dict[str, str]) -> None:
    inputs = inputs_of(op.block)
    file = open_tensors(op.out, op.file("saliency"))
    saliency = file.read("saliency")
    units: Tensor | None = None
    if "units" in file.names and op.settings.structure != "heads":
        units = file.read("units").reshape(len(saliency), -1)
    step = max(1, _CHUNK // max(1, inputs))
    parts = []
    for start in range(0, len(saliency), step):
        rows = slice(start, min(start + step, len(saliency)))
        count = rows.stop - start
        parts.append(
            {
                "block": pa.array([op.block.name] * count, pa.string()),
                "row": pa.array(np.arange(start, rows.stop), pa.int32()),
                "saliency": _lists(saliency[rows]),
                "keep": _lists(keep[rows, :inputs]),
                "unit_saliency": pa.nulls(count, SALIENCY.field("unit_saliency").type)
                if units is None
                else _lists(units[rows]),
            }
        )
    table = pa.concat_tables([pa.table(part, schema=SALIENCY) for part in parts])
    write_table(op.out, op.table, table, notes, step)


def _has_table(op: Operation) -> bool:
    """Whether the block's table is there and whole, where there is to be one by now."""
    if not op.last:
        return True
    try:
        return op.out.exists(op.table) and read_rows(op.out, op.table) == op.block.d_out
    except DamagedFile:
        return False


def _lists(matrix: Tensor) -> pa.ListArray:
    offsets = pa.array(np.arange(len(matrix) + 1) * matrix.shape[1], pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(matrix.contiguous().numpy().reshape(-1)))
