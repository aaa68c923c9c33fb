"""Links: tensors between the neighbouring stages of one replica, from process to process.

What is sent stays with the sender until the receiver asks for it: the ticket goes ahead (through
whatever carries calls), the receiver names the ticket's number over a control connection, the
sender answers, and both put the same transfer into the group of that direction at once. So no
transfer waits on a device for the other end to come, memory is bounded by what the schedule leaves
unasked for, and a death is seen as a connection that closes, whatever the backend.

    send ──► ticket ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─► receive
      kept                                     │
       │  ◄──────── number ────────────────────┤
       ├──────────── number ──────────────────►│
       └──────────── bytes (gloo or nccl) ────►└──► tensor
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from raycurv.errors import LostPeer, OutOfOrder
from raycurv.links.control import Control, Listener, address_towards, connect
from raycurv.links.pair import Pair, Parcel, backend_between, gpu_name

_c10d: Any = torch.distributed

# For threads to end when links close; one that hangs in a transfer ends by its timeout.
_JOIN_SECONDS = 1.0


@dataclass(frozen=True)
class Ticket:
    """Travels in a sent tensor's place.

    Attributes:
        epoch: of the links that it was sent through.
        source: rank of the sender.
        target: rank of the receiver.
        number: of the tensor in its direction, from 0.
        dtype: of the tensor.
        shape: of the tensor.
    """

    epoch: str
    source: int
    target: int
    number: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class Links:
    """One process's links to its neighbours in a chain of processes.

    All ranks of the chain make theirs at about the same time, and wait for each other. Afterwards
    ``send`` and ``receive`` are for one thread, while ``close`` may come from any.

    Args:
        rank: this process's place in the chain.
        size: how many processes the chain has.
        address: HOST:PORT of a store (see :meth:`host`).
        epoch: names this chain: the same in all ranks, and never one that was used before.
        device: where received tensors go, and sent ones come from.
        timeout_seconds: how long a silent process counts as alive.

    Raises:
        LostPeer: a neighbour, or the store, did not come in that time.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        address: str,
        epoch: str,
        device: torch.device,
        timeout_seconds: float,
    ) -> None:
        assert 0 <= rank < size, f"rank {rank} of {size}"
        self.rank, self.size, self.epoch = rank, size, epoch
        self._device, self._timeout = device, timeout_seconds
        self._outgoing: dict[int, _Outgoing] = {}
        self._incoming: dict[int, _Incoming] = {}
        try:
            if size > 1:
                self._connect(address)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def host(node_address: str) -> str:
        """Open a store in which the ranks of chains find each other; for rank 0's process.

        It lives as long as the process, and serves any number of epochs.

        Args:
            node_address: of this machine, as the others reach it.

        Returns:
            its HOST:PORT.
        """
        return f"{node_address}:{_open_store(node_address).port}"

    def send(self, tensor: Tensor, target: int) -> Ticket:
        """Have a tensor ready for a neighbour. Does not wait.

        Its memory is kept, not copied, until it has been received: nobody may change it.

        Raises:
            LostPeer: the neighbour is known to be gone.
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

    def _connect(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        with _losing(0, f"store at {address}", self._timeout):
            store = _join_store(host, int(port), self._timeout)
            own = address_towards(host, int(port))
            listener = Listener(own)
        with contextlib.closing(listener):
            self._meet(_prefixed(self.epoch, store), own, listener)

    def _meet(self, store: Any, own: str, listener: Listener) -> None:
        """Find the neighbours, open a control connection and a pair for each direction."""
        neighbours = [r for r in (self.rank - 1, self.rank + 1) if 0 <= r < self.size]
        gpu = gpu_name(self._device)
        card = json.dumps({"host": own, "port": listener.port, "gpu": gpu})
        with _losing(0, "store", self._timeout):
            claims = store.add(f"claims/{self.rank}", 1)
            assert claims == 1, f"epoch {self.epoch} was used before"
            store.set(f"card/{self.rank}", card)
        cards: dict[int, Any] = {}
        asking: dict[int, Control] = {}
        answering: dict[str, Control] = {}
        try:
            for peer in neighbours:
                with _losing(peer, "connect", self._timeout):
                    cards[peer] = json.loads(store.get(f"card/{peer}"))
                    asking[peer] = connect(
                        cards[peer]["host"],
                        cards[peer]["port"],
                        self._direction(peer, self.rank),
                        self._timeout,
                    )
            names = {self._direction(self.rank, peer): peer for peer in neighbours}
            answering = listener.accept(names, self._timeout)
            for name, peer in names.items():
                if name not in answering:
                    raise LostPeer(peer, "connect", _silence(self._timeout))
            # Everybody from the lower neighbour to the upper one, and up before down, so that the
            # two who are to make a pair come to it.
            for peer in neighbours:
                backend = backend_between(gpu, cards[peer]["gpu"])
                up = (min(self.rank, peer), max(self.rank, peer))
                for source, target in (up, up[::-1]):
                    name = self._direction(source, target)
                    with _losing(peer, f"connect by {backend}", self._timeout):
                        pair = Pair(
                            backend,
                            _prefixed(name, store),
                            0 if source == self.rank else 1,
                            own,
                            self._device,
                            self._timeout,
                        )
                    if source == self.rank:
                        outgoing = _Outgoing(self, peer, answering.pop(name), pair)
                        self._outgoing[peer] = outgoing
                    else:
                        self._incoming[peer] = _Incoming(self, peer, asking.pop(peer), pair)
        finally:
            for control in (*asking.values(), *answering.values()):
                control.close()

    def _direction(self, source: int, target: int) -> str:
        return f"{self.epoch}/{source}-{target}"


class _End(ABC):
    """What both ends of one direction have."""

    def __init__(self, links: Links, peer: int, control: Control, pair: Pair) -> None:
        self._rank, self._epoch, self._timeout = links.rank, links.epoch, links._timeout
        self._peer, self._control, self._pair = peer, control, pair
        self._number = 0  # of the next tensor
        self._lost: str | None = None  # how the peer was lost

    def shut(self) -> None:
        """Make whatever waits in the control connection end."""
        self._lost = self._lost or "none: these links were closed"
        self._control.shut()

    @abstractmethod
    def free(self, patience: float) -> None:
        """Give everything back, waiting for what is under way for ``patience`` seconds."""

    def _raise_if_lost(self, operation: str) -> None:
        if self._lost is not None:
            raise LostPeer(self._peer, operation, self._lost)


class _Outgoing(_End):
    """The sender's end: keeps tensors until they are asked for, and answers in a thread."""

    def __init__(self, links: Links, peer: int, control: Control, pair: Pair) -> None:
        super().__init__(links, peer, control, pair)
        self._kept: dict[int, Parcel] = {}
        self._thread = threading.Thread(
            target=self._serve, name=f"links-{links.rank}-{peer}", daemon=True
        )
        self._thread.start()

    def send(self, tensor: Tensor) -> Ticket:
        number = self._number
        self._raise_if_lost(f"send of tensor {number}")
        if tensor.numel():  # of nothing, the ticket says all
            self._kept[number] = self._pair.pack(tensor)
            if self._lost is not None:  # since just now: nobody will ask for it
                self._kept.clear()
        self._number += 1
        return Ticket(
            self._epoch, self._rank, self._peer, number, tensor.dtype, tuple(tensor.shape)
        )

    def free(self, patience: float) -> None:
        self._thread.join(patience)
        self._kept.clear()
        self._pair.abandon()

    def _serve(self) -> None:
        number = 0
        try:
            while True:
                number = self._control.hear(None)
                with _losing(self._peer, "send", self._timeout):
                    self._deliver(number)
        except Exception as error:
            # Whatever it was, the other end learns of it by the connection's end, and this one at
            # its next send.
            how = error.got if isinstance(error, LostPeer) else _how(error)
            self._lost = self._lost or f"{how}, after it had asked for tensor {number}"
        finally:
            self._control.close()
            self._kept.clear()

    def _deliver(self, number: int) -> None:
        parcel = self._kept.pop(number)
        self._control.say(number)
        self._pair.send(parcel, self._control.check)


