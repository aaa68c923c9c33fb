"""Settings of the jobs: one dataclass each, checked before anything starts.

The command lines are made from these classes; what a field's docstring says is its ``--help``.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from numbers import Integral
from typing import Annotated, Any, Literal, Protocol, get_args, get_origin, get_type_hints

import torch
import tyro

from raycurv.data.uri import shown
from raycurv.errors import UserError
from raycurv.mathematics.curvature import Damping
from raycurv.mathematics.methods import MethodName, methods_with, open_method
from raycurv.mathematics.tiles import LARGEST_EIGH, SMALLEST_TILE
from raycurv.stages.failures import Limits

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
# Gradients of a rank-m Fisher, unless said otherwise.
ROWS = 64
# Stands for the path of a model or of data that a Python caller holds.
IN_MEMORY = "in memory"
DtypeName = Literal["float32", "bfloat16", "float64"]
Blocks = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True)
class Execution:
    """How the work is run; every field is free to change between a run and its continuation."""

    stages: int | None = None
    """Into how many stages the model's layers are cut. Default: 1; swept: a stage for each layer
    that the model can be cut behind."""
    schedule: Literal["pipelined", "swept"] = "pipelined"
    """`pipelined`: every stage resident, an actor each, one forward, one backward. `swept`: one
    after the other, with what passes between them on disk: memory is that of one stage."""
    homes: int = 1
    """How many stages are resident at a time in a swept run, an actor each."""
    replicas: int = 1
    """Copies of every resident stage, each on its own part of the data."""
    spool_dir: str | None = None
    """Local directory for what a swept run keeps between stages. Default: below --out."""
    batch_tokens: int = 4096
    """Tokens of a microbatch, padding included (examples, where there is no token axis)."""
    logits_chunk: int = 2**24
    """Logits formed at once (numbers): head and loss run on slices of positions of this size."""
    address: str | None = None
    """Ray cluster: `local` (a Ray of its own), `auto`, `HOST:PORT`, or `none` to run everything in
    this process without Ray. Default: RAY_ADDRESS when set, else `local`."""
    commit_seconds: float | None = None
    """Seconds between two commits of a pass: a restart repeats at most so much of it. Default: 60,
    or ten times what writing one takes."""
    cpus_per_stage: float | None = None
    """Cores that a stage's actor reserves in the cluster. Default: 1, or a part of one in a Ray of
    the job's own that has fewer cores than actors."""
    transport: Literal["auto", "object-store", "distributed"] = "auto"
    """How hidden states and gradients go from stage to stage: through Ray's object store, or from
    process to process (NCCL between GPUs, else TCP); `auto` takes the latter on GPUs."""
    place_seconds: float = 300.0
    """Seconds to wait for room in the cluster, for an autoscaler say, before that is an error."""
    hang_seconds: float = 1800.0
    """Seconds without any progress after which an actor counts as hung: it is ended, and built
    again."""
    max_failures: int = 20
    """Actors and tasks that a run may lose; they are built or run again, from the last commit."""
    max_actor_failures: int = 5
    """Times that one actor may be lost."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where stages compute; `auto` takes a GPU when there is one."""
    log: Literal["text", "json"] = "text"
    """What is told on stderr: `text` for a person, or `json`, one object a line."""
    force: bool = False
    """Start even what cannot fit on this machine's memory or disk."""

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            UserError: naming the flag.
        """
        _check_types(self)
        for flag in ("stages", "homes", "replicas", "batch_tokens", "logits_chunk"):
            if getattr(self, flag) is not None:
                check_positive(flag, getattr(self, flag))
        for flag in ("commit_seconds", "cpus_per_stage", "place_seconds", "hang_seconds"):
            value = getattr(self, flag)
            if value is not None and not value > 0:
                raise UserError(f"--{flag.replace('_', '-')}", "above 0", str(value), "")
        for flag in ("max_failures", "max_actor_failures"):
            if getattr(self, flag) < 0:
                raise UserError(
                    f"--{flag.replace('_', '-')}", "at least 0", str(getattr(self, flag)), ""
                )

    @property
    def cluster(self) -> str:
        """The address, defaults filled in."""
        return self.address or os.environ.get("RAY_ADDRESS") or "local"

    def limits(self) -> Limits:
        """What failures are borne."""
        return Limits(
            self.max_failures, self.max_actor_failures, self.hang_seconds, self.place_seconds
        )

    def stage_count(self, units: int) -> int:
        """How many stages there are of a model that can be cut into ``units``."""
        return self.stages or (units if self.schedule == "swept" else 1)


@dataclass(frozen=True)
class Reading:
    """How examples are read; every field is part of what a result means."""

    max_length: int | None = None
    """Longest example in tokens; by default the model's own limit."""
    long: Literal["error", "truncate", "split"] = "error"
    """What becomes of a longer example: an error, its head, or pieces with ids `id#0`, `id#1`, …"""


