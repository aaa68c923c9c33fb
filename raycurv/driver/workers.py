"""The pool of a job: made when the first phase needs it, given a group's stages when one needs
them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from raycurv.driver.corpus import Corpus, Drawn
from raycurv.driver.feed import Feed
from raycurv.driver.settings import Execution
from raycurv.driver.timeline_table import write_timeline
from raycurv.errors import UserError
from raycurv.files.store import Store
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture_check import Agreement
from raycurv.models.model import Model
from raycurv.models.patched import parts
from raycurv.progress.phase import PhaseProgress
from raycurv.progress.reporter import Reporter
from raycurv.progress.streams import own_process
from raycurv.stages.dealing import cut_stages, group_stages
from raycurv.stages.heap import RESIDENT, SWEPT
from raycurv.stages.pool import InProcess, Need, Pool
from raycurv.stages.stage import Proof, StageSpec

T = TypeVar("T")


def check_address(settings: Execution) -> None:
    """Refuse a cluster that does not answer, with a UserError, before anything takes time."""
    # Without Ray, which takes a second to import.
    from raycurv.onray.address import check_answers

    check_answers(settings.cluster)


def look_for_ray(address: str | None) -> str:
    """What there is to say of the cluster at an address; without one, of a cluster that runs on
    this machine, if one does.

    Raises:
        UserError: the one that is asked for does not answer, or does not start.
    """
    from raycurv.onray.address import check_answers, keep_apart, noted_address

    given = address or os.environ.get("RAY_ADDRESS") or "local"
    if given == "none":
        return "not looked for"
    if address == "local":
        # Before Ray is imported, as of every Ray of a job's own.
        keep_apart(own_process())
        from raycurv.onray.connection import tried

        return f"one of a job's own starts, with {tried()} cores"
    asked = noted_address() if given in ("auto", "local") else given
    if asked:
        try:
            check_answers(asked)
        except UserError:
            if given != "local":
                raise
        else:
            return f"one answers at {asked}"
    if given == "auto":
        raise UserError(
            "--address auto", "a Ray that was started on this machine", "none",
            "Start one (ray start --head), or leave --address out: a job then starts its own.",
        )  # fmt: skip
    return "none runs on this machine; a job starts its own"


def ray_directory() -> Path:
    """Ray's temporary directory on this machine."""
    from raycurv.onray.address import directory

    return directory()


