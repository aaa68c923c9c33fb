"""Pruning: which weights of a fitted model go, what becomes of the others, and the checkpoint.

    saliencies    one task a block                           work/step-1/saliency/
    masks         what goes, of all blocks or of each        work/step-1/keep/
    update        the weights that remain, moved             work/step-1/weights/, saliency/
    (the curvature of the pruned model, and again)           work/step-2/run/, work/step-2/…
    checkpoint    the model with these weights               model/
    measured      losses before and after                    tables/pruned/

Blocks are never together in memory: between them travel histograms of saliencies, numbers of whole
rows or heads, and of M-FAC as many numbers as its Fisher has rows.

Every arrow leaves finished files, and a phase makes only those that are missing.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from operator import truediv
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raycurv.driver.corpus import Corpus, corpus_of_run, store_corpus, stored_corpus
from raycurv.driver.settings import DTYPES, IN_MEMORY, Execution, identity
from raycurv.driver.workers import Workers, in_order
from raycurv.errors import not_finite
from raycurv.files.block_rows import unreached_blocks
from raycurv.files.curvature_files import CurvatureFiles
from raycurv.files.manifest import Manifest
from raycurv.files.row_files import open_inverses
from raycurv.files.store import Store
from raycurv.files.tables import HEADS, PRUNED, footer, write_table
from raycurv.files.weights import stored_patch, write_checkpoint
from raycurv.jobs.fit.fit_settings import FitSettings
from raycurv.jobs.fit.fitting import fit as run_fit
from raycurv.jobs.fit.parents import SHARED
from raycurv.jobs.fitted import GivenAgain, open_fitted
from raycurv.jobs.inputs import Inputs
from raycurv.jobs.losses import Losses
from raycurv.jobs.prune.prunable import blocks_to_prune, check_statistics
from raycurv.jobs.prune.prune_settings import PruneSettings
from raycurv.jobs.prune.surgery import (
    Cut,
    JointRank,
    PrunedBlock,
    Surgery,
    Updated,
    count_equal,
    count_zeros,
    mask_block,
    project_mean_gradient,
    refine_histogram,
    score_block,
    step_place,
    update_block,
    updated,
)
from raycurv.jobs.recorded import fit_settings
from raycurv.jobs.shell import Shell, open_shell
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.loss.objective import Objective
from raycurv.mathematics.pruning.masks import count_gone, sets_kept
from raycurv.mathematics.pruning.rank_surgeon import rank_increase, solve_kept
from raycurv.mathematics.pruning.selection import find_prefix, find_threshold, share_ties
from raycurv.mathematics.pruning.structures import inputs_of
from raycurv.models.model import Model
from raycurv.models.patched import Patched, parts
from raycurv.progress.reporter import Reporter
from raycurv.stages.pool import Need

# Bytes that a run of rows of a rank-m Fisher and what is made of it take.
_RUN_MEMORY = 2**28
# Where results lie.
_RESULTS = ("model", "saliency", "tables/pruned", "tables/heads")
PRUNED_FILE = "tables/pruned/part-00000.parquet"
HEADS_FILE = "tables/heads/part-00000.parquet"


def prune(
    settings: PruneSettings, inputs: Inputs | None = None, reporter: Reporter | None = None
) -> tuple[Store, dict[str, Any]]:
    """Prune the model of a fit; gives the store of the results and what was found.

    Args:
        settings: of the job.
        inputs: the fit's model and objective where they are in memory.
        reporter: shows progress; by default to the terminal.

    Raises:
        UserError: a mistake in settings or run, statistics that the run lacks, a checkpoint that
            has changed since, or another job works on the same directory; nothing that was computed
            is lost.
        NumericalError: a result that cannot be trusted; names the block.
    """
    with open_shell("prune", settings, settings.out, inputs or Inputs(), reporter) as shell:
        return shell.store, _prune(shell)


def _prune(shell: Shell[PruneSettings]) -> dict[str, Any]:
    settings, store = shell.settings, shell.store
    fitted = open_fitted(
        settings.run,
        shell.inputs,
        GivenAgain(
            settings.model,
            settings.adapter,
            settings.objective,
            "--objective",
            settings.trust_remote_code,
        ),
    )
    network, fit, objective = fitted.network, fitted.manifest, fitted.objective
    blocks, heads = blocks_to_prune(settings, fitted.store, network)
    check_statistics(settings, fitted.store, fit, blocks)
    network.files()  # a model that cannot be saved is a mistake now, not at the end
    prints = {"fit": {"settings": fit_settings(fit)}} | fit.fingerprints
    manifest = shell.begin(prints, {"run": fitted.store.root} | shell.notes_of(network))
    if shell.is_complete("tables", lambda: _begin_again(store, manifest)):
        store.delete_directory("work")
        return _numbers(manifest)
    dtype = DTYPES[fit.settings["dtype"]]
    with shell.workers(network, objective, blocks, dtype, fit.settings["seed"]) as workers:
        job = _Prune(
            settings, store, fitted.store, fit, network, objective, blocks, heads, manifest,
            workers, shell.reporter,
        )  # fmt: skip
        job.run()
    shell.end(job.said(), checkpoint=store.path("model"))
    return _numbers(manifest)


def _numbers(manifest: Manifest) -> dict[str, Any]:
    names = (
        "sparsity", "removed", "zero_before", "predicted", "measured", "loss", "pruned_loss",
        "correlation",
    )  # fmt: skip
    return {name: manifest.facts[name] for name in names if manifest.facts.get(name) is not None}


def _there(store: Store, manifest: Manifest) -> bool:
    """Whether all results are of the length that they were written with."""
    files: dict[str, int] = manifest.facts["files"]
    return all(store.size(name) == size for name, size in files.items())


def _begin_again(store: Store, manifest: Manifest) -> bool:
    """Forget that anything is done, unless all results are there: what they are made from was
    deleted in the end."""
    if _there(store, manifest):
        return False
    for key in ("files", "steps"):
        manifest.facts.pop(key, None)
    manifest.complete.clear()
    manifest.write(store)
    for name in ("work", *_RESULTS):
        store.delete_directory(name)
    return True


@dataclass
class _Prune:
    """A pruning under way, from the fit to the tables of what became of its model."""

    settings: PruneSettings
    store: Store
    fitted: Store
    fit: Manifest
    network: Model
    objective: str | Objective
    blocks: tuple[Block, ...]
    heads: Mapping[str, int]
    manifest: Manifest
    workers: Workers
    reporter: Reporter

    @property
    def curvature(self) -> CurvatureFiles:
        """Of the fit that all starts from."""
        return CurvatureFiles.of(self.fitted, self.fit)

    def said(self) -> str:
        """What was done, in one line."""
        facts = self.manifest.facts
        text = f"{facts['sparsity']:.1%} of {facts['weights']:,} weights removed"
        before = facts.get("zero_before")
        if before:
            more = facts["removed"] - before
            text = (
                f"{facts['sparsity']:.1%} of {facts['weights']:,} weights are zero: {before:,} "
                "were before and stay so, "
                + (f"{more:,} were removed" if more else "no more were to go (see --revive)")
            )
        if facts.get("predicted") is not None:
            text += f"; predicted rise of the loss {facts['predicted']:.4g} an example"
        if facts.get("measured") is not None:
            text += f", measured {facts['measured']:.4g} (from {facts['loss']:.6g})"
        if facts.get("correlation") is not None:
            text += f"; correlation over blocks {facts['correlation']:.3f}"
        if self.settings.saliency != "magnitude":
            names = {block.name for block in self.blocks}
            unreached = sum(name in names for name in unreached_blocks(self.fitted))
            if unreached:
                text += f"; {unreached} blocks have no curvature, for the fit never saw them used: "
                text += "to remove their weights counts for nothing"
        last = self.manifest.facts["steps"][-1]["blocks"]
        empty = sum(p["removed"] == p["weights"] for p in last)
        if empty:
            text += f"; nothing is left of {empty} blocks"
        rough = sum(p["update"] == "not converged" for p in last)
        if rough:
            text += f"; the update of {rough} blocks has not converged: give more --iterations"
        return text

    def run(self) -> None:
        done: list[dict[str, Any]] = self.manifest.facts.setdefault("steps", [])
        # The last one that is done is looked at again: what it left may have been damaged since.
        for step in range(max(1, len(done)), self.settings.steps + 1):
            done[step - 1 :] = [self._step(step)]
            self.manifest.write(self.store)
            self._tidy(step)
        pruned = self._network(self.settings.steps + 1)
        if "checkpoint" not in self.manifest.complete or not _there(self.store, self.manifest):
            with self.reporter.phase("checkpoint", 1, "models") as phase:
                write_checkpoint(self.store.inside("model"), pruned)
                phase.advance(1)
            self._record("checkpoint")
        self._tables(pruned)
        self._record("tables")
        self.store.delete_directory("work")

    def _record(self, phase: str) -> None:
        """A phase is complete, with the results that there are now."""
        names = [name for place in _RESULTS for name in self.store.names(place)]
        self.manifest.facts["files"] = {name: self.store.size(name) for name in names}
        if phase not in self.manifest.complete:
            self.manifest.complete.append(phase)
        self.manifest.write(self.store)

    def _tidy(self, step: int) -> None:
        """Delete what no step needs any more: a fit is larger than the model."""
        for before in range(1, step - 1):
            self.store.delete_directory(step_place(before))
        if step > 2:
            self.store.delete_directory(f"{step_place(step - 1)}/run")

    # One step

    def _network(self, step: int) -> Model:
        """The model before a step."""
        if step == 1:
            return self.network
        place = self.store.inside(step_place(step - 1))
        return Patched(self.network, [stored_patch(place, b) for b in self.blocks])

    def _curvature(self, step: int) -> Store:
        """The fit of the model before a step."""
        if step == 1 or not self.curvature.method.curved:
            return self.fitted
        place = self.store.inside(f"{step_place(step)}/run")
        # Its stages take the place of these.
        self.workers.close()
        network = self._network(step)
        inputs = Inputs(network=network, data=self._examples(), objective=self.objective)
        return run_fit(self._again(place), inputs, self.reporter)

    def _again(self, place: Store) -> FitSettings:
        """The settings of the fit of a pruned model."""
        said = self.fit.settings
        own: dict[str, Any] = {k: v for k, v in said.items() if k in SHARED}
        # Of the blocks that are pruned alone.
        own["blocks"] = tuple(glob.escape(b.name) for b in self.blocks)
        how: dict[str, Any] = {f.name: getattr(self.settings, f.name) for f in fields(Execution)}
        return FitSettings(
            **how, **own, model=str(self.fit.facts["model"]), data=IN_MEMORY, out=place.uri,
            gradients=self.settings.first_order,
        )  # fmt: skip

    def _step(self, step: int) -> dict[str, Any]:
        """Make what is missing of a step; gives what became of the blocks, for the tables."""
        settings = self.settings
        label = "" if settings.steps == 1 else f", step {step} of {settings.steps}"
        there = [done for op in self._operations(step, self.fitted) if (done := updated(op))]
        if len(there) == len(self.blocks):
            return self._outcome(there)
        operations = self._with_rank(self._operations(step, self._curvature(step)))
        cuts = list(zip(operations, self._cuts(operations, label), strict=True))
        shares = self._added_up(f"masks{label}", mask_block, cuts)
        rank, z = operations[0].rank, None
        if shares and rank is not None and rank.inverse is not None:
            # The whole model's equations of what remains.
            gram, bracket = shares
            z = solve_kept(gram, bracket, rank.inverse.damping)
        updates = [(op, z, self._notes()) for op in operations]
        return self._outcome(self._each(f"update{label}", update_block, updates))

    def _operations(self, step: int, fitted: Store) -> list[Surgery]:
        patches, base = parts(self._network(step))
        return [
            Surgery(
                replace(self.curvature, store=fitted),
                self.store,
                step,
                # To each task the patch of its block alone.
                Patched(base, [patches[block.name]]) if block.name in patches else base,
                block,
                self.settings,
                self.settings.share(step, self._zeros[block.name]),
                self.fit.settings["dtype"] == "float64",
                self.heads.get(block.name, 0),
            )
            for block in self.blocks
        ]

    @cached_property
    def _zeros(self) -> dict[str, float]:
        """By block, the share that is zero before the first of several steps: of the block's own
        weights where each is pruned by itself, else of all together."""
        settings, names = self.settings, [block.name for block in self.blocks]
        if settings.steps == 1 or settings.revive or settings.structure != "unstructured":
            return dict.fromkeys(names, 0.0)
        arguments = [(self.network, block) for block in self.blocks]
        zeros = in_order(self.workers.run_tasks("zeros", count_zeros, arguments))
        sizes = [b.d_out * inputs_of(b) for b in self.blocks]
        if settings.scope == "global":
            return dict.fromkeys(names, sum(zeros) / sum(sizes))
        return dict(zip(names, map(truediv, zeros, sizes), strict=True))

    def _with_rank(self, operations: list[Surgery]) -> list[Surgery]:
        """With what a ranked method knows of all blocks together."""
        if not self._joint:
            return operations
        first = operations[0]
        inverses = open_inverses(first.curvature.store, self.blocks, first.damping, joint=True)
        found = [replace(o, rank=JointRank(inverses.by_block[o.block.name])) for o in operations]
        if not self.settings.first_order:
            return found
        sums = self._added_up("mean gradient", project_mean_gradient, [(op,) for op in found])
        gradient = sums[0] if sums else None
        ranks = [replace(op.rank, gradient=gradient) for op in found if op.rank is not None]
        return [replace(op, rank=rank) for op, rank in zip(found, ranks, strict=True)]

    @property
    def _joint(self) -> bool:
        """Whether the curvature is one for all blocks together."""
        return self.curvature.method.ranked and self.settings.inverse != "block"

    def _cuts(self, operations: list[Surgery], label: str) -> list[Cut]:
        """Make the saliencies; gives what goes of every block."""
        settings, share, each = self.settings, operations[0].share, [(op,) for op in operations]
        saliencies, nothing = f"saliencies{label}", [Cut() for _ in operations]
        if settings.structure != "unstructured" or settings.scope == "block":
            found = self._each(saliencies, score_block, each)
            units = settings.structure in ("rows", "heads") and not _masked(operations)
            return self._unit_cuts(share, found) if units else nothing
        (coarse,) = self._added_up(saliencies, score_block, each)
        if _masked(operations):
            return nothing
        total = sum(b.d_out * inputs_of(b) for b in self.blocks)
        gone_before = total - int(coarse.sum())
        prefix = find_prefix(coarse, max(0, count_gone(share, total) - gone_before))
        again = [(op, prefix) for op in operations]
        (fine,) = self._added_up(f"threshold{label}", refine_histogram, again)
        threshold = find_threshold(fine, prefix)
        equal = self._each(f"ties{label}", count_equal, [(o, threshold) for o in operations])
        return [Cut(threshold, ties) for ties in share_ties(threshold, equal)]

    def _unit_cuts(self, share: float, found: Sequence[Tensor]) -> list[Cut]:
        """Which rows or heads stay."""
        if self.settings.scope == "block":
            return [Cut(units=sets_kept(f[0], share, f[1] > 0)) for f in found]
        both = torch.cat(list(found), dim=1)
        keep = sets_kept(both[0], share, both[1] > 0)
        return [Cut(units=part) for part in keep.split([f.shape[1] for f in found])]

    def _each(
        self, label: str, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]
    ) -> list[Any]:
        """Run a task for every block; gives what they found, in the order of the blocks."""
        return in_order(self._run(label, function, arguments))

    def _added_up(
        self, label: str, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]
    ) -> tuple[Tensor, ...]:
        """The sums of the tensors that the tasks give, so that those of all blocks are never there
        together; empty where none gives any."""
        sums: tuple[Tensor, ...] = ()
        early: dict[int, Any] = {}
        following = 0
        for place, value in self._run(label, function, arguments):
            early[place] = value
            # In the order of the blocks, whichever ends first: the sum would depend on chance.
            while following in early:
                found = early.pop(following)
                following += 1
                if found is not None:
                    given = found if isinstance(found, tuple) else (found,)
                    sums = tuple(map(torch.add, sums, given)) if sums else given
        return sums

    def _run(
        self, label: str, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, Any]]:
        needs = [self._need(args[0]) for args in arguments]
        return self.workers.run_tasks(label, function, arguments, needs)

    def _need(self, operation: Surgery) -> Need:
        block = operation.block
        size = block.d_out * block.d_in
        # Weights, eigenvalues and the vectors of conjugate gradients, in float64; both bases.
        memory = 80 * size + 16 * (block.d_out**2 + block.d_in**2)
        rows = self.fit.settings.get("rows")
        if rows is not None:
            # Of M-FAC a run of its rows, as stored and in float64; where heads go, all of them.
            memory += 12 * rows * size if self.heads else _RUN_MEMORY
        flops = 8.0 * self.settings.iterations * size * (block.d_in + block.d_out)
        return Need(memory, flops, block.name)

    # Tables

    def _notes(self) -> dict[str, str]:
        return footer(identity(self.settings) | {"run": self.fitted.root})

    def _outcome(self, made: Sequence[Updated]) -> dict[str, Any]:
        """What became of the blocks in a step, for the tables at the end."""
        seen = [u.seen for u in made if u.seen is not None]
        known = [u.pruned.predicted for u in made if u.pruned.predicted is not None]
        total = sum(known) if known else None
        if self._joint and seen:
            # Blocks are not independent there.
            total = rank_increase(torch.stack(seen).sum(dim=0)) + sum(u.first for u in made)
        if total is not None and not math.isfinite(total):
            raise not_finite("all blocks together", "the predicted rise of the loss", str(total))
        return {"total": total, "blocks": [asdict(u.pruned) for u in made]}

    def _tables(self, pruned: Model) -> None:
        steps = self.manifest.facts["steps"]
        last = [PrunedBlock(**said) for said in steps[-1]["blocks"]]
        weights, removed = sum(p.weights for p in last), sum(p.removed for p in last)
        # Each step predicts from where the one before it ended.
        totals = [s["total"] for s in steps]
        measured = self._measured(pruned)
        facts = self.manifest.facts
        facts |= {
            "weights": weights,
            "removed": removed,
            "zero_before": sum(said.get("gone_before", 0) for said in steps[0]["blocks"]),
            "sparsity": removed / weights,
            "predicted": None if None in totals else sum(totals),
        }
        rows = [
            {"block": b.name, "sparsity": p.removed / p.weights}
            | {k: v for k, v in asdict(p).items() if k not in ("update", "gone_before")}
            | {"update": p.update, "measured": measured.get(b.name)}
            for b, p in zip(self.blocks, last, strict=True)
        ]
        for row, *each in zip(rows, *(s["blocks"] for s in steps), strict=True):
            row["zero_before"] = each[0].get("gone_before", 0)
            for key in ("predicted", "saliency", "seconds"):
                values = [said[key] for said in each]
                row[key] = None if None in values else sum(values)
        facts["correlation"] = _correlation(rows)
        table = pa.Table.from_pylist(rows, schema=PRUNED)
        write_table(self.store, PRUNED_FILE, table, self._notes())
        if self.settings.structure == "heads":
            self._write_heads()

    def _write_heads(self) -> None:
        rows = []
        for op in self._operations(self.settings.steps, self.fitted):
            saliency = op.open("saliency").read("units").tolist()
            keep = op.open("keep").read("keep")
            for head, (run, value) in enumerate(zip(op.columns(), saliency, strict=True)):
                stays = bool(keep[:, run.start : run.stop].any())
                said = (op.block.name, head, run.start, run.stop, value, stays)
                rows.append(dict(zip(HEADS.names, said, strict=True)))
        write_table(self.store, HEADS_FILE, pa.Table.from_pylist(rows, schema=HEADS), self._notes())

    def _measured(self, pruned: Model) -> dict[str, float]:
        """The rise of the mean loss per example that each block alone makes; that of all goes to
        the facts."""
        settings, facts = self.settings, self.manifest.facts
        if settings.measure == "none":
            return {}
        losses = Losses(self.workers, self.manifest, self._sample())
        base = float(losses.of(self.network, "loss").mean())
        after = float(losses.of(pruned, "loss, pruned").mean())
        if not math.isfinite(after - base):
            raise not_finite("all examples together", "the mean loss", f"{base:g} and {after:g}")
        facts |= {"loss": base, "pruned_loss": after, "measured": after - base}
        if settings.measure == "total":
            return {}
        place = self.store.inside(step_place(settings.steps))
        found = {}
        for block in self.blocks:
            alone = Patched(self.network, [stored_patch(place, block)])
            found[block.name] = float(losses.of(alone, f"loss, {block.name}").mean()) - base
        return found

    def _examples(self) -> Corpus:
        """The examples of the fit, from its directory."""
        return corpus_of_run(self.fitted)

    def _sample(self) -> Corpus:
        """The seeded sample of them that losses are measured on."""
        there = self._examples()
        count = self.settings.measure_examples
        if len(there) <= count:
            return there
        found = stored_corpus(self.store, "work/sample")
        if found is not None:
            return found
        generator = np.random.default_rng(self.settings.seed)
        chosen = set(generator.choice(len(there), count, replace=False).tolist())
        examples = (e for n, e in enumerate(there.examples()) if n in chosen)
        each = 1 if there.positions is None else int(there.positions.min())
        return store_corpus(
            self.store, "work/sample", examples, "--run", lambda: there.tokenizer,
            shift=there.shift, each=each,
        )  # fmt: skip


def _masked(operations: Sequence[Surgery]) -> bool:
    """Whether an earlier run has decided what goes of every block."""
    return all(op.has("keep") for op in operations)


def _correlation(rows: Sequence[dict[str, Any]]) -> float | None:
    """Pearson's, of predicted and measured rises over blocks; ``None`` where it is no number."""
    pairs = [
        (r["predicted"], r["measured"])
        for r in rows
        if r["predicted"] is not None and r["measured"] is not None
    ]
    if len(pairs) < 3:
        return None
    predicted, measured = np.array(pairs).T
    if not (predicted.std() > 0 and measured.std() > 0):
        return None
    found = float(np.corrcoef(predicted, measured)[0, 1])
    return found if math.isfinite(found) else None
