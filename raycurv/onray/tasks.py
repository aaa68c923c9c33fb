"""Functions as tasks over the whole cluster: the longest first, on whatever is idle, elsewhere
again when a process dies.

Actors and tasks take turns: while a phase of tasks runs, the cores that actors reserve are idle, so
tasks are sent to those, pinned to their node; and to the cluster's free cores, by Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycurv.errors import RaycurvError
from raycurv.onray.actor import run_task
from raycurv.onray.connection import nodes
from raycurv.onray.metrics import DriverMetrics
from raycurv.onray.places import Places
from raycurv.stages.dealing import Slot, next_task
from raycurv.stages.failures import RUN, Failures, Limits
from raycurv.stages.pool import Need, Say
from raycurv.stages.spans import Span, SpanLog

# What says that a task's process or what it held is gone, and not that it went wrong.
TASK_LOST = (
    WorkerCrashedError, OutOfMemoryError, NodeDiedError, ObjectLostError, TaskCancelledError,
)  # fmt: skip
# Slower than any core: what a task may take beyond the time for a hang.
_SLOWEST_FLOPS = 2e8
# Where Ray may choose the node.
_ANYWHERE = ""


@dataclass
class _Running:
    """A task under way, and when it counts as hung."""

    task: int
    need: Need
    slot: Slot
    until: float


@dataclass
class Tasks:
    """Runs functions as Ray tasks, on each of some arguments once.

    Attributes:
        places: of the actors, whose cores are idle; ``None`` without actors.
        say: is told of those that hang.
    """

    places: Places | None
    limits: Limits
    failures: Failures
    metrics: DriverMetrics
    say: Say
    spans: SpanLog

    def run(
        self,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        needs: Sequence[Need] | None,
        gpu: bool,
    ) -> Iterator[tuple[int, tuple[Any, Span]]]:
        """Run a function on each of some arguments; yields (place, (value, span)) as they end.

        Raises:
            RaycurvError: what the function raises; or too many failures.
        """
        needs = needs or [Need()] * len(arguments)
        sizes = [need.memory for need in needs]
        slots = self._slots(gpu, len(arguments))
        memory = {node.id: node.memory for node in nodes()}
        memory[_ANYWHERE] = max(memory.values(), default=0)
        waiting = list(range(len(arguments)))
        shunned: dict[int, set[str]] = {}
        running: dict[Any, _Running] = {}
        name = function.__name__
        try:
            while waiting or running:
                while True:
                    busy = [(r.slot, r.need.memory) for r in running.values()]
                    found = next_task(waiting, slots, busy, sizes, memory, shunned)
                    if found is None:
                        break
                    task, slot = found
                    waiting.remove(task)
                    need = needs[task]
                    options = self._options(slot, need, memory)
                    remote = ray.remote(max_retries=0, **options)(run_task)
                    handle = remote.remote(function, arguments[task], gpu, need.name)
                    until = time.monotonic() + self._may_take(need)
                    running[handle] = _Running(task, need, slot, until)
                left = (*waiting, *(one.task for one in running.values()))
                self.metrics.left(name, sum(needs[task].count for task in left))
                patience = min(r.until for r in running.values()) - time.monotonic()
                done, _ = ray.wait(list(running), num_returns=1, timeout=max(0.0, patience))
                if not done:
                    self._cancel_hung(running)
                    continue
                here = running.pop(done[0])
                try:
                    value = ray.get(done[0])
                except (RayTaskError, *TASK_LOST) as error:
                    cause = cause_of(error)
                    if isinstance(cause, RaycurvError):
                        raise cause from None
                    if not isinstance(cause, TASK_LOST):
                        raise
                    self._again(name, here.need, cause)
                    shunned.setdefault(here.task, set()).add(here.slot.node)
                    waiting.insert(0, here.task)
                    slots = self._slots(gpu, len(arguments))
                    memory |= {node.id: node.memory for node in nodes()}
                    continue
                yield here.task, value
        except Exception:
            # What the others make is kept, and nobody writes when this is over. They are not
            # cancelled: Ray 2.60 ends this process when an answer comes at that moment. A job that
            # is stopped waits for nothing: its tasks end with it.
            if running:
                longest = max(self._may_take(r.need) for r in running.values())
                ray.wait(list(running), num_returns=len(running), timeout=longest)
            raise
        self.metrics.left(name, 0)

    def _slots(self, gpu: bool, most: int) -> list[Slot]:
        """Where one task each can run now: actors' cores, and so many others as are free."""
        if gpu and self.places is not None:
            return [Slot(node, number) for number, (node, _) in enumerate(self.places.gpu_tasks())]
        alive = {node.id for node in nodes()}
        reserved = {} if self.places is None else self.places.cores()
        slots = [
            Slot(node, number)
            for node, cores in reserved.items()
            if node in alive
            for number in range(cores)
        ]
        free = int(ray.available_resources().get("CPU", 0.0) + 1e-3)
        if not slots:
            # Ray starts a task when there is room, however long that takes.
            free = max(free, int(sum(node.cpus for node in nodes())), 1)
        return slots + [Slot(_ANYWHERE, number) for number in range(min(free, most))]

    def _options(self, slot: Slot, need: Need, memory: dict[str, int]) -> dict[str, Any]:
        if self.places is not None and slot.node != _ANYWHERE:
            on_gpus = self.places.gpu_tasks()
            if on_gpus:
                return on_gpus[slot.number][1]
            # The actors' reservation is the tasks' while actors wait.
            strategy = NodeAffinitySchedulingStrategy(slot.node, soft=True)
            return {"num_cpus": 0, "scheduling_strategy": strategy}
        return {"num_cpus": 1, "memory": min(need.memory, memory[_ANYWHERE])}

    def _may_take(self, need: Need) -> float:
        return self.limits.start_seconds + need.flops / _SLOWEST_FLOPS

    def _cancel_hung(self, running: dict[Any, _Running]) -> None:
        now = time.monotonic()
        for handle, one in running.items():
            if now >= one.until:
                self.say(f"task {one.need.name} hangs; it is ended")
                ray.cancel(handle, force=True)
                one.until = now + self._may_take(one.need)

    def _again(self, name: str, need: Need, cause: BaseException) -> None:
        text, now = " ".join(str(cause).split())[:300], time.time()
        what = f"{name} of {need.name}" if need.name else name
        self.metrics.retried("task")
        self.spans.append(Span("task", "lost", -1, now, now, note=f"{what}: {text}"))
        self.failures.count(what, RUN, -1, text)


def cause_of(error: Exception) -> BaseException:
    """What a call raised, where Ray hands that on in an error of its own."""
    cause: BaseException = error.cause if isinstance(error, RayTaskError) else error
    return cause
