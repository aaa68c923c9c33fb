"""Gradient checkpointing inside a model that is given to raycurv.

A checkpoint of torch's newer kind (``use_reentrant=False``) keeps the graph and computes
activations anew: it works as it is. The older kind hides its graph in a function of its own, from
whose modules no gradient comes to a hook of the forward: while this is entered, it calls its
function plainly, which gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch.utils.checkpoint import CheckpointFunction


class PlainCheckpoints:
    """While it is entered, reentrant checkpoints call their function plainly.

    Attributes:
        met: whether one has done so.
    """

    def __init__(self) -> None:
        self.met = False

    def __enter__(self) -> PlainCheckpoints:
        def plain(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            self.met = True
            return function(*args)

        self._before = vars(CheckpointFunction).get("apply")
        setattr(CheckpointFunction, "apply", staticmethod(plain))  # noqa: B010
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is None:
            del CheckpointFunction.apply
        else:
            setattr(CheckpointFunction, "apply", self._before)  # noqa: B010
