"""What precision, rank, damping and labels do to factors, Λ and scores.

    sums of up to 40,000 microbatches, float32 and bfloat16 beside float64   factors, Λ, scores
    a byte-level language model fitted in each dtype, on more and more text  Λ, IHVPs, scores
    ranks of the queries' gradients, dampings, drawn and other labels        scores
                                                          ─► results/DATE-numerics.md

All fits have the data's own labels, but for those that compare labels: another precision would
draw others. Differences are max |difference| over max |reference|; the reference is float64.

Axis letters: N examples, T tokens, I in, O out, Q queries.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import tyro
from agreement import Block as Fitted
from agreement import (
    BlockAgreement,
    Scores,
    compare_block,
    difference,
    fitted_blocks,
    in_order,
)
from attribution import Attribution, Method
from byte_model import Shape, read_sequences, train_model
from numpy.typing import NDArray
from result_file import (
    Judged,
    Report,
    command_line,
    processor,
    source_state,
    table,
    write_figures,
)
from retraining import retrain
from tasks import tabular_task
from torch import Tensor

import raycurv
from raycurv.batch import Batch
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Captured
from raycurv.mathematics.corrected import CorrectedSums
from raycurv.mathematics.eigen import Eigenbasis
from raycurv.mathematics.factors import FactorSums

HERE = Path(__file__).parent
BATCHES = (32, 1_000, 10_000, 40_000)
GROWTH = 1e-5  # of float32 against float64, after all of them
RANKS = (1, 2, 4, 8, 16, 24, 32, 48)
RANK, RANK_PEARSON = 32, 0.99
DAMPINGS = ("1e-4", "1e-3", "0.01", "0.1", "1", "10")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """Measures precision, rank, damping and labels."""

    results: Path = HERE / "results"
    """Directory of the result file."""
    figures: Path | None = None
    """JSON file for the figures that targets are judged by."""
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    """Of the result file."""
    examples: tuple[int, ...] = (32, 128)
    """Training examples of the fits in each dtype, fewest first."""
    queries: int = 16
    """Queries, of text that the model was not trained on."""
    length: int = 64
    """Tokens of an example."""
    steps: int = 150
    """Steps of the language model's training, of 32 sequences each."""
    layers: int = 2
    """Of the language model."""
    threads: int = 1
    """Threads of torch."""


# Sums


class Stream:
    """Microbatches of what hooks would capture of one block: inputs as after an activation, output
    gradients with a heavy tail.
    """

    examples, tokens, d_in, d_out = 4, 4, 24, 12

    def __init__(self) -> None:
        self.block = Block("block", "linear", self.d_in, self.d_out, False, input_factor="input")
        generator = torch.Generator().manual_seed(1)
        self.q_A, self.q_G = (
            torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
            for d in (self.d_in, self.d_out)
        )

    def batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``a [N, T, I]`` and ``g [N, T, O]`` in float32, all new."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(count):
            a_NTI = torch.randn(self.examples, self.tokens, self.d_in, generator=generator).relu()
            g_NTO = torch.randn(self.examples, self.tokens, self.d_out, generator=generator) ** 3
            yield a_NTI, g_NTO


@dataclass(frozen=True)
class Sums:
    """What microbatches left, in float64.

    Attributes:
        factors: A and G.
        lam_OI: Λ, in a basis that is the same for all.
        scores_QN: of Gaussian gradients under Λ and the basis, λ = 0.1 · mean(Λ).
    """

    factors: tuple[Tensor, Tensor]
    lam_OI: Tensor
    scores_QN: Tensor

    def worst(self, reference: Sums) -> list[float]:
        """Differences of factors, Λ and scores."""
        pairs = zip(self.factors, reference.factors, strict=True)
        return [
            max(difference(a, b) for a, b in pairs),
            difference(self.lam_OI, reference.lam_OI),
            difference(self.scores_QN, reference.scores_QN),
        ]


