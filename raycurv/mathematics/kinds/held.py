"""Layers that are never called: what holds them uses their weights in a forward of its own.

HF's state-space mixers convolve and multiply by such weights beside a scan. So the block's module
is the holder, whose forward is watched for torch's function with the weight, or a view of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.kinds.convolution import Convolution, Cut
from raycurv.mathematics.kinds.kind import Kind, Note
from raycurv.mathematics.kinds.linear import Linear
from raycurv.mathematics.kinds.own_forward import catch_calls

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class _Held(Kind):
    """A kind whose blocks are of what a module holds, and no module's own."""

    def holds(self, module: nn.Module) -> bool:
        return False

    def parameters(self, block: Block) -> tuple[str, ...]:
        child = block.parameter.removesuffix(".weight")
        return (block.parameter, f"{child}.bias") if block.bias else (block.parameter,)

    def catch(self, module: nn.Module, blocks: Sequence[Block], note: Note) -> Callable[[], None]:
        ends = [end for block in blocks for end in self._catch(module, block, note)]

        def end() -> None:
            for one in ends:
                one()

        return end

    @abstractmethod
    def _catch(self, module: nn.Module, block: Block, note: Note) -> list[Callable[[], None]]:
        """Watch for uses of one block's weight; gives what ends that."""


class HeldLinear(_Held, Linear):
    """A linear layer: ``linear(a, W)``, or ``W @ aᵀ``."""

    name = "held_linear"

    def _catch(self, module: nn.Module, block: Block, note: Note) -> list[Callable[[], None]]:
        def seen(args: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
            return note(block.name, args[0] if args else options["input"], output)

        def turned(args: tuple[Any, ...], options: dict[str, Any], output: Tensor) -> Any:
            left = note(block.name, args[1].transpose(-1, -2), output.transpose(-1, -2))
            return left.transpose(-1, -2)

        return [
            catch_calls(module, block.parameter, (F.linear,), seen),
            catch_calls(module, block.parameter, _PRODUCTS, turned, place=0),
        ]


class HeldConvolution(_Held, Convolution):
    """A convolution over one axis: ``conv1d(a, W)``."""

    def __init__(self) -> None:
        super().__init__(1)
        self.name = "held_convolution1d"

    def layout(self, block: Block, module: nn.Module) -> object:
        return super().layout(block, _child(block, module))

    def _catch(self, module: nn.Module, block: Block, note: Note) -> list[Callable[[], None]]:
        def seen(args: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
            x = args[0] if args else options["input"]
            cut = Cut.of_call(_child(block, module), *args[2:], **options)
            return note(block.name, x, output, cut)

        return [catch_calls(module, block.parameter, (F.conv1d,), seen)]


def _child(block: Block, module: nn.Module) -> nn.Module:
    return module.get_submodule(block.parameter.removesuffix(".weight"))


def describe_held(name: str, block: Block) -> Block:
    """The block of a layer ``name`` as what its holder has, given that of a layer that is called;
    that itself, if its kind is no such layer's."""
    kinds = {Linear.name: HeldLinear.name, "convolution1d": "held_convolution1d"}
    if block.kind not in kinds:
        return block
    holder, _, child = name.rpartition(".")
    return replace(
        block, kind=kinds[block.kind], module=holder, parameter=f"{child}.{block.parameter}"
    )
