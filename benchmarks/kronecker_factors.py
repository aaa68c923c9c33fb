"""Which ``--basis`` stands best for a block's Fisher, and what each costs.

    trained networks of four tasks ─► rows of a rank-m Fisher, one a gradient: the block's Fisher F
                                   ─► K-FAC and EK-FAC by every basis            F̂ beside F
    a language model of random weights ─► processor seconds of a fit by every basis
                                                        ─► results/DATE-kronecker-factors.md

F is of many labels drawn for every target, of the training examples. Errors are ‖F̂ − F‖ / ‖F‖ in
the Frobenius norm; IHVPs are those of the queries' gradients, ``(F + λ)⁻¹ v`` with λ a part of
the mean eigenvalue, beside those of F itself. Figures are means over blocks and networks.

Axis letters: M gradients, Q queries, O and I a block's axes.
"""

from __future__ import annotations

import copy
import datetime
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import tyro
from attribution import Attribution, Method
from byte_model import Shape, llama_config, read_sequences
from result_file import Report, command_line, loads, processor, source_state, table
from retraining import retrain
from sklearn.datasets import load_digits
from tasks import (
    Examples,
    Recipe,
    Task,
    byte_task,
    cross_entropies,
    perceptron,
    tabular_task,
)
from torch import Tensor
from transformers import LlamaForCausalLM

import raycurv
from raycurv.mathematics.curvature import BlockCurvature, Curvature, Damping
from raycurv.mathematics.rank.rank_curvature import RankCurvature

HERE = Path(__file__).parent
BASES = ("kfac", "weighted", "shampoo", "kronecker")


@dataclass(frozen=True)
class Settings:
    """Compares the bases of a fit."""

    results: Path = HERE / "results"
    """Directory of the result file."""
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    """Of the result file."""
    networks: int = 2
    """Networks of each task."""
    labels: int = 4
    """Labels drawn for every target."""
    dampings: tuple[str, ...] = ("0.1", "1")
    """Of IHVPs, on both sides."""
    passes: tuple[int, ...] = (2, 3, 8)
    """Of the power iteration."""
    lengths: tuple[int, ...] = (32, 128, 512)
    """Tokens of an example of the language model that is timed."""
    tokens: int = 8192
    """Of all its examples."""
    repeats: int = 2
    """Fits that are timed, of which the fastest counts."""
    threads: int = 1
    """Threads of torch."""


