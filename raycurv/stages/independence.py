"""Proof that what a network and an objective make of an example is its own: alone it is the same.

Examples go through a network in microbatches, the shorter ones padded, and who is with whom depends
on ``--batch-tokens``. A mean over padding, a choice made for all of a batch, or a norm over it make
a number that means nothing: so some examples of the first microbatch, and of the first padded one,
go through once more, one at a time and without padding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from raycurv.batch import Batch, Hidden
from raycurv.errors import UserError
from raycurv.mathematics.capture_check import chosen_examples
from raycurv.mathematics.loss.differentiation import LOSS, LossGradients

# Largest ‖together − alone‖ over ‖together‖. Sums of other shapes are rounded differently, which
# deep networks amplify; what is made of padding is a share of the whole.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2}

# Runs layers on a microbatch and what enters them; gives what leaves.
Forward = Callable[[Batch, Hidden | None], Hidden]


# The same of an objective's gradients, which are small differences of rounded numbers.
BORNE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 0.25}
# What an objective makes of hidden states.
Again = Callable[[Batch, Tensor], LossGradients]


def check_independence(
    forward: Forward, batch: Batch, entered: Hidden | None, left: Hidden, where: str
) -> None:
    """Hold what left the layers for some examples of a microbatch against what leaves for each
    alone.

    Args:
        entered, left: of the whole microbatch.
        where: names the model.

    Raises:
        UserError: they differ; names the example and by how much.
    """
    for n in chosen_examples(batch):
        part, own = _alone(batch, n)
        with torch.no_grad():
            alone = forward(part, None if entered is None else tuple(map(own, entered)))
        for one, all_ in zip(alone, left, strict=True):
            together = own(all_.detach())
            if one.shape != together.shape or all_.shape[:1] != (batch.rows,):
                continue  # not of examples, or not of their tokens
            if not all_.is_floating_point():
                continue
            relative = _difference(one, together) / max(_norm(together), 1e-300)
            if not relative <= TOLERANCE.get(all_.dtype, 5e-2):
                padded = part.inputs.shape[1:] != batch.inputs.shape[1:]
                tokens = f", without padding behind its {part.inputs.shape[1]} tokens"
                raise UserError(
                    f"{where}, example {batch.ids[n]!r}",
                    "outputs of an example that are its own, whatever is in the microbatch with it",
                    f"others by {relative:.2g} where it goes through alone{tokens * padded}",
                    "Let the forward take an attention_mask and leave padding out of what it sums "
                    "over; or give --batch-tokens 1, with which each example goes alone."
                    if padded else "Let the forward compute each example by itself; or give "
                    "--batch-tokens 1, with which each goes alone.",
                )  # fmt: skip


def check_objective(again: Again, batch: Batch, hidden: Tensor, found: LossGradients) -> None:
    """Hold what an objective made of some examples of a microbatch against what it makes of each
    alone: gradients with respect to the hidden states, and losses.

    Args:
        hidden, found: of the whole microbatch.

    Raises:
        UserError: they differ; names the example and by how much.
    """
    for n in chosen_examples(batch):
        part, own = _alone(batch, n)
        padded = part.inputs.shape[1:] != batch.inputs.shape[1:]
        if padded and hidden.shape == batch.inputs.shape:
            continue  # a number for each position, or so many of an example
        one = again(part, own(hidden))
        pairs = list(zip(one.gradients, found.gradients, strict=True))
        if LOSS in found.results:
            pairs.append((one.results[LOSS], found.results[LOSS]))
        for mine, all_ in pairs:
            largest = max(_norm(values) for values in all_)
            relative = _difference(mine, own(all_)) / max(largest, 1e-300)
            if not relative <= BORNE.get(hidden.dtype, 0.25):
                raise UserError(
                    f"the objective, example {batch.ids[n]!r}",
                    "a number of each example that is its own, whatever is in the microbatch with "
                    "it",
                    f"one that differs by {relative:.2g} where the example is alone",
                    "Sum over an example's own tokens and outputs: no mean over the microbatch, no "
                    "division by its size, no padding (batch.mask, batch.at_last); or give "
                    "--batch-tokens 1, with which each example goes alone.",
                )


def _alone(batch: Batch, n: int) -> tuple[Batch, Callable[[Tensor], Tensor]]:
    """An example of a microbatch without the padding that the others bring, and what takes its part
    of a tensor."""
    each = batch.sequences
    rows = slice(n * each, (n + 1) * each)
    length = None if batch.mask is None else int(batch.mask[rows].sum(dim=1).max())

    def own(tensor: Tensor) -> Tensor:
        if tensor.shape[:1] == (batch.size,) and each > 1:
            return tensor[n : n + 1]
        if tensor.shape[:1] != (batch.rows,):
            return tensor  # what all examples share
        tokens = batch.mask is not None and tensor.shape[:2] == batch.mask.shape
        return tensor[rows, :length] if tokens and tensor.ndim > 2 else tensor[rows]

    return batch.part([n], length), own


def _difference(one: Tensor, other: Tensor) -> float:
    """``‖one − other‖``, NaN or infinity where one of them alone is not finite; what is the same in
    both differs by 0, NaN and infinity as well, which are looked at where they are used."""
    same = (one == other) | (one.isnan() & other.isnan())
    apart = torch.where(same, 0.0, one.double() - other.double())
    return float(torch.linalg.vector_norm(apart))


def _norm(values: Tensor) -> float:
    """The norm of the numbers that are finite."""
    return float(torch.linalg.vector_norm(values.double().nan_to_num(0.0, 0.0, 0.0)))
