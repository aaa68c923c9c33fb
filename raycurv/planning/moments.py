"""Bytes of a stage at the moments of each phase at which they may be most.

A moment is a snapshot of the code: which tensors are alive then, by name. What is held stays from
one call of the stage to the next; what passes exists within a call, so that stages in one process
have it one after the other.

Axis letters as in :mod:`raycurv.planning.shapes`; R = N·T rows of the largest microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from raycurv.files.row_files import RUN
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.gradients import CHUNK, PIECE, rotate_before
from raycurv.mathematics.influence.ihvp import kept_rank, product_elements
from raycurv.mathematics.influence.scores import TOGETHER, score_through_gradients
from raycurv.mathematics.sums import FOLD_EVERY
from raycurv.planning.shapes import DataShape, Recipe, StageShape, squares

Bytes = dict[str, int]


@dataclass(frozen=True)
class Moment:
    """What is alive in a stage at one moment of a phase.

    Attributes:
        name: of the moment.
        held: bytes that stay after the call, by what they are.
        passing: bytes within the call.
        open_below: how many fewer microbatches are open than the schedule allows at most.
        graphs: whether there are open microbatches at all.
    """

    name: str
    held: Bytes
    passing: Bytes = field(default_factory=dict)
    open_below: int = 0
    graphs: bool = False


def loading(stage: StageShape, recipe: Recipe) -> tuple[Moment, ...]:
    """Weights come one at a time, as they are stored (2 bytes a number, as most are), and are
    cast."""
    return (Moment("loading", _weights(stage), {"a weight as stored": 2 * stage.largest_weight}),)


def forward_only(
    stage: StageShape, recipe: Recipe, data: DataShape, to_end: bool
) -> tuple[Moment, ...]:
    """A pass without a backward: the hooks still hold what enters each block until its end.

    Args:
        to_end: whether it goes on to the loss.
    """
    item = recipe.dtype.itemsize
    passing = {
        "captured inputs": data.rows * item * sum(_input_widths(stage).values()),
        "hidden states": 3 * data.rows * item * stage.width,
    }
    passing |= _layer(stage, recipe, data)
    if to_end:
        passing |= _head(stage, recipe, data, False)
    return (Moment("forward", _weights(stage), passing),)


def covariance(stage: StageShape, recipe: Recipe, data: DataShape) -> tuple[Moment, ...]:
    """A and G."""
    factors = stage.factors(recipe.max_factor_dim)
    outputs = {block.output_factor for block in stage.blocks}
    sums = sum(
        squares(tiles)
        * sum_bytes(recipe, data.microbatches * (recipe.draws if n in outputs else 1))
        for n, tiles in factors.items()
    )
    held = _weights(stage) | {"sums of A and G": sums} | _gradient_sums(stage, recipe, data)
    adding = max(
        (
            # The product is added to the sum afterwards; one operand is laid out anew for it.
            recipe.computed
            * (max(tiles) ** 2 + data.rows * (max(tiles) + _cast(recipe, sum(tiles))))
            for tiles in factors.values()
        ),
        default=0,
    )
    # The sum in float64, and as it is written.
    finishing = (8 + recipe.computed) * max(map(squares, factors.values()), default=0)
    passing = _larger({"covariance of a factor": adding}, _squared(stage, recipe, data))
    return (
        *_running(stage, recipe, data, held, passing),
        Moment("writing factors", held, {"a factor in float64": finishing}),
        *_writing_gradients(stage, recipe, held),
    )


def decomposition(tiles: Sequence[int], store_dtype: torch.dtype) -> int:
    """Bytes of the task that decomposes one factor.

    The sum and the mean of all tiles in float64; of one tile the symmetric matrix, the eigenvectors
    (numpy has them twice) and LAPACK's workspace of ``2 d²`` (dsyevd); the eigenvectors so far as
    they are stored.
    """
    whole, tile = squares(tiles), max(tiles) ** 2
    return 16 * whole + 40 * tile + store_dtype.itemsize * (whole - tile)


def corrected(stage: StageShape, recipe: Recipe, data: DataShape) -> tuple[Moment, ...]:
    """Λ in the eigenbases, or in the weights' own for the diagonal."""
    sums = 0
    for block, turned in _turned(stage, recipe, data):
        size = block.d_in * block.d_out
        together = max(1, (PIECE if turned else CHUNK) // size)
        additions = data.microbatches * recipe.draws * math.ceil(data.batch_examples / together)
        sums += size * sum_bytes(recipe, additions)
    held = _weights(stage) | _bases(stage, recipe) | {"sums of Λ": sums}
    held |= _gradient_sums(stage, recipe, data)
    # The sum and the mean in float64, and both as they are written.
    written = recipe.store_dtype.itemsize + (recipe.computed if recipe.keep_sums else 0)
    largest = max((b.d_in * b.d_out for b in stage.blocks), default=0)
    finishing = (8 + 8 + written) * largest
    passing = _gradients(stage, recipe, data, 1, pieces=True)
    return (
        *_running(stage, recipe, data, held, _larger(passing, _squared(stage, recipe, data))),
        Moment("writing Λ", held, {"a block in float64": finishing}),
        *_writing_gradients(stage, recipe, held),
    )


def gradient_statistics(stage: StageShape, recipe: Recipe, data: DataShape) -> tuple[Moment, ...]:
    """Gradient statistics in a pass of their own."""
    held = _weights(stage) | _gradient_sums(stage, recipe, data)
    return (
        *_running(stage, recipe, data, held, _squared(stage, recipe, data)),
        *_writing_gradients(stage, recipe, held),
    )


def rank_rows(stage: StageShape, recipe: Recipe, data: DataShape) -> tuple[Moment, ...]:
    """The rows of a rank-m Fisher."""
    elements = sum(b.d_in * b.d_out for b in stage.blocks)
    largest = max((b.d_in * b.d_out for b in stage.blocks), default=0)
    held = _weights(stage) | {"rows": recipe.rows * recipe.computed * elements}
    held |= _gradient_sums(stage, recipe, data)
    # As they are written; some outputs' at a time in float64.
    finishing = recipe.rows * recipe.store_dtype.itemsize * largest + 16 * RUN
    return (
        *_running(stage, recipe, data, held, _gradients(stage, recipe, data, 1, pieces=False)),
        Moment("writing rows", held, {"rows of a block": finishing}),
        *_writing_gradients(stage, recipe, held),
    )


def query_products(
    stage: StageShape, recipe: Recipe, data: DataShape, queries: int
) -> tuple[Moment, ...]:
    """IHVPs of so many queries at once."""
    elements = sum(b.d_in * b.d_out for b in stage.blocks)
    largest = max((b.d_in * b.d_out for b in stage.blocks), default=0)
    # The products of M-FAC start as plain gradients.
    plain = recipe.method in ("identity", "mfac")
    inverse = 0 if plain else recipe.computed * elements
    read = {"kfac": 8, "identity": 0, "mfac": 0}.get(recipe.method, recipe.store_dtype.itemsize)
    held = (
        _weights(stage)
        | _bases(stage, recipe)
        | {
            "1 / (Λ + λ)": inverse,
            "IHVPs": products_bytes(stage, recipe, queries),
        }
    )
    # The gradient, the same over Λ + λ, and for whole products the way back from the eigenbasis.
    copies = 2 if recipe.rank is not None else 5
    opening = {"Λ as read": read * elements, "a block in float64": 16 * largest if inverse else 0}
    return (
        Moment("reading curvature", held, opening),
        *_running(stage, recipe, data, held, _gradients(stage, recipe, data, copies, pieces=False)),
    )


def scores(stage: StageShape, recipe: Recipe, data: DataShape, queries: int) -> tuple[Moment, ...]:
    """Training examples against the IHVPs of so many queries."""
    held = _weights(stage) | {"IHVPs": products_bytes(stage, recipe, queries)}
    most = max((_scored(block, recipe, data, queries) for block in stage.blocks), default=0)
    passing = {"gradients or projections of some examples": most}
    if recipe.rank is None and recipe.method != "mfac":
        # Where examples are few, their rows are turned into the products' basis.
        held |= _bases(stage, recipe)
    if recipe.self_influence:
        elements = sum(b.d_in * b.d_out for b in stage.blocks)
        if recipe.method == "mfac":
            held |= {"rows": 8 * recipe.rows * elements}
        else:
            held |= _bases(stage, recipe) | {"1 / (Λ + λ)": recipe.computed * elements}
        passing = _gradients(stage, recipe, data, 1, pieces=True)
    return _running(stage, recipe, data, held, passing)


def _scored(block: Block, recipe: Recipe, data: DataShape, queries: int) -> int:
    """What a block's scores pass through: whole gradients and products, or projected rows."""
    item, rows, size = recipe.computed, data.rows, block.d_in * block.d_out
    cast = item * rows * _cast(recipe, block.d_in + block.d_out)
    examples = min(data.batch_examples, max(1, TOGETHER // size))
    kept = kept_rank(recipe.rank, block.d_out, block.d_in)
    if kept is None:
        # Some outputs' gradients of all examples.
        return cast + item * max(PIECE, data.batch_examples * block.d_in)
    if not score_through_gradients(
        data.batch_positions, block.d_out, block.d_in, queries, kept, examples
    ):
        # The left and the right projection, and their product.
        return cast + 3 * item * rows * kept * min(queries, max(1, TOGETHER // (rows * kept)))
    # Low-rank products are made whole, as many at a time as examples.
    whole = min(queries, max(1, TOGETHER // size))
    return cast + item * size * (examples + whole)


def products_bytes(stage: StageShape, recipe: Recipe, queries: int) -> int:
    """Bytes of the IHVPs of so many queries."""
    one = sum(product_elements(recipe.rank, b.d_out, b.d_in) for b in stage.blocks)
    return queries * one * recipe.computed


def queries_at_once(stages: Sequence[StageShape], recipe: Recipe) -> int:
    """How many queries' IHVPs fit the memory that is set aside for them, in every stage."""
    largest = max(products_bytes(stage, recipe, 1) for stage in stages)
    return max(1, recipe.query_memory // max(1, largest))


def sum_bytes(recipe: Recipe, additions: int) -> int:
    """Bytes of an element of a running sum: the float64 master comes with the first fold."""
    if recipe.dtype == torch.float64:
        return 8
    return 12 if additions > FOLD_EVERY else 4


def gradient_sum_bytes(stage: StageShape, recipe: Recipe, data: DataShape) -> int:
    """Bytes of the running sums of gradient statistics: means, squares and, of drawn labels,
    squares of examples and of whole microbatches."""
    if not recipe.gradients:
        return 0
    total = 0
    for block in stage.blocks:
        size = block.d_in * block.d_out
        together = max(1, PIECE // size)
        pieces = data.microbatches * math.ceil(data.batch_examples / together)
        additions = [data.microbatches, pieces]
        if recipe.own:
            additions += [recipe.draws * pieces, recipe.draws * data.microbatches]
        total += size * sum(sum_bytes(recipe, count) for count in additions)
    return total


def _gradient_sums(stage: StageShape, recipe: Recipe, data: DataShape) -> Bytes:
    return {"sums of gradients": gradient_sum_bytes(stage, recipe, data)}


def _squared(stage: StageShape, recipe: Recipe, data: DataShape) -> Bytes:
    """What passes while gradient statistics are gathered, which are in the weights' own basis."""
    if not recipe.gradients:
        return {}
    pieces = _gradients(stage, replace(recipe, method="diagonal"), data, 1, pieces=True)
    # A product of all rows is added to the sum afterwards; one operand is laid out anew for it.
    product = max(
        (
            b.d_in * b.d_out + data.rows * (b.d_in + _cast(recipe, b.d_in + b.d_out))
            for b in stage.blocks
        ),
        default=0,
    )
    return _larger(pieces, {"sum of some gradients": recipe.computed * product})


def _writing_gradients(stage: StageShape, recipe: Recipe, held: Bytes) -> tuple[Moment, ...]:
    """All sums of a block in float64 and as they are written, and a mean and its square."""
    if not recipe.gradients:
        return ()
    largest = max((b.d_in * b.d_out for b in stage.blocks), default=0)
    finishing = ((8 + recipe.computed) * recipe.gradient_sums + 16) * largest
    return (Moment("writing gradients", held, {"a block's gradients in float64": finishing}),)


def _larger(one: Bytes, other: Bytes) -> Bytes:
    """What takes more of two that take turns."""
    return max(one, other, key=lambda parts: sum(parts.values()))


def _weights(stage: StageShape) -> Bytes:
    return {"weights": stage.weights}


def _bases(stage: StageShape, recipe: Recipe) -> Bytes:
    if not recipe.has_factors:
        return {}
    factors = stage.factors(recipe.max_factor_dim)
    return {"eigenbases": recipe.store_dtype.itemsize * sum(map(squares, factors.values()))}


def _cast(recipe: Recipe, elements: int) -> int:
    """What is copied to compute in float32."""
    return elements if recipe.dtype.itemsize < 4 else 0


def _running(
    stage: StageShape, recipe: Recipe, data: DataShape, held: Bytes, gathering: Bytes
) -> tuple[Moment, ...]:
    """The moments of a microbatch: at the turn or the start of its backward, and when its captured
    tensors are gathered."""
    item, rows, draws = recipe.dtype.itemsize, data.rows, recipe.back
    inputs = rows * item * sum(_input_widths(stage).values())
    gradients = rows * item * draws * sum(b.d_out for b in stage.blocks)
    hidden = rows * item * stage.width
    # Where there is padding (or a bias column), masked copies stand beside what was captured.
    biased = sum(w for w, bias in _inputs(stage) if bias or data.padded)
    copies = draws * rows * item * biased + (gradients if data.padded else 0)
    captured = {
        "captured inputs": inputs,
        "captured gradients": gradients,
        "copies without padding": copies,
        "hidden states": hidden * (2 + 2 * draws),
    }
    backward = {"hidden states": hidden * (2 + draws)} | _layer(stage, recipe, data)
    return (
        Moment("turn", held, backward | _head(stage, recipe, data, True), graphs=True),
        Moment("gathering", held, captured | gathering, open_below=1, graphs=True),
    )


def _inputs(stage: StageShape) -> Iterator[tuple[int, bool]]:
    seen = set()
    for block in stage.blocks:
        if block.input_factor not in seen:
            seen.add(block.input_factor)
            yield block.d_in, block.bias


def _input_widths(stage: StageShape) -> dict[str, int]:
    """Input factor -> its columns as the model computes them, without the bias."""
    return {b.input_factor: b.d_in - b.bias for b in reversed(stage.blocks)}


def _layer(stage: StageShape, recipe: Recipe, data: DataShape) -> Bytes:
    """What nothing keeps of a layer: the gradient of a product, and of its two parts."""
    widest = max((max(b.d_in, b.d_out) for b in stage.blocks), default=0)
    return {"intermediate results": 3 * data.rows * widest * recipe.dtype.itemsize}


def _head(stage: StageShape, recipe: Recipe, data: DataShape, backward: bool) -> Bytes:
    """Logits of a slice of positions, their softmax, and the gradients of both."""
    if not stage.vocabulary:
        return {}
    slices = max(1, recipe.logits_chunk // (data.batch_examples * stage.vocabulary))
    numbers = data.batch_examples * min(slices, data.batch_positions) * stage.vocabulary
    item, work = recipe.dtype.itemsize, recipe.computed
    cast = work if item < 4 else 0
    each = item + cast + work + (2 * work if backward else 0)
    return {"logits and their gradients": numbers * each}


def _turned(stage: StageShape, recipe: Recipe, data: DataShape) -> Iterator[tuple[Block, bool]]:
    """The blocks, and whether their rows are turned before the outer product."""
    sharing: dict[str, int] = {}
    for block in stage.blocks:
        sharing[block.input_factor] = sharing.get(block.input_factor, 0) + 1
    factors = stage.factors(recipe.max_factor_dim)
    for block in stage.blocks:
        yield (
            block,
            not recipe.has_factors
            or rotate_before(
                data.batch_positions,
                block.d_in,
                block.d_out,
                max(factors[block.input_factor]),
                max(factors[block.output_factor]),
                sharing[block.input_factor],
            ),
        )


def _gradients(
    stage: StageShape, recipe: Recipe, data: DataShape, copies: int, pieces: bool
) -> Bytes:
    """Per-example gradients of a block in the eigenbasis, a few examples at a time.

    Args:
        copies: how many tensors of their size are alive at once.
        pieces: whether some of their rows at a time will do, where rows are turned first.
    """
    item, rows = recipe.computed, data.rows
    factors = stage.factors(recipe.max_factor_dim)
    inputs: dict[str, int] = {}
    largest = 0
    for block, turned in _turned(stage, recipe, data):
        size = block.d_in * block.d_out
        here = item * rows * _cast(recipe, block.d_in + block.d_out)
        cast = 0
        if recipe.has_factors and recipe.store_dtype.itemsize != item:
            # A basis that is stored in another dtype is cast for each product.
            widest = (*factors[block.input_factor], *factors[block.output_factor])
            cast = item * max(widest) ** 2
        if turned and recipe.has_factors:
            inputs[block.input_factor] = item * rows * block.d_in
            here += item * rows * block.d_out
        if turned and pieces:
            wide = block.d_in * min(block.d_out, max(1, PIECE // block.d_in))
            examples = min(data.batch_examples, max(1, PIECE // size))
            here += max(cast, item * wide * (examples * copies + 1))
        else:
            examples = min(data.batch_examples, max(1, CHUNK // size))
            # Turned on one side; laid out anew; turned on the other.
            alive = copies if turned else max(copies, 3)
            here += item * size * (examples * alive + 1) + cast
        largest = max(largest, here)
    return {"turned inputs": sum(inputs.values()), "gradients of some examples": largest}
