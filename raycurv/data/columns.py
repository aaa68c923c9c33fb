"""Arrow columns of examples as numpy arrays, checked on the way.

Every function that takes ``place``, which says where a row stands, raises ``UserError`` for the
first row whose value is not of the kind that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raycurv.data.bounds import ID_BYTES
from raycurv.data.conversations import is_conversation, no_template
from raycurv.errors import UserError, shortened

Place: TypeAlias = Callable[[int], str]


def first_null(column: Any) -> int:
    """The row of the first null of a column that has one."""
    return int(column.is_null().to_numpy(zero_copy_only=False).argmax())


def strings(name: str, column: Any, place: Place) -> list[str]:
    """Texts, one in every row."""
    column = _decoded(column)
    if is_conversation(column):
        raise no_template(place(0), name)
    if not _is_string(column.type):
        raise _wrong_type(name, column, place, "text")
    if column.null_count:  # a dictionary may hold a null that its indices do not show
        where = place(first_null(column))
        raise UserError(where, f"text in `{name}`", "null", f"Fill in `{name}`.")
    return _texts(name, column, place)


def is_text(column: Any) -> bool:
    """Whether a column is of text, whatever its encoding."""
    return _is_string(_decoded(column).type)


def ids(column: Any, place: Place) -> list[str | None]:
    """Ids as strings; ``None`` where the row has none."""
    column = _decoded(column)
    if pa.types.is_integer(column.type):
        column = column.cast(pa.large_string())
    if not (_is_string(column.type) or pa.types.is_null(column.type)):
        raise _wrong_type("id", column, place, "strings or whole numbers")
    lengths = row_bytes(column)
    if len(column) and lengths.max() > ID_BYTES:
        at = int(lengths.argmax())
        raise UserError(
            place(at),
            f"an `id` of at most {ID_BYTES >> 10} KiB",
            f"one of {int(lengths[at]):,} bytes",
            "Give short ids, or leave out the column `id` to have the examples named after their "
            "files and rows.",
        )
    return _texts("id", column, place)


def integer_lists(name: str, column: Any, place: Place) -> list[np.ndarray | None]:
    """Lists of whole numbers as int64 arrays; ``None`` where the row has none."""
    what = "lists of whole numbers"
    flat, offsets = _flattened(name, column, place, what)
    if pa.types.is_floating(flat.type):
        values = flat.to_numpy(zero_copy_only=False)
        fractions = values != np.floor(values)
        at = int(fractions.argmax())  # the first one; 0 when all are whole, but still floats
        got = f"{flat[at].as_py()!r} in a column of {column.type}"
        raise UserError(place(_row_of(offsets, at)), what, got, f"Convert `{name}` to integers.")
    if not (pa.types.is_integer(flat.type) or pa.types.is_null(flat.type)):
        raise _wrong_type(name, column, place, what)
    if flat.type == pa.uint64():
        # What int64 cannot hold is beyond any vocabulary, and is to be named as such.
        flat = pc.min_element_wise(flat, pa.scalar(2**63 - 1, pa.uint64()))
    values = flat.cast(pa.int64()).to_numpy(zero_copy_only=False)
    return _cut(column, values, offsets)


def present_integer_lists(name: str, column: Any, place: Place) -> list[np.ndarray]:
    """As :func:`integer_lists`, of a column that every row has a value in."""
    found = [values for values in integer_lists(name, column, place) if values is not None]
    assert len(found) == len(column), "a column without nulls"
    return found


def boolean_lists(name: str, column: Any, place: Place) -> list[np.ndarray | None]:
    """Lists of booleans, or of zeros and ones, as bool arrays; ``None`` where the row has none."""
    what = "lists of booleans, or of zeros and ones"
    flat, offsets = _flattened(name, column, place, what)
    kind = flat.type
    if not (pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise _wrong_type(name, column, place, what)
    values = flat.to_numpy(zero_copy_only=False)
    if pa.types.is_integer(kind):
        wrong = (values != 0) & (values != 1)
        if wrong.any():
            at = int(wrong.argmax())
            row = _row_of(offsets, at)
            raise UserError(place(row), what, str(values[at]), f"Correct `{name}`.")
    return _cut(column, values.astype(bool), offsets)


def numbers(
    name: str, column: Any, place: Place, shape: tuple[int, ...] | None, exact_integers: bool
) -> np.ndarray:
    """Numbers of one shape in every row, nested to any depth.

    Args:
        shape: the shape of every row; ``None`` for that of the first row.
        exact_integers: keep whole numbers as int64.

    Returns:
        ``[rows, *shape]``. float32 for 16 and 32-bit floats, 8 and 16-bit whole numbers and
        booleans, which it holds exactly; float64 for wider ones.
    """
    rows = len(column)
    column = _decoded(column)
    if column.null_count:
        where = place(first_null(column))
        raise UserError(where, f"`{name}`, as in other rows", "none", f"Give `{name}`.")
    found: list[int] = []
    level, per_row = column, 1
    while _is_list(level.type):
        level, offsets = _values(level)
        lengths = np.diff(offsets)
        depth = len(found)
        if shape is not None and depth < len(shape):
            wanted = shape[depth]
        else:
            wanted = int(lengths[0]) if len(lengths) else 0
        ragged = lengths != wanted
        if ragged.any():
            at = int(ragged.argmax())
            raise UserError(
                place(at // per_row),
                f"`{name}` of one shape in all examples ({wanted} numbers or lists on axis "
                f"{depth}, as in the first example)",
                f"{int(lengths[at])}",
                "Pad or crop the inputs to one shape.",
            )
        found.append(wanted)
        per_row *= wanted
        if level.null_count:
            where = place(first_null(level) // max(per_row, 1))
            raise UserError(where, f"numbers in `{name}`", "null", f"Correct `{name}`.")
        if per_row == 0:
            raise UserError(
                place(0), f"at least one number in `{name}`", "none", "Leave out empty examples."
            )
    kind = level.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise _wrong_type(name, column, place, "numbers or lists of numbers")
    if shape is not None and tuple(found) != shape:
        raise UserError(
            place(0),
            f"`{name}` of shape {list(shape)}, as in the first example",
            f"shape {found}",
            "Give all examples one shape.",
        )
    whole = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    if whole and exact_integers:
        dtype: Any = np.int64
    elif kind.bit_width <= 16 or kind == pa.float32():
        dtype = np.float32
    else:
        dtype = np.float64
    values: np.ndarray = level.to_numpy(zero_copy_only=False).astype(dtype).reshape(rows, *found)
    finite = np.isfinite(values)
    if not finite.all():
        at = int((~finite.reshape(rows, -1)).any(axis=1).argmax())
        raise UserError(
            place(at),
            f"finite numbers in `{name}`",
            str(values[at][~finite[at]].flat[0]),
            "Correct it, or leave the example out of the data.",
        )
    return values


def image_files(name: str, column: Any, place: Place) -> list[bytes]:
    """Images as the bytes of their files, one in every row: a binary column, or as data sets have
    them a struct with ``bytes`` (beside a ``path``, which is not followed)."""
    column = _decoded(column)
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = column.field("bytes")
    if not _is_binary(column.type):
        raise UserError(
            place(0),
            f"the bytes of image files in the column `{name}`, or a struct with `bytes`",
            type_name(column),
            "Write the files' bytes into the column: a path in it would not be followed.",
        )
    if column.null_count:
        where = place(first_null(column))
        remedy = "Write the file's bytes into it: a path beside them is not followed."
        raise UserError(where, f"bytes of an image in `{name}`", "none", remedy)
    files: list[bytes] = column.to_pylist()
    return files


def row_bytes(column: Any) -> np.ndarray:
    """What each row of a column would take in memory once it is decoded, int64 ``[rows]``.

    Rows of dictionaries and views may share bytes that are there once. A column of a kind that is
    not read (a map, say) counts as nothing.
    """
    kind, rows = column.type, len(column)
    if not rows:
        return np.zeros(0, np.int64)
    if isinstance(kind, pa.BaseExtensionType):
        return row_bytes(column.storage)
    if pa.types.is_dictionary(kind):
        indices = pc.fill_null(column.indices.cast(pa.int64()), 0).to_numpy(zero_copy_only=False)
        values = np.append(row_bytes(column.dictionary), 0)  # of a dictionary without values
        taken: np.ndarray = values[indices]
        return taken
    if pa.types.is_struct(kind):
        fields = [row_bytes(column.field(number)) for number in range(kind.num_fields)]
        whole: np.ndarray = np.sum([np.zeros(rows, np.int64), *fields], axis=0)
        return whole
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        # Views of 16 bytes, which begin with the length.
        views = np.frombuffer(column.buffers()[1], "<i4").reshape(-1, 4)[column.offset :][:rows]
        return np.where(column.is_valid().to_numpy(zero_copy_only=False), views[:, 0], 0)
    if _is_string(kind) or _is_binary(kind):
        return _lengths(pc.binary_length(column))
    if pa.types.is_fixed_size_list(kind):
        values = row_bytes(column.values)
        inner = values[column.offset * kind.list_size :][: rows * kind.list_size]
        summed: np.ndarray = inner.reshape(rows, kind.list_size).sum(axis=1)
        return summed
    if _is_list(kind):
        lengths = _lengths(pc.list_value_length(column))
        width = _width(kind.value_type)
        if width is not None:
            return lengths * width
        ends = np.concatenate([[0], np.cumsum(row_bytes(column.values), dtype=np.int64)])
        starts = column.offsets.to_numpy(zero_copy_only=False)[:rows].astype(np.int64)
        inside: np.ndarray = ends[starts + lengths] - ends[starts]
        return inside
    return np.full(rows, _width(kind) or 0, np.int64)


def list_column(arrays: Sequence[np.ndarray | None], value_type: Any) -> Any:
    """Flat arrays as one Arrow column of lists; null for ``None``."""
    lengths = [0 if array is None else array.size for array in arrays]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    present = [array.reshape(-1) for array in arrays if array is not None]
    flat = np.concatenate(present) if present else np.empty(0, np.int64)
    absent = np.array([array is None for array in arrays], dtype=bool)
    return pa.LargeListArray.from_arrays(
        pa.array(offsets), pa.array(flat).cast(value_type), mask=pa.array(absent)
    )


def list_arrays(column: Any) -> list[np.ndarray | None]:
    """The reverse of ``list_column``: views of the column's numbers; ``None`` for null."""
    flat, offsets = _values(column)
    return _cut(column, flat.to_numpy(zero_copy_only=False), offsets)


