"""How well scores foretell what training does: LDS, leave-one-out, PBRF, removal, wrong labels.

    tasks.py         data, networks, recipes
    retraining.py    networks trained on parts of the data, all at once     what is true
    attribution.py   scores of raycurv by every method                      what is foretold
    datamodel.py     LDS of the two, with intervals  ┐
    leave_one_out.py of a convex objective, exactly  │
    response.py      the proximal Bregman response   ├─► results/DATE-accuracy.md
    counterfactual.py removal, wrong labels          ┘

Dampings are chosen by a rule, before any result: a tabular task's is the weight decay of its
objective, the language model's is raycurv's default. What other dampings give stands apart.
"""

from __future__ import annotations

import datetime
import functools
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
from agreement import correlations, pearson
from attribution import Attribution, Method, methods
from byte_model import Shape
from counterfactual import Mislabelled, removal_rises
from datamodel import GroundTruth, draw_subsets, mean_interval
from leave_one_out import removal_rises as exact_rises
from response import respond
from result_file import (
    Judged,
    Report,
    command_line,
    processor,
    source_state,
    table,
    write_figures,
)
from retraining import gradient_norms, retrain
from tasks import Task, byte_task, tabular_task
from torch import Tensor

HERE = Path(__file__).parent
TABULAR = ("diabetes", "breast cancer")
HIDDEN = 16
SHARE = 0.5  # of the examples in a subset
REMOVED = 0.1
WRONG = 0.1
LEAVE_ONE_OUT = 0.95  # Pearson


@dataclass(frozen=True)
class Settings:
    """Measures the accuracy of influence scores against retraining."""

    results: Path = HERE / "results"
    """Directory of the result file."""
    figures: Path | None = None
    """JSON file for the figures that targets are judged by."""
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    """Of the result file."""
    decay: float = 0.03
    """Weight decay, and damping, of the tabular tasks."""
    subsets: int = 100
    """Subsets of the tabular tasks, of half the examples."""
    seeds: int = 4
    """Times that each subset is trained on."""
    networks: int = 2
    """Networks whose scores are averaged."""
    byte_subsets: int = 32
    """Subsets of the language model."""
    byte_seeds: int = 2
    """Times that each of them is trained on."""
    byte_steps: int = 250
    """Steps of the language model's training, of 16 examples each."""
    responses: int = 64
    """Training examples whose proximal Bregman response is found."""
    removals: int = 20
    """Queries whose most helpful examples are removed."""
    threads: int = 1
    """Threads of torch."""


class Bench:
    """Tasks and networks that several measurements share.

    Args:
        settings: of the whole.
        place: a directory for runs.
    """

    def __init__(self, settings: Settings, place: Path) -> None:
        self.settings, self._place = settings, place
        shape = Shape(hidden=32, intermediate=64, layers=2, heads=2, key_value_heads=1)
        self.tasks = {name: tabular_task(name, [HIDDEN], settings.decay) for name in TABULAR}
        self.bytes = byte_task(shape, 128, 24, 32, settings.byte_steps)
        self._attributions: dict[str, list[Attribution]] = {}
        self._scores: dict[tuple[str, str, str | None], Tensor] = {}

    def ways(self, task: Task) -> list[Method]:
        """The methods of a task; M-FAC has a gradient an example."""
        return methods([4, 8], len(task.train))

    def attributions(self, task: Task) -> list[Attribution]:
        """Networks trained on all of the data, one a seed."""
        if task.title not in self._attributions:
            everything = torch.ones(1, len(task.train))
            self._attributions[task.title] = [
                self.attribution(task, retrain(task, everything, seed).module(0), f"seed {seed}")
                for seed in range(self.settings.networks)
            ]
        return self._attributions[task.title]

    def attribution(self, task: Task, network: torch.nn.Module, name: str) -> Attribution:
        """Of one trained network."""
        return Attribution(task, network, self._place / task.title / name)

    def scores(self, task: Task, method: Method, damping: str | None = None) -> Tensor:
        """``[Q, N]``, a mean over networks."""
        key = (task.title, method.title, damping)
        if key not in self._scores:
            found = [a.scores(method, damping) for a in self.attributions(task)]
            self._scores[key] = torch.stack(found).mean(dim=0)
        return self._scores[key]

    def truth(self, task: Task) -> tuple[GroundTruth, list[str]]:
        """Losses after training on subsets, and what to say of that training."""
        small = task is self.bytes
        chosen = self.settings
        count, seeds = (
            (chosen.byte_subsets, chosen.byte_seeds) if small else (chosen.subsets, chosen.seeds)
        )
        masks_SN = draw_subsets(count, len(task.train), SHARE, 0)
        group = {"group": 4} if small else {}  # a language model's activations fill the cache
        started = time.perf_counter()
        losses, norms = [], []
        for seed in range(seeds):
            networks = retrain(task, masks_SN, seed, **group)
            losses.append(networks.losses(task, task.queries))
            if not small:
                norms.append(gradient_norms(task, networks, masks_SN))
        seconds = time.perf_counter() - started
        truth = GroundTruth(masks_SN, torch.stack(losses))
        half, whole = truth.reliability()
        lines = [
            f"- {len(task.train)} training examples, {len(task.queries)} queries; {count} subsets "
            f"of half the examples x {seeds} seeds: {count * seeds} networks in {seconds:.0f} s",
            f"- reliability of the ground truth: {half:.3f} of half the seeds, {whole:.3f} of all",
            f"- damping {task.damping}, {task.draws} drawn label(s) a target; scores are means "
            f"over {chosen.networks} networks",
        ]
        if norms:
            lines.append(f"- |∇J| at the end, median: {float(torch.cat(norms).median()):.1e}")
        return truth, lines


