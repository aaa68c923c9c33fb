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

import json
import mmap
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache
from typing import Any

import pyarrow as pa
from pyarrow import fs

from raycurv.data.uri import below, check_endpoint, check_place, is_uri, redacted, shown
from raycurv.errors import DamagedFile, UserError, shortened, user_errors
from raycurv.files.disk import disk_errors, folder, no_space, remove_folder, told
from raycurv.jsonfile import checksum, strict_json
from raycurv.names import inside, kind_of, plain_name

# Bytes held at once while a file is copied.
_CHUNK = 64 << 20
# Bytes of a JSON file that is read: such a file describes tensors and tables, and holds none.
_LARGEST_JSON = 1 << 28
# Of the JSON files. Those of version 1 had no checksum.
SCHEMA = "2"


_READABLE = "a file that can be read"
# Names are asked for again and again.
_plain = lru_cache(1 << 14)(plain_name)


class Store:
    """Files below one root, by names with forward slashes. Picklable.

    On a local disk a file is written beside its name, synced and renamed; on an object store it is
    one upload under its final name, which is there when it is complete (see above).

    Args:
        root: an absolute path, or a URI that ``pyarrow.fs`` understands.
        lasting: whether files must survive a power failure (they are synced); without, only the
            death of the process.
        private: whether the root is for this user alone, and not named by the user.

    Attributes:
        uri: what opens it, with the credentials that were given.
        root: what is shown and recorded, without them.
        guard: called before anything is written or deleted; it may refuse by raising. It does not
            travel to other processes.
    """

    def __init__(self, root: str, lasting: bool = True, private: bool = False) -> None:
        address, mark, options = root.partition("?") if is_uri(root) else (root, "", "")
        self.uri = f"{address.rstrip('/') or '/'}{mark}{options}"
        self.root, self.lasting, self.private = shown(self.uri), lasting, private
        self.guard: Callable[[], None] | None = None
        # Where this lies below the directory that was named, whose links are the user's own.
        self._prefix = ""

    def __getstate__(self) -> dict[str, Any]:
        kept = ("uri", "root", "lasting", "private", "_prefix")
        return {name: getattr(self, name) for name in kept} | {"guard": None}

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
        except (pa.ArrowInvalid, OSError, ImportError) as error:
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
        """What ``pyarrow.fs`` calls the file; UserError for a name that is not plain."""
        if not name:
            return self._opened[1]
        return f"{self._opened[1]}/{_plain(name, self.root)}"

    def inside(self, name: str) -> Store:
        """The store of a directory below this one; UserError for a name that is not plain."""
        _plain(name, self.root)
        uri = below(self.uri, name) if is_uri(self.uri) else f"{self.uri}/{name}"
        found = Store(uri, self.lasting, self.private)
        found.guard, found._prefix = self.guard, self._below(name)
        return found

    def _below(self, name: str) -> str:
        """A name as it is below the directory that was named."""
        if not self._prefix:
            return name
        return f"{self._prefix}/{name}" if name else self._prefix

    @cached_property
    def _named(self) -> str:
        """The directory that was named, on a local disk."""
        return self.path().removesuffix(f"/{self._prefix}") if self._prefix else self.path()

    def _found(self, name: str) -> tuple[str, os.stat_result]:
        """Where a local file or folder lies, after links, and what the disk says of it; UserError
        if it lies elsewhere, FileNotFoundError if there is none."""
        full = self._below(_plain(name, self.root) if name else "")
        places, _, leaf = full.rpartition("/")
        if places not in self._folders:
            there = inside(self._named, places, self._named) if places else self._named
            self._folders[places] = os.path.realpath(there)
        path = os.path.join(self._folders[places], leaf)
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            path = os.fspath(inside(self._named, full, self._named))
            status = os.stat(path)
        return path, status

    @cached_property
    def _folders(self) -> dict[str, str]:
        """Folders that were looked at, and where they lie: files are read from there. What is
        written and deleted is looked at anew."""
        return {}

    def _status(self, name: str) -> os.stat_result | None:
        """What the disk says of a local file or folder, ``None`` when there is none."""
        try:
            return self._found(name)[1]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise told(self.path(name), _READABLE, error) from error

    @contextmanager
    def _folder(self, names: str, make: bool) -> Iterator[int]:
        """A descriptor of a local folder below the directory that was named."""
        parts = names.split("/") if names else []
        with folder(self._named, parts, make, self.private) as opened:
            yield opened

    def check(self, where: str) -> None:
        """Refuse, with a UserError, an object store that does not answer (within seconds where the
        URI names the endpoint), and a bucket that is not there."""
        if self.local:
            return
        check_endpoint(self.uri, where)
        if isinstance(self._opened[0], fs.PyFileSystem):
            # Of another library's, such as the Hugging Face hub's: raises whatever that does.
            expected, remedy = "a file system that answers", "Check the URI and the credentials."
            with user_errors(where, expected, remedy, Exception):
                self._opened[0].get_file_info(self.path())
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
            with self._folder(self._prefix, make=True):
                pass
        elif self._makes_buckets:
            self._opened[0].create_dir(self._bucket)

    @property
    def _bucket(self) -> str:
        return self.path().partition("/")[0]

    @property
    def _makes_buckets(self) -> bool:
        return "allow_bucket_creation=true" in self.uri.partition("?")[2].lower().split("&")

    def write(self, name: str, chunks: Iterable[bytes | memoryview | pa.Buffer]) -> None:
        """Write a file, atomically.

        Raises:
            NoSpace: the disk is full, and nothing of it stays.
            DiskError: it cannot be written for another reason, likewise.
            UserError: a link stands in the place of a folder.
        """
        self._ask()
        apart = chunks if isinstance(chunks, Sequence) else _apart(chunks)
        try:
            if self.local:
                self._write_local(name, apart)
            else:
                self._upload(self.path(name), apart)
        except _SourceFailed as failed:
            raise failed.error from None

    def _write_local(self, name: str, chunks: Iterable[bytes | memoryview | pa.Buffer]) -> None:
        path = self.path(name)
        places, _, leaf = self._below(name).rpartition("/")
        part, written = f"{leaf}.part", 0
        try:
            with self._folder(places, make=True) as opened:
                # What a process left that died; whoever writes there now finds that it is gone.
                with suppress(FileNotFoundError):
                    os.unlink(part, dir_fd=opened)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                descriptor = os.open(part, flags, 0o666, dir_fd=opened)
                try:
                    with os.fdopen(descriptor, "wb") as file:
                        for chunk in chunks:
                            file.write(chunk)
                            written += len(chunk)
                        file.flush()
                        if self.lasting:
                            os.fsync(file.fileno())
                    os.replace(part, leaf, src_dir_fd=opened, dst_dir_fd=opened)
                except (OSError, _SourceFailed):
                    with suppress(OSError):
                        os.unlink(part, dir_fd=opened)
                    raise
        except OSError as error:
            raise no_space(path, os.path.dirname(path), written, error) from error

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
        with source.reading(name) as file:
            self.write(name, iter(lambda: file.read(_CHUNK), b""))

    def open(self, name: str) -> pa.NativeFile:
        """A random-access reader.

        Raises:
            FileNotFoundError: there is no such file.
            DamagedFile: there is a directory, a pipe or a device in its place.
            UserError: a link leads out of the directory.
            DiskError: it cannot be read.
        """
        if not self.local:
            return self._opened[0].open_input_file(self.path(name))
        try:
            return self._open_local(name)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise told(self.path(name), _READABLE, error) from error

    def _open_local(self, name: str) -> pa.NativeFile:
        path, status = self._found(name)
        if not stat.S_ISREG(status.st_mode):
            raise self.damaged(name, "a file", kind_of(status.st_mode))
        return self._opened[0].open_input_file(path)

    @contextmanager
    def reading(self, name: str) -> Iterator[pa.NativeFile]:
        """As :meth:`open`, and what the disk says while it is read is a DiskError, too."""
        if not self.local:
            with self.open(name) as file:
                yield file
            return
        with disk_errors(self.path(name), _READABLE), self._open_local(name) as file:
            yield file

    def _info(self, name: str) -> fs.FileInfo:
        return self._opened[0].get_file_info(self.path(name))

    def exists(self, name: str) -> bool:
        if self.local:
            found = self._status(name)
            return found is not None and stat.S_ISREG(found.st_mode)
        return bool(self._info(name).is_file)

    def there(self, name: str) -> bool:
        """Whether there is a file or a directory of that name."""
        if self.local:
            return self._status(name) is not None
        return bool(self._info(name).type != fs.FileType.NotFound)

    def size(self, name: str) -> int | None:
        """Bytes of a file, ``None`` when there is none."""
        if self.local:
            found = self._status(name)
            return found.st_size if found is not None and stat.S_ISREG(found.st_mode) else None
        info = self._info(name)
        return int(info.size) if info.is_file else None

    def written(self, name: str) -> float | None:
        """When a file was written, in seconds, by the store's own clock; ``None`` if unknown."""
        time = self._info(name).mtime
        return None if time is None else float(time.timestamp())

    def names(self, directory: str = "", ending: str = "") -> list[str]:
        """Names of the files below a directory, sorted; a local one must not lead elsewhere, nor
        anything in it."""
        if self.local:
            found: Iterable[str] = self._walk(directory, ending)
        else:
            selector = fs.FileSelector(self.path(directory), allow_not_found=True, recursive=True)
            start = len(self.path()) + 1
            found = (i.path[start:] for i in self._opened[0].get_file_info(selector) if i.is_file)
        return sorted(name for name in found if name.endswith(ending))

    def _walk(self, directory: str, ending: str) -> Iterator[str]:
        # What has a file's name and is none is a name, too: who opens it is told.
        with disk_errors(self.path(directory), "a directory that can be read"):
            try:
                real, _ = self._found(directory)
            except (FileNotFoundError, NotADirectoryError):
                return
            for place, folders, files in os.walk(real, onerror=_unless_gone):
                inner = os.path.relpath(place, real)
                above = "/".join(part for part in (directory, inner) if part not in ("", "."))
                for name in (*folders, *files):
                    full = f"{above}/{name}" if above else name
                    if os.path.islink(os.path.join(place, name)):
                        self._status(full)
                    if name in files or (ending and name.endswith(ending)):
                        yield full

    def directories(self) -> list[str]:
        """Names of the directories right below the root, sorted."""
        found = self._opened[0].get_file_info(fs.FileSelector(self.path(), allow_not_found=True))
        return sorted(i.base_name for i in found if i.type == fs.FileType.Directory)

    def delete(self, name: str) -> None:
        """Delete a file; nothing happens when there is none."""
        self._ask()
        if not self.local:
            if self.exists(name):
                self._opened[0].delete_file(self.path(name))
            return
        places, _, leaf = self._below(_plain(name, self.root)).rpartition("/")
        with disk_errors(self.path(name), "a file that can be deleted"):
            try:
                with self._folder(places, make=False) as opened:
                    os.unlink(leaf, dir_fd=opened)
            except (FileNotFoundError, IsADirectoryError):
                return

    def delete_directory(self, name: str) -> None:
        """Delete a directory with all in it; nothing happens when there is none."""
        self._ask()
        if not self.local:
            if self._info(name).type == fs.FileType.Directory:
                self._opened[0].delete_dir(self.path(name))
            return
        path = self.path(name)
        full = self._below(name)
        places, _, leaf = full.rpartition("/")
        with disk_errors(path, "a directory that can be deleted"), suppress(FileNotFoundError):
            if full:
                with self._folder(places, make=False) as opened:
                    remove_folder(leaf, opened, path)
            else:
                with folder(os.path.dirname(path), (), make=False) as opened:
                    remove_folder(os.path.basename(path), opened, path)

    def damaged(self, name: str, expected: str, got: str) -> DamagedFile:
        """The error of a file that is not as it was written."""
        return DamagedFile(
            self.path(name),
            expected,
            got,
            "Delete the file and run the command again: only what is missing is computed.",
        )

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write an object as JSON, with the version of these files and a checksum of its content;
        neither is among what :meth:`read_json` gives."""
        sealed = {**value, "schema": SCHEMA, "checksum": checksum({**value, "schema": SCHEMA})}
        self.write(name, [json.dumps(sealed, indent=2, sort_keys=True).encode() + b"\n"])

    def read_json(
        self, name: str, remedy: str = "Delete it and run the command again."
    ) -> dict[str, Any] | None:
        """What :meth:`write_json` was given, ``None`` when there is no such file. What a version
        wrote that knew no checksums is taken as it is; a list of it is under ``""``.

        Args:
            remedy: what to do about one that is damaged.

        Raises:
            DamagedFile: it is no JSON, or not what was written.
            UserError: a newer version wrote it.
        """
        if not self.exists(name):
            if self.there(name):
                raise DamagedFile(self.path(name), "a JSON file", "something else", remedy)
            return None
        with self.reading(name) as file:
            try:
                if file.size() > _LARGEST_JSON:
                    raise ValueError(f"{file.size():,} bytes")
                said = strict_json(bytes(file.read()))
                if isinstance(said, list):
                    return {"": said}
                if not isinstance(said, dict):
                    raise ValueError("neither an object nor a list")
            except ValueError as error:
                got = shortened(str(error))
                raise DamagedFile(self.path(name), "a JSON file", got, remedy) from error
        mark, schema = said.pop("checksum", None), said.get("schema", "1")
        if schema not in ("1", SCHEMA) and mark == checksum(said):
            raise UserError(
                self.path(name), f"a file of version {SCHEMA} or before", f"one of {schema}",
                "Use the version of raycurv that wrote it, or a later one.",
            )  # fmt: skip
        if mark != checksum(said) and not (mark is None and schema == "1"):
            raise DamagedFile(
                self.path(name), "what raycurv wrote, with its checksum", "another content", remedy
            )
        said.pop("schema", None)
        return said

    def read_list(self, name: str, key: str) -> list[Any] | None:
        """The list that :meth:`write_json` was given under a key, or that an earlier version wrote
        by itself; ``None`` when there is no such file, otherwise as :meth:`read_json`."""
        said = self.read_json(name)
        found = None if said is None else said.get(key, said.get(""))
        if said is not None and (len(said) != 1 or not isinstance(found, list)):
            raise DamagedFile(
                self.path(name), f"a list of {key}", "another content",
                "Delete it and run the command again.",
            )  # fmt: skip
        return found


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


class _SourceFailed(Exception):
    """What is written cannot be read, which is no fault of where it is written to."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


def _apart(
    chunks: Iterable[bytes | memoryview | pa.Buffer],
) -> Iterator[bytes | memoryview | pa.Buffer]:
    """Chunks, whose own failure is a :class:`_SourceFailed`."""
    try:
        yield from chunks
    except OSError as error:
        raise _SourceFailed(error) from error


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
        raise no_space(path, tempfile.gettempdir(), written, error) from error


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
