"""Whether a Ray cluster answers at an address, asked without Ray: ``ray.init`` waits for minutes,
and logs while it does."""

from __future__ import annotations

import os
import socket

from raycurv.errors import UserError

# To connect; and for an answer after that.
_SECONDS, _ANSWER_SECONDS = 2.0, 3.0
# gRPC's own health checking, v1, which Ray's head takes part in: the question is an empty message,
# and in the answer field 1 is 1, for SERVING.
_HEALTH, _SERVING = "/grpc.health.v1.Health/Check", b"\x08\x01"


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
    if not host or "://" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            "--address", "local, auto, none or HOST:PORT", repr(address),
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
