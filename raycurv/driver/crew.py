"""A crew: all replicas of the resident stages in one pass, and what is done when one is lost.

Microbatch m goes to replica m mod R, whatever happens: so the order of additions, and with it every
bit of the sums, is the same with failures and without. When an actor is lost its replica alone goes
back: the stage is built again, takes its last commit, and its microbatches since then go through
the replica's stages once more; those that have them already pass them on and add nothing.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from raycurv.driver.commits import Committed, sums_name
from raycurv.driver.feed import Given
from raycurv.driver.line import Arrived, Line, Passage
from raycurv.stages.dealing import tree
from raycurv.stages.pool import Handle, StageCalls, StageLost
from raycurv.stages.stage import Commit

# A replica and a stage.
Place = tuple[int, int]
T = TypeVar("T")


class Crew:
    """Takes microbatches through all replicas, and their sums to the end of the pass."""

    def __init__(self, passage: Passage) -> None:
        self._workers = passage.workers
        self._pool, self._store = passage.workers.pool, passage.workers.store
        self._work, self._ends = passage.work, passage.ends
        self._lines = [Line(passage, replica) for replica in range(self._pool.replicas)]
        self._sums: list[list[str]] = []
        self._collected = -1
        self._next: Callable[[int], Given | None] = lambda replica: None

    def begin(self, committed: Committed | None = None) -> None:
        """Start the pass in all stages, from a commit if there is one."""
        if committed is not None:
            self._sums, self._collected = committed.sums, committed.done - 1
        self._everywhere(lambda calls, r, s: calls.begin(self._work, self._commit_of(r)))

    def through(self, source: Iterator[Given]) -> Iterator[Arrived]:
        """Take microbatches through the stages; yields each when its results are there, in order.

        Args:
            source: the microbatches, ascending; drawn from when a first stage can take one.

        Raises:
            LostSpool: what entered with a microbatch that has to go again is gone.
        """
        order: deque[int] = deque()
        queues: list[deque[Given]] = [deque() for _ in self._lines]

        def following(replica: int) -> Given | None:
            while not queues[replica]:
                found = next(source, None)
                if found is None:
                    return None
                order.append(found.microbatch)
                queues[found.microbatch % len(queues)].append(found)
            return queues[replica].popleft()

        self._next = following
        try:
            for line in self._lines:
                self._open(line)
            while True:
                # In turns, so that all replicas have work before anything is waited for.
                while any([line.step() for line in self._lines]):
                    pass
                if not order:
                    return
                m = order.popleft()
                arrived = self._collect(self._lines[m % len(self._lines)], m)
                self._collected = m
                yield arrived
        finally:
            self._next = lambda replica: None

    def commit(self, place: str, done: int) -> list[list[str]]:
        """Write the sums of all stages; gives the files' names, replica by replica."""
        names = [
            [sums_name(place, done, r, s) for s in range(self._pool.stages)]
            for r in range(self._pool.replicas)
        ]
        self._everywhere(lambda calls, r, s: calls.commit(self._store, names[r][s]))
        return names

    def committed(self, sums: list[list[str]]) -> None:
        """Say that a commit exists: from now on, that is where a lost stage goes on from."""
        self._sums = sums
        for line in self._lines:
            del line.since[:]

    def finish(self) -> None:
        """Add up what was gathered over replicas, write it, and end the pass."""
        if self._work.differentiates:
            for proof in self._everywhere(lambda calls, r, s: calls.proof()).values():
                self._workers.take_proof(proof)
        names = self._everywhere(lambda calls, r, s: calls.names())
        # Stages side by side; of each what one call writes: a result, where replicas add to it.
        alone = self._pool.replicas == 1
        by_stage = [
            [(s, some) for run in names[0, s] for some in ([run] if alone else zip(run))]
            for s in range(self._pool.stages)
        ]
        rows = itertools.zip_longest(*by_stage)
        self._write([found for row in rows for found in row if found is not None])
        for r, s in itertools.product(range(self._pool.replicas), range(self._pool.stages)):
            # Who is lost has nothing to lose any more: the next pass finds out.
            with contextlib.suppress(StageLost):
                self._pool.get(self._pool.at(s, r).finish())

    # Parts

    def _write(self, left: list[tuple[int, tuple[str, ...]]]) -> None:
        """Write results, each once: after a failure only those that were not written."""
        while left:
            under: deque[tuple[tuple[int, tuple[str, ...]], Handle[None]]] = deque()
            ahead = iter(list(left))
            try:
                while True:
                    for following in itertools.islice(ahead, 2 * self._pool.stages - len(under)):
                        under.append((following, self._added_up(*following)))
                    if not under:
                        return
                    found, handle = under[0]
                    self._pool.get(handle)
                    under.popleft()
                    left.remove(found)
            except StageLost as lost:
                # An addition fails with either of its sides: look at all replicas.
                if not any([self._recover(line) for line in self._lines]):
                    self._recover(self._lines[0], lost)
                for line in self._lines:
                    self._drain(line)

    def _added_up(self, stage: int, names: tuple[str, ...]) -> Handle[None]:
        """A handle of results' writing; of replicas one, between actors, along a tree."""
        calls = [self._pool.at(stage, replica) for replica in range(self._pool.replicas)]
        if len(calls) == 1:
            return calls[0].write(names)
        (name,) = names
        parts = [call.result(name) for call in calls]
        for left, right, by in tree(len(calls)):
            parts[left] = calls[by].joined(parts[left], parts[right])
        return calls[0].write(names, parts[0])

    def _everywhere(self, call: Callable[[StageCalls, int, int], Handle[T]]) -> dict[Place, T]:
        """Call every stage of every replica, again where one was lost."""
        left = [(r, s) for r in range(self._pool.replicas) for s in range(self._pool.stages)]
        found: dict[Place, T] = {}
        while left:
            handles = {(r, s): call(self._pool.at(s, r), r, s) for r, s in left}
            lost: dict[int, StageLost] = {}
            for place, handle in handles.items():
                try:
                    found[place] = self._pool.get(handle)
                except StageLost as missed:
                    lost[place[0]] = missed
            left = [place for place in left if place not in found]
            for replica, error in lost.items():
                self._recover(self._lines[replica], error)
                # The call speaks of everything that went through; so let it go through.
                self._drain(self._lines[replica])
        return found

    def _commit_of(self, replica: int) -> Commit | None:
        """The last commit of a replica; of several that it stands for now, all of theirs."""
        mine = self._sums[replica :: self._pool.replicas]
        return Commit(self._store, tuple(map(tuple, mine))) if mine else None

    def _open(self, line: Line, again: Sequence[Given] = ()) -> None:
        line.open(lambda: self._next(line.replica), again)

    def _collect(self, line: Line, m: int) -> Arrived:
        while True:
            try:
                arrived = line.collect()
            except StageLost as lost:
                self._recover(line, lost)
                continue
            assert arrived is not None
            # What has to go again for the sake of one stage was collected before.
            if arrived.given.microbatch == m:
                return arrived

    def _drain(self, line: Line) -> None:
        """Let everything go through that has to go again; all of it was collected before."""
        while True:
            try:
                if line.collect() is None:
                    return
            except StageLost as lost:
                self._recover(line, lost)

    def _recover(self, line: Line, lost: StageLost | None = None) -> bool:
        """Have the lost stages of a replica built again, and send in what they lack; gives whether
        there were any."""
        pool, replica = self._pool, line.replica
        waiting, some = line.waiting, False
        while True:
            try:
                rebuilt = pool.repair(replica, lost)
                some = some or bool(rebuilt)
                commit = self._commit_of(replica)
                for begun in [pool.at(s, replica).begin(self._work, commit) for s in rebuilt]:
                    pool.get(begun)
                answers = [pool.at(stage, replica).abort() for stage in range(pool.stages)]
                answered = [pool.get(handle) for handle in answers]
                break
            except StageLost as again:
                lost = again
        seen = [set(microbatches) for microbatches in answered]
        lacking = [
            m for m in line.since if m > self._collected or not all(m in each for each in seen)
        ]
        self._open(line, [waiting[m] if m in waiting else self._ends.load(m) for m in lacking])
        return some
