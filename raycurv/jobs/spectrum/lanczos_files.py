"""Block Lanczos with vectors in files: see :mod:`raycurv.mathematics.exact.lanczos`.

A block of the basis is what was left of a product, in a file, times a small matrix that makes it
orthonormal: the vectors themselves are written once. A step is a pass over the examples, and three
rounds of tasks, one a block, that take dot products with the basis so far:

    C = Vᵀ W        W′ = W − V C,  C′ = Vᵀ W′        W″ = W′ − V C′,  W″ᵀ W″

Only the numbers of ``C``, ``C′`` and ``W″ᵀ W″`` travel. ``state.safetensors`` is written when the
files of a step are there, and one that was interrupted is made again from its product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raycurv.files.store import Store
from raycurv.files.tensorfile import is_complete, open_tensors, write_tensors
from raycurv.jobs.spectrum.vector_files import Products, Stored, Sum, Vectors
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.exact.grams import combined, dots
from raycurv.mathematics.exact.lanczos import Krylov

# Basis blocks: vectors, and the coefficients that make them orthonormal.
Basis = tuple[tuple[Vectors, Tensor], ...]


@dataclass(frozen=True)
class Lanczos:
    """What Lanczos' method has found, and the basis that it has found it in."""

    krylov: Krylov
    basis: Basis

    def combinations(self, coefficients: Tensor) -> Sum:
        """Vectors of coefficients ``[K, E]`` in the basis."""
        sizes = [turn.shape[1] for _, turn in self.basis]
        parts = coefficients.split(sizes[: len(self.krylov.sizes)])
        known = zip(self.basis, parts, strict=False)
        return Sum(tuple((vectors, turn @ part) for (vectors, turn), part in known))


def run_lanczos(products: Products, start: Vectors, steps: int) -> Lanczos:
    """So many steps from some vectors, or fewer where these reach no further.

    Args:
        products: of the matrix; their ``mark`` names the files.
        start: the vectors; their own numbers are those of the density's quadratures.
        steps: products of each.
    """
    store, place = products.workers.store, f"work/{products.mark}lanczos"
    state = f"{place}/state.safetensors"
    if is_complete(store, state):
        krylov, turns = _read_state(store, state)
    else:
        own = products.of_blocks(_own_dots, start, products.dtype)
        krylov, first = Krylov.begin(_added(own))
        turns = [first]
    with products.workers.phase("Lanczos", steps, "steps") as phase:
        phase.advance(len(krylov.sizes))
        while (done := len(krylov.sizes)) < steps and turns[-1].shape[1]:
            basis = _basis(products, place, start, turns)
            krylov, turn = _step(products, place, krylov, basis)
            turns.append(turn)
            _write_state(store, state, krylov, turns)
            products.forget(f"lanczos-{done:04d}")
            phase.advance(1)
        phase.advance(steps - len(krylov.sizes))
    return Lanczos(krylov, _basis(products, place, start, turns))


def _basis(products: Products, place: str, start: Vectors, turns: Sequence[Tensor]) -> Basis:
    store = products.workers.store
    left = [Stored(store, f"{place}/{k:04d}", len(turn)) for k, turn in enumerate(turns)]
    return tuple(zip((start, *left[1:]), turns, strict=True))


def _step(products: Products, place: str, krylov: Krylov, basis: Basis) -> tuple[Krylov, Tensor]:
    done, dtype = len(krylov.sizes), products.dtype
    w = products.of(f"lanczos-{done:04d}", Sum((basis[-1],)), "products")
    raw = tuple(vectors for vectors, _ in basis)
    turns = [turn for _, turn in basis]

    def seen(found: Sequence[list[Tensor]]) -> list[Tensor]:
        """Dot products with the orthonormal vectors, added up over blocks."""
        each = map(_added, zip(*found, strict=True))
        return [turn.T @ one for turn, one in zip(turns, each, strict=True)]

    rounds: list[list[Tensor]] = []
    total: list[Tensor] = []
    for _ in range(2):
        found = seen(products.of_blocks(_basis_dots, raw, w, rounds, dtype))
        total = found if not total else [a + b for a, b in zip(total, found, strict=True)]
        rounds.append([turn @ c for turn, c in zip(turns, found, strict=True)])
    out = Stored(products.workers.store, f"{place}/{done + 1:04d}", w.count)
    rest = _added(products.of_blocks(_write_rest, raw, w, rounds, dtype, out))
    return krylov.extended(torch.cat(total), rest, dtype)


def _added(blocks: Sequence[Tensor]) -> Tensor:
    """In the order of the blocks, however they are cut into stages."""
    return torch.stack(list(blocks)).sum(0)


def _own_dots(block: Block, vectors: Vectors, dtype: torch.dtype) -> Tensor:
    mine = vectors.read(block, dtype)
    return dots(mine, mine)


def _left(
    block: Block,
    basis: Sequence[Vectors],
    w: Vectors,
    rounds: Sequence[Sequence[Tensor]],
    dtype: torch.dtype,
) -> Tensor:
    """A block's part of the product, less what each round takes from it."""
    mine = w.read(block, dtype)
    for coefficients in rounds:
        taken = torch.zeros_like(mine)
        for vectors, c in zip(basis, coefficients, strict=True):
            taken += combined(vectors.read(block, dtype), c)
        mine -= taken
    return mine


def _basis_dots(
    block: Block,
    basis: Sequence[Vectors],
    w: Vectors,
    rounds: Sequence[Sequence[Tensor]],
    dtype: torch.dtype,
) -> list[Tensor]:
    mine = _left(block, basis, w, rounds, dtype)
    return [dots(vectors.read(block, dtype), mine) for vectors in basis]


def _write_rest(
    block: Block,
    basis: Sequence[Vectors],
    w: Vectors,
    rounds: Sequence[Sequence[Tensor]],
    dtype: torch.dtype,
    out: Stored,
) -> Tensor:
    mine = _left(block, basis, w, rounds, dtype)
    out.write(block.name, mine)
    return dots(mine, mine)


def write_eigenvectors(
    block: Block, parts: dict[str, Sum], out: Stored, dtype: torch.dtype
) -> None:
    """A block's parts of eigenvectors, ``[E, O, I]`` under the name of each end."""
    found = {name: vectors.read(block, dtype) for name, vectors in parts.items()}
    write_tensors(out.store, out.file(block.name), found, {"block": block.name})


def _write_state(store: Store, name: str, krylov: Krylov, turns: Sequence[Tensor]) -> None:
    numbered = {f"turn.{k}": turn for k, turn in enumerate(turns)}
    own = {"start": krylov.start, "h": krylov.h_KK, "rest": krylov.rest}
    write_tensors(store, name, own | numbered, {})


def _read_state(store: Store, name: str) -> tuple[Krylov, list[Tensor]]:
    said = open_tensors(store, name).read_all()
    turns = [said[f"turn.{k}"] for k in range(len(said) - 3)]
    sizes = tuple(turn.shape[1] for turn in turns[:-1])
    return Krylov(said["start"], sizes, said["h"], said["rest"]), turns
