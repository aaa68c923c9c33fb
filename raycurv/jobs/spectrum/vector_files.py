"""Vectors of the curvature's space, block by block, wherever they come from.

    work/NAME/BLOCK.safetensors     vectors [Q, O, I], in the dtype of sums

A vector is a description that travels to whoever needs a block's part of it, and is read there: a
stage that multiplies by it, or a task that takes dot products of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from raycurv.driver.multiplier import Multiplier
from raycurv.driver.workers import Workers, in_order
from raycurv.files.store import Store
from raycurv.files.tensorfile import is_complete, open_tensors, write_tensors
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.exact.grams import combined
from raycurv.mathematics.exact.head import Matrix
from raycurv.mathematics.exact.probes import signs
from raycurv.mathematics.exact.product_sums import ProductSum
from raycurv.mathematics.sums import Results, working_dtype
from raycurv.models.model import Model
from raycurv.models.pieces import Place
from raycurv.stages.dealing import runs
from raycurv.stages.passes import Directions, Pass, ProductGatherer
from raycurv.stages.pool import Need

T = TypeVar("T")

# Blocks that a task takes together: up to so many numbers of a vector, and so many blocks.
_TASK_NUMBERS, _TASK_BLOCKS = 2.0**20, 64


class Vectors(ABC):
    """Some vectors: a dataclass, frozen, picklable.

    Attributes:
        count: how many (Q).
    """

    count: int

    @abstractmethod
    def read(self, block: Block, dtype: torch.dtype) -> Tensor:
        """Their parts in a block, ``[Q, O, I]``."""

    def some(self, numbers: range) -> Vectors:
        """Those with consecutive numbers among them."""
        chosen = torch.eye(self.count, dtype=torch.float64)[:, numbers.start : numbers.stop]
        return Sum(((self, chosen),))


@dataclass(frozen=True)
class Probes(Vectors):
    """Random signs, by a counter.

    Attributes:
        seed: of the job.
        numbers: which probes.
    """

    seed: int
    numbers: range

    @property
    def count(self) -> int:  # type: ignore[override]
        return len(self.numbers)

    def some(self, numbers: range) -> Vectors:
        return Probes(self.seed, self.numbers[numbers.start : numbers.stop])

    def read(self, block: Block, dtype: torch.dtype) -> Tensor:
        return signs(self.seed, block, self.numbers, dtype)


@dataclass(frozen=True)
class Stored(Vectors):
    """Vectors in files.

    Attributes:
        store: whose.
        place: a directory of it.
    """

    store: Store
    place: str
    count: int

    def file(self, block: str) -> str:
        """Where a block's parts lie."""
        return f"{self.place}/{block}.safetensors"

    def read(self, block: Block, dtype: torch.dtype) -> Tensor:
        return open_tensors(self.store, self.file(block.name)).read("vectors").to(dtype)

    def write(self, block: str, vectors: Tensor) -> None:
        """Write a block's parts ``[Q, O, I]``; NumericalError for what is not finite."""
        notes = {"block": block}
        write_tensors(self.store, self.file(block), {"vectors": vectors.contiguous()}, notes)

    def there(self, blocks: Sequence[Block]) -> bool:
        """Whether the files of all these blocks' parts are there, and whole."""
        return all(is_complete(self.store, self.file(block.name)) for block in blocks)

    def delete(self) -> None:
        """Delete the vectors' files, of all blocks."""
        self.store.delete_directory(self.place)


@dataclass(frozen=True)
class Sum(Vectors):
    """Combinations of vectors: of each part its own, added up.

    Attributes:
        terms: vectors ``[V]`` and their coefficients ``[V, Q]``.
    """

    terms: tuple[tuple[Vectors, Tensor], ...]

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.terms[0][1].shape[1]

    def read(self, block: Block, dtype: torch.dtype) -> Tensor:
        total = torch.zeros(self.count, block.d_out, block.d_in, dtype=dtype)
        for vectors, coefficients in self.terms:
            total += combined(vectors.read(block, dtype), coefficients)
        return total

    def some(self, numbers: range) -> Vectors:
        chosen = slice(numbers.start, numbers.stop)
        return Sum(tuple((vectors, c[:, chosen]) for vectors, c in self.terms))


@dataclass(frozen=True)
class Joined(Vectors):
    """Vectors behind vectors."""

    parts: tuple[Vectors, ...]

    @property
    def count(self) -> int:  # type: ignore[override]
        return sum(part.count for part in self.parts)

    def read(self, block: Block, dtype: torch.dtype) -> Tensor:
        return torch.cat([part.read(block, dtype) for part in self.parts])


@dataclass(frozen=True)
class Difference(Vectors):
    """A model's weights less those of another one, in float64 before they are rounded."""

    of: Model
    less: Model
    count = 1

    def read(self, block: Block, dtype: torch.dtype) -> Tensor:
        found = self.of.block_weight(block).double() - self.less.block_weight(block).double()
        return found[None].to(dtype)


