"""Settings of pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from raycurv.driver.settings import (
    AdapterPaths,
    Count,
    DampingText,
    Execution,
    Globs,
    Identity,
    InputPath,
    ModelPath,
    Place,
    Required,
    Seed,
    bounded,
)
from raycurv.errors import UserError
from raycurv.mathematics.pruning.structures import NofM

# Share of the weights that go, unless said otherwise.
SPARSITY = 0.5

Share = Annotated[
    float, bounded("a share from 0 on and below 1", lambda x: 0 <= x < 1, "0.5 removes a half.")
]
Tolerance = Annotated[float, bounded("above 0", lambda x: x > 0, "1e-4 is usual.")]


@dataclass(frozen=True)
class PruneSettings(Execution):
    """Removes the weights of a fitted model that the loss needs least, and moves the others to make
    up for them."""

    run: Required[InputPath] = ""
    """Run directory of a fit."""
    model: ModelPath = ""
    """The fit's model, given again, where it is a `package.module:factory`: a run directory names
    nothing that is imported. Default: the HF directory that the fit was made of."""
    adapter: AdapterPaths = ()
    """The fit's adapters, given again, where they lie elsewhere by now, repeatable. Default: the
    directories that the fit was made of."""
    objective: str = ""
    """The fit's objective, given again, where it is a `package.module:Name` of your own."""
    out: Required[Place] = ""
    """Where the pruned checkpoint, saliencies and masks go: an absolute path, or a URI that
    pyarrow.fs understands."""
    sparsity: Identity[Share | None] = None
    """Share of the weights (rows, heads) that is gone in the end, from 0 on and below 1; what was
    zero before counts, and stays zero even where that is more. Default: 0.5; `N:M` says its
    own."""
    structure: Identity[str] = "unstructured"
    """What goes: `unstructured`, single weights; `N:M` such as 2:4, where N of each M consecutive
    inputs of every output stay; `rows`, whole outputs with their bias; `heads`, all that an
    attention output projection reads of a head."""
    saliency: Identity[Literal["obs", "obd", "magnitude"]] = "obs"
    """`obs` (Optimal Brain Surgeon): the rise of the loss once the other weights have moved; `obd`
    (Optimal Brain Damage): with the others where they are; `magnitude`: squares of weights."""
    scope: Identity[Literal["global", "block"]] = "global"
    """Whether what goes is chosen among all blocks together or in each block by itself."""
    revive: Identity[bool] = False
    """Let weights that are zero in the checkpoint take part as any others. Default: they stay zero,
    and count as removed."""
    no_update: Identity[bool] = False
    """Leave the remaining weights where they are."""
    damping: Identity[DampingText] = "0.1"
    """What is added to eigenvalues: this factor times each block's mean eigenvalue, or the same
    number for all as `abs:1e-6`."""
    inverse: Identity[Literal["model", "block"] | None] = None
    """With a fit of `--method mfac`, what is inverted: the Fisher of the whole model, or each
    block's own. Default: model."""
    first_order: Identity[bool] = False
    """Count the mean gradient in, too, for a model that has not converged. Takes a fit with
    `--gradients`."""
    steps: Identity[Count] = 1
    """In so many steps, the same share of what is left in each, with the curvature fitted again in
    between."""
    blocks: Identity[Globs] = ()
    """Glob on the names of the fit's blocks, repeatable; `!GLOB` leaves out. Default: all."""
    tolerance: Identity[Tolerance] = 1e-4
    """How exactly the equations for the remaining weights are solved: the relative residual at the
    end."""
    iterations: Identity[Count] = 300
    """Steps of conjugate gradients for these equations, at most."""
    measure: Identity[Literal["total", "blocks", "none"]] = "total"
    """What rise of the loss is measured: of the pruned model, of each block alone as well, or
    none."""
    measure_examples: Identity[Count] = 512
    """How many of the fit's examples, a seeded sample, the rise is measured on."""
    seed: Identity[Seed] = 0
    """Seed of the sample of `--measure-examples`."""

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            UserError: naming the flag.
        """
        super().check()
        pattern = self.pattern()
        if pattern is not None and self.sparsity is not None:
            raise UserError(
                "--sparsity", f"none with --structure {pattern}, which says its own",
                f"{self.sparsity:g}", "Leave --sparsity out.",
            )  # fmt: skip
        if pattern is not None and self.steps > 1:
            raise UserError(
                "--steps", f"1 with --structure {pattern}", str(self.steps), "Leave --steps out."
            )

    def pattern(self) -> NofM | None:
        """The N:M pattern, if that is the structure.

        Raises:
            UserError: no structure of that name.
        """
        if self.structure in ("unstructured", "rows", "heads"):
            return None
        if ":" not in self.structure:
            raise UserError(
                "--structure", "unstructured, rows, heads, or N:M such as 2:4",
                repr(self.structure), "2:4 keeps 2 of each 4 inputs.",
            )  # fmt: skip
        try:
            return NofM.parse(self.structure)
        except UserError as error:
            raise UserError("--structure", error.expected, error.got, error.remedy) from error

    def share(self, step: int, zero: float = 0.0) -> float:
        """The share that is gone after a step, counted from 1, where some was before the first."""
        final = SPARSITY if self.sparsity is None else self.sparsity
        if step == self.steps or final <= zero:
            return final
        left = 1.0 - zero
        return 1.0 - left * float(((1.0 - final) / left) ** (step / self.steps))
