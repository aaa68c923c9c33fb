"""A control connection: numbers between two processes, and at once the news that one has died.

It stands beside a process group, which may not say so (NCCL does not, when a process of the same
node dies).
"""

from __future__ import annotations

import contextlib
import hashlib
import select
import socket
import struct
import time
from collections.abc import Iterable

_NUMBER = struct.Struct("!q")
_HELLO_BYTES = 16
_HELLO_SECONDS = 5.0


class Control:
    """One end of a connection.

    Args:
        connection: an open one, which this takes over.
        timeout_seconds: after which a node that has vanished without a word counts as dead.
    """

    def __init__(self, connection: socket.socket, timeout_seconds: float) -> None:
        self._socket = connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Three questions without an answer, spread over the time.
        between = max(1, int(timeout_seconds / 4))
        for option, value in (
            ("TCP_KEEPIDLE", between),
            ("TCP_KEEPINTVL", between),
            ("TCP_KEEPCNT", 3),
            ("TCP_USER_TIMEOUT", max(1, int(1000 * timeout_seconds))),
        ):
            if hasattr(socket, option):  # not every system has them
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def say(self, number: int) -> None:
        """Send a number.

        Raises:
            OSError: the other end is gone.
        """
        self._socket.sendall(_NUMBER.pack(number))

    def hear(self, timeout_seconds: float | None) -> int:
        """The next number.

        Args:
            timeout_seconds: how long to wait for it; ``None`` for ever.

        Raises:
            OSError: the other end is gone, or this one was shut.
            TimeoutError: none came.
        """
        self._socket.settimeout(timeout_seconds)
        return int(_NUMBER.unpack(_read(self._socket, _NUMBER.size))[0])

    def check(self) -> None:
        """See whether the other end is there, without waiting.

        Raises:
            OSError: it is gone, or this one was shut.
        """
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


class Listener:
    """Where others open their control connections to this process.

    Args:
        address: of this process, as they reach it.
    """

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, 0), family=family)

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def accept(self, names: Iterable[str], timeout_seconds: float) -> dict[str, Control]:
        """The connections with these names, as far as they came in time (see :func:`connect`)."""
        wanted = {_hello(name): name for name in names}
        found: dict[str, Control] = {}
        until = time.monotonic() + timeout_seconds
        while len(found) < len(wanted):
            self._socket.settimeout(max(1e-3, until - time.monotonic()))
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                break
            connection.settimeout(min(_HELLO_SECONDS, timeout_seconds))
            try:
                name = wanted.get(_read(connection, _HELLO_BYTES))
            except OSError:
                name = None
            if name is None or name in found:
                connection.close()  # a stranger, or from another epoch
                continue
            connection.settimeout(timeout_seconds)
            found[name] = Control(connection, timeout_seconds)
        return found

    def close(self) -> None:
        self._socket.close()


def connect(host: str, port: int, name: str, timeout_seconds: float) -> Control:
    """Open the connection of this name to another process's listener.

    Raises:
        OSError: nobody answers.
    """
    connection = socket.create_connection((host, port), timeout=timeout_seconds)
    connection.sendall(_hello(name))
    return Control(connection, timeout_seconds)


def address_towards(host: str, port: int) -> str:
    """This machine's address as another one there would see it. Sends nothing.

    Raises:
        OSError: there is no way there.
    """
    family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])


def _hello(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=_HELLO_BYTES).digest()


def _read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionResetError("connection closed")
        data += part
    return data
