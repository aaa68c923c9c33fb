"""Drive one pass through the resident stages: its results to a sink, commits in between.

A commit is a point where the pipeline is empty: every stage writes its sums, the sink its rows, and
then one small JSON file says so. A restart goes on from there; what is not in that file does not
exist.

    PLACE/commit.json          microbatches done, the plan, the files
    PLACE/00042/stage-0.safetensors, rows.parquet
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from raycurv.batch import Batch
from raycurv.driver.progress import Phase, Reporter
from raycurv.files.spool import LostSpool
from raycurv.files.store import Store
from raycurv.stages.pool import Pool
from raycurv.stages.schedule import pipelined
from raycurv.stages.stage import Pass

Results = dict[str, Tensor]

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


class NoSink:
    """Takes nothing: other groups of stages have their part of the results still to add."""

    full = False

    def take(self, members: Sequence[int], results: Results) -> None:
        pass

    def commit(self, name: str) -> list[str]:
        return []


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

    def tokens(self, microbatch: int) -> int:
        """Tokens of a microbatch, without padding."""
        return sum(self.lengths[n] for n in self.plan[microbatch])


@dataclass(frozen=True)
class Given:
    """What enters the resident stages with a microbatch.

    Attributes:
        hidden: for the first of them; ``None`` if it embeds the inputs.
        gradient: for the last of them, ``[draws, ...]``; ``None`` if it starts from the loss.
        carried: what the stages behind them found.
    """

    hidden: Tensor | None = None
    gradient: Tensor | None = None
    carried: Mapping[str, Tensor] = field(default_factory=dict)


class Ends(Protocol):
    """What lies before and behind the resident stages."""

    @property
    def keeps(self) -> bool:
        """Whether the tensor that leaves is wanted."""
        ...

    def load(self, microbatch: int) -> Given:
        """What enters.

        Raises:
            LostSpool: it has to be made again.
        """
        ...

    def leave(self, microbatch: int, tensor: Tensor | None, results: Results) -> None:
        """Take what leaves: hidden states, or gradients; and all that was found so far."""
        ...


class ModelEnds:
    """All stages are resident: nothing enters but the inputs, nothing leaves but results."""

    keeps = False

    def load(self, microbatch: int) -> Given:
        return Given()

    def leave(self, microbatch: int, tensor: Tensor | None, results: Results) -> None:
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
        LostSpool: of a microbatch that is to come; those before it are committed.
    """
    mark = plan_mark(feed.plan)
    before = last_commit(store, place, mark)
    done = before["done"] if before else 0
    rows: list[str] = before["rows"] if before else []
    if before is not None and before["finished"]:
        return rows
    sums: list[str] = before["sums"] if before else []
    begin(pool, work, (store, sums) if sums else None)
    lost: LostSpool | None = None
    writing = 0.0
    with reporter.phase(label, len(feed.plan), "microbatches") as phase:
        phase.advance(done)
        while done < len(feed.plan):
            wait = commit_seconds or max(COMMIT_SECONDS, _COMMIT_TIMES * writing)
            until = time.monotonic() + wait

            def span(start: int = done, until: float = until) -> Iterator[tuple[int, Given]]:
                nonlocal lost
                for index in range(start, len(feed.plan)):
                    # Always one, or a commit that takes long would never let the pass go on.
                    if index > start and (sink.full or time.monotonic() > until):
                        return
                    try:
                        given = ends.load(index)
                    except LostSpool as found:
                        # What is under way comes to its end before it is made again.
                        lost = found
                        return
                    yield index, given

            for index in through(pool, work, feed, ends, sink, span(), phase):
                done = index + 1
            started = time.monotonic()
            rows = rows + sink.commit(f"{place}/{done:07d}")
            if done < len(feed.plan):
                stale = sums
                sums = [f"{place}/{done:07d}/stage-{s}.safetensors" for s in range(pool.stages)]
                for handle in [pool.call(s, "commit", store, name) for s, name in enumerate(sums)]:
                    pool.get(handle)
                _write_commit(store, place, mark, done, rows, sums, finished=False)
                for name in set(stale) - set(sums):
                    store.delete(name)
            writing = time.monotonic() - started
            if lost is not None:
                raise lost
        # Results first, then the word that they are there.
        for handle in [pool.call(s, "finish") for s in range(pool.stages)]:
            pool.get(handle)
        _write_commit(store, place, mark, done, rows, [], finished=True)
        for name in sums:
            store.delete(name)
    return rows


