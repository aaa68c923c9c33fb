"""What a fitted block can do: three primitives that serve every use of its curvature.

    apply(x, f)  = f(F) x          f of the eigenvalues; f = 1 / (Λ + λ) gives the IHVP of x
    diagonal(f)  = diag f(F)
    eigenvalues  = Λ               λ = c · mean(Λ)

:class:`BlockCurvature` has them for EK-FAC, K-FAC and the diagonal,

    apply(x, f)  = Q_G (f(Λ) * (Q_Gᵀ x Q_A)) Q_Aᵀ
    diagonal(f)  = (Q_G * Q_G) f(Λ) (Q_A * Q_A)ᵀ

:class:`IdentityCurvature` for no curvature, and for the rows of a rank-m Fisher
:class:`~raycurv.mathematics.rank.rank_curvature.RankCurvature`.

Grosse et al. 2023 (arXiv:2308.03296), section 3.2, equation 20.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raycurv.errors import NumericalError, UserError
from raycurv.mathematics.bases import Basis
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.eigen import Eigenbasis
from raycurv.mathematics.sums import is_finite
from raycurv.mathematics.tiles import tile_ranges

SpectralFunction = Callable[[Tensor], Tensor]
# Words that choose a damping from a fit, where a job takes them.
CHOSEN = ("evidence", "heldout")


@dataclass(frozen=True)
class Damping:
    """``factor · mean(Λ)`` of each block, or one absolute number for all.

    Attributes:
        value: the factor, or the number itself.
        absolute: which of the two.
    """

    value: float = 0.1
    absolute: bool = False

    @classmethod
    def parse(cls, text: str | float) -> Damping:
        """From ``0.1`` or ``abs:1e-6``.

        Raises:
            UserError: not a number, negative, or not finite.
        """
        absolute = isinstance(text, str) and text.startswith("abs:")
        try:
            value = float(text[4:] if absolute and isinstance(text, str) else text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0:
            raise UserError(
                "--damping",
                "a number of at least 0, or abs:NUMBER",
                repr(text),
                "0.1 adds a tenth of a block's mean eigenvalue; abs:1e-6 adds 1e-6 to every block."
                + " What `influence` chose by a word stands in its run.json." * (text in CHOSEN),
            )
        return cls(value, absolute)

    def __str__(self) -> str:
        return f"abs:{self.value:g}" if self.absolute else f"{self.value:g}"

    def of(self, mean_eigenvalue: float) -> float:
        """λ of a block."""
        return self.value if self.absolute else self.value * mean_eigenvalue


class Curvature(ABC):
    """The curvature F of one block: a symmetric matrix over its ``O·I`` weights, never formed.

    F is a mean over examples of the curvature of an example's loss.

    Attributes:
        block: whose it is.
    """

    block: Block

    @property
    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """Λ; those that are not listed are zero."""

    @property
    @abstractmethod
    def trace(self) -> float:
        """The sum of all eigenvalues."""

    @abstractmethod
    def apply(self, x: Tensor, f: SpectralFunction) -> Tensor:
        """``f(F) x`` for matrices ``x [..., O, I]``; ``f`` maps eigenvalues to numbers.

        ``apply(v, curvature.inverse(damping))`` is the IHVP of ``v``.

        Raises:
            UserError: x is of another shape.
        """

    @abstractmethod
    def diagonal(self, f: SpectralFunction) -> Tensor:
        """The diagonal of ``f(F)``, ``[O, I]``, in the weight's own coordinates."""

    @abstractmethod
    def dense(self) -> Tensor:
        """F as a matrix ``[O·I, O·I]`` in float64, for small blocks and for tests."""

    def damping(self, setting: Damping) -> float:
        """λ of this block; a factor is one of the mean over all ``O·I`` eigenvalues."""
        return setting.of(self.trace / (self.block.d_out * self.block.d_in))

    @property
    def is_zero(self) -> bool:
        """Whether no example has a gradient here, so that F is zero."""
        return self.trace == 0.0

    def inverse(self, setting: Damping) -> SpectralFunction:
        """``Λ -> 1 / (Λ + λ)``, or ``Λ -> 0`` for a block whose F is zero.

        Raises:
            UserError: λ is zero and so is an eigenvalue.
        """
        if self.is_zero:
            return torch.zeros_like
        lam = self._solvable(setting)
        # In place: of a wide block these are large.
        return lambda eigenvalues: (eigenvalues + lam).reciprocal_()

    def damped(self, setting: Damping) -> SpectralFunction:
        """``Λ -> Λ + λ``.

        Raises:
            UserError: λ is zero and so is an eigenvalue.
        """
        lam = self._solvable(setting)
        return lambda eigenvalues: eigenvalues + lam

    def _solvable(self, setting: Damping) -> float:
        """λ, once it is known that ``Λ + λ`` has no zero."""
        lam = self.damping(setting)
        if lam == 0.0:
            zeros = self.block.d_out * self.block.d_in - int((self.eigenvalues > 0).sum())
            if zeros:
                raise UserError(
                    f"block {self.block.name}",
                    "a positive damping, or corrected eigenvalues above 0",
                    f"damping {setting} and {zeros} zeros in Λ",
                    "Give --damping a positive value.",
                )
        return lam

    def check(self, x: Tensor) -> None:
        """Refuse what is not a matrix (or several) of the block's shape.

        Raises:
            UserError: it is of another shape.
        """
        wanted = (self.block.d_out, self.block.d_in)
        if x.ndim < 2 or tuple(x.shape[-2:]) != wanted:
            bias = " (the last column is the bias)" if self.block.bias else ""
            raise UserError(
                f"block {self.block.name}",
                f"a tensor of shape [..., {wanted[0]}, {wanted[1]}]{bias}",
                f"{tuple(x.shape)}",
                "Give the block's weight or gradient as one matrix.",
            )