class _Incoming(_End):
    """The receiver's end: asks for one tensor at a time."""

    def __init__(self, links: Links, peer: int, control: Control, pair: Pair) -> None:
        super().__init__(links, peer, control, pair)
        self._busy = threading.Lock()

    def receive(self, ticket: Ticket) -> Tensor:
        operation = f"receive of tensor {ticket.number}"
        self._raise_if_lost(operation)
        if (ticket.epoch, ticket.number) != (self._epoch, self._number):
            raise OutOfOrder(
                f"receive from rank {self._peer}, rank {self._rank}",
                f"tensor {self._number} of epoch {self._epoch}",
                f"the ticket of tensor {ticket.number} of epoch {ticket.epoch}",
            )
        room = self._pair.room(ticket.nbytes)
        if ticket.nbytes:
            with self._busy:
                try:
                    with _losing(self._peer, operation, self._timeout):
                        self._control.say(ticket.number)
                        self._control.hear(self._timeout)
                        self._pair.receive(room, self._control.check)
                except LostPeer as error:
                    self._lost = self._lost or error.got
                    raise LostPeer(self._peer, operation, self._lost) from error.__cause__
        self._number += 1
        return self._pair.unpack(room).view(ticket.dtype).reshape(ticket.shape)

    def free(self, patience: float) -> None:
        if self._busy.acquire(timeout=patience):
            self._control.close()
            self._busy.release()
        self._pair.abandon()


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


def _prefixed(prefix: str, store: Any) -> Any:
    return _c10d.PrefixStore(prefix, store)


def _join_store(host: str, port: int, timeout_seconds: float) -> Any:
    timeout = timedelta(seconds=math.ceil(timeout_seconds))  # in torch 2.4 whole ones only
    return _c10d.TCPStore(host, port, None, False, timeout, wait_for_workers=False)


@functools.cache
def _open_store(host: str) -> Any:
    return _c10d.TCPStore(host, 0, None, True, wait_for_workers=False)
