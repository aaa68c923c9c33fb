"""What is to be known and said before Ray is imported: whether a cluster answers at an address
(``ray.init`` waits for minutes, and logs while it does), and that a cluster of a job's own is for
this machine alone."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from pathlib import Path

from raycurv.errors import UserError

# To connect; and for an answer after that.
_SECONDS, _ANSWER_SECONDS = 2.0, 3.0
# gRPC's own health checking, v1, which Ray's head takes part in: the question is an empty message,
# and in the answer field 1 is 1, for SERVING.
_HEALTH, _SERVING = "/grpc.health.v1.Health/Check", b"\x08\x01"


def keep_apart(own_process: bool) -> None:
    """Have the cluster that this process is about to start listen to this machine alone, and to
    those alone who know its token.

    Ray reads where to listen when it is imported, and this is its one way to say so: with clusters
    disabled a node's address is 127.0.0.1, and all that it starts listens there. Whoever has set
    one of these variables, or a token, is not overruled.

    Args:
        own_process: whether this process is a job and nothing else.

    Raises:
        UserError: ``RAY_AUTH_MODE`` is none of Ray's, which would take it for ``disabled``.
    """
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    if mode.lower() not in ("token", "disabled"):
        raise UserError(
            "RAY_AUTH_MODE", "token or disabled", repr(mode),
            "Unset it: a Ray of the job's own then asks for a token.",
        )  # fmt: skip
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if mode.lower() == "disabled" or given:
        return
    token = secrets.token_hex(32)
    if own_process:
        # Of nobody else, and gone with the process. Ray remembers one for as long as a process
        # lives, so that a caller's, who may connect to another cluster later, gets the usual one.
        os.environ["RAY_AUTH_TOKEN"] = token
        return
    # Ray itself would make the file readable by everybody. Where it is, it is somebody's to keep.
    place = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):
        place.parent.mkdir(mode=0o700, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(place, flags, 0o600), "w") as file:
            file.write(token)


def check_answers(address: str) -> None:
    """Refuse an address where no Ray cluster answers, within seconds.

    Args:
        address: ``local``, ``auto``, ``none`` or ``HOST:PORT``.

    Raises:
        UserError: not an address; nobody answers; or somebody who is no Ray's head.
    """
    if address in ("local", "auto", "none") or address.startswith("ray://"):
        return
    host, _, port = address.rpartition(":")
    # A name and a password before an @ are of no use to Ray, and not to be shown.
    if (
        not host
        or "://" in host
        or "@" in host
        or not port.isdecimal()
        or not 0 < int(port) < 65536
    ):
        raise UserError(
            "--address", "local, auto, none or HOST:PORT",
            repr(address.rpartition("@")[2]),
            "Give the address that `ray start --head` printed.",
        )  # fmt: skip
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()
    except OSError as error:
        found = str(error) or type(error).__name__
    else:
        # With TLS it takes Ray's own certificates to ask.
        found = "" if os.environ.get("RAY_USE_TLS") == "1" else _stranger(address)
    if found:
        raise UserError(
            f"--address {address}", "a Ray cluster that answers", found,
            "Give the address that `ray start --head` printed (its port is 6379 by default, not "
            "that of the dashboard or of Ray's client), or use --address local.",
        )  # fmt: skip


def directory() -> Path:
    """Ray's temporary directory, as Ray chooses it: sockets, logs, and what spills to disk."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"


def noted_address() -> str:
    """The cluster that was started on this machine last, which may be gone; empty if there is
    none."""
    try:
        return (directory() / "ray_current_cluster").read_text().strip()
    except OSError:
        return ""


def _stranger(address: str) -> str:
    """What is wrong with who answers; empty for a Ray's head."""
    # It comes with Ray, and is not needed without a cluster.
    import grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary(
            _HEALTH, request_serializer=bytes, response_deserializer=bytes
        )  # fmt: skip
        try:
            answer = ask(b"", timeout=_ANSWER_SECONDS)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return ""  # Ray itself will say what is missing
            return f"a server that is no Ray's head ({error.code().name.lower()})"
    return "" if answer == _SERVING else "a Ray that is not ready"
