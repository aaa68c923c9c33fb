"""The Parquet tables: their columns, and how files of them are written and read.

Footers carry ``raycurv.schema`` (the version below), ``raycurv.run`` (the run's settings as JSON)
and ``raycurv.checksum``, a hash of the whole file with zeros in the place of the hash, which is
verified when raycurv reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raycurv.errors import DamagedFile
from raycurv.files.store import Store

SCHEMA_VERSION = "1"

# Rows that are made and written at a time where there may be many.
ROWS = 1 << 15

_CHECKSUM = "raycurv.checksum"
_ZEROS = b"0" * 32
# As Thrift writes a string of 32 bytes behind its name.
_MARK = _CHECKSUM.encode() + bytes([0x18, 32])

BLOCKS = pa.schema(
    [
        ("block", pa.string()),
        ("module", pa.string()),
        ("stage", pa.int32()),
        ("input_factor", pa.string()),
        ("input_tiles", pa.list_(pa.int32())),
        ("output_tiles", pa.list_(pa.int32())),
        ("d_in", pa.int32()),
        ("d_out", pa.int32()),
        ("bias", pa.bool_()),
        ("tokens", pa.int64()),
        ("examples", pa.int64()),
        ("trace", pa.float64()),
        ("mean_eigenvalue", pa.float64()),
        ("input_effective_rank", pa.float64()),
        ("output_effective_rank", pa.float64()),
        ("eigh_outcome", pa.string()),
        ("eigh_seconds", pa.float64()),
    ]
)

SPECTRUM = pa.schema(
    [
        ("factor", pa.string()),
        ("block", pa.string()),
        ("tile", pa.int32()),
        ("side", pa.string()),
        ("index", pa.int32()),
        ("eigenvalue", pa.float64()),
        ("tile_start", pa.int32()),
        ("tile_stop", pa.int32()),
    ]
)

GRADIENTS = pa.schema(
    [
        ("block", pa.string()),
        ("examples", pa.int64()),
        ("mean_sq_norm", pa.float64()),
        ("sq_norm", pa.float64()),
        ("noise", pa.float64()),
        ("signal", pa.float64()),
        ("noise_scale", pa.float64()),
        ("fisher_trace_empirical", pa.float64()),
        ("fisher_trace_sampled", pa.float64()),
        ("gauss_newton_bartlett_trace", pa.float64()),
        ("batches", pa.int64()),
    ]
)

TIMELINE = pa.schema(
    [
        ("phase", pa.string()),
        ("actor", pa.string()),
        ("operation", pa.string()),
        ("microbatch", pa.int32()),
        ("start", pa.timestamp("us", "UTC")),
        ("end", pa.timestamp("us", "UTC")),
        ("transport", pa.float64()),
        ("note", pa.string()),
        ("node", pa.string()),
        ("pid", pa.int32()),
        ("memory", pa.int64()),
    ]
)


def examples_schema(double: bool) -> pa.Schema:
    """``tables/examples``: one row a training example."""
    number = _number(double)
    return pa.schema(
        [
            ("id", pa.string()),
            ("tokens", pa.int32()),
            ("loss", number),
            ("gradient_sq_norm", number),
        ]
    )


def evaluation_schema(double: bool) -> pa.Schema:
    """``tables/examples`` of an evaluation: one row an example, ``correct`` of its targets."""
    return pa.schema(
        [
            ("id", pa.string()),
            ("tokens", pa.int32()),
            ("targets", pa.int32()),
            ("loss", _number(double)),
            ("correct", pa.int32()),
        ]
    )


def gradient_norms_schema(double: bool) -> pa.Schema:
    """``tables/gradient_norms``: one row a training example."""
    number = _number(double)
    return pa.schema(
        [("id", pa.string()), ("sq_norm", number), ("block_sq_norms", pa.list_(number))]
    )


def scores_schema(double: bool, per_block: bool, per_token: bool) -> pa.Schema:
    """``scores``: one row a query and training example."""
    number = _number(double)
    fields = [("query_id", pa.string()), ("train_id", pa.string()), ("score", number)]
    if per_block:
        fields.append(("block_scores", pa.list_(number)))
    if per_token:
        fields.append(("token_scores", pa.list_(number)))
    return pa.schema(fields)


def self_schema(double: bool) -> pa.Schema:
    """``self``: one row a training example."""
    return pa.schema([("id", pa.string()), ("score", _number(double))])


SALIENCY = pa.schema(
    [
        ("block", pa.string()),
        ("row", pa.int32()),
        ("saliency", pa.list_(pa.float32())),
        ("keep", pa.list_(pa.bool_())),
        ("unit_saliency", pa.list_(pa.float32())),
    ]
)

PRUNED = pa.schema(
    [
        ("block", pa.string()),
        ("weights", pa.int64()),
        ("removed", pa.int64()),
        ("sparsity", pa.float64()),
        ("saliency", pa.float64()),
        ("predicted", pa.float64()),
        ("measured", pa.float64()),
        ("update", pa.string()),
        ("iterations", pa.int32()),
        ("residual", pa.float64()),
        ("seconds", pa.float64()),
    ]
)

HEADS = pa.schema(
    [
        ("block", pa.string()),
        ("head", pa.int32()),
        ("start", pa.int32()),
        ("stop", pa.int32()),
        ("saliency", pa.float32()),
        ("keep", pa.bool_()),
    ]
)


def _number(double: bool) -> pa.DataType:
    return pa.float64() if double else pa.float32()


def footer(settings: Mapping[str, Any], **more: Any) -> dict[str, str]:
    """What a table's footer says of the run; ``more`` becomes ``raycurv.NAME`` as JSON."""
    said = {"raycurv.schema": SCHEMA_VERSION, "raycurv.run": json.dumps(settings, sort_keys=True)}
    return said | {f"raycurv.{key}": json.dumps(value) for key, value in more.items()}


