"""The trace of a matrix A that is known by its products alone, of every block and of the model.

    Hutchinson    tr A ≈ mean_i ω_iᵀ A ω_i                            ω_i random signs or normal
    Hutch++       tr A = tr(A₁) + tr((I − P) A (I − P)),   P = Q Qᵀ the projector on the range of AS
                  the first exact, the second by Hutchinson on other probes
    XTrace        Hutch++ with every probe ω_i once as the one that is left out of P, the others
                  making it: no probe is spent on either part alone
    diagonal      A_kk ≈ Σ_i ω_ik (A ω_i)_k / Σ_i ω_ik²

``A₁ = P A + A P − P A P`` is of low rank, so its part in every block is exact, and probes of the
whole model give the traces of all blocks at once:

    tr_b A₁ = 2 tr(Q_bᵀ Z_b) − tr(Qᵀ Z · Q_bᵀ Q_b),   Z = A Q
    tr_b (A − A₁) ≈ ω_bᵀ ((I − P) A (I − P) ω)_b

What a block's estimate has of other blocks is of mean zero, and most of it goes with A₁. Only dot
products of a block's vectors travel, some hundreds of float64 numbers.

The standard errors are of independent probes where these are (Hutchinson, Hutch++). XTrace's share
their bases, and the spread of its terms is too small by a fifth and more: its error is the
jackknife's, from what the estimate would be without each of the probes, which in expectation is no
less than the true one (Efron & Stein 1981).

Hutchinson 1990; Bekas, Kokiopoulou & Saad 2007 (the diagonal); Meyer, Musco, Musco & Woodruff 2021
(Hutch++, algorithm 1); Epperly, Tropp & Webber 2024 (XTrace, section 2).

Axis letters: B blocks, P probes, R vectors of a basis, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from raycurv.mathematics.exact.grams import dots


@dataclass(frozen=True)
class Estimate:
    """Estimates without bias, and how far they may be from the truth: float64 ``[B + 1]``, the last
    of all blocks together.

    Attributes:
        value: the estimates.
        standard_error: of each.
        probes: that it is from.
    """

    value: Tensor
    standard_error: Tensor
    probes: int

    @classmethod
    def of(cls, samples_BP: Tensor) -> Estimate:
        """The mean of what each of two or more probes says of every block."""
        samples = _with_all(samples_BP)
        probes = samples.shape[1]
        return cls(samples.mean(1), samples.std(1) / math.sqrt(probes), probes)

    @classmethod
    def jackknife(cls, value_B: Tensor, without_BP: Tensor) -> Estimate:
        """From the estimates, and what they would be without each probe."""
        value, without = _with_all(value_B[:, None])[:, 0], _with_all(without_BP)
        probes = without.shape[1]
        return cls(value, without.std(1) * (probes - 1) / math.sqrt(probes), probes)

    @property
    def margin(self) -> Tensor:
        """Half the width of the interval that holds the truth in 95 of 100 cases."""
        return student(self.probes - 1) * self.standard_error


def _with_all(values_BP: Tensor) -> Tensor:
    return torch.cat([values_BP, values_BP.sum(0, keepdim=True)])


def student(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, within 1 % from 3 degrees of freedom on (Abramowitz &
    Stegun 26.7.5)."""
    z: float = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / degrees ** (k + 1) for k, term in enumerate(terms))


@dataclass(frozen=True)
class ProbeDots:
    """Dot products of one block's vectors, or of several, one after the other: ``[B, ...]``.

    Attributes:
        qq: of the basis with itself, ``[B, R, R]``.
        qz: of the basis with its products, likewise.
        qo: of the basis with the probes, ``[B, R, P]``.
        qy: of the basis with the probes' products, likewise.
        zo: of the basis' products with the probes, likewise.
        oy: of each probe with its own product, ``[B, P]``.
    """

    qq: Tensor
    qz: Tensor
    qo: Tensor
    qy: Tensor
    zo: Tensor
    oy: Tensor

    @property
    def rank(self) -> int:
        """R: how many dimensions the low-rank part has."""
        return self.qq.shape[-1]

    @classmethod
    def of(cls, q: Tensor, z: Tensor, probes: Tensor, products: Tensor) -> ProbeDots:
        """Of a block's basis ``[R, O, I]``, its products, probes ``[P, O, I]`` and theirs."""
        own = (probes.double() * products.double()).flatten(1).sum(1)
        found = (dots(q, q), dots(q, z), dots(q, probes), dots(q, products), dots(z, probes), own)
        return cls(*(one[None] for one in found))

    @classmethod
    def stacked(cls, blocks: Sequence[ProbeDots]) -> ProbeDots:
        """Those of several blocks."""
        names = ("qq", "qz", "qo", "qy", "zo", "oy")
        return cls(*(torch.cat([getattr(block, name) for block in blocks]) for name in names))


