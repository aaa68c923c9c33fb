"""A process of a chain of links, for tests: does what its parent says, one command at a time."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raycurv.errors import LostPeer
from raycurv.links.links import Card, Links, Ticket
from raycurv.links.tcp import TcpCarrier
from raycurv.stages.schedule import pipelined

MIB = 2**20
TOKEN = bytes(range(32))


def tensors() -> list[Tensor]:
    """One of every kind that travels: the same in all processes."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (2, 3, 4, 16), dtype=torch.uint8, generator=generator)
    kinds = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32)
    return [
        # Any bits at all, so numbers that are not finite, too.
        *(bits.view(kind) for kind in kinds),
        bits,
        bits > 127,
        bits.view(torch.float32)[0, 1, 2, 3],  # no axes
        bits.view(torch.float64)[:, :0],  # nothing
        bits.view(torch.bfloat16).transpose(0, 2),  # strides
        bits.view(torch.float32)[..., ::2],
        bits.view(torch.int64)[1:],  # from the middle of its memory
        torch.zeros(()).expand(3, 5),  # one number, many times
        torch.linspace(0, 1, 2 * MIB, requires_grad=True).view(2, -1),  # with a graph
    ]


def bits_of(tensor: Tensor) -> bytes:
    """What the tensor is, to the bit: also its dtype and shape."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return repr((tensor.dtype, tuple(tensor.shape))).encode() + flat.numpy().tobytes()


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Process:
    """The commands."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._links: Links | None = None
        self._tickets: list[Ticket] = []

    def open(self) -> Card:
        card, self._server = Links.open("127.0.0.1", torch.device("cpu"))
        return card

    def connect(
        self, rank: int, cards: list[Card], epoch: str, token: bytes, timeout: float
    ) -> int:
        """How many strangers were turned away."""
        device = torch.device("cpu")
        self._links = Links(rank, cards, self._server, epoch, token, device, timeout)
        return self._links.strangers

    def close(self) -> float:
        """Seconds that it took."""
        started = time.monotonic()
        self.links.close()
        return time.monotonic() - started

    @property
    def links(self) -> Links:
        assert self._links is not None
        return self._links

    def threads_and_files(self) -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    def send_kinds(self, target: int) -> list[Ticket]:
        return [self.links.send(tensor, target) for tensor in tensors()]

    def receive_kinds(self, tickets: list[Ticket]) -> list[int]:
        """Which of them arrived otherwise than they were sent."""
        wrong = []
        for i, (ticket, sent) in enumerate(zip(tickets, tensors(), strict=True)):
            found = self.links.receive(ticket)
            if bits_of(found) != bits_of(sent) or not found.is_contiguous():
                wrong.append(i)
            found.zero_()  # its memory is its own
        return wrong

    def send(self, target: int, number: float, mib: float = 1.0) -> Ticket:
        return self.links.send(torch.full((int(mib * MIB) // 4,), number), target)

    def receive(self, ticket: Ticket) -> float:
        """The number that the tensor is full of."""
        found = self.links.receive(ticket)
        assert bool((found == found[0]).all())
        return float(found[0])

    def timed_receive(self, ticket: Ticket) -> tuple[Exception, float]:
        """What it raised, and after how many seconds."""
        started = time.monotonic()
        try:
            self.links.receive(ticket)
        except Exception as error:
            return error, time.monotonic() - started
        raise AssertionError("it came")

    def receive_while_closing(self, ticket: Ticket, after: float) -> tuple[Exception, float]:
        threading.Timer(after, self.links.close).start()
        return self.timed_receive(ticket)

    def die_in_transfer(self, after: float) -> None:
        """From now on, die so many seconds after the start of a transfer."""

        def dying(begin: Any) -> Any:
            def transfer(*args: Any) -> None:
                threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
                begin(*args)

            return transfer

        TcpCarrier.send = dying(TcpCarrier.send)  # type: ignore[method-assign]
        TcpCarrier.receive = dying(TcpCarrier.receive)  # type: ignore[method-assign]

    def send_until_lost(self, target: int) -> tuple[Exception, float]:
        """Send tensors that nobody receives; what that raises, and after how many seconds."""
        started = time.monotonic()
        while True:
            try:
                self.links.send(torch.zeros(1), target)
            except LostPeer as error:
                return error, time.monotonic() - started
            time.sleep(0.01)

    def resident(self) -> int:
        return resident()

    def stream(self, count: int, mib: int, source: int | None, target: int | None) -> int:
        """Receive, or send, so many tensors; gives the bytes of memory that are left used."""
        before = resident()
        for number in range(count):
            if target is not None:
                self._pipe.send((target, self.send(target, float(number), mib)))
                # One at a time, or they would wait here for the receiver.
                self._take(target)
            if source is not None:
                assert self.receive(self._take(source)) == number
                self._pipe.send((source, self._receipt(source)))
        return resident() - before

    def work(self, microbatches: int, numbers: int, seconds: float) -> int:
        """This stage's part of a pipeline; gives how many tensors were right."""
        rank, size = self.links.rank, self.links.size
        right = 0
        for operation in pipelined(size, range(microbatches)):
            if operation.stage != rank:
                continue
            m = operation.microbatch
            if operation.kind != "backward":
                if rank > 0:
                    hidden = self.links.receive(self._take(rank - 1))
                    right += torch.equal(hidden, torch.full((numbers,), float(m)))
                time.sleep(seconds)
            if operation.kind == "forward":
                self._give(rank + 1, torch.full((numbers,), float(m)))
                continue
            if operation.kind == "backward":
                gradient = self.links.receive(self._take(rank + 1))
                right += torch.equal(gradient, torch.full((2, numbers), float(-m)))
            if rank > 0:
                self._give(rank - 1, torch.full((2, numbers), float(-m)))
        return right

    def _give(self, target: int, tensor: Tensor) -> None:
        self._pipe.send((target, self.links.send(tensor, target)))

    def _receipt(self, source: int) -> Ticket:
        return Ticket(self.links.epoch, self.links.rank, source, -1, torch.uint8, ())

    def _take(self, source: int) -> Ticket:
        """The next ticket from a neighbour, by way of the parent."""
        while True:
            for ticket in self._tickets:
                if ticket.source == source:
                    self._tickets.remove(ticket)
                    return ticket
            self._tickets.append(self._pipe.recv())


def serve(pipe: Connection) -> None:
    """What the process runs until its parent goes."""
    torch.set_num_threads(1)
    process = Process(pipe)
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            return
        try:
            answer: Any = getattr(process, method)(*args)
        except Exception as error:
            answer = error.with_traceback(None)
        pipe.send((None, answer))


class Handle:
    """The parent's end."""

    def __init__(self) -> None:
        # A server that has imported torch, and forks: a process of its own takes seconds each.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["raycurv.links.links"])
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=serve, args=(child,), daemon=True)
        self._process.start()
        child.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def pipe(self) -> Connection:
        return self._pipe

    def begin(self, method: str, *args: Any) -> None:
        self._pipe.send((method, args))

    def end(self, timeout: float = 60.0) -> Any:
        assert self._pipe.poll(timeout), "no answer"
        _, answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def call(self, method: str, *args: Any) -> Any:
        self.begin(method, *args)
        return self.end()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)
        while number == signal.SIGSTOP and not self._stopped():
            time.sleep(1e-3)

    def _stopped(self) -> bool:
        """Whether all threads are: one that runs may go on for a moment after the signal."""
        stats = [path.read_text() for path in Path(f"/proc/{self.pid}/task").glob("*/stat")]
        return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


class Chain:
    """Processes by rank, under one epoch after another."""

    epochs = itertools.count()

    def __init__(self, ranks: list[Handle], timeout: float = 20.0) -> None:
        self.ranks = ranks
        self.timeout = timeout
        self.epoch = ""

    def connect(self) -> None:
        self.epoch = f"epoch {next(self.epochs)}"
        cards = [process.call("open") for process in self.ranks]
        for rank, process in enumerate(self.ranks):
            process.begin("connect", rank, cards, self.epoch, TOKEN, self.timeout)
        for process in self.ranks:
            process.end()

    def all(self, method: str, *args: Any) -> list[Any]:
        """Call all at once, with the tickets taken from rank to rank meanwhile."""
        return self.each([(method, args)] * len(self.ranks))

    def each(self, calls: list[tuple[str, tuple[Any, ...]]], timeout: float = 60.0) -> list[Any]:
        """As :meth:`all`, a call of its own for every rank."""
        answers: list[Any] = [None] * len(self.ranks)
        for process, (method, args) in zip(self.ranks, calls, strict=True):
            process.begin(method, *args)
        open_pipes = {process.pipe: rank for rank, process in enumerate(self.ranks)}
        while open_pipes:
            ready = wait(list(open_pipes), timeout)
            assert ready, f"ranks {sorted(open_pipes.values())} are stuck"
            for pipe in ready:
                target, content = pipe.recv()  # type: ignore[union-attr]
                if target is not None:
                    self.ranks[target].pipe.send(content)
                    continue
                answers[open_pipes.pop(pipe)] = content  # type: ignore[arg-type]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers
