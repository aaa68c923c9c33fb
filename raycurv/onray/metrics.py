"""What Ray's Prometheus endpoint shows of a job, by actor.

Ray puts ``ray_`` before the names, and ``_total`` behind those of counters where it is asked to.
"""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge

from raycurv.batch import Batch
from raycurv.stages.spans import Span

# Each microbatch comes by a stage once in one of these; what else takes one looks at it only.
_FORWARD = ("forward", "turn")
# Gauges of their own.
_NAMED = {"decompose_factors": "eigendecompositions"}


class ActorMetrics:
    """The metrics of one stage's actor."""

    def __init__(self, name: str) -> None:
        self._tags = {"actor": name}
        spent = "Seconds of an actor that went into computing, transport and waiting for work."
        tokens = "Tokens, without padding, that came by an actor on their way forward."
        microbatches = "Microbatches that came by an actor on their way forward."
        memory = "Anonymous resident memory of an actor."
        self._seconds = Counter("raycurv_seconds", spent, tag_keys=("actor", "kind"))
        self._tokens = Counter("raycurv_tokens", tokens, tag_keys=("actor",))
        self._microbatches = Counter("raycurv_microbatches", microbatches, tag_keys=("actor",))
        self._memory = Gauge("raycurv_memory_bytes", memory, tag_keys=("actor",))
        self._ended: float | None = None

    def note(self, span: Span) -> None:
        """An operation has ended."""
        if self._ended is not None:
            self._count("wait", span.start - self._ended)
        self._count("transport", span.transport)
        self._count("compute", span.end - span.start - span.transport)
        self._ended = span.end
        self._memory.set(span.memory, self._tags)

    def passed(self, method: str, args: tuple[Any, ...]) -> None:
        """A method was called with these arguments, packed; a microbatch counts on its way
        forward, tokens where there are any, examples otherwise."""
        if method in _FORWARD and args and isinstance(args[0], Batch):
            batch: Any = args[0]
            self._microbatches.inc(1, self._tags)
            tokens = len(batch.ids) if batch.mask is None else int(batch.mask.data.sum())
            self._tokens.inc(tokens, self._tags)

    def _count(self, kind: str, seconds: float) -> None:
        if seconds > 0:
            self._seconds.inc(seconds, {**self._tags, "kind": kind})


class DriverMetrics:
    """The metrics of the driver."""

    def __init__(self) -> None:
        retries = "Actors built again and tasks run again after a failure."
        self._failures = Counter("raycurv_retries", retries, tag_keys=("what",))
        left = "Tasks that have not ended yet."
        self._tasks = Gauge("raycurv_tasks_left", left, tag_keys=("task",))
        self._named = {
            task: Gauge(f"raycurv_{name}_left", f"{name.capitalize()} that have not ended yet.")
            for task, name in _NAMED.items()
        }

    def retried(self, what: str) -> None:
        """An actor or a task is tried again."""
        self._failures.inc(1, {"what": what})

    def left(self, task: str, count: int) -> None:
        """So many tasks of a kind have not ended."""
        self._tasks.set(count, {"task": task})
        if task in self._named:
            self._named[task].set(count)