def hutchinson(own_BP: Tensor) -> Estimate:
    """The traces from each probe's dot product with its own product."""
    return Estimate.of(own_BP)


def hutch_plus_plus(found: ProbeDots, basis_probes: int) -> Estimate:
    """The traces from the probes that had no part in the basis.

    Args:
        found: Q being a basis of the products of the first ``basis_probes`` probes.
        basis_probes: how many these are; two others at least are needed.
    """
    probes = torch.arange(basis_probes, found.oy.shape[-1])
    return Estimate.of(_samples(found, probes, found.qq.new_zeros(len(probes), found.rank, 0)))


def x_trace(found: ProbeDots) -> Estimate:
    """The traces, Q being a basis of the products of all probes, of which there are three at least.

    A product that the others' span holds, as where their number exceeds the rank of A, changes
    nothing when it is left out.
    """
    r_RP = found.qy.sum(0)
    rank, probes = r_RP.shape
    # The columns are orthogonal to all products but one each.
    left_out = torch.linalg.inv(r_RP).T if rank == probes else r_RP.new_zeros(rank, probes)
    every = torch.arange(probes)
    each = _samples(found, every, left_out.T[..., None])
    # Every pair of one that goes and one that speaks.
    gone, i = (~torch.eye(probes, dtype=torch.bool)).nonzero().T
    pairs = _samples(found, i, torch.stack([left_out.T[i], left_out.T[gone]], -1))
    without_BP = pairs.view(-1, probes, probes - 1).mean(2)
    return Estimate.jackknife(each.mean(1), without_BP)


def _samples(found: ProbeDots, i: Tensor, left_out: Tensor) -> Tensor:
    """What S probes say of all blocks, ``[B, S]``.

    Args:
        i: the probes' numbers ``[S]``.
        left_out: columns ``[S, R, ...]`` whose span the projector is without, of each.
    """
    n_SRR = torch.eye(found.rank, dtype=torch.float64) - left_out @ torch.linalg.pinv(left_out)
    h_RR = found.qz.sum(0)
    c_SR = torch.einsum("srt,ts->sr", n_SRR, found.qo.sum(0)[:, i])
    rest_RS = found.qy.sum(0)[:, i] - h_RR @ c_SR.T
    f_SR = torch.einsum("srt,ts->sr", n_SRR, rest_RS)
    exact = 2 * _traces(n_SRR, found.qz) - _traces(n_SRR @ h_RR @ n_SRR, found.qq)
    seen = torch.einsum("brs,sr->bs", found.zo[..., i], c_SR)
    seen += torch.einsum("brs,sr->bs", found.qo[..., i], f_SR)
    return exact + found.oy[:, i] - seen


def _traces(left_SRR: Tensor, right_BRR: Tensor) -> Tensor:
    found: Tensor = torch.einsum("srt,btr->bs", left_SRR, right_BRR)
    return found


class DiagonalSum:
    """The diagonal of A from probes, added in one by one: ``Σ ω ∘ Aω``, and of its squares.

    Args:
        shape: of a block, ``(O, I)``.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self._products, self._squares, self._norms = torch.zeros(3, *shape, dtype=torch.float64)
        self._count = 0

    def add(self, probe: Tensor, product: Tensor) -> None:
        """Add a probe ``[O, I]`` and ``A`` times it."""
        found = probe.double() * product.double()
        self._products += found
        self._squares += found.square()
        self._norms += probe.double().square()
        self._count += 1

    def result(self) -> tuple[Tensor, Tensor]:
        """The diagonal and its standard errors, ``[O, I]`` float64 each, of two probes at least."""
        mean = self._products / self._norms
        n = self._count
        spread = (self._squares / n - (self._products / n).square()).clamp(min=0) / (n - 1)
        return mean, spread.sqrt() * n / self._norms
