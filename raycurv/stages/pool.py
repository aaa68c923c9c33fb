"""Stages and tasks, wherever they run: the face that the driver sees, and the one without Ray."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from threadpoolctl import threadpool_limits

from raycurv.batch import Batch, Hidden
from raycurv.files.store import Store
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.sums import Results
from raycurv.models.model import Model
from raycurv.stages.heap import give_back
from raycurv.stages.passes import Pass
from raycurv.stages.spans import SpanLog, actor_name, timed
from raycurv.stages.stage import Commit, Proof, Stage, StageSpec

# Bytes up to which tasks in one process run beside each other.
_SMALL = 2**28
# Is told what befalls the pool and is no span: waiting for a place, say.
Say = Callable[[str], None]


class StageLost(Exception):
    """A call was not answered: its stage's actor, or one that it depends on, is gone or hangs.

    Not an error of the run: :meth:`Pool.repair` says whether it can go on.
    """


@dataclass(frozen=True)
class Need:
    """What a task takes.

    Attributes:
        memory: bytes.
        flops: floating-point operations, for the time that it may take.
        count: how many of what a phase counts it is about.
    """

    memory: int = 0
    flops: float = 0.0
    name: str = ""
    count: int = 1


T = TypeVar("T")


class Handle(Generic[T]):
    """A value that a call of a stage gives, wherever it lies by now; :meth:`Pool.get` opens it.

    For the type checker: in one process a handle is the value itself, with Ray an object reference.
    """


class StageCalls:
    """The methods of one :class:`~raycurv.stages.stage.Stage` as calls, wherever it runs.

    What a microbatch is made of is given as handles. ``to`` is the stage of the same replica that
    takes the tensors of the result, if only one does; ``microbatch`` is for those who look on.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def discover(
        self, batch: Handle[Batch], hidden: Handle[Hidden] | None
    ) -> tuple[Handle[Hidden], Handle[tuple[Block, ...]]]:
        return self._two("discover", batch, hidden, microbatch=0)

    def compare(
        self, batch: Handle[Batch], hidden: Handle[Hidden] | None, shared: int
    ) -> tuple[Handle[Hidden], Handle[float | None]]:
        return self._two("compare", batch, hidden, shared, microbatch=0)

    def assign(self, blocks: tuple[Block, ...]) -> Handle[None]:
        return self._one("assign", blocks)

    def become(self, model: Model) -> Handle[None]:
        return self._one("become", model)

    def begin(self, work: Pass, commit: Commit | None) -> Handle[None]:
        return self._one("begin", work, commit)

    def forward(
        self, microbatch: int, batch: Handle[Batch], hidden: Handle[Hidden] | None, to: int
    ) -> Handle[Hidden]:
        return self._one("forward", batch, hidden, to=to, microbatch=microbatch)

    def turn(
        self,
        microbatch: int,
        batch: Handle[Batch],
        hidden: Handle[Hidden] | None,
        gradients: Handle[Hidden] | None,
        to: int | None,
    ) -> tuple[Handle[Hidden | None], Handle[Results]]:
        return self._two("turn", batch, hidden, gradients, to=to, microbatch=microbatch)

    def backward(
        self, microbatch: int, gradients: Handle[Hidden | None], to: int | None
    ) -> tuple[Handle[Hidden | None], Handle[Results]]:
        return self._two("backward", microbatch, gradients, to=to, microbatch=microbatch)

    def abort(self) -> Handle[tuple[int, ...]]:
        return self._one("abort")

    def commit(self, store: Store, name: str) -> Handle[None]:
        return self._one("commit", store, name)

    def names(self) -> Handle[list[tuple[str, ...]]]:
        return self._one("names")

    def result(self, name: str) -> Handle[Any]:
        return self._one("result", name)

    def joined(self, left: Handle[Any], right: Handle[Any]) -> Handle[Any]:
        return self._one("joined", left, right)

    def write(self, names: tuple[str, ...], result: Handle[Any] | None = None) -> Handle[None]:
        return self._one("write", names, result)

    def proof(self) -> Handle[Proof]:
        return self._one("proof")

    def finish(self) -> Handle[None]:
        return self._one("finish")

    def _one(self, method: str, *args: Any, **how: Any) -> Handle[Any]:
        found: Handle[Any] = self._call(method, *args, **how)
        return found

    def _two(self, method: str, *args: Any, **how: Any) -> tuple[Handle[Any], Handle[Any]]:
        first, second = self._call(method, *args, returns=2, **how)
        return first, second