@dataclass(frozen=True)
class FitSettings(Execution, Reading):
    """Curvature of a model on a data set, into a run directory."""

    model: str = ""
    """Directory with an HF config.json and safetensors weights, or `package.module:factory`."""
    data: str = ""
    """File, directory or glob of Parquet, JSONL or Arrow with `text`, `input_ids`,
    `prompt` + `completion`, or `inputs` + `labels`."""
    out: str = ""
    """Run directory: an absolute path, or a URI that pyarrow.fs understands."""
    method: MethodName = "ekfac"
    """Form of the curvature; `mfac`: the Fisher of `--rows` gradients, across blocks."""
    rows: int | None = None
    """How many gradients make the Fisher of `--method mfac`, each of its share of the examples;
    a stage holds so many copies of its weights. Default: 64."""
    fisher: Literal["sampled", "empirical"] = "sampled"
    """Labels drawn from the model (the true Fisher), or the data's own."""
    draws: int = 1
    """Labels drawn for every target."""
    objective: str = "causal-lm"
    """`causal-lm`, `classification`, `regression`, or your own as `package.module:Name`."""
    blocks: Blocks = ()
    """Glob on dotted module names, repeatable; `!GLOB` leaves out. By default every linear layer of
    the decoder blocks."""
    max_factor_dim: int | None = None
    """Widest factor that is decomposed whole; a wider axis is cut into diagonal tiles. At least 8;
    an axis beyond 32,766 cannot be decomposed without."""
    max_examples: int | None = None
    """Curvature from a seeded sample of so many examples."""
    seed: int = 0
    """Of the drawn labels and of the sample."""
    dtype: DtypeName = "float32"
    """Of the model's computation."""
    store_dtype: DtypeName | None = None
    """Of the stored eigenbases and corrected eigenvalues; by default float32, float64 with
    `--dtype float64`."""
    keep_sums: bool = False
    """Keep the sums of A and G, under factors/, once they are decomposed, and those of Λ. To merge
    or subtract runs takes the first, to extend one that is stored in bfloat16 the second."""
    gradients: bool = False
    """Also gather gradient statistics, in the same pass: means, squares and noise of each block's
    gradients, norms of each example's. Makes what is missing of a finished run."""
    extend: str = ""
    """Run directory: keep its bases, and add Λ of --data to its own (ekfac and diagonal)."""
    merge: tuple[str, ...] = ()
    """Two or more run directories with kept sums: the curvature of all their data, without
    --data."""
    subtract: tuple[str, ...] = ()
    """Likewise: the curvature of the first run's data without those of the others."""

    # What a result means: a change is refused on the same directory.
    IDENTITY = (
        "model",
        "data",
        "blocks",
        "method",
        "rows",
        "fisher",
        "objective",
        "draws",
        "seed",
        "dtype",
        "store_dtype",
        "max_length",
        "long",
        "max_factor_dim",
        "max_examples",
        "extend",
        "merge",
        "subtract",
    )

    def check(self, in_memory: bool = False) -> None:
        super().check()
        check_given(self, "out")
        if not in_memory:
            check_given(self, "model")
        if self.merge or self.subtract or self.extend:
            self._check_parents()
        if not (in_memory or self.merge or self.subtract):
            check_given(self, "data")
        check_positive("draws", self.draws)
        if self.rows is not None:
            check_positive("rows", self.rows)
            if not open_method(self.method).ranked:
                raise UserError(
                    "--rows", "--method mfac, which is made of them", f"--method {self.method}",
                    "Leave --rows out, or give --method mfac.",
                )  # fmt: skip
        if self.fisher == "empirical" and self.draws != 1:
            raise UserError(
                "--draws",
                "1 with --fisher empirical, whose labels are the data's own",
                str(self.draws),
                "Leave --draws out, or use --fisher sampled.",
            )
        widest = self.max_factor_dim
        if widest is not None and not SMALLEST_TILE <= widest <= LARGEST_EIGH:
            raise UserError(
                "--max-factor-dim",
                f"a number from {SMALLEST_TILE} to {LARGEST_EIGH} (what LAPACK decomposes)",
                str(widest),
                "Some thousands are usual; leave it out to decompose every factor whole.",
            )
        for flag in ("max_length", "max_examples"):
            if getattr(self, flag) is not None:
                check_positive(flag, getattr(self, flag))

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
        rows = self.rows
        if open_method(self.method).ranked and rows is None:
            rows = ROWS
        return dataclasses.replace(self, store_dtype=store, rows=rows)


