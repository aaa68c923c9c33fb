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
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import pyarrow as pa
import torch
from torch import Tensor

from raycurv.errors import DamagedFile, not_finite
from raycurv.files.artifacts import read_gradient
from raycurv.files.curvature_files import CurvatureFiles
from raycurv.files.row_files import open_inverses, open_rows
from raycurv.files.store import Store
from raycurv.files.tables import SALIENCY, as_lists, read_rows, write_table
from raycurv.files.tensorfile import TensorFile, is_complete, open_tensors, write_tensors
from raycurv.files.weights import write_weight
from raycurv.jobs.prune.prune_settings import PruneSettings
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import Damping
from raycurv.mathematics.pruning.masks import (
    all_kept,
    candidates,
    columns_mask,
    kept_of,
    rows_mask,
    single_weights,
)
from raycurv.mathematics.pruning.pattern import summed_pattern
from raycurv.mathematics.pruning.rank_surgeon import RankSurgeon
from raycurv.mathematics.pruning.saliency import magnitude
from raycurv.mathematics.pruning.selection import Prefix, Threshold, below, count_ties, histogram
from raycurv.mathematics.pruning.structures import column_runs, column_sums, inputs_of, row_sums
from raycurv.mathematics.pruning.surgeon import BlockSurgeon, Surgeon
from raycurv.mathematics.pruning.update import Solver, Update
from raycurv.mathematics.rank.rank_inverse import RankInverse
from raycurv.mathematics.sums import is_finite
from raycurv.models.model import Model

# Elements of a table that are made at once: its lists count them in 32 bits.
_CHUNK = 2**24
# Largest block whose remaining weights are solved for in float64 whatever the model's dtype.
_DOUBLE = 2**20


@dataclass(frozen=True)
class JointRank:
    """What a block knows of the rank-m Fisher of all blocks that it is a part of.

    Attributes:
        inverse: at the block's own columns; ``None`` where all rows are zero.
        gradient: what the inverse needs to know of the mean gradient of all blocks, with a
            first-order term.
    """

    inverse: RankInverse | None
    gradient: Tensor | None = None


@dataclass(frozen=True)
class Surgery:
    """Pruning of one block in one step.

    Attributes:
        curvature: of the step's fit.
        out: store of the results.
        step: number, from 1 on.
        network: whose weight it is.
        block: which.
        settings: of the job.
        share: what is gone after the step.
        double: whether the fit is of float64.
        head: columns of a head, where heads go.
        rank: of a ranked method, where the inverse is that of all blocks together.
    """

    curvature: CurvatureFiles
    out: Store
    step: int
    network: Model
    block: Block
    settings: PruneSettings
    share: float
    double: bool
    head: int
    rank: JointRank | None = None

    def file(self, kind: str, step: int | None = None) -> str:
        """Where something of the block lies."""
        place = step_place(self.step if step is None else step)
        return f"{place}/{kind}/{self.block.name}.safetensors"

    def write(self, kind: str, tensors: Mapping[str, Tensor], **notes: str) -> None:
        """Write what a task has made for the block."""
        write_tensors(self.out, self.file(kind), tensors, {"block": self.block.name} | notes)

    def open(self, kind: str) -> TensorFile:
        """What an earlier task has made for the block."""
        return open_tensors(self.out, self.file(kind))

    def has(self, kind: str) -> bool:
        """Whether it is there, and whole."""
        return is_complete(self.out, self.file(kind))

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
        """What is still there before the step, bool ``[O, I]``: at first what is not zero."""
        if self.step == 1:
            revive = self.settings.revive
            return all_kept(self.block) if revive else kept_of(self.block, self.weight())
        return open_tensors(self.out, self.file("keep", self.step - 1)).read("keep")

    def units_before(self) -> Tensor:
        """Which rows or heads are still there before the step, bool."""
        keep = self.kept_before()
        if self.settings.structure == "rows":
            return keep.any(dim=1)
        return torch.stack([keep[:, run.start : run.stop].any() for run in self.columns()])

    def saliency(self) -> Tensor:
        """Of single weights, float32, without the bias column."""
        return self.open("saliency").read("saliency")

    def candidates(self) -> Tensor:
        """Which weights may still go, bool, without the bias column."""
        return candidates(self.block, self.kept_before())[:, : inputs_of(self.block)]

    def gradient(self) -> Tensor | None:
        """The mean gradient ``[O, I]`` over the fit's examples, where it counts."""
        if not self.settings.first_order:
            return None
        return read_gradient(self.curvature.store, self.block.name).mean

    def surgeon(self, w_OI: Tensor) -> Surgeon | None:
        """What the fit's curvature says of the block; nothing without one."""
        method, fitted = self.curvature.method, self.curvature.store
        if not method.curved:
            return None
        if not method.ranked:
            curvature = self.curvature.open_spectral(self.block, {})
            return BlockSurgeon(curvature, w_OI, self.damping, self.gradient())
        runs, rank = open_rows(fitted, self.block).runs, self.rank or self._own_rank()
        return RankSurgeon(self.block, w_OI, runs, rank.inverse, self.gradient(), rank.gradient)

    @property
    def damping(self) -> Damping:
        """λ, or the factor that makes it, as the settings say."""
        return Damping.parse(self.settings.damping)

    def _own_rank(self) -> JointRank:
        """The Fisher of the block alone."""
        fitted, gradient = self.curvature.store, self.gradient()
        inverses = open_inverses(fitted, (self.block,), self.damping, joint=False)
        inverse = inverses.by_block[self.block.name]
        if gradient is None or inverse is None:
            return JointRank(inverse)
        return JointRank(inverse, open_rows(fitted, self.block).project(gradient[None], inverse))

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


