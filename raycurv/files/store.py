"""A directory of results, on a disk or an object store: a file is there whole or not at all.

On an object store an upload becomes an object when its stream is closed, and pyarrow closes a
stream whatever happens to it (at the end of a ``with`` that an exception leaves, or when it is
collected), without a way to abort: what had been written by then would take the place of the whole
file. So nothing but the store itself may fail between the opening and the closing of a stream:

- All bytes are at hand before it is opened; those that have to be fetched first (a copy from
  another store) go through a temporary file on this machine.
- The upload runs in a thread of its own, since Python raises what interrupts a program (Ctrl-C, a
  cancelled task) in the main thread alone: there it waits until the upload has ended.
- If the store fails, pyarrow does not complete the upload; nor does a process that dies. An object
  of that name that was there before stays as it was.

Writing under another name and moving would not be better: an object store moves by copying, no
more than 5 GiB at once. Parts of uploads that were never completed are invisible but stored: a
bucket's rule AbortIncompleteMultipartUpload removes them.

What a store answers in passing (refused connections, throttling, errors of its own) pyarrow tries
again for about six seconds on S3, and by its own rules elsewhere; after that the job ends and the
same command goes on from there.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from raycurv.data.uri import below, check_endpoint, check_place, is_uri, redacted, shown
from raycurv.errors import DamagedFile, NoSpace, UserError

# Bytes held at once while a file is copied.
_CHUNK = 64 << 20


class Store:
    """Files below one root, by names with forward slashes. Picklable.

    On a local disk a file is written beside its name, synced and renamed; on an object store it is
    one upload under its final name, which is there when it is complete (see above).

    Args:
        root: an absolute path, or a URI that ``pyarrow.fs`` understands.
        lasting: whether files must survive a power failure (they are synced); without, only the
            death of the process.

    Attributes:
        uri: what opens it, with the credentials that were given.
        root: what is shown and recorded, without them.
        guard: called before anything is written or deleted; it may refuse by raising. It does not
            travel to other processes.
    """

    def __init__(self, root: str, lasting: bool = True) -> None:
        address, mark, options = root.partition("?") if is_uri(root) else (root, "", "")
        self.uri = f"{address.rstrip('/') or '/'}{mark}{options}"
        self.root, self.lasting = shown(self.uri), lasting
        self.guard: Callable[[], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "root": self.root, "lasting": self.lasting, "guard": None}

    def __repr__(self) -> str:
        return f"Store({self.root!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    @cached_property
    def identity(self) -> str:
        """The same text for the same directory, however it was written."""
        if self.local:
            return os.path.realpath(self.path())
        scheme = self.root.partition("://")[0]
        options = self.root.partition("?")[2].split("&")
        ends = [o.partition("=")[2] for o in options if o.startswith("endpoint_override=")]
        endpoint = ends[-1].rpartition("://")[2].rstrip("/") if ends else ""
        return f"{scheme}://{endpoint}/{self.path()}"

    @cached_property
    def _opened(self) -> tuple[fs.FileSystem, str]:
        if not is_uri(self.uri):
            return fs.LocalFileSystem(), self.uri
        try:
            filesystem, path = fs.FileSystem.from_uri(self.uri)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                self.root,
                "an absolute path or a URI that pyarrow.fs understands (s3://, gs://, file://)",
                redacted(error, self.uri),
                "Correct the URI.",
            ) from None  # the error itself may show credentials
        return filesystem, path.rstrip("/")

    @property
    def local(self) -> bool:
        """Whether the files lie on this machine's file system."""
        return isinstance(self._opened[0], fs.LocalFileSystem)

    def path(self, name: str = "") -> str:
        """What ``pyarrow.fs`` calls the file."""
        return f"{self._opened[1]}/{name}" if name else self._opened[1]

    def inside(self, name: str) -> Store:
        """The store of a directory below this one."""
        uri = below(self.uri, name) if is_uri(self.uri) else f"{self.uri}/{name}"
        found = Store(uri, self.lasting)
        found.guard = self.guard
        return found

    def check(self, where: str) -> None:
        """Refuse, with a UserError, an object store that does not answer (within seconds where the
        URI names the endpoint), and a bucket that is not there."""
        if self.local:
            return
        check_endpoint(self.uri, where)
        if self._opened[0].type_name != "s3":
            return
        try:
            bucket = self._opened[0].get_file_info(self._bucket)
        except OSError as error:
            if "ACCESS_DENIED" in str(error):
                return  # keys that may not look at the bucket may well be good for what is in it
            raise UserError(
                where, "an object store that lets its bucket be seen",
                redacted(error, self.uri), "Check the URI, the region and the credentials.",
            ) from None  # fmt: skip
        if bucket.type == fs.FileType.NotFound and not self._makes_buckets:
            raise UserError(
                where, "a bucket that is there", f"none of the name {self._bucket}",
                "Correct the URI, or add allow_bucket_creation=true to it.",
            )  # fmt: skip

    def make(self) -> None:
        """Make what files need to lie in: the directory, or the bucket where the URI allows it."""
        if self.local:
            os.makedirs(self.path(), exist_ok=True)
        elif self._makes_buckets:
            self._opened[0].create_dir(self._bucket)

    @property
    def _bucket(self) -> str:
        return self.path().partition("/")[0]

    @property
    def _makes_buckets(self) -> bool:
        return "allow_bucket_creation=true" in self.uri.partition("?")[2].lower().split("&")

    def write(self, name: str, chunks: Iterable[bytes | memoryview | pa.Buffer]) -> None:
        """Write a file, atomically; NoSpace if the disk is full, and then nothing of it stays."""
        self._ask()
        path = self.path(name)
        if not self.local:
            self._upload(path, chunks)
            return
        part = Path(f"{path}.part")
        written = 0
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    written += len(chunk)
                file.flush()
                if self.lasting:
                    os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            part.unlink(missing_ok=True)
            directory = part.parent if part.parent.exists() else Path("/")
            raise _no_space(path, directory, written, error) from error

    def _ask(self) -> None:
        if self.guard is not None:
            self.guard()

    def _upload(self, path: str, chunks: Iterable[bytes | memoryview | pa.Buffer]) -> None:
        filesystem = self._opened[0]
        buffers = _at_hand(path, chunks)

        def upload() -> None:
            stream = filesystem.open_output_stream(path)
            for buffer in buffers:
                stream.write(buffer)
            stream.close()

        with ThreadPoolExecutor(1) as thread:
            thread.submit(upload).result()

    def copy(self, name: str, source: Store) -> None:
        """Write the file of the same name in another store, byte for byte, atomically."""
        with source.open(name) as file:
            self.write(name, iter(lambda: file.read(_CHUNK), b""))

    def open(self, name: str) -> pa.NativeFile:
        """A random-access reader; FileNotFoundError if there is no such file."""
        return self._opened[0].open_input_file(self.path(name))

    def _info(self, name: str) -> fs.FileInfo:
        return self._opened[0].get_file_info(self.path(name))

    def exists(self, name: str) -> bool:
        return bool(self._info(name).is_file)

    def there(self, name: str) -> bool:
        """Whether there is a file or a directory of that name."""
        return bool(self._info(name).type != fs.FileType.NotFound)

    def size(self, name: str) -> int | None:
        """Bytes of a file, ``None`` when there is none."""
        info = self._info(name)
        return int(info.size) if info.is_file else None

    def written(self, name: str) -> float | None:
        """When a file was written, in seconds, by the store's own clock; ``None`` if unknown."""
        time = self._info(name).mtime
        return None if time is None else float(time.timestamp())

    def names(self, directory: str = "", ending: str = "") -> list[str]:
        """Names of the files below a directory, sorted."""
        selector = fs.FileSelector(self.path(directory), allow_not_found=True, recursive=True)
        start = len(self.path()) + 1
        found = (i.path[start:] for i in self._opened[0].get_file_info(selector) if i.is_file)
        return sorted(name for name in found if name.endswith(ending))

    def directories(self) -> list[str]:
        """Names of the directories right below the root, sorted."""
        found = self._opened[0].get_file_info(fs.FileSelector(self.path(), allow_not_found=True))
        return sorted(i.base_name for i in found if i.type == fs.FileType.Directory)

    def delete(self, name: str) -> None:
        """Delete a file; nothing happens when there is none."""
        self._ask()
        if self.exists(name):
            self._opened[0].delete_file(self.path(name))

    def delete_directory(self, name: str) -> None:
        """Delete a directory with all in it; nothing happens when there is none."""
        self._ask()
        if self._info(name).type == fs.FileType.Directory:
            self._opened[0].delete_dir(self.path(name))

    def damaged(self, name: str, expected: str, got: str) -> DamagedFile:
        """The error of a file that is not as it was written."""
        return DamagedFile(
            self.path(name),
            expected,
            got,
            "Delete the file and run the command again: only what is missing is computed.",
        )

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, [json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"])

    def read_json(self, name: str) -> Any:
        """Read a JSON file, ``None`` when there is none; DamagedFile if it is not JSON."""
        if not self.exists(name):
            return None
        with self.open(name) as file:
            data = bytes(file.read())
        try:
            return json.loads(data)
        except ValueError as error:
            raise DamagedFile(
                self.path(name), "a JSON file", str(error), "Delete it and run the command again."
            ) from error


def _at_hand(path: str, chunks: Iterable[bytes | memoryview | pa.Buffer]) -> list[pa.Buffer]:
    """All bytes of a file, before the first of them is sent."""
    if isinstance(chunks, Sequence):
        return [pa.py_buffer(chunk) for chunk in chunks]
    written = 0
    try:
        with tempfile.TemporaryFile() as file:
            for chunk in chunks:
                file.write(chunk)
                written += len(chunk)
            file.flush()
            if not written:
                return []
            return [pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))]
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _no_space(path, Path(tempfile.gettempdir()), written, error) from error