@dataclass(frozen=True)
class PlanSettings(FitSettings):
    """What a fit and a scoring would take, without running them: takes every flag of fit.py.

    Of an HF model, config.json is enough. Without --stages, as few as fit.
    """

    out: str = "."
    """Where results would go: its free disk is what there is, its speed is measured."""
    examples: int = 10_000
    """Examples of the fit, without --data."""
    tokens: int = 512
    """Tokens of each example, without --data."""
    queries: int = 100
    """Queries of the scoring, of --tokens each."""
    train_examples: int | None = None
    """Training examples of the scoring. Default: those of the fit."""
    rank: str = "32"
    """Rank that IHVPs are truncated to, or `full`."""
    query_memory: str = "2GiB"
    """Memory of a stage for IHVPs."""
    self_influence: Annotated[bool, tyro.conf.arg(name="self")] = False
    """Also score every training example against itself."""
    ihvp: bool = False
    """Also write the queries' IHVPs."""
    nodes: int | None = None
    """Machines that share the stages. Default: this one; with --memory, one for each stage."""
    memory: str | None = None
    """Memory of a node, such as 128GB. Default: what this machine has left."""
    disk: str | None = None
    """Disk for the results. Default: what is free at --out."""
    gpus: int = 0
    """GPUs that stages compute on, evenly shared; 0 for CPUs."""
    gpu_memory: str = "80GB"
    """Memory of a GPU."""
    json: bool = False
    """Print nothing but the plan as one line of JSON."""

    def check(self, in_memory: bool = False) -> None:
        super().check(in_memory=True)
        check_given(self, "model")
        for flag in ("examples", "tokens", "queries", "train_examples", "replicas", "nodes"):
            if getattr(self, flag) is not None:
                check_positive(flag, getattr(self, flag))
        for flag in ("query_memory", "memory", "disk", "gpu_memory"):
            if getattr(self, flag) is not None:
                parse_bytes(f"--{flag.replace('_', '-')}", getattr(self, flag))
        rank_number(self.rank)
        if self.gpus < 0:
            raise UserError("--gpus", "a number of at least 0", str(self.gpus), "")