def count_zeros(network: Model, block: Block) -> int:
    """How many of a block's weights are zero, its bias left out."""
    return int((network.block_weight(block)[:, : inputs_of(block)] == 0).sum())


def project_mean_gradient(op: Surgery) -> Tensor | None:
    """A block's share of what the whole model's inverse needs to know of the mean gradient."""
    gradient = op.gradient()
    assert op.rank is not None
    if gradient is None or op.rank.inverse is None:
        return None
    if not op.has("gradient"):
        rows = open_rows(op.curvature.store, op.block)
        share = rows.project(gradient[None], op.rank.inverse)
        op.write("gradient", {"share": share})
    return op.open("gradient").read("share")


def score_block(op: Surgery) -> Tensor | None:
    """Make a block's saliencies; gives their histogram where all blocks are compared, or those of
    its whole rows or heads and which of these are still there, ``[2, units]``."""
    settings = op.settings
    if not op.has("saliency"):
        op.write("saliency", _saliencies(op))
    if settings.structure in ("rows", "heads"):
        return torch.stack([op.open("saliency").read("units"), op.units_before().float()])
    if settings.structure == "unstructured" and settings.scope == "global":
        return histogram(op.saliency(), op.candidates())
    return None


def _saliencies(op: Surgery) -> dict[str, Tensor]:
    """Of single weights and of sets; a pattern's choice with them."""
    settings, w_OI = op.settings, op.weight()
    surgeon = None if settings.saliency == "magnitude" else op.surgeon(w_OI)
    if surgeon is None:
        assert settings.saliency == "magnitude"
        saliency = magnitude(w_OI)
    else:
        saliency = surgeon.obd() if settings.saliency == "obd" else surgeon.obs()
    if not is_finite(saliency):
        wrong = int((~saliency.isfinite()).sum())
        raise not_finite(f"block {op.block.name}", "its saliencies", f"{wrong} that are not")
    # By magnitude and OBD a set costs what its weights do one by one.
    joint = surgeon if settings.saliency == "obs" else None
    found = {"saliency": saliency[:, : inputs_of(op.block)].contiguous()}
    pattern = settings.pattern()
    if pattern is not None:
        before = op.kept_before()
        if joint is not None:
            chosen = joint.pattern(pattern, before)
        else:
            chosen = summed_pattern(pattern, op.block, saliency, before)
        found |= {"keep": chosen.keep_OI, "units": chosen.saliency_OB}
    elif settings.structure == "rows":
        found["units"] = row_sums(saliency) if joint is None else joint.outputs()
    elif settings.structure == "heads":
        heads = op.columns()
        found["units"] = column_sums(saliency, heads) if joint is None else joint.columns(heads)
    return found


def refine_histogram(op: Surgery, prefix: Prefix) -> Tensor:
    """The histogram of a block's saliencies in one bin of the coarse one."""
    return histogram(op.saliency(), op.candidates(), prefix)


def count_equal(op: Surgery, threshold: Threshold) -> int:
    """How many of a block's saliencies equal the threshold."""
    return count_ties(op.saliency(), op.candidates(), threshold)


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


def mask_block(op: Surgery, cut: Cut) -> tuple[Tensor, Tensor] | None:
    """Decide which weights of a block stay; gives its share of the equations of what remains where
    these are the whole model's."""
    if not op.has("keep"):
        tensors = {"keep": _mask(op, cut)}
        if not op.settings.no_update and op.rank is not None and op.rank.inverse is not None:
            surgeon = op.surgeon(op.weight())
            assert isinstance(surgeon, RankSurgeon)
            tensors["gram"], tensors["removed"] = surgeon.share(tensors["keep"])
        op.write("keep", tensors)
    file = op.open("keep")
    return (file.read("gram"), file.read("removed")) if "gram" in file.names else None


def _mask(op: Surgery, cut: Cut) -> Tensor:
    before, block = op.kept_before(), op.block
    if op.settings.pattern() is not None:
        return op.open("saliency").read("keep")
    if cut.units is not None:
        if op.settings.structure == "rows":
            return before & rows_mask(block, cut.units)
        return before & columns_mask(block, op.columns(), cut.units)
    if cut.threshold is None:
        padded = torch.zeros(block.d_out, block.d_in, dtype=torch.float32)
        padded[:, : inputs_of(block)] = op.saliency()
        return single_weights(block, padded, op.share, before)
    keep = before.clone()
    gone = below(op.saliency(), op.candidates(), cut.threshold, cut.ties)
    keep[:, : inputs_of(block)] &= ~gone
    return keep


