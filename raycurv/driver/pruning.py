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

import fnmatch
import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raycurv.driver.corpus import Corpus, store_corpus, stored_corpus
from raycurv.driver.fitted import check_model, fit_command, fitted_model, read_fit
from raycurv.driver.fitting import refit
from raycurv.driver.losses import Losses
from raycurv.driver.parents import SHARED
from raycurv.driver.progress import Reporter
from raycurv.driver.prune_settings import PruneSettings
from raycurv.driver.rank_products import rank_inverses
from raycurv.driver.settings import DTYPES, Execution, FitSettings, identity
from raycurv.driver.surgery import (
    Cut,
    Operation,
    Pruned,
    Rank,
    Updated,
    count_equal,
    mask_block,
    project_mean_gradient,
    refine_histogram,
    score_block,
    step_place,
    update_block,
    updated,
)
from raycurv.driver.timeline import write_timeline
from raycurv.driver.workers import Workers, check_address
from raycurv.errors import DamagedFile, UserError
from raycurv.files.artifacts import gradient_file, read_blocks
from raycurv.files.lock import hold
from raycurv.files.manifest import Manifest, continue_or_refuse
from raycurv.files.row_files import open_rows
from raycurv.files.store import Store, open_store
from raycurv.files.tables import HEADS, PRUNED, footer, write_table
from raycurv.files.tensorfile import open_tensors, whole
from raycurv.files.weights import stored_patch, write_checkpoint
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import Damping
from raycurv.mathematics.masks import count_gone, sets_kept
from raycurv.mathematics.objective import Objective
from raycurv.mathematics.rank_update import rank_increase, solve_kept
from raycurv.mathematics.selection import find_prefix, find_threshold, share_ties
from raycurv.mathematics.structures import column_runs, inputs_of
from raycurv.models.heads import head_widths
from raycurv.models.model import Model, ModelSource, open_model
from raycurv.models.patched import Patched, parts
from raycurv.stages.pool import Need

# Where results lie.
_RESULTS = ("model", "saliency", "tables/pruned", "tables/heads")
PRUNED_FILE = "tables/pruned/part-00000.parquet"
HEADS_FILE = "tables/heads/part-00000.parquet"


def prune(
    settings: PruneSettings,
    model: ModelSource | None = None,
    objective: Objective | None = None,
    reporter: Reporter | None = None,
) -> tuple[Store, dict[str, Any]]:
    """Prune the model of a fit; gives the store of the results and what was found.

    Args:
        settings: of the job.
        model: instead of the path that the fit recorded.
        objective: instead of the name that the fit recorded.
        reporter: shows progress; by default to the terminal.

    Raises:
        UserError: a mistake in settings or run, statistics that the run lacks, a checkpoint that
            has changed since, or another job works on the same directory; nothing that was computed
            is lost.
        NumericalError: a result that cannot be trusted; names the block.
    """
    settings.check()
    reporter = reporter or Reporter(log=settings.log)
    store = open_store(settings.out, "--out")
    with hold(store, "prune.py", reporter.say):
        return store, _prune_held(settings, store, model, objective, reporter)


