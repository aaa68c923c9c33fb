"""Bytes of disk: what each phase leaves, and what lies there besides while it runs."""

from __future__ import annotations

from collections.abc import Sequence

from raycurv.planning.moments import gradient_sum_bytes, products_bytes, sum_bytes
from raycurv.planning.shapes import DataShape, Recipe, StageShape, squares

Group = Sequence[StageShape]

# A token in Parquet, int32, which zstd makes smaller; a drawn label likewise.
TOKEN = 4
# A score with its two ids (dictionary-coded) in Parquet.
SCORE = 6


def factor_sums(group: Group, recipe: Recipe) -> int:
    """``factors/``: the sums."""
    return recipe.computed * factor_elements(group, recipe)


def eigenbases(group: Group, recipe: Recipe) -> int:
    """``eigen/``: bases in the store's dtype, eigenvalues in float64."""
    if not recipe.has_factors:
        return 0
    widths = sum(sum(t) for s in group for t in s.factors(recipe.max_factor_dim).values())
    return recipe.store_dtype.itemsize * factor_elements(group, recipe) + 8 * widths


def largest_basis(group: Group, recipe: Recipe) -> int:
    """The largest file below ``eigen/``."""
    factors = [t for s in group for t in s.factors(recipe.max_factor_dim).values()]
    return recipe.store_dtype.itemsize * max(map(squares, factors), default=0)


def corrected(group: Group, recipe: Recipe) -> int:
    """``corrected/``: Λ of every block, and its sum where sums are kept."""
    if not recipe.has_corrected:
        return 0
    kept = recipe.computed if recipe.keep_sums else 0
    return (recipe.store_dtype.itemsize + kept) * block_elements(group)


def rank_rows(group: Group, recipe: Recipe) -> int:
    """``rows/``: the rows of every block, and their Gram."""
    blocks = sum(len(s.blocks) for s in group)
    rows = recipe.rows * recipe.store_dtype.itemsize * block_elements(group)
    return rows + 8 * blocks * recipe.rows**2


def gradients(group: Group, recipe: Recipe, data: DataShape) -> int:
    """``gradients/``, and the norms of each example by block."""
    if not recipe.gradients:
        return 0
    blocks = sum(len(stage.blocks) for stage in group)
    written = recipe.gradient_sums * block_elements(group) + data.examples * blocks
    return recipe.computed * written


def norms(group: Group, recipe: Recipe, data: DataShape) -> int:
    """The norms as a pass's rows and as they wait for those of other groups, in float64."""
    blocks = sum(len(stage.blocks) for stage in group)
    return 2 * 8 * data.examples * blocks if recipe.gradients else 0


def factor_elements(group: Group, recipe: Recipe) -> int:
    """Elements of all factors."""
    return sum(squares(t) for s in group for t in s.factors(recipe.max_factor_dim).values())


def block_elements(group: Group) -> int:
    """Elements of Λ, and of one dense gradient."""
    return sum(b.d_in * b.d_out for s in group for b in s.blocks)


def products(group: Group, recipe: Recipe, queries: int) -> int:
    """``ihvp/``: IHVPs of so many queries."""
    return sum(products_bytes(stage, recipe, queries) for stage in group)


def factor_commit(group: Group, recipe: Recipe, data: DataShape) -> int:
    """A commit of the first pass: sums as they stand, with their masters."""
    sums = sum_bytes(recipe, data.microbatches) * factor_elements(group, recipe)
    return sums + gradient_commit(group, recipe, data)


def corrected_commit(group: Group, recipe: Recipe, data: DataShape) -> int:
    """A commit of the second pass."""
    sums = sum_bytes(recipe, data.microbatches) * block_elements(group)
    return sums + gradient_commit(group, recipe, data)


def gradient_commit(group: Group, recipe: Recipe, data: DataShape) -> int:
    """What a commit of a pass has of gradient statistics."""
    return sum(gradient_sum_bytes(stage, recipe, data) for stage in group)


def rows_commit(group: Group, recipe: Recipe, data: DataShape) -> int:
    """A commit of the pass that gathers the rows of a rank-m Fisher."""
    rows = recipe.rows * recipe.computed * block_elements(group)
    return rows + gradient_commit(group, recipe, data)


def spool(group: int, groups: int, recipe: Recipe, data: DataShape, width: int) -> int:
    """What lies in the spool at most while a group is resident on the way back.

    Hidden states that enter it and those before it, the gradient that it reads, and the one that it
    writes.
    """
    one = data.positions * width * recipe.dtype.itemsize
    return one * (group + recipe.back * ((group < groups - 1) + (group > 0)))
