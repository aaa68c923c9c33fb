"""Sets of weights that go together: N of M consecutive inputs, whole outputs, runs of columns.

The bias, where there is one, is the last column of a block's matrix ``[O, I]``: it belongs to its
output neuron and goes with it, and to nothing else here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor

from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block

# Sets of weights that a group may lose, all of which are tried: 4:8 has so many.
_MOST_SUBSETS = 70


def inputs_of(block: Block) -> int:
    """Input columns without the bias."""
    return block.d_in - block.bias


@dataclass(frozen=True)
class NofM:
    """``kept`` weights stay in each run of ``of`` consecutive inputs of every output.

    The inputs are the columns of the block's matrix (of a convolution: channel by channel, each
    with its kernel's places).

    Raises:
        UserError: nothing or everything would go, or there are too many ways to choose.
    """

    kept: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.kept < self.of or math.comb(self.of, self.kept) > _MOST_SUBSETS:
            raise UserError(
                f"pattern {self}",
                f"N:M with 0 < N < M and at most {_MOST_SUBSETS} ways to choose N of M",
                f"{self.kept} of {self.of}",
                "Take 2:4, 1:4 or 4:8.",
            )

    @classmethod
    def parse(cls, text: str) -> NofM:
        """From ``2:4``.

        Raises:
            UserError: not such a text, or as above.
        """
        found = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", text)
        if not found:
            raise UserError("pattern", "N:M", repr(text), "2:4 keeps 2 of each 4 inputs.")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"

    @cached_property
    def subsets(self) -> Tensor:
        """Every set of places of a run that may go, in lexical order, int64 ``[C, M − N]``."""
        return torch.tensor(list(combinations(range(self.of), self.of - self.kept)))

    def groups(self, block: Block) -> int:
        """Runs in a row of the block.

        Raises:
            UserError: M does not divide the block's inputs.
        """
        groups, rest = divmod(inputs_of(block), self.of)
        if rest:
            raise UserError(
                f"block {block.name}",
                f"a multiple of {self.of} inputs for the pattern {self}",
                f"{inputs_of(block)}",
                f"Take another pattern, or leave the block out: --blocks '!{block.name}'.",
            )
        return groups


def column_runs(block: Block, width: int) -> tuple[range, ...]:
    """Runs of ``width`` consecutive inputs: of an attention's output projection, its heads.

    Raises:
        UserError: the width does not divide the block's inputs.
    """
    inputs = inputs_of(block)
    if width < 1 or inputs % width:
        raise UserError(
            f"block {block.name}",
            f"heads whose width divides its {inputs} inputs",
            f"a width of {width}",
            "Give the model's width of a head, and blocks that read heads alone.",
        )
    return tuple(range(start, start + width) for start in range(0, inputs, width))


def row_sums(saliency_OI: Tensor) -> Tensor:
    """Of whole outputs with their bias, float32 ``[O]``: what their weights cost one by one."""
    return saliency_OI.sum(dim=1, dtype=torch.float64).float()


def column_sums(saliency_OI: Tensor, columns: tuple[range, ...]) -> Tensor:
    """Of runs of columns, float32 ``[len(columns)]``: what their weights cost one by one."""
    sums_I = saliency_OI.sum(dim=0, dtype=torch.float64)
    return torch.stack([sums_I[run.start : run.stop].sum() for run in columns]).float()