def _prune_held(
    settings: PruneSettings,
    store: Store,
    model: ModelSource | None,
    objective: Objective | None,
    reporter: Reporter,
) -> dict[str, Any]:
    """The pruning, while no other job writes to its directory."""
    fitted = open_store(settings.run, "--run")
    fit = read_fit(fitted)
    network = open_model(model if model is not None else fitted_model(fit, fitted.root))
    check_model(fit, network, fitted.root)
    blocks = _chosen(read_blocks(fitted), settings.blocks)
    _check_statistics(settings, fitted, fit, blocks)
    heads = head_widths(network, [b.name for b in blocks]) if settings.structure == "heads" else {}
    if settings.structure == "heads":
        blocks = _readers_of_heads(blocks, heads)
    for block in blocks:
        # A weight that cannot be replaced is refused before anything is computed.
        network.stored(block)
    named = objective if objective is not None else fit.settings["objective"]
    manifest = continue_or_refuse(
        store,
        Manifest(
            "prune",
            {k: v for k, v in identity(settings).items() if k != "run"},
            {"fit": {"settings": fit.settings}} | fit.fingerprints,
            {"run": fitted.root},
        ),
    )
    if "tables" in manifest.complete:
        if _there(store, manifest):
            store.delete_directory("work")
            reporter.say(f"complete: {store.root}")
            return _numbers(manifest)
        reporter.say("some results are gone or damaged: making them again")
        _begin_again(store, manifest)
    check_address(settings)
    workers = Workers(
        settings, network, named, blocks, DTYPES[fit.settings["dtype"]], fit.settings["seed"],
        reporter, store,
    )  # fmt: skip
    job = _Prune(
        settings, store, fitted, fit, network, named, blocks, heads, manifest, workers, reporter
    )
    try:
        job.run()
    finally:
        workers.close(store)
    for name, seconds in reporter.seconds.items():
        manifest.seconds[name] = manifest.seconds.get(name, 0.0) + seconds
    manifest.write(store)
    reporter.summary(job.said(), {"results": store.root, "checkpoint": store.path("model")})
    return _numbers(manifest)


def _numbers(manifest: Manifest) -> dict[str, Any]:
    names = ("sparsity", "predicted", "measured", "loss", "pruned_loss", "correlation")
    return {name: manifest.facts[name] for name in names if manifest.facts.get(name) is not None}


def _chosen(blocks: Sequence[Block], patterns: Sequence[str]) -> tuple[Block, ...]:
    """The fit's blocks that ``--blocks`` names."""
    include = [p for p in patterns if not p.startswith("!")] or ["*"]
    exclude = [p[1:] for p in patterns if p.startswith("!")]
    names = [b.name for b in blocks]
    for pattern in (*include, *exclude):
        if not fnmatch.filter(names, pattern):
            raise UserError(
                f"--blocks {pattern!r}", "a glob that matches a block of the fit", "no match",
                f"There are {', '.join(names[:5])}, …",
            )  # fmt: skip
    chosen = tuple(
        b
        for b in blocks
        if any(fnmatch.fnmatchcase(b.name, p) for p in include)
        and not any(fnmatch.fnmatchcase(b.name, p) for p in exclude)
    )
    if not chosen:
        raise UserError("--blocks", "at least one block of the fit", "none", "Widen the globs.")
    return chosen


def _check_statistics(
    settings: PruneSettings, fitted: Store, fit: Manifest, blocks: Sequence[Block]
) -> None:
    """Refuse what the run has no statistics for; the message has the command that makes them."""
    said = fit.settings
    method = said["method"]
    if method == "identity" and settings.saliency != "magnitude":
        raise UserError(
            f"--saliency {settings.saliency}", "a fit with curvature", f"{method} in {fitted.root}",
            f"{fit_command(fit, 'RUN', method='ekfac')}, or --saliency magnitude.",
        )  # fmt: skip
    if settings.inverse is not None and method != "mfac":
        raise UserError(
            "--inverse", "a fit with --method mfac", f"one with {method}", "Leave --inverse out."
        )
    if settings.first_order and not all(whole(fitted, gradient_file(b.name)) for b in blocks):
        remedy = f"{fit_command(fit, fitted.root, gradients=True)}: it makes what is missing."
        if "extend" in fit.facts:
            remedy = "Fit all its data together, with --gradients."
        raise UserError(
            "--first-order", "a fit with gradient statistics", f"none in {fitted.root}", remedy
        )
    if settings.steps > 1 and "extend" in fit.facts:
        raise UserError(
            "--steps", "1 for a fit that extends another, whose directory has not all its examples",
            str(settings.steps), "Fit all the data together, or leave --steps out.",
        )  # fmt: skip
    pattern = settings.pattern()
    for block in blocks:
        if pattern is not None:
            pattern.groups(block)


