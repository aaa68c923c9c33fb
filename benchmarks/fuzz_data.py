"""Damaged and hostile files of data through the reader: examples come, or a mistake that is told.

Whole files of every format are changed by a seeded generator, in their bytes and in their rows, and
read with settings that change, too. Whatever else is raised is a fault of raycurv's, and is shown
with the number of its case: case n of a seed is the same however many are run.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raycurv.data.examples import examples_to_table, table_to_examples
from raycurv.data.formats.file_formats import ending
from raycurv.data.microbatch import make_batch
from raycurv.data.reading import ExampleReader

Random = np.random.Generator
VOCABULARY = 300


class ByteTokenizer:
    """Bytes as token ids, with one special token before and after a text."""

    def encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        around = [VOCABULARY - 1] if special else []
        return [[*around, *text.encode(), *around] for text in texts]


def data_cases(folder: Path, seed: int) -> Callable[[int], str]:
    """Cases of changed files that are read: number -> ``examples``.

    Args:
        folder: an empty one, where the files may lie.
        seed: of all cases together.
    """
    wholes = whole_files()
    return lambda number: _case(np.random.default_rng((seed, number)), wholes, folder)


def _case(random: Random, wholes: dict[str, bytes], folder: Path) -> str:
    kinds = [".jsonl", ".parquet", ".arrow", ".feather", ".json", ".csv", ".jsonl.gz"]
    kind = str(random.choice(kinds))
    name = str(random.choice(sorted(name for name in wholes if ending(name) == kind)))
    content = wholes[name]
    if kind == ".jsonl" and random.random() < 0.8:
        content = _changed_rows(random, content)
    else:
        packed = kind.endswith(".gz") and random.random() < 0.5
        content = gzip.decompress(content) if packed else content
        for _ in range(int(random.geometric(0.6))):
            content = _changed_bytes(random, content)
        content = gzip.compress(content) if packed else content
    path = folder / f"case{kind}"
    path.write_bytes(content)
    state = folder / "state.json"
    if path.suffix == ".arrow" and random.random() < 0.1:
        said = json.dumps({"_data_files": [{"filename": path.name}], "_indices_files": None})
        state.write_bytes(_changed_bytes(random, said.encode()))
    try:
        return _read(random, folder if random.random() < 0.5 else path, path)
    finally:
        path.unlink()
        state.unlink(missing_ok=True)


def _read(random: Random, source: Path, path: Path) -> str:
    choose = random.choice
    reader = ExampleReader(
        source,
        ByteTokenizer(),
        VOCABULARY if random.random() < 0.9 else 40,
        None if random.random() < 0.5 else 64,
        max_length=None if random.random() < 0.5 else 7,
        long=str(choose(["error", "truncate", "truncate", "split", "split"])),  # type: ignore[arg-type]
        max_examples=None if random.random() < 0.7 else 3,
        empty=str(choose(["error", "skip"])),  # type: ignore[arg-type]
        token_inputs=None if random.random() < 0.9 else bool(random.random() < 0.5),
        either=bool(random.random() < 0.5),
        looks_up=lambda inputs: VOCABULARY,
    )
    reader.parts = [part for part in reader.parts if part.name == path.name]
    examples = list(reader.examples())
    # As a run keeps them, and as they go through the stages.
    table_to_examples(examples_to_table(examples))
    make_batch(0, examples[:8], torch.float32)
    return "examples"


# What is changed


def whole_files() -> dict[str, bytes]:
    """Small files of every format and kind of example."""
    random = np.random.default_rng(0)
    ids = [random.integers(0, 40, n).tolist() for n in (3, 9, 1, 6, 12, 2)]
    tokens = pa.table(
        {
            "id": [f"row {n}" for n in range(6)],
            "input_ids": pa.array(ids, pa.list_(pa.int32())),
            "attention_mask": pa.array([[1] * len(row) for row in ids], pa.list_(pa.int8())),
            "labels": pa.array([[-100, *row[1:]] for row in ids], pa.large_list(pa.int64())),
            "loss_mask": pa.array([[True] * len(row) for row in ids]),
        }
    )
    texts = pa.table(
        {"text": ["a", "bb", "", "dé", "a", "f" * 40], "meta": [{"a": n} for n in range(6)]}
    )
    asked = pa.table({"prompt": ["a", "b"], "completion": ["c", "déf"]})
    numbers = pa.table(
        {"inputs": [[[1.0, 2.0], [3.0, 4.5]]] * 3, "labels": pa.array([0, 1, 2], pa.int32())}
    )
    classes = pa.table({"inputs": [[1, 2, 3], [4, 5, 6]], "labels": [0.5, 1.5]})
    named = {
        "tokens": tokens, "texts": texts, "asked": asked, "numbers": numbers, "classes": classes,
    }  # fmt: skip
    found: dict[str, bytes] = {}
    for name, table in named.items():
        for compression in ("snappy", "zstd"):
            buffer = io.BytesIO()
            pq.write_table(table, buffer, compression=compression, row_group_size=4)
            found[f"{name}-{compression}.parquet"] = buffer.getvalue()
        encoded = table
        if name == "texts":
            encoded = table.set_column(0, "text", table["text"].dictionary_encode())
        for codec in (None, "zstd", "lz4"):
            options = pa.ipc.IpcWriteOptions(compression=codec)
            for suffix, new in (("stream.arrow", pa.ipc.new_stream), ("feather", pa.ipc.new_file)):
                sink = pa.BufferOutputStream()
                with new(sink, encoded.schema, options=options) as writer:
                    writer.write_table(encoded, max_chunksize=4)
                found[f"{name}-{codec}.{suffix}"] = sink.getvalue().to_pybytes()
        rows = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
        found[f"{name}.jsonl"] = rows.encode()
        found[f"{name}.jsonl.gz"] = gzip.compress(rows.encode())
        found[f"{name}.json"] = json.dumps(table.to_pylist(), indent=1).encode()
    for name in ("texts", "asked"):
        text = io.StringIO()
        lines = csv.writer(text)
        lines.writerow(["id", *named[name].column_names])
        lines.writerows([n, *row.values()] for n, row in enumerate(named[name].to_pylist()))
        found[f"{name}.csv"] = text.getvalue().encode()
    return found


STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, float("nan"),
    float("inf"), "", "a", "\x00", "\ud800", "é" * 50, [], [[]], [None], [1, "a"], [1.0, 2.5], {},
    {"a": 1}, [{"role": "user", "content": "x"}], [[1, 2], [3]], [True, False], ["a"], "x" * 5000,
)  # fmt: skip
COLUMNS = (
    "id", "text", "prompt", "completion", "input_ids", "labels", "loss_mask", "inputs",
    "attention_mask", "position_ids", "token_type_ids", "messages", "completion_mask", "other",
    "", "a.b", "\ud800",
)  # fmt: skip


def _changed_rows(random: Random, content: bytes) -> bytes:
    """Rows with other values, keys or order, as JSON writes them."""
    rows = [json.loads(line) for line in content.decode().splitlines()]
    for _ in range(int(random.integers(1, 4))):
        row = rows[int(random.integers(len(rows)))]
        strange = STRANGE[int(random.integers(len(STRANGE)))]
        column = str(random.choice(sorted(row))) if row else ""
        kind = int(random.integers(5))
        if kind == 0 and row:
            row[column] = strange
        elif kind == 1:
            row[COLUMNS[int(random.integers(len(COLUMNS)))]] = strange
        elif kind == 2 and row:
            del row[column]
        elif kind == 3 and row and isinstance(row[column], list):
            row[column] = [*row[column], strange]
        else:
            rows.append(dict(rows[int(random.integers(len(rows)))]))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _changed_bytes(random: Random, content: bytes) -> bytes:
    """A file with a few bytes changed, cut out, doubled or put in."""
    data = bytearray(content)
    if not data:
        return bytes(random.bytes(8))
    at, kind = int(random.integers(len(data))), int(random.integers(7))
    length = int(random.integers(1, 17))
    if kind == 0:
        data[at] ^= 1 << int(random.integers(8))
    elif kind == 1:
        data[at] = int(random.integers(256))
    elif kind == 2:
        del data[at : at + length]
    elif kind == 3:
        data[at:at] = data[at : at + length]
    elif kind == 4:
        data[at:at] = random.bytes(length)
    elif kind == 5:
        extremes = (
            b"\xff" * 4, b"\xff" * 8, b"\x00" * 8, b"\x7f" + b"\xff" * 3, b"\xfe\xff\xff\x7f",
            (1 << 40).to_bytes(8, "little"), b"\x80\x80\x80\x80\x01",
        )  # fmt: skip
        value = extremes[int(random.integers(len(extremes)))]
        data[at : at + len(value)] = value
    else:
        del data[at:]
    return bytes(data)
