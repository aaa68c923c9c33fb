"""Inverse-Hessian-vector products of queries, block by block: whole, or truncated to a rank.

    M = Q_Gᵀ V Q_A / (Λ + λ)          V = ∇f(query), in the eigenbasis
    ⟨Q_G M Q_Aᵀ, ∇L⟩ = ⟨M, Q_Gᵀ ∇L Q_A⟩   so few examples are turned sooner than M is turned back
    rank R:  M ≈ U W,   left = (Q_G U)ᵀ [R, O],   right = W Q_Aᵀ [R, I]

Rotations keep singular values, so truncating in the eigenbasis is truncating the IHVP itself. The
truncated SVD is randomised (Halko, Martinsson & Tropp 2011, arXiv:0909.4061, algorithms 4.4 and
5.1) with a test matrix seeded by (seed, query id, block): it does not depend on stages or batches.

Axis letters: Q queries, R rank, and those of :mod:`raycurv.mathematics.capture`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raycurv.errors import not_finite
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Captured
from raycurv.mathematics.curvature import BlockCurvature, Damping, Preconditioner
from raycurv.mathematics.eigen import Eigenbasis, own_axes
from raycurv.mathematics.gradients import Rotations, spread
from raycurv.mathematics.kinds.catalogue import kind_of_block
from raycurv.mathematics.sums import PlainSum, Results, Sums, is_finite, working_dtype

_OVERSAMPLING = 8
_POWER_STEPS = 2


@dataclass(frozen=True)
class BlockProducts:
    """The IHVPs of one block: ``full [Q, O, I]``, or ``left [Q, R, O]`` and ``right [Q, R, I]``.

    The product of query q is ``full[q]``, or ``left[q]ᵀ right[q]``. Those that are made for some
    examples alone may stay in the eigenbasis: ``turned [Q, O, I]``.

    Attributes:
        squares: the squared norm of each query's gradient, ``[Q]``, float64, where it is kept.
        own: the product of each query's gradient with its whole IHVP, ``[Q]``, float64, where it
            is kept: the block's share of the query's self-influence.
    """

    full: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    turned: Tensor | None = None
    squares: Tensor | None = None
    own: Tensor | None = None

    @property
    def whole(self) -> Tensor | None:
        """``[Q, O, I]`` where they are not truncated, in the basis that they are held in."""
        return self.full if self.turned is None else self.turned

    def dense(self) -> Tensor:
        """``[Q, O, I]``, in the basis that they are held in."""
        if self.whole is not None:
            return self.whole
        assert self.left is not None and self.right is not None
        return torch.bmm(self.left.transpose(1, 2), self.right)

    def some(self, count: int) -> Iterator[Tensor]:
        """All products whole, ``[q, O, I]``, at most ``count`` at a time."""
        held = self.tensors()
        for start in range(0, len(next(iter(held.values()))), count):
            yield BlockProducts(**{k: t[start : start + count] for k, t in held.items()}).dense()

    def at(self, columns: Tensor | None) -> BlockProducts:
        """The products' columns with these numbers, ``None`` for all; not of turned ones of a basis
        that mixes columns."""
        if columns is None:
            return self
        held = self.tensors()
        cut = {k: t if k == "left" else t.index_select(-1, columns) for k, t in held.items()}
        return BlockProducts(**cut)

    def to(self, device: torch.device) -> BlockProducts:
        """The same products, their tensors on ``device``."""
        return BlockProducts(**{name: t.to(device) for name, t in self.tensors().items()})

    def plus(self, other: BlockProducts) -> BlockProducts:
        """The products of the queries of both: either has zeros where the other made its own."""
        mine = self.tensors() | self.numbers()
        theirs = other.tensors() | other.numbers()
        return BlockProducts(**{name: mine[name] + theirs[name] for name in mine})

    def numbers(self) -> dict[str, Tensor]:
        """What is kept of each query beside its product, by name: a number each."""
        named = {"squares": self.squares, "own": self.own}
        return {name: t for name, t in named.items() if t is not None}

    def tensors(self) -> dict[str, Tensor]:
        """Those that are held of the products, by name."""
        named = {
            "full": self.full,
            "left": self.left,
            "right": self.right,
            "turned": self.turned,
        }
        return {name: t for name, t in named.items() if t is not None}


def check_products(block: str, products: BlockProducts, queries: Sequence[str]) -> None:
    """Refuse IHVPs of a block that are not finite, with a NumericalError that names the query."""
    for values in products.tensors().values():
        if not is_finite(values):
            wrong = next(q for q, one in zip(queries, values, strict=True) if not is_finite(one))
            raise not_finite(f"block {block}, query {wrong!r}", "its IHVP")


def kept_rank(rank: int | None, d_out: int, d_in: int) -> int | None:
    """Rank that a block of this shape is truncated to; ``None`` where whole is no larger."""
    if rank is None or rank * (d_out + d_in) >= d_out * d_in:
        return None
    return rank


def product_elements(rank: int | None, d_out: int, d_in: int) -> int:
    """Numbers that one query's IHVP of a block takes."""
    kept = kept_rank(rank, d_out, d_in)
    return d_out * d_in if kept is None else kept * (d_out + d_in)


