"""A block's weight as one matrix ``[O, I]``, the bias its last column, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raycurv.mathematics.blocks import CONV1D, Block


def to_matrix(block: Block, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The weight and the bias of a module as the block's matrix ``[O, I]``.

    Args:
        weight: as the module has it: ``[O, I]`` of a linear layer, ``[I, O]`` of HF's ``Conv1D``,
            ``[O, I / groups, H, W]`` of a convolution.
        bias: ``[O]``, if the block has one.

    Returns:
        The matrix, of the wider of both dtypes; a view of the weight where there is no bias.
    """
    rows = weight.T if block.kind == CONV1D else weight.flatten(1)
    if bias is None:
        return rows
    wider = torch.promote_types(weight.dtype, bias.dtype)
    return torch.cat([rows.to(wider), bias[:, None].to(wider)], dim=1)


def from_matrix(
    block: Block, matrix_OI: Tensor, shape: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """The reverse of :func:`to_matrix`: the weight in the module's shape, and the bias ``[O]``."""
    rows = matrix_OI[:, : block.d_in - block.bias]
    weight = rows.T if block.kind == CONV1D else rows
    bias = matrix_OI[:, -1].contiguous() if block.bias else None
    return weight.reshape(*shape).contiguous(), bias
