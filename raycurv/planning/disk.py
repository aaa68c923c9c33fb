"""Bytes of disk: what each phase leaves, and what lies there besides while it runs."""

from __future__ import annotations

from raycurv.planning.cost import Group
from raycurv.planning.moments import products_bytes
from raycurv.planning.shapes import DataShape, Recipe, squares

# A token in Parquet, int32, which zstd makes smaller; a drawn label likewise.
TOKEN = 4
# A score with its two ids (dictionary-coded) in Parquet.
SCORE = 6


def factor_elements(group: Group, recipe: Recipe) -> int:
    """Elements of all factors."""
    return sum(squares(t) for s in group for t in s.factors(recipe.max_factor_dim).values())


def block_elements(group: Group) -> int:
    """Elements of Λ, and of one dense gradient."""
    return sum(b.d_in * b.d_out for s in group for b in s.blocks)


def products(group: Group, recipe: Recipe, queries: int) -> int:
    """``ihvp/``: IHVPs of so many queries."""
    return sum(products_bytes(stage, recipe, queries) for stage in group)


def spool(group: int, groups: int, recipe: Recipe, data: DataShape, width: int) -> int:
    """What lies in the spool at most while a group is resident on the way back.

    Hidden states that enter it and those before it, the gradient that it reads, and the one that it
    writes.
    """
    one = data.positions * width * recipe.dtype.itemsize
    return one * (group + recipe.back * ((group < groups - 1) + (group > 0)))
