"""Drive one pass through the resident stages: its results to a sink, commits in between.

A commit is a point where all microbatches that entered have come out: every stage writes its sums,
the sink its rows, and then one small JSON file says so (:mod:`raycurv.driver.commits`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from raycurv.driver.commits import Committed, last_commit, plan_mark, write_commit
from raycurv.driver.crew import Crew
from raycurv.driver.feed import Given
from raycurv.driver.line import Passage
from raycurv.driver.sinks import Sink
from raycurv.driver.timeline_table import write_long_timeline, write_timeline
from raycurv.files.spool import LostSpool
from raycurv.mathematics.sums import Combine, Results
from raycurv.progress import stopping
from raycurv.progress.phase import PhaseProgress

# Between two commits, unless the settings say otherwise: seconds, and times what one takes.
COMMIT_SECONDS, _COMMIT_TIMES = 60.0, 10.0


class Pipeline:
    """Runs a pass through the resident stages."""

    def __init__(self, passage: Passage, label: str) -> None:
        self._workers, self._passage, self._label = passage.workers, passage, label
        self._crew = Crew(passage)
        # What of the spool is gone, so that no further microbatch could enter.
        self._lost: LostSpool | None = None

    def run(self, sink: Sink, place: str) -> list[str]:
        """Run the pass to its end, from its last commit if there is one.

        Args:
            place: below the store, where commits go.

        Returns:
            The names of all files that the sink wrote, in order.

        Raises:
            LostSpool: of a microbatch; what was committed before is kept.
            Stopped: the job was asked to stop; what was done is committed.
        """
        plan, store, crew = self._passage.feed.plan, self._workers.store, self._crew
        mark = plan_mark(plan)
        before = last_commit(store, place, mark)
        if before is not None and before.finished:
            return before.rows
        at = before or Committed(0, mark)
        crew.begin(before)
        writing = 0.0
        with (
            self._workers.phase(self._label, len(plan), "microbatches") as phase,
            stopping.deferred(),
        ):
            phase.skip(at.done)
            done = at.done
            while done < len(plan):
                wait = self._workers.settings.commit_seconds
                wait = wait or max(COMMIT_SECONDS, _COMMIT_TIMES * writing)
                until = time.monotonic() + wait

                def enough(until: float = until) -> bool:
                    return sink.full or time.monotonic() > until

                try:
                    for m, results in self._through(range(done, len(plan)), phase, enough):
                        sink.take(plan[m], results)
                        done = m + 1
                except LostSpool:
                    # What enters with a microbatch that had to go again is gone: all stages go back
                    # to the last commit.
                    sink.forget()
                    raise
                started = time.monotonic()
                rows = at.rows + sink.commit(f"{place}/{done:07d}")
                if at.done < done < len(plan):
                    sums = crew.commit(place, done)
                    stale, at = at, Committed(done, mark, rows, sums)
                    write_commit(store, place, at)
                    crew.committed(sums)
                    write_timeline(store, self._workers.pool, self._label)
                    for name in set(stale.files) - set(at.files):
                        store.delete(name)
                writing = time.monotonic() - started
                if self._lost is not None:
                    raise self._lost
                if done < len(plan):
                    stopping.stop_if_asked()
            # Results first, then the word that they are there.
            crew.finish()
            write_commit(store, place, Committed(done, mark, rows, finished=True))
            write_timeline(store, self._workers.pool, self._label)
            for name in at.files:
                store.delete(name)
        return rows

    def take(self, microbatches: Sequence[int]) -> None:
        """Take some microbatches through, gathering nothing.

        Raises:
            LostSpool: of one of them; those before it have been through.
            Stopped: the job was asked to stop.
        """
        workers, count = self._workers, len(microbatches)
        assert workers.resident is not None
        where = workers.named(workers.resident)
        self._crew.begin()
        with workers.phase(self._label, count, "microbatches", where) as phase:
            with stopping.deferred():
                for _ in self._through(microbatches, phase, lambda: False):
                    pass
                stopping.stop_if_asked()
            self._crew.finish()
        if self._lost is not None:
            raise self._lost

    def _through(
        self, microbatches: Iterable[int], phase: PhaseProgress, enough: Callable[[], bool]
    ) -> Iterator[tuple[int, Results]]:
        """Take microbatches through until there are enough, the job is to stop, or one is lost."""
        workers, ends = self._workers, self._passage.ends

        def entering() -> Iterator[Given]:
            for number, m in enumerate(microbatches):
                # Always one, or a commit that takes long would never let the pass go on.
                if stopping.asked() or (number > 0 and enough()):
                    return
                try:
                    given = ends.load(m)
                except LostSpool as found:
                    # What is under way comes to its end before it is made again.
                    self._lost = found
                    return
                yield given

        combines = self._passage.work.results
        for arrived in self._crew.through(entering()):
            m = arrived.given.microbatch
            results = combine(combines, [*arrived.results, dict(arrived.given.carried)])
            ends.leave(m, arrived.leaving, results)
            phase.advance(1, self._passage.feed.tokens(m))
            write_long_timeline(workers.store, workers.pool, self._label)
            yield m, results


def combine(combines: Mapping[str, Combine], results: Sequence[Results]) -> Results:
    """What consecutive stages found as one.

    Args:
        combines: how, by the results' names (see :data:`raycurv.mathematics.sums.Combine`).
        results: of the stages, in their order.
    """
    combined: Results = {}
    for key in dict.fromkeys(key for found in results for key in found):
        parts = [found[key] for found in results if key in found]
        if combines[key] == "sum":
            combined[key] = torch.stack([part.double() for part in parts]).sum(dim=0)
        elif combines[key] == "last":
            (combined[key],) = parts
        else:
            combined[key] = torch.cat(parts, dim=-1)
    return combined
