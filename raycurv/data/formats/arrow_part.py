"""Arrow IPC files and streams as parts of a source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import pyarrow as pa
import pyarrow.fs

from raycurv.data.bounds import check_expansion
from raycurv.data.ipc_sizes import MAGIC, message_sizes
from raycurv.data.parts import BatchPart, FilePart
from raycurv.data.rows import not_what_it_says, unreadable

_ARROW_START = 8  # where an Arrow file's stream begins


@dataclass(frozen=True)
class ArrowPart(FilePart, BatchPart):
    """An Arrow IPC file or stream, both read as a stream: a file is one between its magic and its
    footer."""

    def _stored_bytes(self) -> int:
        with unreadable(self.location), self.filesystem.open_input_file(self.path) as file:
            return int(file.size())

    def _batches(self) -> Iterator[Any]:
        with unreadable(self.location):
            # A map lets a large record batch be read in slices without holding it.
            local = isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)
            file = pa.memory_map(self.path) if local else self.filesystem.open_input_file(self.path)
        with file, not_what_it_says(self.location, "an Arrow IPC file or stream"):
            size, batches = file.size(), None
            if size == 0:
                raise pa.ArrowInvalid("the file is empty")
            if file.read(len(MAGIC)) == MAGIC:
                file.seek(0)
                batches = pa.ipc.open_file(file).num_record_batches
            file.seek(0 if batches is None else _ARROW_START)
            reader = pa.ipc.open_stream(file)
            for number in count():
                if not self._next(file, size, number):
                    break
                yield reader.read_next_batch()
            if batches not in (None, number):
                raise pa.ArrowInvalid(f"{number} record batches, and {batches} in the footer")

    def _next(self, file: Any, size: int, number: int) -> bool:
        """Whether a further batch comes; UserError if it takes far more memory than the file has
        bytes. Leaves the file where it is."""
        at = file.tell()
        decoded, found = 0, False
        for message in message_sizes(file, at, size):
            decoded, found = decoded + message.decoded + message.rows, message.batch
            if found:
                break
        file.seek(at)
        check_expansion(
            f"{self.location}, record batch {number}", decoded, size,
            "Write it with smaller record batches, and long examples as several.",
        )  # fmt: skip
        return found
