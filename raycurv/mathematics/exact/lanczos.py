"""Extreme eigenvalues of a symmetric matrix A, and the density of all, by block Lanczos.

    V₁ R = Ω                                          an orthonormal basis of Q probes
    W = A V_k,   C = [V₁ … V_k]ᵀ W,   W ← W − V C     twice: full reorthogonalisation
    V_{k+1} B = W                                      the next block of the basis
    H = Vᵀ A V,   H y = θ y                            Ritz values θ, Ritz vectors V y
    ‖A V y − θ V y‖ = ‖B y_last‖                       a bound on how far θ is from an eigenvalue

A block of several probes finds as many of equal eigenvalues as it has columns, and each probe is a
quadrature of the density of its own,

    ωᵀ f(A) ω = Σ_i (r · y_i)² f(θ_i),   r the probe's column of R, on the first Q of y_i

exact for polynomials up to degree 2K − 1 after K products (Golub & Meurant 2010, section 6.6). The
mean over random probes is ``tr f(A)``; divided by ``‖ω‖²`` it is the density (stochastic Lanczos
quadrature; Ubaru, Chen & Saad 2017; Ghorbani, Krishnan & Xiao 2019).

The vectors lie in files where their blocks are; here are the small matrices, sums of their dot
products over blocks. H is formed of these, all of it, so that it is Vᵀ A V whatever rounding does.

Axis letters: Q vectors of a block of the basis, K those of the basis so far, X points of a grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raycurv.mathematics.exact.grams import orthonormalising

# A rest that is shorter than this share of the product, squared, is too near to rounding to be
# made orthogonal to the basis by two rounds.
_SMALL = {torch.float64: 1e-20, torch.float32: 1e-8}

End = Literal["top", "bottom"]


@dataclass(frozen=True)
class RitzPairs:
    """Approximate eigenpairs of one end of the spectrum, the outermost first.

    Attributes:
        values: ``[E]``.
        residuals: ``‖A x − θ x‖`` of each, for x of length 1.
        coefficients: of the vectors in the basis, ``[K, E]``.
    """

    values: Tensor
    residuals: Tensor
    coefficients: Tensor


@dataclass(frozen=True)
class Krylov:
    """What has been found of A, float64 on the CPU.

    Attributes:
        start: R, the probes in the first block of the basis, ``[Q, P]``.
        sizes: vectors of each block of the basis whose product is known.
        h_KK: Vᵀ A V.
        rest: Wᵀ W of the last product, less what the basis has of it.
    """

    start: Tensor
    sizes: tuple[int, ...]
    h_KK: Tensor
    rest: Tensor

    @classmethod
    def begin(cls, gram_PP: Tensor) -> tuple[Krylov, Tensor]:
        """From the probes' dot products; with the coefficients ``[P, Q]`` of the first block."""
        turn = orthonormalising(gram_PP)
        nothing = torch.zeros(0, 0, dtype=torch.float64)
        return cls(turn.T @ gram_PP, (), nothing, nothing), turn

    def extended(self, c_KQ: Tensor, rest: Tensor, dtype: torch.dtype) -> tuple[Krylov, Tensor]:
        """After the product of the last block of the basis.

        Args:
            c_KQ: its dot products with the whole basis, of both rounds of orthogonalisation.
            rest: dot products of what they have left, ``[Q, Q]``.
            dtype: of the vectors.

        Returns:
            what is known then, and coefficients ``[Q, Q']`` that make the next block of what is
            left; none (Q' = 0) when the basis holds all that the probes can reach.
        """
        before = len(self.h_KK)
        known = len(c_KQ)
        h_KK = torch.zeros(known, known, dtype=torch.float64)
        h_KK[:before, :before] = self.h_KK
        h_KK[:, before:] = c_KQ
        h_KK[before:, :before] = c_KQ[:before].T
        h_KK[before:, before:] = (c_KQ[before:] + c_KQ[before:].T) / 2
        least = _SMALL[dtype] * float(c_KQ.square().sum())
        found = Krylov(self.start, (*self.sizes, c_KQ.shape[1]), h_KK, rest)
        return found, orthonormalising(rest, least)

    @property
    def pairs(self) -> RitzPairs:
        """All Ritz pairs, the largest value first."""
        values, vectors = torch.linalg.eigh(self.h_KK)
        values, vectors = values.flip(0), vectors.flip(1)
        last = vectors[-self.sizes[-1] :]
        residuals = torch.einsum("qk,qr,rk->k", last, self.rest, last).clamp(min=0).sqrt()
        return RitzPairs(values, residuals, vectors)

    def end(self, end: End, count: int) -> RitzPairs:
        """So many pairs of one end, the outermost first."""
        found = self.pairs
        order = torch.arange(len(found.values))
        chosen = (order if end == "top" else order.flip(0))[:count]
        return RitzPairs(
            found.values[chosen], found.residuals[chosen], found.coefficients[:, chosen]
        )

    def quadrature(self) -> tuple[Tensor, Tensor]:
        """Nodes ``[K]`` and every probe's weights ``[P, K]``, which add up to 1."""
        found = self.pairs
        seen = self.start.T @ found.coefficients[: len(self.start)]
        return found.values, seen.square() / self.start.square().sum(0)[:, None]

    def density(self, grid: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """The density of the eigenvalues at points ``[X]``, and its standard errors over probes.

        Its integral is 1; times the number of weights it counts eigenvalues.

        Args:
            grid: the points.
            width: standard deviation of the normal curve that every node is smoothed with.
        """
        nodes, weights_PK = self.quadrature()
        curves = (-((grid - nodes[:, None]) / width).square() / 2).exp() / (
            width * math.sqrt(2 * math.pi)
        )
        found_PX = weights_PK @ curves
        if len(found_PX) == 1:
            return found_PX[0], torch.full_like(grid, math.nan)
        return found_PX.mean(0), found_PX.std(0) / math.sqrt(len(found_PX))