def stays_turned(block: Block, bases: Mapping[str, Eigenbasis], queries: int, rows: int) -> bool:
    """Whether turning so many rows of examples takes fewer FLOPs than turning whole IHVPs back.

    The IHVPs of kinds whose rows are not counted in tokens are turned back.
    """
    tile_in = max(bases[block.input_factor].tiles, default=0)
    tile_out = max(bases[block.output_factor].tiles, default=0)
    back = queries * block.d_out * block.d_in * (tile_in + tile_out)
    turned = rows * (block.d_in * tile_in + block.d_out * tile_out)
    return kind_of_block(block).rows_are_tokens and turned < back


def truncated_svd(m_NOI: Tensor, rank: int, test_NIK: Tensor) -> tuple[Tensor, Tensor]:
    """``M ≈ U W``: ``U [N, O, R]`` orthonormal times singular values' roots, ``W [N, R, I]``.

    Args:
        m_NOI: matrices.
        rank: R, below both axes.
        test_NIK: Gaussian test matrices, K = R + oversampling.
    """
    y = m_NOI @ test_NIK
    q = torch.linalg.qr(y).Q
    for _ in range(_POWER_STEPS):
        z = torch.linalg.qr(m_NOI.transpose(1, 2) @ q).Q
        q = torch.linalg.qr(m_NOI @ z).Q
    small = q.transpose(1, 2) @ m_NOI
    u, s, vh = torch.linalg.svd(small, full_matrices=False)
    root = s[:, :rank].sqrt()
    return (q @ u[:, :, :rank]) * root[:, None, :], root[:, :, None] * vh[:, :rank]


def test_matrix(seed: int, query_id: str, block: str, d_in: int, width: int) -> Tensor:
    """A Gaussian ``[d_in, width]`` that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed}\0{query_id}\0{block}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(d_in, width, generator=generator)


def truncated(
    m_NOI: Tensor,
    rank: int,
    seed: int,
    queries: Sequence[str],
    block: str,
    columns: Tensor | None = None,
    d_in: int | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`truncated_svd` of some queries' matrices of a block, with their own test matrices;
    NumericalError for one that is not finite.

    Matrices of some ``columns`` alone of ``d_in`` have no more than their rank; where this is below
    ``rank``, what is over is zero.
    """
    check_products(block, BlockProducts(full=m_NOI), queries)
    d_out, there = m_NOI.shape[1:]
    width = min(rank + _OVERSAMPLING, d_out, d_in or there)
    tests = torch.stack(
        [test_matrix(seed, query, block, d_in or there, width) for query in queries]
    )
    tests = tests.to(m_NOI)
    if columns is None:
        return truncated_svd(m_NOI, rank, tests)
    u, w = truncated_svd(m_NOI, rank, tests[:, columns, : len(columns)])
    missing = rank - u.shape[2]
    return (
        torch.nn.functional.pad(u, (0, missing)),
        spread(torch.nn.functional.pad(w, (0, 0, 0, missing)), columns, d_in or there),
    )


