"""An S3 server over HTTP in a process of its own, and a proxy before it that fails when told to."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pyarrow import fs

# What an S3 client needs to know; nobody checks it. Nor must it ask a cloud's own machines.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class Server:
    """Where an S3 server listens.

    Attributes:
        endpoint: its address.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.endpoint = f"http://127.0.0.1:{port}"

    def uri(self, path: str, more: str = "", keys: str = "") -> str:
        """The URI of a path, ``bucket/name``."""
        options = f"endpoint_override={self.endpoint}&scheme=http&region=us-east-1{more}"
        return f"s3://{keys}{path}?{options}"

    def system(self) -> Any:
        """A file system that may make buckets."""
        return fs.FileSystem.from_uri(self.uri("any", "&allow_bucket_creation=true"))[0]


@contextmanager
def server() -> Iterator[Server]:
    """The server, while the body runs."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, "no server"
                time.sleep(0.05)
        yield Server(port)
    finally:
        process.kill()
        process.wait()


class Proxy(Server):
    """Hands requests on to a server, but those that ``fails`` picks by method and path.

    Attributes:
        fails: gives the status that a request fails with; ``None`` to hand it on.
        seen: method and path of every request.
        keys: what every request was signed with.
    """

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.fails: Callable[[str, str], int | None] = lambda method, path: None
        self.seen: list[tuple[str, str]] = []
        self.keys: set[str] = set()


@contextmanager
def proxy(behind: Server) -> Iterator[Proxy]:
    """A proxy, while the body runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self._body()
            made.seen.append((self.command, self.path))
            made.keys.add(self.headers.get("Authorization", "").partition("Credential=")[2])
            status = made.fails(self.command, self.path)
            if status is not None:
                # The client tries again what is the server's fault, and nothing else.
                code = "AccessDenied" if status == 403 else "InternalError"
                text = f"<Error><Code>{code}</Code><Message>told to</Message></Error>".encode()
                self._answer(status, {"Content-Type": "application/xml"}, text)
                return
            onward = http.client.HTTPConnection("127.0.0.1", behind.port)
            try:
                # As it was signed, with the host it was signed for.
                onward.putrequest(
                    self.command, self.path, skip_host=True, skip_accept_encoding=True
                )
                for name, value in self.headers.items():
                    onward.putheader(name, value)
                onward.endheaders()
                onward.send(body)
                answer = onward.getresponse()
                self._answer(answer.status, dict(answer.getheaders()), answer.read())
            finally:
                onward.close()

        def _body(self) -> bytes:
            """The body as it came, in chunks where the client sends it so."""
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            raw = b""
            while True:
                line = self.rfile.readline()
                size = int(line.partition(b";")[0], 16)
                raw += line + (self.rfile.read(size + 2) if size else b"")
                if not size:
                    break
            while line := self.rfile.readline():
                raw += line
                if not line.strip():
                    break
            return raw

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

        def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    self.send_header(name, value)
            length = headers.get("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    made = Proxy(free_port())
    listener = ThreadingHTTPServer(("127.0.0.1", made.port), Handler)
    listener.daemon_threads = True
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        listener.shutdown()
        listener.server_close()
