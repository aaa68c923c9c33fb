"""What of a model, its data and the settings decides how much a job takes. Plain numbers.

Axis letters: N examples of a microbatch, T positions, I and O a block's axes, t a tile's width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from raycurv.data.microbatch import Lengths, plan_microbatches
from raycurv.mathematics.bases import BASES, Basis
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.factors import factors_of
from raycurv.mathematics.methods import Method, open_method
from raycurv.models.model import Outline
from raycurv.planning.alike import Alike
from raycurv.planning.trace import Trace


@dataclass(frozen=True)
class DataShape:
    """Examples, and the microbatches that they make.

    Attributes:
        examples: how many.
        tokens: in all, without padding.
        positions: in all, with padding.
        microbatches: how many.
        batch_examples, batch_positions: N and T of the largest microbatch.
        padded: whether any microbatch has padding.
        longest: tokens of the longest example.
    """

    examples: int
    tokens: int
    positions: int
    microbatches: int
    batch_examples: int
    batch_positions: int
    padded: bool
    longest: int

    @property
    def rows(self) -> int:
        """Positions of the largest microbatch."""
        return self.batch_examples * self.batch_positions

    @property
    def row_length(self) -> int:
        """Positions of an example, on the mean."""
        return max(1, round(self.positions / max(1, self.examples)))

    def thinned(self, share: float) -> DataShape:
        """With a share of its positions, spread evenly."""
        if share == 1.0:
            return self
        return replace(
            self,
            tokens=math.ceil(share * self.tokens),
            positions=math.ceil(share * self.positions),
            batch_positions=math.ceil(share * self.batch_positions),
        )

    @classmethod
    def of_lengths(cls, lengths: Lengths, batch_tokens: int, window: int) -> DataShape:
        """Of examples with so many tokens each, exactly."""
        plan = plan_microbatches(lengths, batch_tokens, window)
        if not len(plan):
            return cls(0, 0, 0, 0, 1, 1, False, 1)
        sizes, longest = plan.sizes, plan.longest(lengths)
        padded = sizes * longest
        largest = int(padded.max())
        width = int(longest[padded == largest].max())
        tokens, positions = int(np.asarray(lengths, np.int64).sum()), int(padded.sum())
        return cls(
            len(lengths),
            tokens,
            positions,
            len(plan),
            largest // width,
            width,
            positions > tokens,
            int(longest.max()),
        )

    @classmethod
    def uniform(cls, examples: int, tokens: int, batch_tokens: int) -> DataShape:
        """Of examples with ``tokens`` each."""
        size = max(1, batch_tokens // tokens)
        total = examples * tokens
        return cls(
            examples, total, total, -(-examples // size), min(size, examples), tokens, False, tokens
        )


@dataclass(frozen=True)
class Solving:
    """What decides how much a solver of IHVPs takes.

    Attributes:
        steps: at most.
        coupled: whether all blocks are one system; otherwise each is a direction of its own.
        minibatch: examples that a step multiplies; ``None`` for all.
    """

    steps: int
    coupled: bool
    minibatch: int | None = None


@dataclass(frozen=True)
class Recipe:
    """The settings that decide sizes; as in the jobs' settings.

    Attributes:
        logits_chunk: logits formed at once (numbers).
        whole_queries: whether a query's logits are formed all at once instead, for its measurement
            is not called on slices of positions.
        gradients: whether a pass gathers gradient statistics.
        own: whether a pass differentiates the data's own labels beside drawn ones, for them.
        rank: of IHVPs; ``None`` for full.
        query_memory: bytes of IHVPs that a stage may hold.
        rows: gradients that make a rank-m Fisher.
        basis: which factors the eigenbases are of.
        basis_passes: passes that sum up factors, the first for A and G.
        directions: vectors that a pass multiplies by; 0 where there are no products.
        vectors: that such a job has in files at most.
        solving: of IHVPs by a solver; ``None`` for those of the fit's curvature.
    """

    method: str = "ekfac"
    draws: int = 1
    max_factor_dim: int | None = None
    dtype: torch.dtype = torch.float32
    store_dtype: torch.dtype = torch.float32
    keep_sums: bool = False
    logits_chunk: int = 2**24
    whole_queries: bool = False
    gradients: bool = False
    own: bool = False
    rank: int | None = 32
    query_memory: int = 2 * 1024**3
    self_influence: bool = False
    ihvp: bool = False
    rows: int = 0
    basis: Basis = BASES["kfac"]
    basis_passes: int = 1
    directions: int = 0
    vectors: int = 0
    solving: Solving | None = None

    @property
    def computed(self) -> int:
        """Bytes of a number in factors, rotations and scores: never coarser than float32."""
        return 8 if self.dtype == torch.float64 else 4

    @property
    def back(self) -> int:
        """How many gradients a pass sends back for each microbatch."""
        return self.draws + self.own

    @property
    def kind(self) -> Method:
        """What the method has."""
        return open_method(self.method)


@dataclass(frozen=True)
class StageShape:
    """What decides how much a stage takes.

    Attributes:
        index: its place in the chain.
        alike: what stands for its blocks, which have input factors.
        weights: bytes of its weights in the model's dtype.
        largest_weight: elements of the largest weight.
        graph: bytes that one open microbatch keeps for its backward.
        flops: of the forward of one position (a multiplication and an addition are two).
        width: columns of the hidden states.
        first, last: whether it holds that end of the chain.
        vocabulary: logits of a position, in the last stage; 0 elsewhere.
        any_length: whether its layers take sequences of every length.
        shares: rows of a block for each position, where that is not one.
    """

    index: int
    alike: Alike
    weights: int
    largest_weight: int
    graph: int
    flops: float
    width: int
    first: bool
    last: bool
    vocabulary: int
    any_length: bool
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Of blocks that are alike one, which counts for so many."""
        return self.alike.blocks

    def count(self, block: Block) -> int:
        """How many blocks one stands for."""
        return self.alike.counts[block.name]

    def factor_count(self, name: str) -> int:
        """How many factors one stands for."""
        return self.alike.factor_counts[name]

    @cached_property
    def elements(self) -> int:
        """Elements of all blocks: of Λ, and of one dense gradient."""
        return sum(b.d_in * b.d_out * self.count(b) for b in self.blocks)

    @cached_property
    def active_elements(self) -> float:
        """Elements of the blocks that a position meets, on the mean."""
        return sum(b.d_in * b.d_out * self.rows_of(b) for b in self.blocks)

    @property
    def largest_block(self) -> int:
        """Elements of the largest block."""
        return max((b.d_in * b.d_out for b in self.blocks), default=0)

    @cached_property
    def _tiles(self) -> dict[int | None, dict[str, tuple[int, ...]]]:
        return {}

    def factors(self, max_factor_dim: int | None) -> dict[str, tuple[int, ...]]:
        """Factor -> widths of its tiles, of those that are alike one."""
        if max_factor_dim not in self._tiles:
            found = factors_of(self.blocks).items()
            self._tiles[max_factor_dim] = {n: f.tiles(max_factor_dim) for n, f in found}
        return self._tiles[max_factor_dim]

    @cached_property
    def sharing(self) -> Counter[str]:
        """Input factor -> how many blocks read it."""
        return Counter(block.input_factor for block in self.blocks)

    def tiles(self, max_factor_dim: int | None) -> list[tuple[tuple[int, ...], int]]:
        """Widths of the tiles of factors, each with the number of those that are alike."""
        found = self.factors(max_factor_dim).items()
        return [(tiles, self.factor_count(name)) for name, tiles in found]

    def share(self, block: Block) -> float:
        """Rows of a block for each position."""
        return self.shares.get(block.name, 1.0)

    def columns(self, data: DataShape, block: Block) -> int:
        """Input columns that a microbatch's rows have: of one-hot ones no more than tokens."""
        one_hot = block.input_diagonal and not block.shared
        return min(block.d_in, data.rows) if one_hot else block.d_in

    def rows_of(self, block: Block) -> float:
        """Rows of all blocks that are like one, for each position."""
        return self.share(block) * self.count(block)

    @cached_property
    def factor_shares(self) -> dict[str, float]:
        """Factor -> its rows for each position."""
        return {name: self.share(f.block) for name, f in factors_of(self.blocks).items()}

    def active(self, data: DataShape, block: Block) -> DataShape:
        """The data as a block sees it, which may not see every position."""
        return data.thinned(self.share(block))

    def forward_flops(self, data: DataShape) -> float:
        """FLOPs of all data forward."""
        return self.flops * data.positions


