"""Routers of a mixture: a score for each expert, from which the weights of the best are made.

s_t = W a_t + b        a row a token; gradients come through the weights of the experts chosen
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.kinds.kind import Note
from raycurv.mathematics.kinds.linear import Linear
from raycurv.mathematics.kinds.own_forward import catch_calls


class Router(Linear):
    """The weight ``[E, I]`` of a module that is called a router; its forward gives more than its
    product, which is caught inside."""

    name = "router"
    label = "router"

    def holds(self, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return weight is not None and weight.ndim == 2 and "router" in type(module).__name__.lower()

    def catch(self, module: nn.Module, blocks: Sequence[Block], note: Note) -> Callable[[], None]:
        (block,) = blocks

        def seen(args: tuple[Any, ...], options: dict[str, Any], output: Tensor) -> Any:
            return note(block.name, args[0] if args else options["input"], output)

        return catch_calls(module, block.parameter, (F.linear,), seen)