def truncated_products(
    whole_QOI: Tensor,
    rank: int | None,
    seed: int,
    queries: Sequence[str],
    block: Block,
    **numbers: Tensor,
) -> BlockProducts:
    """IHVPs that were made whole, in the weights' own axes, as others are kept: truncated to a
    rank, one after the other; ``numbers`` are kept beside them."""
    kept = kept_rank(rank, block.d_out, block.d_in)
    if kept is None:
        return BlockProducts(full=whole_QOI, **numbers)
    each = [
        truncated(whole_QOI[i : i + 1], kept, seed, queries[i : i + 1], block.name)
        for i in range(len(queries))
    ]
    left = torch.cat([u for u, _ in each]).transpose(1, 2)
    return BlockProducts(left=left, right=torch.cat([w for _, w in each]), **numbers)


class QueryGradients(Sums):
    """Gathers the gradients of queries, whole and in the weights' own axes.

    Each takes its place among all queries, where the other replicas have zeros.

    Args:
        blocks: with their input factors known.
        queries: all queries of this pass, in their order.
        dtype: of the model's computation.
        device: where the results live.
        bases: factor -> eigenbasis that gradients are turned into; by default the weights' axes.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        queries: Sequence[str],
        dtype: torch.dtype,
        device: torch.device,
        bases: dict[str, Eigenbasis] | None = None,
    ) -> None:
        super().__init__([block.name for block in blocks], dtype, device)
        self.blocks, self.bases = tuple(blocks), bases or own_axes(blocks)
        self._place = {query: i for i, query in enumerate(queries)}
        self.products: dict[str, BlockProducts] = {}
        for block in blocks:
            held = {
                key: PlainSum((len(queries), *shape), dtype, device)
                for key, shape in self._shapes(block).items()
            }
            self.sums |= {f"{block.name}#{key}": one for key, one in held.items()}
            self.products[block.name] = BlockProducts(**{k: one.part for k, one in held.items()})

    def _shapes(self, block: Block) -> dict[str, tuple[int, int]]:
        """Shapes of one query's results of a block, by the field of :class:`BlockProducts`."""
        return {"full": (block.d_out, block.d_in)}

    def add(self, draws: Sequence[Captured], counts: bool = True) -> Results:
        """Put what a microbatch of queries gives in its places, unless it is there."""
        if not counts:
            return {}
        (captured,) = draws
        rotations = Rotations(captured, self.bases, self.blocks, self.dtype)
        ids = captured.batch.ids
        for block in self.blocks:
            for part, m_NOI in rotations.gradients(block):
                where = [self._place[query] for query in ids[part]]
                self._put(block, m_NOI, rotations.columns(block), where, ids[part])
        return {}

    def _put(
        self,
        block: Block,
        m_NOI: Tensor,
        columns: Tensor | None,
        where: list[int],
        ids: Sequence[str],
    ) -> None:
        """Make the results of some queries from their gradients, which may be changed, and are of
        some columns alone where these are given."""
        full = self.products[block.name].full
        assert full is not None
        _fill(full, where, m_NOI, columns)

    def result(self, name: str) -> BlockProducts:
        """The results of a block: zeros for queries that did not come by."""
        return self.products[name]


