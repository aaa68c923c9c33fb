"""A stage's actor: what comes in is unpacked, what goes out is packed, and every call is timed."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch

from raycurv.errors import RaycurvError
from raycurv.links.links import Card, Links, Ticket
from raycurv.onray.metrics import ActorMetrics
from raycurv.stages.heap import give_back, give_back_at_once
from raycurv.stages.spans import Span, actor_name, timed
from raycurv.stages.stage import Stage, StageSpec
from raycurv.stages.transport import pack, unpack

# What these give is taken by another actor, never by the driver.
_BETWEEN = ("forward", "result", "joined")


@dataclass(frozen=True)
class Answer:
    """What the driver collects of a call: its value, and what the actor did since the last one."""

    value: Any
    spans: tuple[Span, ...]


class StageActor:
    """A stage behind the transport."""

    def __init__(self, replica: int, stage: int) -> None:
        self._name = actor_name(replica, stage)
        self._stage: Stage | None = None
        self._links: Links | None = None
        self._server: socket.socket | None = None
        self._spans: list[Span] = []
        self._metrics = ActorMetrics(self._name)

    def ready(self) -> tuple[str, int]:
        """Answers once the actor has a place: the node that it is on, and its process."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def build(self, spec: StageSpec) -> Answer:
        """Build the stage, once the one that was there has gone.

        Not in the constructor: of what that raises, Ray hands on the text alone.
        """
        self.drop()
        spec = replace(spec, device=self._device(spec.device))
        self._stage, span = timed(self._name, "load", Stage, (spec,))
        self._note(span)
        return Answer(None, self._taken())

    def open(self, alone: bool) -> Card:
        """Where the replica's neighbouring stages reach this one, until they are linked.

        Args:
            alone: whether all of them are on one machine, which nothing leaves then.
        """
        self._unlink()
        host = "127.0.0.1" if alone else ray.util.get_node_ip_address()
        card, self._server = Links.open(host, self._where())
        return card

    def link(
        self, rank: int, cards: Sequence[Card], epoch: str, token: bytes, timeout: float
    ) -> int:
        """Link the stage to its neighbours, all of which are asked at the same time; gives how many
        strangers came in their place.

        Args:
            rank: its place among the replica's resident stages.
            cards: what all of them gave to :meth:`open`.
            epoch: never used before.
            token: known to this job's processes alone.
            timeout: seconds without an answer after which a neighbour counts as lost.
        """
        server, self._server = self._server, None
        assert server is not None
        self._links = Links(rank, cards, server, epoch, token, self._where(), timeout)
        return self._links.strangers

    def drop(self) -> None:
        """Let the stage go, and its memory."""
        self._unlink()
        if self._stage is not None:
            self._stage = None
            give_back()

    def call(self, method: str, returns: int, to: int | None, *args: Any) -> Any:
        """Call a method of the stage.

        The last of what it gives is an :class:`Answer`, unless it goes to another actor.

        Args:
            to: the stage that the first of what it gives goes to, if it goes to one alone.
        """
        called: Callable[..., Any] = getattr(self._stage, method)

        def leave(value: Any) -> Any:
            if self._links is None or to is None:
                return pack(value)
            hidden = value if returns == 1 else value[0]
            sent = tuple(self._links.send(tensor, to) for tensor in hidden)
            return sent if returns == 1 else (sent, *pack(value[1:]))

        value, span = timed(self._name, method, called, args, self._enter, leave)
        self._note(span)
        self._metrics.passed(method, args)
        if method in _BETWEEN:
            return value
        if returns == 1:
            return Answer(value, self._taken())
        return (*value[:-1], Answer(value[-1], self._taken()))

    def abort(self) -> None:
        """Drop what is under way."""
        self._unlink()
        if self._stage is not None:
            self._stage.abort()

    def _enter(self, value: Any) -> Any:
        if isinstance(value, tuple) and value and isinstance(value[0], Ticket):
            assert self._links is not None
            return tuple(self._links.receive(ticket) for ticket in value)
        return unpack(value)

    def _unlink(self) -> None:
        if self._links is not None:
            self._links.close()
            self._links = None
        if self._server is not None:
            self._server.close()
            self._server = None

    def _where(self) -> torch.device:
        return torch.device("cpu" if self._stage is None else self._stage.spec.device)

    def _note(self, span: Span) -> None:
        self._metrics.note(span)
        self._spans.append(span)

    def _taken(self) -> tuple[Span, ...]:
        """What nobody was told of yet."""
        spans, self._spans = tuple(self._spans), []
        return spans

    def _device(self, wanted: str) -> str:
        return wanted if wanted == "cpu" else assigned_gpu(self._name)


def assigned_gpu(who: str) -> str:
    """The device that Ray has assigned to this process; refused if torch does not see it."""
    ids = ray.get_gpu_ids()
    if not ids:
        raise RaycurvError(
            who, "a GPU assigned by Ray", "none",
            "Run with --device cpu, or on nodes whose GPUs Ray knows (`ray status`).",
        )  # fmt: skip
    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or count == 0:
        raise RaycurvError(
            who, f"GPU {ids[0]}, which Ray assigned, visible to torch",
            f"{count} devices (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r}, "
            f"torch {torch.__version__})",
            "Install a torch with CUDA on the workers, or run with --device cpu.",
        )  # fmt: skip
    # Ray leaves only the assigned devices visible; where it may not, its number is the device's.
    return "cuda:0" if count == len(ids) else f"cuda:{int(ids[0])}"


def run_task(
    function: Callable[..., Any], args: tuple[Any, ...], gpu: bool, note: str
) -> tuple[Any, Span]:
    """Run a function on one thread: as many at once as there are cores beats one at a time."""
    torch.set_num_threads(1)
    give_back_at_once()
    if gpu:
        torch.cuda.set_device(assigned_gpu(f"task {note}"))
    value, span = timed("task", function.__name__, function, args)
    return value, replace(span, note=note)
