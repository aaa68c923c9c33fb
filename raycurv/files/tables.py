"""The Parquet tables: their columns, and how files of them are written and read.

Footers carry ``raycurv.schema`` (the version below), ``raycurv.run`` (the run's settings as JSON),
``raycurv.file``, the name of the file, and ``raycurv.checksum``, a hash of the whole file with
zeros in the place of the hash; the latter two are verified when raycurv reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raycurv.data.bounds import check_expansion
from raycurv.data.columns import row_bytes
from raycurv.data.parquet_sizes import group_sizes
from raycurv.errors import RaycurvError, not_finite, shortened
from raycurv.files.store import Store

SCHEMA_VERSION = "1"

# Rows that are made and written at a time where there may be many.
ROWS = 1 << 15

_CHECKSUM, _FILE = "raycurv.checksum", "raycurv.file"
_ZEROS = b"0" * 32
_WHOLE = "a whole Parquet file"
# As Thrift writes a string of 32 bytes behind its name.
_MARK = _CHECKSUM.encode() + bytes([0x18, 32])

# Columns that say which row one is.
_ROW_NAMES = ("query_id", "train_id", "id", "block", "factor", "index", "row", "head")

_TYPES = {
    "string": pa.string(),
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "time": pa.timestamp("us", "UTC"),
}


def _schema(columns: str, double: bool = False) -> pa.Schema:
    """The schema of ``name type`` a column, separated by commas; ``[type]`` is a list of these.

    The type ``number`` is float64 if ``double``, else float32.
    """
    types = _TYPES | {"number": pa.float64() if double else pa.float32()}
    fields = []
    for column in columns.split(","):
        name, kind = column.split()
        item = types[kind.strip("[]")]
        fields.append((name, pa.list_(item) if kind.startswith("[") else item))
    return pa.schema(fields)


BLOCKS = _schema(
    """
    block string, module string, stage int32, input_factor string,
    input_tiles [int32], output_tiles [int32], d_in int32, d_out int32, bias bool,
    tokens int64, examples int64, trace float64, mean_eigenvalue float64,
    input_effective_rank float64, output_effective_rank float64,
    eigh_outcome string, eigh_seconds float64, thin bool
    """
)
SPECTRUM = _schema(
    """
    factor string, block string, tile int32, side string, index int32, eigenvalue float64,
    tile_start int32, tile_stop int32
    """
)
GRADIENTS = _schema(
    """
    block string, examples int64, mean_sq_norm float64, sq_norm float64,
    noise float64, signal float64, noise_scale float64,
    fisher_trace_empirical float64, fisher_trace_sampled float64,
    gauss_newton_bartlett_trace float64, batches int64
    """
)
EVIDENCE = _schema("damping float64, log_evidence float64, effective_parameters float64")
AGREEMENT = _schema("damping string, agreement float64, standard_error float64")
SOLVER = _schema(
    """
    query_id string, block string, step int32, residual float64, energy float64, cosine float64,
    curvature float64, outcome string
    """
)
CERTIFICATE = _schema(
    """
    query_id string, block string, residual float64, refined_residual float64, cosine float64,
    share float64, refined_share float64, captured float64, steps int32, outcome string,
    solver_residual float64, step_cosine float64, pearson float64, spearman float64,
    top_shared float64
    """
)
TIMELINE = _schema(
    """
    phase string, actor string, operation string, microbatch int32, start time, end time,
    transport float64, note string, node string, pid int32, memory int64
    """
)
SALIENCY = _schema(
    "block string, row int32, saliency [float32], keep [bool], unit_saliency [float32]"
)
PRUNED = _schema(
    """
    block string, weights int64, removed int64, sparsity float64, saliency float64,
    predicted float64, measured float64, update string, iterations int32, residual float64,
    seconds float64, zero_before int64
    """
)
HEADS = _schema("block string, head int32, start int32, stop int32, saliency float32, keep bool")
TRACES = _schema(
    """
    block string, weights int64, trace float64, standard_error float64, low float64, high float64,
    fitted float64
    """
)
EIGENVALUES = _schema("end string, index int32, eigenvalue float64, residual float64")
DENSITY = _schema("eigenvalue float64, density float64, standard_error float64")
SIZES = _schema("examples int64, eigenvalue float64, residual float64")
DIRECTION = _schema("block string, sq_norm float64, curvature float64")


# What every table of examples has.
IDS = _schema("id string")


def examples_schema(double: bool) -> pa.Schema:
    """``tables/examples``: one row a training example."""
    return _schema("id string, tokens int32, loss number, gradient_sq_norm number", double)


def evaluation_schema(double: bool) -> pa.Schema:
    """``tables/examples`` of an evaluation: one row an example, ``correct`` of its targets."""
    columns = "id string, tokens int32, targets int32, loss number, correct int32"
    return _schema(columns, double)


def gradient_norms_schema(double: bool) -> pa.Schema:
    """``tables/gradient_norms``: one row a training example."""
    return _schema("id string, sq_norm number, block_sq_norms [number]", double)


def scores_schema(double: bool, more: Mapping[str, bool] | None = None) -> pa.Schema:
    """``scores``: one row a query and training example.

    Args:
        double: whether numbers are float64.
        more: further columns, and whether each is a list of numbers.
    """
    columns = "query_id string, train_id string, score number"
    for name, is_list in (more or {}).items():
        columns += f", {name} {'[number]' if is_list else 'number'}"
    return _schema(columns, double)


def score_matrix(
    store: Store, names: Sequence[str], queries: pa.Array, examples: pa.Array
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The scores in some files ``[K, N]``, which have each of N examples on each of K queries.

    Args:
        names: of the files.
        queries: ids of the rows.
        examples: ids of the columns, likewise without one twice.
    """
    found = np.full((len(queries), len(examples)), np.nan)
    for name in names:
        table = read_table(store, name)
        rows = pc.index_in(table["query_id"], value_set=queries.cast(pa.string())).to_numpy()
        ids = table["train_id"].cast(pa.large_string())
        columns = pc.index_in(ids, value_set=examples.cast(pa.large_string())).to_numpy()
        found[rows, columns] = table["score"].to_numpy()
    assert not np.isnan(found).any(), "a pair that was not scored"
    return found


