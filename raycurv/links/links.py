"""Links: tensors between the neighbouring stages of one replica, from process to process.

What is sent stays with the sender until the receiver asks for it: the ticket goes ahead (through
whatever carries calls), the receiver names the ticket's number over the connection of that
direction, the sender answers, and the bytes follow: over the connection itself through the memory
of the CPUs, or by NCCL from GPU to GPU. So no transfer waits on a device for the other end to come,
memory is bounded by what the schedule leaves unasked for, and a death is seen as a connection that
closes, whatever carries the bytes.

    send ──► ticket ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─► receive
      kept                                     │
       │  ◄──────── number ────────────────────┤
       ├──────────── number ──────────────────►│
       └──────────── bytes (TCP or NCCL) ─────►└──► tensor
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from raycurv.errors import LostPeer, OutOfOrder
from raycurv.links.nccl import NcclCarrier, gpu_name, nccl_between, open_store
from raycurv.links.tcp import Connection, TcpCarrier, accept, connect, serve

_c10d: Any = torch.distributed

# For threads to end when links close; one that hangs in a transfer ends by its timeout.
_JOIN_SECONDS = 1.0


@dataclass(frozen=True)
class Ticket:
    """Travels in a sent tensor's place; ``number`` counts from 0 in its direction."""

    epoch: str
    source: int
    target: int
    number: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Card:
    """Where a process waits for its neighbours, and the GPU that it computes on, if any."""

    host: str
    port: int
    gpu: str


