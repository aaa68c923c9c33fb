"""Linear layers, and HF's ``Conv1D``, which holds the same weight transposed.

y_t = W a_t + b        a row a token, wherever its axis is: [N, T, I], [N, H, T, I], [N·T, I];
                       of an image a row a place in each of its windows: [N·W, P, I]
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.kinds.kind import Kind, ModuleCall, check_examples, is_only_held


class Linear(Kind):
    """The weight ``[O, I]`` of a ``torch.nn.Linear``; a bias is its last column."""

    name = "linear"
    label = "linear layer"

    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and not is_only_held(module)

    def layout(self, block: Block, module: nn.Module) -> object:
        return "rows as they come"

    def input_rows(self, block: Block, module: nn.Module, call: ModuleCall) -> Tensor:
        """What entered as rows. Its first axis is the examples, or examples x positions flattened.

        Where there are further axes (heads, say), the rows of all positions stand together for each
        place on those: row ``e * P + p``.
        """
        check_examples(block, _split(call.x, call), call.examples, 2)
        return _rows(call.x, call)

    def output_rows(self, block: Block, module: nn.Module, call: ModuleCall, g: Tensor) -> Tensor:
        return _rows(g, call)

    def live_rows(
        self, block: Block, call: ModuleCall, mask: Tensor | None, rows: int
    ) -> Tensor | None:
        if mask is None or _position_axis(_split(call.x, call), call.positions) is None:
            return None
        return mask.repeat(1, rows // mask.shape[1])


class GroupedLinear(Linear):
    """The weight ``[O, I]`` of a ``torch.nn.Linear`` whose forward is its own, in ``n_groups``: of
    inputs ``[N, T, S, I]`` each is multiplied by its own rows of the weight."""

    name = "grouped_linear"
    label = "grouped linear layer"

    def holds(self, module: nn.Module) -> bool:
        own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
        return own and isinstance(getattr(module, "n_groups", None), int)

    def describe(self, name: str, module: nn.Module) -> tuple[Block, ...]:
        (block,) = super().describe(name, module)
        groups: Any = module.n_groups
        return (replace(block, groups=groups),)

    def layout(self, block: Block, module: nn.Module) -> object:
        return self.name, block.groups

    def input_rows(self, block: Block, module: nn.Module, call: ModuleCall) -> Tensor:
        check_examples(block, _split(call.x, call), call.examples, 4)
        x = _split(call.x, call)
        return x.reshape(call.examples, -1, *x.shape[-2:])

    def output_rows(self, block: Block, module: nn.Module, call: ModuleCall, g: Tensor) -> Tensor:
        return _split(g, call).reshape(call.examples, -1, block.d_out)

    def flops(self, module: nn.Module, x: Tensor, *more: Any) -> int:
        return super().flops(module, x, *more) // x.shape[-2]


class TransposedLinear(Linear):
    """HF's ``Conv1D``: its weight is ``[I, O]``."""

    name = "conv1d"
    label = "HF Conv1D"

    def holds(self, module: nn.Module) -> bool:
        return type(module).__name__ == "Conv1D" and hasattr(module, "nf")

    def to_rows(self, weight: Tensor) -> Tensor:
        return weight.T


def _split(values: Tensor, call: ModuleCall) -> Tensor:
    """Examples and positions as two axes, where they were flattened into one; without an axis of
    positions examples and whatever each has several of."""
    each = call.positions
    if each is None and not values.shape[0] % call.examples:
        each = values.shape[0] // call.examples
        if each == 1:
            return values
    if each is not None and values.shape[0] == call.examples * each:
        return values.reshape(call.examples, each, *values.shape[1:])
    return values


def _rows(values: Tensor, call: ModuleCall) -> Tensor:
    values, axis = _split(values, call), _position_axis(_split(call.x, call), call.positions)
    if axis is not None:
        values = values.movedim(axis, -2)
    return values.reshape(call.examples, -1, values.shape[-1])


def _position_axis(x: Tensor, positions: int | None) -> int | None:
    """The axis of the positions; of several so long the one with the widest stride.

    Hidden states are [N, T, d]: cut into heads, they keep that order in memory when transposed.
    """
    if positions is None:
        return None
    fitting = [axis for axis in range(1, x.ndim - 1) if x.shape[axis] == positions]
    return max(fitting, key=x.stride, default=None)