def self_schema(double: bool) -> pa.Schema:
    """``self``: one row a training example."""
    return _schema("id string, score number", double)


def lengths_schema(double: bool | None = None) -> pa.Schema:
    """``tables/queries`` and ``tables/train`` of scores: one row an example; with self-influence,
    where ``double`` says whether it is float64."""
    more = "" if double is None else ", self_influence number"
    return _schema(f"id string, tokens int32{more}", bool(double))


def footer(settings: Mapping[str, Any], **more: Any) -> dict[str, str]:
    """What a table's footer says of the run; ``more`` becomes ``raycurv.NAME`` as JSON."""
    run = {"raycurv.schema": SCHEMA_VERSION, "raycurv.run": json.dumps(settings, sort_keys=True)}
    return run | {f"raycurv.{key}": json.dumps(value) for key, value in more.items()}


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

    Raises:
        NumericalError: a number is NaN or infinite; names its row.
    """
    if notes is not None:
        schema = schema.with_metadata(dict(notes))
    sink = pa.BufferOutputStream()
    looked_up = True if repeated is None else list(repeated)
    with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=looked_up) as writer:
        for table in tables:
            _check_finite(store.path(name), table)
            writer.write_table(table, row_group_size=row_group_size)
        leaf = name.rpartition("/")[2]
        writer.add_key_value_metadata({_FILE: leaf, _CHECKSUM: _ZEROS.decode()})
    data = sink.getvalue()
    at = _checksum_place(data)
    assert at is not None and bytes(data[at : at + len(_ZEROS)]) == _ZEROS
    checksum = _checksum(data, at)
    store.write(name, [data[:at], checksum, data[at + len(_ZEROS) :]])


def _check_finite(file: str, table: pa.Table) -> None:
    """Refuse NaN and infinities, in lists as well; nulls stay."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        flat = column
        while _is_list(flat.type):
            flat = pc.list_flatten(flat)
        if not pa.types.is_floating(flat.type):
            continue
        finite = pc.is_finite(flat)
        if pc.all(finite).as_py() is False:
            wrong = pc.index(finite, False).as_py()
            row = table.slice(_row_of(column, wrong), 1).to_pylist()[0]
            names = [f"{key} {value!r}" for key, value in row.items() if key in _ROW_NAMES]
            raise not_finite(", ".join([file, *names]), f"`{name}`", str(flat[wrong]))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _row_of(column: pa.ChunkedArray, place: int) -> int:
    """The row that a number of a column, its lists laid end to end, stands in."""
    level, rows = column.combine_chunks(), np.arange(len(column))
    while _is_list(level.type):
        rows = rows[pc.list_parent_indices(level).to_numpy()]
        level = pc.list_flatten(level)
    return int(rows[place])


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


