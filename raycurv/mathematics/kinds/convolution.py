"""Convolutions over images (Grosse & Martens 2016, arXiv:1602.01573).

y[o, p] = Σ_i W[o, i] a_p[i]        a_p the patch of the input that output position p sees
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.kinds.kind import Kind, ModuleCall, check_examples


class Convolution(Kind):
    """``torch.nn.Conv2d``: a row an output position; groups share one input factor."""

    name = "conv2d"
    label = "Conv2d"
    rows_are_tokens = False

    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d)

    def describe(self, name: str, module: nn.Module) -> tuple[Block, ...]:
        assert isinstance(module, nn.Conv2d)
        (block,) = super().describe(name, module)
        return (replace(block, groups=module.groups),)

    def layout(self, block: Block, module: nn.Module) -> object:
        assert isinstance(module, nn.Conv2d)
        return (
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.padding_mode,
        )

    def input_rows(self, block: Block, module: nn.Module, call: ModuleCall) -> Tensor:
        assert isinstance(module, nn.Conv2d)
        check_examples(block, call.x, call.examples, 4)
        return _patches(module, call.x)

    def output_rows(self, block: Block, module: nn.Module, call: ModuleCall, g: Tensor) -> Tensor:
        return g.flatten(2).transpose(1, 2)

    def live_rows(self, call: ModuleCall, mask: Tensor | None, rows: int) -> Tensor | None:
        return mask if mask is not None and rows == mask.shape[1] else None

    def flops(self, module: nn.Module, x: Tensor) -> int:
        assert isinstance(module, nn.Conv2d)
        return 2 * _patches(module, x).numel() * module.out_channels // module.groups


def _patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The rows that a convolution multiplies by its weight: ``[N, P, I]``, or ``[N, P, S, I]``."""
    padding: tuple[int, int] = (0, 0)
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    elif isinstance(module.padding, str):
        x = F.pad(x, module._reversed_padding_repeated_twice)
    else:
        padding = (int(module.padding[0]), int(module.padding[1]))
    columns = F.unfold(
        x,
        kernel_size=(module.kernel_size[0], module.kernel_size[1]),
        dilation=(module.dilation[0], module.dilation[1]),
        padding=padding,
        stride=(module.stride[0], module.stride[1]),
    )
    examples, _, positions = columns.shape
    if module.groups == 1:
        return columns.transpose(1, 2)
    return columns.view(examples, module.groups, -1, positions).permute(0, 3, 1, 2)
