"""Influence scores of training examples on queries, and of examples on themselves.

    score(q, n) = ⟨IHVP_q, ∇L_n⟩ = Σ_blocks Σ_t Σ_r (left_r · g_t)(right_r · a_t)
    self(n)     = Σ_blocks Σ_{o,i} (Q_Gᵀ ∇L_n Q_A)²[o, i] / (Λ + λ)[o, i]

A positive score means that training on the example lowers the query's measurement (Grosse et al.
2023, arXiv:2308.03296, section 2; there with the opposite sign convention for the change).

Axis letters: B blocks, N training examples, Q queries, R rank, T rows, O and I a block's axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Captured
from raycurv.mathematics.curvature import BlockCurvature, Damping, Preconditioner
from raycurv.mathematics.eigen import Eigenbasis
from raycurv.mathematics.gradients import PIECE, Rotations, example_gradients
from raycurv.mathematics.influence.ihvp import BlockProducts
from raycurv.mathematics.products import rows_times
from raycurv.mathematics.sums import Combine, Results, Sums

# How a result stands in a table of scores, in the row of a query and an example: a number, a list
# of the same length in each, or a list of a number for each token of the example.
Column = Literal["number", "list", "tokens"]
# What a microbatch gives, by name.
SCORES, BLOCK_SCORES, TOKEN_SCORES = "scores", "block_scores", "token_scores"
SELF_SCORES = "self_scores"
# Elements of an intermediate that are formed at once (float32: 32 MiB), where products of a rank
# are projected, or made whole for so many examples.
TOGETHER = 2**23


def score_through_gradients(
    tokens: int, d_out: int, d_in: int, queries: int, rank: int, examples: int
) -> bool:
    """Whether forming per-example gradients takes fewer FLOPs than projecting rows on the products.

    Making the products whole costs ``Q R O I`` for so many examples at once, and is counted in.
    """
    projected = tokens * queries * rank * (d_out + d_in)
    formed = d_out * d_in * (tokens + queries + queries * rank / examples)
    return formed < projected


class SelfScores(Protocol):
    """Scores the examples of a microbatch against themselves, block by block."""

    @property
    def bases(self) -> dict[str, Eigenbasis]:
        """Factor -> the basis that it wants the rows of all blocks in."""
        ...

    def start(self, examples: int, device: torch.device) -> dict[str, Tensor]:
        """What a microbatch of so many examples gives before any block has been added."""
        ...

    def add(self, block: Block, rotations: Rotations, results: dict[str, Tensor]) -> None:
        """Add what one block contributes."""
        ...


class PairwiseScores(Sums):
    """Scores the examples of a microbatch against all queries of the pass; nothing is summed up.

    Args:
        blocks: the stage's blocks.
        products: block name -> IHVPs.
        queries: Q.
        per_block: also give every block's own scores.
        per_token: also give every token's.
        dtype: of the model's computation.
        bases: factor -> eigenbasis, of the blocks whose products are in it.
        own: also scores the examples on themselves, from the same rows.
    """

    results: ClassVar[Mapping[str, Combine]] = {
        SCORES: "sum", TOKEN_SCORES: "sum", SELF_SCORES: "sum", BLOCK_SCORES: "concat",
    }  # fmt: skip
    columns: ClassVar[Mapping[str, Column]] = {
        SCORES: "number", BLOCK_SCORES: "list", TOKEN_SCORES: "tokens",
    }  # fmt: skip

    def __init__(
        self,
        blocks: Sequence[Block],
        products: Mapping[str, BlockProducts],
        queries: int,
        per_block: bool,
        per_token: bool,
        dtype: torch.dtype,
        device: torch.device,
        bases: dict[str, Eigenbasis] | None = None,
        own: SelfScores | None = None,
    ) -> None:
        super().__init__((), dtype, device)
        self._blocks, self._products, self._queries = tuple(blocks), products, queries
        self._per_block, self._per_token, self._own = per_block, per_token, own
        self._bases = (bases or {}) if own is None else own.bases

    def add(self, draws: Sequence[Captured], counts: bool = True) -> Results:
        """``scores [N, Q]``, ``block_scores [N, Q, B]``, ``token_scores [N, Q, T]``, float64, and
        what ``own`` gives."""
        (captured,) = draws
        n = captured.batch.size
        scores = torch.zeros(n, self._queries, dtype=torch.float64, device=self.device)
        own = {} if self._own is None else self._own.start(n, self.device)
        by_block, by_token = [], None
        if self._per_token:
            assert captured.batch.mask is not None
            by_token = scores.new_zeros(*scores.shape, captured.batch.mask.shape[1])
        rotations = Rotations(captured, self._bases, self._blocks, self.dtype)
        for block in self._blocks:
            products = self._products[block.name].at(rotations.columns(block))
            rows = rotations.rows(block) if products.turned is None else rotations.rotated(block)
            if rows is None:
                part = torch.zeros_like(scores)
            elif by_token is not None:
                positions = captured.positions(block)
                terms = _token_scores(block, products, *rows, by_token.shape[2], positions)
                by_token += terms
                part = terms.sum(dim=2)
            else:
                part = _scores(products, *rows).double()
            scores += part
            if self._per_block:
                by_block.append(part)
            if self._own is not None:
                self._own.add(block, rotations, own)
        results = {SCORES: scores} | own
        if self._per_block:
            results[BLOCK_SCORES] = (
                torch.stack(by_block, dim=2) if by_block else scores.new_zeros(*scores.shape, 0)
            )
        if by_token is not None:
            results[TOKEN_SCORES] = by_token
        return results


def _scores(products: BlockProducts, a: Tensor, g: Tensor) -> Tensor:
    """``[N, Q]`` of one block."""
    d_out, d_in, examples = g.shape[-1], a.shape[-1], len(a)
    step = max(1, TOGETHER // (d_out * d_in))
    if products.left is not None and products.right is not None and a.ndim == 3:
        queries, rank = products.left.shape[:2]
        at_once = min(step, examples)
        if not score_through_gradients(a.shape[1], d_out, d_in, queries, rank, at_once):
            return _projected(products.left, products.right, a, g).sum(dim=1)
    if products.whole is not None and a.ndim == 3:
        return _whole(products.whole, a, g)
    parts = []
    for i in range(0, examples, step):
        m_NX = example_gradients(a[i : i + step], g[i : i + step]).flatten(1)
        # Low-rank products are made whole a few at a time: all of them may be larger than memory.
        parts.append(
            torch.cat([rows_times(m_NX, w.flatten(1).T) for w in products.some(step)], dim=1)
        )
    return torch.cat(parts)


def _whole(products_QOI: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """``[N, Q]``, some outputs at a time: gradients stay in the cache, products are read once."""
    scores = a.new_zeros(len(a), len(products_QOI))
    step = max(1, PIECE // (len(a) * a.shape[-1]))
    for start in range(0, g.shape[-1], step):
        outputs = slice(start, start + step)
        m_NX = example_gradients(a, g[:, :, outputs]).flatten(1)
        scores += rows_times(m_NX, products_QOI[:, outputs].flatten(1).T)
    return scores


def _projected(left_QRO: Tensor, right_QRI: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """``Σ_r (left_r · g_t)(right_r · a_t)``, ``[N, T, Q]``, some queries at a time."""
    queries, rank = left_QRO.shape[:2]
    rows = a.shape[0] * a.shape[1]
    step = max(1, TOGETHER // (rows * rank))
    a_XI, g_XO = a.reshape(rows, -1), g.reshape(rows, -1)
    parts = []
    for i in range(0, queries, step):
        right = rows_times(a_XI, right_QRI[i : i + step].flatten(0, 1).T)
        left = rows_times(g_XO, left_QRO[i : i + step].flatten(0, 1).T)
        parts.append((left * right).view(rows, -1, rank).sum(dim=2))
    return torch.cat(parts, dim=1).view(a.shape[0], a.shape[1], queries)


def _token_scores(
    block: Block,
    products: BlockProducts,
    a: Tensor,
    g: Tensor,
    tokens: int,
    positions: Tensor | None,
) -> Tensor:
    """``[N, Q, T]`` of one block, float64; several rows of one position add up."""
    calls, rest = divmod(a.shape[1], tokens)
    if a.ndim == 4 or (rest and positions is None):
        raise UserError(
            f"block {block.name}",
            f"rows that are the {tokens} positions of the examples",
            f"{a.shape[1]} rows",
            f"Leave out --per-token, or the block: --blocks '!{block.name}'.",
        )
    if products.whole is None:
        assert products.left is not None and products.right is not None
        terms = _projected(products.left, products.right, a, g)
    else:
        terms = torch.stack([((g @ whole) * a).sum(dim=2) for whole in products.whole], dim=2)
    terms = terms.double()
    if positions is not None:
        by_token = terms.new_zeros(len(terms), tokens, terms.shape[2])
        return by_token.scatter_add_(1, positions[..., None].expand_as(terms), terms).mT
    by_call: Tensor = terms.unflatten(1, (calls, tokens))
    return by_call.sum(dim=1).transpose(1, 2)


class SpectralSelfScores:
    """Scores examples against themselves, at full rank, in the eigenbasis.

    Args:
        curvatures: block name -> its curvature.
        damping: of every block.
        dtype: of the model's computation.
    """

    def __init__(
        self,
        curvatures: Mapping[str, BlockCurvature],
        damping: Damping,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        computed = torch.float64 if dtype == torch.float64 else torch.float32
        self._preconditioner = Preconditioner.of(curvatures, damping, computed, device)

    @property
    def bases(self) -> dict[str, Eigenbasis]:
        return self._preconditioner.bases

    def start(self, examples: int, device: torch.device) -> dict[str, Tensor]:
        return {SELF_SCORES: torch.zeros(examples, dtype=torch.float64, device=device)}

    def add(self, block: Block, rotations: Rotations, results: dict[str, Tensor]) -> None:
        inverse, columns = self._preconditioner.inverse[block.name], rotations.columns(block)
        inverse = inverse if columns is None else inverse[:, columns]
        scores = torch.zeros_like(results[SELF_SCORES])
        for part, outputs, m_NOI in rotations.pieces(block):
            squares = m_NOI.square_().mul_(inverse[outputs])
            scores[part] += squares.sum(dim=2).sum(dim=1, dtype=torch.float64)
        results[SELF_SCORES] += scores
