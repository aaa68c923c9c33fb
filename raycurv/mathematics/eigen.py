"""Factor -> eigenbasis.

    A = Q_A D_A Q_Aᵀ,   G = Q_G D_G Q_Gᵀ        George et al. 2018 (arXiv:1806.03884), section 2

The decomposition runs in float64 whatever the model's dtype: a failure is retried with jitter, then
on the CPU, and is otherwise an error with the factor's name. Which of them happened is part of the
result.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from raycurv.errors import NumericalError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.factors import factors_of
from raycurv.mathematics.tiles import tile_ranges, times_tiles

# Relative to the mean eigenvalue; a few times float64's rounding at d = 10,000.
_JITTER = 1e-10
# A GPU decomposes one matrix at a time; and torch loads its solvers in the first call, which fails
# where several threads make it (pytorch issue 90613).
_ON_DEVICE = threading.Lock()


@dataclass(frozen=True)
class Eigenbasis:
    """Orthonormal eigenvectors of a factor, tile by tile, and its eigenvalues.

    Attributes:
        vectors: one ``[t, t]`` a tile, eigenvectors in its columns; empty for the identity.
        values: one float64 ``[t]`` a tile, ascending, of the *mean* factor; of a diagonal factor
            one ``[d]``, its diagonal as it stands; empty where there is no factor.
        outcome: ``ok``, ``jittered``, ``cpu``, ``clamped n``, ``zero``, or several joined by ``+``.
    """

    vectors: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    outcome: str = "ok"
    seconds: float = 0.0

    @property
    def tiles(self) -> tuple[int, ...]:
        """The width of each tile, in the order of the axis."""
        return tuple(int(q.shape[0]) for q in self.vectors)

    @property
    def ranges(self) -> tuple[range, ...]:
        """Which indices of the axis each tile holds: the basis is zero outside these squares."""
        return tile_ranges(self.tiles)

    def to(self, device: torch.device) -> Eigenbasis:
        """The same with its eigenvectors on ``device``; eigenvalues stay where they are."""
        return replace(self, vectors=tuple(q.to(device) for q in self.vectors))

    def rotate(self, x: Tensor) -> Tensor:
        """``x Q`` along the last axis."""
        return self._multiply(x, transpose=False)

    def unrotate(self, x: Tensor) -> Tensor:
        """``x Qᵀ`` along the last axis."""
        return self._multiply(x, transpose=True)

    def _multiply(self, x: Tensor, transpose: bool) -> Tensor:
        # The basis may be stored in bf16; it multiplies in the precision of what it turns.
        bases = (q.to(x.dtype) for q in self.vectors)
        return times_tiles(x, [q.T if transpose else q for q in bases])

    def eigenvalues(self) -> Tensor:
        """All tiles' eigenvalues in the order of the basis' columns, float64."""
        return torch.cat(list(self.values))

    def dense(self) -> Tensor:
        """The whole basis as one float64 matrix."""
        if not self.vectors:
            return torch.eye(len(self.eigenvalues()), dtype=torch.float64)
        whole: Tensor = torch.block_diag(*(q.double() for q in self.vectors))
        return whole

    def squared(self, dtype: torch.dtype) -> Tensor:
        """``Q * Q``, tile by tile in one matrix."""
        whole: Tensor = torch.block_diag(*(q.to(dtype).square() for q in self.vectors))
        return whole


def own_axes(blocks: Iterable[Block]) -> dict[str, Eigenbasis]:
    """The identity as the basis of every factor: gradients stay in the weights' own axes."""
    return dict.fromkeys(factors_of(blocks), Eigenbasis())


def effective_rank(values: Tensor) -> float:
    """``exp(entropy of the normalised eigenvalues)`` (Roy & Vetterli 2007); 0 for a zero factor."""
    total = values.sum()
    if total <= 0:
        return 0.0
    p = values / total
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def decompose(
    name: str,
    tiles: Sequence[Tensor],
    store_dtype: torch.dtype,
    device: torch.device,
    sum_dtype: torch.dtype = torch.float64,
) -> Eigenbasis:
    """Eigenvectors and eigenvalues of a factor.

    Args:
        tiles: float64 symmetric ``[t, t]`` means, one a tile; or one ``[d]``, the diagonal of a
            factor that has no more, which is its own eigenvalues.
        store_dtype: of the eigenvectors; eigenvalues stay float64.
        device: where to try first.
        sum_dtype: that the factor was summed in. Eigenvalues below zero by more than that dtype's
            rounding (``d eps max|w|``) are counted in the outcome; all are clamped.

    Raises:
        NumericalError: the factor is not finite, or every attempt failed.
    """
    started = time.perf_counter()
    vectors, values, outcomes, clamped = [], [], [], 0
    for i, tile in enumerate(tiles):
        where = f"factor {name}" if len(tiles) == 1 else f"factor {name}, tile {i}"
        if not torch.isfinite(tile).all():
            raise NumericalError(
                where,
                "finite values",
                "NaN or infinity",
                "Run the first pass again in a wider --dtype.",
            )
        if tile.ndim == 1:
            w, outcome = tile, "ok"
        else:
            w, q, outcome = _eigh(where, (tile + tile.T) / 2, device)
            vectors.append(q.to(store_dtype).cpu().contiguous())
        rounding = len(w) * torch.finfo(sum_dtype).eps * w.abs().max()
        clamped += int((w < -rounding).sum())
        values.append(w.clamp_min(0.0).cpu())
        outcomes.append(outcome)
    distinct = sorted(set(outcomes) - {"ok"})
    if clamped:
        distinct.append(f"clamped {clamped}")
    if all(float(v.max()) == 0.0 for v in values):
        distinct.append("zero")
    return Eigenbasis(
        tuple(vectors), tuple(values), "+".join(distinct) or "ok", time.perf_counter() - started
    )


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[t]``, ascending, and eigenvectors ``[t, t]`` of a symmetric matrix, in its
    dtype and on its device; RuntimeError or numpy.linalg.LinAlgError if it does not converge.

    On the CPU they are from numpy's LAPACK, which takes 0.6 of the time of torch's (LOG.md).
    """
    if matrix.device.type != "cpu":
        with _ON_DEVICE:
            w, q = torch.linalg.eigh(matrix)
        return w, q
    values, vectors = np.linalg.eigh(matrix.numpy())
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _eigh(where: str, symmetric: Tensor, device: torch.device) -> tuple[Tensor, Tensor, str]:
    def jittered() -> Tensor:
        moved = symmetric.clone()
        mean = moved.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        moved.diagonal().add_(_JITTER * mean)
        return moved

    attempts = [("ok", device), ("jittered", device)]
    if device.type != "cpu":
        attempts.append(("cpu", torch.device("cpu")))
    causes = []
    for outcome, where_to in attempts:
        matrix = jittered() if outcome == "jittered" else symmetric
        try:
            w, q = eigh(matrix.to(where_to))
        except (RuntimeError, np.linalg.LinAlgError) as error:
            causes.append(f"{outcome}: {error}")
            continue
        if torch.isfinite(w).all() and torch.isfinite(q).all():
            return w, q, outcome
        causes.append(f"{outcome}: non-finite eigenvectors")
    raise NumericalError(
        where,
        "an eigendecomposition in float64",
        "; ".join(causes),
        "Look at the factor's sum under factors/, or leave its blocks out with --blocks '!…'.",
    )
