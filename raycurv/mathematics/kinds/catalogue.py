"""Which kinds of weights there are."""

from __future__ import annotations

from torch import nn

from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.kinds.convolution import Convolution
from raycurv.mathematics.kinds.kind import Kind
from raycurv.mathematics.kinds.linear import Linear, TransposedLinear

# A module is of the first kind that holds it.
KINDS: list[Kind] = [Linear(), TransposedLinear(), Convolution()]


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of blocks that a module holds, or ``None`` when it is of no supported kind."""
    return next((kind for kind in KINDS if kind.holds(module)), None)


def kind_of_block(block: Block) -> Kind:
    """A block's kind; UserError if there is no such kind here."""
    for kind in KINDS:
        if kind.name == block.kind:
            return kind
    raise UserError(
        f"block {block.name}",
        f"one of the kinds {', '.join(kind.name for kind in KINDS)}",
        block.kind,
        "Use the version of raycurv that fitted it.",
    )


def supported() -> str:
    """The modules that have blocks, as messages name them."""
    *most, last = [kind.label for kind in KINDS]
    return f"{', '.join(most)} or {last}"