class Raycurv:
    """Sums as a stage of raycurv has them, of numbers rounded to ``dtype``."""

    def __init__(self, stream: Stream, dtype: torch.dtype) -> None:
        self._dtype, device = dtype, torch.device("cpu")
        self._rows = stream.examples * stream.tokens
        self._mask = torch.ones(stream.examples, stream.tokens, dtype=torch.bool)
        self._ids = tuple(map(str, range(stream.examples)))
        block = stream.block
        self._names = (block.input_factor, block.output_factor)
        vectors = (stream.q_A, stream.q_G)
        bases = {n: Eigenbasis((q,)) for n, q in zip(self._names, vectors, strict=True)}
        self._factors = FactorSums([block], dtype, device)
        self._corrected = CorrectedSums([block], bases, dtype, device)

    def add(self, a_NTI: Tensor, g_NTO: Tensor) -> None:
        """A microbatch."""
        a_NTI, g_NTO = a_NTI.to(self._dtype), g_NTO.to(self._dtype)
        batch = Batch(0, self._ids, a_NTI, self._mask)
        rows = {"input": self._rows}
        captured = Captured(batch, {"input": a_NTI}, {"block": g_NTO}, rows)
        self._factors.add([captured])
        self._corrected.add([captured])

    def means(self, batches: int) -> tuple[Tensor, Tensor, Tensor]:
        """A, G and Λ; the counts are raycurv's own."""
        a, g = (self._factors.result(name).mean()[0] for name in self._names)
        return a, g, self._corrected.result("block").mean()


class Plain:
    """Sums by the definition, computed and added in ``dtype``: in float64 the reference."""

    def __init__(self, stream: Stream, dtype: torch.dtype) -> None:
        self._stream, self._dtype = stream, dtype
        self._q_A, self._q_G = stream.q_A.to(dtype), stream.q_G.to(dtype)
        shapes = ((stream.d_in,) * 2, (stream.d_out,) * 2, (stream.d_out, stream.d_in))
        self._a, self._g, self._lam = (torch.zeros(shape, dtype=dtype) for shape in shapes)

    def add(self, a_NTI: Tensor, g_NTO: Tensor) -> None:
        """A microbatch."""
        a_NTI, g_NTO = a_NTI.to(self._dtype), g_NTO.to(self._dtype)
        a_RI, g_RO = a_NTI.flatten(0, 1), g_NTO.flatten(0, 1)
        v_NOI = self._q_G.T @ (g_NTO.transpose(1, 2) @ a_NTI) @ self._q_A
        self._a += a_RI.T @ a_RI
        self._g += g_RO.T @ g_RO
        self._lam += v_NOI.square().sum(dim=0)

    def means(self, batches: int) -> tuple[Tensor, Tensor, Tensor]:
        """A, G and Λ."""
        examples = batches * self._stream.examples
        tokens = examples * self._stream.tokens
        return self._a.double() / tokens, self._g.double() / tokens, self._lam.double() / examples


def sums_of(stream: Stream, way: Raycurv | Plain, batches: int) -> Sums:
    """What a way has summed so far, and the scores under it."""
    a, g, lam_OI = way.means(batches)
    generator = torch.Generator().manual_seed(2)
    v = torch.randn(40, *lam_OI.shape, generator=generator, dtype=torch.float64)
    nothing = torch.zeros(0, dtype=torch.float64)
    block = Fitted(lam_OI, stream.q_G, stream.q_A, nothing, nothing)
    scores_QN = block.apply(v[:8], block.inverse).flatten(1) @ v[8:].flatten(1).T
    return Sums((a, g), lam_OI, scores_QN)


def growth() -> Judged:
    """Error of sums as microbatches grow; whether float32 stays below the target to the end."""
    stream = Stream()
    reference = Plain(stream, torch.float64)
    ways: dict[str, Raycurv | Plain] = {
        "float32": Raycurv(stream, torch.float32),
        "bfloat16": Raycurv(stream, torch.bfloat16),
        "control: float32 added to float32": Plain(stream, torch.float32),
        "control: bfloat16 added to bfloat16": Plain(stream, torch.bfloat16),
    }
    errors: dict[tuple[str, int], list[float]] = {}
    for number, (a_NTI, g_NTO) in enumerate(stream.batches(BATCHES[-1]), start=1):
        for way in (reference, *ways.values()):
            way.add(a_NTI, g_NTO)
        if number in BATCHES:
            exact = sums_of(stream, reference, number)
            for name, way in ways.items():
                errors[name, number] = sums_of(stream, way, number).worst(exact)
    rows = [
        [name, f"{number:,}", *(f"{e:.1e}" for e in errors[name, number])]
        for name in ways
        for number in BATCHES
    ]
    lines = [
        "## Sums as microbatches grow",
        "",
        f"One block {stream.d_out} x {stream.d_in}, {stream.examples} examples of {stream.tokens} "
        "tokens a microbatch, every microbatch new; Λ in one basis for all.",
        "",
        *table(["", "microbatches", "A and G", "Λ", "scores"], rows),
        "",
    ]
    target = f"float32 within {GROWTH:g} of float64 after {BATCHES[-1]:,} microbatches"
    worst = max(errors["float32", BATCHES[-1]])
    return lines, {target: worst < GROWTH}, {"microbatches": BATCHES[-1], "float32": worst}


