"""Settings of a spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from raycurv.driver.settings import (
    INPUT,
    Adapting,
    Checked,
    Count,
    DataPath,
    DtypeName,
    Execution,
    FromZero,
    Globs,
    Identity,
    InputPath,
    ModelPath,
    Place,
    Predicting,
    Reading,
    Required,
    Seed,
    places,
)
from raycurv.errors import UserError


@dataclass(frozen=True)
class SpectrumSettings(Execution, Reading, Adapting, Predicting):
    """Traces of blocks, extreme eigenvalues and the density of all, of a model's curvature."""

    run: InputPath = ""
    """Run directory of a fit, whose model, data, objective and blocks are taken; the trace of what
    was fitted then stands beside the exact one."""
    model: ModelPath = ""
    """Without --run: directory with an HF config.json and safetensors weights, a name on the
    Hugging Face hub, or `package.module:factory`. With --run: the fit's model, given again, where
    it is such a factory."""
    ignore_tensors: Identity[Globs] = ()
    """Glob on names of tensors in the model directory that may be left unused, repeatable."""
    data: DataPath = ""
    """Examples, as a fit takes them. Default: those of --run."""
    out: Required[Place] = ""
    """Where results go: an absolute path, or a URI that pyarrow.fs understands."""
    objective: Identity[str | None] = None
    """Whose loss it is, as for a fit. Default: the fit's, or what the model was trained for."""
    matrix: Identity[Literal["ggn", "hessian", "fisher", "empirical"]] = "ggn"
    """Which matrix, a mean over examples: `ggn`, the Gauss-Newton matrix; `hessian`, of the loss;
    `fisher`, of labels drawn from the model; `empirical`, of the data's own."""
    draws: Identity[Count] = 1
    """Sets of labels that are drawn for `--matrix fisher`."""
    blocks: Identity[Globs] = ()
    """Glob on names of blocks whose part of the matrix is meant, repeatable (`!GLOB` leaves out):
    one name for a single block. Default: the fit's blocks, or those that a fit would choose."""
    max_examples: Identity[Count | None] = None
    """Take a seeded sample of so many examples."""
    seed: Identity[Seed] = 0
    """Seed of random vectors, of drawn labels, and of the sample of `--max-examples`."""
    dtype: Identity[DtypeName | None] = None
    """Number type that the model computes in. Default: the fit's, or float32."""
    traces: Identity[Literal["xtrace", "hutch++", "hutchinson", "none"]] = "xtrace"
    """How the blocks' traces are estimated, all from the same products: `xtrace` (two products a
    random vector), `hutch++` (three for every two), `hutchinson` (one), or not at all."""
    probes: Identity[Count] = 8
    """Random vectors for traces, and for --diagonal: 4 at least."""
    diagonal: Identity[bool] = False
    """Also write every block's diagonal with its standard errors, to `diagonal/`."""
    steps: Identity[FromZero] = 16
    """Steps of Lanczos' method for eigenvalues and the density; 0 for neither."""
    columns: Identity[Count] = 4
    """Random vectors that it starts from and multiplies at each step. As many equal eigenvalues are
    told apart, and the density's error is that over so many vectors."""
    pairs: Identity[FromZero] = 5
    """Eigenvalues of either end that are written, with their residuals."""
    eigenvectors: Identity[bool] = False
    """Also write the eigenvectors of these, one safetensors file a block, to `eigenvectors/`."""
    sizes: Identity[bool] = False
    """Also find the largest eigenvalue on half and on a quarter of the examples, and from these how
    much too large it is for their number."""
    direction: Annotated[str, INPUT, Checked(places)] = ""
    """A step from the model, along which the loss and its curvature are told: another checkpoint of
    the same model (less this one), or a safetensors file of an update, by names of weights."""
    at_once: Count = 8
    """Vectors that are multiplied in one pass over the examples: more take less time each, and more
    memory."""
    picture: Place | None = None
    """Where a picture goes, a .png or .svg: the density, and the blocks' traces. Takes matplotlib
    (`pip install 'raycurv[report]'`)."""

    def check(self) -> None:
        super().check()
        if not self.run and not (self.model and self.data):
            raise UserError(
                "--run", "a fit, or --model and --data", "neither",
                "Give --run RUN, or --model M --data D.",
            )  # fmt: skip
        if self.probes < 4:
            raise UserError(
                "--probes", "at least 4, or there is no standard error", str(self.probes), ""
            )
        if self.traces == "none" and self.diagonal:
            raise UserError(
                "--diagonal", "random vectors (--traces)", "--traces none",
                "Give --traces hutchinson, or leave --diagonal out.",
            )  # fmt: skip
        if self.steps == 0 and (self.eigenvectors or self.sizes):
            flag = "--eigenvectors" if self.eigenvectors else "--sizes"
            raise UserError(flag, "steps of Lanczos' method", "--steps 0", "Leave --steps out.")
        if self.traces == "none" and self.steps == 0 and not self.direction:
            raise UserError(
                "--traces none --steps 0", "something to measure", "nothing",
                "Leave one of them out, or give --direction.",
            )  # fmt: skip