Group = Sequence[StageShape]


def factor_elements(group: Group, recipe: Recipe) -> int:
    """Elements of all factors of some stages."""
    return sum(squares(t) * count for s in group for t, count in s.tiles(recipe.max_factor_dim))


def squares(tiles: Sequence[int]) -> int:
    """Elements of a factor in tiles: ``Σ t²``."""
    return sum(t * t for t in tiles)


def stage_shapes(
    outline: Outline, cuts: Sequence[range], traced: Trace, dtype: torch.dtype, rows: int
) -> tuple[StageShape, ...]:
    """The stages of a model.

    Args:
        cuts: layers of each stage.
        traced: of a microbatch of ``rows`` positions.
        dtype: of the model's computation.
    """
    largest = max((p.numel() for p in outline.skeleton().parameters()), default=0)
    shapes = []
    for index, units in enumerate(cuts):
        last = units.stop == outline.units
        alike = Alike.joined([traced.units[unit] for unit in units], traced.shares)
        flops = sum(traced.flops[u] for u in units) + (traced.head_flops if last else 0)
        shapes.append(
            StageShape(
                index=index,
                alike=alike,
                weights=outline.weight_bytes(units, dtype),
                largest_weight=min(largest, outline.weight_bytes(units, dtype) // dtype.itemsize),
                graph=sum(traced.kept[u] for u in units),
                flops=flops / rows,
                width=outline.width or max((b.d_out for b in alike.blocks), default=1),
                first=units.start == 0,
                last=last,
                vocabulary=(outline.classes or outline.vocab_size or 0) if last else 0,
                any_length=outline.any_length,
                shares=traced.shares,
            )
        )
    return tuple(shapes)
