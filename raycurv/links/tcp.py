"""TCP between two processes: numbers and bytes, and at once the news that one has died."""

from __future__ import annotations

import contextlib
import hashlib
import select
import socket
import struct
import time
from collections.abc import Iterable

import torch
from torch import Tensor

_NUMBER = struct.Struct("!q")
_HELLO_BYTES = 16
_HELLO_SECONDS = 5.0


class Connection:
    """One end of a TCP connection.

    Whatever waits for the other end raises ``OSError`` as soon as that process has ended or either
    end was shut, and ``TimeoutError`` (one of them) when the other end is silent for too long.

    Args:
        connected: an open socket, which this takes over.
        timeout_seconds: how long another end counts as alive that says nothing, because its
            process is stopped or its node has vanished without a word.
    """

    def __init__(self, connected: socket.socket, timeout_seconds: float) -> None:
        self._socket, self._timeout = connected, timeout_seconds
        connected.settimeout(timeout_seconds)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Three questions without an answer, spread over the time.
        between = max(1, int(timeout_seconds / 4))
        for option, value in (
            ("TCP_KEEPIDLE", between),
            ("TCP_KEEPINTVL", between),
            ("TCP_KEEPCNT", 3),
            ("TCP_USER_TIMEOUT", max(1, int(1000 * timeout_seconds))),
        ):
            if hasattr(socket, option):  # not every system has them
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, data: bytes | memoryview) -> None:
        """Send bytes, and return when they have left."""
        self._socket.sendall(data)

    def receive_into(self, data: memoryview) -> None:
        """Fill ``data`` with the bytes that come next."""
        while data:
            count = self._socket.recv_into(data)
            if not count:
                raise ConnectionResetError("connection closed")
            data = data[count:]

    def send_number(self, number: int) -> None:
        self.send(_NUMBER.pack(number))

    def receive_number(self, however_long: bool = False) -> int:
        data = bytearray(_NUMBER.size)
        self._socket.settimeout(None if however_long else self._timeout)
        self.receive_into(memoryview(data))
        self._socket.settimeout(self._timeout)
        return int(_NUMBER.unpack(data)[0])

    def check(self) -> None:
        """Raise ``OSError`` if the other end is gone or this one was shut. Does not wait."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        if poller.poll(0) and not self._socket.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError("connection closed")

    def shut(self) -> None:
        """End the connection; a thread that waits in it raises. From any thread, repeatedly."""
        with contextlib.suppress(OSError):  # it may be over already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Shut it and free it, once no thread waits in it."""
        self.shut()
        self._socket.close()


class TcpCarrier:
    """Bytes through the memory of the CPUs, over the connection on which they were asked for.

    For stages without a GPU, and for those that share one, which NCCL refuses.
    """

    def __init__(self, connection: Connection, device: torch.device) -> None:
        self._connection, self._device = connection, device

    def pack(self, tensor: Tensor) -> Tensor:
        """A tensor's bytes; the tensor's own memory where it can be."""
        return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)

    def send(self, packed: Tensor) -> None:
        """Send what :meth:`pack` gave, and return when the bytes have left; OSError if the other
        end is gone, or silent (``TimeoutError``)."""
        self._connection.send(packed.numpy().data)

    def receive(self, count: int) -> Tensor:
        """The ``count`` bytes that were sent next, on the device; see :meth:`send`."""
        flat = torch.empty(count, dtype=torch.uint8)
        self._connection.receive_into(flat.numpy().data)
        return flat.to(self._device)

    def abandon(self) -> None:
        """Nothing is to be done: whoever waits ends with the connection."""


def accept(
    server: socket.socket, names: Iterable[str], timeout_seconds: float
) -> dict[str, Connection]:
    """The connections with these names (see :func:`connect`), as far as they came in time."""
    wanted = {_hello(name): name for name in names}
    found: dict[str, Connection] = {}
    until = time.monotonic() + timeout_seconds
    while len(found) < len(wanted):
        server.settimeout(max(1e-3, until - time.monotonic()))
        try:
            connected, _ = server.accept()
        except TimeoutError:
            break
        connection = Connection(connected, min(_HELLO_SECONDS, timeout_seconds))
        hello = bytearray(_HELLO_BYTES)
        with contextlib.suppress(OSError):
            connection.receive_into(memoryview(hello))
        name = wanted.get(bytes(hello))
        if name is None or name in found:
            connection.close()  # a stranger, or from another epoch
        else:
            found[name] = Connection(connected, timeout_seconds)
    return found


def connect(host: str, port: int, name: str, timeout_seconds: float) -> Connection:
    """Open the connection of this name to another process, which accepts it; OSError if nobody
    answers."""
    connected = socket.create_connection((host, port), timeout=timeout_seconds)
    connected.sendall(_hello(name))
    return Connection(connected, timeout_seconds)


def serve_towards(host: str, port: int) -> socket.socket:
    """A server at this machine's address as another one there would see it; OSError if there is no
    way there. Sends nothing."""
    family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)
        return socket.create_server((probe.getsockname()[0], 0), family=family)


def _hello(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=_HELLO_BYTES).digest()
