"""Which kinds of weights there are."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.kinds.convolution import Convolution
from raycurv.mathematics.kinds.embedding import Embedding
from raycurv.mathematics.kinds.experts import BatchedExperts, Experts
from raycurv.mathematics.kinds.free import FreeParameter
from raycurv.mathematics.kinds.held import HeldConvolution, HeldLinear, describe_held
from raycurv.mathematics.kinds.kind import Kind, is_only_held
from raycurv.mathematics.kinds.linear import GroupedLinear, Linear, TransposedLinear
from raycurv.mathematics.kinds.router import Router

_COMMON: list[Kind] = [
    Linear(), TransposedLinear(), Convolution(2), Convolution(1), Convolution(3), Embedding(),
    *(Experts(transposed, interleaved) for transposed in (False, True)
      for interleaved in (False, True)),
    BatchedExperts(),
]  # fmt: skip
# Of modules that look like those of another kind.
_SPECIAL: list[Kind] = [Router(), GroupedLinear()]
# A module is of the first kind that holds it; what of its parameters that leaves is free.
KINDS = [*_SPECIAL, *_COMMON]
FREE = FreeParameter()
# Of what a module holds and does not call: no module is of these kinds.
HELD: list[Kind] = [HeldLinear(), HeldConvolution()]


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of weight that a module is there for; ``None`` where its parameters are free."""
    return next((kind for kind in KINDS if kind.holds(module)), None)


def describe(name: str, module: nn.Module, held: Collection[str] = ()) -> tuple[Block, ...]:
    """Blocks of all parameters that are a module's own, as far as these are parameters; ``held``
    names modules that are never called."""
    if name in held:
        return tuple(describe_held(name, block) for block in describe(name, module))
    if is_only_held(module) or "parametrizations" in name.split("."):
        return ()
    kind = kind_of(module)
    found = () if kind is None else kind.describe(name, module)
    if any(own_parameter(module, block.parameter) is None for block in found):
        return found  # computed from the parameters that there are
    taken = {key for block in found for key in kind_of_block(block).parameters(block)}
    free = (block for block in FREE.describe(name, module) if block.parameter not in taken)
    return (*found, *free)


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter of a module (or dotted, of what it holds); ``None`` for what is computed."""
    try:
        return module.get_parameter(name)
    except AttributeError:
        return None


def kind_of_block(block: Block) -> Kind:
    """A block's kind; UserError if there is no such kind here."""
    kinds = [*KINDS, FREE, *HELD]
    for kind in kinds:
        if kind.name == block.kind:
            return kind
    raise UserError(
        f"block {block.name}",
        f"one of the kinds {', '.join(kind.name for kind in kinds)}",
        block.kind,
        "Use the version of raycurv that fitted it.",
    )


def supported() -> str:
    """The modules that have blocks by default, as messages name them."""
    *most, last = dict.fromkeys(kind.label for kind in (*_COMMON, *_SPECIAL) if kind.by_default)
    return f"{', '.join(most)} or {last}"
