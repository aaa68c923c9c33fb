"""Convolutions over images (Grosse & Martens 2016, arXiv:1602.01573).

y[o, p] = Σ_i W[o, i] a_p[i]        a_p the patch of the input that output position p sees
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.kinds.kind import Kind, ModuleCall, Note, check_examples
from raycurv.mathematics.kinds.own_forward import catch_calls


class Convolution(Kind):
    """``torch.nn.Conv2d``: a row an output position; groups share one input factor.

    Of a subclass whose forward is its own (one that pads by the image's size, say) rows are of the
    convolution that the forward does with the weight.
    """

    name = "conv2d"
    label = "Conv2d"
    rows_are_tokens = False

    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d)

    def describe(self, name: str, module: nn.Module) -> tuple[Block, ...]:
        assert isinstance(module, nn.Conv2d)
        (block,) = super().describe(name, module)
        return (replace(block, groups=module.groups),)

    def catch(self, module: nn.Module, blocks: Sequence[Block], note: Note) -> Callable[[], None]:
        if type(module).forward is nn.Conv2d.forward:
            return super().catch(module, blocks, note)
        (block,) = blocks
        caught = [0]

        def seen(args: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
            caught[0] += 1
            x = args[0] if args else options["input"]
            return note(block.name, x, output, _Cut.of_call(module, *args[2:], **options))

        def otherwise(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            """Of a weight that is changed before it is used there is the module's own input."""
            found, caught[0] = caught[0], 0
            if found or not args:
                return output
            _check_positions(block, _Cut.of(module), args[0], output)
            return note(block.name, args[0], output)

        calls = catch_calls(module, block.parameter, (F.conv2d,), seen)
        hook = module.register_forward_hook(otherwise)

        def end() -> None:
            calls()
            hook.remove()

        return end

    def layout(self, block: Block, module: nn.Module) -> object:
        return _Cut.of(module)

    def input_rows(self, block: Block, module: nn.Module, call: ModuleCall) -> Tensor:
        check_examples(block, call.x, call.examples, 4)
        return (call.detail or _Cut.of(module)).patches(call.x)

    def output_rows(self, block: Block, module: nn.Module, call: ModuleCall, g: Tensor) -> Tensor:
        return g.flatten(2).transpose(1, 2)

    def live_rows(
        self, block: Block, call: ModuleCall, mask: Tensor | None, rows: int
    ) -> Tensor | None:
        return mask if mask is not None and rows == mask.shape[1] else None

    def flops(self, module: nn.Module, x: Tensor, *more: Any) -> int:
        assert isinstance(module, nn.Conv2d)
        return 2 * len(x) * math.prod(_Cut.of(module).positions(x)) * module.weight.numel()


@dataclass(frozen=True)
class _Cut:
    """How images are cut into the patches that a convolution multiplies by its weight.

    Attributes:
        kernel, stride, dilation: along height and width.
        padding: as ``F.pad`` takes it: left, right, above, below.
        mode: of the padding.
        groups: of channels.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    mode: str
    groups: int

    @classmethod
    def of(cls, module: nn.Module) -> _Cut:
        """That of torch's own forward."""
        assert isinstance(module, nn.Conv2d)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        own = cls.of_call(
            module, None, module.stride, module.padding, module.dilation, module.groups
        )
        return replace(own, mode=mode)

    @classmethod
    def of_call(
        cls,
        module: nn.Module,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        **rest: Any,
    ) -> _Cut:
        """That of a call of ``F.conv2d`` with the module's weight, and with these arguments."""
        assert isinstance(module, nn.Conv2d)
        kernel, dilation = tuple(module.weight.shape[2:]), _both(dilation)
        if padding == "same":
            spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            pads = [(span // 2, span - span // 2) for span in spans]
        else:
            pads = [(p, p) for p in _both(0 if padding == "valid" else padding)]
        ends = tuple(end for pair in reversed(pads) for end in pair)
        return cls(kernel, _both(stride), dilation, ends, "constant", groups)

    def positions(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of what the convolution makes of images ``[N, C, h, w]``."""
        left, right, above, below = self.padding
        padded = (x.shape[-2] + above + below, x.shape[-1] + left + right)
        high, wide = (
            max(0, (n - d * (k - 1) - 1) // s + 1)
            for n, k, s, d in zip(padded, self.kernel, self.stride, self.dilation, strict=True)
        )
        return high, wide

    def patches(self, x: Tensor) -> Tensor:
        """The rows that the weight multiplies: ``[N, P, I]``, or ``[N, P, S, I]``."""
        if any(self.padding):
            x = F.pad(x, self.padding, mode=self.mode)
        columns = F.unfold(x, self.kernel, self.dilation, 0, self.stride)
        examples, _, positions = columns.shape
        if self.groups == 1:
            return columns.transpose(1, 2)
        return columns.view(examples, self.groups, -1, positions).permute(0, 3, 1, 2)


def _both(value: Any) -> tuple[int, ...]:
    """A number for height and width; whoever sets them on a module may have written a list."""
    pair = (value,) if isinstance(value, int) else tuple(value)
    return pair * 2 if len(pair) == 1 else pair


def _check_positions(block: Block, cut: _Cut, x: Any, y: Any) -> None:
    """Refuse, with a UserError, a forward that cuts images otherwise than its module says."""
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.ndim == y.ndim == 4):
        return
    if cut.positions(x) != tuple(y.shape[2:]):
        raise UserError(
            f"block {block.name}",
            "a forward that convolves with the module's weight as it is (torch.nn.functional."
            f"conv2d), or one that gives {list(cut.positions(x))} positions",
            f"{list(y.shape[2:])} positions, and a weight that is changed before it is used",
            f"Leave it out: --blocks '!{block.name}'.",
        )
