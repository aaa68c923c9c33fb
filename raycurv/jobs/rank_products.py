"""Inverse-Hessian-vector products of M-FAC, from gradients that lie in the store.

    gradients/ihvp/NAME    V of every query, from a pass as of the method `identity`
    Gram of each block  -> the model's, or each block's own, inverse
    G V of each block   -> their sum: as many numbers a query as there are rows
    ihvp/NAME              V/λ − Gᵀ C⁻¹ (GV)/λ²

One task a block; between blocks travel the Gram and vectors of as many numbers as there are rows,
whatever the number of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raycurv.driver.workers import Workers, in_order
from raycurv.files.artifacts import read_products, write_products
from raycurv.files.row_files import open_rows
from raycurv.files.store import Store
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import Damping
from raycurv.mathematics.influence.ihvp import BlockProducts, kept_rank, truncated
from raycurv.mathematics.rank.rank_inverse import (
    RankInverse,
    RankInverses,
    check_residual,
    rank_damping,
    rank_inverse,
)
from raycurv.stages.pool import Need


def rank_inverses(
    fitted: Store, blocks: Sequence[Block], damping: Damping, whole: bool
) -> RankInverses:
    """The inverses of a fit with M-FAC.

    Args:
        fitted: store of the fit.
        blocks: all of it.
        whole: of the whole model's Fisher, or of each block's own.

    Raises:
        UserError: λ is zero.
        NumericalError: λ is too small.
    """
    if not whole:
        return RankInverses({b.name: _inverse(fitted, (b,), damping) for b in blocks}, False)
    inverse = _inverse(fitted, blocks, damping)
    found: dict[str, RankInverse | None] = {}
    start = 0
    for block in blocks:
        found[block.name] = None if inverse is None else inverse.at(start)
        start += block.d_out * block.d_in
    return RankInverses(found, True)


def _inverse(fitted: Store, blocks: Sequence[Block], damping: Damping) -> RankInverse | None:
    opened = [open_rows(fitted, block) for block in blocks]
    gram, size = opened[0].gram(), sum(rows.size for rows in opened)
    for rows in opened[1:]:
        gram += rows.gram()
    where = f"block {blocks[0].name}" if len(blocks) == 1 else "the model's Fisher"
    lam = rank_damping(damping, gram, size, where)
    if lam == 0.0:
        return None
    whole = None
    if size <= len(gram):
        whole = torch.cat([rows.whole().flatten(1) for rows in opened], dim=1)
    return rank_inverse(gram, size, lam, where, whole)


def make_rank_products(
    gradients: Store,
    out: Store,
    fitted: Store,
    blocks: Sequence[Block],
    inverses: RankInverses,
    rank: int | None,
    seed: int,
    dtype: torch.dtype,
    workers: Workers,
) -> float:
    """Make the products of every block, in ``out``; gives the largest residual ``|F F⁻¹v − v|/|v|``
    along what the gradients span.

    Args:
        gradients: has the queries' gradients, whole.
        fitted: has the rows.
        rank: to truncate to; ``None`` for whole.
        seed: of the truncated SVD's test matrices.
        dtype: of the model's computation.

    Raises:
        NumericalError: a residual says that λ is too small for the dtype.
    """
    number = torch.float64 if dtype == torch.float64 else torch.float32
    needs = [Need(40 * b.d_out * b.d_in, 0.0, b.name) for b in blocks]
    projection: Tensor | None = None
    if inverses.whole:
        arguments = [(gradients, fitted, b, inverses.by_block[b.name]) for b in blocks]
        # In the order of the blocks, or the sum would depend on chance.
        projection = _sum(in_order(workers.run_tasks("IHVPs", project_gradients, arguments, needs)))
    made = [
        (gradients, out, fitted, b, inverses.by_block[b.name], projection, rank, seed, number)
        for b in blocks
    ]
    seen = in_order(workers.run_tasks("IHVPs", apply_inverse, made, needs))
    return _check(blocks, inverses, seen, number)


def _sum(parts: Sequence[Tensor | None]) -> Tensor:
    return torch.stack([part for part in parts if part is not None]).sum(dim=0)


def _check(
    blocks: Sequence[Block],
    inverses: RankInverses,
    seen: Sequence[tuple[Tensor, Tensor] | None],
    dtype: torch.dtype,
) -> float:
    """The largest residual, refused where it is too large."""
    found = [s for s in seen if s is not None]
    groups = {b.name: [s] for b, s in zip(blocks, seen, strict=True) if s is not None}
    if inverses.whole:
        groups = {blocks[0].name: found} if found else {}
    largest = 0.0
    for name, parts in groups.items():
        inverse = inverses.by_block[name]
        if inverse is None:
            continue
        projection = parts[0][0] if inverses.whole else _sum([p for p, _ in parts])
        residual = inverse.residual(projection, _sum([applied for _, applied in parts]))
        where = "the model's Fisher" if inverses.whole else f"block {name}"
        check_residual(residual, where, inverse.damping, dtype)
        largest = max(largest, residual)
    return largest


def project_gradients(
    gradients: Store, fitted: Store, block: Block, inverse: RankInverse | None
) -> Tensor | None:
    """A block's share of what the inverse needs to know of the queries' gradients."""
    if inverse is None:
        return None
    return projected(read_products(gradients, block.name)[0].dense(), fitted, block, inverse)


def projected(values_QOI: Tensor, fitted: Store, block: Block, inverse: RankInverse) -> Tensor:
    """A block's share of what an inverse needs to know of matrices ``[Q, O, I]``."""
    total = torch.zeros(len(values_QOI), inverse.width, dtype=torch.float64)
    for outputs, rows in open_rows(fitted, block).runs():
        here = inverse.at(outputs.start * block.d_in)
        total += here.project(rows.flatten(1), values_QOI[:, outputs].flatten(1))
    return total


def apply_inverse(
    gradients: Store,
    out: Store,
    fitted: Store,
    block: Block,
    inverse: RankInverse | None,
    projection: Tensor | None,
    rank: int | None,
    seed: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor] | None:
    """Make a block's products and write them; gives the projections of what went in and came out.

    Args:
        projection: of whole gradients, over all blocks of the inverse; ``None`` for its own.
    """
    found, queries = read_products(gradients, block.name)
    values = found.dense()
    result, seen = torch.zeros_like(values, dtype=dtype), None
    if inverse is not None:
        if projection is None:
            projection = projected(values, fitted, block, inverse)
        for outputs, rows in open_rows(fitted, block).runs():
            part = values[:, outputs]
            here = inverse.at(outputs.start * block.d_in)
            product = here.apply(rows.flatten(1), part.flatten(1), projection)
            result[:, outputs] = product.view(part.shape).to(dtype)
        seen = (projection, projected(result, fitted, block, inverse))
    kept = kept_rank(rank, block.d_out, block.d_in)
    if kept is None:
        products = BlockProducts(full=result)
    else:
        parts = [
            truncated(result[i : i + 1], kept, seed, queries[i : i + 1], block.name)
            for i in range(len(queries))
        ]
        products = BlockProducts(
            left=torch.cat([u for u, _ in parts]).transpose(1, 2),
            right=torch.cat([w for _, w in parts]),
        )
    write_products(out, block.name, products, queries)
    return seen
