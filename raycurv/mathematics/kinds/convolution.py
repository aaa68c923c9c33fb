"""Convolutions over one, two or three axes (Grosse & Martens 2016, arXiv:1602.01573).

y[o, p] = Σ_i W[o, i] a_p[i]        a_p the patch of the input that output position p sees
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.kinds.kind import Kind, ModuleCall, Note, check_examples
from raycurv.mathematics.kinds.own_forward import catch_calls

_CLASSES: dict[int, type[_ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Convolution(Kind):
    """``torch.nn.Conv1d``, ``Conv2d`` or ``Conv3d``: a row an output position; groups share one
    input factor.

    Of a subclass whose forward is its own (one that pads by the image's size, say) rows are of the
    convolution that the forward does with the weight.
    """

    rows_are_tokens = False

    def __init__(self, axes: int) -> None:
        self.axes = axes
        # ``conv1d`` is HF's Conv1D, a linear layer.
        self.name = "conv2d" if axes == 2 else f"convolution{axes}d"
        self.label = f"Conv{axes}d"

    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, _CLASSES[self.axes])

    def describe(self, name: str, module: nn.Module) -> tuple[Block, ...]:
        (block,) = super().describe(name, module)
        return (replace(block, groups=Cut.of(module).groups),)

    def catch(self, module: nn.Module, blocks: Sequence[Block], note: Note) -> Callable[[], None]:
        if type(module).forward is _CLASSES[self.axes].forward:
            return super().catch(module, blocks, note)
        (block,) = blocks
        caught = [0]

        def seen(args: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
            caught[0] += 1
            x = args[0] if args else options["input"]
            return note(block.name, x, output, Cut.of_call(module, *args[2:], **options))

        def otherwise(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            """Of a weight that is changed before it is used there is the module's own input."""
            found, caught[0] = caught[0], 0
            if found or not args:
                return output
            _check_positions(block, Cut.of(module), args[0], output)
            return note(block.name, args[0], output)

        calls = catch_calls(module, block.parameter, (_FUNCTIONS[self.axes],), seen)
        hook = module.register_forward_hook(otherwise)

        def end() -> None:
            calls()
            hook.remove()

        return end

    def layout(self, block: Block, module: nn.Module) -> object:
        return Cut.of(module)

    def input_rows(self, block: Block, module: nn.Module, call: ModuleCall) -> Tensor:
        check_examples(block, call.x, call.examples, self.axes + 2)
        return (call.detail or Cut.of(module)).patches(call.x)

    def output_rows(self, block: Block, module: nn.Module, call: ModuleCall, g: Tensor) -> Tensor:
        return g.flatten(2).transpose(1, 2)

    def live_rows(
        self, block: Block, call: ModuleCall, mask: Tensor | None, rows: int
    ) -> Tensor | None:
        if mask is None or rows < mask.shape[1] or (rows > mask.shape[1] and self.axes > 1):
            return None
        # A causal convolution pads on both sides, and its module cuts off what is over.
        return F.pad(mask, (0, rows - mask.shape[1]))

    def flops(self, module: nn.Module, x: Tensor, *more: Any) -> int:
        assert isinstance(module, _ConvNd)
        return 2 * len(x) * math.prod(Cut.of(module).positions(x)) * module.weight.numel()


@dataclass(frozen=True)
class Cut:
    """How its input is cut into the patches that a convolution multiplies by its weight.

    Attributes:
        kernel, stride, dilation: along each axis.
        padding: as ``F.pad`` takes it: before and behind, of the last axis first.
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
    def of(cls, module: nn.Module) -> Cut:
        """That of torch's own forward."""
        assert isinstance(module, _ConvNd)
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
    ) -> Cut:
        """That of a call of torch's function with the module's weight, and with these arguments."""
        assert isinstance(module, _ConvNd)
        kernel = tuple(module.weight.shape[2:])
        dilation = _each(dilation, kernel)
        if padding == "same":
            spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            pads = [(span // 2, span - span // 2) for span in spans]
        else:
            pads = [(p, p) for p in _each(0 if padding == "valid" else padding, kernel)]
        ends = tuple(end for pair in reversed(pads) for end in pair)
        return cls(kernel, _each(stride, kernel), dilation, ends, "constant", groups)

    def positions(self, x: Tensor) -> tuple[int, ...]:
        """How long each axis is of what the convolution makes of ``[N, C, ...]``."""
        around = [a + b for a, b in zip(self.padding[::2], self.padding[1::2], strict=True)][::-1]
        return tuple(
            max(0, (n + p - d * (k - 1) - 1) // s + 1)
            for n, p, k, s, d in zip(
                x.shape[2:], around, self.kernel, self.stride, self.dilation, strict=True
            )
        )

    def patches(self, x: Tensor) -> Tensor:
        """The rows that the weight multiplies: ``[N, P, I]``, or ``[N, P, S, I]``."""
        if any(self.padding):
            x = F.pad(x, self.padding, mode=self.mode)
        if len(self.kernel) == 2:
            columns = F.unfold(x, self.kernel, self.dilation, 0, self.stride)
        else:
            for axis, (k, s, d) in enumerate(
                zip(self.kernel, self.stride, self.dilation, strict=True), 2
            ):
                x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
            # [N, C, positions, kernel] -> [N, C kernel, positions]
            axes = len(self.kernel)
            x = x.movedim(tuple(range(2, 2 + axes)), tuple(range(-axes, 0)))
            columns = x.flatten(-axes).flatten(1, -2)
        examples, _, positions = columns.shape
        if self.groups == 1:
            return columns.transpose(1, 2)
        return columns.view(examples, self.groups, -1, positions).permute(0, 3, 1, 2)


def _each(value: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """A number for each axis; whoever sets them on a module may have written a list."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * len(kernel) if len(numbers) == 1 else numbers


def _check_positions(block: Block, cut: Cut, x: Any, y: Any) -> None:
    """Refuse, with a UserError, a forward that cuts its input otherwise than its module says."""
    axes = len(cut.kernel) + 2
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.ndim == y.ndim == axes):
        return
    if cut.positions(x) != tuple(y.shape[2:]):
        raise UserError(
            f"block {block.name}",
            "a forward that convolves with the module's weight as it is (torch.nn.functional."
            f"conv{axes - 2}d), or one that gives {list(cut.positions(x))} positions",
            f"{list(y.shape[2:])} positions, and a weight that is changed before it is used",
            f"Leave it out: --blocks '!{block.name}'.",
        )
