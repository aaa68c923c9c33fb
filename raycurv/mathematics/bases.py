"""Which Kronecker factors a fit's eigenbases are of (``--basis``), M being an example's ``∇W``.

                 A                               G                            F of a block ≈
    kfac         mean a aᵀ over rows             mean g gᵀ over rows          rows · G ⊗ A
    weighted     mean |g|² a aᵀ over rows        mean g gᵀ over rows          rows · G ⊗ A / tr G
    shampoo      mean MᵀM over examples          mean M Mᵀ over examples      G ⊗ A / tr G
    kronecker    mean Mᵀ G' M, G' the last G     mean M A' Mᵀ, A' likewise    G ⊗ A / |G|

A' and G' have the Frobenius norm 1. K-FAC takes the products of the eigenvalues of the two for Λ,
EK-FAC their eigenvectors alone. Whatever is not kfac's is a block's own: blocks that read one
tensor have other output gradients, and so do not share A.

Of one row an example and gradients of one direction, as of two classes, ``weighted`` is exact.
``shampoo`` is Shampoo's pair (Gupta, Koren & Singer 2018, arXiv:1802.09568), the first step of the
power iteration for the nearest Kronecker product (Morwani et al. 2024, arXiv:2406.17748,
proposition 1), whose further steps are ``kronecker`` (Van Loan & Pitsianis 1993; Koroko et al.
2022, arXiv:2201.10285).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from raycurv.mathematics.blocks import Block

# What a command line offers: the keys of BASES.
BasisName = Literal["kfac", "weighted", "shampoo", "kronecker"]


@dataclass(frozen=True)
class Basis:
    """Which factors are summed up.

    Attributes:
        weighted: A is weighted by the squared norms of the output gradients.
        per_example: they are moments of examples' gradients, and not of rows.
        iterated: each comes of the other's last, by power iteration.
    """

    name: str
    weighted: bool = False
    per_example: bool = False
    iterated: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def own(self) -> bool:
        """Whether every block has an input factor of its own."""
        return self.weighted or self.per_example

    def scale(self, rows: float, outputs: Tensor) -> float:
        """What the products of eigenvalues of A and G are multiplied by to be K-FAC's Λ.

        Args:
            rows: of an example, on the mean.
            outputs: eigenvalues of G.
        """
        if not self.own:
            return rows
        size = float(outputs.norm() if self.iterated else outputs.sum())
        return (1.0 if self.per_example else rows) / size if size else 0.0


BASES = {
    basis.name: basis
    for basis in (
        Basis("kfac"),
        Basis("weighted", weighted=True),
        Basis("shampoo", per_example=True),
        Basis("kronecker", per_example=True, iterated=True),
    )
}


def with_a_basis(blocks: tuple[Block, ...]) -> list[Block]:
    """The blocks that have a factor with more than a diagonal: of others every basis is the
    same."""
    return [block for block in blocks if not (block.input_diagonal and block.output_diagonal)]
