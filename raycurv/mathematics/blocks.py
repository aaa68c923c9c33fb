"""What a block is: one weight with curvature, as a matrix ``[O, I]``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor


def block_name(module: str, parameter: str = "weight", index: int | None = None) -> str:
    """A block's name: its module's where the parameter is ``weight``, else all three, dotted.

    Every block's name starts with its module's, so a glob on a module takes what is in it; and a
    dotted number needs no escape in a glob, as ``[17]`` would.
    """
    if parameter == "weight" and index is None:
        return module
    return ".".join((module, parameter, *([] if index is None else [str(index)])))


def role(name: str) -> str:
    """A dotted name with ``*`` for its numbers, which weights of other layers share."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


@dataclass(frozen=True)
class Block:
    """One weight, whose matrix is ``[O, I]`` (``I`` one column wider when there is a bias).

    Attributes:
        name: unique, see :func:`block_name`.
        kind: name of its kind, see :mod:`raycurv.mathematics.kinds.catalogue`.
        d_in: width of the input factor, bias column included.
        bias: whether the last input column is the bias.
        groups: of a grouped convolution; ``d_in`` is one group's width.
        input_factor: name of the input factor; blocks that read the same tensor share it. Empty
            until the first microbatch has shown which do.
        module: dotted name of the module that holds the weight; the block's own when not given.
        index: which part of the parameter along its first axis; ``None`` for all of it.
    """

    name: str
    kind: str
    d_in: int
    d_out: int
    bias: bool
    groups: int = 1
    input_factor: str = ""
    module: str = ""
    parameter: str = "weight"
    index: int | None = None

    def __post_init__(self) -> None:
        if not self.module:
            object.__setattr__(self, "module", self.name)

    @property
    def output_factor(self) -> str:
        """Name of the output factor, which no other block shares."""
        return f"{self.name}.output"

    def part(self, parameter: Tensor) -> Tensor:
        """What of a parameter (or of its bias) is this block's, as a view."""
        return parameter if self.index is None else parameter[self.index]
