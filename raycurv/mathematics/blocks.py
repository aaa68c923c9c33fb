"""What a block is: one weight with curvature, as a matrix ``[O, I]``."""

from __future__ import annotations

import re
from dataclasses import dataclass


def block_name(
    module: str, parameter: str = "weight", index: int | None = None, part: str = ""
) -> str:
    """A block's name: its module's where the parameter is ``weight``, else all that there is of the
    four, dotted.

    Every block's name starts with its module's, so a glob on a module takes what is in it; and a
    dotted number needs no escape in a glob, as ``[17]`` would.
    """
    if parameter == "weight" and index is None:
        return module
    further = [] if index is None else [str(index)]
    return ".".join((module, parameter, *further, *([part] if part else [])))


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
            until the first microbatch has shown which do, unless each has its own.
        module: dotted name of the module that holds the weight; the block's own when not given.
        index: which matrix of the parameter along its first axis; ``None`` for all of it.
        part: which outputs of that matrix, by a name that the kind knows (``gate`` or ``up`` of an
            expert's two, which are stored as one); empty for all of them.
        shared: dotted names of the other modules that have the same weight: the block's gradient is
            the sum of all uses.
        input_diagonal, output_diagonal: whether A (or G) is diagonal, its basis the identity: where
            inputs are one-hot, or where a full one would tell nothing, or could not be decomposed.
        one_output: what the output factor is named for where blocks share one, over all of their
            rows.
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
    part: str = ""
    input_diagonal: bool = False
    output_diagonal: bool = False
    shared: tuple[str, ...] = ()
    one_output: str = ""

    def __post_init__(self) -> None:
        if not self.module:
            object.__setattr__(self, "module", self.name)

    @property
    def owner(self) -> str:
        """Name of the module whose own parameter it is, where ``module`` only holds that one."""
        return f"{self.module}.{self.parameter}".rpartition(".")[0]

    @property
    def output_factor(self) -> str:
        """Name of the output factor; no other block shares it unless ``one_output`` says so."""
        return f"{self.one_output or self.name}.output"