@dataclass(frozen=True)
class Update(Vectors):
    """A step that a safetensors file holds, by the names of a model's tensors; zero where it has
    none."""

    file: str
    model: Model
    count = 1

    def read(self, block: Block, dtype: torch.dtype) -> Tensor:
        with safe_open(self.file, "pt") as opened:
            there = set(opened.keys())

            def part(place: Place) -> Tensor:
                if place.key not in there:
                    return torch.zeros(place.shape, dtype=torch.float64)
                return place.of(opened.get_tensor(place.key).double().contiguous())

            columns = [part(place) for place in self.model.stored(block).places]
        matrix = torch.cat([c.reshape(block.d_out, -1) for c in columns], dim=1)
        return matrix[None].to(dtype)


@dataclass(frozen=True)
class Along(Directions):
    """Vectors as what a pass multiplies by."""

    vectors: Vectors

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.vectors.count

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, Tensor]:
        return {b.name: self.vectors.read(b, working_dtype(dtype)).to(device) for b in blocks}


@dataclass(frozen=True)
class IntoFiles(ProductGatherer):
    """Gathers products into files, in a dtype."""

    out: Stored = field(kw_only=True)
    dtype: torch.dtype = field(kw_only=True)

    def write(self, name: str, result: ProductSum, blocks: Mapping[str, Block]) -> None:
        self.out.write(name, result.mean.to(self.dtype).cpu())


@dataclass(frozen=True)
class Products:
    """Products of a matrix of some examples with vectors, into files below ``work/``.

    Attributes:
        multiplier: of the examples.
        matrix: which.
        draws: of labels.
        at_once: vectors of a pass.
        mark: tells the examples from others, in the names of files; empty for all of them.
    """

    multiplier: Multiplier
    matrix: Matrix
    draws: int
    at_once: int
    mark: str = ""

    @property
    def workers(self) -> Workers:
        """The workers of the job, whose stages multiply."""
        return self.multiplier.workers

    @property
    def dtype(self) -> torch.dtype:
        """The number type that vectors are computed and stored in, see ``working_dtype``."""
        return working_dtype(self.workers.dtype)

    def of(self, name: str, vectors: Vectors, label: str) -> Joined:
        """The products with vectors, a mean over examples; what is there is not made again.

        Args:
            name: tells these vectors from all others of the job.
            vectors: as many passes are made as have room for them.
            label: of the phase, for a person.
        """
        store, found = self.workers.store, []
        for start in range(0, vectors.count, self.at_once):
            some = vectors.some(range(start, min(start + self.at_once, vectors.count)))
            part = f"{self.mark}{name}-{start:06d}"
            out = Stored(store, f"work/{self.mark}{name}/{start:06d}", some.count)
            found.append(out)
            if not out.there(self.workers.blocks):
                self.multiplier.multiply(self._pass(part, some, out), label)
            store.delete_directory(f"work/{part}")
        return Joined(tuple(found))

    def along(self, name: str, step: Vectors, label: str) -> tuple[Stored, Results]:
        """The product of the Gauss-Newton matrix with one vector, and what its pass finds of the
        examples: means of the loss and of its slope, the largest reach, and ``vᵀGv``."""
        out = Stored(self.workers.store, f"work/{name}", step.count)
        work = replace(self._pass(f"{name}-000000", step, out), matrix="ggn", along=True)
        return out, self.multiplier.found(work, label)

    def _pass(self, name: str, vectors: Vectors, out: Stored) -> Pass:
        into = IntoFiles(out.count, out=out, dtype=self.dtype)
        return Pass(
            name, "product", self.draws, (into,), directions=Along(vectors), matrix=self.matrix
        )  # fmt: skip

    def forget(self, name: str) -> None:
        """Delete the products with vectors of a name."""
        self.workers.store.delete_directory(f"work/{self.mark}{name}")

    def of_blocks(self, function: Callable[..., T], *arguments: Any) -> list[T]:
        """``function(block, *arguments)`` for every block, as tasks; in the order of the blocks.

        Args:
            function: of a module; reads and writes files.
        """
        blocks = {block.name: block for block in self.workers.blocks}
        sizes = {name: float(b.d_out * b.d_in) for name, b in blocks.items()}
        tasks = runs(tuple(blocks), sizes, _TASK_NUMBERS, _TASK_BLOCKS)
        needs = [Need(count=len(names)) for names in tasks]
        calls = [(function, tuple(blocks[n] for n in names), arguments) for names in tasks]
        ended = in_order(self.workers.pool.map(_each, calls, needs))
        return [one for values in ended for one in values]


def _each(
    function: Callable[..., T], blocks: Sequence[Block], arguments: tuple[Any, ...]
) -> list[T]:
    return [function(block, *arguments) for block in blocks]
