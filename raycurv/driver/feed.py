"""What goes through the resident stages: microbatches, and what lies before and behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from raycurv.batch import Batch, Hidden
from raycurv.data.microbatch import Microbatches
from raycurv.mathematics.sums import Results


@dataclass(frozen=True)
class Feed:
    """The microbatches of a pass.

    Attributes:
        plan: example numbers of each.
        read: packs one.
        lengths: tokens of every example, for the rate shown.
    """

    plan: Microbatches
    read: Callable[[int, Sequence[int]], Batch]
    lengths: np.ndarray[Any, Any]

    def tokens(self, microbatch: int) -> int:
        """Tokens of a microbatch, without padding."""
        return int(self.lengths[self.plan.members(microbatch)].sum(dtype=np.int64))


@dataclass(frozen=True)
class Given:
    """What enters the resident stages with a microbatch.

    Attributes:
        hidden: for the first of them; ``None`` if it embeds the inputs.
        gradients: for the last of them, ``[draws, ...]`` each; ``None`` if it starts from the loss.
        carried: what the stages behind them found.
    """

    microbatch: int
    hidden: Hidden | None = None
    gradients: Hidden | None = None
    carried: Mapping[str, Tensor] = field(default_factory=dict)


class Ends:
    """What lies before and behind the resident stages. Here these are all: nothing enters but the
    inputs, nothing leaves but results.

    Attributes:
        keeps: whether the tensors that leave are wanted.
    """

    keeps = False

    def load(self, microbatch: int) -> Given:
        """What enters; LostSpool if that has to be made again."""
        return Given(microbatch)

    def leave(self, microbatch: int, leaving: Hidden | None, results: Results) -> None:
        """Take what leaves: hidden states, or gradients; and all that was found so far."""