@dataclass(frozen=True)
class BlockCurvature(Curvature):
    """Eigenvalues in a Kronecker product of two bases: EK-FAC, K-FAC, and the diagonal.

    Attributes:
        block: its shape and name.
        input_basis: ``Q_A``; an empty one, the weights' own axes, for the diagonal.
        output_basis: ``Q_G``, likewise.
        lam_OI: Λ, a mean over examples (for K-FAC: rows an example · D_G ⊗ D_A).
    """

    block: Block
    input_basis: Eigenbasis
    output_basis: Eigenbasis
    lam_OI: Tensor

    @property
    def eigenvalues(self) -> Tensor:
        """Λ ``[O, I]``, a mean over examples."""
        return self.lam_OI

    @property
    def trace(self) -> float:
        return float(self.lam_OI.sum(dtype=torch.float64))

    @property
    def input_tiles(self) -> tuple[range, ...]:
        """The runs of input columns that ``Q_A`` does not mix with others; one when it is whole."""
        if self.block.input_diagonal:
            return tile_ranges((1,) * self.block.d_in)
        return self.input_basis.ranges or (range(self.block.d_in),)

    @property
    def output_tiles(self) -> tuple[range, ...]:
        """The runs of output rows that ``Q_G`` does not mix with others; one when it is whole."""
        if self.block.output_diagonal:
            return tile_ranges((1,) * self.block.d_out)
        return self.output_basis.ranges or (range(self.block.d_out),)

    @property
    def is_diagonal(self) -> bool:
        """Whether F is diagonal in the weights' own axes."""
        return not (self.input_basis.vectors or self.output_basis.vectors)

    def apply(self, x: Tensor, f: SpectralFunction) -> Tensor:
        self.check(x)
        rotated = self.input_basis.rotate(x)
        rotated = self.output_basis.rotate(rotated.transpose(-1, -2)).transpose(-1, -2)
        scaled = rotated * f(self.eigenvalues.to(x))
        back = self.input_basis.unrotate(scaled)
        return self.output_basis.unrotate(back.transpose(-1, -2)).transpose(-1, -2)

    def diagonal(self, f: SpectralFunction) -> Tensor:
        values = self.row_spectra(f)
        if self.input_basis.vectors:
            values = values @ self.input_basis.squared(values.dtype).T
        return values

    def row_spectra(self, f: SpectralFunction) -> Tensor:
        """``c = (Q_G * Q_G) f(Λ)``, ``[O, I]``: spectra of the outputs' own parts.

        The part of ``f`` of the curvature that belongs to the weights of output o, ``[I, I]``, is
        ``Q_A diag(c[o]) Q_Aᵀ``.
        """
        values = f(self.eigenvalues)
        if self.output_basis.vectors:
            values = self.output_basis.squared(values.dtype) @ values
        return values

    def dense(self) -> Tensor:
        lam = self.lam_OI.double().flatten()
        if self.is_diagonal:
            return torch.diag(lam)
        q = torch.kron(self.output_basis.dense(), self.input_basis.dense())
        return (q * lam) @ q.T

    def inverted(self, setting: Damping, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``1 / (Λ + λ)`` ``[O, I]``, zero where F is: what a turned gradient is multiplied by.

        Raises:
            UserError: λ is zero and so is an entry of Λ.
            NumericalError: an entry is beyond what the dtype holds.
        """
        wide = self.inverse(setting)(self.lam_OI.to(device).double())
        found = wide.to(dtype)
        # Rounded to zero or infinity it would be a plausible score, or none.
        if not self.is_zero and not (is_finite(found) and bool(found.all())):
            name = str(dtype).removeprefix("torch.")
            raise NumericalError(
                f"block {self.block.name}",
                f"1 / (Λ + λ) that {name} holds",
                f"{float(wide.min()):.3g} to {float(wide.max()):.3g}, with --damping {setting}",
                "Give --dtype float64, or a --damping that brings Λ + λ nearer to 1.",
            )
        return found


class IdentityCurvature(BlockCurvature):
    """No curvature: F is the identity, which is never damped and so is its own inverse."""

    def __init__(self, block: Block) -> None:
        # One number, however large the block.
        ones_OI = torch.ones((), dtype=torch.float64).expand(block.d_out, block.d_in)
        super().__init__(block, Eigenbasis(), Eigenbasis(), ones_OI)

    def damping(self, setting: Damping) -> float:
        return 0.0

    def inverted(self, setting: Damping, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.ones((), dtype=dtype, device=device).expand(self.lam_OI.shape)


def kfac_eigenvalues(
    left: Eigenbasis, right: Eigenbasis, rows_per_example: float, basis: Basis
) -> Tensor:
    """K-FAC's Λ on EK-FAC's scale, a mean over examples, float64 ``[O, I]``.

    With A and G as means over rows it is ``rows · D_G ⊗ D_A``: an example's gradient is a sum over
    its rows, whose second moment under K-FAC's independence is rows times the product of theirs.
    Other factors have other scales (:mod:`raycurv.mathematics.bases`).
    """
    outputs = left.eigenvalues()
    return basis.scale(rows_per_example, outputs) * torch.outer(outputs, right.eigenvalues())


@dataclass(frozen=True)
class Preconditioner:
    """The curvature of a stage's blocks, damped and ready to multiply gradients.

    Attributes:
        blocks: in their order.
        bases: factor -> eigenbasis.
        inverse: block name -> ``1 / (Λ + λ)`` ``[O, I]``.
    """

    blocks: tuple[Block, ...]
    bases: dict[str, Eigenbasis]
    inverse: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        curvatures: Mapping[str, BlockCurvature],
        damping: Damping,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Preconditioner:
        """Damp every block.

        Raises:
            UserError: a block has no damping and a zero in Λ.
        """
        bases: dict[str, Eigenbasis] = {}
        for curvature in curvatures.values():
            bases[curvature.block.input_factor] = curvature.input_basis
            bases[curvature.block.output_factor] = curvature.output_basis
        inverse = {n: c.inverted(damping, dtype, device) for n, c in curvatures.items()}
        return cls(tuple(c.block for c in curvatures.values()), bases, inverse)
