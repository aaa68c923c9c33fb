"""A sweep: streams of microbatches through groups of stages, forward and back.

A group is a run of stages that are resident together; a model whose stages all are is one group.

    forward    first group to the one before the last: hidden states go to the spool
    backward   last group to the first: hidden states and the gradient that the group behind left
               come from the spool, what the passes gather stays with the group, the gradient for
               the group before and what was found so far go to the spool

Each group is loaded twice, the last one once. What the spool lost is made again, whatever it was:
a file is made from the nearest ones that are left.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from raycurv.batch import Hidden
from raycurv.driver.commits import plan_mark
from raycurv.driver.feed import Ends, Feed, Given
from raycurv.driver.line import Passage
from raycurv.driver.pipeline import Pipeline
from raycurv.driver.sinks import Sink
from raycurv.driver.workers import Workers
from raycurv.files.manifest import Manifest
from raycurv.files.spool import LostSpool, Spool, spool_store
from raycurv.mathematics.loss.differentiation import Target
from raycurv.mathematics.sums import Results
from raycurv.stages.passes import Pass, loss_pass

# Of the files in a spool: those of another format are of no use.
_FORMAT = 2


@dataclass(frozen=True)
class Task:
    """A pass over a stream, as a sweep runs it through one group.

    Attributes:
        feed: the microbatches of the stream as this pass reads them.
        again: the same pass adding nothing to any sum, for microbatches whose gradients or results
            have to be made again.
        carries: whether results are added up from group to group.
        sink: takes the results of the group; those of the first are complete if carried.
    """

    stream: str
    feed: Feed
    work: Pass
    again: Pass
    carries: bool
    sink: Sink = field(default_factory=Sink)


# Is shown a group, whose stages are resident, and what enters them.
Meeting = Callable[[int, Given], None]


class Sweep:
    """Takes streams through the groups, the resident one at a time.

    What waits in the spool is of use to the same run with the same microbatches and groups alone.

    Args:
        target: of the passes, where a run may choose it.
        there: the pass that makes what enters the groups; by default hidden states alone.

    Attributes:
        streams: those that go forward; one that is taken away does not.

    Raises:
        UserError: there is no local directory for the spool.
    """

    def __init__(
        self,
        workers: Workers,
        manifest: Manifest,
        streams: Mapping[str, Feed],
        target: Target | None = None,
        there: Pass | None = None,
    ) -> None:
        self._workers, self._manifest, self.streams = workers, manifest, dict(streams)
        self._there = there or loss_pass()
        self._spool: Spool | None = None
        if self.last > 0:
            units = [[workers.cuts[stage].stop for stage in group] for group in workers.groups]
            plans = [plan_mark(feed.plan) for feed in streams.values()]
            said = [_FORMAT, manifest.settings, manifest.fingerprints, units, plans, target]
            if there is not None:
                said.append(there.name)  # whose directions it names
            text = json.dumps(said, sort_keys=True).encode()
            mark = hashlib.blake2b(text, digest_size=16).hexdigest()
            store = spool_store(workers.store, workers.settings.spool_dir)
            self._spool = Spool(store, mark, len(workers.groups))

    @property
    def last(self) -> int:
        """Number of the last group."""
        return len(self._workers.groups) - 1

    @property
    def level(self) -> int:
        """The group where the way back goes on: those behind it are done."""
        return 0 if self._spool is None else self._spool.level

    def commit_directory(self, name: str, group: int) -> str:
        """Where the commits of a pass through a group lie."""
        return commit_directory(name, group, self.last + 1)

    def forward(self, meet: Meeting | None = None) -> None:
        """Spool the hidden states that enter each group up to the level; ``meet`` is shown every
        group, and what enters it with the first microbatch of the first stream."""
        for group in range(self.last + 1 if meet is not None else self.level):
            if meet is not None:
                self._meet(group, meet)
            if group < self.level:
                for name, feed in self.streams.items():
                    self._forward(group, name, feed)

    def run(self, group: int, task: Task, label: str, lowest: int) -> list[str]:
        """Run a pass through a group; gives the files of its sink. The sweep goes back to the
        ``lowest`` group, whose gradient nobody needs."""
        while True:
            ends = self._back(group, task, lowest)
            try:
                pipeline = self._pipeline(group, task, ends, label)
                names = pipeline.run(task.sink, self.commit_directory(task.work.name, group))
                if task.work.differentiates:
                    self._record_agreement(group)
                return names
            except LostSpool as lost:
                self._remake(lost, task)

    def replay(self, group: int, task: Task) -> None:
        """Make the gradients that leave a group whose own part is done, where they are missing."""
        while True:
            missing = self._missing(task.stream, "gradient", group, task.feed)
            if not missing:
                return
            try:
                self._take(group, task, self._back(group, task, 0), missing)
            except LostSpool as lost:
                self._remake(lost, task)

    def descend(self, group: int) -> None:
        """Say that a group is done: what only it needed is deleted."""
        if self._spool is not None:
            self._spool.descend(group - 1)

    def end(self) -> None:
        """Say that the sweep is over."""
        if self._spool is not None:
            self._spool.delete()
            self._spool.level = self.last

    # Parts

    def _record_agreement(self, group: int) -> None:
        """Write down at once how well captured gradients agree with autograd's, in all stages so
        far: a job that goes on from here may not look at these again. ``None`` stays once a part of
        the work was done without."""
        workers, facts = self._workers, self._manifest.facts
        before, found = facts.get("capture_check", {"worst": -1.0}), workers.agreement
        if not workers.check_capture:
            facts["capture_check"] = None
        elif before is not None and found is not None and found.worst > before["worst"]:
            facts["capture_check"] = {
                "worst": found.worst, "block": found.block, "tolerance": found.tolerance,
            }  # fmt: skip
            self._manifest.write(workers.store)
        if group == 0:
            workers.say_agreement()

    def _missing(
        self, name: str, kind: Literal["hidden", "gradient"], boundary: int, feed: Feed
    ) -> Sequence[int]:
        assert self._spool is not None
        has = self._spool.has
        # Nearly all of them, as a rule: 8 bytes each.
        return array("q", (m for m in range(len(feed.plan)) if not has(name, kind, boundary, m)))

    def _meet(self, group: int, meet: Meeting) -> None:
        name, feed = next(iter(self.streams.items()))
        ends = Ends() if self._spool is None else _Forward(self._spool, name, group)
        while True:
            try:
                given = ends.load(0)
                break
            except LostSpool as lost:
                self._remake(lost, self._forward_task(name, feed))
        self._workers.load(group)
        meet(group, given)

    def _back(self, group: int, task: Task, lowest: int) -> Ends:
        if self._spool is None:
            return Ends()
        keeps = group > lowest and bool(self._missing(task.stream, "gradient", group, task.feed))
        return _Backward(self._spool, task.stream, group, self.last, task, keeps)

    def _forward(self, group: int, name: str, feed: Feed) -> None:
        assert self._spool is not None
        task = self._forward_task(name, feed)
        while True:
            missing = self._missing(name, "hidden", group + 1, feed)
            if not missing:
                return
            try:
                self._take(group, task, _Forward(self._spool, name, group), missing, "forward")
            except LostSpool as lost:
                self._remake(lost, task)

    def _take(
        self,
        group: int,
        task: Task,
        ends: Ends,
        microbatches: Sequence[int],
        label: str = "again, what the spool lost",
    ) -> None:
        """Take some microbatches through a group, gathering nothing."""
        self._pipeline(group, task, ends, label).take(microbatches)

    def _pipeline(self, group: int, task: Task, ends: Ends, label: str) -> Pipeline:
        self._workers.load(group)
        return Pipeline(Passage(self._workers, task.work, task.feed, ends), label)

    def _remake(self, lost: LostSpool, task: Task) -> None:
        """Make one microbatch's file again, and with it everything that it is made from."""
        assert self._spool is not None
        spool, m, boundary = self._spool, lost.microbatch, lost.boundary
        self._workers.reporter.say(
            f"spool: {lost.stream}, {lost.kind} of microbatch {m} before group {boundary} is gone "
            "or damaged; making it again"
        )
        again = Task(task.stream, task.feed, task.again, task.again, task.carries)
        while True:
            try:
                if lost.kind == "hidden":
                    self._remake_hidden(task, m, boundary)
                    return
                self._remake_hidden(task, m, self.last)
                for group in range(self.last, boundary - 1, -1):
                    ends = _Backward(spool, task.stream, group, self.last, again)
                    self._take(group, again, ends, [m])
                break
            except LostSpool:
                continue  # deleted, so that the next try starts from further away
        # The groups behind are done, and need no files.
        for group in range(boundary, self.last + 1):
            spool.forget(task.stream, "hidden", group, m)
        for group in range(boundary + 1, self.last + 1):
            spool.forget(task.stream, "gradient", group, m)
            spool.forget(task.stream, "results", group, m)

    def _remake_hidden(self, task: Task, m: int, boundary: int) -> None:
        assert self._spool is not None
        start = boundary
        while start > 0 and not self._spool.has(task.stream, "hidden", start, m):
            start -= 1
        forward = self._forward_task(task.stream, task.feed)
        for group in range(start, boundary):
            self._take(group, forward, _Forward(self._spool, task.stream, group), [m])

    def _forward_task(self, stream: str, feed: Feed) -> Task:
        return Task(stream, feed, self._there, self._there, carries=False)