def _decoded(column: Any) -> Any:
    """A column without the encodings that say nothing about the values."""
    if isinstance(column.type, pa.FixedShapeTensorType):
        nested = column.to_numpy_ndarray()
        flat = pa.array(np.ascontiguousarray(nested).reshape(-1))
        for size in reversed(nested.shape[1:]):
            flat = pa.FixedSizeListArray.from_arrays(flat, size)
        return flat
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column


def _texts(name: str, column: Any, place: Place) -> list[Any]:
    """A column of text as Python's, null as ``None``; a file may hold other bytes as text."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        for row in range(len(column)):
            try:
                column[row].as_py()
            except UnicodeDecodeError as error:
                got, remedy = f"other bytes ({error.reason})", f"Write `{name}` again, as UTF-8."
                raise UserError(place(row), f"UTF-8 in `{name}`", got, remedy) from error
        raise
    return values


def _lengths(column: Any) -> np.ndarray:
    lengths: np.ndarray = pc.fill_null(column, 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths


def _width(kind: Any) -> int | None:
    """Bytes of a value of a primitive type, ``None`` for other types."""
    return -(-kind.bit_width // 8) if pa.types.is_primitive(kind) else None


def _is_string(kind: Any) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _is_binary(kind: Any) -> bool:
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _is_list(kind: Any) -> bool:
    tests = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    return any(test(kind) for test in tests)


def _values(lists: Any) -> tuple[Any, np.ndarray]:
    """The values of a column of lists, and where each row's begin in them, ``[rows + 1]``."""
    # Any of Arrow's five kinds of lists becomes the one with 64-bit offsets.
    lists = lists.cast(pa.large_list(lists.type.value_type))
    offsets = lists.offsets.to_numpy()
    return lists.values.slice(offsets[0], offsets[-1] - offsets[0]), offsets - offsets[0]


