"""A step: one family of results of a fit, and what a fit under way says to its steps.

A fit is a list of steps. Each says what a group of stages still lacks of its results, makes that by
tasks or by a pass through the group, and writes its files and tables. A pass that one step leads
may be shared by others: they ride on it, with gatherers of their own or with the rows that it
leaves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from raycurv.driver.corpus import Corpus, DrawnLabels, drawn_labels
from raycurv.driver.feed import Feed
from raycurv.driver.sinks import ExampleRows, rows_by_part
from raycurv.driver.workers import Workers
from raycurv.errors import DamagedFile
from raycurv.files.manifest import Manifest
from raycurv.files.store import Store
from raycurv.files.tables import read_rows
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.loss.differentiation import Target
from raycurv.mathematics.methods import Method
from raycurv.planning.cost import PassCost, StepCost
from raycurv.planning.shapes import Recipe
from raycurv.stages.passes import Gatherer

EXAMPLES_TABLE = "tables/examples"


@dataclass
class Fit:
    """A fit under way, as its steps see it.

    Attributes:
        recipe: what is made, and in which numbers.
        fisher: what the curvature is fitted to: ``sampled``, labels drawn from the model, or
            ``labels``, the data's own.
        signs: signs are drawn in place of labels.
        per_token: whether the objective has a label for each token.
        extends: the run whose bases stay and whose Λ is added to, if there is one.
        notes: footer of every table.
    """

    recipe: Recipe
    fisher: Target
    signs: bool
    per_token: bool
    extends: Store | None
    notes: dict[str, str]
    corpus: Corpus
    manifest: Manifest
    workers: Workers

    @property
    def store(self) -> Store:
        """The directory of the run."""
        return self.workers.store

    @property
    def method(self) -> Method:
        """The form of the curvature."""
        return self.recipe.kind

    @property
    def double(self) -> bool:
        """Whether results are kept in float64."""
        return self.recipe.dtype == torch.float64

    @property
    def sum_dtype(self) -> torch.dtype:
        """The dtype of sums as they are written."""
        return torch.float64 if self.double else torch.float32

    @property
    def groups(self) -> range:
        """The groups of stages, by number."""
        return range(len(self.workers.groups))

    @property
    def last(self) -> int:
        """The number of the last group, where losses and drawn labels come from."""
        return len(self.workers.groups) - 1

    @property
    def examples(self) -> int:
        """How many examples the curvature is a mean over."""
        return int(self.manifest.facts["examples"])

    def blocks_of(self, group: int) -> tuple[Block, ...]:
        """The blocks of a group of stages."""
        return self.workers.blocks_of(self.workers.groups[group])

    def feed(self, target: Target) -> Feed:
        """The microbatches of a pass, with the labels that an earlier pass drew."""
        drawn = None
        if target in ("sampled", "both") and self.draws_labels and self.labels_there():
            drawn = DrawnLabels(self.store).read
        return self.workers.feed(self.corpus, drawn)

    def example_rows(self) -> ExampleRows:
        """A sink of what a pass finds of the examples."""
        return ExampleRows(self.store, self.corpus.lengths if self.per_token else None)

    @property
    def draws_labels(self) -> bool:
        """Whether labels are drawn from the model, which are kept for later passes."""
        return self.fisher == "sampled" and not self.signs

    def labels_there(self) -> bool:
        """Whether the labels that the curvature is fitted to are known for all examples."""
        if not self.draws_labels:
            return True
        return DrawnLabels(self.store).complete(len(self.corpus))

    def examples_there(self) -> bool:
        """Whether the table of the examples is there; of an extended run it has more files than
        the corpus has parts."""
        names = self.store.names(EXAMPLES_TABLE, ".parquet")
        try:
            return sum(read_rows(self.store, name) for name in names) == self.examples
        except DamagedFile:
            return False

    def keep_labels(self, names: Sequence[str]) -> None:
        """Put the labels that a pass drew, among its rows, where later passes read them."""
        if not self.labels_there():
            labels = DrawnLabels(self.store)
            for part, table in rows_by_part(self.store, names):
                labels.write(part, drawn_labels(table))

    def mending(self) -> None:
        """Take back that the fit is finished: something is about to be computed again."""
        if "tables" in self.manifest.complete:
            self.manifest.complete.remove("tables")
            self.manifest.write(self.store)


def table_there(store: Store, name: str) -> bool:
    """Whether the file of a table is there and has rows."""
    try:
        return read_rows(store, name) > 0
    except (DamagedFile, FileNotFoundError):
        return False


class Step(ABC):
    """One family of results of a fit.

    Args:
        number: which it is of several steps of its class, from 1 on.

    Attributes:
        name: what ``run.json`` lists when all groups have these results; empty for no entry.
        cost: what the step takes, for plans; its phase is what the progress shows.
    """

    name: str = ""
    cost: ClassVar[StepCost]

    def __init__(self, fit: Fit, number: int = 1) -> None:
        self.fit = fit

    @abstractmethod
    def lacking(self, group: int) -> bool:
        """Whether results of a group of stages are missing or damaged."""

    def tables_there(self) -> bool:
        """Whether the step's tables are there."""
        return True

    def write_tables(self) -> None:  # noqa: B027 (most steps have none)
        """Write the step's tables, when nothing is lacking."""


class TaskStep(Step):
    """A step whose results are made by tasks, from files."""

    @abstractmethod
    def run(self, group: int) -> None:
        """Make what a group lacks."""


class PassStep(Step):
    """A step whose results are gathered by a pass through a group of stages.

    Attributes:
        pass_name: of the pass that it leads, for the names of its commits.
        cost: says also whether the step rides on the passes that others lead, where they give what
            it needs, and whether a pass that it leads goes back through the stages.
        own_labels: whether it needs gradients of the data's own labels beside the drawn ones.
    """

    pass_name: str
    cost: ClassVar[PassCost]
    own_labels: ClassVar[bool] = False

    def lacking(self, group: int) -> bool:
        return self.carries() or bool(self.sums(group) or self.columns(group))

    def gatherers(self, group: int) -> tuple[Gatherer, ...]:
        """What gathers that which a group lacks."""
        return ()

    def again(self, group: int) -> tuple[Gatherer, ...]:
        """The same adding nothing to any sum, for microbatches whose results are made again."""
        return ()

    def sums(self, group: int) -> frozenset[str]:
        """Names of the sums that :meth:`gatherers` gathers: a commit without them is of no use."""
        return frozenset()

    def columns(self, group: int) -> frozenset[str]:
        """Results of the examples that it takes from the rows of a pass through a group."""
        return frozenset()

    def carries(self) -> bool:
        """Whether results of a pass that it leads are added up from group to group."""
        return False

    def keep(self, group: int, names: Sequence[str]) -> None:
        """Take what it wants from the files of a finished pass's rows."""

    def passed(self, group: int) -> None:
        """Delete what no one needs after a finished pass that it has led."""
