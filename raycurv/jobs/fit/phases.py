"""The phases of a fit, group by group of stages: what is missing is asked of the store.

A fit that starts from other runs (parents.py) takes over a part of these from them (combined.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from raycurv.driver.corpus import Corpus, DrawnLabels
from raycurv.driver.feed import Feed
from raycurv.driver.pipeline import NoSink, Sink
from raycurv.driver.settings import DTYPES, FitSettings, identity
from raycurv.driver.sinks import ExampleRows, write_drawn, write_examples
from raycurv.driver.sweep import Sweep, Task, open_spool
from raycurv.driver.workers import Workers
from raycurv.errors import DamagedFile
from raycurv.files.artifacts import (
    basis_mark,
    corrected_file,
    corrected_notes,
    eigen_file,
    factor_file,
    keeps_sum,
)
from raycurv.files.block_rows import BLOCKS_FILE, SPECTRUM_FILE, write_blocks, write_spectrum
from raycurv.files.manifest import Manifest
from raycurv.files.row_files import rows_file
from raycurv.files.store import Store
from raycurv.files.tables import footer, read_rows
from raycurv.files.tensorfile import whole
from raycurv.jobs.fit.combined import (
    combine_examples,
    copy_examples,
    take_over_blocks,
    take_over_factors,
)
from raycurv.jobs.fit.parents import Parents
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.factors import factors_of
from raycurv.mathematics.loss.differentiation import Target
from raycurv.mathematics.methods import open_method
from raycurv.progress.reporter import Reporter
from raycurv.stages.passes import CorrectedPass, CovariancePass, LossPass, ReplayPass, RowsPass
from raycurv.stages.stage import Pass
from raycurv.steps.decompositions import decompose_factors
from raycurv.steps.shared_inputs import Layout
from raycurv.steps.statistics import Gradients

# The name of the examples among what is spooled.
_STREAM = "examples"
_PASSES = ("losses", "covariance", "corrected", "rows", "gradients")


@dataclass
class FitPhases:
    """One fit under way: what is missing is asked of the store, phase by phase."""

    settings: FitSettings
    store: Store
    per_token: bool
    blocks: tuple[Block, ...]
    corpus: Corpus
    parents: Parents
    manifest: Manifest
    workers: Workers
    reporter: Reporter
    gradients: Gradients

    @property
    def method(self) -> str:
        return self.settings.method

    @property
    def store_dtype(self) -> torch.dtype:
        assert self.settings.store_dtype is not None
        return DTYPES[self.settings.store_dtype]

    @property
    def _sum_dtype(self) -> torch.dtype:
        return torch.float64 if self.settings.dtype == "float64" else torch.float32

    @property
    def _first_pass(self) -> bool:
        """Whether A and G are gathered: an extended run has its bases already."""
        return self.method in ("ekfac", "kfac") and self.parents.extended is None

    @property
    def _per_example(self) -> bool:
        """Whether something is gathered of every example's own gradient."""
        return self.method in ("ekfac", "diagonal", "mfac")

    def run(self) -> None:
        settings, stages, groups = self.settings, len(self.workers.cuts), len(self.workers.groups)
        resident = "" if groups == 1 else f", {len(self.workers.groups[0])} resident at a time"
        self.reporter.say(
            f"{settings.method} of {len(self.blocks)} blocks in {stages} "
            f"stage{'s' if stages > 1 else ''}{resident}; {len(self.corpus):,} examples, "
            f"{self.corpus.tokens:,} tokens, "
            f"{self.corpus.padding(settings.batch_tokens):.1%} padding"
        )
        without = len(self.corpus) - self.corpus.terms
        if without:
            self.reporter.say(f"{without:,} examples have no loss term: loss 0, gradient 0")
        self.manifest.facts |= self.parents.facts(self.corpus)
        take_over_blocks(self.store, self.parents)
        layout = Layout(
            self.store, self.workers, self.corpus, DTYPES[settings.dtype], settings.batch_tokens,
            self.reporter,
        )  # fmt: skip
        if layout.known:
            self._learn(layout.read(self.blocks))
        if self.parents.how is not None:
            self.reporter.say(str(self.parents))
            self._take_over()
        feed = self._feed(None)
        sweep = Sweep(
            self.workers,
            self.store,
            open_spool(
                self.store,
                settings.spool_dir,
                self.manifest,
                self.workers,
                [feed],
                self._differentiated(),
            ),
            {_STREAM: feed},
            self.reporter,
            settings.commit_seconds,
        )
        if not layout.known:
            self._lay_out(layout, sweep)
        before: set[int] = set()
        # A file that goes while others are made is found in the next round.
        while unfinished := self._unfinished(sweep):
            assert unfinished != before, f"groups {sorted(unfinished)} do not come to an end"
            before = unfinished if sweep.level == sweep.last else set()
            self._sweep(sweep, min(unfinished))
        sweep.end()
        if not self._tables_there():
            self._tables()
        self.store.delete_directory("work")
        if self.method in ("ekfac", "kfac") and not settings.keep_sums:
            self.store.delete_directory("factors")
        self._done("tables")

    def _sweep(self, sweep: Sweep, lowest: int) -> None:
        """Through all groups of stages, and back to the lowest that lacks something."""
        sweep.forward()
        for group in range(sweep.level, lowest - 1, -1):
            if self._first_pass:
                self._covariance(sweep, group, lowest)
                self._eigen(group)
            if self._per_example:
                self._corrected(sweep, group, lowest)
            self._gradients(sweep, group, lowest)
            if self.method == "identity":
                self._losses(sweep, group)
            if group > lowest:
                replay = ReplayPass(self._differentiated(), self.settings.draws)
                sweep.replay(group, self._task(replay, replay, False, NoSink()))
            sweep.descend(group)
            for name in _PASSES:
                self.store.delete_directory(sweep.place(name, group))
        sweep.end()

    def _unfinished(self, sweep: Sweep) -> set[int]:
        """Groups of stages that lack a result, or have a part in one that is lacking."""
        groups = range(sweep.last + 1)
        found: set[int] = set()
        if self._first_pass:
            found |= {g for g in groups if self._undecomposed(g) or self._sumless(g)}
            found |= set() if self._labels_there() else {sweep.last}
        if self._per_example:
            # Without its bases nothing can be said of a group's Λ, which is lacking then anyway.
            found |= {g for g in groups if g not in found and self._unfitted(g)}
        if not self._examples_there():
            # Losses come from the model's end alone, gradient norms from all of it.
            found |= set(groups) if self._per_example else {sweep.last}
        return found | {g for g in groups if self._ungathered(g)}

    def _done(self, phase: str) -> None:
        if phase not in self.manifest.complete:
            self.manifest.complete.append(phase)
        self.manifest.write(self.store)

    def _mending(self) -> None:
        """Take back that the fit is finished: something is about to be computed again."""
        if "tables" in self.manifest.complete:
            self.manifest.complete.remove("tables")
            self.manifest.write(self.store)

    # Which blocks read the same tensor

    def _learn(self, blocks: tuple[Block, ...]) -> None:
        self.blocks = blocks
        self.workers.assign(blocks)

    def _lay_out(self, layout: Layout, sweep: Sweep) -> None:
        self._mending()
        if sweep.level < sweep.last:
            sweep.end()  # the layout went after the sweep had come past it
        sweep.forward(layout.meet)
        self._learn(layout.write())
        self._done("layout")

    def _blocks_of(self, group: int) -> tuple[Block, ...]:
        return self.workers.blocks_of(self.workers.groups[group])

    # What other runs have done already

    @property
    def _examples(self) -> int:
        """How many examples the curvature is a mean over."""
        return int(self.manifest.facts["examples"])

    def _take_over(self) -> None:
        """Bases of the run that is extended; or sums of those that are combined, decomposed."""
        if self.method == "diagonal":
            return
        groups = range(len(self.workers.groups))
        combined = self.parents.combined
        missing = [
            f for g in groups for f in (self._sumless if combined else self._undecomposed)(g)
        ]
        if missing:
            self._mending()
        take_over_factors(self.store, self.parents, missing, self.workers)
        if not combined:
            self._done("eigen")
            return
        if self.method == "kfac" and not self._examples_there():
            combine_examples(self.store, self.parents, self._notes())
        self._done("factors")
        for group in groups:
            self._eigen(group)

    # First pass

    @property
    def _target(self) -> Target:
        return "sampled" if self.settings.fisher == "sampled" else "labels"

    def _differentiated(self, group: int | None = None) -> Target:
        """What a pass through a group differentiates: the data's own labels, too, where it gathers
        gradient statistics, and in all passes of a sweep, which share the spooled gradients."""
        lacking = group is not None and self._ungathered(group)
        return self.gradients.target(self._target, lacking)

    def _ungathered(self, group: int) -> bool:
        return self.gradients.lacking(group, self._blocks_of(group))

    def _labels_there(self) -> bool:
        return self._target != "sampled" or DrawnLabels(self.store).complete(len(self.corpus))

    def _undecomposed(self, group: int) -> list[str]:
        factors = factors_of(self._blocks_of(group))
        return [f for f in factors if not whole(self.store, eigen_file(f))]

    def _sumless(self, group: int) -> list[str]:
        """Factors that lack a sum which is still needed, or shall be kept."""
        keep = self.settings.keep_sums
        factors = factors_of(self._blocks_of(group)) if keep else self._undecomposed(group)
        return [f for f in factors if not whole(self.store, factor_file(f))]

    def _covariance(self, sweep: Sweep, group: int, lowest: int) -> None:
        missing = frozenset(self._sumless(group))
        ending = group == sweep.last
        losses = ending and self.method == "kfac" and not self._examples_there()
        if not missing and not losses and (self._labels_there() or not ending):
            return
        work = CovariancePass(
            self.store,
            missing,
            self._differentiated(group),
            self.settings.draws,
            self.settings.max_factor_dim,
            self._sum_dtype,
        )
        again = ReplayPass(work.target, self.settings.draws)
        # Losses and drawn labels come from the model's end.
        sink = self._rows() if ending else NoSink()
        task = self._task(work, again, False, sink)
        names = self._pass(sweep, group, lowest, task, "first pass: A and G", missing)
        if ending:
            self._keep_labels(names)
            if losses:
                self._write_examples(names)
        if group == 0:
            self._done("factors")

    def _keep_labels(self, names: Sequence[str]) -> None:
        labels = DrawnLabels(self.store)
        if self._target == "sampled" and not labels.complete(len(self.corpus)):
            write_drawn(self.store, names, labels)

    def _rows(self) -> ExampleRows:
        return ExampleRows(self.store, self.corpus.lengths if self.per_token else None)

    def _feed(self, target: Target | None) -> Feed:
        drawn = None
        if target in ("sampled", "both"):
            labels = DrawnLabels(self.store)
            drawn = labels.read if labels.complete(len(self.corpus)) else None
        return Feed(
            self.corpus.plan(self.settings.batch_tokens),
            self.corpus.reader(DTYPES[self.settings.dtype], drawn),
            self.corpus.lengths,
        )

    def _pass(
        self,
        sweep: Sweep,
        group: int,
        lowest: int,
        task: Task,
        label: str,
        gathers: frozenset[str],
    ) -> list[str]:
        """Run a pass over all examples, from its last commit if that is of use; gives the files of
        its rows. Gradient statistics are gathered beside it where they are lacking.

        Args:
            gathers: names of what the stages shall sum up.
        """
        self._mending()
        blocks = self._blocks_of(group)
        beside = task.work.target != "nothing" and self._ungathered(group)
        rows: frozenset[str] = frozenset()
        if beside:
            task, sums, rows = self.gradients.beside(task, blocks, self._rows())
            gathers |= sums
        place = sweep.place(task.work.name, group)
        commit = self.store.read_json(f"{place}/commit.json")
        begun = self.store.read_json(f"{place}/gathers.json")
        if commit is not None and (
            # A result of a finished pass, or of a sum that was left out, has gone since.
            (commit["finished"] and gathers) or begun is None or not gathers | rows <= set(begun)
        ):
            self.store.delete_directory(place)
            commit = None
        if commit is None:
            self.store.write_json(f"{place}/gathers.json", sorted(gathers | rows))
        names = sweep.run(group, task, label, lowest)
        if beside:
            self.gradients.keep(group, blocks, names)
        return names

    def _task(self, work: Pass, again: Pass, carries: bool, sink: Sink) -> Task:
        return Task(_STREAM, self._feed(work.target), work, again, carries, sink)

    # Eigendecompositions

    def _eigen(self, group: int) -> None:
        missing = self._undecomposed(group)
        if missing:
            self._mending()
            factors = factors_of(self._blocks_of(group))
            decompose_factors(
                self.store,
                {name: factors[name] for name in missing},
                self.settings.max_factor_dim,
                self.store_dtype,
                self.settings.keep_sums,
                self.workers,
                self.workers.named(group),
                self.reporter,
            )
        if group == 0:
            self._done("eigen")

    # Second pass

    def _unfitted(self, group: int) -> list[Block]:
        return [b for b in self._blocks_of(group) if not self._corrected_there(b)]

    def _corrected(self, sweep: Sweep, group: int, lowest: int) -> None:
        missing = self._unfitted(group)
        examples = not self._examples_there()
        if missing or examples:
            work = self._gathering(group, frozenset(b.name for b in missing))
            again = dataclasses.replace(work, only=frozenset())
            # Sums of squares in other bases than those that are there are of no use.
            marked = frozenset(f"{b.name} {self._mark(b)}" for b in missing)
            sink = self._rows() if group == 0 else NoSink()
            task = self._task(work, again, examples, sink)
            label = "gradients" if self.method == "mfac" else "second pass: Λ"
            names = self._pass(sweep, group, lowest, task, label, marked)
            if examples and group == 0:
                self._keep_labels(names)
                self._write_examples(names)
        if group == 0:
            self._done("rows" if self.method == "mfac" else "corrected")

    def _gathering(self, group: int, missing: frozenset[str]) -> CorrectedPass | RowsPass:
        """The pass over every example's own gradient, which makes what some blocks lack."""
        settings = self.settings
        if self.method == "mfac":
            assert settings.rows is not None
            return RowsPass(
                self.store,
                missing,
                self._differentiated(group),
                settings.draws,
                settings.rows,
                self.store_dtype,
            )
        return CorrectedPass(
            self.store,
            missing,
            self._differentiated(group),
            settings.draws,
            self.method == "diagonal",
            self.store_dtype,
            self._sum_dtype if settings.keep_sums else None,
            None if self.parents.extended is None else self.parents.extended.store,
        )

    def _corrected_there(self, block: Block) -> bool:
        if self.method == "mfac":
            return whole(self.store, rows_file(block.name))
        name = corrected_file(block.name)
        if not whole(self.store, name):
            return False
        if corrected_notes(self.store, block)["bases"] != self._mark(block):
            return False
        return not self.settings.keep_sums or keeps_sum(self.store, block)

    def _mark(self, block: Block) -> str:
        return "" if self.method in ("diagonal", "mfac") else basis_mark(self.store, block)

    # Gradient statistics that no other pass has gathered

    def _gradients(self, sweep: Sweep, group: int, lowest: int) -> None:
        if not self._ungathered(group):
            return
        again = ReplayPass(self._differentiated(group), self.settings.draws)
        task = self._task(again, again, False, NoSink())
        names = self._pass(sweep, group, lowest, task, "gradient statistics", frozenset())
        if group == sweep.last:
            self._keep_labels(names)
            if not self._per_example and not self._examples_there():
                self._write_examples(names)

    # Tables

    def _examples_there(self) -> bool:
        names = self.store.names("tables/examples", ".parquet")
        try:
            return sum(read_rows(self.store, n) for n in names) == self._examples
        except DamagedFile:
            return False

    def _losses(self, sweep: Sweep, group: int) -> None:
        if not self._examples_there():
            work = LossPass()
            task = self._task(work, work, False, self._rows())
            names = self._pass(sweep, group, group, task, "losses", frozenset())
            self._write_examples(names)

    def _write_examples(self, names: Sequence[str]) -> None:
        notes, before = self._notes(), 0
        self.store.delete_directory("tables/examples")
        if self.parents.extended is not None:
            before = copy_examples(self.store, self.parents.extended, notes)
        double = self.settings.dtype == "float64"
        write_examples(self.store, names, self.corpus, double, notes, before)

    def _notes(self) -> dict[str, str]:
        return footer(identity(self.settings))

    def _tables_there(self) -> bool:
        names = [BLOCKS_FILE, SPECTRUM_FILE] if self._has_spectrum else [BLOCKS_FILE]
        try:
            return (
                "tables" in self.manifest.complete
                and all(read_rows(self.store, name) > 0 for name in names)
                and self.gradients.tables_there()
            )
        except (DamagedFile, FileNotFoundError):
            return False

    @property
    def _has_spectrum(self) -> bool:
        return self.method in ("ekfac", "kfac")

    def _tables(self) -> None:
        stages = {
            block.name: stage
            for stage in range(len(self.workers.cuts))
            for block in self.workers.blocks_of(range(stage, stage + 1))
        }
        write_blocks(
            self.store, self.blocks, stages, open_method(self.method), self._examples, self._notes()
        )
        if self._has_spectrum:
            write_spectrum(self.store, factors_of(self.blocks), self._notes())
        if self.gradients.wanted:
            groups = [self._blocks_of(group) for group in range(len(self.workers.groups))]
            self.manifest.facts["gradients"] = self.gradients.write_tables(groups)
            self._done("gradients")