@dataclass(frozen=True)
class InfluenceSettings(Execution, Reading):
    """Scores of every query against every training example."""

    run: str = ""
    """Run directory of a fit."""
    queries: str = ""
    """Queries: file, directory or glob, as for the fit's data."""
    train: str = ""
    """Training examples, likewise."""
    out: str = ""
    """Where scores go: an absolute path, or a URI that pyarrow.fs understands."""
    damping: str = "0.1"
    """A factor of each block's mean eigenvalue, or `abs:1e-6` for one number."""
    rank: str = "32"
    """Rank that IHVPs are truncated to, or `full`."""
    query_memory: str = "2GiB"
    """Memory of a stage for IHVPs; as many queries share a pass over the training data as fit."""
    inverse: Literal["model", "block"] | None = None
    """Of a fit with `--method mfac`: the inverse of the whole model's Fisher, or of each block's
    own. Default: model."""
    top_k: int | None = None
    """Keep only each query's k highest and k lowest scores."""
    per_block: bool = False
    """Also write every block's own scores."""
    per_token: bool = False
    """Also write the scores of a training example's tokens."""
    self_influence: Annotated[bool, tyro.conf.arg(name="self")] = False
    """Also score every training example against itself (full rank), to `self/`."""
    ihvp: bool = False
    """Also write the queries' IHVPs, one safetensors file a block, to `ihvp/`."""
    seed: int = 0
    """Of the truncated SVD's test matrices."""
    max_examples: int | None = None
    """Score a seeded sample of so many training examples."""
    dtype: DtypeName | None = None
    """Of the model's computation; by default the fit's."""
    IDENTITY = (
        "run",
        "queries",
        "train",
        "damping",
        "rank",
        "inverse",
        "seed",
        "dtype",
        "max_length",
        "long",
        "max_examples",
        "top_k",
        "per_block",
        "per_token",
        "self_influence",
        "ihvp",
    )

    def check(self, has_train: bool = True) -> None:
        """Refuse what cannot work; without training examples only IHVPs are made."""
        super().check()
        check_given(self, "run", "queries", "out")
        if not has_train and not self.ihvp:
            raise UserError("--train", "training examples", "nothing", "Give --train, or --ihvp.")
        Damping.parse(self.damping)
        self.rank_number()
        parse_bytes("--query-memory", self.query_memory)
        for flag in ("top_k", "max_length", "max_examples"):
            if getattr(self, flag) is not None:
                check_positive(flag, getattr(self, flag))

    def rank_number(self) -> int | None:
        """The rank; ``None`` for full."""
        return rank_number(self.rank)


def rank_number(rank: str) -> int | None:
    """A rank as a number; ``None`` for full.

    Raises:
        UserError: neither a positive number nor ``full``.
    """
    if rank == "full":
        return None
    if not rank.isdecimal() or int(rank) < 1:
        raise UserError("--rank", "a positive number or `full`", repr(rank), "")
    return int(rank)


@dataclass(frozen=True)
class EvaluateSettings(Execution, Reading):
    """Loss, perplexity and accuracy of a model on a data set."""

    model: str = ""
    """Directory with an HF config.json and safetensors weights, or `package.module:factory`."""
    data: str = ""
    """File, directory or glob of Parquet, JSONL or Arrow, as fit.py takes it."""
    out: str = ""
    """Where results go: an absolute path, or a URI that pyarrow.fs understands."""
    objective: str = "causal-lm"
    """`causal-lm`, `classification`, `regression`, or your own as `package.module:Name`."""
    max_examples: int | None = None
    """Evaluate a seeded sample of so many examples."""
    seed: int = 0
    """Of the sample."""
    dtype: DtypeName = "float32"
    """Of the model's computation."""

    IDENTITY = (
        "model",
        "data",
        "objective",
        "max_examples",
        "seed",
        "dtype",
        "max_length",
        "long",
    )

    def check(self, has_model: bool = False, has_data: bool = False) -> None:
        """Refuse what cannot work; a model or data in memory need no flag."""
        super().check()
        if not has_model:
            check_given(self, "model")
        if not has_data:
            check_given(self, "data")
        check_given(self, "out")
        for flag in ("max_length", "max_examples"):
            if getattr(self, flag) is not None:
                check_positive(flag, getattr(self, flag))


