"""What conjugate gradients add to EK-FAC's scores: LDS over damping and steps, PBRF, leave-one-out.

    tasks.py, retraining.py   subsets trained on, kept in --cache           what is true
    attribution.py            raycurv's fits
    dense_gauss_newton.py     G of each network, dense, in float64, and a dense solve; conjugate
                              gradients preconditioned by the fit, from zero
    datamodel.py, response.py, leave_one_out.py                             how well the two agree

A *solution* is EK-FAC's own (in its usual basis and in Shampoo's), or that of G + λ, of the whole
model or of every block alone. λ is as raycurv takes it: a multiple of each block's mean Λ, or
absolute. For each task the table has them over damping and steps. Whatever is chosen on the results
is called *best*, and EK-FAC's own best is what the others are held to; the default was fixed for
all tasks. Scores are means over networks.

The controls: subsets that are told one another's losses, and scores of one another's examples;
each is shifted twenty times.

Axis letters: P parameters, Q queries, N examples, S subsets, K steps.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from agreement import correlations, difference, pearson
from attribution import Attribution, Method
from bench_pictures import steps_picture
from byte_model import Shape
from datamodel import GroundTruth, Lds, draw_subsets, mean_interval, spearman
from dense_gauss_newton import DenseGaussNewton, EkfacInverse, conjugate_gradients, damped
from leave_one_out import removal_rises
from response import respond
from result_file import Judged, Report, command_line, made_with, table, write_figures
from retraining import GROUP, retrain
from tasks import Task, byte_task, digits_task, tabular_task
from torch import Tensor

HERE = Path(__file__).parent
EKFAC, SHAMPOO, SIGNS = "EK-FAC", "EK-FAC, Shampoo's basis", "EK-FAC, signs for labels"
FITS: Mapping[str, Mapping[str, str]] = {
    EKFAC: {}, SHAMPOO: {"basis": "shampoo"}, SIGNS: {"fisher": "signs"},
}  # fmt: skip
DAMPINGS = ("0.001", "0.01", "0.03", "0.1", "0.3", "1", "2", "3", "10", "30")
STEPS = (1, 2, 5, 10, 20)
EXACT = 0  # in place of a number of steps: the dense solve
DEFAULT = ("whole model", "3", 10)
# Ways that raycurv scores by, too; those with a damping of the table are held to it.
COUPLINGS = {"whole model": "model", "blocks alone": "blocks"}
OWN = (
    DEFAULT, ("blocks alone", "0.3", 10), ("whole model", "evidence", 10),
    (EKFAC, "evidence", EXACT),
)  # fmt: skip
# Blocks, up to which raycurv solves each alone here: every query and block is a direction.
FEW = 2
# Products at the decay as damping, which may be far less than the default.
RESPONSE = 20
OWNED = f"raycurv's own solver, {RESPONSE}"
SHIFTS = range(1, 21)  # of a control
PICTURED = ("0.1", "3")
GAIN, AGREEMENT, LEAVE_ONE_OUT, RELIABILITY, CHANCE = 0.05, 0.9, 0.99, 0.7, 0.1
# Solution, damping, steps.
Way = tuple[str, str, int]


@dataclass(frozen=True)
class Settings:
    """Measures what refining EK-FAC's inverse products does to the accuracy of scores."""

    results: Path = HERE / "results"
    """Directory of the result file and its picture."""
    figures: Path | None = None
    """JSON file for every figure."""
    cache: Path | None = None
    """Directory where the losses of retrained networks are kept from run to run; not by default."""
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    """Of the result file."""
    tasks: tuple[str, ...] = ("diabetes", "breast cancer", "digits", "bytes")
    """Tasks to measure."""
    networks: int = 3
    """Networks whose scores are averaged."""
    threads: int = 1
    """Threads of torch."""


