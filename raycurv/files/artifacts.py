"""The files of a run: factors, eigenbases, corrected eigenvalues, gradients, IHVPs. Checksummed.

factors/NAME.safetensors     sum | sum.0, sum.1, …            count, rows
eigen/NAME.safetensors       eigenvectors[.i], eigenvalues[.i]   outcome, seconds
corrected/NAME.safetensors   lam, examples [, sum, count]       trace, mean, the bases' checksums
gradients/NAME.safetensors   mean, mean_square, …, examples    norms, traces, batches
ihvp/NAME.safetensors        full | left, right                query ids
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raycurv.errors import DamagedFile, UserError, shortened
from raycurv.files.store import Store
from raycurv.files.tensorfile import TensorFile, open_tensors, write_tensors
from raycurv.jsonfile import made_of
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.corrected import CorrectedSum
from raycurv.mathematics.eigen import Eigenbasis
from raycurv.mathematics.factors import FactorSum, factors_of
from raycurv.mathematics.gradient_statistics import (
    SAMPLED,
    GradientNumbers,
    GradientStatistics,
    GradientSum,
)
from raycurv.mathematics.influence.ihvp import BlockProducts, check_products
from raycurv.mathematics.kinds.catalogue import kind_of_block
from raycurv.names import MAX_PART_BYTES, plain_name

BLOCKS_FILE = "blocks.json"


def write_block_list(store: Store, name: str, blocks: Iterable[Block]) -> None:
    """Write blocks, all or some of a run's."""
    store.write_json(name, {"blocks": [asdict(block) for block in blocks]})


def read_blocks(store: Store) -> tuple[Block, ...]:
    """The blocks of a run, with their input factors.

    Raises:
        DamagedFile: ``blocks.json`` is gone, or not what a fit wrote.
        UserError: as for :meth:`Store.read_json`.
    """
    blocks = read_block_list(store, BLOCKS_FILE)
    first = {block.input_factor: block for block in reversed(blocks)}
    outputs = {block.output_factor: block for block in reversed(blocks)}
    for block in blocks:
        if block.d_out != outputs[block.output_factor].d_out:
            got = f"block {block.name} with {shortened(repr(block.output_factor))}"
            raise _no_blocks(store, BLOCKS_FILE, got)
        shared = first[block.input_factor]
        if block.input_factor != f"{shared.name}.input" or block.d_in != shared.d_in:
            got = f"block {block.name} that reads {shortened(repr(block.input_factor))}"
            raise _no_blocks(store, BLOCKS_FILE, got)
    return blocks


def read_block_list(store: Store, name: str) -> tuple[Block, ...]:
    """What :func:`write_block_list` wrote; raises as :func:`read_blocks`."""
    said = store.read_list(name, "blocks")
    if said is None:
        raise _no_blocks(store, name, "nothing")
    try:
        blocks = tuple(made_of(Block, one) for one in said)
        for block in blocks:
            _check_block(block)
    except (ValueError, UserError) as error:
        got = error.got if isinstance(error, UserError) else str(error)
        raise _no_blocks(store, name, got) from error
    names = [block.name for block in blocks]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _no_blocks(store, name, f"{shortened(repr(twice))} twice")
    return blocks


def check_names(blocks: Iterable[Block]) -> None:
    """Refuse, with a UserError, blocks whose names no files of a run can have."""
    for block in blocks:
        where = f"block {shortened(repr(block.name))}"
        try:
            # The longest, while it is written.
            plain_name(f"{eigen_file(block.output_factor)}.part", where)
        except UserError as error:
            longest = MAX_PART_BYTES - len(".output.safetensors.part")
            raise UserError(
                where, f"a name that files can have: printable, at most {longest} bytes", "another",
                "Rename its module, or leave it out by a --blocks '!GLOB' that matches it.",
            ) from error  # fmt: skip