# The language model


class Bytes:
    """The language model, its text and its runs.

    Args:
        settings: of the whole.
        place: a directory.
    """

    def __init__(self, settings: Settings, place: Path) -> None:
        self._place, self._length = place, settings.length
        shape = Shape(layers=settings.layers)
        read = read_sequences(settings.examples[-1], settings.queries, settings.length, 0)
        self.model = place / "model"
        self.loss = train_model(shape, read, self.model, settings.steps, 32, 0)
        self.train = self._rows("example", read.train_NT)
        self.queries = self._rows("query", read.queries_NT)
        self.how: dict[str, Any] = {
            "address": "none", "quiet": True, "batch_tokens": 16 * settings.length,
        }  # fmt: skip
        self._count = 0

    def _rows(self, name: str, ids_NT: NDArray[np.int64]) -> list[dict[str, Any]]:
        return [{"id": f"{name} {n:05d}", "input_ids": x} for n, x in enumerate(ids_NT.tolist())]

    def fit(self, examples: int, **settings: Any) -> raycurv.Run:
        """On the first examples, by default with their own labels."""
        self._count += 1
        chosen = {"fisher": "empirical"} | settings
        rows = self.train[:examples]
        return raycurv.fit(
            self.model, rows, self._place / f"fit-{self._count}", **chosen, **self.how
        )

    def scores(self, run: raycurv.Run, **settings: Any) -> NDArray[Any]:
        """Of every query against the fewest examples that are fitted, full rank."""
        self._count += 1
        chosen = {"rank": "full"} | settings
        out = self._place / f"scores-{self._count}"
        made = run.influence(self.queries, self.train[:SCORED], out, **chosen, **self.how)
        return in_order(made)


SCORED = 64  # training examples of every scoring


def precision(text: Bytes, sizes: Sequence[int], runs: dict[str, raycurv.Run]) -> list[str]:
    """Fits in each dtype beside float64; puts those of the most examples into ``runs``."""
    rows = []
    for examples in sizes:
        exact = text.fit(examples, dtype="float64")
        blocks, scores_QN = fitted_blocks(exact), text.scores(exact)
        runs["float64"] = exact
        for dtype in DTYPES:
            run = runs[dtype] = text.fit(examples, dtype=dtype)
            found = fitted_blocks(run)
            worst = BlockAgreement.worst([compare_block(found[n], blocks[n]) for n in blocks])
            here = Scores.of(dtype, text.scores(run), scores_QN)
            rows.append([
                dtype, str(examples), f"{worst.values:.1e}", f"{worst.lam:.1e}",
                f"{worst.trace:.1e}", f"{worst.applied:.1e}", f"{worst.inverted:.1e}",
                f"{here.difference:.1e}", f"{1 - here.pearson:.1e}",
            ])  # fmt: skip
    header = [
        "dtype", "examples", "factors' eigenvalues", "Λ sorted", "ΣΛ", "F v", "(F + λ)⁻¹ v",
        "scores", "1 - Pearson of scores",
    ]  # fmt: skip
    return ["## The language model in each dtype, beside float64", "", *table(header, rows), ""]


def ranks(text: Bytes, run: raycurv.Run) -> Judged:
    """Scores at lower ranks beside full rank."""
    full = text.scores(run)
    found = {rank: Scores.of(str(rank), text.scores(run, rank=rank), full) for rank in RANKS}
    rows = [[s.title, *_short(s)] for s in found.values()]
    lines = ["## Rank of the queries' gradients, beside full rank", "", *table(_HEADER, rows), ""]
    target = f"rank {RANK} at a Pearson of at least {RANK_PEARSON} with full rank"
    pearson = found[RANK].pearson
    return lines, {target: pearson >= RANK_PEARSON}, {"rank": RANK, "Pearson": pearson}


_HEADER = ["", "Pearson", "Spearman", "worst query", "max difference"]


def _short(scores: Scores) -> list[str]:
    return [
        f"{scores.pearson:.4f}", f"{scores.spearman:.4f}", f"{scores.worst_query:.4f}",
        f"{scores.difference:.1e}",
    ]  # fmt: skip