class QueryProducts(QueryGradients):
    """Gathers the IHVPs of queries.

    Args:
        curvatures: block name -> its curvature.
        queries: all queries of this pass, in their order.
        damping: of every block; of several each query has a product for each, one after the other.
        rank: to truncate to; ``None`` for whole products.
        seed: of the test matrices.
        dtype: of the model's computation.
        device: where the products live.
        scored: rows of the examples that alone the products are for; ``None`` turns all back.
        beside: which numbers of each query are kept, too, of :meth:`BlockProducts.numbers`.
    """

    def __init__(
        self,
        curvatures: Mapping[str, BlockCurvature],
        queries: Sequence[str],
        damping: Damping | Sequence[Damping],
        rank: int | None,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        scored: int | None = None,
        beside: Sequence[str] = (),
    ) -> None:
        dampings = [damping] if isinstance(damping, Damping) else damping
        slots = [query for query in queries for _ in dampings]
        self._rank, self._seed, self._scored, self._count = rank, seed, scored, len(slots)
        preconditioner = Preconditioner.of(curvatures, dampings[0], working_dtype(dtype), device)
        self._inverse = preconditioner.inverse
        # Of the others it is made when it is needed: each is as large as all weights.
        self._others = dampings[1:]
        self._curvatures = curvatures if self._others else {}
        self.bases = preconditioner.bases
        super().__init__(preconditioner.blocks, slots, dtype, device, preconditioner.bases)
        self._place = {query: len(dampings) * i for i, query in enumerate(queries)}
        for name in self.names:
            held = {key: PlainSum((len(slots),), torch.float64, device) for key in beside}
            self.sums |= {f"{name}#{key}": one for key, one in held.items()}
            numbers = {key: one.part for key, one in held.items()}
            self.products[name] = replace(self.products[name], **numbers)

    def _shapes(self, block: Block) -> dict[str, tuple[int, int]]:
        kept = kept_rank(self._rank, block.d_out, block.d_in)
        if kept is not None:
            return {"left": (kept, block.d_out), "right": (kept, block.d_in)}
        if self._scored is not None and stays_turned(block, self.bases, self._count, self._scored):
            return {"turned": (block.d_out, block.d_in)}
        return super()._shapes(block)

    def _put(
        self,
        block: Block,
        m_NOI: Tensor,
        columns: Tensor | None,
        where: list[int],
        ids: Sequence[str],
    ) -> None:
        for number, other in enumerate(self._others, start=1):
            inverse = self._curvatures[block.name].inverted(
                other, working_dtype(self.dtype), self.device
            )
            here = [place + number for place in where]
            self._put_damped(block, m_NOI.clone(), inverse, columns, here, ids)
        self._put_damped(block, m_NOI, self._inverse[block.name], columns, where, ids)

    def _put_damped(
        self,
        block: Block,
        m_NOI: Tensor,
        inverse: Tensor,
        columns: Tensor | None,
        where: list[int],
        ids: Sequence[str],
    ) -> None:
        """Make the products under one damping."""
        inverse = inverse if columns is None else inverse[:, columns]
        products = self.products[block.name]
        if products.squares is not None:
            norms = torch.linalg.vector_norm(m_NOI, dim=(1, 2), dtype=torch.float64)
            products.squares[where] = norms.square()
        if products.own is not None:
            for place, m_OI in zip(where, m_NOI, strict=True):
                products.own[place] = m_OI.square().mul_(inverse).sum(dtype=torch.float64)
        m_NOI = m_NOI.mul_(inverse)
        left, right = self.bases[block.output_factor], self.bases[block.input_factor]
        if products.turned is not None:
            _fill(products.turned, where, m_NOI, columns)
        elif products.full is not None:
            whole = right.unrotate(m_NOI)
            whole = left.unrotate(whole.transpose(1, 2)).transpose(1, 2)
            _fill(products.full, where, whole, columns)
        else:
            assert products.left is not None and products.right is not None
            rank = products.left.shape[1]
            u, w = truncated(m_NOI, rank, self._seed, ids, block.name, columns, block.d_in)
            products.left[where] = left.unrotate(u.transpose(1, 2))
            products.right[where] = right.unrotate(w)


def _fill(held: Tensor, where: list[int], m_NOI: Tensor, columns: Tensor | None) -> None:
    """Put matrices, of some columns or all, where zeros are held."""
    if columns is None:
        held[where] = m_NOI
        return
    for place, matrix in zip(where, m_NOI, strict=True):
        held[place].index_copy_(1, columns, matrix)
