"""Drive one pass through the resident stages: its results to a sink, commits in between.

A commit is a point where all microbatches that entered have come out: every stage writes its sums,
the sink its rows, and then one small JSON file says so (:mod:`raycurv.driver.commits`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from raycurv.driver.commits import Committed, last_commit, plan_mark, write_commit
from raycurv.driver.crew import Crew
from raycurv.driver.feed import Ends, Feed, Given, Results
from raycurv.driver.timeline_table import write_long_timeline, write_timeline
from raycurv.files.spool import LostSpool
from raycurv.files.store import Store
from raycurv.mathematics.gradient_statistics import BLOCK_NORMS
from raycurv.progress import stopping
from raycurv.progress.reporter import Reporter
from raycurv.stages.pool import Pool
from raycurv.stages.stage import Pass

# Between two commits, unless the settings say otherwise: seconds, and times what one takes.
COMMIT_SECONDS, _COMMIT_TIMES = 60.0, 10.0


class Sink(Protocol):
    """Takes the results of a pass, microbatch by microbatch, in order."""

    @property
    def full(self) -> bool:
        """Whether so much waits that it should be committed now."""
        ...

    def take(self, members: Sequence[int], results: Results) -> None:
        """What all stages found of the examples ``members`` (see :func:`combine`)."""
        ...

    def commit(self, name: str) -> list[str]:
        """Write what was taken since the last commit; gives the files' names."""
        ...

    def forget(self) -> None:
        """Drop what was taken since the last commit: it will be given again."""
        ...


class NoSink:
    """Takes nothing: other groups of stages have their part of the results still to add."""

    full = False

    def take(self, members: Sequence[int], results: Results) -> None:
        pass

    def commit(self, name: str) -> list[str]:
        return []

    def forget(self) -> None:
        pass


def run_pass(
    pool: Pool,
    work: Pass,
    feed: Feed,
    ends: Ends,
    sink: Sink,
    store: Store,
    place: str,
    reporter: Reporter,
    label: str,
    commit_seconds: float | None,
) -> list[str]:
    """Run a pass to its end, from its last commit if there is one.

    Args:
        pool: with its stages started.
        work: the pass.
        feed: its microbatches.
        ends: of the stages.
        sink: takes what stages give back.
        store: where commits go, below ``place``.
        label: what the progress calls the pass.
        commit_seconds: time between commits; ``None`` for a minute, or ten times what one takes.

    Returns:
        The names of all files that the sink wrote, in order.

    Raises:
        LostSpool: of a microbatch; what was committed before is kept.
        Stopped: the job was asked to stop; what was done is committed.
    """
    mark = plan_mark(feed.plan)
    before = last_commit(store, place, mark)
    if before is not None and before.finished:
        return before.rows
    at = before or Committed(0, mark)
    crew = Crew(pool, work, feed, ends, store)
    crew.begin(before)
    lost: LostSpool | None = None
    writing = 0.0
    with reporter.phase(label, len(feed.plan), "microbatches") as phase, stopping.deferred():
        phase.skip(at.done)
        done = at.done
        while done < len(feed.plan):
            wait = commit_seconds or max(COMMIT_SECONDS, _COMMIT_TIMES * writing)
            until = time.monotonic() + wait

            def span(start: int = done, until: float = until) -> Iterator[tuple[int, Given]]:
                nonlocal lost
                for index in range(start, len(feed.plan)):
                    # Always one, or a commit that takes long would never let the pass go on.
                    if index > start and (sink.full or time.monotonic() > until):
                        return
                    if stopping.asked():
                        return
                    try:
                        given = ends.load(index)
                    except LostSpool as found:
                        # What is under way comes to its end before it is made again.
                        lost = found
                        return
                    yield index, given

            try:
                for arrived in crew.through(span()):
                    results = combine([*arrived.results, dict(arrived.given.carried)])
                    ends.leave(arrived.microbatch, arrived.leaving, results)
                    sink.take(feed.plan[arrived.microbatch], results)
                    phase.advance(1, feed.tokens(arrived.microbatch))
                    write_long_timeline(store, pool, label)
                    done = arrived.microbatch + 1
            except LostSpool:
                # Of one that had to go again: all stages go back to the last commit.
                sink.forget()
                raise
            started = time.monotonic()
            rows = at.rows + sink.commit(f"{place}/{done:07d}")
            if at.done < done < len(feed.plan):
                sums = crew.commit(place, done)
                stale, at = at, Committed(done, mark, rows, sums)
                write_commit(store, place, at)
                crew.committed(sums)
                write_timeline(store, pool, label)
                for name in set(stale.files) - set(at.files):
                    store.delete(name)
            writing = time.monotonic() - started
            if lost is not None:
                raise lost
            if done < len(feed.plan):
                stopping.stop_if_asked()
        # Results first, then the word that they are there.
        crew.finish()
        write_commit(store, place, Committed(done, mark, rows, finished=True))
        write_timeline(store, pool, label)
        for name in at.files:
            store.delete(name)
    return rows


def take_through(
    pool: Pool,
    work: Pass,
    feed: Feed,
    ends: Ends,
    store: Store,
    microbatches: Sequence[int],
    reporter: Reporter,
    label: str,
    where: str,
) -> None:
    """Take some microbatches through the resident stages, gathering nothing.

    Args:
        where: which stages, for the progress.

    Raises:
        LostSpool: of one of them; those before it have been through.
        Stopped: the job was asked to stop.
    """
    crew = Crew(pool, work, feed, ends, store)
    crew.begin()
    lost: list[LostSpool] = []

    def span() -> Iterator[tuple[int, Given]]:
        for m in microbatches:
            if stopping.asked():
                return
            try:
                given = ends.load(m)
            except LostSpool as found:
                lost.append(found)
                return
            yield m, given

    with reporter.phase(label, len(microbatches), "microbatches", where) as phase:
        with stopping.deferred():
            for arrived in crew.through(span()):
                results = combine([*arrived.results, dict(arrived.given.carried)])
                ends.leave(arrived.microbatch, arrived.leaving, results)
                phase.advance(1, feed.tokens(arrived.microbatch))
                write_long_timeline(store, pool, label)
            stopping.stop_if_asked()
        crew.finish()
        write_timeline(store, pool, label)
    if lost:
        raise lost[0]


def combine(results: Sequence[Results]) -> Results:
    """What consecutive stages found as one: sums in float64; blocks side by side; the last's own.

    ``loss`` and ``drawn`` come from the model's last stage; ``block_scores [N, Q, B]`` and
    ``block_sq_norms [N, B]`` are joined along B; everything else is a sum over stages.
    """
    combined: Results = {}
    for key in dict.fromkeys(key for found in results for key in found):
        parts = [found[key] for found in results if key in found]
        if key in ("loss", "drawn"):
            (combined[key],) = parts
        elif key in ("block_scores", BLOCK_NORMS):
            combined[key] = torch.cat(parts, dim=-1)
        else:
            combined[key] = torch.stack([part.double() for part in parts]).sum(dim=0)
    return combined