def dampings(text: Bytes, runs: dict[str, raycurv.Run]) -> list[str]:
    """Scores under each damping: beside the default's, and beside float64's under the same."""
    exact = {d: text.scores(runs["float64"], damping=d) for d in DAMPINGS}
    rows = []
    for damping, scores_QN in exact.items():
        row = [damping, *_short(Scores.of(damping, scores_QN, exact["0.1"]))[:3]]
        for dtype in DTYPES:
            own = Scores.of(dtype, text.scores(runs[dtype], damping=damping), scores_QN)
            row.append(f"{own.difference:.1e}")
        rows.append(row)
    header = ["damping", *_HEADER[1:4], *(f"{dtype}: max difference" for dtype in DTYPES)]
    lines = ["## Damping: scores beside those of 0.1, and what precision costs under each", ""]
    return [*lines, *table(header, rows), ""]


def text_labels(text: Bytes, examples: int) -> list[str]:
    """Drawn labels and the data's own beside many draws of another seed."""
    many = text.scores(text.fit(examples, fisher="sampled", draws=8, seed=1))
    rows = []
    for name, settings in {
        "1 draw": {"fisher": "sampled"},
        "4 draws": {"fisher": "sampled", "draws": 4},
        "1 set of signs": {"fisher": "signs"},
        "the data's labels": {},
    }.items():
        made = Scores.of(name, text.scores(text.fit(examples, **settings)), many)
        rows.append([name, *_short(made)])
    title = "## Labels of the language model, beside 8 draws of another seed"
    return [title, "", *table(_HEADER, rows), ""]


def exact_labels(place: Path) -> list[str]:
    """Drawn labels and the data's own beside the Fisher of all labels, EK-FAC of small networks."""
    rows = []
    for name in ("diabetes", "breast cancer"):
        task = tabular_task(name, [16], 0.03)
        network = retrain(task, torch.ones(1, len(task.train)), 0).module(0)
        attribution = Attribution(task, network, place / name)
        exact = attribution.scores(Method("all", {"method": "ekfac"}, exact=True)).numpy()
        for title, settings in {
            "1 draw": {"fisher": "sampled", "draws": 1},
            "16 draws": {"fisher": "sampled", "draws": 16},
            "256 draws": {"fisher": "sampled", "draws": 256},
            "1 set of signs": {"fisher": "signs", "draws": 1},
            "the data's labels": {"fisher": "empirical"},
        }.items():
            scores_QN = attribution.scores(Method(title, {"method": "ekfac", **settings})).numpy()
            rows.append([f"{name}, {title}", *_short(Scores.of(title, scores_QN, exact))])
    title = "## Labels of the tabular tasks, beside the Fisher of all labels"
    return [title, "", *table(_HEADER, rows), ""]


def main(settings: Settings) -> None:
    """Measure everything, print and write the report."""
    torch.set_num_threads(settings.threads)
    state = source_state()
    report = Report()
    with TemporaryDirectory() as directory:
        place = Path(directory)
        report.judge("sums", growth)
        text = Bytes(settings, place)
        runs: dict[str, raycurv.Run] = {}
        report.add("precision", lambda: precision(text, settings.examples, runs))
        report.judge("ranks", lambda: ranks(text, runs["float32"]))
        report.add("dampings", lambda: dampings(text, runs))
        report.add("labels", lambda: text_labels(text, settings.examples[-1]))
        report.add("exact labels", lambda: exact_labels(place))
    shape = Shape(layers=settings.layers)
    write_figures(settings.figures, report.figures)
    report.write(
        settings.results / f"{settings.date}-numerics.md",
        f"# Numerics of factors, Λ and scores, {settings.date}",
        command_line("numerics.py", settings, Settings()),
        [
            f"- torch {torch.__version__}, Python {platform.python_version()}; {processor()}, "
            f"{settings.threads} thread(s)",
            f"- raycurv's source: {state}",
            f"- language model: Llama-shaped, hidden {shape.hidden}, feed-forward "
            f"{shape.intermediate}, {shape.layers} layers, bytes, {settings.steps} steps of "
            f"training to {text.loss:.2f} nats a token; {settings.queries} queries x {SCORED} "
            f"training examples of {settings.length} tokens are scored",
            "- the data's own labels but where labels are compared; damping 0.1 but where it is "
            "swept; differences are max |difference| over max |reference|",
        ],
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