def begin(pool: Pool, work: Pass, commits: tuple[Store, Sequence[str]] | None = None) -> None:
    """Tell all stages which pass comes, and the files of the commit from which it goes on."""
    for handle in [pool.call(s, "begin", work, commits) for s in range(pool.stages)]:
        pool.get(handle)


def through(
    pool: Pool,
    work: Pass,
    feed: Feed,
    ends: Ends,
    sink: Sink,
    span: Iterable[tuple[int, Given]],
    phase: Phase,
) -> Iterator[int]:
    """Take microbatches through the stages; yields each when its results have been taken.

    Args:
        span: the microbatches, ascending, drawn from when the first stage can take the next one.
    """
    for index, given, leaving, found in _pipeline(pool, work, feed, ends.keeps, span):
        results = combine([*found, dict(given.carried)])
        ends.leave(index, leaving, results)
        sink.take(feed.plan[index], results)
        phase.advance(1, feed.tokens(index))
        yield index


@dataclass
class _Under:
    """A microbatch on its way: what was given with it, and handles of what it leaves."""

    given: Given
    batch: Any
    hidden: Any
    gradient: Any = None
    results: list[Any] = field(default_factory=list)


def _pipeline(
    pool: Pool, work: Pass, feed: Feed, keeps: bool, span: Iterable[tuple[int, Given]]
) -> Iterator[tuple[int, Given, Tensor | None, list[Results]]]:
    """Submit operations as the schedule says; yields microbatches as they end, in order."""
    backward = work.target != "nothing"
    under: dict[int, _Under] = {}
    ended: deque[int] = deque()

    def source() -> Iterator[int]:
        for m, given in span:
            hidden = None if given.hidden is None else pool.put(given.hidden)
            under[m] = _Under(given, pool.put(feed.read(m, feed.plan[m])), hidden)
            yield m

    def collect(m: int) -> tuple[int, Given, Tensor | None, list[Results]]:
        found = under.pop(m)
        leaving = pool.get(found.gradient) if keeps else None
        # Stages answered from the last to the first.
        return m, found.given, leaving, [pool.get(handle) for handle in reversed(found.results)]

    for operation in pipelined(pool.stages, source()):
        m, stage = operation.microbatch, operation.stage
        here = under[m]
        if operation.kind == "forward":
            here.hidden = pool.call(stage, "forward", here.batch, here.hidden)
            continue
        if operation.kind == "turn":
            back = None if here.given.gradient is None else pool.put(here.given.gradient)
            here.gradient, found = pool.call(
                stage, "turn", here.batch, here.hidden, back, returns=2
            )
            here.results.append(found)
            here.batch = here.hidden = None
        elif backward:
            here.gradient, found = pool.call(stage, "backward", m, here.gradient, returns=2)
            here.results.append(found)
        if stage == 0:
            ended.append(m)
        # Bounded in flight: no more than the pipeline holds, twice, waits to be collected.
        while len(ended) > pool.stages:
            yield collect(ended.popleft())
    while ended:
        yield collect(ended.popleft())


def combine(results: Sequence[Results]) -> Results:
    """What consecutive stages found as one: sums in float64; blocks side by side; the last's own.

    ``loss`` and ``drawn`` come from the model's last stage; ``block_scores [N, Q, B]`` are joined
    along B; everything else is a sum over stages.
    """
    combined: Results = {}
    for key in dict.fromkeys(key for found in results for key in found):
        parts = [found[key] for found in results if key in found]
        if key in ("loss", "drawn"):
            (combined[key],) = parts
        elif key == "block_scores":
            combined[key] = torch.cat(parts, dim=2)
        else:
            combined[key] = torch.stack([part.double() for part in parts]).sum(dim=0)
    return combined


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