@dataclass(frozen=True)
class PrunedBlock:
    """What became of a block.

    Attributes:
        weights: how many there are, biases left out.
        removed: how many are gone, before the step or in it.
        saliency: sum of those that went in this step.
        predicted: rise of the mean loss per example that the quadratic model predicts for the
            block's whole step; ``None`` without curvature.
        update: ``ok``, ``none``, ``zero`` or ``not converged``.
        iterations, residual: of the equations of what remains.
        seconds: the task took.
        gone_before: how many were gone before the step; before the first, those that were zero.
    """

    weights: int
    removed: int
    saliency: float
    predicted: float | None
    update: str
    iterations: int
    residual: float
    seconds: float
    gone_before: int = 0


@dataclass(frozen=True)
class Updated:
    """A block that is done in a step.

    Attributes:
        pruned: what became of it.
        seen, first: as an :class:`~raycurv.mathematics.pruning.surgeon.Increase` has them.
    """

    pruned: PrunedBlock
    seen: Tensor | None
    first: float


def updated(op: Surgery) -> Updated | None:
    """What an earlier run left of a step, if all of it is there."""
    if not (op.has("pruned") and op.has("weights") and _has_table(op)):
        return None
    file = op.open("pruned")
    seen = file.read("seen") if "seen" in file.names else None
    return Updated(file.noted_json("pruned", PrunedBlock), seen, file.noted("first"))


def update_block(op: Surgery, z_M: Tensor | None, notes: dict[str, str]) -> Updated:
    """Make and write the weights that remain, and in the last step the block's table.

    Args:
        z_M: the solution of the whole model's equations, of a ranked method.
        notes: footer of the table.
    """
    started = time.perf_counter()
    found = updated(op)
    if found is not None:
        return found
    keep, w_OI = op.open("keep").read("keep"), op.weight()
    surgeon = op.surgeon(w_OI)
    moved = Update(torch.where(keep, w_OI, 0), 0, 0.0, "none")
    if not op.settings.no_update and surgeon is not None:
        # Solved in float32 at least, whatever the checkpoint's dtype.
        moved = surgeon.remaining(keep, op.solver(), z_M)
    rise = None if surgeon is None else surgeon.increase(moved.w_OI.double() - w_OI.double())
    where = f"block {op.block.name}"
    if not is_finite(moved.w_OI):
        raise not_finite(where, f"its new weights, of {w_OI.dtype}".replace("torch.", ""))
    if rise is not None and not math.isfinite(rise.alone):
        raise not_finite(where, "the predicted rise of the loss", str(rise.alone))
    write_weight(op.out.inside(step_place(op.step)), op.block, moved.w_OI)
    if op.last:
        _write_saliencies(op, keep, notes)
    inputs = inputs_of(op.block)
    gone = ~keep[:, :inputs]
    there = op.kept_before()[:, :inputs]
    now = gone & there
    pruned = PrunedBlock(
        gone.numel(),
        int(gone.sum()),
        float(op.saliency()[now].sum(dtype=torch.float64)),
        None if rise is None else rise.alone,
        moved.outcome,
        moved.iterations,
        moved.residual,
        time.perf_counter() - started,
        int((~there).sum()),
    )
    seen, first = (None, 0.0) if rise is None else (rise.seen, rise.first)
    tensors = {} if seen is None else {"seen": seen}
    op.write("pruned", tensors, pruned=json.dumps(asdict(pruned)), first=repr(first))
    return Updated(pruned, seen, first)


def _write_saliencies(op: Surgery, keep: Tensor, notes: dict[str, str]) -> None:
    file = op.open("saliency")
    saliency, keep = file.read("saliency"), keep[:, : inputs_of(op.block)]
    units: Tensor | None = None
    if "units" in file.names and op.settings.structure != "heads":
        units = file.read("units").reshape(len(saliency), -1)
    step = max(1, _CHUNK // max(1, saliency.shape[1]))
    parts = []
    for start in range(0, len(saliency), step):
        rows = slice(start, min(start + step, len(saliency)))
        numbers = range(start, rows.stop)
        columns = {
            "block": pa.array([op.block.name] * len(numbers), pa.string()),
            "row": pa.array(numbers, pa.int32()),
            "saliency": as_lists(saliency[rows].numpy(), pa.float32()),
            "keep": as_lists(keep[rows].numpy(), pa.bool_()),
            "unit_saliency": pa.nulls(len(numbers), SALIENCY.field("unit_saliency").type)
            if units is None
            else as_lists(units[rows].numpy(), pa.float32()),
        }
        parts.append(pa.table(columns, schema=SALIENCY))
    write_table(op.out, op.table, pa.concat_tables(parts), notes, step)


def _has_table(op: Surgery) -> bool:
    """Whether the block's table is there and whole, where there is to be one by now."""
    if not op.last:
        return True
    try:
        return op.out.exists(op.table) and read_rows(op.out, op.table) == op.block.d_out
    except DamagedFile:
        return False
