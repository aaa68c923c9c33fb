"""Which weights of a block stay: ``keep``, bool ``[O, I]``.

The bias column stays, except where a whole output goes. What went in an earlier step stays away,
and counts towards the share that is to be gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

import torch
from torch import Tensor

from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.pruning.selection import smallest
from raycurv.mathematics.pruning.structures import inputs_of


def all_kept(block: Block, device: torch.device | None = None) -> Tensor:
    """The mask before anything goes."""
    return torch.ones(block.d_out, block.d_in, dtype=torch.bool, device=device)


def kept_of(block: Block, w_OI: Tensor) -> Tensor:
    """The mask before anything goes of a matrix whose zeros count as gone.

    A bias of zero stays, unless its output is zero throughout: that went as a whole.
    """
    keep = w_OI != 0
    if block.bias:
        keep[:, -1] = keep.any(dim=1)
    return keep


def count_gone(sparsity: float, total: int) -> int:
    """``⌊sparsity · total⌋`` in decimals: 0.29 of 100 are 29, not 28.

    Raises:
        UserError: not from 0 to 1.
    """
    if not 0 <= sparsity <= 1:
        raise UserError("--sparsity", "a share from 0 to 1", f"{sparsity:g}", "0.5 removes a half.")
    return int(Decimal(repr(float(sparsity))) * total)


def candidates(block: Block, keep_OI: Tensor) -> Tensor:
    """Weights that may go, bool ``[O, I]``: those still there, but for the bias."""
    found = keep_OI.clone()
    found[:, inputs_of(block) :] = False
    return found


def single_weights(block: Block, saliency_OI: Tensor, sparsity: float, keep_OI: Tensor) -> Tensor:
    """``keep`` once the weights of least saliency are gone, the first of equal ones first.

    Exactly ``⌊sparsity · O · I⌋`` weights (bias left out) are gone then, or those that were gone
    already where they are more.

    Args:
        block: whose matrix it is.
        saliency_OI: float32.
        sparsity: the share to be gone.
        keep_OI: what is still there (:func:`all_kept` at first).

    Raises:
        UserError: the sparsity is no share.
        NumericalError: a saliency is NaN.
    """
    may_go = candidates(block, keep_OI)
    total = block.d_out * inputs_of(block)
    more = count_gone(sparsity, total) - (total - int(may_go.sum()))
    return keep_OI & ~smallest(saliency_OI, may_go, max(0, more))


def sets_kept(saliency: Tensor, sparsity: float, keep: Tensor) -> Tensor:
    """The same for whole sets: bool, one a set, ``⌊sparsity · sets⌋`` of them gone.

    Args:
        saliency: float32, one a set.
        sparsity: the share of the sets to be gone.
        keep: sets that are still there.

    Raises:
        UserError: the sparsity is no share.
        NumericalError: a saliency is NaN.
    """
    more = count_gone(sparsity, len(keep)) - int((~keep).sum())
    return keep & ~smallest(saliency, keep, max(0, more))


def rows_mask(block: Block, keep_O: Tensor) -> Tensor:
    """``keep`` where whole outputs go, their bias with them."""
    return keep_O[:, None].repeat(1, block.d_in)


def columns_mask(block: Block, columns: Sequence[range], keep: Tensor) -> Tensor:
    """``keep`` where whole runs of columns go; the bias stays.

    Args:
        block: whose matrix it is.
        columns: the runs.
        keep: bool, one a run.
    """
    mask = all_kept(block, keep.device)
    for run, stays in zip(columns, keep.tolist(), strict=True):
        mask[:, run.start : run.stop] = stays
    return mask
