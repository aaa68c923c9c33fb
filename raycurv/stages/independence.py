"""Proof that what a network makes of an example is its own: alone it leaves the same.

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

# Largest ‖together − alone‖ over ‖together‖. Sums of other shapes are rounded differently, which
# deep networks amplify; what is made of padding is a share of the whole.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2}

# Runs layers on a microbatch and what enters them; gives what leaves.
Forward = Callable[[Batch, Hidden | None], Hidden]


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
        length = None if batch.mask is None else int(batch.mask[n].sum())

        def own(tensor: Tensor, n: int = n, length: int | None = length) -> Tensor:
            if tensor.shape[:1] != (batch.size,):
                return tensor  # what all examples share
            tokens = batch.mask is not None and tensor.shape[:2] == batch.mask.shape
            return tensor[n : n + 1, :length] if tokens and tensor.ndim > 2 else tensor[n : n + 1]

        with torch.no_grad():
            alone = forward(
                batch.part([n], length), None if entered is None else tuple(map(own, entered))
            )
        for one, all_ in zip(alone, left, strict=True):
            together = own(all_.detach())
            if one.shape != together.shape or all_.shape[:1] != (batch.size,):
                continue  # not of examples, or not of their tokens
            if not all_.is_floating_point():
                continue
            difference = torch.linalg.vector_norm((one - together).double())
            relative = float(difference / torch.linalg.vector_norm(together.double()))
            if relative > TOLERANCE.get(all_.dtype, 5e-2):
                padding = batch.mask is not None and not bool(batch.mask[n].all())
                raise UserError(
                    f"{where}, example {batch.ids[n]!r}",
                    "outputs of an example that are its own, whatever is in the microbatch with it",
                    f"others by {relative:.2g} where it goes through alone"
                    + (f", without padding behind its {length} tokens" if padding else ""),
                    "Let the forward take an attention_mask and leave padding out of what it sums "
                    "over; or give --batch-tokens 1, with which each example goes alone."
                    if padding else "Let the forward compute each example by itself; or give "
                    "--batch-tokens 1, with which each goes alone.",
                )  # fmt: skip
