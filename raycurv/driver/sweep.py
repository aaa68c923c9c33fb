"""Drive one pass: every microbatch through every stage, its results to a sink, commits in between.

A commit is a point where the pipeline is empty: every stage writes its sums, the sink its rows, and
then one small JSON file says so. A restart goes on from there; what is not in that file does not
exist.

    work/PASS/commit.json          microbatches done, the plan, the files
    work/PASS/00042/stage-0.safetensors, rows.parquet
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from raycurv.batch import Batch
from raycurv.driver.progress import Reporter
from raycurv.files.store import Store
from raycurv.stages.pool import Pool
from raycurv.stages.schedule import pipelined
from raycurv.stages.stage import Pass

Results = dict[str, Tensor]


class Sink(Protocol):
    """Takes the results of a pass, microbatch by microbatch, in order."""

    @property
    def full(self) -> bool:
        """Whether so much waits that it should be committed now."""
        ...

    def take(self, members: Sequence[int], results: list[Results]) -> None:
        """Results of all stages (in their order) for the examples ``members``."""
        ...

    def commit(self, name: str) -> list[str]:
        """Write what was taken since the last commit; gives the files' names."""
        ...


@dataclass(frozen=True)
class Feed:
    """The microbatches of a pass.

    Attributes:
        plan: example numbers of each.
        read: packs one.
        lengths: tokens of every example, for the rate shown.
    """

    plan: Sequence[tuple[int, ...]]
    read: Callable[[int, Sequence[int]], Batch]
    lengths: Sequence[int]


def run_pass(
    pool: Pool,
    work: Pass,
    feed: Feed,
    sink: Sink,
    store: Store,
    reporter: Reporter,
    label: str,
    commit_seconds: float,
) -> list[str]:
    """Run a pass to its end, from its last commit if there is one.

    Args:
        pool: with its stages started.
        work: the pass.
        feed: its microbatches.
        sink: takes what stages give back.
        store: where commits go, below ``work/PASS``.
        label: what the progress calls the pass.
        commit_seconds: time between commits.

    Returns:
        The names of all files that the sink wrote, in order.
    """
    place, mark = f"work/{work.name}", plan_mark(feed.plan)
    before = last_commit(store, place, mark)
    done = before["done"] if before else 0
    rows: list[str] = before["rows"] if before else []
    finished = before is not None and before["finished"]
    if not finished:
        commits = (store, before["sums"]) if before and before["sums"] else None
        for handle in [pool.call(s, "begin", work, commits) for s in range(pool.stages)]:
            pool.get(handle)
    sums: list[str] = before["sums"] if before else []
    with reporter.phase(label, len(feed.plan), "microbatches") as phase:
        phase.advance(done)
        while done < len(feed.plan):
            until = time.monotonic() + commit_seconds

            def span(start: int = done, until: float = until) -> Iterator[int]:
                for index in range(start, len(feed.plan)):
                    # Always one, or a commit that takes long would never let the pass go on.
                    if index > start and (sink.full or time.monotonic() > until):
                        return
                    yield index

            for index, results in _pipeline(pool, work, feed, span()):
                members = feed.plan[index]
                sink.take(members, results)
                phase.advance(1, sum(feed.lengths[n] for n in members))
                done = index + 1
            rows = rows + sink.commit(f"{place}/{done:07d}")
            if done < len(feed.plan):
                stale = sums
                sums = [f"{place}/{done:07d}/stage-{s}.safetensors" for s in range(pool.stages)]
                for handle in [pool.call(s, "commit", store, name) for s, name in enumerate(sums)]:
                    pool.get(handle)
                _write_commit(store, place, mark, done, rows, sums, finished=False)
                for name in stale:
                    store.delete(name)
        if not finished:
            # Results first, then the word that they are there.
            for handle in [pool.call(s, "finish") for s in range(pool.stages)]:
                pool.get(handle)
            _write_commit(store, place, mark, done, rows, [], finished=True)
            for name in sums:
                store.delete(name)
    return rows


def _pipeline(
    pool: Pool, work: Pass, feed: Feed, span: Iterator[int]
) -> Iterator[tuple[int, list[Results]]]:
    """Submit operations as the schedule says; yields microbatches as they end, in order."""
    last = pool.stages - 1
    backward = work.target != "nothing"
    batches: dict[int, Any] = {}
    hidden: dict[int, Any] = {}
    gradients: dict[int, Any] = {}
    results: dict[int, list[Any]] = {}
    ended: deque[int] = deque()
    for operation in pipelined(pool.stages, span):
        m, stage = operation.microbatch, operation.stage
        if operation.kind == "forward":
            if stage == 0:
                batches[m] = pool.put(feed.read(m, feed.plan[m]))
                results[m] = []
            hidden[m] = pool.call(stage, "forward", batches[m], hidden.pop(m, None))
            continue
        if operation.kind == "turn":
            if last == 0:
                batches[m] = pool.put(feed.read(m, feed.plan[m]))
                results[m] = []
            gradients[m], found = pool.call(
                stage, "turn", batches.pop(m), hidden.pop(m, None), returns=2
            )
            results[m].append(found)
        elif backward:
            gradients[m], found = pool.call(stage, "backward", m, gradients.pop(m), returns=2)
            results[m].append(found)
        if stage == 0:
            gradients.pop(m, None)
            ended.append(m)
        # Bounded in flight: no more than the pipeline holds, twice, waits to be collected.
        while len(ended) > pool.stages:
            yield _collect(pool, ended.popleft(), results)
    while ended:
        yield _collect(pool, ended.popleft(), results)


def _collect(pool: Pool, m: int, results: dict[int, list[Any]]) -> tuple[int, list[Results]]:
    # Stages answered from the last to the first.
    return m, [pool.get(handle) for handle in reversed(results.pop(m))]


def last_commit(store: Store, place: str, mark: str) -> dict[str, Any] | None:
    """What a pass's last commit says, if it is of the plan so marked and its files are there."""
    said = store.read_json(f"{place}/commit.json")
    if said is None or said["plan"] != mark:
        return None
    if not all(store.exists(name) for name in (*said["rows"], *said["sums"])):
        return None
    found: dict[str, Any] = said
    return found


def _write_commit(
    store: Store,
    place: str,
    mark: str,
    done: int,
    rows: list[str],
    sums: list[str],
    finished: bool,
) -> None:
    store.write_json(
        f"{place}/commit.json",
        {
            "done": done,
            "plan": mark,
            "rows": rows,
            "sums": sums,
            "finished": finished,
        },
    )


def plan_mark(plan: Sequence[tuple[int, ...]]) -> str:
    """Tells plans apart: another --batch-tokens makes other microbatches."""
    return hashlib.blake2b(json.dumps(plan).encode(), digest_size=16).hexdigest()


def sum_stages(results: list[Results], key: str) -> Tensor | None:
    """The sum over stages of what each gave under ``key``, in float64; ``None`` if none did."""
    found = [r[key].double() for r in results if key in r]
    return torch.stack(found).sum(dim=0) if found else None