def _check_block(block: Block) -> None:
    """Refuse, with a ValueError or UserError, what can be no block: it names files."""
    check_names([block])
    kind_of_block(block)
    sizes = (block.d_in, block.d_out, block.groups, 1 + (block.index or 0))
    if min(sizes) < 1 or block.d_in <= block.bias:
        raise ValueError(f"block {block.name} of {block.d_in} x {block.d_out}")


def _no_blocks(store: Store, name: str, got: str) -> DamagedFile:
    return DamagedFile(
        store.path(name), "the blocks of a run", got,
        f"Run the fit again, without a {name} there: it makes a new one.",
    )  # fmt: skip


def factor_file(name: str, step: int | None = None) -> str:
    """Where a factor's sum lies; of a power iteration that goes on, that of a step."""
    folder = "factors" if step is None else f"work/factors-{step}"
    return f"{folder}/{name}.safetensors"


def eigen_file(name: str) -> str:
    """Where a factor's eigenbasis lies."""
    return f"eigen/{name}.safetensors"


def corrected_file(block: str) -> str:
    """Where a block's corrected eigenvalues lie."""
    return f"corrected/{block}.safetensors"


def gradient_file(block: str) -> str:
    """Where a block's gradient statistics lie."""
    return f"gradients/{block}.safetensors"


def ihvp_file(block: str) -> str:
    """Where a block's IHVPs lie."""
    return f"ihvp/{block}.safetensors"


