"""EK-FAC of raycurv beside kronfluence's: Λ block by block, and scores.

    one model, one data set ─► raycurv, this process       ─┐
                            └► kronfluence, its own Python ─┴► table, results/DATE-kronfluence.md

Both take the empirical Fisher of the loss summed over an example's tokens, the linear layers of all
decoder blocks, eager attention, the same batches and λ = 0.1 · mean(Λ) in each block. Eigenvectors
are never compared: their signs are arbitrary. What is compared does not depend on them.

Exit code 1 when a case in float64 falls short of the target.
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import tyro
from agreement import Block, BlockAgreement, Scores, compare_block, fitted_blocks, in_order
from byte_model import Sequences, Shape, read_sequences, train_model
from numpy.typing import NDArray
from result_file import command_line, processor, source_state, table
from safetensors import safe_open
from torch import Tensor

import raycurv

HERE = Path(__file__).parent
TARGET = 0.9999  # Pearson, of Λ and of full-rank scores in float64


@dataclass(frozen=True)
class Settings:
    """Compares raycurv with kronfluence on a small Llama-shaped model of Python source."""

    kronfluence_python: Path
    """Interpreter of the environment that kronfluence is installed in (see README.md)."""
    results: Path = HERE / "results"
    """Directory of the result file."""
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    """Of the result file."""
    train: int = 256
    """Training examples; the curvature is theirs."""
    queries: int = 16
    """Queries, of text that the model was not trained on."""
    length: int = 64
    """Tokens of an example; with ragged lengths, of the longest."""
    steps: int = 300
    """Steps of training, of 32 sequences each."""
    batch: int = 16
    """Examples a batch, on both sides."""
    rank: int = 32
    """Rank of low-rank scores."""
    absolute_damping: float = 1e-8
    """λ of all blocks for the scores with absolute damping; kronfluence's default."""
    stages: int = 2
    """Into how many stages raycurv cuts the model."""
    threads: int = 1
    """Threads of torch, on both sides."""
    seed: int = 0
    """Of weights, order of the text, lengths."""


@dataclass(frozen=True)
class Case:
    """One comparison: in which dtype, and whether all examples have one length."""

    title: str
    dtype: str
    ragged: bool


CASES = (
    Case("float64, one length", "float64", False),
    Case("float64, ragged lengths (8 to the longest, padded)", "float64", True),
    Case("float32, one length", "float32", False),
)


@dataclass(frozen=True)
class Rows:
    """Examples of a case: ids ``[N, T]``, of which the first ``lengths[n]`` are there."""

    ids_NT: NDArray[np.int64]
    lengths_N: NDArray[np.int64]

    @classmethod
    def of(cls, ids_NT: NDArray[np.int64], ragged: bool, seed: int) -> Rows:
        """All whole, or of seeded lengths."""
        count, longest = ids_NT.shape
        lengths_N = np.full(count, longest)
        if ragged:
            lengths_N = np.random.default_rng(seed).integers(8, longest + 1, count)
        return cls(ids_NT, lengths_N)

    def dicts(self, prefix: str) -> list[dict[str, Any]]:
        """As raycurv reads them."""
        pairs = zip(self.ids_NT, self.lengths_N, strict=True)
        return [
            {"id": f"{prefix}{n:05d}", "input_ids": ids_T[:length].tolist()}
            for n, (ids_T, length) in enumerate(pairs)
        ]


@dataclass(frozen=True)
class Side:
    """What one of the two computed: blocks by name, scores by name, seconds by phase."""

    blocks: dict[str, Block]
    scores: dict[str, NDArray[Any]]
    seconds: dict[str, float]
    versions: dict[str, str]


def run_raycurv(
    settings: Settings, case: Case, model: Path, train: Rows, queries: Rows, place: Path
) -> Side:
    """Fit and score in this process, without Ray."""
    how: dict[str, Any] = {
        "address": "none",
        "stages": settings.stages,
        "batch_tokens": settings.batch * settings.length,
        "quiet": True,
        "device": "cpu",
    }
    fitted: dict[str, Any] = {"fisher": "empirical", "dtype": case.dtype}
    # Backwards: one BLAS adding the same rows in the same order agrees bit for bit, which would say
    # little of how far rounding carries.
    examples, asked = train.dicts("t")[::-1], queries.dicts("q")
    run = raycurv.fit(model, examples, place / "fit-ekfac", **fitted, **how)
    kfac = raycurv.fit(model, examples, place / "fit-kfac", method="kfac", **fitted, **how)
    seconds = {f"fit: {phase}": taken for phase, taken in run.manifest.seconds.items()}
    scores: dict[str, NDArray[Any]] = {}
    for name, source, chosen in (
        ("full", run, {"rank": "full"}),
        ("absolute", run, {"rank": "full", "damping": f"abs:{settings.absolute_damping!r}"}),
        ("low", run, {"rank": settings.rank}),
        ("kfac", kfac, {"rank": "full"}),
    ):
        started = time.perf_counter()
        made = source.influence(asked, examples, place / f"scores-{name}", **chosen, **how)
        scores[name] = in_order(made)
        seconds[f"pairwise {name}"] = time.perf_counter() - started
    started = time.perf_counter()
    made = run.influence(
        asked[:1], examples, place / "scores-self", rank="full", self_influence=True, **how
    )
    table = made.self_influence().sort_by("id")
    scores["self"] = table["score"].to_numpy()
    seconds["self"] = time.perf_counter() - started
    versions = {name: version(name) for name in ("raycurv", "torch", "transformers")}
    return Side(fitted_blocks(run), scores, seconds, versions)