def _flattened(name: str, column: Any, place: Place, what: str) -> tuple[Any, np.ndarray]:
    """The values of all rows in one array, and where each row's begin in it ``[rows + 1]``."""
    column = _decoded(column)
    if pa.types.is_null(column.type):
        column = column.cast(pa.large_list(pa.int64()))
    if not _is_list(column.type):
        raise _wrong_type(name, column, place, what)
    flat, offsets = _values(column)
    if flat.null_count:
        where = place(_row_of(offsets, first_null(flat)))
        raise UserError(where, f"{what} in `{name}`", "null", f"Correct `{name}`.")
    return flat, offsets


def _row_of(offsets: np.ndarray, at: int) -> int:
    return int(np.searchsorted(offsets, at, side="right")) - 1


def _cut(column: Any, values: np.ndarray, offsets: np.ndarray) -> list[np.ndarray | None]:
    bounds = offsets.tolist()
    if not column.null_count:
        return [values[a:b] for a, b in pairwise(bounds)]
    valid = column.is_valid().to_pylist()
    spans = zip(pairwise(bounds), valid, strict=True)
    return [values[a:b] if here else None for (a, b), here in spans]


def _wrong_type(name: str, column: Any, place: Place, wanted: str) -> UserError:
    return UserError(
        place(0), f"{wanted} in the column `{name}`", type_name(column), f"Convert `{name}`."
    )


def type_name(column: Any) -> str:
    """What a column's type is called, shortened: it may be as deep as its maker likes."""
    return shortened(str(column.type), 120)