def datamodel(bench: Bench, task: Task) -> Judged:
    """LDS of every method; whether EK-FAC is above identity and diagonal beyond the intervals."""
    truth, lines = bench.truth(task)
    found = {m.title: truth.lds(bench.scores(task, m)) for m in bench.ways(task)}
    above = {other: found["EK-FAC"] - found[other] for other in ("identity", "diagonal")}
    header = ["", "LDS", "over queries", "over subsets"]
    rows = [[name, *lds.cells()] for name, lds in found.items()]
    rows += [[f"EK-FAC less {other}", *lds.cells()] for other, lds in above.items()]
    figures = {
        "methods": {name: lds.figures() for name, lds in found.items()},
        "EK-FAC less": {other: lds.figures() for other, lds in above.items()},
    }
    lines += ["", *table(header, rows)]
    if task is not bench.bytes:
        lines += ["", *sweep(bench, task, truth)]
    target = f"LDS of {task.title}: EK-FAC above identity and diagonal beyond both intervals"
    reached = all(d.positive for d in above.values())
    return [f"## LDS: {task.title}", "", *lines, ""], {target: reached}, figures


def sweep(bench: Bench, task: Task, truth: GroundTruth) -> list[str]:
    """LDS of EK-FAC under other dampings and other labels."""
    decay = bench.settings.decay
    ekfac = Method("EK-FAC", {"method": "ekfac"})
    rows = []
    for damping in (*(f"abs:{decay * k:g}" for k in (0.01, 0.1, 1, 10, 100)), "0.01", "0.1", "1"):
        rows.append([f"damping {damping}", *truth.lds(bench.scores(task, ekfac, damping)).cells()])
    for labels, fit in {
        "1 drawn label": {"fisher": "sampled", "draws": 1},
        "1 set of signs": {"fisher": "signs", "draws": 1},
        "all labels, exactly": {},
        "the data's labels": {"fisher": "empirical"},
    }.items():
        method = Method(f"EK-FAC, {labels}", {"method": "ekfac", **fit}, exact=not fit)
        rows.append([labels, *truth.lds(bench.scores(task, method)).cells()])
    return table(["EK-FAC", "LDS", "over queries", "over subsets"], rows)


def exact_methods(task: Task) -> list[Method]:
    """With the Fisher of all labels: M-FAC's of all examples is then the Gauss-Newton matrix."""
    rows = len(task.train)
    return [
        Method("EK-FAC, all labels", {"method": "ekfac"}, exact=True),
        Method("Gauss-Newton (M-FAC, all labels)", {"method": "mfac", "rows": rows}, exact=True),
    ]


def leave_one_out(bench: Bench) -> Judged:
    """Scores of a convex objective against retraining without each example."""
    lines = ["## Leave-one-out, convex: every training example, retrained exactly", ""]
    rows, reached, figures = [], {}, {}
    for name in TABULAR:
        task = tabular_task(name, [], bench.settings.decay)
        model, rises_QN = exact_rises(task)
        attribution = bench.attribution(task, model.module(0).float(), "convex")
        kind = "ridge regression" if name == "diabetes" else "logistic regression"
        found = {}
        for method in (*methods([], len(task.train)), *exact_methods(task)):
            foretold_QN = attribution.scores(method) / len(task.train)
            found[method.title] = pearson(foretold_QN.flatten(), rises_QN.flatten())
            by_query = correlations(foretold_QN, rises_QN)
            slope = float((foretold_QN * rises_QN).sum() / rises_QN.square().sum())
            rows.append([
                f"{kind} ({name})", method.title, f"{found[method.title]:.4f}",
                f"{float(by_query.median()):.3f}", f"{slope:.3f}",
            ])  # fmt: skip
        figures[kind] = found
        for title in ("EK-FAC", f"M-FAC, {len(task.train)} gradients"):
            target = f"leave-one-out, {kind}: {title} at a Pearson of at least {LEAVE_ONE_OUT}"
            reached[target] = found[title] >= LEAVE_ONE_OUT
    header = ["task", "method", "Pearson, all pairs", "median of a query's", "scale"]
    return [*lines, *table(header, rows), ""], reached, figures