class Pool(Protocol):
    """Holds replicas of the stages of a chain and runs tasks beside them.

    Calls give handles; a handle may be given to any later call, and is opened with :meth:`get`.

    Attributes:
        spans: what was done, until somebody takes it.
    """

    spans: SpanLog

    @property
    def stages(self) -> int:
        """How many stages there are."""

    @property
    def replicas(self) -> int:
        """How many copies of each."""

    def start(self, specs: Sequence[StageSpec], replicas: int = 1) -> None:
        """Build the stages, in place of those that were there.

        Raises:
            UserError: a stage cannot load its weights.
            RaycurvError: there is no place for them.
        """

    def assign(self, blocks: Sequence[tuple[Block, ...]]) -> None:
        """Tell every stage, now and whenever it is built again, its blocks with their factors."""

    def become(self, model: Model) -> None:
        """Have every stage, now and whenever it is built again, be of another model that differs
        from its own in patches alone (see :meth:`Stage.become`)."""

    def at(self, stage: int, replica: int = 0) -> StageCalls:
        """The calls of a stage."""
        return StageCalls(partial(self.call, stage, replica))

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
        """Call a method of a stage; gives one handle, or a tuple of ``returns``.

        Args:
            to: the stage of the same replica that takes the tensors of the result, if only one
                does.
            microbatch: for those who look on.
        """

    def put(self, value: T) -> Handle[T]:
        """A handle of a value that many calls take."""

    def get(self, handle: Handle[T]) -> T:
        """The value of a handle; raises what the call raised, or StageLost if it never comes."""

    def repair(self, replica: int, lost: StageLost | None) -> tuple[int, ...]:
        """Build again the stages of a replica whose actors are gone; gives their numbers.

        The others drop what they had under way.

        Args:
            lost: what says that something is, if that is known of this replica.

        Raises:
            RaycurvError: too many actors were lost, one microbatch kills them, or there is no place
                for a new one.
        """

    def map(
        self,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        needs: Sequence[Need] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Run a function on each tuple of arguments, in the order given; yields (place, result) as
        they end. A function may be run again elsewhere when its process dies."""

    def stop(self) -> None:
        """Let the stages go."""

    def close(self) -> None:
        """Let go of everything."""
        self.stop()


class InProcess(Pool):
    """Everything in this process, one call after the other: for debugging, and as an oracle."""

    def __init__(self) -> None:
        self.spans = SpanLog()
        self._replicas: list[list[Stage]] = []

    @property
    def stages(self) -> int:
        return len(self._replicas[0]) if self._replicas else 0

    @property
    def replicas(self) -> int:
        return len(self._replicas)

    def start(self, specs: Sequence[StageSpec], replicas: int = 1) -> None:
        self.stop()
        self._replicas = [[Stage(spec) for spec in specs] for _ in range(replicas)]

    def assign(self, blocks: Sequence[tuple[Block, ...]]) -> None:
        for stages in self._replicas:
            for stage, mine in zip(stages, blocks, strict=True):
                stage.assign(mine)

    def become(self, model: Model) -> None:
        for stages in self._replicas:
            for stage in stages:
                stage.become(model)

    def call(self, stage: int, replica: int, method: str, *args: Any, **how: Any) -> Any:
        called = getattr(self._replicas[replica][stage], method)
        value, span = timed(actor_name(replica, stage), method, called, args)
        self.spans.append(span)
        return value

    def put(self, value: T) -> Handle[T]:
        return cast("Handle[T]", value)

    def get(self, handle: Handle[T]) -> T:
        return cast("T", handle)

    def repair(self, replica: int, lost: StageLost | None) -> tuple[int, ...]:
        raise AssertionError("nothing is lost in one process") from lost

    def map(
        self,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        needs: Sequence[Need] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        def run(i: int) -> tuple[int, Any]:
            value, span = timed("task", function.__name__, function, arguments[i])
            self.spans.append(replace(span, note="" if needs is None else needs[i].name))
            return i, value

        threads, count = torch.get_num_threads(), len(arguments)
        small = [i for i in range(count) if needs is not None and needs[i].memory <= _SMALL]
        yield from (run(i) for i in sorted(set(range(count)) - set(small)))
        if threads == 1 or len(small) < 2:
            yield from map(run, small)
            return
        # Several with a thread each take less time of each core than one with all: its threads wait
        # for one another, in loops, at thousands of small steps.
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
            running = [pool.submit(run, i) for i in small]
            try:
                yield from (done.result() for done in as_completed(running))
            finally:
                pool.shutdown(cancel_futures=True)

    def stop(self) -> None:
        if self._replicas:
            modules = [weakref.ref(stage.module) for stages in self._replicas for stage in stages]
            self._replicas = []
            give_back(collect=any(module() is not None for module in modules))