class Links:
    """One process's links to its neighbours in a chain of processes.

    All ranks of the chain make theirs at about the same time, and wait for each other. Afterwards
    ``send`` and ``receive`` are for one thread, while ``close`` may come from any.

    Args:
        rank: this process's place in the chain.
        cards: of all ranks, in their order, see :meth:`open`.
        server: this process's own, see :meth:`open`; closed when the neighbours have come.
        epoch: names this chain: the same in all ranks, and never one that was used before.
        token: what only the processes of this job know.
        device: where received tensors go, and sent ones come from.
        timeout_seconds: how long a silent process counts as alive.

    Attributes:
        strangers: how many connected who are not of this chain, and were turned away.

    Raises:
        LostPeer: a neighbour did not come in that time.
    """

    def __init__(
        self,
        rank: int,
        cards: Sequence[Card],
        server: socket.socket,
        epoch: str,
        token: bytes,
        device: torch.device,
        timeout_seconds: float,
    ) -> None:
        self.rank, self.size, self.epoch = rank, len(cards), epoch
        assert 0 <= rank < self.size, f"rank {rank} of {self.size}"
        self.device, self.timeout_seconds = device, timeout_seconds
        self.strangers = 0
        self._cards, self._token = cards, token
        self._outgoing: dict[int, _Outgoing] = {}
        self._incoming: dict[int, _Incoming] = {}
        try:
            with server:
                self._meet(server)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def open(host: str, device: torch.device) -> tuple[Card, socket.socket]:
        """Wait for neighbours at an address of this machine's, by which they reach it; gives what
        they have to know, and the server that :class:`Links` takes."""
        server = serve(host)
        return Card(host, server.getsockname()[1], gpu_name(device)), server

    def send(self, tensor: Tensor, target: int) -> Ticket:
        """Have a tensor ready for a neighbour, without waiting; LostPeer if it is known to be gone.

        Its memory is kept, not copied, until it has been received: nobody may change it.
        """
        return self._outgoing[target].send(tensor)

    def receive(self, ticket: Ticket) -> Tensor:
        """The tensor of a ticket: same dtype, shape and bits, contiguous, in memory of its own.

        Raises:
            LostPeer: the neighbour is gone or silent, or these links were closed.
            OutOfOrder: the ticket is not the next one of its direction. Nothing is lost by asking:
                the next one can still be received.
        """
        incoming = self._incoming.get(ticket.source)
        if incoming is None or ticket.target != self.rank:
            raise OutOfOrder(
                f"receive, rank {self.rank}",
                f"a ticket from a neighbour to rank {self.rank}",
                f"one from rank {ticket.source} to rank {ticket.target}",
            )
        return incoming.receive(ticket)

    def close(self) -> None:
        """Abandon everything, at once, whatever the neighbours do. May be repeated."""
        ends = [*self._outgoing.values(), *self._incoming.values()]
        for end in ends:
            end.shut()
        until = time.monotonic() + _JOIN_SECONDS
        for end in ends:
            end.free(max(0.0, until - time.monotonic()))

    def _meet(self, server: socket.socket) -> None:
        """Find the neighbours; open a connection, and what carries bytes, for each direction."""
        neighbours = [r for r in (self.rank - 1, self.rank + 1) if 0 <= r < self.size]
        # By direction. What is left here when something fails is closed; the rest belongs to ends.
        opened: dict[str, Connection] = {}
        try:
            self._open(neighbours, server, opened)
            # Everybody from the lower neighbour to the upper one, and up before down, so that the
            # two who are to make a group of NCCL's come to it.
            for peer in neighbours:
                up = (min(self.rank, peer), max(self.rank, peer))
                store = self._store(peer, opened[self._direction(*up)])
                for source, target in (up, up[::-1]):
                    name = self._direction(source, target)
                    carrier: Carrier = TcpCarrier(opened[name], self.device)
                    if store is not None:
                        with _losing(peer, "connect by NCCL", self.timeout_seconds):
                            carrier = NcclCarrier(
                                _c10d.PrefixStore(name, store),
                                int(source != self.rank),
                                self.device,
                                opened[name].check,
                                self.timeout_seconds,
                            )
                    if source == self.rank:
                        self._outgoing[peer] = _Outgoing(self, peer, opened.pop(name), carrier)
                    else:
                        self._incoming[peer] = _Incoming(self, peer, opened.pop(name), carrier)
        finally:
            for connection in opened.values():
                connection.close()

    def _open(
        self, neighbours: Sequence[int], server: socket.socket, opened: dict[str, Connection]
    ) -> None:
        """Open the connections of all directions: those that come in to this process it asks for,
        those that go out it accepts, both at once, since the others do the same."""
        names = {peer: self._direction(self.rank, peer) for peer in neighbours}
        given_up = threading.Event()
        with ThreadPoolExecutor(1) as thread:
            accepting = thread.submit(
                accept, server, names.values(), self._token, self.timeout_seconds, given_up
            )
            try:
                for peer in neighbours:
                    with _losing(peer, "connect", self.timeout_seconds):
                        card, name = self._cards[peer], self._direction(peer, self.rank)
                        opened[name] = connect(
                            card.host, card.port, name, self._token, self.timeout_seconds
                        )
            except BaseException:
                given_up.set()
                raise
            finally:
                accepted, self.strangers = accepting.result()
                opened |= accepted
        for peer, name in names.items():
            if name not in opened:
                raise LostPeer(peer, "connect", _silence(self.timeout_seconds))

    def _store(self, peer: int, up: Connection) -> Any:
        """A store for this process and a neighbour alone, if NCCL is to carry what they send:
        through it NCCL finds its way. The lower rank opens it, at the address of its card; it ends
        with the links."""
        lower = min(self.rank, peer)
        if not nccl_between(self._cards[self.rank].gpu, self._cards[peer].gpu):
            return None
        with _losing(peer, "connect by NCCL", self.timeout_seconds):
            host = self._cards[lower].host
            seconds = timedelta(seconds=math.ceil(self.timeout_seconds))  # torch 2.4: whole ones
            if lower != self.rank:
                return open_store(host, up.receive_number(), None, seconds)
            listening = serve(host)
            store = open_store(host, listening.getsockname()[1], listening, seconds)
            up.send_number(store.port)
            return store

    def _direction(self, source: int, target: int) -> str:
        return f"{self.epoch}/{source}-{target}"


Carrier = TcpCarrier | NcclCarrier


class _End(ABC):
    """What both ends of one direction have."""

    def __init__(self, links: Links, peer: int, connection: Connection, carrier: Carrier) -> None:
        self._links, self._peer = links, peer
        self._connection, self._carrier = connection, carrier
        self._number = 0  # of the next tensor
        self._lost: str | None = None  # how the peer was lost

    def shut(self) -> None:
        """Make whatever waits in the connection end."""
        self._lost = self._lost or "none: these links were closed"
        self._connection.shut()

    @abstractmethod
    def free(self, patience: float) -> None:
        """Give everything back, waiting for what is under way for ``patience`` seconds."""

    def _raise_if_lost(self, operation: str) -> None:
        if self._lost is not None:
            raise LostPeer(self._peer, operation, self._lost)

    def _losing(self, operation: str) -> contextlib.AbstractContextManager[None]:
        return _losing(self._peer, operation, self._links.timeout_seconds)


