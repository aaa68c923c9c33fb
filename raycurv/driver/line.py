"""A line: the stages of one replica, and the microbatches on their way through them."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from raycurv.batch import Batch, Hidden
from raycurv.driver.feed import Ends, Feed, Given
from raycurv.driver.workers import Workers
from raycurv.mathematics.sums import Results
from raycurv.stages.passes import Pass
from raycurv.stages.pool import Handle
from raycurv.stages.schedule import Operation, pipelined

# Gives the next microbatch of a replica; None when there is none for now.
Next = Callable[[], Given | None]


@dataclass
class _Under:
    """A microbatch on its way: what was given with it, and handles of what it leaves."""

    given: Given
    batch: Handle[Batch] | None
    hidden: Handle[Hidden] | None
    leaving: Handle[Hidden | None] | None = None
    results: list[Handle[Results]] = field(default_factory=list)


@dataclass(frozen=True)
class Arrived:
    """A microbatch that has been through.

    Attributes:
        leaving: hidden states, or gradients ``[draws, ...]``, where they are wanted.
        results: what every stage found, in their order.
    """

    given: Given
    leaving: Hidden | None
    results: list[Results]


@dataclass(frozen=True)
class Passage:
    """A pass on its way through the resident stages, with what lies before and behind them."""

    workers: Workers
    work: Pass
    feed: Feed
    ends: Ends


class Line:
    """Submits the operations of one replica as the schedule says.

    Attributes:
        since: microbatches that entered since the last commit, ascending.
    """

    def __init__(self, passage: Passage, replica: int) -> None:
        self._pool, self.replica = passage.workers.pool, replica
        self._work, self._feed, self._keeps = passage.work, passage.feed, passage.ends.keeps
        self.since = array("q")
        self._under: dict[int, _Under] = {}
        self._ended: deque[int] = deque()
        self._operations: Iterator[Operation] = iter(())

    @property
    def waiting(self) -> dict[int, Given]:
        """Microbatches that entered and were not collected, with what was given."""
        return {m: under.given for m, under in self._under.items()}

    def open(self, following: Next, again: Iterable[Given] = ()) -> None:
        """Take microbatches in from now on, behind those that go ``again``; what was under way is
        forgotten."""
        self._under, self._ended = {}, deque()

        def source() -> Iterator[int]:
            for given in again:
                yield self._enter(given)
            while (found := following()) is not None:
                self.since.append(found.microbatch)
                yield self._enter(found)

        self._operations = pipelined(self._pool.stages, source())

    def step(self) -> bool:
        """Submit one operation; gives whether there was one and room for it."""
        # Bounded in flight: no more than the pipeline holds, twice, waits to be collected.
        if len(self._ended) > self._pool.stages:
            return False
        for operation in self._operations:
            self._submit(operation)
            return True
        return False

    def collect(self) -> Arrived | None:
        """The oldest microbatch that has been submitted to its end, ``None`` when all are
        collected; StageLost if it will not come."""
        while not self._ended:
            if not self.step():
                return None
        m = self._ended[0]
        found = self._under[m]
        get = self._pool.get
        # Stages answered from the last to the first.
        results = [get(handle) for handle in reversed(found.results)]
        leaving = None
        if self._keeps and found.leaving is not None:
            leaving = get(found.leaving)
        self._ended.popleft()
        del self._under[m]
        return Arrived(found.given, leaving, results)

    def _enter(self, given: Given) -> int:
        m, put = given.microbatch, self._pool.put
        hidden = None if given.hidden is None else put(given.hidden)
        self._under[m] = _Under(given, put(self._feed.read(m, self._feed.plan[m])), hidden)
        return m

    def _submit(self, operation: Operation) -> None:
        m, stage = operation.microbatch, operation.stage
        calls, here = self._pool.at(stage, self.replica), self._under[m]
        goes_back = self._work.differentiates
        # Who takes the gradients, if anybody does.
        before = stage - 1 if stage > 0 and goes_back else None
        if operation.kind == "forward":
            assert here.batch is not None
            here.hidden = calls.forward(m, here.batch, here.hidden, to=stage + 1)
            return
        if operation.kind == "turn":
            assert here.batch is not None
            given = here.given.gradients
            back = None if given is None else self._pool.put(given)
            here.leaving, found = calls.turn(m, here.batch, here.hidden, back, to=before)
            here.results.append(found)
            here.batch = here.hidden = None
        elif goes_back:
            assert here.leaving is not None
            here.leaving, found = calls.backward(m, here.leaving, to=before)
            here.results.append(found)
        if stage == 0:
            self._ended.append(m)