def write_table(
    store: Store,
    name: str,
    table: pa.Table,
    notes: Mapping[str, str] | None = None,
    row_group_size: int | None = None,
) -> None:
    """Write one Parquet file, atomically."""
    write_tables(store, name, table.schema, [table], notes, row_group_size)


def write_tables(
    store: Store,
    name: str,
    schema: pa.Schema,
    tables: Iterable[pa.Table],
    notes: Mapping[str, str] | None = None,
    row_group_size: int | None = None,
    repeated: Sequence[str] | None = None,
) -> None:
    """Write one Parquet file, atomically, from tables of which one is held at a time.

    Each makes row groups of its own: of ``ROWS`` rows they are large enough for those who read.

    Args:
        repeated: columns whose values come many times, which alone are to be looked up; by
            default Parquet finds out.
    """
    if notes is not None:
        schema = schema.with_metadata(dict(notes))
    sink = pa.BufferOutputStream()
    looked_up = True if repeated is None else list(repeated)
    with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=looked_up) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=row_group_size)
        writer.add_key_value_metadata({_CHECKSUM: _ZEROS.decode()})
    data = sink.getvalue()
    at = _checksum_place(data)
    assert at is not None and bytes(data[at : at + len(_ZEROS)]) == _ZEROS
    checksum = _checksum(data, at)
    store.write(name, [data[:at], checksum, data[at + len(_ZEROS) :]])


def _checksum_place(data: pa.Buffer) -> int | None:
    """Where the checksum stands in the footer: behind its name and its length."""
    footer = int.from_bytes(data[-8:-4], "little") + 8
    tail = max(0, len(data) - footer)
    found = bytes(data[tail:]).rfind(_MARK)
    at = tail + found + len(_MARK)
    return at if found >= 0 and at + len(_ZEROS) <= len(data) else None


def _checksum(data: pa.Buffer, at: int) -> bytes:
    digest = hashlib.blake2b(digest_size=len(_ZEROS) // 2)
    for part in (data[:at], _ZEROS, data[at + len(_ZEROS) :]):
        digest.update(part)
    return digest.hexdigest().encode()


def read_table(store: Store, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one Parquet file.

    Raises:
        FileNotFoundError: no such file.
        DamagedFile: truncated, or it does not match its checksum.
    """
    with store.open(name) as file:
        data = file.read_buffer()
    at = _checksum_place(data)
    if at is None or bytes(data[at : at + len(_ZEROS)]) != _checksum(data, at):
        raise _damaged(store, name, ValueError("a file that does not match its checksum"))
    table = pq.ParquetFile(pa.BufferReader(data)).read(
        columns=None if columns is None else list(columns)
    )
    said = table.schema.metadata
    return table.replace_schema_metadata({k: v for k, v in said.items() if k != _CHECKSUM.encode()})


def read_rows(store: Store, name: str) -> int:
    """How many rows a Parquet file has, from its footer.

    Raises:
        DamagedFile: it has none.
    """
    with store.open(name) as file:
        try:
            return int(pq.ParquetFile(file).metadata.num_rows)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _damaged(store, name, error) from error


def read_directory(store: Store, directory: str, schema: pa.Schema | None = None) -> pa.Table:
    """All Parquet files of a directory as one table, in the order of their names."""
    tables = list(iterate_directory(store, directory))
    if not tables:
        return (schema or pa.schema([])).empty_table()
    return pa.concat_tables(tables)


def iterate_directory(store: Store, directory: str) -> Iterator[pa.Table]:
    """The Parquet files of a directory, one table each, in the order of their names."""
    for name in store.names(directory, ".parquet"):
        yield read_table(store, name)


def _damaged(store: Store, name: str, error: Exception) -> DamagedFile:
    return DamagedFile(
        store.path(name),
        "a whole Parquet file",
        str(error),
        "Delete the file and run the command again: only what is missing is computed.",
    )
