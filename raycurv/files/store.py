"""A directory of results, on a disk or an object store: a file is there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from raycurv.errors import DamagedFile, NoSpace, UserError

# Bytes held at once while a file is copied.
_CHUNK = 64 << 20


class Store:
    """Files below one root, by names with forward slashes. Picklable.

    On a local disk a file is written beside its name, synced and renamed; on an object store it is
    one put under its final name.

    Args:
        root: an absolute path, or a URI that ``pyarrow.fs`` understands.
        lasting: whether files must survive a power failure (they are synced); without, only the
            death of the process.
    """

    def __init__(self, root: str, lasting: bool = True) -> None:
        self.root, self.lasting = root.rstrip("/") or "/", lasting

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "lasting": self.lasting}

    @cached_property
    def _place(self) -> tuple[fs.FileSystem, str]:
        if "://" not in self.root:
            return fs.LocalFileSystem(), self.root
        try:
            filesystem, path = fs.FileSystem.from_uri(self.root)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                self.root,
                "an absolute path or a URI that pyarrow.fs understands (s3://, gs://, file://)",
                str(error),
                "Correct the URI.",
            ) from error
        return filesystem, path.rstrip("/")

    @property
    def local(self) -> bool:
        """Whether the files lie on this machine's file system."""
        return isinstance(self._place[0], fs.LocalFileSystem)

    def path(self, name: str = "") -> str:
        """What ``pyarrow.fs`` calls the file."""
        return f"{self._place[1]}/{name}" if name else self._place[1]

    def inside(self, name: str) -> Store:
        """The store of a directory below this one."""
        return Store(f"{self.root}/{name}", self.lasting)

    def write(self, name: str, chunks: Iterable[bytes | memoryview | pa.Buffer]) -> None:
        """Write a file, atomically.

        Raises:
            NoSpace: the disk is full; nothing of the file stays.
        """
        path = self.path(name)
        if not self.local:
            with self._place[0].open_output_stream(path) as stream:
                for chunk in chunks:
                    stream.write(chunk)
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
            free = shutil.disk_usage(part.parent if part.parent.exists() else "/").free
            raise NoSpace(
                path,
                "room on the disk for the file",
                f"{error.strerror} after {written:,} bytes ({free:,} bytes are free)",
                "Make room and run the same command again: everything finished is whole, and the "
                "run goes on from there.",
            ) from error

    def copy(self, name: str, source: Store) -> None:
        """Write the file of the same name in another store, byte for byte, atomically."""
        with source.open(name) as file:
            self.write(name, iter(lambda: file.read(_CHUNK), b""))

    def open(self, name: str) -> pa.NativeFile:
        """A random-access reader.

        Raises:
            FileNotFoundError: no such file.
        """
        return self._place[0].open_input_file(self.path(name))

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        info = self._place[0].get_file_info(self.path(name))
        return bool(info.type == fs.FileType.File)

    def there(self, name: str) -> bool:
        """Whether there is a file or a directory of that name."""
        info = self._place[0].get_file_info(self.path(name))
        return bool(info.type != fs.FileType.NotFound)

    def size(self, name: str) -> int | None:
        """Bytes of a file, ``None`` when there is none."""
        info = self._place[0].get_file_info(self.path(name))
        return int(info.size) if info.type == fs.FileType.File else None

    def names(self, directory: str = "", ending: str = "") -> list[str]:
        """Names of the files below a directory, sorted."""
        selector = fs.FileSelector(self.path(directory), allow_not_found=True, recursive=True)
        start = len(self.path()) + 1
        found = (i.path[start:] for i in self._place[0].get_file_info(selector) if i.is_file)
        return sorted(name for name in found if name.endswith(ending))

    def directories(self, directory: str = "") -> list[str]:
        """Names of the directories right below a directory, sorted."""
        selector = fs.FileSelector(self.path(directory), allow_not_found=True)
        start = len(self.path()) + 1
        found = self._place[0].get_file_info(selector)
        return sorted(i.path[start:] for i in found if i.type == fs.FileType.Directory)

    def delete(self, name: str) -> None:
        """Delete a file; nothing happens when there is none."""
        if self.exists(name):
            self._place[0].delete_file(self.path(name))

    def delete_directory(self, name: str) -> None:
        """Delete a directory with all in it; nothing happens when there is none."""
        info = self._place[0].get_file_info(self.path(name))
        if info.type == fs.FileType.Directory:
            self._place[0].delete_dir(self.path(name))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, atomically."""
        self.write(name, [json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"])

    def read_json(self, name: str) -> Any:
        """Read a JSON file, ``None`` when there is none.

        Raises:
            DamagedFile: it is not JSON.
        """
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


def open_store(out: str | os.PathLike[str], flag: str) -> Store:
    """The store of an output directory.

    Raises:
        UserError: a relative path inside a submitted job, whose working directory is thrown away.
    """
    text = os.fspath(out)
    if text.startswith("~"):
        text = os.path.expanduser(text)
    if not text.rpartition("://")[2].strip("/") and text != "/":
        got = repr(text) if text else "nothing"
        raise UserError(flag, "a directory", got, "Give an absolute path or a URI.")
    if "://" in text or os.path.isabs(text):
        return Store(text)
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise UserError(
            flag,
            "an absolute path or a URI",
            f"{text!r} inside a submitted job, whose working directory is temporary",
            "Give a path that all nodes share, or a URI such as s3://bucket/run.",
        )
    return Store(os.path.abspath(text))
