"""The settings of a scoring: its flags on the command line, and what its run.json records."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import tyro

from raycurv.data.bm25 import Matching
from raycurv.data.portion import Selection
from raycurv.driver.settings import (
    INPUT,
    AdapterPaths,
    Capturing,
    Checked,
    Count,
    DampingChoice,
    DataPath,
    DtypeName,
    Execution,
    FromZero,
    Identity,
    InputPath,
    ModelPath,
    Place,
    Positive,
    Predicting,
    Rank,
    Reading,
    Required,
    Seed,
    Size,
    columns_of,
    flag_of,
    places,
    rank_number,
    selected,
)
from raycurv.errors import UserError

# Of a solver that iterates; see docs/refinement.md for what they were measured on.
SOLVER_DEFAULTS: dict[str, Any] = {
    "steps": 10, "tolerance": 1e-3, "matrix": "ggn", "coupling": "model",
}  # fmt: skip
_DESCENT_DEFAULTS = {"steps": 100, "minibatch": 32, "matrix": "ggn", "coupling": "model"}
# By --solver: what may be given, and what it is by default.
_OF_SOLVER: dict[str, dict[str, Any]] = {
    "ekfac": {},
    "cg": SOLVER_DEFAULTS | {"product_examples": None},
    "astra": _DESCENT_DEFAULTS | {"rate": None, "product_examples": None},
}


def _candidates(flag: str, text: str) -> None:
    """UserError for what neither says how candidates are found nor can name a file."""
    if Matching.parse(flag, text) is None:
        places(flag, text)


@dataclass(frozen=True)
class InfluenceSettings(Execution, Reading, Capturing, Predicting):
    """Scores of every query against every training example."""

    run: Required[InputPath] = ""
    """Run directory of a fit."""
    model: ModelPath = ""
    """The fit's model, given again, where it is a `package.module:factory`: a run directory names
    nothing that is imported. Default: the HF directory that the fit was made of."""
    adapter: AdapterPaths = ()
    """The fit's adapters, given again, where they lie elsewhere by now, repeatable. Default: the
    directories that the fit was made of."""
    fit_objective: str = ""
    """The fit's objective, given again, where it is a `package.module:Name` of your own."""
    queries: Required[DataPath] = ""
    """Queries: file, directory, glob or name on the hub, as for the fit's data."""
    train: DataPath = ""
    """Training examples that are scored: file, directory, glob or name on the hub, as for the
    fit's data."""
    queries_split: str = ""
    """Which split of --queries, as --split of --train."""
    queries_columns: str = ""
    """What --queries calls its columns, such as `text=question,id=key`, where they have not the
    names of --train."""
    candidates: Annotated[str, INPUT, Checked(_candidates)] = ""
    """Which training examples each query is scored on: `bm25:K`, the K that share most of its rarer
    words (Okapi BM25, k1 = 1.5; `bm25:K,b=0.75,over=words` by default: b from 0 to 1 divides by
    length, `over=tokens` matches token ids), or a table of the columns `query_id` and `train_id`.
    Only these go through the model; other pairs have no row. Default: all."""
    candidates_check: FromZero = 0
    """Measure on so many queries (a seeded sample) how many of the exact 10 highest scores, and how
    much of the positive ones, the candidates hold. It costs a pass over all training examples, as
    scoring without --candidates does."""
    objective: Identity[str | None] = None
    """What of a query is measured: the `measurement` of your own `package.module:Name`, which may
    read further columns of the queries (see raycurv.Objective). Default: the fit's objective, whose
    loss training examples have in any case."""
    out: Required[Place] = ""
    """Where scores go: an absolute path, or a URI that pyarrow.fs understands."""
    damping: Identity[DampingChoice | None] = None
    """What is added to eigenvalues: this factor times each block's mean eigenvalue, or the same
    number for all as `abs:1e-6`. Or a word that chooses: `evidence` the number for all of the
    largest Laplace evidence of the fit's examples and the trained weights; `heldout` the factor
    whose scores foretell best what --removals did.
    Default: 0.1, and 3 with a solver, whose answers fit retraining worse with less."""
    removals: Annotated[str, INPUT, Checked(places)] = ""
    """What retraining did, for `--damping heldout`: a table with a row for each retraining, of the
    columns `removed` (ids of the training examples that it was without), `query_ids` and `measured`
    (what was then measured of each of these queries: the loss, where no --objective says
    otherwise)."""
    solver: Identity[Literal["ekfac", "cg", "astra"]] = "ekfac"
    """How IHVPs are made: of the fit's curvature alone (`ekfac`, whatever the fit's --method), or
    by conjugate gradients with exact products of the fit's examples (`cg`), which that curvature
    preconditions: each step is a pass over these examples. Or by descent with products of
    minibatches of them, preconditioned likewise (`astra`): each step is a pass over one."""
    steps: Identity[Count | None] = None
    """With --solver: steps at most. Default: 10 of cg, 100 of astra."""
    minibatch: Identity[Count | None] = None
    """With --solver astra: examples of a minibatch at most. Default: 32."""
    rate: Identity[Positive | None] = None
    """With --solver astra: the learning rate, which has no unit. Default: of each query half of
    1 / λ_max of its preconditioned system, as 5 steps of cg on the first minibatch find it."""
    tolerance: Identity[Positive | None] = None
    """With --solver cg: a query stops at this relative residual. Default: 1e-3."""
    matrix: Identity[Literal["ggn", "hessian", "fisher"] | None] = None
    """With --solver, what the products are of: the Gauss-Newton matrix, the Hessian of the loss (cg
    alone), which may have negative curvature (refused when it is met), or the Fisher of drawn
    labels. Default: ggn."""
    coupling: Identity[Literal["model", "blocks"] | None] = None
    """With --solver cg, what is solved: one system of the whole `model`, or one of each block alone
    (`blocks`), for which a pass has a direction for each query and block. Default: model."""
    product_examples: Identity[Count | None] = None
    """With --solver: products of a seeded sample of so many of the fit's examples. Default: all
    of them."""
    certify: FromZero = 0
    """Measure on so many queries (a seeded sample; 4 say much) how far their answers are from those
    to the damped Gauss-Newton matrix, by exact products: see tables/certificate, and the last
    lines. It costs --certify-steps passes of so many products; 0, none."""
    certify_steps: Count | None = None
    """With --certify: steps of conjugate gradients at most. Default: --steps, or 10."""
    certify_examples: Count | None = None
    """With --certify: products of a seeded sample of so many examples. Default: all of them."""
    certify_on: Literal["fit", "train"] | None = None
    """With --certify, whose products: those of the examples of the `fit`, or of `train`. Default:
    `train` where these are as many as the fit's or more, and with a solver `fit`."""
    rank: Identity[Rank] = "32"
    """Rank that IHVPs are truncated to, or `full`."""
    query_memory: Size = "2GiB"
    """Memory of a stage for IHVPs; as many queries share a pass over the training data as fit into
    it."""
    inverse: Identity[Literal["model", "block"] | None] = None
    """With a fit of `--method mfac`, what is inverted: the Fisher of the whole model, or each
    block's own. Default: model."""
    top_k: Identity[Count | None] = None
    """Keep only each query's k highest and k lowest scores."""
    per_block: Identity[bool] = False
    """Also write every block's own scores."""
    per_token: Identity[bool] = False
    """Also write the scores of a training example's tokens."""
    self_influence: Identity[Annotated[bool, tyro.conf.arg(name="self")]] = False
    """Also score every training example against itself (full rank), to `self/`: beside the scores
    of queries, of which there must be one."""
    ihvp: Identity[bool] = False
    """Also write the queries' IHVPs, one safetensors file a block, to `ihvp/`."""
    seed: Identity[Seed] = 0
    """Seed of the random matrices that IHVPs are truncated with, and of the sample of
    `--max-examples`."""
    max_examples: Identity[Count | None] = None
    """Score a seeded sample of so many training examples."""
    dtype: Identity[DtypeName | None] = None
    """Number type that the model computes in. Default: the fit's."""

    def check(self) -> None:
        if self.self_influence and not self.queries:
            raise UserError(
                "--queries", "queries, beside whose scores --self is written", "nothing",
                "Give --queries: where self-influence alone is wanted, a file of one example.",
            )  # fmt: skip
        super().check()
        self._check_solver()
        self._check_certificate()
        if not self.train and not self.ihvp:
            raise UserError("--train", "training examples", "nothing", "Give --train, or --ihvp.")
        if self.candidates and not self.train:
            raise UserError(
                "--candidates", "training examples (--train)", "none", "Give --train as well."
            )
        if (self.damping == "heldout") != bool(self.removals):
            given = self.removals or "none"
            raise UserError(
                "--removals", "removals that were tried with --damping heldout, and none without",
                f"{given} with --damping {self.damping}", "Give both, or neither.",
            )  # fmt: skip
        if self.removals and not self.train:
            raise UserError(
                "--removals", "training examples (--train), whose removal it is", "none",
                "Give --train as well.",
            )  # fmt: skip
        if self.candidates_check and not self.candidates:
            raise UserError(
                "--candidates-check", "candidates to look at", "none",
                "Give --candidates, or leave it out.",
            )  # fmt: skip

    def _check_solver(self) -> None:
        for name in {name: None for of in _OF_SOLVER.values() for name in of}:
            if getattr(self, name) is not None and name not in _OF_SOLVER[self.solver]:
                other = next(one for one, of in _OF_SOLVER.items() if name in of)
                raise UserError(
                    flag_of(name), "a solver that iterates" if self.solver == "ekfac" else
                    f"--solver {other}", f"--solver {self.solver}",
                    f"Give --solver {other}, or leave it out.",
                )  # fmt: skip
        if self.solver == "astra":
            self._check_descent()
        if self.solver == "ekfac":
            return
        if self.damping == "heldout":
            raise UserError(
                "--damping heldout", "a damping that is chosen for the solver",
                "one that is chosen by scores of --solver ekfac",
                f"Give a number (3 is the default of --solver {self.solver}).",
            )  # fmt: skip
        elif self.self_influence:
            raise UserError(
                "--self", "self-influence under the fit's own curvature",
                f"--solver {self.solver}, which does not solve for every training example",
                "Leave --self out, or score it by --solver ekfac into another directory.",
            )  # fmt: skip

    def _check_descent(self) -> None:
        for flag, given, expected, why in (
            ("--coupling blocks", self.coupling == "blocks", "the system of the whole model", ""),
            ("--matrix hessian", self.matrix == "hessian", "a matrix of no negative curvature",
             ", which would not see it"),
            ("--certify", self.certify > 0, "a run whose answers are of the fit's curvature, or of "
             "conjugate gradients", ""),
        ):  # fmt: skip
            if given:
                raise UserError(
                    flag, expected, f"--solver astra{why}", "Give --solver cg, or leave it out."
                )

    def _check_certificate(self) -> None:
        if not self.certify:
            for name in ("certify_steps", "certify_examples", "certify_on"):
                if getattr(self, name) is not None:
                    raise UserError(
                        flag_of(name), "a certificate", "none",
                        "Give --certify 4, or leave it out.",
                    )  # fmt: skip
        elif self.coupling == "blocks":
            raise UserError(
                "--certify", "answers to the system of the whole model", "--coupling blocks",
                "Leave one of the two out; tables/solver has the residuals of single blocks.",
            )  # fmt: skip
        elif self.certify_on == "train" and not self.train:
            raise UserError(
                "--certify-on train", "training examples (--train)", "none", "Give --train as well."
            )

    def resolved(self) -> InfluenceSettings:
        """With the defaults that depend on the solver."""
        solves = self.solver != "ekfac"
        usual = {"damping": "3" if solves else "0.1"} | _OF_SOLVER[self.solver]
        missing = {name: value for name, value in usual.items() if getattr(self, name) is None}
        return replace(super().resolved(), **missing)

    def select(self, name: str, source: Any) -> Any:
        """See :meth:`Reading.select`; queries have a split of their own, and may have columns."""
        found = super().select(name, source)
        if name != "queries":
            return found
        columns = found.columns if isinstance(found, Selection) else {}
        flag = "--queries-columns"
        if self.queries_columns:
            columns = columns_of(flag, self.queries_columns)
        return selected(source, self.queries_split, columns, "--queries-split", flag)

    def rank_number(self) -> int | None:
        """The rank that IHVPs are truncated to; ``None`` for full."""
        return rank_number(self.rank)