def _numbered(key: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    if len(tensors) == 1:
        return {key: tensors[0]}
    return {f"{key}.{i}": t for i, t in enumerate(tensors)}


def _collected(
    file: TensorFile, key: str, width: int | None, axes: int = 2, least: float = -math.inf
) -> tuple[Tensor, ...]:
    """The tiles of a factor, square or (with one axis) their diagonals; DamagedFile unless they
    make up an axis of that width."""
    if _is_diagonal(file):
        axes = 1
    count = sum(k.startswith(f"{key}.") for k in file.names)
    keys = [key] if key in file.names or not count else [f"{key}.{i}" for i in range(count)]
    found = tuple(file.numbers(one, (None,) * axes, least) for one in keys)
    widths = [len(tile) for tile in found]
    square = all(set(tile.shape) == {n} for tile, n in zip(found, widths, strict=True))
    if not square or (width is not None and sum(widths) != width):
        shapes = ", ".join(" x ".join(map(str, tile.shape)) for tile in found)
        wanted = f"{key} as tiles of an axis" + ("" if width is None else f" of {width}")
        raise file.store.damaged(file.name, wanted, shapes)
    return found


def write_factor(
    store: Store, factor: FactorSum, dtype: torch.dtype, step: int | None = None
) -> None:
    """Write a factor's sum in ``dtype``, and its count; ``step`` as for :func:`factor_file`."""
    tensors = _numbered("sum", [t.to(dtype) for t in factor.tiles])
    tensors["count"] = torch.tensor(factor.count)
    tensors["rows"] = torch.tensor(factor.rows)
    metadata = {"factor": factor.name} | _form(factor)
    write_tensors(store, factor_file(factor.name, step), tensors, metadata)


def _form(factor: FactorSum) -> dict[str, str]:
    """What the metadata of a diagonal factor's files say beside those of others."""
    return {"diagonal": "yes"} if factor.tiles[0].ndim == 1 else {}


def read_factor(
    store: Store, name: str, width: int | None = None, step: int | None = None
) -> FactorSum:
    """Read a factor's sum, as float64.

    Args:
        width: of the axis that it is of, where the caller knows it.
        step: as for :func:`factor_file`.

    Raises:
        DamagedFile: it is not what was written, or of another factor.
    """
    file = open_tensors(store, factor_file(name, step))
    file.belongs("factor", name)
    stored = _collected(file, "sum", width)
    tiles = tuple(t.double() for t in stored)
    return FactorSum(name, tiles, file.count("count"), file.count("rows"), stored[0].dtype)


def write_eigen(store: Store, factor: FactorSum, basis: Eigenbasis) -> None:
    """Write a factor's eigenbasis, and the counts of the factor that it came from."""
    tensors = _numbered("eigenvectors", basis.vectors) | _numbered("eigenvalues", basis.values)
    metadata = {
        "factor": factor.name,
        "outcome": basis.outcome,
        "seconds": repr(basis.seconds),
        "count": str(factor.count),
        "rows": str(factor.rows),
    } | _form(factor)
    write_tensors(store, eigen_file(factor.name), tensors, metadata)


def read_eigen(store: Store, name: str, width: int | None = None) -> Eigenbasis:
    """Read a factor's eigenbasis.

    Args:
        width: of the axis that it is of, where the caller knows it.

    Raises:
        DamagedFile: it is not what was written, or of another factor.
    """
    file = open_tensors(store, eigen_file(name))
    file.belongs("factor", name)
    values = _values(file, width)
    if _is_diagonal(file):
        return Eigenbasis((), values, file.note("outcome"), file.noted("seconds"))
    vectors = _collected(file, "eigenvectors", width)
    if [len(v) for v in values] != [len(q) for q in vectors]:
        raise store.damaged(file.name, "eigenvalues of the eigenvectors' tiles", "others")
    return Eigenbasis(vectors, values, file.note("outcome"), file.noted("seconds"))


def read_bases(
    store: Store, blocks: Iterable[Block], device: torch.device
) -> dict[str, Eigenbasis]:
    """The eigenbases of some blocks' factors, their eigenvectors on a device."""
    found = factors_of(blocks)
    return {n: read_eigen(store, n, factor.width).to(device) for n, factor in found.items()}


def _is_diagonal(file: TensorFile) -> bool:
    """Whether a file of a factor says that it is diagonal."""
    return "diagonal" in file.metadata


def _values(file: TensorFile, width: int | None) -> tuple[Tensor, ...]:
    """Eigenvalues, one ascending vector a tile; of a diagonal factor its diagonal as it stands."""
    found = _collected(file, "eigenvalues", width, axes=1, least=0.0)
    if not _is_diagonal(file) and any(bool((np.diff(tile.numpy()) < 0).any()) for tile in found):
        raise file.store.damaged(file.name, "ascending eigenvalues", "others")
    return found


@dataclass(frozen=True)
class Spectrum:
    """What a factor's file says beside its eigenvectors.

    Attributes:
        values: eigenvalues, one ascending vector a tile; of a diagonal factor its diagonal.
        diagonal: whether it is one.
        outcome: of the decomposition.
        seconds: that it took.
        rows: that entered the factor.
    """

    values: tuple[Tensor, ...]
    outcome: str
    seconds: float
    rows: int
    diagonal: bool = False

    @property
    def tiles(self) -> list[int]:
        """Widths of the tiles, which are 1 in a diagonal factor."""
        return [1] * len(self.values[0]) if self.diagonal else [len(v) for v in self.values]


def read_spectrum(store: Store, name: str, width: int | None = None) -> Spectrum:
    """A factor's eigenvalues, and how they were found; raises as :func:`read_eigen`."""
    file = open_tensors(store, eigen_file(name))
    file.belongs("factor", name)
    rows = file.noted("rows")
    if rows < 0 or rows != int(rows):
        raise store.damaged(file.name, "rows as a count", repr(rows))
    values = _values(file, width)
    seconds = file.noted("seconds")
    return Spectrum(values, file.note("outcome"), seconds, int(rows), _is_diagonal(file))


def basis_mark(store: Store, block: Block) -> str:
    """A hash of the two eigenbases of a block: Λ is worth something in these alone."""
    marks = []
    for name in (block.input_factor, block.output_factor):
        with suppress(FileNotFoundError):  # the identity has no file
            marks.append(open_tensors(store, eigen_file(name)).checksum)
    return hashlib.blake2b("".join(marks).encode(), digest_size=16).hexdigest()


def write_corrected(
    store: Store,
    block: Block,
    corrected: CorrectedSum,
    dtype: torch.dtype,
    mark: str,
    sum_dtype: torch.dtype | None = None,
) -> None:
    """Write a block's Λ in ``dtype``; trace and mean are of Λ as it was before it was rounded.

    Args:
        mark: of the bases that it was fitted in.
        sum_dtype: also keep the sum, in this dtype, and its count.
    """
    lam = corrected.mean()
    metadata = {
        "block": block.name,
        "trace": repr(float(lam.sum())),
        "mean": repr(float(lam.mean())),
        "bases": mark,
    }
    tensors = {"lam": lam.to(dtype), "examples": torch.tensor(corrected.examples)}
    if sum_dtype is not None:
        tensors["sum"] = corrected.total.to(sum_dtype)
        tensors["count"] = torch.tensor(corrected.count)
    write_tensors(store, corrected_file(block.name), tensors, metadata)


def keeps_sum(store: Store, block: Block) -> bool:
    """Whether a block's Λ is there as a sum, too."""
    return "sum" in open_tensors(store, corrected_file(block.name)).names


def read_corrected(store: Store, block: Block, draws: int, mark: str) -> CorrectedSum:
    """A block's Λ as a sum with its count: the sum that was kept, or the rounded mean times it.

    Args:
        draws: of the run, for the count.
        mark: of the bases that it must have been fitted in.

    Raises:
        DamagedFile: the file is gone, or of other bases.
    """
    name = corrected_file(block.name)
    try:
        file = open_tensors(store, name)
    except FileNotFoundError as error:
        raise DamagedFile(
            store.path(name), "a block's corrected eigenvalues", "nothing",
            "Run the fit again: it makes what is missing.",
        ) from error  # fmt: skip
    file.belongs("block", block.name)
    if file.note("bases") != mark:
        raise DamagedFile(
            store.path(name), "corrected eigenvalues in the bases that were taken over",
            "ones of other bases", "Start again with another --out: the run has changed since.",
        )  # fmt: skip
    examples = file.count("examples")
    if "sum" in file.names:
        total = file.numbers("sum", (block.d_out, block.d_in), 0.0).double()
        return CorrectedSum(block.name, total, file.count("count"), examples)
    count = examples * draws
    return CorrectedSum(block.name, read_lam(file, block).double() * count, count, examples)


def read_lam(file: TensorFile, block: Block) -> Tensor:
    """A block's Λ ``[O, I]`` from its opened file; DamagedFile if it is not finite, below zero, of
    another block or another shape."""
    file.belongs("block", block.name)
    return file.numbers("lam", (block.d_out, block.d_in), 0.0)


@dataclass(frozen=True)
class CorrectedNotes:
    """What the file of a block's Λ says without being read whole.

    Attributes:
        trace, mean: of Λ before it was rounded.
        bases: a mark of those that it was fitted in.
    """

    trace: float
    mean: float
    bases: str


def corrected_notes(store: Store, block: Block) -> CorrectedNotes:
    """Trace, mean and bases of a block's Λ; DamagedFile if they are not there."""
    file = open_tensors(store, corrected_file(block.name))
    file.belongs("block", block.name)
    return CorrectedNotes(file.noted("trace"), file.noted("mean"), file.note("bases"))


def write_gradient(store: Store, found: GradientSum, dtype: torch.dtype) -> None:
    """Write a block's gradient statistics in ``dtype``; norms and traces as before rounding."""
    said = {"batches": found.batches} | asdict(found.numbers())
    tensors = {kind: found.mean(kind).to(dtype) for kind in found.totals}
    tensors["examples"] = torch.tensor(found.examples)
    metadata = {"block": found.block, "numbers": json.dumps(said)}
    write_tensors(store, gradient_file(found.block), tensors, metadata)


def read_gradient(store: Store, block: str) -> GradientStatistics:
    """A block's gradient statistics.

    Raises:
        FileNotFoundError: there are none.
    """
    file = open_tensors(store, gradient_file(block))
    numbers, batches = gradient_notes(store, block)
    kinds = [kind for kind in ("mean", "mean_square", *SAMPLED) if kind in file.names]
    found = {k: file.numbers(k, (None, None), -math.inf if k == "mean" else 0.0) for k in kinds}
    if not {"mean", "mean_square"} <= found.keys() or len({t.shape for t in found.values()}) > 1:
        raise store.damaged(file.name, "means of gradients and of their squares", "others")
    sampled, bartlett = (found.get(kind) for kind in SAMPLED)
    return GradientStatistics(
        block, found["mean"], found["mean_square"], sampled, bartlett, numbers.examples, batches
    )


def gradient_notes(store: Store, block: str) -> tuple[GradientNumbers, int]:
    """Norms, noise and traces of a block's gradients, and how many microbatches they are from;
    DamagedFile if they are not there."""
    file = open_tensors(store, gradient_file(block))
    file.belongs("block", block)
    said = file.noted_json("numbers", dict[str, int | float | None])
    try:
        batches = int(said.pop("batches"))
        numbers = made_of(GradientNumbers, said)
        if min(batches, numbers.examples) < 0:
            raise ValueError("a negative count")
    except (KeyError, TypeError, ValueError) as error:
        raise store.damaged(file.name, "the numbers of gradients", str(error)) from error
    return numbers, batches


def write_products(
    store: Store, block: str, products: BlockProducts, queries: Sequence[str]
) -> None:
    """Write the IHVPs of a block; NumericalError if one is not finite."""
    check_products(block, products, queries)
    notes = {"queries": json.dumps(queries), "block": block}
    notes |= {name: json.dumps(kept.tolist()) for name, kept in products.numbers().items()}
    write_tensors(store, ihvp_file(block), products.tensors(), notes)


def keeps_beside(store: Store, block: str, name: str) -> bool:
    """Whether numbers of the queries were kept with a block's IHVPs under a name."""
    return name in open_tensors(store, ihvp_file(block)).metadata


def read_beside(store: Store, block: str, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The numbers of the queries, ``[Q]``, that were kept with a block's IHVPs under a name (see
    :meth:`BlockProducts.numbers`); DamagedFile if there are none."""
    file = open_tensors(store, ihvp_file(block))
    return np.asarray(file.noted_json(name, list[float]), np.float64)


def read_products(
    store: Store, block: str, shape: tuple[int, int] | None = None
) -> tuple[BlockProducts, list[str]]:
    """The IHVPs of a block and the ids of their queries.

    Args:
        shape: ``O, I`` of the block, where the caller knows them.

    Raises:
        FileNotFoundError: there are none.
        DamagedFile: they are not what was written, or of another block.
    """
    file = open_tensors(store, ihvp_file(block))
    if "block" in file.metadata:  # earlier versions did not say
        file.belongs("block", block)
    queries = file.noted_json("queries", list[str])
    count, (d_out, d_in) = len(queries), shape or (None, None)
    shapes: dict[str, tuple[int | None, ...]] = {"full": (count, d_out, d_in)}
    shapes["turned"] = shapes["full"]
    shapes |= {"left": (count, None, d_out), "right": (count, None, d_in)}
    if set(file.names) not in ({"full"}, {"turned"}, {"left", "right"}):
        raise store.damaged(file.name, "full, or left and right", ", ".join(file.names))
    products = BlockProducts(**{name: file.numbers(name, shapes[name]) for name in file.names})
    if len({tensor.shape[1] for tensor in products.tensors().values()}) > 1:
        raise store.damaged(file.name, "left and right of one rank", "two")
    return products, queries