def _no_space(path: str, directory: Path, written: int, error: OSError) -> NoSpace:
    return NoSpace(
        path,
        f"room on the disk of {directory} for the file",
        f"{error.strerror} after {written:,} bytes "
        f"({shutil.disk_usage(directory).free:,} bytes are free)",
        "Make room and run the same command again: everything finished is whole, and the run goes "
        "on from there.",
    )


def open_store(out: str | os.PathLike[str], flag: str) -> Store:
    """The store of an output directory; UserError for a relative path inside a submitted job,
    whose working directory is thrown away, or an object store that :meth:`Store.check` refuses."""
    text = os.fspath(out)
    check_place(flag, text)
    if text.startswith("~"):
        text = os.path.expanduser(text)
    address = text.partition("?")[0] if is_uri(text) else text
    if not address.rpartition("://")[2].strip("/") and text != "/":
        got = repr(shown(text)) if text else "nothing"
        raise UserError(flag, "a directory", got, "Give an absolute path or a URI.")
    if is_uri(text):
        store = Store(text)
        store.check(f"{flag} {store.root}")
        return store
    if os.path.isabs(text):
        return Store(text)
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise UserError(
            flag,
            "an absolute path or a URI",
            f"{text!r} inside a submitted job, whose working directory is temporary",
            "Give a path that all nodes share, or a URI such as s3://bucket/run.",
        )
    return Store(os.path.abspath(text))