@dataclass(frozen=True)
class Design:
    """A task and how its ground truth is made.

    Attributes:
        subsets, seeds: of half the examples, and times that each is trained on.
        together: networks that are trained at once.
        responses: training examples whose proximal Bregman response is found.
    """

    task: Task
    subsets: int
    seeds: int
    together: int = GROUP
    responses: int = 0

    def truth(self, cache: Path | None) -> GroundTruth:
        """The losses of networks trained on subsets; of each seed a file."""
        task = self.task
        masks_SN = draw_subsets(self.subsets, len(task.train), 0.5, 0)
        losses = []
        for seed in range(self.seeds):
            kept = cache and cache / f"{task.title}-{self._digest(masks_SN, seed)}.pt"
            if kept and kept.exists():
                losses.append(torch.load(kept))
                continue
            found_SQ = retrain(task, masks_SN, seed, self.together).losses(task, task.queries)
            losses.append(found_SQ)
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                torch.save(found_SQ, kept)
        return GroundTruth(masks_SN, torch.stack(losses))

    def _digest(self, masks_SN: Tensor, seed: int) -> str:
        """Of all that the losses follow from."""
        task, made = self.task, hashlib.blake2b(digest_size=8)
        made.update(f"{task.recipe} {seed}".encode())
        examples = (x for e in (task.train, task.queries) for x in (e.inputs, e.targets))
        for x in (masks_SN, *examples, *task.make(seed).state_dict().values()):
            made.update(x.numpy().tobytes())
        return made.hexdigest()


def designs() -> dict[str, Design]:
    """By name; decays are those of accuracy.py, of digits a smaller one, of bytes none."""
    shape = Shape(hidden=16, intermediate=32, layers=1, heads=2, key_value_heads=1)
    return {
        "diabetes": Design(tabular_task("diabetes", [16], 0.03), 100, 4, responses=64),
        "breast cancer": Design(tabular_task("breast cancer", [16], 0.03), 100, 4, responses=64),
        "digits": Design(digits_task([16], 0.001, 100), 64, 6, 16, 32),
        "bytes": Design(byte_task(shape, 128, 48, 32, 200), 64, 8, 16),
    }