@dataclass(frozen=True)
class TimelineSettings:
    """What the actors of a run did, and when: how busy each was, with each operation as a trace."""

    run: str = ""
    """Directory of a fit or a scoring, finished or under way."""
    trace: str | None = None
    """Where every operation goes, a .json or .json.gz that ui.perfetto.dev and chrome://tracing
    open."""
    picture: str | None = None
    """Where a small picture goes, a .png or .svg: an actor a lane, an operation a bar, waiting
    empty. Takes matplotlib (`pip install -e '.[plots]'`)."""
    phase: Blocks = ()
    """Only this phase, repeatable; by default all."""
    start: Annotated[float | None, tyro.conf.arg(name="from")] = None
    """Only from this second on, counted from the first operation."""
    to: float | None = None
    """Only to this second."""

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            UserError: naming the flag.
        """
        check_given(self, "run")
        if self.start is not None and self.to is not None and self.start >= self.to:
            raise UserError("--from", f"before --to {self.to:g}", f"{self.start:g}", "")


class Identified(Protocol):
    """Settings of which some decide what a result means."""

    @property
    def IDENTITY(self) -> tuple[str, ...]: ...


def identity(settings: Identified) -> dict[str, Any]:
    """The settings that a result depends on, ready for JSON and without credentials."""
    values = {name: getattr(settings, name) for name in settings.IDENTITY}
    return {k: _recorded(v) for k, v in values.items()}


def _recorded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_recorded(v) for v in value]
    return shown(value) if isinstance(value, str) else value


def parse_bytes(flag: str, text: str) -> int:
    """A number of bytes from ``2GiB``, ``500MB`` or ``1000000``.

    Raises:
        UserError: not a size.
    """
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", start=1):
        units |= {f"{letter}B": 1000**power, f"{letter}iB": 1024**power, letter: 1024**power}
    number = text.rstrip("KMGTiB")
    try:
        value = float(number) * units[text[len(number) :]]
    except (ValueError, KeyError):
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(flag, "a size such as 2GiB or 500MB", repr(text), "")
    return int(value)


def _check_types(settings: Any) -> None:
    """What the command line's parser checks of its strings, for values that come from Python."""
    hints = get_type_hints(type(settings))
    for name in (field.name for field in dataclasses.fields(settings)):
        value, options = getattr(settings, name), get_args(hints[name])
        flag = f"--{name.replace('_', '-')}"
        optional = type(None) in options
        if value is None and optional:
            continue
        choices = [
            c for o in (hints[name], *options) if get_origin(o) is Literal for c in get_args(o)
        ]
        if choices and value not in choices:
            raise UserError(flag, f"one of {', '.join(choices)}", repr(value), "")
        if int in (hints[name], *options) and not _is_whole(value):
            raise UserError(flag, "a whole number", repr(value), "")
        if name in ("blocks", "merge", "subtract") and isinstance(value, str):
            what = "globs" if name == "blocks" else "run directories"
            raise UserError(flag, f"a list of {what}", repr(value), f"Give [{value!r}].")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_given(settings: Any, *names: str) -> None:
    """Refuse flags without a value.

    Raises:
        UserError: names the first.
    """
    for name in names:
        if not getattr(settings, name):
            raise UserError(f"--{name}", "a value", "nothing", f"Give --{name}.")


def check_positive(flag: str, value: int) -> None:
    """Refuse what is no count.

    Raises:
        UserError: names the flag.
    """
    if value < 1:
        raise UserError(f"--{flag.replace('_', '-')}", "a number of at least 1", str(value), "")
