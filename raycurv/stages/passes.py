"""A pass: one run of all microbatches through all stages, and what is gathered on the way.

A pass says what is differentiated, and has a list of gatherers. A gatherer is a frozen description
that travels to every stage; there it opens its :class:`~raycurv.mathematics.sums.Sums`, which are
committed, loaded, joined over replicas and written under the gatherer's name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Captured
from raycurv.mathematics.exact.head import QUADRATIC, REACH, SLOPE, Matrix
from raycurv.mathematics.exact.product_sums import ProductSums
from raycurv.mathematics.loss.differentiation import RESULTS, Target
from raycurv.mathematics.sums import Combine, Results, Sums
from raycurv.stages.dealing import runs


class Gatherer(ABC):
    """What every stage gathers in a pass: a dataclass, frozen, picklable.

    Attributes:
        name: tells it from the other gatherers of a pass, without a slash.
        results: what its sums give of each example, and how stages combine it.
    """

    name: ClassVar[str]
    results: ClassVar[Mapping[str, Combine]] = {}

    @abstractmethod
    def open(self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device) -> Sums:
        """The sums of a stage with these blocks, at zero."""

    @abstractmethod
    def write(self, name: str, result: Any, blocks: Mapping[str, Block]) -> None:
        """Write what was gathered under a name, added up over replicas, to where results go."""


class Directions(ABC):
    """The vectors that a pass multiplies the curvature by: a dataclass, frozen, picklable.

    Attributes:
        count: how many there are (Q).
    """

    count: int

    @abstractmethod
    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, Tensor]:
        """The part ``[Q, O, I]`` of a stage with these blocks, by block; one that has none is zero
        there. Called again where a stage is built again, and then has to give the same."""


@dataclass(frozen=True)
class ProductGatherer(Gatherer):
    """Gathers the products of a pass; the result of a block is a
    :class:`~raycurv.mathematics.exact.product_sums.ProductSum`.

    Attributes:
        directions: how many vectors are multiplied.
        own: block -> the directions whose products are gathered of it, where these are not all of
            all blocks.
    """

    directions: int
    own: Mapping[str, range] | None = None

    name = "products"

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> ProductSums:
        return ProductSums(blocks, self.directions, dtype, device, self.own)


@dataclass(frozen=True)
class Pass:
    """One run of all microbatches through all stages. Frozen, picklable.

    Attributes:
        name: for the names of its commits.
        draws: how many sets of drawn labels, or of signs.
        gatherers: what is gathered; none for a pass whose losses, or gradients, alone are wanted,
            and one of products.
        signs: signs are drawn in place of labels.
        directions: of products.
        matrix: that they are multiplied by.
        goes_back: whether gradients go back, where something is differentiated at all.
        along: whether a pass of products finds losses, too, and their slopes along directions.
    """

    name: str
    target: Target
    draws: int = 1
    gatherers: tuple[Gatherer, ...] = ()
    signs: bool = False
    directions: Directions | None = None
    matrix: Matrix = "ggn"
    goes_back: bool = True
    along: bool = False

    @property
    def differentiates(self) -> bool:
        """Whether gradients go back through the stages."""
        return self.target != "nothing" and self.goes_back

    @property
    def results(self) -> dict[str, Combine]:
        """How stages combine everything that they find of each example."""
        found: dict[str, Combine] = {**RESULTS, **dict.fromkeys((QUADRATIC, SLOPE, REACH), "last")}
        for gatherer in self.gatherers:
            found |= gatherer.results
        return found

    def replay(self) -> Pass:
        """The same pass for microbatches whose contributions are there: only gradients go back."""
        return replace(self, name="replay", gatherers=())

    def forwards(self) -> Pass:
        """The pass that makes what enters each group of stages: forward, and nothing gathered."""
        if self.directions is None:
            return loss_pass()
        return replace(self, gatherers=(), goes_back=False)


def loss_pass(name: str = "losses") -> Pass:
    """A pass that finds losses alone: forward, and nothing gathered."""
    return Pass(name, "nothing")


# Results are written together up to so many elements of sums, in so many files.
_RUN_ELEMENTS, _RUN_FILES = 2.0**20, 64


class Gathered:
    """What one stage has gathered so far in a pass; names are ``GATHERER/NAME``."""

    def __init__(
        self, work: Pass, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._gatherers = {gatherer.name: gatherer for gatherer in work.gatherers}
        self._sums = {g.name: g.open(blocks, dtype, device) for g in work.gatherers}
        self._blocks = {block.name: block for block in blocks}

    @property
    def names(self) -> list[tuple[str, ...]]:
        """Names of everything that is gathered here, in runs that are written together."""
        sizes = {
            f"{n}/{of}": size for n, sums in self._sums.items() for of, size in sums.sizes().items()
        }
        return runs(tuple(sizes), sizes, _RUN_ELEMENTS, _RUN_FILES)

    def add(self, draws: Sequence[Captured], counts: bool) -> Results:
        """Add a microbatch, see :meth:`raycurv.mathematics.sums.Sums.add`."""
        found: Results = {}
        for sums in self._sums.values():
            found |= sums.add(draws, counts)
        return found

    def add_products(self, directions: Iterator[Captured], counts: bool) -> None:
        """Add a microbatch's products, made one direction after the other."""
        for sums in self._sums.values():
            assert isinstance(sums, ProductSums) and len(self._sums) == 1, "products go to one sum"
            sums.add(directions, counts)
        # What goes back is made with them, whoever takes them.
        for _ in directions:
            pass

    def result(self, name: str) -> Any:
        """What was gathered under a name."""
        gatherer, _, of = name.partition("/")
        return self._sums[gatherer].result(of)

    def write(self, name: str, result: Any = None) -> None:
        """Write what was gathered under a name by all replicas, or by this stage."""
        result = self.result(name) if result is None else result
        gatherer, _, of = name.partition("/")
        self._gatherers[gatherer].write(of, result, self._blocks)

    def state(self) -> dict[str, Tensor]:
        """Everything that a restart needs."""
        return {f"{n}/{k}": t for n, sums in self._sums.items() for k, t in sums.state().items()}

    def keys(self) -> frozenset[str]:
        """The keys of sums and counts that :meth:`load` and :meth:`join` read."""
        return frozenset(
            f"{n}/{key}" for n, sums in self._sums.items() for key in (*sums.sums, *sums.counts)
        )

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`, which may hold more."""
        for sums, mine in self._apart(state.items()):
            sums.load(mine)

    def join(self, state: Mapping[str, Tensor]) -> None:
        """Add what another replica gathered, given as its :meth:`state`."""
        for sums, mine in self._apart(state.items()):
            sums.join(mine)

    def _apart(
        self, state: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[Sums, dict[str, Tensor]]]:
        by_gatherer: dict[str, dict[str, Tensor]] = {name: {} for name in self._sums}
        for key, tensor in state:
            gatherer, _, rest = key.partition("/")
            if gatherer in by_gatherer:
                by_gatherer[gatherer][rest] = tensor
        return ((self._sums[name], mine) for name, mine in by_gatherer.items())