def digits_task() -> Task:
    """Ten classes of 8 x 8 pixels, one hidden layer."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    inputs = torch.tensor(x[order] / 16, dtype=torch.float32)
    targets = torch.tensor(y[order], dtype=torch.int64)
    parts = (Examples(inputs[s], targets[s]) for s in (slice(400), slice(400, 460)))
    train, queries = parts
    return Task(
        title="digits", objective="classification", make=perceptron([64, 24, 10]),
        losses=cross_entropies, recipe=Recipe(steps=300, rate=0.02, decay=1e-3), train=train,
        queries=queries, damping="0.1", draws=1,
    )  # fmt: skip


def repeated(examples: Examples, times: int) -> Examples:
    """Every example so many times, each with an id of its own, by which labels are drawn."""
    both = (x.repeat_interleave(times, dim=0) for x in (examples.inputs, examples.targets))
    return Examples(*both)


@dataclass(frozen=True)
class Truth:
    """The Fisher of a block: its rows, gradients ``v`` of queries, their IHVPs by damping."""

    whole: RankCurvature
    v_QOI: Tensor
    solved: Mapping[Damping, Tensor]


def judge(found: BlockCurvature, true: Truth) -> list[float]:
    """Of an approximation: its error, and the mean cosine of its IHVPs at each damping."""
    truth = true.whole
    rows = truth.rows_MOI.double()
    turned = found.output_basis.dense().T @ rows @ found.input_basis.dense()
    diagonal_OI, lam_OI = turned.square().mean(dim=0), found.eigenvalues.double()
    square = float(truth.eigenvalues.square().sum())
    off = square - 2 * float((lam_OI * diagonal_OI).sum()) + float(lam_OI.square().sum())
    figures = [(max(off, 0.0) / square) ** 0.5]
    for damping, x_QOI in true.solved.items():
        y_QOI = found.apply(true.v_QOI, found.inverse(damping))
        cosines = torch.cosine_similarity(x_QOI.flatten(1), y_QOI.flatten(1).double(), dim=1)
        figures.append(float(cosines.mean()))
    return figures


def ways(passes: tuple[int, ...]) -> Iterator[tuple[str, dict[str, object]]]:
    """Every basis by its name in the tables, with the settings of its fit."""
    for basis in BASES[:-1]:
        yield basis, {"basis": basis}
    for count in passes:
        yield f"kronecker, {count} passes", {"basis": "kronecker", "basis_passes": count}


def compare(task: Task, settings: Settings, place: Path) -> list[str]:
    """The table of one task."""
    dampings = [Damping.parse(text) for text in settings.dampings]
    found: dict[tuple[str, str], list[list[float]]] = {}
    for seed in range(settings.networks):
        network = retrain(task, torch.ones(1, len(task.train)), seed).module(0)
        many = replace(task, train=repeated(task.train, settings.labels))
        folder = place / f"{task.title} {seed}"
        one = Attribution(task, network, folder / "one", {"draws": 1})
        fits = Attribution(many, network, folder / "many", {"draws": 1, "dtype": "float64"})
        rows = {"method": "mfac", "rows": len(many.train)}
        truth = fits.run(Method("F", rows))
        asked = replace(task, train=task.queries)
        own = {"method": "mfac", "rows": len(task.queries), "fisher": "empirical"}
        queries = Attribution(asked, network, folder / "queries", {}).run(Method("v", own))
        blocks: dict[str, Truth] = {}
        for name in truth.block_names():
            whole, v = truth.curvature(name), queries.curvature(name)
            assert isinstance(whole, RankCurvature) and isinstance(v, RankCurvature)
            v_QOI = v.rows_MOI.double()
            solved = {d: whole.apply(v_QOI, whole.inverse(d)) for d in dampings}
            blocks[name] = Truth(whole, v_QOI, solved)
        for title, basis in ways(settings.passes):
            for form, fit in (
                ("K-FAC", fits.run(Method(title, {"method": "kfac", **basis}))),
                ("EK-FAC", fits.run(Method(title, {"method": "ekfac", **basis}))),
                ("one label", one.run(Method(title, {"method": "ekfac", **basis}))),
            ):
                for name, true in blocks.items():
                    mine: Curvature = fit.curvature(name)
                    assert isinstance(mine, BlockCurvature)
                    found.setdefault((title, form), []).append(judge(mine, true))
    lines = []
    for title, _ in ways(settings.passes):
        k, ek, one_label = (
            torch.tensor(found[title, form]).mean(dim=0).tolist()
            for form in ("K-FAC", "EK-FAC", "one label")
        )
        figures = (k[0], ek[0], *ek[1:], *k[1:], *one_label[1:])
        lines.append([title, *(f"{figure:.3f}" for figure in figures)])
    header = [
        task.title, "error, K-FAC", "EK-FAC",
        *(f"{form}, {d}" for form in ("EK-FAC", "K-FAC", "one label") for d in settings.dampings),
    ]  # fmt: skip
    return [
        f"## {task.title}", "",
        f"{len(task.train)} examples, {len(blocks)} blocks, {settings.networks} networks", "",
        *table(header, lines), "",
    ]  # fmt: skip


def costs(settings: Settings, place: Path) -> list[str]:
    """Processor seconds of a fit by every basis, over those of ``kfac``."""
    shape = Shape()
    rows = []
    for length in settings.lengths:
        torch.manual_seed(0)
        model = LlamaForCausalLM(llama_config(shape, length)).eval()
        ids_NT = read_sequences(settings.tokens // length, 1, length, 0).train_NT
        data = [{"id": f"{n}", "input_ids": ids} for n, ids in enumerate(ids_NT.tolist())]
        seconds: dict[str, float] = {}
        for turn in range(settings.repeats):
            for title, basis in ways((3,)):
                started = time.process_time()
                raycurv.fit(
                    lambda model=model: copy.deepcopy(model), data,
                    place / f"{length} {title} {turn}", quiet=True, address="none",
                    blocks=("model.layers.*",), check_capture=False, **basis,
                )  # fmt: skip
                taken = time.process_time() - started
                seconds[title] = min(taken, seconds.get(title, taken))
        first = seconds["kfac"]
        rows.append([
            f"{length}", f"{first:.1f} s",
            *(f"{taken / first:.2f}" for title, taken in seconds.items() if title != "kfac"),
        ])  # fmt: skip
    header = ["tokens of an example", *(title for title, _ in ways((3,)))]
    return [
        "## What a fit costs", "",
        f"EK-FAC of a Llama of hidden {shape.hidden}, intermediate {shape.intermediate}, "
        f"{shape.layers} layers, {settings.tokens:,} tokens; processor seconds, the fastest of "
        f"{settings.repeats}, and the others over them", "", *table(header, rows), "",
    ]  # fmt: skip


def main(settings: Settings) -> None:
    """Measure everything, print and write the report."""
    torch.set_num_threads(settings.threads)
    state, report = source_state(), Report()
    shape = Shape(hidden=32, intermediate=64, layers=2, heads=2, key_value_heads=1)
    tasks = [
        tabular_task("diabetes", [16], 0.03), tabular_task("breast cancer", [16], 0.03),
        digits_task(), byte_task(shape, 128, 24, 32, 250),
    ]  # fmt: skip
    with TemporaryDirectory() as directory:
        for task in tasks:
            report.add(task.title, lambda task=task: compare(task, settings, Path(directory)))  # type: ignore[misc]
        report.add("costs", lambda: costs(settings, Path(directory)))
    report.write(
        settings.results / f"{settings.date}-kronecker-factors.md",
        f"# Kronecker factors by basis, {settings.date}",
        command_line("kronecker_factors.py", settings, Settings()),
        [
            f"- torch {torch.__version__}, Python {platform.python_version()}; {processor()}, "
            f"{settings.threads} thread(s), load {loads()}",
            f"- raycurv's source: {state}",
            f"- F of {settings.labels} drawn labels a target; columns: errors of F̂, cosines of "
            "IHVPs by damping; the last, of EK-FAC, with one label, the others those of F",
        ],
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