class Workers:
    """How one job computes: its pool, with one group of stages in it at a time, and what all of its
    phases share: settings, store and reporter.

    A rerun of a finished job never starts Ray, and one that lacks a single decomposition never
    loads the model.

    Args:
        objective: name, or the objective itself.
        measurement: of queries, where it is not the objective's: the name of another objective, or
            itself.
        seed: of drawn labels.
        check_capture: whether stages hold captured gradients against autograd's.

    Attributes:
        store: of the results, which every node must reach; the timeline goes there.
        blocks: those of the whole model that the job is about.
        cuts: layers of each stage.
        by_stage: blocks of each stage.
        groups: stages that are resident together, as ranges of their numbers.
        resident: number of the group whose stages are loaded, if any is.
        check_capture: as given.
        agreement: of captured gradients with autograd's, in the stages that have said so by now.
        meets: is told the number of a group that has just been loaded.
    """

    def __init__(
        self,
        settings: Execution,
        model: Model,
        objective: Any,
        blocks: Sequence[Block],
        dtype: torch.dtype,
        seed: int,
        reporter: Reporter,
        store: Store,
        measurement: Any = None,
        check_capture: bool = False,
    ) -> None:
        self.settings, self.reporter, self.store = settings, reporter, store
        self.dtype = dtype
        self._pool: Pool | None = None
        stages = settings.stage_count(model.units)
        self.cuts = cut_stages(model.unit_costs, stages)
        homes = settings.homes if settings.schedule == "swept" else stages
        self.groups = group_stages(stages, homes)
        self.resident: int | None = None
        self.check_capture = check_capture
        self.agreement: Agreement | None = None
        self._said_agreement = self._said_random = self._said_plain = self._said_apart = False
        self.meets: Callable[[int], None] = lambda group: None
        # What all stages have in common.
        self._spec = StageSpec(
            index=0,
            model=model,
            units=range(0),
            blocks=(),
            objective=objective,
            dtype=dtype,
            seed=seed,
            logits_chunk=settings.logits_chunk,
            gives_back=SWEPT if len(self.groups) > 1 else RESIDENT,
            measurement=measurement,
            folder=os.getcwd(),
            check_capture=check_capture,
        )
        self._deal(blocks)

    @property
    def model(self) -> Model:
        """What the stages are of."""
        return self._spec.model

    @property
    def device(self) -> str:
        """Where stages and decompositions compute."""
        wanted = self.settings.device
        if wanted == "cpu":
            return wanted
        there = "cuda" if self._gpus() else "cpu"
        if wanted == "cuda" and there != wanted:
            raise UserError(
                "--device cuda", "a GPU", "none",
                "Leave --device out, or choose a cluster that has GPUs.",
            )  # fmt: skip
        return there

    @property
    def own(self) -> bool:
        """Whether the Ray cluster is the job's own."""
        return self.settings.cluster == "local"

    @property
    def in_process(self) -> bool:
        """Whether everything runs in this process, without Ray."""
        return self.settings.address == "none"

    def _gpus(self) -> int:
        if self.in_process:
            return torch.cuda.device_count()
        _ = self.pool
        from raycurv.onray.connection import cluster_gpus

        return cluster_gpus()

    @property
    def pool(self) -> Pool:
        """The pool, made now if nothing has needed it so far; with or without stages."""
        if self._pool is None:
            if self.in_process:
                self._pool = InProcess()
            else:
                from raycurv.onray.address import keep_apart

                if self.own:
                    keep_apart(own_process())
                # Ray takes a second to import, which a job without it need not wait for.
                from raycurv.onray.preflight import preflight
                from raycurv.onray.ray_pool import OnRay

                self._pool = OnRay(
                    self.settings.cluster,
                    self.settings.cpus_per_stage,
                    self.own,
                    self.settings.limits(),
                    self.settings.transport,
                    self.reporter.say,
                )
                preflight(self.store, self.own)
            self._pool.spans.watch = self.reporter.watch
        return self._pool

    def take_proof(self, proof: Proof) -> None:
        """Note what a stage says of its captured gradients."""
        mine = self.agreement
        if proof.agreement is not None:
            self.agreement = proof.agreement if mine is None else mine.joined(proof.agreement)
        if proof.random and not self._said_random:
            self._said_random = True
            self.reporter.say(
                "the model's forward takes random numbers, though it is in evaluation mode "
                "(F.dropout without training=self.training?): every pass sees others, and so does "
                "the next run"
            )
        if proof.apart and not self._said_apart:
            self._said_apart = True
            self.reporter.say(
                "directions go through the model one after the other, which takes longer: its code "
                f"does not bear several at once ({proof.apart})"
            )
        if proof.plain_checkpoints and not self._said_plain:
            self._said_plain = True
            self.reporter.say(
                "gradient checkpointing (use_reentrant=True) inside the model is switched off: "
                "activations of a microbatch stay in memory"
            )

    def say_agreement(self) -> None:
        """Say once how well captured gradients agree with autograd's."""
        found = self.agreement
        if found is not None and not self._said_agreement:
            self._said_agreement = True
            self.reporter.say(
                f"captured gradients agree with autograd's within {found.worst:.1g} (most that is "
                f"borne: {found.tolerance:g}; seen in {found.seconds:.2g} s)"
            )

    def feed(self, corpus: Corpus, drawn: Drawn | None = None) -> Feed:
        """The microbatches of a corpus, with the labels that were drawn for it if a pass reads
        them."""
        plan = corpus.plan(self.settings.batch_tokens)
        return Feed(plan, corpus.reader(self.dtype, drawn), corpus.lengths)

    def run_tasks(
        self,
        label: str,
        function: Callable[..., T],
        arguments: Sequence[tuple[Any, ...]],
        needs: Sequence[Need] | None = None,
        unit: str = "blocks",
        where: str = "",
    ) -> Iterator[tuple[int, T]]:
        """Run a function on each tuple of arguments as a phase of the job, with its progress and
        its part of the timeline.

        Nothing runs before the first result is asked for.

        Args:
            function: of a module, since another process may run it, or run it again.
            unit: what tasks are about, each as many as its need counts.
            where: the part of the model that the phase is about, if only a part.

        Yields:
            The place of a task in ``arguments`` and what it gave, as tasks end; :func:`in_order`
            makes a list of them.
        """
        pool = self.pool
        counts = [need.count for need in needs or [Need()] * len(arguments)]
        with self.phase(label, sum(counts), unit, where) as phase:
            for place, value in pool.map(function, arguments, needs):
                phase.advance(counts[place])
                yield place, value

    @contextmanager
    def phase(self, label: str, total: int, unit: str, where: str = "") -> Iterator[PhaseProgress]:
        """A phase of the job, see :meth:`raycurv.progress.reporter.Reporter.phase`; its part of the
        timeline is written at the end."""
        with self.reporter.phase(label, total, unit, where) as phase:
            yield phase
        write_timeline(self.store, self.pool, label)

    def load(self, group: int) -> None:
        """Build the stages of a group in the pool, in place of those of another."""
        if self.resident == group:
            return
        mine = self.groups[group]
        with self.phase("loading", len(mine), "stages", self.named(group)) as phase:
            self.resident = None
            base = replace(self._spec, device=self.device, threads=self._threads())
            specs = [
                replace(base, index=stage, units=self.cuts[stage], blocks=self.by_stage[stage])
                for stage in mine
            ]
            self.pool.start(specs, self.settings.replicas)
            self.resident = group
            self.meets(group)
            phase.advance(len(mine))

    def become(self, model: Model) -> None:
        """Go on with another model that differs from the one there was in patches alone: resident
        stages change the weights of these blocks, and nothing else is loaded."""
        if model is self._spec.model:
            return
        assert parts(model)[1] is parts(self._spec.model)[1], "patches of another model"
        self._spec = replace(self._spec, model=model)
        if self.resident is not None:
            self.pool.become(model)

    def assign(self, blocks: tuple[Block, ...]) -> None:
        """Tell stages, now and when they are built, which blocks share input factors."""
        self._deal(blocks)
        if self.resident is not None:
            mine = self.groups[self.resident]
            self.pool.assign([self.by_stage[stage] for stage in mine])

    def blocks_of(self, stages: range) -> tuple[Block, ...]:
        """The blocks of some stages."""
        return tuple(block for stage in stages for block in self.by_stage[stage])

    def _deal(self, blocks: Sequence[Block]) -> None:
        self._spec.model.check_cuts(blocks, self.cuts)
        by_unit: dict[int, list[Block]] = {}
        for block in blocks:
            by_unit.setdefault(self._spec.model.unit_of(block.module), []).append(block)
        self.blocks = tuple(blocks)
        self.by_stage = [
            tuple(block for unit in units for block in by_unit.get(unit, ())) for units in self.cuts
        ]

    def named(self, group: int) -> str:
        """The stages of a group in words, ``stages 3 to 4 of 8``; empty when it has all of them."""
        if len(self.groups) == 1:
            return ""
        mine, stages = self.groups[group], len(self.cuts)
        if len(mine) == 1:
            return f"stage {mine.start + 1} of {stages}"
        return f"stages {mine.start + 1} to {mine.stop} of {stages}"

    def close(self) -> None:
        """Let the pool go, with its actors; what is left of the timeline is written."""
        if self._pool is not None:
            write_timeline(self.store, self._pool, "")
            self._pool.close()
            self._pool = self.resident = None

    def _threads(self) -> int | None:
        if self.in_process:
            return None
        from raycurv.onray.connection import cluster_cores, smallest_node_cores

        # All actors together never have more threads than there are cores.
        resident = max(len(group) for group in self.groups) * self.settings.replicas
        return max(1, min(cluster_cores() // resident, smallest_node_cores()))


def in_order(ended: Iterable[tuple[int, T]]) -> list[T]:
    """The results of :meth:`Workers.run_tasks` in the order of its arguments."""
    return [value for _, value in sorted(ended, key=lambda pair: pair[0])]
