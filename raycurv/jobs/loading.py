"""What a job does about SIGTERM and SIGINT while its libraries load, which takes seconds."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def loading(job: str) -> Iterator[None]:
    """End at once when asked to, with the last line and the exit code of a job that stopped."""

    def end(number: int, frame: FrameType | None) -> None:
        said = {"status": "stopped", "job": job, "phases": {}, "message": "Nothing was begun."}
        os.write(1, json.dumps(said).encode() + b"\n")
        os._exit(128 + number)

    before = [(number, signal.signal(number, end)) for number in _SIGNALS]
    yield
    for number, handler in before:
        signal.signal(number, handler)