def run_kronfluence(
    settings: Settings, case: Case, model: Path, train: Rows, queries: Rows, place: Path
) -> Side:
    """Write the job, start the other interpreter, read what it wrote.

    Raises:
        SystemExit: it failed; its own message is on the terminal.
    """
    np.savez(
        place / "examples.npz",
        train=train.ids_NT,
        train_lengths=train.lengths_N,
        queries=queries.ids_NT,
        query_lengths=queries.lengths_N,
    )
    modules = Shape().module_names()
    job = {
        "model": str(model),
        "examples": str(place / "examples.npz"),
        "out": str(place / "kronfluence.safetensors"),
        "modules": modules,
        "dtype": case.dtype,
        "rank": settings.rank,
        "batch": settings.batch,
        "threads": settings.threads,
        "absolute_damping": settings.absolute_damping,
    }
    (place / "job.json").write_text(json.dumps(job))
    command = [settings.kronfluence_python, HERE / "kronfluence_side.py", place / "job.json"]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(
            f"{settings.kronfluence_python}: kronfluence's half failed. Its environment needs what "
            f"benchmarks/README.md lists."
        )
    with safe_open(job["out"], "pt") as file:
        notes = file.metadata()

        def read(kind: str, name: str) -> Tensor:
            tensor: Tensor = file.get_tensor(f"{kind}/{name}").double()
            return tensor

        blocks = {
            name: Block(
                # kronfluence keeps the sum and divides by its count when it damps.
                lam_OI=read("lam", name) / read("lam_count", name),
                output_vectors=read("output_vectors", name),
                input_vectors=read("input_vectors", name),
                output_values=read("output_values", name),
                input_values=read("input_values", name),
                counts=tuple(
                    int(read(kind, name)) for kind in ("lam_count", "input_count", "output_count")
                ),
            )
            for name in modules
        }
        names = ("full", "absolute", "low", "low_random", "kfac", "self")
        scores = {name: read("scores", name).numpy() for name in names}
    return Side(blocks, scores, json.loads(notes["seconds"]), json.loads(notes["versions"]))


@dataclass(frozen=True)
class Outcome:
    """A case, and how far the two agree."""

    case: Case
    tokens: int
    counts: set[tuple[int, ...]]
    blocks: dict[str, BlockAgreement]
    scores: dict[str, Scores]
    ours: Side
    theirs: Side

    @property
    def reaches_target(self) -> bool:
        """Whether Λ of every block and full-rank scores agree as asked."""
        blocks = min(b.pearson for b in self.blocks.values())
        return min(blocks, *(self.scores[n].pearson for n in ("full", "self"))) >= TARGET


def compare(
    settings: Settings, case: Case, model: Path, sequences: Sequences, place: Path
) -> Outcome:
    """Run both on a case."""
    train = Rows.of(sequences.train_NT, case.ragged, settings.seed)
    queries = Rows.of(sequences.queries_NT, case.ragged, settings.seed + 1)
    ours = run_raycurv(settings, case, model, train, queries, place)
    theirs = run_kronfluence(settings, case, model, train, queries, place)
    blocks = {n: compare_block(ours.blocks[n], block) for n, block in theirs.blocks.items()}
    mine, other = ours.scores, theirs.scores
    rows = float(train.lengths_N.mean())
    scores = {
        "full": Scores.of("full-rank pairwise", mine["full"], other["full"]),
        "self": Scores.of("self-influence, full rank", mine["self"], other["self"]),
        "absolute": Scores.of(
            f"full-rank pairwise, λ = {settings.absolute_damping:g} absolute",
            mine["absolute"],
            other["absolute"],
        ),
        "low": Scores.of(
            f"rank {settings.rank} pairwise, kronfluence `use_full_svd=True`",
            mine["low"],
            other["low"],
        ),
        "low_random": Scores.of(
            f"rank {settings.rank} pairwise, kronfluence's default `svd_lowrank`",
            mine["low"],
            other["low_random"],
        ),
        "low_full": Scores.of(
            f"raycurv rank {settings.rank} against kronfluence full rank",
            mine["low"],
            other["full"],
        ),
        "random_full": Scores.of(
            f"kronfluence default rank {settings.rank} against its own full rank",
            other["low_random"],
            other["full"],
        ),
        "low_theirs": Scores.of(
            f"kronfluence default rank {settings.rank} against its own `use_full_svd=True`",
            other["low_random"],
            other["low"],
        ),
        "kfac": Scores.of(
            f"K-FAC full-rank pairwise, raycurv's times {rows:g} rows an example",
            mine["kfac"] * rows,
            other["kfac"],
        ),
        "control": Scores.of(
            "control: raycurv EK-FAC against kronfluence K-FAC", mine["full"], other["kfac"]
        ),
    }
    counts = {block.counts for block in theirs.blocks.values()}
    return Outcome(case, int(train.lengths_N.sum()), counts, blocks, scores, ours, theirs)