def _readers_of_heads(blocks: Sequence[Block], heads: Mapping[str, int]) -> tuple[Block, ...]:
    """The blocks among these that read attention heads."""
    found = tuple(b for b in blocks if b.name in heads)
    if not found:
        raise UserError(
            "--structure heads", "an attention output projection among the blocks", "none",
            "Choose other --blocks; the model's config.json must state its heads.",
        )  # fmt: skip
    for block in found:
        column_runs(block, heads[block.name])
    return found


def _there(store: Store, manifest: Manifest) -> bool:
    """Whether all results are of the length that they were written with."""
    files: dict[str, int] = manifest.facts["files"]
    return all(store.size(name) == size for name, size in files.items())


def _begin_again(store: Store, manifest: Manifest) -> None:
    """Forget that anything is done: what results are made from was deleted in the end."""
    for key in ("files", "steps"):
        manifest.facts.pop(key, None)
    manifest.complete.clear()
    manifest.write(store)
    for name in ("work", *_RESULTS):
        store.delete_directory(name)


@dataclass
class _Prune:
    """One pruning under way."""

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

    def said(self) -> str:
        """What was done, in one line."""
        facts = self.manifest.facts
        text = f"{facts['sparsity']:.1%} of {facts['weights']:,} weights removed"
        if facts.get("predicted") is not None:
            text += f"; predicted rise of the loss {facts['predicted']:.4g} an example"
        if facts.get("measured") is not None:
            text += f", measured {facts['measured']:.4g} (from {facts['loss']:.6g})"
        if facts.get("correlation") is not None:
            text += f"; correlation over blocks {facts['correlation']:.3f}"
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
        if step == 1 or self.fit.settings["method"] == "identity":
            return self.fitted
        place = self.store.inside(f"{step_place(step)}/run")
        # Its stages take the place of these.
        self.workers.close(self.store)
        network = self._network(step)
        return refit(self._again(place), network, self._examples(), self.objective, self.reporter)

    def _again(self, place: Store) -> FitSettings:
        """The settings of the fit of a pruned model."""
        said = self.fit.settings
        own: dict[str, Any] = {k: v for k, v in said.items() if k in SHARED}
        # Of the blocks that are pruned alone.
        own["blocks"] = tuple(glob.escape(b.name) for b in self.blocks)
        how: dict[str, Any] = {f.name: getattr(self.settings, f.name) for f in fields(Execution)}
        return FitSettings(
            **how, **own, model=str(self.fit.facts["model"]), data=str(self.fit.facts["data"]),
            out=place.uri, gradients=self.settings.first_order,
        )  # fmt: skip

    def _step(self, step: int) -> dict[str, Any]:
        """Make what is missing of a step; gives what became of the blocks, for the tables."""
        settings = self.settings
        label = "" if settings.steps == 1 else f", step {step} of {settings.steps}"
        operations = self._operations(step, self.fitted)
        there = [updated(op) for op in operations]
        if all(there):
            return self._outcome([u for u in there if u is not None])
        operations = self._operations(step, self._curvature(step))
        operations = self._with_rank(operations)
        found = self._each(f"saliencies{label}", score_block, [(op,) for op in operations])
        cuts = self._cuts(operations, found, label)
        shares = self._each(f"masks{label}", mask_block, list(zip(operations, cuts, strict=True)))
        z = self._solution(operations, shares)
        notes = footer(identity(settings) | {"run": self.fitted.root})
        made = self._each(f"update{label}", update_block, [(op, z, notes) for op in operations])
        return self._outcome(made)

    def _operations(self, step: int, fitted: Store) -> list[Operation]:
        said = self.fit.settings
        patches, base = parts(self._network(step))
        return [
            Operation(
                fitted,
                self.store,
                step,
                # To each task the patch of its block alone.
                Patched(base, [patches[block.name]]) if block.name in patches else base,
                block,
                self.settings,
                self.settings.share(step),
                said["method"],
                int(self.fit.facts["examples"]),
                said["dtype"] == "float64",
                self.heads.get(block.name, 0),
            )
            for block in self.blocks
        ]

    def _with_rank(self, operations: list[Operation]) -> list[Operation]:
        """With what M-FAC knows of all blocks together."""
        if self.fit.settings["method"] != "mfac":
            return operations
        together = self.settings.inverse != "block"
        fitted, damping = operations[0].fitted, Damping.parse(self.settings.damping)
        inverses = rank_inverses(fitted, self.blocks, damping, together)
        grams = [open_rows(fitted, b).gram() for b in self.blocks]
        if together:
            grams = [torch.stack(grams).sum(dim=0)] * len(grams)
        found = [
            replace(op, rank=Rank(inverses.by_block[op.block.name], gram, together))
            for op, gram in zip(operations, grams, strict=True)
        ]
        if not self.settings.first_order:
            return found
        shares = self._each("mean gradient", project_mean_gradient, [(op,) for op in found])
        if together:
            shares = [_sum(shares)] * len(found)
        return [
            replace(op, rank=replace(op.rank, gradient=share))
            for op, share in zip(found, shares, strict=True)
            if op.rank is not None
        ]

    def _cuts(self, operations: list[Operation], found: list[Any], label: str) -> list[Cut]:
        """What goes of every block."""
        settings, share = self.settings, operations[0].share
        known = all(whole(self.store, op.file("keep")) for op in operations)
        if known or settings.pattern() is not None:
            return [Cut() for _ in operations]
        if settings.structure in ("rows", "heads"):
            return self._unit_cuts(share, found)
        if settings.scope == "block":
            return [Cut() for _ in operations]
        total = sum(b.d_out * inputs_of(b) for b in self.blocks)
        coarse = _sum(found)
        gone_before = total - int(coarse.sum())
        count = max(0, count_gone(share, total) - gone_before)
        prefix = find_prefix(coarse, count)
        fine = self._each(f"threshold{label}", refine_histogram, [(o, prefix) for o in operations])
        threshold = find_threshold(_sum(fine), prefix)
        equal = self._each(f"ties{label}", count_equal, [(o, threshold) for o in operations])
        return [Cut(threshold, ties) for ties in share_ties(threshold, equal)]

    def _unit_cuts(self, share: float, found: Sequence[Tensor]) -> list[Cut]:
        """Which rows or heads stay."""
        if self.settings.scope == "block":
            return [Cut(units=sets_kept(f[0], share, f[1] > 0)) for f in found]
        both = torch.cat(list(found), dim=1)
        keep = sets_kept(both[0], share, both[1] > 0)
        return [Cut(units=part) for part in keep.split([f.shape[1] for f in found])]

    def _solution(self, operations: Sequence[Operation], shares: Sequence[Any]) -> Tensor | None:
        """The solution of the whole model's equations of what remains, of M-FAC."""
        known = [s for s in shares if s is not None]
        rank = operations[0].rank
        if not known or rank is None or rank.inverse is None:
            return None
        gram, bracket = (_sum([s[i] for s in known]) for i in (0, 1))
        return solve_kept(gram, bracket, rank.inverse.damping)

    def _each(
        self, label: str, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]
    ) -> list[Any]:
        """Run a task for every block; gives what they found, in the order of the blocks."""
        pool = self.workers.tasks()
        needs = [self._need(args[0]) for args in arguments]
        found: list[Any] = [None] * len(arguments)
        with self.reporter.phase(label, len(arguments), "blocks") as phase:
            for place, value in pool.map(function, arguments, needs):
                found[place] = value
                phase.advance(1)
        write_timeline(self.store, pool, label)
        return found

    def _need(self, operation: Operation) -> Need:
        block = operation.block
        size = block.d_out * block.d_in
        # Weights, eigenvalues and the vectors of conjugate gradients, in float64; both bases.
        memory = 80 * size + 16 * (block.d_out**2 + block.d_in**2)
        flops = 8.0 * self.settings.iterations * size * (block.d_in + block.d_out)
        return Need(memory, flops, block.name)

    # Tables

    def _outcome(self, made: Sequence[Updated]) -> dict[str, Any]:
        """What became of the blocks in a step, for the tables at the end."""
        seen = [u.seen for u in made if u.seen is not None]
        known = [u.pruned.predicted for u in made if u.pruned.predicted is not None]
        total = sum(known) if known else None
        rank = self.fit.settings["method"] == "mfac" and self.settings.inverse != "block"
        if rank and seen:
            # Blocks are not independent there.
            total = rank_increase(_sum(seen)) + sum(u.first for u in made)
        return {"total": total, "blocks": [asdict(u.pruned) for u in made]}

    def _tables(self, pruned: Model) -> None:
        steps = self.manifest.facts["steps"]
        last = [Pruned(**said) for said in steps[-1]["blocks"]]
        weights, removed = sum(p.weights for p in last), sum(p.removed for p in last)
        # Each step predicts from where the one before it ended.
        totals = [s["total"] for s in steps]
        measured = self._measured(pruned)
        facts = self.manifest.facts
        facts |= {
            "weights": weights,
            "removed": removed,
            "sparsity": removed / weights,
            "predicted": None if None in totals else sum(totals),
        }
        rows = [
            {"block": b.name, "sparsity": p.removed / p.weights}
            | {k: v for k, v in asdict(p).items() if k != "update"}
            | {"update": p.update, "measured": measured.get(b.name)}
            for b, p in zip(self.blocks, last, strict=True)
        ]
        for row, *each in zip(rows, *(s["blocks"] for s in steps), strict=True):
            for key in ("predicted", "saliency", "seconds"):
                values = [said[key] for said in each]
                row[key] = None if None in values else sum(values)
        facts["correlation"] = _correlation(rows)
        notes = footer(identity(self.settings) | {"run": self.fitted.root})
        write_table(self.store, PRUNED_FILE, pa.Table.from_pylist(rows, schema=PRUNED), notes)
        if self.settings.structure == "heads":
            self._write_heads(notes)

    def _write_heads(self, notes: dict[str, str]) -> None:
        rows = []
        for op in self._operations(self.settings.steps, self.fitted):
            saliency = open_tensors(self.store, op.file("saliency")).read("units").tolist()
            keep = open_tensors(self.store, op.file("keep")).read("keep")
            for head, (run, value) in enumerate(zip(op.columns(), saliency, strict=True)):
                stays = bool(keep[:, run.start : run.stop].any())
                said = (op.block.name, head, run.start, run.stop, value, stays)
                rows.append(dict(zip(HEADS.names, said, strict=True)))
        write_table(self.store, HEADS_FILE, pa.Table.from_pylist(rows, schema=HEADS), notes)

    def _measured(self, pruned: Model) -> dict[str, float]:
        """The rise of the mean loss per example that each block alone makes; that of all goes to
        the facts."""
        settings, facts = self.settings, self.manifest.facts
        if settings.measure == "none":
            return {}
        dtype = DTYPES[self.fit.settings["dtype"]]
        losses = Losses(
            settings, self.store, self.manifest, self._sample(), dtype, self.workers, self.reporter
        )
        base = float(losses.of(self.network, "loss").mean())
        after = float(losses.of(pruned, "loss, pruned").mean())
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
        """The fit's examples."""
        there = stored_corpus(self.fitted, "data")
        if there is None:
            raise DamagedFile(
                self.fitted.path("data"), "the examples of the fit", "some of them at most",
                "Run the fit again: it makes what is missing.",
            )  # fmt: skip
        return there

    def _sample(self) -> Corpus:
        """Some of them."""
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
        return store_corpus(self.store, "work/sample", examples, "--run", lambda: there.tokenizer)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(dim=0)


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
    return float(np.corrcoef(predicted, measured)[0, 1])
