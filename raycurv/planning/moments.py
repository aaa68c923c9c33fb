"""Bytes of a stage at the moments of each phase at which they may be most; FLOPs of gradients.

A moment is a snapshot of the code: which tensors are alive then, by name. What is held stays from
one call of the stage to the next; what passes exists within a call, so that stages in one process
have it one after the other.

Axis letters as in :mod:`raycurv.planning.shapes`; R = N·T rows of the largest microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture_check import EXAMPLES, POSITIONS
from raycurv.mathematics.gradients import CHUNK, PIECE, rotate_before
from raycurv.mathematics.sums import FOLD_EVERY
from raycurv.planning.shapes import DataShape, Recipe, StageShape, factor_elements

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
    return (Moment("loading", weights_of(stage), {"a weight as stored": 2 * stage.largest_weight}),)


def forward_only(
    stage: StageShape, recipe: Recipe, data: DataShape, to_end: bool
) -> tuple[Moment, ...]:
    """A pass without a backward: the hooks still hold what enters each block until its end.

    Args:
        to_end: whether it goes on to the loss.
    """
    item = recipe.dtype.itemsize
    passing = {
        "captured inputs": math.ceil(data.rows * item * _entering(stage)),
        "hidden states": 3 * data.rows * item * stage.width,
    }
    passing |= _layer(stage, recipe, data)
    if to_end:
        passing |= _head(stage, recipe, data, False)
    return (Moment("forward", weights_of(stage), passing),)


def sum_bytes(recipe: Recipe, additions: int) -> int:
    """Bytes of an element of a running sum: the float64 master comes with the first fold."""
    if recipe.dtype == torch.float64:
        return 8
    return 12 if additions > FOLD_EVERY else 4


def larger(one: Bytes, other: Bytes) -> Bytes:
    """What takes more of two that take turns."""
    return max(one, other, key=lambda parts: sum(parts.values()))


def weights_of(stage: StageShape) -> Bytes:
    return {"weights": stage.weights}


def bases_of(stage: StageShape, recipe: Recipe) -> Bytes:
    if not recipe.kind.factors:
        return {}
    return {"eigenbases": recipe.store_dtype.itemsize * factor_elements((stage,), recipe)}


def cast_elements(recipe: Recipe, elements: int) -> int:
    """What is copied to compute in float32."""
    return elements if recipe.dtype.itemsize < 4 else 0


def running(
    stage: StageShape, recipe: Recipe, data: DataShape, held: Bytes, gathering: Bytes
) -> tuple[Moment, ...]:
    """The moments of a microbatch: when captured gradients are held against autograd's, before the
    first of them; at the turn or the start of its backward; and when its captured tensors are
    gathered."""
    item, rows, draws = recipe.dtype.itemsize, data.rows, recipe.back
    inputs = math.ceil(rows * item * _entering(stage))
    gradients = rows * item * draws * sum(b.d_out * stage.rows_of(b) for b in stage.blocks)
    hidden = rows * item * stage.width
    # Where there is padding (or a bias column), masked copies stand beside what was captured; rows
    # of blocks that do not see every position are always laid out anew.
    padded = [b for b in stage.blocks if data.padded or stage.share(b) < 1]
    biased = sum(
        stage.columns(data, b) * stage.rows_of(b)
        for b in _inputs(stage)
        if b.bias or b.input_diagonal or b in padded
    )
    apart = sum(b.d_out * stage.rows_of(b) for b in padded)
    copies = math.ceil(draws * rows * item * (biased + apart))
    captured = {
        "captured inputs": inputs,
        "captured gradients": math.ceil(gradients),
        "copies without padding": copies,
        "hidden states": hidden * (2 + 2 * draws),
    }
    backward = {"hidden states": hidden * (2 + draws)} | _layer(stage, recipe, data)
    return (
        # In a stage that nothing is open in.
        Moment("capture check", held, _check(stage, recipe, data), data.microbatches, graphs=True),
        Moment("turn", held, backward | _head(stage, recipe, data, True), graphs=True),
        Moment("gathering", held, captured | gathering, open_below=1, graphs=True),
    )


def _check(stage: StageShape, recipe: Recipe, data: DataShape) -> Bytes:
    """The graph of a few examples, what was captured of them, and the gradient of a weight with
    what it is held against."""
    item, examples = recipe.dtype.itemsize, min(EXAMPLES, data.batch_examples)
    positions = min(POSITIONS, data.batch_positions) if stage.any_length else data.batch_positions
    rows = examples * positions
    widths = sum((b.d_in + 1) * stage.rows_of(b) for b in _inputs(stage) if b.bias)
    widths += sum(b.d_out * stage.rows_of(b) for b in stage.blocks)
    return {
        "activations of some examples": stage.graph * rows // data.rows,
        "captured of some examples": math.ceil(rows * item * widths),
        "gradient of a weight": item * stage.largest_block + 12 * PIECE,
    }


def _inputs(stage: StageShape) -> list[Block]:
    """The first block that reads each input factor."""
    return list({block.input_factor: block for block in reversed(stage.blocks)}.values())


def _entering(stage: StageShape) -> float:
    """Numbers of all inputs for each position, as the model computes them, without a bias; of
    one-hot rows the token alone."""
    widths = {b.name: 1 if b.input_diagonal else b.d_in - b.bias for b in _inputs(stage)}
    return sum(widths[b.name] * stage.rows_of(b) for b in _inputs(stage))


def _layer(stage: StageShape, recipe: Recipe, data: DataShape) -> Bytes:
    """What nothing keeps of a layer: the gradient of a product, and of its two parts."""
    # What is diagonal on the input side is looked up, or multiplied number by number.
    products = [b for b in stage.blocks if not b.input_diagonal]
    widest = max((max(b.d_in, b.d_out) for b in products), default=stage.width)
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


def turned_blocks(
    stage: StageShape, recipe: Recipe, data: DataShape
) -> Iterator[tuple[Block, bool]]:
    """The blocks, and whether their rows are turned before the outer product."""
    sharing, factors = stage.sharing, stage.factors(recipe.max_factor_dim)
    for block in stage.blocks:
        yield (
            block,
            not recipe.kind.factors
            or rotate_before(
                stage.active(data, block).batch_positions,
                stage.columns(data, block),
                block.d_out,
                max(factors[block.input_factor]),
                max(factors[block.output_factor]),
                sharing[block.input_factor],
            ),
        )


def gradients_of(
    stage: StageShape, recipe: Recipe, data: DataShape, copies: int, pieces: bool
) -> Bytes:
    """Per-example gradients of a block in the eigenbasis, a few examples at a time.

    Args:
        copies: how many tensors of their size are alive at once.
        pieces: whether some of their rows at a time will do, where rows are turned first.
    """
    item = recipe.computed
    factors = stage.factors(recipe.max_factor_dim)
    inputs: dict[str, int] = {}
    largest = 0
    for block, turned in turned_blocks(stage, recipe, data):
        rows, d_in = stage.active(data, block).rows, stage.columns(data, block)
        size = d_in * block.d_out
        here = item * rows * cast_elements(recipe, d_in + block.d_out)
        cast = 0
        if recipe.kind.factors and recipe.store_dtype.itemsize != item:
            # A basis that is stored in another dtype is cast for each product.
            widest = (*factors[block.input_factor], *factors[block.output_factor])
            cast = item * max(widest) ** 2
        if turned and recipe.kind.factors:
            inputs[block.input_factor] = item * rows * d_in * stage.count(block)
            here += item * rows * block.d_out
        if turned and pieces:
            wide = d_in * min(block.d_out, max(1, PIECE // d_in))
            examples = min(data.batch_examples, max(1, PIECE // size))
            here += max(cast, item * wide * (examples * copies + 1))
        else:
            examples = min(data.batch_examples, max(1, CHUNK // size))
            # Turned on one side; laid out anew; turned on the other.
            alive = copies if turned else max(copies, 3)
            here += item * size * (examples * alive + 1) + cast
        largest = max(largest, here)
    return {"turned inputs": sum(inputs.values()), "gradients of some examples": largest}


def gradient_flops(stage: StageShape, recipe: Recipe, data: DataShape) -> float:
    """FLOPs of per-example gradients of all data in the eigenbasis."""
    sharing, factors = stage.sharing, stage.factors(recipe.max_factor_dim)
    total = 0.0
    for b in stage.blocks:
        length, d_in = stage.active(data, b).row_length, stage.columns(data, b)
        one = 2.0 * length * d_in * b.d_out
        if not recipe.kind.factors:
            total += one * stage.count(b)
            continue
        # Tiles are as equal as they can be: d t is what a rotation of one row takes.
        t_in, t_out = max(factors[b.input_factor]), max(factors[b.output_factor])
        shared = sharing[b.input_factor]
        if rotate_before(length, d_in, b.d_out, t_in, t_out, shared):
            one += 2.0 * length * (d_in * t_in / shared + b.d_out * t_out)
        else:
            one += 2.0 * d_in * b.d_out * (t_in + t_out)
        total += one * stage.count(b)
    return total * data.examples * recipe.draws
