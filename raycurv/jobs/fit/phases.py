"""The loop of a fit: group by group of stages, step by step, what is missing is made.

The store is asked what is missing, so the same loop continues a run that stopped anywhere, and
mends one that lost a file. A fit that starts from other runs (parents.py) first takes over a part
of the results from them (combined.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from raycurv.driver.commits import read_commit
from raycurv.driver.sinks import Sink
from raycurv.driver.sweep import Sweep, Task
from raycurv.files.block_rows import BLOCKS_FILE, write_blocks
from raycurv.jobs.fit.combined import combine_examples, take_over_blocks, take_over_factors
from raycurv.jobs.fit.parents import Parents
from raycurv.mathematics.loss.differentiation import Target
from raycurv.stages.passes import Gatherer, Pass
from raycurv.steps.covariances import Covariances, undecomposed
from raycurv.steps.method_steps import steps_of
from raycurv.steps.shared_inputs import SharedInputs
from raycurv.steps.step import Fit, PassStep, TaskStep, table_there

# The name of the examples among what is spooled.
_STREAM = "examples"
# Where phases stand among those that are complete, which are the steps' own (1).
_PHASES = {"layout": 0, "gradients": 2, "tables": 3}


class FitLoop:
    """One fit under way, and the runs that it starts from."""

    def __init__(self, fit: Fit, parents: Parents) -> None:
        self._fit, self._parents = fit, parents
        self._steps = steps_of(fit)

    def run(self) -> None:
        """Make everything that is missing."""
        fit, workers = self._fit, self._fit.workers
        self._announce()
        fit.manifest.facts |= self._parents.facts(fit.corpus)
        take_over_blocks(fit.store, self._parents)
        feed = fit.feed("nothing")
        shared = SharedInputs(workers, feed)
        if shared.known:
            workers.assign(shared.read(workers.blocks))
        if self._parents.how is not None:
            workers.reporter.say(str(self._parents))
            self._take_over()
        sweep = Sweep(workers, fit.manifest, {_STREAM: feed}, self._differentiated(()))
        if not shared.known:
            fit.mending()
            if sweep.level < sweep.last:
                # Which inputs are shared was forgotten after the sweep had come past it.
                sweep.end()
            sweep.forward(shared.meet)
            workers.assign(shared.write())
        self._done("layout")
        before: set[int] = set()
        # A file that goes while others are made is found in the next round.
        while unfinished := {g for g in fit.groups if any(s.lacking(g) for s in self._steps)}:
            assert unfinished != before, f"groups {sorted(unfinished)} do not come to an end"
            before = unfinished if sweep.level == sweep.last else set()
            self._sweep(sweep, min(unfinished))
        sweep.end()
        self._done(*(step.name for step in self._steps if step.name))
        if not self._tables_there():
            self._write_tables()
        fit.store.delete_directory("work")
        if not fit.recipe.keep_sums:
            fit.store.delete_directory("factors")
        self._done("tables")

    def _announce(self) -> None:
        fit, workers = self._fit, self._fit.workers
        stages, groups = len(workers.cuts), workers.groups
        padding = fit.corpus.padding(workers.settings.batch_tokens)
        resident = "" if len(groups) == 1 else f", {len(groups[0])} resident at a time"
        basis = f" (--basis {fit.recipe.basis})" if fit.recipe.basis.own else ""
        workers.reporter.say(
            f"{fit.method}{basis} of {len(workers.blocks)} blocks in {stages} "
            f"stage{'s' if stages > 1 else ''}{resident}; {len(fit.corpus):,} examples, "
            f"{fit.corpus.tokens:,} tokens, {padding:.1%} padding"
        )

    def _done(self, *names: str) -> None:
        """Say that phases are complete, whether or not this run has made what they leave: one that
        is stopped between the last file of a phase and this word finds nothing left to make."""
        fit = self._fit
        done = {*fit.manifest.complete, *names}
        places = {step.name: place for place, step in enumerate(self._steps)}
        fit.manifest.complete = sorted(
            done, key=lambda name: (_PHASES.get(name, 1), places.get(name, 0), name)
        )
        fit.manifest.write(fit.store)

    def _take_over(self) -> None:
        """Bases of the run that is extended; or sums of those that are combined, decomposed."""
        fit, combined = self._fit, self._parents.combined
        if not fit.method.factors:
            return
        missing: list[str] = []
        for group in fit.groups:
            # In one order from run to run.
            missing += sorted(
                Covariances(fit).sums(group) if combined else undecomposed(fit, group)
            )
        if missing:
            fit.mending()
        take_over_factors(fit.store, self._parents, missing, fit.workers)
        if combined and not fit.method.per_example and not fit.examples_there():
            combine_examples(fit.store, self._parents, fit.notes)
        self._done("factors" if combined else "eigen")
        # From here on nothing needs the model until a pass does.
        for step in self._steps if combined else ():
            for group in fit.groups:
                if isinstance(step, TaskStep) and step.lacking(group):
                    step.run(group)

    def _sweep(self, sweep: Sweep, lowest: int) -> None:
        """Through all groups of stages, and back to the lowest that lacks something."""
        fit = self._fit
        sweep.forward()
        for group in range(sweep.level, lowest - 1, -1):
            for step in self._steps:
                if step.lacking(group):
                    fit.mending()
                    if isinstance(step, TaskStep):
                        step.run(group)
                    elif isinstance(step, PassStep):
                        self._pass(sweep, group, lowest, step)
                if group == 0 and step.name:
                    self._done(step.name)
            if group > lowest:
                replay = self._work("replay", self._differentiated(()))
                feed = fit.feed(replay.target)
                sweep.replay(group, Task(_STREAM, feed, replay, replay, False))
            sweep.descend(group)
            for step in self._steps:
                if isinstance(step, PassStep):
                    fit.store.delete_directory(sweep.commit_directory(step.pass_name, group))
        sweep.end()

    def _differentiated(self, together: Sequence[PassStep]) -> Target:
        """What a pass of some steps differentiates: the data's own labels, too, where one needs
        them, and in all passes of a sweep, which share the spooled gradients."""
        fit = self._fit
        own = any(s.own_labels for s in together) or (fit.recipe.gradients and len(fit.groups) > 1)
        return "both" if own and fit.fisher == "sampled" else fit.fisher

    def _work(self, name: str, target: Target, gatherers: tuple[Gatherer, ...] = ()) -> Pass:
        return Pass(name, target, self._fit.recipe.draws, gatherers, self._fit.signs)

    def _pass(self, sweep: Sweep, group: int, lowest: int, leader: PassStep) -> None:
        """Run the pass that a step leads through a group, from its last commit if that is of use;
        with the steps that can ride on it."""
        fit = self._fit
        together = [leader, *(self._riders(group, leader) if leader.cost.differentiates else ())]
        target: Target = self._differentiated(together) if leader.cost.differentiates else "nothing"
        gatherers = tuple(g for step in together for g in step.gatherers(group))
        columns = {step: step.columns(group) for step in together}
        sums = frozenset[str]().union(*(step.sums(group) for step in together))
        wanted = sums.union(*columns.values())
        self._forget_unless(sweep.commit_directory(leader.pass_name, group), sums, wanted)
        work = self._work(leader.pass_name, target, gatherers)
        again, carries = work.replay(), leader.carries()
        if carries:
            again = self._work(leader.pass_name, target, leader.again(group))
        sink = fit.example_rows() if any(columns.values()) else Sink()
        task = Task(_STREAM, fit.feed(target), work, again, carries, sink)
        names = sweep.run(group, task, leader.cost.phase, lowest if work.differentiates else group)
        # Labels come from the model's end, and as far as results are carried.
        if names and work.differentiates and group == (0 if carries else fit.last):
            fit.keep_labels(names)
        for step, taken in columns.items():
            if taken:
                step.keep(group, names)
        leader.passed(group)

    def _riders(self, group: int, leader: PassStep) -> list[PassStep]:
        found = []
        for step in self._steps:
            if step is leader or not isinstance(step, PassStep) or not step.cost.rides:
                continue
            both = (*leader.gatherers(group), *step.gatherers(group))
            given = Pass(leader.pass_name, "labels", 1, both).results
            if step.lacking(group) and step.columns(group) <= given.keys():
                found.append(step)
        return found

    def _forget_unless(self, place: str, sums: frozenset[str], wanted: frozenset[str]) -> None:
        """Delete the commits of a pass unless it was begun with all that is wanted of it now."""
        store = self._fit.store
        commit = read_commit(store, place)
        begun = store.read_list(f"{place}/gathers.json", "gathers")
        if commit is not None and (
            # A result of a finished pass, or of a sum that was left out, has gone since.
            (commit.finished and sums) or begun is None or not all(w in begun for w in wanted)
        ):
            store.delete_directory(place)
            commit = None
        if commit is None:
            store.write_json(f"{place}/gathers.json", {"gathers": sorted(wanted)})

    def _tables_there(self) -> bool:
        return (
            "tables" in self._fit.manifest.complete
            and table_there(self._fit.store, BLOCKS_FILE)
            and all(step.tables_there() for step in self._steps)
        )

    def _write_tables(self) -> None:
        fit = self._fit
        by_stage = enumerate(fit.workers.by_stage)
        stages = {block.name: stage for stage, blocks in by_stage for block in blocks}
        reached = write_blocks(
            fit.store,
            fit.workers.blocks,
            stages,
            fit.method,
            fit.recipe.basis,
            fit.examples,
            fit.notes,
        )
        if reached:
            fit.manifest.facts["experts"] = reached
        for step in self._steps:
            step.write_tables()