def read_table(
    store: Store, name: str, schema: pa.Schema | None = None, filled: Sequence[str] = ()
) -> pa.Table:
    """Read one Parquet file.

    Args:
        schema: columns that it must have, and their types; it may have more.
        filled: those of them that have a value in every row.

    Raises:
        FileNotFoundError: there is none.
        DamagedFile: it is truncated, does not match its checksum, or lacks a column.
        UserError: it would take far more memory than its bytes; see :mod:`raycurv.data.bounds`.
    """
    with store.reading(name) as file:
        data = file.read_buffer()
    at = _checksum_place(data)
    if at is None or bytes(data[at : at + len(_ZEROS)]) != _checksum(data, at):
        raise store.damaged(name, _WHOLE, "a file that does not match its checksum")
    try:
        table = _decoded(store, name, data)
        footer = dict(table.schema.metadata or {})
    except RaycurvError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise store.damaged(name, _WHOLE, shortened(str(error))) from error
    footer.pop(_CHECKSUM.encode(), None)
    own = footer.pop(_FILE.encode(), b"").decode(errors="replace")
    if own and own != name.rpartition("/")[2]:  # earlier versions did not say
        raise store.damaged(name, "the file that was written here", f"a copy of {own}")
    for field in schema or ():
        if field.name not in table.column_names or table[field.name].type != field.type:
            raise store.damaged(name, f"a column {field.name} of {field.type}", "none")
        if field.name in filled and table[field.name].null_count:
            raise store.damaged(name, f"a value of {field.name} in every row", "none in some")
    return table.replace_schema_metadata(footer)


def _decoded(store: Store, name: str, data: pa.Buffer) -> pa.Table:
    """The table that the bytes of a file hold, once what it takes in memory is known; pyarrow's
    errors, and UserError, as for :func:`read_table`."""
    file = pq.ParquetFile(pa.BufferReader(data))
    schema, metadata = file.schema_arrow, file.metadata
    texts = [one.name for one in schema if one.type in (pa.string(), pa.large_string())]
    for one in schema:
        kind = one.type.value_type if _is_list(one.type) else one.type
        if not (pa.types.is_primitive(kind) or pa.types.is_null(kind) or one.name in texts):
            got = shortened(f"{one.name} of {one.type}")
            raise store.damaged(name, "columns of numbers, lists of them, and texts", got)
    remedy = "Delete the file and run the command again: no job writes such tables."
    sizes = list(group_sizes(pa.BufferReader(data), data.size, schema.names))
    taken = sum(group.decoded for group in sizes)
    check_expansion(store.path(name), taken, data.size, remedy)
    # A text that is there once for many rows stays so until all of them are counted.
    source = pa.BufferReader(data)
    table = pq.ParquetFile(source, read_dictionary=texts, metadata=metadata).read()
    taken += sum(int(row_bytes(part).sum()) for text in texts for part in table[text].chunks)
    check_expansion(store.path(name), taken, data.size, remedy)
    # The schema lacks what was added to the footer in the end.
    return table.cast(schema).replace_schema_metadata(table.schema.metadata)


def read_rows(store: Store, name: str) -> int:
    """How many rows a Parquet file has, from its footer; DamagedFile if it has none."""
    with store.reading(name) as file:
        try:
            return int(pq.ParquetFile(file).metadata.num_rows)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise store.damaged(name, _WHOLE, shortened(str(error))) from error


def read_directory(
    store: Store,
    directory: str,
    schema: pa.Schema | None = None,
    needed: bool = False,
    filled: Sequence[str] = (),
) -> pa.Table:
    """All Parquet files of a directory as one table, in the order of their names.

    Args:
        schema: of a table without any file.
        needed: every file must have its columns.
        filled: as for :func:`read_table`.

    Raises:
        DamagedFile: as for :func:`read_table`; or two files have other columns.
    """
    wanted = schema if needed else None
    tables = [read_table(store, n, wanted, filled) for n in store.names(directory, ".parquet")]
    if not tables:
        return (schema or pa.schema([])).empty_table()
    try:
        return pa.concat_tables(tables)
    except pa.ArrowInvalid as error:
        raise store.damaged(directory, "tables of the same columns", str(error)) from error


def as_lists(values: np.ndarray[Any, Any], number: pa.DataType) -> pa.ListArray:
    """The rows of a matrix as lists of numbers."""
    offsets = pa.array(np.arange(len(values) + 1) * values.shape[1], pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)).cast(number))
