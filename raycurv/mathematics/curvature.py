"""What a fitted block can do: three primitives that serve every use of its curvature.

    apply(x, f)  = Q_G (f(Λ) * (Q_Gᵀ x Q_A)) Q_Aᵀ
    diagonal(f)  = (Q_G * Q_G) f(Λ) (Q_A * Q_A)ᵀ
    eigenvalues  = Λ

    IHVP = apply(V, Λ -> 1 / (Λ + λ)),   λ = c · mean(Λ)

Grosse et al. 2023 (arXiv:2308.03296), section 3.2, equation 20.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.eigen import Eigenbasis

SpectralFunction = Callable[[Tensor], Tensor]


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
                "0.1 adds a tenth of a block's mean eigenvalue; abs:1e-6 adds 1e-6 to every block.",
            )
        return cls(value, absolute)

    def __str__(self) -> str:
        return f"abs:{self.value:g}" if self.absolute else f"{self.value:g}"

    def of(self, mean_eigenvalue: float) -> float:
        """λ of a block."""
        return self.value if self.absolute else self.value * mean_eigenvalue


@dataclass(frozen=True)
class BlockCurvature:
    """The curvature of one block.

    Attributes:
        block: its shape and name.
        input_basis: ``Q_A``; the identity for the methods ``diagonal`` and ``identity``.
        output_basis: ``Q_G``.
        lam_OI: Λ (for K-FAC: rows an example · D_G ⊗ D_A), or ``None`` for the identity.
    """

    block: Block
    input_basis: Eigenbasis
    output_basis: Eigenbasis
    lam_OI: Tensor | None

    @property
    def eigenvalues(self) -> Tensor:
        """Λ ``[O, I]``, a mean over examples; ones for the identity."""
        if self.lam_OI is None:
            return torch.ones(self.block.d_out, self.block.d_in, dtype=torch.float64)
        return self.lam_OI

    @property
    def input_tiles(self) -> tuple[range, ...]:
        """The runs of input columns that ``Q_A`` does not mix with others; one when it is whole."""
        return self.input_basis.ranges or (range(self.block.d_in),)

    @property
    def output_tiles(self) -> tuple[range, ...]:
        """The runs of output rows that ``Q_G`` does not mix with others; one when it is whole."""
        return self.output_basis.ranges or (range(self.block.d_out),)

    def apply(self, x: Tensor, f: SpectralFunction) -> Tensor:
        """``Q_G (f(Λ) * (Q_Gᵀ x Q_A)) Q_Aᵀ`` for ``x [..., O, I]``.

        ``apply(v, lambda lam: 1 / (lam + damping))`` is the IHVP of ``v``.
        """
        self.check(x)
        rotated = self.input_basis.rotate(x)
        rotated = self.output_basis.rotate(rotated.transpose(-1, -2)).transpose(-1, -2)
        scaled = rotated * f(self.eigenvalues.to(x))
        back = self.input_basis.unrotate(scaled)
        return self.output_basis.unrotate(back.transpose(-1, -2)).transpose(-1, -2)

    def diagonal(self, f: SpectralFunction) -> Tensor:
        """The diagonal of ``f`` of the curvature, ``[O, I]``, in the weight's own coordinates."""
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
        """The whole curvature ``[O*I, O*I]`` in float64, for small blocks and for tests."""
        size = self.block.d_out * self.block.d_in
        if self.lam_OI is None:
            return torch.eye(size, dtype=torch.float64)
        if not self.input_basis.vectors:
            return torch.diag(self.lam_OI.double().flatten())
        q = torch.kron(self.output_basis.dense(), self.input_basis.dense())
        return (q * self.lam_OI.double().flatten()) @ q.T

    def damping(self, setting: Damping) -> float:
        """λ of this block."""
        return setting.of(float(self.eigenvalues.mean(dtype=torch.float64)))

    @property
    def is_zero(self) -> bool:
        """Whether no example has a gradient here, so that Λ is zero."""
        return self.lam_OI is not None and float(self.lam_OI.mean(dtype=torch.float64)) == 0.0

    def inverse(self, setting: Damping) -> SpectralFunction:
        """``Λ -> 1 / (Λ + λ)``, or ``Λ -> 0`` for a block whose Λ is zero.

        The identity has no damping: its inverse is the identity.

        Raises:
            UserError: λ is zero and so is an entry of Λ.
        """
        if self.lam_OI is None:
            return torch.ones_like
        if self.is_zero:
            return torch.zeros_like
        lam = self._solvable(setting)
        # In place: of a wide block these are large.
        return lambda eigenvalues: (eigenvalues + lam).reciprocal_()

    def damped(self, setting: Damping) -> SpectralFunction:
        """``Λ -> Λ + λ``; the identity has no damping.

        Raises:
            UserError: λ is zero and so is an entry of Λ.
        """
        lam = 0.0 if self.lam_OI is None else self._solvable(setting)
        return lambda eigenvalues: eigenvalues + lam

    def _solvable(self, setting: Damping) -> float:
        """λ, once it is known that ``Λ + λ`` has no zero."""
        lam = self.damping(setting)
        if lam == 0.0 and (zeros := int((self.eigenvalues <= 0).sum())):
            raise UserError(
                f"block {self.block.name}",
                "a positive damping, or corrected eigenvalues above 0",
                f"damping {setting} and {zeros} zeros in Λ",
                "Give --damping a positive value.",
            )
        return lam

    def check(self, x: Tensor) -> None:
        """:func:`check_matrix` of this block."""
        check_matrix(self.block, x)


def check_matrix(block: Block, x: Tensor) -> None:
    """Refuse what is not a matrix (or several) of a block's shape.

    Raises:
        UserError: it is of another shape.
    """
    wanted = (block.d_out, block.d_in)
    if x.ndim < 2 or tuple(x.shape[-2:]) != wanted:
        bias = " (the last column is the bias)" if block.bias else ""
        raise UserError(
            f"block {block.name}",
            f"a tensor of shape [..., {wanted[0]}, {wanted[1]}]{bias}",
            f"{tuple(x.shape)}",
            "Give the block's weight or gradient as one matrix.",
        )


@dataclass(frozen=True)
class Preconditioner:
    """The curvature of a stage's blocks, damped and ready to multiply gradients.

    Attributes:
        blocks: in their order.
        bases: factor -> eigenbasis.
        inverse: block name -> ``1 / (Λ + λ)`` ``[O, I]``, or ``None`` for the identity.
    """

    blocks: tuple[Block, ...]
    bases: dict[str, Eigenbasis]
    inverse: dict[str, Tensor | None]

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
        inverse: dict[str, Tensor | None] = {}
        for name, curvature in curvatures.items():
            bases[curvature.block.input_factor] = curvature.input_basis
            bases[curvature.block.output_factor] = curvature.output_basis
            f = curvature.inverse(damping)
            inverse[name] = (
                None
                if curvature.lam_OI is None
                else f(curvature.lam_OI.to(device).double()).to(dtype)
            )
        return cls(tuple(c.block for c in curvatures.values()), bases, inverse)