def block_lines(outcome: Outcome, every: bool) -> list[str]:
    """The worst of all blocks, and each of them."""
    header = ["block", "out x in", *BlockAgreement.TITLES]
    agreements = outcome.blocks
    worst = BlockAgreement.worst(list(agreements.values()))
    rows = [[f"**worst of {len(agreements)}**", "", *worst.cells()]]
    if every:
        for name, agreement in agreements.items():
            lam_OI = outcome.ours.blocks[name].lam_OI
            short = name.removeprefix("model.layers.")
            rows.append([short, f"{lam_OI.shape[0]} x {lam_OI.shape[1]}", *agreement.cells()])
    return table(header, rows)


def seconds_line(side: Side) -> str:
    """``phase 1.2, …``"""
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in side.seconds.items())


def case_lines(outcome: Outcome, every_block: bool) -> list[str]:
    """One case as Markdown."""
    examples, inputs, outputs = next(iter(outcome.counts))
    scores = [[s.title, *s.cells()] for s in outcome.scores.values()]
    return [
        f"## {outcome.case.title}",
        "",
        f"{outcome.tokens:,} tokens. kronfluence's counts in every block: Λ {examples:,}, "
        f"A {inputs:,}, G {outputs:,}.",
        "",
        *table(["scores", *Scores.TITLES], scores),
        "",
        *block_lines(outcome, every_block),
        "",
        "Wall seconds, indicative only: one run on a shared machine, of a model so small that "
        "overheads count most.",
        "",
        f"- raycurv: {seconds_line(outcome.ours)}",
        f"- kronfluence: {seconds_line(outcome.theirs)}",
        "",
    ]


def report(settings: Settings, state: str, loss: float, outcomes: list[Outcome]) -> str:
    """The result file."""
    command = command_line("against_kronfluence.py", settings, Settings(Path()))
    ours, theirs = outcomes[0].ours.versions, outcomes[0].theirs.versions
    shape = Shape()
    reached = all(o.reaches_target for o in outcomes if o.case.dtype == "float64")
    lines = [
        f"# raycurv against kronfluence, {settings.date}",
        "",
        f"    {command}",
        "",
        f"- versions: raycurv {ours['raycurv']} (torch {ours['torch']}, transformers "
        f"{ours['transformers']}), kronfluence {theirs['kronfluence']} (torch {theirs['torch']}, "
        f"transformers {theirs['transformers']}), Python {platform.python_version()}",
        f"- raycurv's source: {state}",
        f"- machine: {processor()}; {settings.threads} thread, no GPU",
        f"- model: Llama-shaped, hidden {shape.hidden}, feed-forward {shape.intermediate}, "
        f"{shape.layers} layers, {shape.heads} heads on {shape.key_value_heads} key-value heads, "
        f"bytes; {settings.steps} steps of training to {loss:.2f} nats a token",
        f"- data: {settings.train} training examples and {settings.queries} queries of "
        f"{settings.length} tokens, Python's standard library",
        f"- both: empirical Fisher, loss summed over tokens, eager attention, "
        f"{settings.batch} examples a batch, λ = 0.1 · mean(Λ) a block "
        f"(kronfluence: `damping_factor=None`); raycurv in {settings.stages} stages, without "
        f"Ray, reading the training examples in reverse",
        f"- target: Pearson of at least {TARGET} for Λ in every block and for full-rank and self "
        f"scores, in float64: **{'reached' if reached else 'MISSED'}**",
        "",
        "What the columns say is in `benchmarks/README.md`.",
        "",
    ]
    for outcome in outcomes:
        lines += case_lines(outcome, every_block=outcome is outcomes[0])
    return "\n".join(lines).rstrip() + "\n"


def main(settings: Settings) -> int:
    """Make the model, run all cases, print and write the report; gives the exit code."""
    state = source_state()
    torch.set_num_threads(settings.threads)
    sequences = read_sequences(settings.train, settings.queries, settings.length, settings.seed)
    with TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        loss = train_model(Shape(), sequences, model, settings.steps, 32, settings.seed)
        outcomes = []
        for number, case in enumerate(CASES):
            place = Path(directory) / f"case-{number}"
            place.mkdir()
            outcomes.append(compare(settings, case, model, sequences, place))
            print("\n".join(case_lines(outcomes[-1], every_block=False)), flush=True)
    text = report(settings, state, loss, outcomes)
    settings.results.mkdir(parents=True, exist_ok=True)
    path = settings.results / f"{settings.date}-kronfluence.md"
    path.write_text(text)
    print(f"{path}")
    return 0 if all(o.reaches_target for o in outcomes if o.case.dtype == "float64") else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings)))
