"""Blocks of which many are alike, such as those of a layer's experts: one stands for them all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.factors import factors_of


@dataclass(frozen=True)
class Alike:
    """What stands for blocks.

    Attributes:
        blocks: one of those that take equally much, with those that read the same input.
        counts: how many each stands for, by name.
        factor_counts: for how many of their own kind the factors of these stand, by name.
    """

    blocks: tuple[Block, ...]
    counts: Counter[str]
    factor_counts: Counter[str]

    @classmethod
    def of(cls, blocks: Iterable[Block], shares: Mapping[str, float]) -> Alike:
        """Of blocks with their input factors, and the rows of each for each position where that is
        not one."""
        there = tuple(blocks)
        one = cls(there, Counter(b.name for b in there), Counter(factors_of(there).keys()))
        return cls.joined([one], shares)

    @classmethod
    def joined(cls, parts: Sequence[Alike], shares: Mapping[str, float]) -> Alike:
        """Of several, none of whose factors is in another."""
        readers: dict[str, list[Block]] = {}
        counts, factor_counts = Counter[str](), Counter[str]()
        for part in parts:
            for block in part.blocks:
                readers.setdefault(block.input_factor, []).append(block)
        first: dict[tuple[Any, ...], list[Block]] = {}
        stands: dict[str, Block] = {}
        for mine in readers.values():
            kept = first.setdefault(tuple(_size(b, shares.get(b.name, 1.0)) for b in mine), mine)
            stands |= {block.name: one for block, one in zip(mine, kept, strict=True)}
        for part in parts:
            for block in part.blocks:
                counts[stands[block.name].name] += part.counts[block.name]
            for name, factor in factors_of(part.blocks).items():
                one = stands[factor.block.name]
                named = one.input_factor if factor.side == "input" else one.output_factor
                factor_counts[named] += part.factor_counts[name]
        kept_blocks = tuple(block for kept in first.values() for block in kept)
        return cls(kept_blocks, counts, factor_counts)


def _size(block: Block, share: float) -> tuple[Any, ...]:
    return (
        block.d_in, block.d_out, block.bias, block.groups, block.input_diagonal,
        block.output_diagonal, share,
    )  # fmt: skip