def responses(bench: Bench) -> list[str]:
    """Scores against the proximal Bregman response."""
    lines = ["## Proximal Bregman response", ""]
    rows = []
    for task in bench.tasks.values():
        attribution = bench.attributions(task)[0]
        generator = torch.Generator().manual_seed(0)
        removed = torch.randperm(len(task.train), generator=generator)[: bench.settings.responses]
        response = respond(task, attribution.network, removed, bench.settings.decay)
        lines.append(
            f"- {task.title}: {len(removed)} examples removed, gradient left "
            f"{response.residual:.0e} of the first"
        )
        for method in (*bench.ways(task), *exact_methods(task)):
            foretold_QM = attribution.scores(method)[:, removed] / len(task.train)
            found_Q = correlations(foretold_QM, response.rises_QM)
            rises = response.rises_QM
            whole = pearson(foretold_QM.flatten(), rises.flatten())
            scale = float((foretold_QM * rises).sum() / rises.square().sum())
            rows.append([
                task.title, method.title, f"{float(found_Q.mean()):.3f}",
                str(mean_interval(found_Q)), f"{whole:.3f}", f"{scale:.3f}",
            ])  # fmt: skip
    header = ["task", "method", "Pearson of a query's, mean", "over queries", "all pairs", "scale"]
    return [*lines, "", *table(header, rows), ""]


def removals(bench: Bench) -> list[str]:
    """How much the loss rises without what a method calls helpful."""
    rows = []
    for task in bench.tasks.values():
        count = round(REMOVED * len(task.train))
        scores = {m.title: bench.scores(task, m) for m in bench.ways(task) if m.rank == "full"}
        seeds = max(1, bench.settings.seeds // 2)
        found = removal_rises(task, scores, bench.settings.removals, count, seeds)
        for name, rises_Q in found.items():
            interval = str(mean_interval(rises_Q))
            rows.append([task.title, name, f"{float(rises_Q.mean()):.3f}", interval])
    title = f"## Removal of each query's most helpful {REMOVED:.0%} of the examples"
    header = ["task", "method", "mean rise of the query's loss", "over queries"]
    return [title, "", *table(header, rows), ""]


def wrong_labels(bench: Bench) -> list[str]:
    """How many wrong labels self-influence finds."""
    rows = []
    for clean in bench.tasks.values():
        corrupted = Mislabelled.of(clean, WRONG)
        task = corrupted.task
        networks = retrain(task, torch.ones(1, len(task.train)), 0)
        attribution = bench.attribution(task, networks.module(0), "mislabelled")
        order = {"loss": networks.losses(task, task.train)[0]}
        for method in bench.ways(task):
            if method.rank == "full":
                order[method.title] = attribution.self_influence(method)
        for name, by_N in order.items():
            rows.append([
                task.title, name, f"{corrupted.found(by_N, 0.1):.0%}",
                f"{corrupted.found(by_N, 0.2):.0%}", f"{corrupted.separation(by_N):.3f}",
            ])  # fmt: skip
    title = f"## Wrong labels: {WRONG:.0%} of them, examples in order of self-influence"
    header = ["task", "order", "found in the first 10 %", "in 20 %", "area under ROC"]
    return [title, "", *table(header, rows), ""]


def main(settings: Settings) -> None:
    """Measure everything, print and write the report."""
    torch.set_num_threads(settings.threads)
    state, report = source_state(), Report()
    with TemporaryDirectory() as directory:
        bench = Bench(settings, Path(directory))
        for task in (*bench.tasks.values(), bench.bytes):
            report.judge(f"LDS of {task.title}", functools.partial(datamodel, bench, task))
        report.judge("leave-one-out", lambda: leave_one_out(bench))
        report.add("PBRF", lambda: responses(bench))
        report.add("removal", lambda: removals(bench))
        report.add("wrong labels", lambda: wrong_labels(bench))
    write_figures(settings.figures, report.figures)
    report.write(
        settings.results / f"{settings.date}-accuracy.md",
        f"# Accuracy of influence scores, {settings.date}",
        command_line("accuracy.py", settings, Settings()),
        [
            f"- torch {torch.__version__}, Python {platform.python_version()}; {processor()}, "
            f"{settings.threads} thread(s)",
            f"- raycurv's source: {state}",
            f"- networks: one hidden layer of {HIDDEN} (tanh), full batches, weight decay "
            f"{settings.decay:g}; bytes: Llama-shaped, hidden 32, 2 layers, 32 tokens an example",
            "- intervals hold 95 % of a bootstrap: over queries, and over subsets",
        ],
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
