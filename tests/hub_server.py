"""A Hugging Face hub on this machine: the few endpoints that huggingface_hub and datasets call."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_ThisIsTheSecretOfTheTests"


@dataclass
class Repository:
    """Commits of files, and who may read them.

    Attributes:
        commits: the files of each, by name.
        branches: which commit each means.
        access: ``open``, ``private`` or ``gated``.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    access: str = "open"

    def push(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A commit of these files, which a branch then means."""
        digest = hashlib.sha1(repr(sorted(files.items())).encode() + branch.encode())
        commit = digest.hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


def files_of(folder: Path) -> dict[str, bytes]:
    """What a folder holds, as a commit."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip


@dataclass
class Hub:
    """What is on the hub, and what it was asked for.

    Attributes:
        endpoint: where it listens.
        models, datasets: by name, such as ``org/name``.
        asked: method and path of each request.
    """

    endpoint: str
    models: dict[str, Repository] = field(default_factory=dict)
    datasets: dict[str, Repository] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def fetched(self) -> list[str]:
        """Names of the files that were asked for."""
        return [path.rpartition("/")[2] for _, path in self.asked if "/resolve/" in path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self._answer(self.rfile.read(length))

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, body: bytes = b"") -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        url = urlsplit(self.path)
        steps = unquote(url.path).strip("/").split("/")
        hub.asked.append((self.command, url.path))
        if steps[0] == "storage":  # a file of LFS, wherever that is: no token goes there
            assert "Authorization" not in self.headers
            content = next(
                data for repos in (hub.models, hub.datasets) for repo in repos.values()
                for files in repo.commits.values() for data in files.values()
                if hashlib.sha256(data).hexdigest() == steps[1]
            )  # fmt: skip
            return self._bytes(content, {})
        api = steps[0] == "api"
        steps = steps[1:] if api else steps
        kind = "datasets" if steps[0] == "datasets" else "models"
        steps = steps[1:] if steps[0] in ("datasets", "models") else steps
        name, rest = "/".join(steps[:2]), steps[2:]
        repo = (hub.datasets if kind == "datasets" else hub.models).get(name)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.access == "private" and not known):
            # As the hub has it: who is nobody is not told what there is.
            status = 404 if known else 401
            return self._fail(status, "RepoNotFound" if known else "")
        if repo.access == "forbidden":
            return self._fail(403, "")
        if repo.access == "down":
            return self._fail(503, "")
        if repo.access == "gated" and not known and not (api and rest[:1] != ["tree"]):
            return self._fail(401, "GatedRepo")
        revision = "/".join(rest[1:]) if api and rest[:1] == ["revision"] else "main"
        path = ""
        if rest[:1] in (["tree"], ["resolve"], ["paths-info"]):
            revision, path = rest[1], "/".join(rest[2:])
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            return self._fail(404, "RevisionNotFound")
        files = repo.commits[commit]
        if rest[:1] == ["tree"]:
            deep = parse_qs(url.query).get("recursive", ["False"])[0].lower() == "true"
            return self._json(_tree(files, path, deep))
        if rest[:1] == ["paths-info"]:
            asked = parse_qs(body.decode()).get("paths") or json.loads(body or b"{}")["paths"]
            return self._json([one for one in _tree(files, "", True) if one["path"] in asked])
        if rest[:1] == ["resolve"]:
            if path not in files:
                return self._fail(404, "EntryNotFound")
            return self._file(files[path], commit, path)
        self._json({
            "id": name, "sha": commit, "private": repo.access == "private", "tags": [],
            "downloads": 0, "likes": 0, "siblings": [{"rfilename": one} for one in files],
        })  # fmt: skip

    def _file(self, data: bytes, commit: str, path: str) -> None:
        stored = {"X-Repo-Commit": commit}
        if not path.endswith((".safetensors", ".parquet")):
            return self._bytes(data, stored | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        large = hashlib.sha256(data).hexdigest()
        self.send_response(302)
        host = self.headers["Host"].replace("127.0.0.1", "localhost")
        more = {
            "X-Linked-Size": len(data), "X-Linked-Etag": f'"{large}"', "Content-Length": 0,
            "Location": f"http://{host}/storage/{large}?signature=SignedForAnHour",
        }  # fmt: skip
        for key, value in (stored | more).items():
            self.send_header(key, str(value))
        self.end_headers()

    def _bytes(self, data: bytes, more: dict[str, str]) -> None:
        status, span = 200, self.headers.get("Range", "")
        if span.startswith("bytes="):
            first, _, last = span.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1 if last else len(data), len(data))
            more = more | {"Content-Range": f"bytes {first}-{end - 1}/{len(data)}"}
            status, data = 206, data[int(first) : end]
        self.send_response(status)
        for key, value in (more | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, said: Any) -> None:
        self._bytes(json.dumps(said).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"no, {self.headers.get('Authorization')}")
        self.send_header("Content-Length", "0")
        self.end_headers()


def _tree(files: dict[str, bytes], below: str, deep: bool) -> list[dict[str, Any]]:
    prefix = f"{below}/" if below else ""
    found: dict[str, dict[str, Any]] = {}
    for name, data in files.items():
        if not name.startswith(prefix):
            continue
        steps = name.removeprefix(prefix).split("/")
        for depth in range(1, len(steps) if deep else min(len(steps), 2)):
            folder = prefix + "/".join(steps[:depth])
            oid = hashlib.sha1(folder.encode()).hexdigest()
            found[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
        if deep or len(steps) == 1:
            oid = hashlib.sha1(data).hexdigest()
            found[name] = {"type": "file", "oid": oid, "size": len(data), "path": name}
            if name.endswith((".safetensors", ".parquet")):
                large = hashlib.sha256(data).hexdigest()
                found[name]["lfs"] = {"oid": large, "size": len(data), "pointerSize": 130}
    return list(found.values())


@contextmanager
def hub(cache: Path) -> Iterator[Hub]:
    """A hub, and this process as one that knows no other and has an empty cache."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    found = Hub(f"http://127.0.0.1:{server.server_port}")
    server.hub = found  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    template = found.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    with (
        mock.patch.multiple(
            constants, ENDPOINT=found.endpoint, HUGGINGFACE_CO_URL_TEMPLATE=template,
            HF_HUB_CACHE=str(cache / "hub"), HF_HUB_OFFLINE=False,
            HF_TOKEN_PATH=str(cache / "token"),
        ),
        mock.patch.dict("os.environ", {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}),
    ):  # fmt: skip
        try:
            yield found
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