@dataclass(frozen=True)
class _Forward(Ends):
    """The way there: hidden states enter a group, and leave it."""

    spool: Spool
    stream: str
    group: int
    keeps: bool = True

    def load(self, microbatch: int) -> Given:
        if self.group == 0:
            return Given(microbatch)
        read = self.spool.read(self.stream, "hidden", self.group, microbatch)
        return Given(microbatch, _hidden(read))

    def leave(self, microbatch: int, leaving: Hidden | None, results: Results) -> None:
        assert leaving is not None
        self.spool.write(self.stream, "hidden", self.group + 1, microbatch, _numbered(leaving))


@dataclass(frozen=True)
class _Backward(Ends):
    """The way back: hidden states and gradients enter a group, gradients and results leave it."""

    spool: Spool
    stream: str
    group: int
    last: int
    task: Task
    keeps: bool = True

    def load(self, microbatch: int) -> Given:
        def read(kind: Literal["hidden", "gradient", "results"], boundary: int) -> Results:
            return self.spool.read(self.stream, kind, boundary, microbatch)

        hidden = None if self.group == 0 else _hidden(read("hidden", self.group))
        if self.group == self.last:
            return Given(microbatch, hidden)
        behind = self.group + 1
        carried = read("results", behind) if self.task.carries else {}
        return Given(microbatch, hidden, _hidden(read("gradient", behind)), carried)

    def leave(self, microbatch: int, leaving: Hidden | None, results: Results) -> None:
        spool, stream, group = self.spool, self.stream, self.group
        if self.keeps and not spool.has(stream, "gradient", group, microbatch):
            assert leaving is not None
            spool.write(stream, "gradient", group, microbatch, _numbered(leaving))
        if self.task.carries and group > 0:
            combines = self.task.work.results
            carried = {k: t for k, t in results.items() if combines[k] != "apart"}
            spool.write(stream, "results", group, microbatch, carried)


def _numbered(hidden: Hidden) -> dict[str, Tensor]:
    return {str(place): tensor for place, tensor in enumerate(hidden)}


def _hidden(read: Mapping[str, Tensor]) -> Hidden:
    return tuple(read[str(place)] for place in range(len(read)))


def commit_directory(name: str, group: int, groups: int) -> str:
    """Where the commits of a pass through a group of so many lie."""
    return f"work/{name}" if groups == 1 else f"work/{name}/group-{group:04d}"
