"""Traces and diagonals of all blocks from products in files: see
:mod:`raycurv.mathematics.exact.trace_estimates`.

    probes ω           by a counter
    Y = A ω            a pass over the examples
    Q                  combinations of Y, from its dot products: XTrace and Hutch++
    Z = A Q            another pass
"""

from __future__ import annotations

import torch
from torch import Tensor

from raycurv.files.store import Store
from raycurv.files.tensorfile import is_complete, write_tensors
from raycurv.jobs.spectrum.vector_files import Probes, Products, Sum, Vectors
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.exact.grams import dots, orthonormalising
from raycurv.mathematics.exact.trace_estimates import (
    DiagonalSum,
    Estimate,
    ProbeDots,
    hutch_plus_plus,
    hutchinson,
    x_trace,
)


def estimate_traces(products: Products, method: str, probes: int, seed: int) -> Estimate:
    """The traces of all blocks, in their order, and of all together.

    Args:
        products: of the matrix.
        method: ``xtrace``, ``hutch++`` or ``hutchinson``.
        probes: how many; of Hutch++ half of them make the basis.
        seed: of the probes.
    """
    dtype, given = products.dtype, Probes(seed, range(probes))
    made = products.of("traces", given, "products with random vectors")
    if method == "hutchinson":
        own = products.of_blocks(_own, given, made, dtype)
        return hutchinson(torch.stack(own))
    first = range(probes // 2 if method == "hutch++" else probes)
    grams = products.of_blocks(_gram, made.some(first), dtype)
    basis = Sum(((made.some(first), orthonormalising(torch.stack(grams).sum(0))),))
    images = products.of("trace-basis", basis, "products with their range")
    found = ProbeDots.stacked(products.of_blocks(_dots, basis, images, given, made, dtype))
    return hutch_plus_plus(found, len(first)) if method == "hutch++" else x_trace(found)


def diagonal_file(block: str) -> str:
    """Where a block's diagonal lies: ``diagonal`` and ``standard_error``, ``[O, I]``."""
    return f"diagonal/{block}.safetensors"


def write_diagonals(products: Products, probes: int, seed: int) -> None:
    """The diagonals of all blocks, from the products of the traces."""
    given = Probes(seed, range(probes))
    made = products.of("traces", given, "products with random vectors")
    products.of_blocks(_write_diagonal, given, made, products.dtype, products.workers.store)


def _own(block: Block, probes: Vectors, products: Vectors, dtype: torch.dtype) -> Tensor:
    both = probes.read(block, dtype).double() * products.read(block, dtype).double()
    return both.flatten(1).sum(1)


def _gram(block: Block, vectors: Vectors, dtype: torch.dtype) -> Tensor:
    mine = vectors.read(block, dtype)
    return dots(mine, mine)


def _dots(
    block: Block,
    basis: Vectors,
    images: Vectors,
    probes: Vectors,
    products: Vectors,
    dtype: torch.dtype,
) -> ProbeDots:
    return ProbeDots.of(*(v.read(block, dtype) for v in (basis, images, probes, products)))


def _write_diagonal(
    block: Block, probes: Vectors, products: Vectors, dtype: torch.dtype, store: Store
) -> None:
    if is_complete(store, diagonal_file(block.name)):
        return
    total = DiagonalSum((block.d_out, block.d_in))
    for probe, product in zip(probes.read(block, dtype), products.read(block, dtype), strict=True):
        total.add(probe, product)
    diagonal, error = total.result()
    found = {"diagonal": diagonal, "standard_error": error}
    write_tensors(store, diagonal_file(block.name), found, {"block": block.name})
