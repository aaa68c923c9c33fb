"""The methods of a fit, told apart by what each of them has.

              A and G   Λ from examples' own gradients   rows of a rank-m Fisher
    ekfac        x                   x
    kfac         x
    diagonal                         x
    identity
    mfac                                                            x

Code asks a method for one of these traits, never for its name: a further method is one more line of
:data:`METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from raycurv.errors import UserError

# What a command line offers: the keys of METHODS.
MethodName = Literal["ekfac", "kfac", "diagonal", "identity", "mfac"]


@dataclass(frozen=True)
class Method:
    """How the curvature of a block is approximated.

    Attributes:
        factors: it has Kronecker factors A and G, which are summed up and decomposed.
        corrected: it has eigenvalues Λ that are means of squared per-example gradients: in the
            factors' eigenbases, or where there are no factors, weight by weight.
        ranked: it is a rank-m Fisher, kept as m rows of gradients.
    """

    name: str
    factors: bool = False
    corrected: bool = False
    ranked: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def curved(self) -> bool:
        """Whether there is a curvature at all; the identity is none."""
        return self.factors or self.corrected or self.ranked

    @property
    def per_example(self) -> bool:
        """Whether a fit gathers something of every example's own gradient."""
        return self.corrected or self.ranked

    @property
    def spectral(self) -> bool:
        """Whether a block's curvature is eigenvalues Λ ``[O, I]`` in some basis."""
        return self.factors or self.corrected


METHODS = {
    method.name: method
    for method in (
        Method("ekfac", factors=True, corrected=True),
        Method("kfac", factors=True),
        Method("diagonal", corrected=True),
        Method("identity"),
        Method("mfac", ranked=True),
    )
}


def open_method(name: str) -> Method:
    """The method that a fit's settings, or its manifest, name; UserError if there is none such."""
    if name not in METHODS:
        raise UserError("--method", methods_with(lambda _: True), repr(name), "ekfac is usual.")
    return METHODS[name]


def methods_with(trait: Callable[[Method], bool]) -> str:
    """The names of the methods with a trait, for messages: ``ekfac or kfac``."""
    return " or ".join(method.name for method in METHODS.values() if trait(method))
