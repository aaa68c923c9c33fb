"""Examples: what one row of the data becomes, numbered, named and tokenised.

``examples_to_table`` and ``table_to_examples`` keep them in Parquet, so that later passes and
restarts see the same tokens without the source.

Alignment is Hugging Face's: ``labels[t]`` and ``loss_mask[t]`` speak of token t as a target, which
position t-1 predicts. T tokens have T-1 loss terms at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from raycurv.batch import NOT_A_TARGET as NOT_A_TARGET
from raycurv.data import columns
from raycurv.errors import UserError

VOCABULARY_LIMIT = 2**31  # token ids are kept as int32

EXAMPLES_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("id", pa.large_string(), nullable=False),
        pa.field("input_ids", pa.large_list(pa.int32())),
        # Numbers keep their width, so that what comes back is what went in.
        pa.field("inputs_float32", pa.large_list(pa.float32())),
        pa.field("inputs_float64", pa.large_list(pa.float64())),
        pa.field("inputs_int64", pa.large_list(pa.int64())),
        pa.field("inputs_shape", pa.large_list(pa.int64())),
        pa.field("labels_int64", pa.large_list(pa.int64())),
        pa.field("labels_float64", pa.large_list(pa.float64())),
        pa.field("labels_shape", pa.large_list(pa.int64())),
        pa.field("loss_mask", pa.large_list(pa.bool_())),
    ]
)


@dataclass(frozen=True)
class Example:
    """One example. T tokens, or an array of numbers.

    Attributes:
        index: its number among the examples of its data, from 0 without gaps.
        id: its name, unique in its data.
        input_ids: ``[T]`` int32, T at least 1; ``None`` for numbers.
        inputs: float32 or float64, or int64 where the model's embedding looks them up; of one shape
            in all examples; ``None`` for tokens.
        labels: of tokens ``[T]`` int64, -100 where a token is no target; of numbers int64 ``[]``
            (a class) or float64 ``[]`` or ``[D]`` (a regression); of a whole text ``[]`` as well,
            or ``[1, D]``, one row for all its tokens. ``None`` when the data has none.
        loss_mask: ``[T]`` bool, which tokens are targets, False wherever the label is -100;
            ``None`` for all.
        columns: further columns that an objective reads, by name: text, or an array of numbers
            (int64, float32 or float64) of the same shape in all examples.
        named: further inputs of the model, by the name that its forward gives them: int64, of
            tokens ``[T]``.
        source: tokens of what an encoder reads; ``input_ids`` are the target then.
        sequences: tokens of each of several texts, which stand one after the other in
            ``input_ids``; empty for one text.
    """

    index: int
    id: str
    input_ids: np.ndarray | None = None
    inputs: np.ndarray | None = None
    labels: np.ndarray | None = None
    loss_mask: np.ndarray | None = None
    columns: Mapping[str, str | np.ndarray] = field(default_factory=dict)
    named: Mapping[str, np.ndarray] = field(default_factory=dict)
    sequences: tuple[int, ...] = ()
    source: np.ndarray | None = None

    @property
    def length(self) -> int:
        """T, the number of tokens; 1 without a token axis."""
        return 1 if self.input_ids is None else len(self.input_ids)

    @property
    def positions(self) -> int:
        """Positions in a microbatch of its own: those of its longest text for each text; of a
        target and of its source."""
        if self.sequences:
            return len(self.sequences) * max(self.sequences)
        return self.length + (0 if self.source is None else len(self.source))

    def numbered(self, index: int) -> Example:
        """The same of another number; ``dataclasses.replace`` takes five times as long."""
        return Example(
            index, self.id, self.input_ids, self.inputs, self.labels, self.loss_mask, self.columns,
            self.named, self.sequences, self.source,
        )  # fmt: skip


def loss_terms(example: Example, shift: int = 1) -> int:
    """How many terms the example's loss has: its targets after the first token; 1 for numbers, and
    for a text of one label.

    Args:
        shift: how far a target stands behind what predicts it; 0 counts the first token, too.
    """
    if example.input_ids is None or (example.labels is not None and example.labels.ndim != 1):
        return 1
    if example.loss_mask is None:
        return len(example.input_ids) - shift
    return int(np.count_nonzero(example.loss_mask[shift:]))


def no_loss_terms(where: str, examples: int, shift: int = 1) -> UserError:
    """The mistake of data in which every loss, gradient and score would be 0."""
    return UserError(
        where,
        f"at least one example with a loss term (a target{' after its first token' * shift})",
        f"{examples} examples without any",
        f"Give {'examples of two or more tokens, and ' * shift}a `loss_mask` or `labels` that "
        "leave some of them as targets, of conversations messages of the role assistant; with "
        "--long truncate the targets may have been cut off.",
    )


def examples_to_table(examples: Sequence[Example]) -> Any:
    """Examples as a ``pyarrow.Table``; nothing is lost, not even dtypes.

    Its columns are those of ``EXAMPLES_SCHEMA``; of every further column ``column:NAME``, of
    numbers flattened, with their shape in ``shape:NAME``; of further inputs ``input:NAME``; and
    ``sequences`` where examples have several texts, ``source`` where an encoder reads one.
    """

    def of_dtype(arrays: list[np.ndarray | None], dtype: Any) -> list[np.ndarray | None]:
        return [None if a is None or a.dtype != dtype else a for a in arrays]

    def shapes(arrays: list[np.ndarray | None]) -> list[np.ndarray | None]:
        return [None if a is None else np.array(a.shape, np.int64) for a in arrays]

    inputs = [example.inputs for example in examples]
    labels = [example.labels for example in examples]
    lists = {
        "input_ids": [example.input_ids for example in examples],
        "inputs_float32": of_dtype(inputs, np.float32),
        "inputs_float64": of_dtype(inputs, np.float64),
        "inputs_int64": of_dtype(inputs, np.int64),
        "inputs_shape": shapes(inputs),
        "labels_int64": of_dtype(labels, np.int64),
        "labels_float64": of_dtype(labels, np.float64),
        "labels_shape": shapes(labels),
        "loss_mask": [example.loss_mask for example in examples],
    }
    arrays = {
        "index": pa.array([example.index for example in examples], pa.int64()),
        "id": pa.array([example.id for example in examples], pa.large_string()),
    }
    for name, values in lists.items():
        arrays[name] = columns.list_column(values, EXAMPLES_SCHEMA.field(name).type.value_type)
    table = pa.Table.from_arrays(
        [arrays[name] for name in EXAMPLES_SCHEMA.names], schema=EXAMPLES_SCHEMA
    )
    for name in examples[0].columns if examples else ():
        further: list[Any] = [example.columns[name] for example in examples]
        if isinstance(further[0], str):
            table = table.append_column(f"column:{name}", pa.array(further, pa.large_string()))
            continue
        numbers = pa.from_numpy_dtype(np.result_type(*{value.dtype for value in further}))
        table = table.append_column(f"column:{name}", columns.list_column(further, numbers))
        shape = columns.list_column(shapes(further), pa.int64())
        table = table.append_column(f"shape:{name}", shape)
    for name in examples[0].named if examples else ():
        given = columns.list_column([example.named[name] for example in examples], pa.int64())
        table = table.append_column(f"input:{name}", given)
    if any(example.sequences for example in examples):
        lengths = [np.array(example.sequences, np.int64) for example in examples]
        table = table.append_column("sequences", columns.list_column(lengths, pa.int64()))
    if any(example.source is not None for example in examples):
        sources = [example.source for example in examples]
        table = table.append_column("source", columns.list_column(sources, pa.int32()))
    return table


def table_to_examples(table: Any) -> list[Example]:
    """The reverse of ``examples_to_table``. Arrays are read-only views of the table's memory."""
    examples: list[Example] = []
    for batch in table.to_batches():
        index, id = batch.column("index").to_pylist(), batch.column("id").to_pylist()
        cells = {
            field.name: columns.list_arrays(batch.column(field.name))
            for field in batch.schema
            if pa.types.is_large_list(field.type)
        }
        further = {
            name.removeprefix("column:"): _values(batch, name, cells)
            for name in batch.schema.names
            if name.startswith("column:")
        }
        named = {
            name.removeprefix("input:"): cells[name] for name in cells if name.startswith("input:")
        }

        def shaped(name: str, dtypes: Sequence[str], i: int, cells: Any = cells) -> Any:
            shape = cells[f"{name}_shape"][i]
            if shape is None:
                return None
            # A column that an older version did not write has nothing.
            found = (cells[f"{name}_{d}"][i] for d in dtypes if f"{name}_{d}" in cells)
            return next(flat for flat in found if flat is not None).reshape(shape)

        for i in range(batch.num_rows):
            examples.append(
                Example(
                    index[i],
                    id[i],
                    cells["input_ids"][i],
                    shaped("inputs", ("float64", "float32", "int64"), i),
                    shaped("labels", ("float64", "int64"), i),
                    cells["loss_mask"][i],
                    {name: values[i] for name, values in further.items()},
                    {name: _there(values[i]) for name, values in named.items()},
                    tuple(_there(cells["sequences"][i]).tolist()) if "sequences" in cells else (),
                    cells["source"][i] if "source" in cells else None,
                )
            )
    return examples


def _there(array: np.ndarray | None) -> np.ndarray:
    assert array is not None, "a column without nulls"
    return array


def _values(batch: Any, name: str, cells: Mapping[str, list[np.ndarray | None]]) -> list[Any]:
    """A further column of every example of a record batch."""
    if name not in cells:
        values: list[Any] = batch.column(name).to_pylist()
        return values
    shapes: list[Any] = cells[name.replace("column:", "shape:", 1)]
    flat: list[Any] = cells[name]
    return [array.reshape(shape) for array, shape in zip(flat, shapes, strict=True)]
