"""Stages as actors of a Ray cluster.

An actor dies for good (Ray must not restart it: its sums would be lost without a word). A new one
is built in its place, restored from the last commit and given what it lacks, by whoever drives the
pass; this file finds out who is gone or hangs, and builds.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycurv.errors import LostPeer, OutOfOrder, RaycurvError
from raycurv.mathematics.blocks import Block
from raycurv.models.model import Model
from raycurv.onray.actor import Answer, StageActor
from raycurv.onray.connection import connect
from raycurv.onray.metrics import DriverMetrics
from raycurv.onray.places import Places, demand_of
from raycurv.onray.tasks import TASK_LOST, Tasks, cause_of
from raycurv.stages.failures import Failures, Limits
from raycurv.stages.pool import Handle, Need, Pool, Say, StageCalls, StageLost
from raycurv.stages.spans import Span, SpanLog, actor_name
from raycurv.stages.stage import StageSpec
from raycurv.stages.transport import pack, unpack

T = TypeVar("T")
Transport = Literal["auto", "object-store", "distributed"]

# What says that a process or what it held is gone, and not that it went wrong.
LOST = (*TASK_LOST, RayActorError, ActorUnavailableError)
# The part of Ray's message that says how a process ended.
_DETAIL = re.compile(r"Worker exit detail: (.*?\.)(?: Some common causes|$)", re.MULTILINE)
# For a process that was killed to be seen to be gone.
_GONE_SECONDS = 30.0


@dataclass
class _Actor:
    """One actor: its handle, where it is, and which stage it has."""

    handle: Any
    node: str = ""
    pid: int = 0


@dataclass(frozen=True)
class _Pending:
    """A call that may not have ended."""

    number: int
    handle: Any
    method: str
    microbatch: int


class OnRay(Pool):
    """Stages as actors and functions as tasks of a Ray cluster.

    Args:
        address: see :func:`raycurv.onray.connection.connect`.
        cpus: cores that a stage's actor reserves, see :func:`raycurv.onray.places.demand_of`.
        say: is told of what is no span: that there is no room, that an actor hangs.
        transport: how hidden states and gradients go from stage to stage: through Ray's object
            store, from process to process, or ``auto``, which is the latter on GPUs.
    """

    def __init__(
        self,
        address: str,
        cpus: float | None = None,
        own: bool = True,
        limits: Limits | None = None,
        transport: Transport = "auto",
        say: Say = lambda text: None,
    ) -> None:
        self.spans = SpanLog()
        self._owner = connect(address)
        self._cpus, self._own, self._say, self._transport = cpus, own, say, transport
        self._limits = limits or Limits()
        self.failures = Failures(self._limits)
        self._places: Places | None = None
        self._actors: list[list[_Actor]] = []
        self._specs: list[StageSpec] = []
        self._numbers = itertools.count()
        # Replica and stage -> calls by their tasks, in the order in which the actor answers.
        self._pending: defaultdict[tuple[int, int], dict[Any, _Pending]] = defaultdict(dict)
        self._metrics = DriverMetrics()
        # By which the stages' processes know each other.
        self._token, self._strangers_said = secrets.token_bytes(32), False

    @property
    def stages(self) -> int:
        return len(self._specs)

    @property
    def replicas(self) -> int:
        return len(self._actors)

    def start(self, specs: Sequence[StageSpec], replicas: int = 1) -> None:
        if replicas != len(self._actors) or len(specs) > len(self._actors[0]):
            self.stop()
            self._place(len(specs), replicas, specs[0].device != "cpu")
        self._specs = list(specs)
        for replica in range(replicas):
            # Actors stay from one group of stages to the next: a process takes seconds to start.
            for stage in range(len(specs), len(self._actors[replica])):
                self._actors[replica][stage].handle.drop.remote()
        self._build([(r, s) for r in range(replicas) for s in range(len(specs))])
        for replica in range(replicas):
            try:
                self._linked(replica)
            except StageLost as lost:
                self.repair(replica, lost)

    def assign(self, blocks: Sequence[tuple[Block, ...]]) -> None:
        self._specs = [
            replace(spec, blocks=mine) for spec, mine in zip(self._specs, blocks, strict=True)
        ]
        self._tell(lambda calls, stage: calls.assign(blocks[stage]))

    def become(self, model: Model) -> None:
        self._specs = [replace(spec, model=model) for spec in self._specs]
        self._tell(lambda calls, stage: calls.become(model))

    def _tell(self, told: Callable[[StageCalls, int], Handle[None]]) -> None:
        """Tell every stage, in a call of its own, what its spec says already."""
        for replica in range(self.replicas):
            for stage in range(self.stages):
                handle = told(self.at(stage, replica), stage)
                try:
                    self.get(handle)
                except StageLost as lost:
                    # What is built again is built as the spec says.
                    self.repair(replica, lost)

    def call(
        self,
        stage: int,
        replica: int,
        method: str,
        *args: Any,
        returns: int = 1,
        to: int | None = None,
        microbatch: int = -1,
    ) -> Any:
        packed = tuple(a if isinstance(a, ray.ObjectRef) else pack(a) for a in args)
        actor = self._actors[replica][stage].handle
        handle = actor.call.options(num_returns=returns).remote(method, returns, to, *packed)
        last = handle[-1] if returns > 1 else handle
        pending = _Pending(next(self._numbers), last, method, microbatch)
        self._pending[replica, stage][last.task_id()] = pending
        return tuple(handle) if returns > 1 else handle

    def put(self, value: T) -> Handle[T]:
        return cast("Handle[T]", ray.put(pack(value)))

    def get(self, handle: Handle[T]) -> T:
        self._await(handle)
        try:
            value = ray.get(handle)
        except (RayTaskError, *LOST) as error:
            cause = cause_of(error)
            if isinstance(cause, (*LOST, LostPeer, OutOfOrder)):
                raise StageLost(_first_line(cause)) from error
            if isinstance(cause, RaycurvError):
                raise cause from None
            raise
        self._ended(handle)
        if isinstance(value, Answer):
            self.spans.extend(value.spans)
            value = value.value
        return cast("T", unpack(value))

    def repair(self, replica: int, lost: StageLost | None) -> tuple[int, ...]:
        began = time.time()
        doing = {stage: self._doing(replica, stage) for stage in range(self.stages)}
        # On the main queue, behind everything that was asked for before.
        answers = [actor.handle.abort.remote() for actor in self._of(replica)]
        gone: dict[int, str] = {}
        for stage, answer in enumerate(answers):
            try:
                ray.get(answer, timeout=self._limits.hang_seconds)
            except GetTimeoutError:
                gone[stage] = f"no answer for {self._limits.hang_seconds:g} s"
                self._kill(self._actors[replica][stage])
            except (*LOST, RayTaskError) as error:
                if not isinstance(cause_of(error), LOST):
                    raise
                gone[stage] = _first_line(error)
        for (other, _), calls in self._pending.items():
            if other == replica:
                calls.clear()
        if not gone and lost is not None:
            # What was lost is an object: its node went, or it was not kept.
            self._lost(f"replica {replica}", "a tensor on its way", str(lost), began=began)
        for stage, cause in gone.items():
            call = doing[stage]
            method, microbatch = ("idle", -1) if call is None else (call.method, call.microbatch)
            self._lost(actor_name(replica, stage), method, cause, microbatch, began)
        for stage in gone:
            self._renew(replica, stage)
        self._build([(replica, stage) for stage in gone])
        ended = time.time()
        for stage in gone:
            self.spans.append(Span(actor_name(replica, stage), "rebuild", -1, began, ended))
        try:
            self._linked(replica)
        except StageLost as again:
            return tuple(sorted({*gone, *self.repair(replica, again)}))
        return tuple(gone)

    def map(
        self,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        needs: Sequence[Need] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        tasks = Tasks(
            self._places, self._limits, self.failures, self._metrics, self._say, self.spans
        )
        gpu = bool(self._specs) and self._specs[0].device != "cpu"
        for place, (value, span) in tasks.run(function, arguments, needs, gpu):
            self.spans.append(span)
            yield place, value

    def stop(self) -> None:
        for actors in self._actors:
            for actor in actors:
                ray.kill(actor.handle)
        if self._places is not None:
            self._places.remove()
        self._actors, self._specs, self._places = [], [], None
        self._pending.clear()

    def close(self) -> None:
        super().close()
        if self._owner:
            ray.shutdown()

    def pids(self) -> dict[str, int]:
        """The process of every actor, by its name."""
        return {
            actor_name(replica, stage): actor.pid
            for replica, actors in enumerate(self._actors)
            for stage, actor in enumerate(actors)
        }

    # Places and processes

    def _of(self, replica: int) -> list[_Actor]:
        return self._actors[replica][: self.stages]

    def _place(self, stages: int, replicas: int, gpu: bool) -> None:
        """An actor for each stage of each replica, with a place in the cluster."""
        demand = demand_of(stages * replicas, self._cpus, gpu, self._own)
        self._places = Places(replicas, stages, demand, self._limits.place_seconds, self._say)
        self._actors = [[self._started(r, s) for s in range(stages)] for r in range(replicas)]
        for replica in range(replicas):
            for stage in range(stages):
                self._settle(replica, stage)

    def _started(self, replica: int, stage: int) -> _Actor:
        assert self._places is not None
        options = self._places.options(replica, stage)
        remote = ray.remote(max_restarts=0, max_task_retries=0, **options)(StageActor)
        return _Actor(remote.remote(replica, stage))

    def _settle(self, replica: int, stage: int) -> None:
        """Wait until an actor answers, and note where it is; one that dies has another in its
        place."""
        actor = self._actors[replica][stage]
        ready = actor.handle.ready.remote()
        try:
            actor.node, actor.pid = ray.get(ready, timeout=self._limits.start_seconds)
        except (*LOST, GetTimeoutError) as error:
            self._lost(actor_name(replica, stage), "start", _first_line(error))
            self._renew(replica, stage)

    def _renew(self, replica: int, stage: int) -> None:
        """A new actor in the place of one that is gone."""
        assert self._places is not None
        ray.kill(self._actors[replica][stage].handle)
        self._places.wait()
        self._actors[replica][stage] = self._started(replica, stage)
        self._settle(replica, stage)

    def _build(self, lacking: Sequence[tuple[int, int]]) -> None:
        """Build stages in their actors; one whose actor dies of it is built in another."""
        while lacking:
            built = [self._actors[r][s].handle.build.remote(self._specs[s]) for r, s in lacking]
            failed = []
            for (replica, stage), handle in zip(lacking, built, strict=True):
                try:
                    if not ray.wait([handle], timeout=self._limits.start_seconds)[0]:
                        self._kill(self._actors[replica][stage])
                    self.get(handle)
                except StageLost as lost:
                    self._lost(actor_name(replica, stage), "load", str(lost))
                    failed.append((replica, stage))
            for replica, stage in failed:
                self._renew(replica, stage)
            lacking = failed

    def _linked(self, replica: int) -> None:
        """Link the stages of a replica, if tensors go from one to the next without Ray; StageLost
        if one of them was lost meanwhile."""
        distributed = self._transport == "distributed" or (
            self._transport == "auto" and self._specs[0].device != "cpu"
        )
        if not distributed or self.stages == 1:
            return
        actors = self._of(replica)
        epoch = f"replica-{replica}-{next(self._numbers)}"
        try:
            alone = len({actor.node for actor in actors}) == 1
            asked = [actor.handle.open.remote(alone) for actor in actors]
            cards = ray.get(asked, timeout=self._limits.start_seconds)
            links = [
                actor.handle.link.remote(rank, cards, epoch, self._token, self._limits.hang_seconds)
                for rank, actor in enumerate(actors)
            ]
            strangers = sum(ray.get(links, timeout=self._limits.start_seconds))
        except (*LOST, GetTimeoutError, RayTaskError) as error:
            cause = cause_of(error)
            if not isinstance(cause, (*LOST, LostPeer, GetTimeoutError)):
                raise
            raise StageLost(_first_line(cause)) from error
        if strangers and not self._strangers_said:
            self._strangers_said = True
            self._say(
                f"{strangers} connections to ports of replica {replica} came from somebody who is "
                "not of this job: they were turned away"
            )

    def _kill(self, actor: _Actor) -> None:
        """End a process that does not answer, wherever it is."""
        ray.kill(actor.handle)
        here = NodeAffinitySchedulingStrategy(actor.node, soft=False)
        remote = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(_end_process)
        try:
            ray.get(remote.remote(actor.pid), timeout=_GONE_SECONDS)
        except (RayError, GetTimeoutError):
            return  # its node is gone as well

    # What is under way

    def _ended(self, handle: Any) -> None:
        """Forget a call that has ended, and those before it: an actor answers in order."""
        task = handle.task_id()
        for calls in self._pending.values():
            if task in calls:
                for before in list(itertools.takewhile(lambda other: other != task, calls)):
                    del calls[before]
                del calls[task]
                return

    def _doing(self, replica: int, stage: int) -> _Pending | None:
        """What an actor is at, or was when it died: the first call without an answer."""
        for call in self._pending[replica, stage].values():
            if not ray.wait([call.handle], timeout=0)[0]:
                return call
            try:
                ray.get(call.handle)
            except Exception:
                return call
        return None

    def _await(self, handle: Any) -> None:
        """Wait for a handle while anything goes on; StageLost if an actor hung, and was ended."""
        before: set[Any] = set()
        while not ray.wait([handle], timeout=self._limits.hang_seconds / 2)[0]:
            now = self._unanswered()
            if now and now == before:
                self._end_hung(now)
                raise StageLost("an actor hung")
            before = now

    def _unanswered(self) -> set[Any]:
        calls = [call.handle for calls in self._pending.values() for call in calls.values()]
        if not calls:
            return set()
        return set(ray.wait(calls, num_returns=len(calls), timeout=0)[1])

    def _end_hung(self, unanswered: set[Any]) -> None:
        """End the actor whose call is the first without an answer: it waits for nobody."""
        waiting = [
            (call.number, place, call)
            for place, calls in self._pending.items()
            for call in calls.values()
            if call.handle in unanswered
        ]
        _, (replica, stage), call = min(waiting)
        at = f" of microbatch {call.microbatch}" if call.microbatch >= 0 else ""
        self._say(
            f"{actor_name(replica, stage)} hangs in {call.method}{at}: no progress for "
            f"{self._limits.hang_seconds:g} s; it is ended"
        )
        self._kill(self._actors[replica][stage])

    def _lost(
        self, who: str, method: str, cause: str, microbatch: int = -1, began: float | None = None
    ) -> None:
        began = time.time() if began is None else began
        self._metrics.retried("actor")
        self.spans.append(Span(who, "lost", microbatch, began, began, note=f"{method}: {cause}"))
        self.failures.count(who, method, microbatch, cause)


def _end_process(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _first_line(error: BaseException) -> str:
    """What Ray says of a loss, without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    detail = _DETAIL.search(str(error))
    text = " ".join(lines[:1] + ([detail[1].strip()] if detail else []))
    return text[:300] or type(error).__name__
