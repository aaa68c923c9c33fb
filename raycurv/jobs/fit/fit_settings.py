"""The settings of a fit: its flags on the command line, and what its run.json records."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from raycurv.data.uri import shown
from raycurv.driver.settings import (
    Adapting,
    Capturing,
    Count,
    DataPath,
    DtypeName,
    Execution,
    Globs,
    Identity,
    ModelPath,
    Place,
    Predicting,
    Reading,
    Required,
    Runs,
    Seed,
    bounded,
    check_given,
)
from raycurv.errors import UserError
from raycurv.mathematics.bases import BASES, BasisName, with_a_basis
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.factors import share_outputs
from raycurv.mathematics.methods import MethodName, methods_with, open_method
from raycurv.mathematics.tiles import LARGEST_EIGH, SMALLEST_TILE

# Settings whose flag is repeated for each of several values.
REPEATED = ("adapter", "blocks", "ignore_tensors")
# Gradients of a rank-m Fisher, unless said otherwise.
ROWS = 64
# Passes of a power iteration, unless said otherwise.
PASSES = 3
Passes = Annotated[
    int, bounded("a number of at least 2", lambda n: n >= 2, "One pass gives --basis shampoo.")
]
Width = Annotated[
    int,
    bounded(
        f"a number from {SMALLEST_TILE} to {LARGEST_EIGH} (what LAPACK decomposes)",
        lambda d: SMALLEST_TILE <= d <= LARGEST_EIGH,
        "Some thousands are usual; leave it out to decompose every factor whole.",
    ),
]


@dataclass(frozen=True)
class FitSettings(Execution, Reading, Adapting, Capturing, Predicting):
    """Curvature of a model on a data set, into a run directory."""

    model: Required[ModelPath] = ""
    """Directory with an HF config.json and safetensors weights, `org/name` or `org/name@REVISION`
    on the Hugging Face hub, or `package.module:factory`. A path that exists is a path."""
    ignore_tensors: Identity[Globs] = ()
    """Glob on names of tensors in the model directory that may be left unused, repeatable. Default:
    a tensor that the model does not take, and that could matter, is an error."""
    data: DataPath = ""
    """File, directory or glob of Parquet, Arrow, JSONL, JSON or CSV (text also packed: .gz, .zst,
    .bz2) with `text`, `input_ids`, `prompt` + `completion`, or `inputs` + `labels`; of a model of
    images also `image` or `pixel_values`; or `org/name`, `org/name@REVISION:CONFIG` on the hub."""
    out: Required[Place] = ""
    """Run directory: an absolute path, or a URI that pyarrow.fs understands."""
    method: Identity[MethodName] = "ekfac"
    """Form of the curvature; `mfac`: the Fisher of `--rows` gradients, across blocks."""
    rows: Identity[Count | None] = None
    """How many gradients make the Fisher of `--method mfac`, each of its share of the examples;
    a stage holds so many copies of its weights. Default: 64."""
    fisher: Identity[Literal["sampled", "signs", "empirical"] | None] = None
    """The true Fisher by labels drawn from the model, or by random `signs` in their place, whose
    gradients have the same second moment and less noise; or by the data's own labels. Default:
    `signs`; `sampled` of an objective of your own without the method `signed`, and of a run that
    was begun so."""
    draws: Identity[Count] = 1
    """How many labels, or sets of signs, are drawn for every target."""
    objective: Identity[str | None] = None
    """`causal-lm`, `masked-lm`, `seq2seq-lm`, `classification`, `multi-label`, `regression`,
    `token-classification`, `preference`, or your own as `package.module:Name`. Default: what the
    model directory's `architectures` say it was trained for; of a factory `causal-lm`."""
    blocks: Identity[Globs] = ()
    """Glob on dotted names of modules and parameters, repeatable; `!GLOB` leaves out. `default`:
    every linear layer of the decoder blocks (as without the flag); `all`: every trainable
    parameter. Norms, biases and other vectors are taken by `all` or by a glob whose last part names
    them, such as `*.input_layernorm`."""
    max_factor_dim: Identity[Width | None] = None
    """Widest factor that is decomposed whole; a wider axis is cut into diagonal tiles. At least 8;
    an axis beyond 32,766 cannot be decomposed without."""
    basis: Identity[BasisName] = "kfac"
    """Which factors the eigenbases are of: `kfac`, moments of inputs and of output gradients;
    `weighted`, inputs weighted by the squared norms of the latter; `shampoo`, moments of examples'
    gradients; `kronecker`, the Kronecker product nearest to a block's Fisher."""
    basis_passes: Identity[Passes | None] = None
    """Passes over the data that `--basis kronecker` takes for its factors, steps of a power
    iteration; the first alone would be `shampoo`. Default: 3."""
    share_output_factor: Identity[bool] = False
    """One output factor for the last matrices of all experts of a layer, over the rows of all of
    them; corrected eigenvalues stay each matrix' own. Default: each has its own."""
    max_examples: Identity[Count | None] = None
    """Curvature from a seeded sample of so many examples."""
    seed: Identity[Seed] = 0
    """Seed of the labels or signs that are drawn, and of the sample of `--max-examples`."""
    dtype: Identity[DtypeName] = "float32"
    """Number type that the model computes in."""
    store_dtype: Identity[DtypeName | None] = None
    """Number type of the stored eigenbases and corrected eigenvalues. Default: float32, or float64
    with `--dtype float64`."""
    keep_sums: bool = False
    """Keep the sums of A and G, under factors/, once they are decomposed, and those of Λ: runs can
    then be merged and subtracted, and one that is stored in bfloat16 be extended."""
    gradients: bool = False
    """Also gather gradient statistics, in the same pass: means, squares and noise of each block's
    gradients, norms of each example's. Makes what is missing of a finished run."""
    extend: Identity[Place] = ""
    """Run directory: keep its bases, and add Λ of --data to its own (ekfac and diagonal)."""
    merge: Identity[Runs] = ()
    """Two or more run directories with kept sums: the curvature of all their data, without
    --data."""
    subtract: Identity[Runs] = ()
    """Two or more run directories with kept sums: the curvature of the first run's data without
    that of the others, without --data."""

    def check(self) -> None:
        super().check()
        if self.merge or self.subtract or self.extend:
            self._check_parents()
        if not (self.merge or self.subtract):
            self._check_data()
        if self.rows is not None and not open_method(self.method).ranked:
            raise UserError(
                "--rows", "--method mfac, which is made of them", f"--method {self.method}",
                "Leave --rows out, or give --method mfac.",
            )  # fmt: skip
        if self.share_output_factor and not open_method(self.method).factors:
            raise UserError(
                "--share-output-factor", "a method with factors (ekfac, kfac)",
                f"--method {self.method}", "Leave --share-output-factor out.",
            )  # fmt: skip
        self._check_basis()
        if self.fisher == "empirical" and self.draws != 1:
            raise UserError(
                "--draws", "1 with --fisher empirical, whose labels are the data's own",
                str(self.draws), "Leave --draws out, or use --fisher sampled.",
            )  # fmt: skip

    def _check_basis(self) -> None:
        """Refuse a basis that does not go with the other settings."""
        basis = BASES[self.basis]
        if self.basis_passes is not None and not basis.iterated:
            raise UserError(
                "--basis-passes", "--basis kronecker, which is found by a power iteration",
                f"--basis {basis}", "Leave --basis-passes out, or give --basis kronecker.",
            )  # fmt: skip
        if not basis.own:
            return
        if not open_method(self.method).factors:
            named = methods_with(lambda method: method.factors)
            raise UserError(
                f"--basis {basis}", f"--method {named}, which have factors",
                f"--method {self.method}", "Leave --basis out.",
            )  # fmt: skip
        if self.share_output_factor:
            raise UserError(
                f"--basis {basis}", "factors of each block's own", "--share-output-factor",
                "Leave one of the two out.",
            )  # fmt: skip
        if basis.iterated and (self.merge or self.subtract):
            raise UserError(
                f"--basis {basis}", "sums that can be added up",
                f"--{'merge' if self.merge else 'subtract'} of runs that each have weighted theirs "
                "by the other side",
                "Fit the data anew, or --extend one run by it; or use --basis shampoo in all.",
            )  # fmt: skip

    def factored(self, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        """The blocks, with the factors that these settings give them; UserError if none of them may
        share any, or has any that the basis makes."""
        if BASES[self.basis].own:
            if blocks and not with_a_basis(blocks):
                raise UserError(
                    f"--basis {self.basis}", "a block with a factor that is decomposed",
                    f"diagonal ones alone, the first of {blocks[0].name}",
                    "Leave --basis out, or widen --blocks.",
                )  # fmt: skip
            return tuple(replace(b, input_factor=f"{b.name}.input") for b in blocks)
        if not self.share_output_factor:
            return blocks
        shared = share_outputs(blocks)
        if shared == blocks:
            raise UserError(
                "--share-output-factor", "the last matrices of experts among the blocks", "none",
                "Leave --share-output-factor out, or widen --blocks.",
            )  # fmt: skip
        return shared

    def _check_data(self) -> None:
        check_given([] if self.data else ["--data"])

    def _check_parents(self) -> None:
        """Refuse runs to start from that do not go with the other settings."""
        method = open_method(self.method)
        flag, *more = (f for f in ("extend", "merge", "subtract") if getattr(self, f))
        if more:
            raise UserError(
                f"--{flag}", "one of --extend, --merge and --subtract", f"--{more[0]} too",
                "Make one run after the other.",
            )  # fmt: skip
        if flag == "extend":
            if not method.corrected:
                named = methods_with(lambda method: method.corrected)
                raise UserError(
                    "--extend", f"--method {named}, which have corrected eigenvalues",
                    f"--method {method}", "Fit all the data together.",
                )  # fmt: skip
            if self.gradients:
                raise UserError(
                    "--extend", "no --gradients: only the new data goes through the model",
                    "--gradients", "Leave it out, or fit all the data together.",
                )  # fmt: skip
            return
        runs: tuple[str, ...] = getattr(self, flag)
        if len(runs) < 2:
            raise UserError(
                f"--{flag}", "two or more run directories",
                f"{len(runs)}: {' '.join(map(shown, runs))}",
                f"Give them one after the other: --{flag} RUN_A RUN_B.",
            )  # fmt: skip
        if not method.factors:
            named = methods_with(lambda method: method.factors)
            raise UserError(
                f"--{flag}", f"--method {named}, which have factors to add",
                f"--method {method}", "Fit the data anew, or --extend a run by it.",
            )  # fmt: skip
        for other in ("data", "max_examples"):
            if getattr(self, other):
                name = f"--{other.replace('_', '-')}"
                raise UserError(
                    f"--{flag}", f"no {name}: the examples are those of the runs",
                    f"{name} {shown(str(getattr(self, other)))}", f"Leave {name} out.",
                )  # fmt: skip

    def resolved(self) -> FitSettings:
        """With the defaults that depend on other fields filled in."""
        store = self.store_dtype or ("float64" if self.dtype == "float64" else "float32")
        rows, passes = self.rows, self.basis_passes
        if open_method(self.method).ranked and rows is None:
            rows = ROWS
        if BASES[self.basis].iterated and passes is None:
            passes = PASSES
        return replace(self, store_dtype=store, rows=rows, basis_passes=passes)
