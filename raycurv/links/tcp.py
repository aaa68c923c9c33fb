"""TCP between two processes: numbers and bytes, and at once the news that one has died.

A port is open to strangers, too. Both ends of a connection know the job's token, which never
travels; each proves to the other that it does, by an HMAC over what both have just made up:

    connects ──── name (16), nonce c (32) ──────────────────────────►  accepts
             ◄─── nonce s (32), HMAC(token, "accepts" name c s) (32) ─
             ──── HMAC(token, "connects" name c s) (32) ─────────────►

What follows is neither encrypted nor signed: it keeps out who can reach the port, not who can
change the network's packets.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import os
import select
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterable

import torch
from torch import Tensor

_NUMBER = struct.Struct("!q")
_NAME_BYTES, _NONCE_BYTES, _PROOF_BYTES = 16, 32, 32
# That a connection has to prove itself, and how many may be at it at a time.
_PROVE_SECONDS, _MOST_GUESTS = 5.0, 64
# Between two looks at whether anybody still waits for what is accepted.
_LOOK_SECONDS = 0.1


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
    server: socket.socket,
    names: Iterable[str],
    token: bytes,
    timeout_seconds: float,
    given_up: threading.Event,
) -> tuple[dict[str, Connection], int]:
    """Accept the connections with these names (see :func:`connect`), as far as they come in time.

    Whoever else connects is turned away, and holds nobody up: each has a few seconds of its own,
    and no more is read of it than a name and a proof take.

    Args:
        token: of the job, which both ends know.
        given_up: ends this early.

    Returns:
        The connections, and how many were turned away.
    """
    wanted = {_short(name): name for name in names}
    found: dict[str, Connection] = {}
    guests: list[_Guest] = []
    strangers = 0
    until = time.monotonic() + timeout_seconds
    server.setblocking(False)

    def leave(guest: _Guest) -> None:
        selector.unregister(guest.socket)
        guests.remove(guest)

    def turn_away(guest: _Guest) -> None:
        nonlocal strangers
        strangers += 1
        leave(guest)
        guest.socket.close()

    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        while wanted and not given_up.is_set() and time.monotonic() < until:
            for key, _ in selector.select(_LOOK_SECONDS):
                guest: _Guest | None = key.data
                if guest is None:
                    with contextlib.suppress(OSError):  # it may be gone already
                        guest = _Guest(server.accept()[0])
                        guests.append(guest)
                        selector.register(guest.socket, selectors.EVENT_READ, guest)
                    continue
                try:
                    name = guest.listen(wanted, token)
                except OSError:
                    turn_away(guest)
                    continue
                if name is not None:
                    leave(guest)
                    found[wanted.pop(name)] = Connection(guest.socket, timeout_seconds)
            for guest in list(guests):
                if len(guests) > _MOST_GUESTS or time.monotonic() > guest.until:
                    turn_away(guest)
        for guest in list(guests):
            turn_away(guest)
    return found, strangers


class _Guest:
    """Who has connected and has not proved itself yet.

    Attributes:
        until: when it has to have.
    """

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.until = time.monotonic() + _PROVE_SECONDS
        connected.setblocking(False)
        self._data = bytearray()
        self._name, self._proof = b"", b""

    def listen(self, wanted: dict[bytes, str], token: bytes) -> bytes | None:
        """Take what has come; gives the name once that is proven, ``None`` before.

        Raises:
            OSError: it is a stranger, or gone.
        """
        size = _PROOF_BYTES if self._name else _NAME_BYTES + _NONCE_BYTES
        try:
            piece = self.socket.recv(size - len(self._data))
        except BlockingIOError:
            return None
        if not piece:
            raise ConnectionResetError("connection closed")
        self._data += piece
        if len(self._data) < size:
            return None
        data, self._data = bytes(self._data), bytearray()
        if self._name:
            if not hmac.compare_digest(data, self._proof):
                raise _not_of_this_job()
            return self._name
        self._name, theirs, mine = data[:_NAME_BYTES], data[_NAME_BYTES:], os.urandom(_NONCE_BYTES)
        if self._name not in wanted:
            raise _not_of_this_job()
        nonces = theirs + mine
        # So few bytes always fit into a new connection's buffer.
        self.socket.send(mine + _proof(token, b"accepts", self._name, nonces))
        self._proof = _proof(token, b"connects", self._name, nonces)
        return None


def connect(host: str, port: int, name: str, token: bytes, timeout_seconds: float) -> Connection:
    """Open the connection of this name to another process, which accepts it; OSError if nobody
    answers, or somebody who does not know the token."""
    connection = Connection(
        socket.create_connection((host, port), timeout=timeout_seconds), timeout_seconds
    )
    try:
        short, mine = _short(name), os.urandom(_NONCE_BYTES)
        connection.send(short + mine)
        answer = bytearray(_NONCE_BYTES + _PROOF_BYTES)
        connection.receive_into(memoryview(answer))
        nonces = mine + bytes(answer[:_NONCE_BYTES])
        proof = _proof(token, b"accepts", short, nonces)
        if not hmac.compare_digest(bytes(answer[_NONCE_BYTES:]), proof):
            raise _not_of_this_job()
        connection.send(_proof(token, b"connects", short, nonces))
    except BaseException:
        connection.close()
        raise
    return connection


def serve(host: str) -> socket.socket:
    """A server at an address of this machine, at a port that was free; at all of its addresses
    where that one is none of its own, as behind a translation of addresses; OSError otherwise."""
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    try:
        return socket.create_server((host, 0), family=family)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        return socket.create_server(("", 0), family=family)


def _not_of_this_job() -> ConnectionRefusedError:
    return ConnectionRefusedError("somebody who is not of this job")


def _short(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=_NAME_BYTES).digest()


def _proof(token: bytes, side: bytes, name: bytes, nonces: bytes) -> bytes:
    return hmac.digest(token, side + name + nonces, "sha256")
