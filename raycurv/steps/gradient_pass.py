"""Gradient statistics as a pass of their own, or beside another pass from the same gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raycurv.files.artifacts import write_gradient
from raycurv.files.store import Store
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Captured
from raycurv.mathematics.gradient_statistics import GradientSum, GradientSums
from raycurv.mathematics.loss.differentiation import Target
from raycurv.stages.stage import Gatherer, Pass

# No module's name, and so no factor's or block's, holds a slash.
_BESIDE = "beside/"


@dataclass(frozen=True)
class GradientPass:
    """Gradient statistics into ``gradients/``, of the data's own labels and of drawn ones.

    Attributes:
        store: of the run.
        only: the blocks to gather; squared gradient norms are of all blocks regardless.
        target: ``both`` or ``labels``.
        dtype: of the written means.
    """

    store: Store
    only: frozenset[str]
    target: Target
    draws: int
    dtype: torch.dtype
    name: str = "gradients"

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> GradientSums:
        drawn = self.draws if self.target == "both" else 0
        return GradientSums(blocks, drawn, dtype, device, self.only)

    def write(self, name: str, result: GradientSum, blocks: Mapping[str, Block]) -> None:
        write_gradient(self.store, result, self.dtype)


@dataclass(frozen=True)
class JointPass:
    """A pass that also gathers gradient statistics, from the same gradients.

    Attributes:
        work: the pass, of the same target and draws.
        gradients: what is gathered beside it.
    """

    work: Pass
    gradients: GradientPass

    @property
    def name(self) -> str:
        return self.work.name

    @property
    def target(self) -> Target:
        return self.work.target

    @property
    def draws(self) -> int:
        return self.work.draws

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> JointGatherer:
        return JointGatherer(
            self.work.open(blocks, dtype, device), self.gradients.open(blocks, dtype, device)
        )

    def write(self, name: str, result: Any, blocks: Mapping[str, Block]) -> None:
        beside = _beside(name)
        if beside is None:
            self.work.write(name, result, blocks)
        else:
            self.gradients.write(beside, result, blocks)


class JointGatherer:
    """Two gatherers of the same gradients.

    Names of the second have a prefix that no name of the first has, so that a commit of both is one
    of the first, too.
    """

    def __init__(self, first: Gatherer, second: Gatherer) -> None:
        self._first, self._second = first, second

    @property
    def names(self) -> tuple[str, ...]:
        return (*self._first.names, *(_BESIDE + name for name in self._second.names))

    def add(self, draws: Sequence[Captured], counts: bool = True) -> dict[str, Tensor]:
        return self._first.add(draws, counts) | self._second.add(draws, counts)

    def result(self, name: str) -> Any:
        beside = _beside(name)
        return self._first.result(name) if beside is None else self._second.result(beside)

    def state(self) -> dict[str, Tensor]:
        return self._first.state() | {_BESIDE + k: t for k, t in self._second.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        first, second = _apart(state)
        self._first.load(first)
        self._second.load(second)

    def join(self, state: Mapping[str, Tensor]) -> None:
        first, second = _apart(state)
        self._first.join(first)
        self._second.join(second)


def _beside(name: str) -> str | None:
    """The name without the prefix, ``None`` where it has none."""
    return name.removeprefix(_BESIDE) if name.startswith(_BESIDE) else None


def _apart(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The states of two gatherers."""
    first = {key: t for key, t in state.items() if _beside(key) is None}
    second = {key.removeprefix(_BESIDE): t for key, t in state.items() if key not in first}
    return first, second