class _Outgoing(_End):
    """The sender's end: keeps tensors until they are asked for, and answers in a thread."""

    def __init__(self, links: Links, peer: int, connection: Connection, carrier: Carrier) -> None:
        super().__init__(links, peer, connection, carrier)
        self._kept: dict[int, Any] = {}
        self._thread = threading.Thread(
            target=self._serve, name=f"links-{links.rank}-{peer}", daemon=True
        )
        self._thread.start()

    def send(self, tensor: Tensor) -> Ticket:
        number = self._number
        self._raise_if_lost(f"send of tensor {number}")
        if tensor.numel():  # of nothing, the ticket says all
            self._kept[number] = self._carrier.pack(tensor)
            if self._lost is not None:  # since just now: nobody will ask for it
                self._kept.clear()
        self._number += 1
        links, shape = self._links, tuple(tensor.shape)
        return Ticket(links.epoch, links.rank, self._peer, number, tensor.dtype, shape)

    def free(self, patience: float) -> None:
        self._thread.join(patience)
        self._kept.clear()
        self._carrier.abandon()

    def _serve(self) -> None:
        number = 0
        try:
            while True:
                number = self._connection.receive_number(however_long=True)
                with self._losing("send"):
                    self._deliver(number)
        except Exception as error:
            # Whatever it was, the other end learns of it by the connection's end, and this one at
            # its next send.
            how = error.got if isinstance(error, LostPeer) else _how(error)
            self._lost = self._lost or f"{how}, after it had asked for tensor {number}"
        finally:
            self._connection.close()
            self._kept.clear()

    def _deliver(self, number: int) -> None:
        packed = self._kept.pop(number)
        self._connection.send_number(number)
        self._carrier.send(packed)


class _Incoming(_End):
    """The receiver's end: asks for one tensor at a time."""

    def __init__(self, links: Links, peer: int, connection: Connection, carrier: Carrier) -> None:
        super().__init__(links, peer, connection, carrier)
        self._busy = threading.Lock()

    def receive(self, ticket: Ticket) -> Tensor:
        operation, links = f"receive of tensor {ticket.number}", self._links
        self._raise_if_lost(operation)
        if (ticket.epoch, ticket.number) != (links.epoch, self._number):
            raise OutOfOrder(
                f"receive from rank {self._peer}, rank {links.rank}",
                f"tensor {self._number} of epoch {links.epoch}",
                f"the ticket of tensor {ticket.number} of epoch {ticket.epoch}",
            )
        flat = torch.empty(0, dtype=torch.uint8, device=links.device)
        if ticket.nbytes:
            with self._busy:
                try:
                    with self._losing(operation):
                        self._connection.send_number(ticket.number)
                        self._connection.receive_number()
                        flat = self._carrier.receive(ticket.nbytes)
                except LostPeer as error:
                    self._lost = self._lost or error.got
                    raise LostPeer(self._peer, operation, self._lost) from error.__cause__
        self._number += 1
        return flat.view(ticket.dtype).reshape(ticket.shape)

    def free(self, patience: float) -> None:
        if self._busy.acquire(timeout=patience):
            self._connection.close()
            self._busy.release()
        self._carrier.abandon()


@contextlib.contextmanager
def _losing(peer: int, operation: str, timeout_seconds: float) -> Iterator[None]:
    """Errors of connections, the store and groups as the loss of a neighbour."""
    started = time.monotonic()
    try:
        yield
    except (OSError, RuntimeError) as error:
        # Torch's timeouts are no TimeoutError.
        late = isinstance(error, TimeoutError) or time.monotonic() - started >= timeout_seconds
        raise LostPeer(
            peer, operation, _silence(timeout_seconds) if late else _how(error)
        ) from error


def _silence(timeout_seconds: float) -> str:
    return f"none in {timeout_seconds:g} s"


def _how(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return f"none ({lines[0]})"
