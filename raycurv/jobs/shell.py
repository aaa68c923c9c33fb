"""What all jobs that leave results in a directory do alike, before and after their own work.

open_shell      settings checked, directory opened and locked
begin           the run that is there goes on, another one is refused
is_complete     all done: said so; results that are gone or damaged: made again
examples        read, and stored
check_plan      what cannot fit on this machine is refused
workers         stages and tasks, let go of whatever happens
end             seconds of each phase, a last sentence
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch

from raycurv.data.microbatch import Lengths
from raycurv.data.tokenizer import tokenizer_print
from raycurv.driver.causality import CausalityCheck
from raycurv.driver.corpus import Corpus, read_otherwise
from raycurv.driver.settings import Execution, identity
from raycurv.driver.workers import Workers, check_address
from raycurv.errors import DamagedFile, UserError
from raycurv.files.lock import hold
from raycurv.files.manifest import COMMITS, Manifest, continue_or_refuse
from raycurv.files.store import Store, open_store
from raycurv.jobs.check import check_plan
from raycurv.jobs.drafts import Drafts, arrangement_of, of_lengths
from raycurv.jobs.inputs import Inputs
from raycurv.jobs.objectives import objective_for
from raycurv.jobs.on_hub import brought
from raycurv.jobs.recorded import read_run
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.loss.objective import Objective
from raycurv.models.model import Model
from raycurv.planning.shapes import Recipe
from raycurv.progress.reporter import Reporter

S = TypeVar("S", bound=Execution)


@dataclass
class Shell(Generic[S]):
    """One job under way in its directory, which no other job writes to.

    Attributes:
        job: its name, such as ``fit``.
        settings: of the job, defaults filled in.
        inputs: what the caller holds in memory.
        store: of the results.
        reporter: shows progress.
        manifest: what ``run.json`` says, from :meth:`begin` on.
        reads: the model whose tokenizer, or image processor, the job reads its data with, if any.
    """

    job: str
    settings: S
    inputs: Inputs
    store: Store
    reporter: Reporter
    manifest: Manifest = field(init=False)
    reads: Model | None = None

    def begin(
        self,
        fingerprints: Mapping[str, Any],
        facts: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
        reads: Model | None = None,
    ) -> Manifest:
        """Go on with the run that the directory holds, or start a new one there.

        Args:
            fingerprints: tell the inputs from others.
            facts: where they lie.
            settings: what else the result depends on, or depends on in another form.
            reads: the model that data is read for, if it is: with its tokenizer, or its processor
                of images.

        Raises:
            UserError: the directory holds another run, or files of somebody else.
        """
        said = identity(self.settings, inputs=False) | dict(settings or {})
        trusted = {"trust_remote_code": self.settings.trust_remote_code}
        prints = dict(fingerprints)
        if self.inputs.commits:
            prints[COMMITS] = dict(self.inputs.commits)
        wanted = Manifest(self.job, said, prints, dict(facts) | trusted)
        there, self.reads = read_run(self.store), reads
        otherwise: list[str] = []
        if there is not None and "tokenizer" not in prints:
            otherwise = self._read_otherwise(there.facts.get("tokenizer", {}))
        self.manifest = continue_or_refuse(self.store, there, wanted, otherwise)
        return self.manifest

    def _read_otherwise(self, recorded: Mapping[str, Any]) -> list[str]:
        """That texts or images would be read otherwise than a run has on record, if so."""
        changed = [] if self.reads is None else read_otherwise(self.reads, recorded)
        what = "image processor" if "settings" in recorded else "tokenizer"
        return [f"the {what} is another one ({', '.join(changed)} changed)"] if changed else []

    def objective_for(self, network: Model) -> str | Objective:
        """The objective that the job was given, or the one that the model was trained for, which
        the settings then name; UserError for one that does not fit the model."""
        settings: Any = self.settings
        found = objective_for(network, self.inputs.or_named("objective", settings))
        if settings.objective is None:
            self.settings = replace(settings, objective=found)
        return found

    def prints_of(self, network: Model) -> dict[str, Any]:
        """Fingerprints of a model, of its configuration if it has one, and of the tokenizer which
        the job was given, if it was."""
        prints = {"model": network.fingerprint(), "config": network.configuration()}
        return {name: one for name, one in prints.items() if one} | self.tokenizer_print()

    def tokenizer_print(self) -> dict[str, Any]:
        """Among fingerprints, that of the tokenizer which the job was given, if it was."""
        settings: Any = self.settings
        place = self.inputs.at(settings.tokenizer)
        return {"tokenizer": tokenizer_print(place)} if place else {}

    def notes_of(self, network: Model) -> dict[str, list[str]]:
        """Say what a person should know of how a model was opened; gives it as facts."""
        for notice in network.notices:
            self.reporter.say(f"model {network.name}: {notice}")
        return {"model_notes": list(network.notices)} if network.notices else {}

    def is_complete(
        self,
        phase: str,
        repair: Callable[[], bool],
        lost: str = "some results are gone or damaged: making them again",
    ) -> bool:
        """Whether all is done; if not, a cluster has been seen to answer.

        Args:
            phase: the job's last.
            repair: asked only when that was finished once: takes back in the manifest what is gone
                or damaged, and gives whether there was anything.
            lost: what a person is told then.

        Raises:
            UserError: no cluster answers at the address.
        """
        if phase in self.manifest.complete:
            if not repair():
                self.reporter.say(f"complete: {self.store.root}")
                return True
            self.reporter.say(lost)
        check_address(self.settings)
        return False

    def examples(self, *sources: Callable[[], Corpus]) -> list[Corpus]:
        """Read and store the examples of every source, as a phase with its progress; what of them
        was left out is told and recorded."""
        found = []
        with self.reporter.phase("examples", len(sources), "sources") as phase:
            for open_source in sources:
                found.append(open_source())
                phase.advance(1)
        for corpus in found:
            if otherwise := self._read_otherwise(corpus.tokenizer):
                mine = corpus.store is self.store
                other = "another --out" if mine else "the fit's by --tokenizer"
                raise UserError(
                    f"the {corpus.name} in {corpus.store.root}", "what they are still read with",
                    otherwise[0], f"Restore its files, or give {other}.",
                )  # fmt: skip
            for sentence in corpus.said():
                self.reporter.say(sentence)
        check_loss_on(
            getattr(self.settings, "loss_on", None),
            any("conversations" in one.findings for one in found),
        )
        read_by = next((one.tokenizer for one in found if one.tokenizer), None)
        if read_by and self.manifest.facts.get("tokenizer") != read_by:
            self.manifest.facts["tokenizer"] = read_by
            self.manifest.write(self.store)
        self.manifest.facts["reading"] = {corpus.name: corpus.facts() for corpus in found}
        self.manifest.facts["first_examples"] = {
            corpus.name: dict(corpus.first) for corpus in found
        }
        return found

    def check_plan(
        self,
        network: Model,
        blocks: Sequence[Block],
        recipe: Recipe,
        data: Lengths | None,
        queries: Lengths | None = None,
        products: Lengths | None = None,
    ) -> None:
        """Refuse what cannot fit on this machine's memory or disk, unless it is forced.

        Args:
            blocks: chosen; which share an input is seen on the way.
            recipe: what decides sizes.
            data: tokens of every example, or of a scoring's training examples, if any.
            queries: tokens of every query of a scoring.
            products: tokens of every example of a solver's products, if there is one.

        Raises:
            UserError: by how much it does not fit, and what would.
        """
        if not self.settings.force:
            arrangement = arrangement_of(self.settings)
            drafts = Drafts(network, blocks, self.settings, recipe, arrangement)
            drafts.multiplied = None if products is None else of_lengths(products)
            check_plan(drafts, self.store, data, queries)

    @contextmanager
    def workers(
        self,
        network: Model,
        objective: str | Objective,
        blocks: Sequence[Block],
        dtype: torch.dtype,
        seed: int,
        measurement: str | Objective | None = None,
        check_capture: bool = False,
    ) -> Iterator[Workers]:
        """The processes of the job, which are let go of at the end whatever happens.

        Args:
            network: what the stages build.
            objective: its name, or itself.
            blocks: all of them.
            dtype: of the model's computation.
            seed: of drawn labels.
            measurement: of queries, where it is not the objective's.
            check_capture: whether captured gradients are held against autograd's.
        """
        found = Workers(
            self.settings, network, objective, blocks, dtype, seed, self.reporter, self.store,
            measurement, check_capture,
        )  # fmt: skip
        try:
            yield found
        finally:
            found.close()

    def check_causality(self, workers: Workers, objective: Objective, corpus: Corpus) -> None:
        """Have the model tried, when its stages are built, for outputs that look ahead, where the
        objective may not be given such; see :mod:`raycurv.driver.causality`."""
        if objective.causal:
            workers.meets = CausalityCheck(workers, corpus, self.manifest)

    def end(self, sentence: str, **places: str) -> None:
        """Record the seconds of each phase, and say what was done.

        Args:
            sentence: what was done, for a person.
            **places: what else lies where.
        """
        self.manifest.took(self.store, self.reporter.seconds)
        self.reporter.summary(sentence, {"results": self.store.root} | places)


@contextmanager
def open_shell(
    job: str, settings: S, out: str, inputs: Inputs, reporter: Reporter | None
) -> Iterator[Shell[S]]:
    """Check settings, and hold the directory of the results while the body runs.

    Args:
        job: its name, such as ``fit``.
        settings: of the job.
        out: where its results go.
        inputs: what the caller holds in memory.
        reporter: shows progress; by default to the terminal.

    Raises:
        UserError: a mistake in the settings, or another job works on the same directory.
        DamagedFile: from the body, where a file went that was there.
    """
    settings.check()
    reporter = reporter or Reporter(log=settings.log)
    store = open_store(out, "--out")
    with _modes_of_torch(), hold(store, f"{job}.py", reporter.say):
        try:
            settings, inputs = brought(settings.resolved(), inputs, reporter.say)
            yield Shell(job, settings, inputs, store, reporter)
        except FileNotFoundError as error:
            if store.path() not in str(error):
                raise
            raise DamagedFile(
                f"--out {store.root}", "the files that this job has found or made there",
                str(error), "They were taken away meanwhile: run the same command again, which "
                "makes what is missing.",
            ) from error  # fmt: skip


@contextmanager
def _modes_of_torch() -> Iterator[None]:
    """As actors have them, whatever a Python caller has around its call: gradients, numbers of the
    type that was asked for (no autocast), and new tensors on the CPU."""
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        yield


def check_loss_on(loss_on: str | None, conversations: bool) -> None:
    """Refuse to be asked for turns that there are not.

    Args:
        loss_on: what a person gave by the flag.
        conversations: whether there are any in the data.
    """
    if loss_on is not None and not conversations:
        raise UserError(
            f"--loss-on {loss_on}", "conversations (`messages`)", "none in the data",
            "Leave it out: of a text all tokens carry the loss, of a `prompt` and its "
            "`completion` those of the completion.",
        )  # fmt: skip