@dataclass
class Refinement:
    """One network: its fits, G, and solutions of the queries' gradients.

    Attributes:
        queries_QP, train_NP: gradients.
        matrix_PP: G.
    """

    attribution: Attribution
    dense: DenseGaussNewton
    inverse: EkfacInverse
    queries_QP: Tensor
    train_NP: Tensor
    matrix_PP: Tensor

    @classmethod
    def of(cls, attribution: Attribution) -> Refinement:
        """Fit and differentiate."""
        task, run = attribution.task, attribution.run(method(EKFAC))
        dense = DenseGaussNewton(task, attribution.network, run.block_names())
        return cls(
            attribution, dense, EkfacInverse.of(run, dense),
            dense.gradients(task.queries), dense.gradients(task.train), dense.matrix(),
        )  # fmt: skip

    def unrefined(self, named: str, damping: str) -> Tensor:
        """EK-FAC's own solution, ``[Q, P]``."""
        inverse = EkfacInverse.of(self.attribution.run(method(named)), self.dense)
        return inverse.apply(self.queries_QP, inverse.damping(damping))

    def whole(self, damping: str, plain: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Of the whole model: iterates ``[K, Q, P]``, the dense solve, and the system's matrix.

        Args:
            plain: without a preconditioner.
        """
        return self._solve(self.matrix_PP, self.queries_QP, self.inverse.damping(damping), plain)

    def blocks(self, damping: str) -> tuple[Tensor, Tensor]:
        """Of every block alone: iterates, and the dense solve."""
        found = [
            self._solve(self.matrix_PP[at, at], self.queries_QP[:, at], {name: lam}, False)[:2]
            for (name, lam), at in zip(
                self.inverse.damping(damping).items(), self.dense.slices.values(), strict=True
            )
        ]
        iterates, exact = zip(*found, strict=True)
        return torch.cat(iterates, dim=2), torch.cat(exact, dim=1)

    def _solve(
        self, matrix_PP: Tensor, v_QP: Tensor, damping: Mapping[str, float], plain: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        system_PP = damped(matrix_PP, self.inverse, damping)
        precondition = functools.partial(self.inverse.apply, damping=damping)
        iterates_KQP = conjugate_gradients(
            system_PP, v_QP, torch.clone if plain else precondition, max(STEPS)
        )
        return iterates_KQP, torch.linalg.solve(system_PP, v_QP.T).T, system_PP

    def solutions(self, damping: str) -> Iterator[tuple[Way, Tensor]]:
        """Every solution of a damping, ``[Q, P]``."""
        for named in fits(self.attribution.task):
            yield (named, damping, EXACT), self.unrefined(named, damping)
        for named, (iterates_KQP, exact_QP) in (
            ("blocks alone", self.blocks(damping)), ("whole model", self.whole(damping)[:2]),
        ):  # fmt: skip
            yield (named, damping, EXACT), exact_QP
            for steps in STEPS:
                yield (named, damping, steps), iterates_KQP[steps - 1]

    def scores(self, solution_QP: Tensor) -> Tensor:
        """``[Q, N]``."""
        return solution_QP @ self.train_NP.T

    def own_scores(self, way: Way) -> Tensor:
        """Of raycurv itself, float32, ``[Q, N]``."""
        solution, damping, steps = way
        solver: dict[str, Any] = {}
        if solution in COUPLINGS:
            solver = {"solver": "cg", "steps": steps, "coupling": COUPLINGS[solution]}
        return self.attribution.scores(replace(method(EKFAC), solver=solver), damping)


def method(named: str) -> Method:
    """The fit of a solution."""
    return Method(named, {"method": "ekfac", **FITS[named]})


def fits(task: Task) -> list[str]:
    """Of a task: signs stand for the labels of a softmax."""
    return [named for named in FITS if named != SIGNS or task.objective != "regression"]


def cosine(a_QP: Tensor, b_QP: Tensor) -> float:
    """Mean over queries."""
    return float(torch.cosine_similarity(a_QP, b_QP, dim=1).mean())


class Bench:
    """Networks and their refinements, made once.

    Args:
        place: a directory for runs.
    """

    def __init__(self, settings: Settings, place: Path) -> None:
        self.settings, self._place = settings, place
        self.designs = {name: d for name, d in designs().items() if name in settings.tasks}
        self._made: dict[tuple[str, int], Refinement] = {}
        self.curves: dict[str, Any] = {}

    def refinement(self, task: Task, seed: int) -> Refinement:
        """Of the network of a seed, trained on everything."""
        key = (task.title, seed)
        if key not in self._made:
            network = retrain(task, torch.ones(1, len(task.train)), seed).module(0)
            place = self._place / f"{task.title} {seed}"
            self._made[key] = Refinement.of(Attribution(task, network, place))
        return self._made[key]

    def scores(self, task: Task) -> dict[Way, Tensor]:
        """``[Q, N]`` of every way, means over networks."""
        decay = task.recipe.decay
        dampings = (*DAMPINGS, *((f"abs:{decay:g}",) if decay else ()))
        summed: dict[Way, Tensor] = {}
        for seed, damping in itertools.product(range(self.settings.networks), dampings):
            refinement = self.refinement(task, seed)
            for way, solution_QP in refinement.solutions(damping):
                found_QN = refinement.scores(solution_QP) / self.settings.networks
                summed[way] = summed[way] + found_QN if way in summed else found_QN
        return summed

    def own(self, task: Task, way: Way) -> Tensor:
        """Scores of raycurv itself, ``[Q, N]``, means over networks."""
        made = [self.refinement(task, seed) for seed in range(self.settings.networks)]
        return torch.stack([r.own_scores(way) for r in made]).mean(dim=0)


def datamodel(bench: Bench, name: str) -> Judged:
    """LDS of a task over solution, damping and steps, and what follows from it."""
    design = bench.designs[name]
    task = design.task
    truth = design.truth(bench.settings.cache)
    half, reliability = truth.reliability()
    scores = bench.scores(task)
    by_query = {way: _by_query(truth, found_QN) for way, found_QN in scores.items()}
    dampings = list(dict.fromkeys(damping for _, damping, _ in scores))
    rows = []
    for solution, steps in dict.fromkeys((solution, steps) for solution, _, steps in scores):
        found = [by_query[solution, damping, steps] for damping in dampings]
        said = "" if solution in FITS else "exact" if steps == EXACT else str(steps)
        rows.append([solution, said, *(f"{float(q.mean()):.3f} ±{_half(q):.3f}" for q in found)])

    def best(*solutions: str) -> Way:
        return max(
            (w for w in scores if w[0] in solutions), key=lambda w: float(by_query[w].mean())
        )

    ways = {
        "EK-FAC at 0.1": (EKFAC, "0.1", EXACT),
        **{f"{named}, best": best(named) for named in fits(task)},
        "blocks alone, best": best("blocks alone"),
        "whole model, best": best("whole model"),
        "the default": DEFAULT,
    }
    lds = {said: truth.lds(scores[way]) for said, way in ways.items()}
    apart = []
    few = len(bench.refinement(task, 0).dense.slices) <= FEW
    for way in OWN if few else [way for way in OWN if way[0] != "blocks alone"]:
        own_QN, said = bench.own(task, way), f"by raycurv: {way[0]}, {way[1]}"
        ways[said], lds[said] = way, truth.lds(own_QN)
        if way in scores:
            apart.append(f"{_name(way)} {difference(own_QN, scores[way]):.1e}")
    base = lds["EK-FAC, best"]
    summary, chance = [], {}
    for said, found in lds.items():
        less = ["-"] * 3 if said == "EK-FAC, best" else (found - base).cells()
        summary.append([said, _name(ways[said]), *found.cells(), *less])
    default_QN = scores[DEFAULT]
    controls = {
        "control: losses of other subsets": [
            _by_query(GroundTruth(truth.masks_SN, truth.losses_RSQ.roll(k, dims=1)), default_QN)
            for k in SHIFTS
        ],
        "control: scores of other examples": [
            _by_query(truth, default_QN.roll(k, dims=1)) for k in SHIFTS
        ],
    }
    for said, found_KQ in controls.items():
        means_K = torch.stack(found_KQ).mean(dim=1)
        among = f"{float(means_K.min()):.3f} to {float(means_K.max()):.3f} of {len(SHIFTS)} shifts"
        chance[said] = float(means_K.mean())
        summary.append([said, _name(DEFAULT), f"{chance[said]:.3f}", among, *["-"] * 4])
    gain = (
        max((lds[said] for said in ("blocks alone, best", "whole model, best")), key=_mean) - base
    )
    decay = f"decay {task.recipe.decay:g}" if task.recipe.decay else "no decay"
    lines = [
        f"## {name}", "",
        f"- {len(task.train)} examples, {len(task.queries)} queries, {design.subsets} subsets of "
        f"half of them x {design.seeds} seeds; {decay}; {task.draws} drawn label(s) a target",
        f"- reliability of the truth: {half:.3f} of half the seeds, {reliability:.3f} of all",
        *_traces(bench.refinement(task, 0)),
        f"- scores of raycurv's own solver (float32) off those here, largest over largest: "
        f"{'; '.join(apart)}", "",
        "LDS, mean and half its interval over queries:", "",
        *table(["solution", "products", *dampings], rows), "",
        *table(["", "", "LDS", "over queries", "over subsets", "less EK-FAC's best", "over queries",
                "over subsets"], summary), "",
        *convergence(bench, task), "",
    ]  # fmt: skip
    reached = {
        f"{name}: reliability at least {RELIABILITY}": reliability >= RELIABILITY,
        f"{name}: the best refined solution above EK-FAC's best beyond its intervals":
            gain.positive,
        f"{name}: by {gain.mean:.3f}, at least {GAIN}": gain.mean >= GAIN,
        f"{name}: the default above EK-FAC's best beyond its intervals":
            (lds["the default"] - base).positive,
        f"{name}: the whole model by the evidence above EK-FAC's best beyond its intervals":
            (lds["by raycurv: whole model, evidence"] - base).positive,
        f"{name}: controls within {CHANCE} of 0": all(abs(c) < CHANCE for c in chance.values()),
    }  # fmt: skip
    figures = {
        "reliability": (half, reliability),
        "lds": {_name(way): float(q.mean()) for way, q in by_query.items()},
        "chosen": {said: found.figures() for said, found in lds.items()},
        "controls": chance,
    }
    return lines, reached, figures


def _by_query(truth: GroundTruth, scores_QN: Tensor) -> Tensor:
    """The LDS of each query, without intervals."""
    predicted_QS = scores_QN.double() @ truth.masks_SN.double().T
    return spearman(predicted_QS, -truth.losses_RSQ.mean(dim=0).T)


def _half(values: Tensor) -> float:
    found = mean_interval(values)
    return (found.high - found.low) / 2


def _mean(lds: Lds) -> float:
    return lds.mean


def _name(way: Way) -> str:
    solution, damping, steps = way
    said = "" if solution in FITS else ", exact" if steps == EXACT else f", {steps} products"
    return f"{solution}, {damping}{said}"


def _traces(refinement: Refinement) -> list[str]:
    """How Λ compares with G, of one network."""
    diagonal_P, slices = refinement.matrix_PP.diagonal(), refinement.dense.slices
    ratios = {n: float(lam.sum() / diagonal_P[slices[n]].sum())
              for n, (_, lam, _) in refinement.inverse.bases.items()}  # fmt: skip
    means = [float(lam.mean()) for _, lam, _ in refinement.inverse.bases.values()]
    return [
        f"- {len(diagonal_P)} parameters in {len(ratios)} blocks; mean Λ {min(means):.2g} to "
        f"{max(means):.2g}; ΣΛ over the trace {min(ratios.values()):.3f} to "
        f"{max(ratios.values()):.3f}"
    ]


def convergence(bench: Bench, task: Task) -> list[str]:
    """Cosine to the dense solve and residual by step, preconditioned and not."""
    refinement = bench.refinement(task, 0)
    v_QP = refinement.queries_QP
    rows = []
    for damping in ("0.1", "1", "3", "10"):
        for said, plain in (("preconditioned", False), ("plain", True)):
            iterates_KQP, exact_QP, system_PP = refinement.whole(damping, plain)
            left_KQ = (v_QP - iterates_KQP @ system_PP).norm(dim=2) / v_QP.norm(dim=1)
            residuals = left_KQ.median(dim=1).values.tolist()
            cosines = [cosine(x_QP, exact_QP) for x_QP in iterates_KQP]
            rows.append(
                [damping, said, *(f"{cosines[k - 1]:.3f}, {residuals[k - 1]:.2g}" for k in STEPS)]
            )
            if damping in PICTURED:
                found = {"cosine": cosines, "residual": residuals}
                bench.curves.setdefault(task.title, {})[f"{said}, {damping}"] = found
    said = "Whole model, one network: cosine to the dense solve (mean), relative residual (median):"
    return [
        said,
        "",
        *table(["damping", "", *(f"{k} product{'s' * (k > 1)}" for k in STEPS)], rows),
    ]


def responses(bench: Bench) -> Judged:
    """Scores of EK-FAC and of the refined solution against the proximal Bregman response."""
    rows, reached, figures = [], {}, {}
    for name, design in bench.designs.items():
        if not design.responses:
            continue
        task = design.task
        refinement = bench.refinement(task, 0)
        generator = torch.Generator().manual_seed(0)
        removed = torch.randperm(len(task.train), generator=generator)[: design.responses]
        network = refinement.attribution.network
        response = respond(task, network, removed, task.recipe.decay)
        rises_QM = response.rises_QM
        iterates_KQP, exact_QP, _ = refinement.whole(task.damping)
        solutions = {
            EKFAC: refinement.unrefined(EKFAC, task.damping),
            "blocks alone, exact": refinement.blocks(task.damping)[1],
            **{f"whole model, {k}": iterates_KQP[k - 1] for k in STEPS},
            "whole model, exact": exact_QP,
        }
        scores = {said: refinement.scores(found_QP) for said, found_QP in solutions.items()}
        scores[OWNED] = refinement.own_scores(("whole model", task.damping, RESPONSE))
        for said, scores_QN in scores.items():
            foretold_QM = scores_QN[:, removed] / len(task.train)
            found_Q = correlations(foretold_QM, rises_QM)
            pairs = pearson(foretold_QM.flatten(), rises_QM.flatten())
            scale = float((foretold_QM * rises_QM).sum() / rises_QM.square().sum())
            rows.append([
                name, said, f"{float(found_Q.mean()):.3f}", str(mean_interval(found_Q)),
                f"{pairs:.3f}", f"{scale:.3f}", f"{response.residual:.0e}",
            ])  # fmt: skip
            figures[f"{name}, {said}"] = float(found_Q.mean())
        target = f"PBRF, {name}: {OWNED} at least {AGREEMENT}"
        reached[target] = figures[f"{name}, {OWNED}"] >= AGREEMENT
    header = ["task, λ its decay", "solution, products", "Pearson of a query's, mean",
              "over queries", "all pairs", "scale", "gradient left"]  # fmt: skip
    return ["## Proximal Bregman response", "", *table(header, rows), ""], reached, figures


def leave_one_out(bench: Bench) -> Judged:
    """Scores of logistic regression against retraining without each example, exactly."""
    task = tabular_task("breast cancer", [], 0.03)
    model, rises_QN = removal_rises(task)
    place = bench._place / "convex"
    refinement = Refinement.of(Attribution(task, model.module(0).float(), place))
    iterates_KQP, exact_QP, _ = refinement.whole(task.damping)
    solutions = {
        EKFAC: refinement.unrefined(EKFAC, task.damping),
        **{f"{k}": iterates_KQP[k - 1] for k in STEPS},
        "exact": exact_QP,
    }
    figures, rows = {}, []
    scores = {said: refinement.scores(found_QP) for said, found_QP in solutions.items()}
    scores[OWNED] = refinement.own_scores(("whole model", task.damping, RESPONSE))
    for said, scores_QN in scores.items():
        foretold_QN = scores_QN / len(task.train)
        figures[said] = pearson(foretold_QN.flatten(), rises_QN.flatten())
        by_query = correlations(foretold_QN, rises_QN)
        scale = float((foretold_QN * rises_QN).sum() / rises_QN.square().sum())
        rows.append(
            [said, f"{figures[said]:.4f}", f"{float(by_query.median()):.3f}", f"{scale:.3f}"]
        )
    target = f"leave-one-out, logistic regression: {OWNED} at least {LEAVE_ONE_OUT}"
    header = ["products, λ = 0.03", "Pearson, all pairs", "median of a query's", "scale"]
    lines = ["## Leave-one-out, logistic regression", "", *table(header, rows), ""]
    return lines, {target: figures[OWNED] >= LEAVE_ONE_OUT}, figures


def main(settings: Settings) -> None:
    """Measure everything, print and write the report."""
    torch.set_num_threads(settings.threads)
    report = Report()
    picture = settings.results / f"{settings.date}-refinement.png"
    with TemporaryDirectory() as directory:
        bench = Bench(settings, Path(directory))
        for name in bench.designs:
            report.judge(name, functools.partial(datamodel, bench, name))
        report.judge("PBRF", lambda: responses(bench))
        report.judge("leave-one-out", lambda: leave_one_out(bench))
    settings.results.mkdir(parents=True, exist_ok=True)
    steps_picture(bench.curves, picture)
    report.add(
        "picture", lambda: ["## Convergence", "", f"![cosine and residual by step]({picture.name})"]
    )
    write_figures(settings.figures, report.figures)
    report.write(
        settings.results / f"{settings.date}-refinement.md",
        f"# Refined scores, {settings.date}",
        command_line("refinement.py", settings, Settings()),
        [
            *made_with(f"torch {torch.__version__}"),
            "- dampings are multiples of each block's mean Λ, or absolute; scores are means over "
            f"{settings.networks} networks; G dense and all solutions in float64",
            "- bytes: a Llama-shaped model of one layer, hidden 16, whose weights are the blocks",
            "- intervals hold 95 % of a bootstrap: over queries, and over subsets",
        ],
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
