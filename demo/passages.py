"""The demo's texts: passages of the running Python's own standard library.

Each chosen file gives one run of consecutive passages. All of them are training passages but, in
some files, one from the run's inside: a query, which a model trained on the rest has never seen.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

# One file a subject, so that a file's passages share words that others lack. The first ones that
# this Python has, with enough text, are taken; the last few stand in for those that it lacks.
FILES = (
    "calendar.py", "json/decoder.py", "heapq.py", "textwrap.py", "fractions.py", "statistics.py",
    "random.py", "csv.py", "gzip.py", "tarfile.py", "ftplib.py", "smtplib.py", "imaplib.py",
    "http/cookies.py", "urllib/parse.py", "queue.py", "threading.py", "_pydecimal.py", "pickle.py",
    "pickletools.py", "ast.py", "tokenize.py", "turtle.py", "wave.py", "uuid.py", "ipaddress.py",
    "base64.py", "argparse.py", "configparser.py", "logging/handlers.py", "shlex.py", "difflib.py",
    "plistlib.py", "mimetypes.py", "locale.py", "gettext.py", "webbrowser.py",
    "xml/dom/minidom.py", "asyncio/locks.py", "multiprocessing/pool.py", "unittest/mock.py",
    "dataclasses.py", "enum.py", "typing.py", "graphlib.py", "html/parser.py", "subprocess.py",
    "tempfile.py",
    "zipimport.py", "selectors.py", "platform.py", "shutil.py", "email/header.py", "operator.py",
    "bdb.py", "functools.py", "codecs.py", "contextlib.py", "timeit.py", "pprint.py",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Cuts standard library sources into OUT/train.parquet and OUT/queries.parquet."""

    out: Path
    """Directory for the two files."""
    files: int = 48
    """Source files to take."""
    per_file: int = 24
    """Training passages of each file."""
    max_bytes: int = 256
    """Longest passage, in bytes of UTF-8."""
    queries: int = 12
    """Files that also give a held-out query."""
    seed: int = 0
    """Of where in a file its passages lie, and of which one is the query."""


@dataclass(frozen=True)
class Passage:
    """A piece of a source file; ``id`` is the file and the piece's number in it."""

    id: str
    file: str
    text: str


def cut(text: str, max_bytes: int) -> Iterator[str]:
    """Pieces of at most ``max_bytes`` that add up to the text, cut at line ends where possible."""
    piece, size = "", 0
    for line in text.splitlines(keepends=True):
        for part in _parts(line, max_bytes):
            part_size = len(part.encode())
            if size + part_size > max_bytes:
                yield piece
                piece, size = "", 0
            piece, size = piece + part, size + part_size
    if piece:
        yield piece


def _parts(line: str, max_bytes: int) -> Iterator[str]:
    """The line whole when it fits, else its pieces, none of which splits a character."""
    while len(line.encode()) > max_bytes:
        head = line.encode()[:max_bytes].decode(errors="ignore")
        yield head
        line = line[len(head) :]
    yield line


def run_of_passages(stdlib: Path, file: str, settings: Settings) -> list[Passage]:
    """``per_file + 1`` passages of a file, in order; none when it is missing or too short.

    A piece under a quarter of the limit says too little to be a passage, and is passed over.
    """
    path = stdlib / file
    if not path.is_file():
        return []
    pieces = enumerate(cut(path.read_bytes().decode(), settings.max_bytes))
    usable = [
        Passage(f"{file}#{k}", file, piece)
        for k, piece in pieces
        if len(piece.strip().encode()) >= settings.max_bytes // 4
    ]
    wanted = settings.per_file + 1
    if len(usable) < wanted:
        return []
    # A generator a file, so that one file more or less leaves the others' passages as they are.
    start = random.Random(f"{settings.seed} {file}").randint(0, len(usable) - wanted)
    return usable[start : start + wanted]


def choose(stdlib: Path, settings: Settings) -> tuple[list[Passage], list[Passage]]:
    """Training passages and queries, with no text in both.

    Raises:
        SystemExit: this Python's library has too few of the files.
    """
    candidates = (run_of_passages(stdlib, file, settings) for file in FILES)
    runs = [run for run in candidates if run][: settings.files]
    if len(runs) < settings.files or settings.queries > settings.files:
        raise SystemExit(
            f"{stdlib}: expected {settings.files} source files of at least "
            f"{settings.per_file + 1} passages and at most as many queries, got {len(runs)} files "
            f"and {settings.queries} queries. Lower --files, --per-file or --queries."
        )
    asked = set(random.Random(settings.seed).sample(range(len(runs)), settings.queries))
    train, queries = [], []
    for i, run in enumerate(runs):
        # Training passages on both sides of the query; without one, the run's last is left out.
        held_out = settings.per_file // 2 if i in asked else settings.per_file
        train += run[:held_out] + run[held_out + 1 :]
        queries += [run[held_out]] if i in asked else []
    unseen = {query.text for query in queries}
    return [passage for passage in train if passage.text not in unseen], queries


def write(passages: list[Passage], path: Path) -> None:
    """A Parquet file of columns ``id``, ``file``, ``text``: the whole of it or none."""
    columns = {name: [getattr(p, name) for p in passages] for name in ("id", "file", "text")}
    part = path.with_name(path.name + ".part")
    pq.write_table(pa.table(columns), part)
    part.replace(path)


def main(settings: Settings) -> None:
    stdlib = Path(sysconfig.get_path("stdlib"))
    train, queries = choose(stdlib, settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    for name, passages in (("train", train), ("queries", queries)):
        path = settings.out / f"{name}.parquet"
        write(passages, path)
        size = sum(len(p.text.encode()) for p in passages)
        files = len({p.file for p in passages})
        print(f"{path}: {len(passages)} passages of {files} files, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main(tyro.cli(Settings))
