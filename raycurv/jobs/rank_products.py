"""Inverse-Hessian-vector products of M-FAC, from gradients that lie in the store.

    gradients/ihvp/NAME    V of every query, whole
    G V of each block   -> their sum: as many numbers a query as there are rows
    ihvp/NAME              V/λ − Gᵀ C⁻¹ (GV)/λ²

One task a block; between blocks travel vectors of as many numbers as there are rows, whatever the
number of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raycurv.driver.workers import Workers, in_order
from raycurv.files.artifacts import read_products, write_products
from raycurv.files.row_files import open_rows
from raycurv.files.store import Store
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.influence.ihvp import truncated_products
from raycurv.mathematics.rank.rank_inverse import RankInverse, RankInverses, check_residual
from raycurv.stages.pool import Need


@dataclass(frozen=True)
class RankProducts:
    """How the IHVPs of some queries are made of their gradients.

    Attributes:
        gradients: has the queries' gradients, whole.
        out: where the products go.
        fitted: has the rows.
        rank: to truncate to; ``None`` for whole.
        seed: of the truncated SVD's test matrices.
        dtype: of the model's computation.
    """

    gradients: Store
    out: Store
    fitted: Store
    rank: int | None
    seed: int
    dtype: torch.dtype

    def make(self, blocks: Sequence[Block], inverses: RankInverses, workers: Workers) -> float:
        """Make the products of every block; gives the largest residual ``|F F⁻¹v − v|/|v|`` along
        what the gradients span.

        Raises:
            NumericalError: a residual says that λ is too small for the dtype.
        """
        needs = [Need(40 * b.d_out * b.d_in, 0.0, b.name) for b in blocks]
        each = [(self, b, inverses.by_block[b.name]) for b in blocks]
        projection: Tensor | None = None
        if inverses.joint:
            # In the order of the blocks, or the sum would depend on chance.
            found = in_order(workers.run_tasks("IHVPs", project_gradients, each, needs))
            shares = [share for share in found if share is not None]
            projection = _sum(shares) if shares else None
        made = [(*task, projection) for task in each]
        seen = in_order(workers.run_tasks("IHVPs", apply_inverse, made, needs))
        groups = [(f"block {b.name}", [s]) for b, s in zip(blocks, seen, strict=True)]
        if inverses.joint:
            groups = [("the model's Fisher", seen)]
        largest = 0.0
        # Any block has the model's inverse.
        for (where, some), (_, _, inverse) in zip(groups, each, strict=False):
            parts = [part for part in some if part is not None]
            if inverse is not None and parts:
                residual = inverse.residual(parts[0][0], _sum([applied for _, applied in parts]))
                check_residual(residual, where, inverse.damping, self._number)
                largest = max(largest, residual)
        return largest

    @property
    def _number(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(dim=0)


def project_gradients(
    job: RankProducts, block: Block, inverse: RankInverse | None
) -> Tensor | None:
    """A block's share of what the inverse needs to know of the queries' gradients."""
    if inverse is None:
        return None
    values = read_products(job.gradients, block.name, (block.d_out, block.d_in))[0].dense()
    return open_rows(job.fitted, block).project(values, inverse)


def apply_inverse(
    job: RankProducts, block: Block, inverse: RankInverse | None, projection: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Make a block's products and write them; gives the projections of what went in and came out.

    Args:
        projection: of whole gradients, over all blocks of the inverse; ``None`` for its own.
    """
    found, queries = read_products(job.gradients, block.name, (block.d_out, block.d_in))
    values = found.dense()
    result, seen = torch.zeros_like(values, dtype=job._number), None
    if inverse is not None:
        rows = open_rows(job.fitted, block)
        if projection is None:
            projection = rows.project(values, inverse)
        for outputs, rows_MN, here in rows.parts(inverse):
            part = values[:, outputs]
            product = here.apply(rows_MN, part.flatten(1), projection)
            result[:, outputs] = product.view(part.shape).to(result.dtype)
        seen = (projection, rows.project(result, inverse))
    own = torch.stack([(v.double() * r).sum() for v, r in zip(values, result, strict=True)])
    products = truncated_products(result, job.rank, job.seed, queries, block, own=own)
    write_products(job.out, block.name, products, queries)
    return seen
