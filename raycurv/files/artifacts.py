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
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from raycurv.errors import DamagedFile
from raycurv.files.store import Store
from raycurv.files.tensorfile import TensorFile, open_tensors, write_tensors
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


def read_blocks(store: Store) -> tuple[Block, ...]:
    """The blocks of a run, with their input factors.

    Raises:
        DamagedFile: ``blocks.json`` is gone, or not what a fit wrote.
    """
    name = "blocks.json"
    said = store.read_json(name)
    try:
        blocks = tuple(Block(**b) for b in said)
        inputs = {f"{block.name}.input" for block in blocks}
        if not {block.input_factor for block in blocks} <= inputs:
            raise TypeError("an input factor of no block")
        return blocks
    except TypeError as error:
        raise DamagedFile(
            store.path(name), "the blocks of a run", "nothing" if said is None else str(error),
            f"Run the fit again, without a {name} there: it makes a new one.",
        ) from error  # fmt: skip


def factor_file(name: str) -> str:
    """Where a factor's sum lies."""
    return f"factors/{name}.safetensors"


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


def _collected(file: TensorFile, key: str) -> tuple[Tensor, ...]:
    if key in file.names:
        return (file.read(key),)
    count = sum(k.startswith(f"{key}.") for k in file.names)
    return tuple(file.read(f"{key}.{i}") for i in range(count))


def write_factor(store: Store, factor: FactorSum, dtype: torch.dtype) -> None:
    """Write a factor's sum in ``dtype``, and its count."""
    tensors = _numbered("sum", [t.to(dtype) for t in factor.tiles])
    tensors["count"] = torch.tensor(factor.count)
    tensors["rows"] = torch.tensor(factor.rows)
    write_tensors(store, factor_file(factor.name), tensors, {"factor": factor.name})


def read_factor(store: Store, name: str) -> FactorSum:
    """Read a factor's sum, as float64."""
    file = open_tensors(store, factor_file(name))
    stored = _collected(file, "sum")
    tiles = tuple(t.double() for t in stored)
    rows = int(file.read("rows"))
    return FactorSum(name, tiles, int(file.read("count")), rows, stored[0].dtype)


def write_eigen(store: Store, factor: FactorSum, basis: Eigenbasis) -> None:
    """Write a factor's eigenbasis, and the counts of the factor that it came from."""
    tensors = _numbered("eigenvectors", basis.vectors) | _numbered("eigenvalues", basis.values)
    metadata = {
        "factor": factor.name,
        "outcome": basis.outcome,
        "seconds": repr(basis.seconds),
        "count": str(factor.count),
        "rows": str(factor.rows),
    }
    write_tensors(store, eigen_file(factor.name), tensors, metadata)


def read_eigen(store: Store, name: str) -> Eigenbasis:
    """Read a factor's eigenbasis."""
    file = open_tensors(store, eigen_file(name))
    return Eigenbasis(
        _collected(file, "eigenvectors"),
        _collected(file, "eigenvalues"),
        file.metadata["outcome"],
        float(file.metadata["seconds"]),
    )


def read_bases(
    store: Store, blocks: Iterable[Block], device: torch.device
) -> dict[str, Eigenbasis]:
    """The eigenbases of some blocks' factors, their eigenvectors on a device."""
    return {name: read_eigen(store, name).to(device) for name in factors_of(blocks)}


def read_spectrum(store: Store, name: str) -> tuple[tuple[Tensor, ...], dict[str, str]]:
    """A factor's eigenvalues, one ascending vector a tile, and its file's metadata."""
    file = open_tensors(store, eigen_file(name))
    return _collected(file, "eigenvalues"), file.metadata


def basis_mark(store: Store, block: Block) -> str:
    """A hash of the two eigenbases of a block: Λ is worth something in these alone."""
    marks = []
    for name in (block.input_factor, block.output_factor):
        if store.exists(eigen_file(name)):
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
    if file.metadata["bases"] != mark:
        raise DamagedFile(
            store.path(name), "corrected eigenvalues in the bases that were taken over",
            "ones of other bases", "Start again with another --out: the run has changed since.",
        )  # fmt: skip
    examples = int(file.read("examples"))
    if "sum" in file.names:
        count = int(file.read("count"))
        return CorrectedSum(block.name, file.read("sum").double(), count, examples)
    count = examples * draws
    return CorrectedSum(block.name, file.read("lam").double() * count, count, examples)


def corrected_notes(store: Store, block: Block) -> dict[str, str]:
    """Trace, mean and bases of a block's Λ, without reading it."""
    return open_tensors(store, corrected_file(block.name)).metadata


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
    found = open_tensors(store, gradient_file(block)).read_all()
    numbers, batches = gradient_notes(store, block)
    sampled, bartlett = (found.get(kind) for kind in SAMPLED)
    return GradientStatistics(
        block, found["mean"], found["mean_square"], sampled, bartlett, numbers.examples, batches
    )


def gradient_notes(store: Store, block: str) -> tuple[GradientNumbers, int]:
    """Norms, noise and traces of a block's gradients, and how many microbatches they are from."""
    said = json.loads(open_tensors(store, gradient_file(block)).metadata["numbers"])
    batches = int(said.pop("batches"))
    return GradientNumbers(**said), batches


def write_products(
    store: Store, block: str, products: BlockProducts, queries: Sequence[str]
) -> None:
    """Write the IHVPs of a block; NumericalError if one is not finite."""
    check_products(block, products, queries)
    write_tensors(store, ihvp_file(block), products.tensors(), {"queries": json.dumps(queries)})


def read_products(store: Store, block: str) -> tuple[BlockProducts, list[str]]:
    """The IHVPs of a block and the ids of their queries."""
    file = open_tensors(store, ihvp_file(block))
    return BlockProducts(**file.read_all()), json.loads(file.metadata["queries"])
