"""How far some queries' answers, those that scores stand on, are from ``(C + λ) x = v``.

gradients of the queries     v
IHVPs as a scoring makes them     x, of the fit's curvature, truncated to --rank
conjugate gradients from zero     y, truncated likewise        refinement.py
one pass of products              what x and y leave of v      a Gram matrix a block
one pass over examples            scores by x and by y
-> tables/certificate             a row a query and block, and one a query of the whole model
-> facts.certificate, and what a person is told: certificate_words
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from raycurv.driver.corpus import Corpus
from raycurv.driver.iterates import System
from raycurv.driver.multiplier import Multiplier
from raycurv.errors import UserError
from raycurv.files.artifacts import read_products
from raycurv.files.store import Store
from raycurv.files.tables import CERTIFICATE, SOLVER, footer, read_directory, write_table
from raycurv.files.tensorfile import open_tensors, write_tensors
from raycurv.jobs.fitted import Fitted
from raycurv.jobs.influence.candidates import TOP
from raycurv.jobs.influence.influence_settings import SOLVER_DEFAULTS, InfluenceSettings
from raycurv.jobs.influence.refinement import MATRICES, Refinement, last_steps
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import Damping
from raycurv.mathematics.exact.closeness import Closeness, answers_gram
from raycurv.mathematics.exact.product_sums import ProductSum, check_quadratic
from raycurv.mathematics.influence.rank_agreement import correlation, mean_ranks
from raycurv.mathematics.methods import Method
from raycurv.stages.passes import Directions, Pass, ProductGatherer

DIRECTORY = "tables/certificate"
# Where the solver says how it went.
SOLVED = "work/certificate"
# Training examples, a seeded sample, whose scores by both answers are compared.
COMPARED = 512
# Of a block with less of the answer than this, nothing is said.
_LEAST_SHARE = 0.01
_DIRECTIONS = ((0.95, "almost the same"), (0.8, "much the same"), (0.5, "partly the same"))

Array = np.ndarray[Any, Any]


def asked_for(settings: InfluenceSettings) -> dict[str, Any]:
    """The settings that make a certificate, as ``run.json`` records them."""
    names = ("certify", "certify_steps", "certify_examples", "certify_on")
    return {name: getattr(settings, name) for name in names}


def solving(settings: InfluenceSettings) -> InfluenceSettings:
    """Settings by which a certificate's answers are refined: the run's own where it has a solver,
    but for what the certificate's say."""
    given = {name: getattr(settings, name) for name in SOLVER_DEFAULTS} | {
        "steps": settings.certify_steps or settings.steps,
        "product_examples": settings.certify_examples or settings.product_examples,
    }
    return replace(settings, **SOLVER_DEFAULTS | {k: v for k, v in given.items() if v is not None})


def are_trained(settings: InfluenceSettings, train: Corpus | None, fitted: Fitted) -> bool:
    """Whether the certificate's products are of the training examples that are scored, and not of
    the fit's."""
    if settings.certify_on is not None or settings.solver != "ekfac" or train is None:
        return settings.certify_on == "train"
    return len(train) >= int(fitted.manifest.facts["examples"])


def both_named(ids: Sequence[str]) -> tuple[str, ...]:
    """What both answers of some queries are called: those of the fit's curvature, then the refined
    ones."""
    return tuple(f"{side}: {one}" for side in ("fit", "refined") for one in ids)


def check_certified(method: Method) -> None:
    """Refuse, with a UserError, a fit whose answers are of no damped curvature a block."""
    if method.ranked or not method.curved:
        raise UserError(
            "--certify", "a fit whose blocks have a damped inverse each, which answers are made by",
            f"one with --method {method}",
            "Fit with --method ekfac, or leave --certify out.",
        )  # fmt: skip


@dataclass(frozen=True)
class _Answers(Directions):
    """Both answers to every query, which lie as IHVPs in a store."""

    place: Store
    count: int

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        return {block.name: self.of(block, device).to(dtype) for block in blocks}

    def of(self, block: Block, device: torch.device) -> Tensor:
        """Those of a block, ``[2Q, O, I]``: x of all queries, then y."""
        return _dense(self.place, block, device)


@dataclass(frozen=True)
class _GramGatherer(ProductGatherer):
    """Leaves of each block's products nothing but dot products.

    Attributes:
        system: that is answered; its files are those of the Gram matrices.
    """

    answers: _Answers = field(kw_only=True)
    system: System = field(kw_only=True)

    def write(self, name: str, result: ProductSum, blocks: Mapping[str, Block]) -> None:
        system, block, device = self.system, blocks[name], result.total.device
        curvature = system.curvature.open_spectral(block, {}, device)
        v, both = _dense(system.right, block, device), self.answers.of(block, device).double()
        lam = system.lam(curvature)
        products = result.mean + lam * both
        if curvature.is_zero:
            # It has no part in the system.
            v, both, products = 0 * v, 0 * both, 0 * products
        (x, y), (ax, ay) = both.chunk(2), products.chunk(2)
        squares = lam * both.square().sum(dim=(1, 2))
        tensors = {"gram": answers_gram(v.double(), x, ax, y, ay), "damped": squares}
        write_tensors(system.place, _gram_file(name), tensors, {"block": name})


def _dense(place: Store, block: Block, device: torch.device) -> Tensor:
    products, _ = read_products(place, block.name, (block.d_out, block.d_in))
    return products.dense().to(device)


def _gram_file(block: str) -> str:
    return f"grams/{block}.safetensors"


@dataclass(frozen=True)
class Certifier:
    """Makes the certificate of some queries from their gradients and answers.

    Attributes:
        refinement: by which answers are refined, and whose examples products are a mean over.
        trained: whether these are the training examples that are scored, and not the fit's.
    """

    refinement: Refinement
    trained: bool

    def damped(self, damping: Damping) -> Certifier:
        """The same for answers of a damping; UserError of none."""
        if damping.value == 0.0:
            raise UserError(
                "--certify", "a damping above zero, for the system to have one answer", "0",
                "Give a small one to another --out, or leave --certify out.",
            )  # fmt: skip
        return replace(self, refinement=replace(self.refinement, damping=damping))

    @property
    def mark(self) -> str:
        """Tells it from others of the same queries, in names of files."""
        refinement, on = self.refinement, "train" if self.trained else "fit"
        return f"{on}-{len(refinement.examples)}-{refinement.settings.steps}"

    def residuals(self, span: str, label: str, gradients: Store, answers: Store, n: int) -> None:
        """Multiply both answers of n queries, and leave the Gram matrices beside them."""
        refinement, workers = self.refinement, self.refinement.workers
        own = {block.name: range(2 * n) for block in workers.blocks}
        system = System(gradients, answers, refinement.curvature, refinement.damping, own)
        directions = _Answers(answers, 2 * n)
        work = Pass(
            f"residuals-{span}",
            "product",
            refinement.draws,
            (_GramGatherer(2 * n, answers=directions, system=system),),
            directions=directions,
            matrix=refinement.settings.matrix or "ggn",
        )
        feed = workers.feed(refinement.examples)
        quadratic = Multiplier(workers, refinement.manifest, feed, "products").multiply(work, label)
        files = [open_tensors(answers, _gram_file(name)) for name in own]
        if quadratic is not None:
            gram = torch.stack([file.numbers("gram", (n, 5, 5)) for file in files]).sum(dim=0)
            damped = torch.stack([file.numbers("damped", (2 * n,)) for file in files]).sum(dim=0)
            bends = torch.cat([gram[:, 0, a] - gram[:, a, a + 1] for a in (1, 3)])
            check_quadratic(quadratic + damped, bends, workers.dtype)

    def write(self, span: str, ids: Sequence[str], answers: Store, scores_KN: Array | None) -> str:
        """Write the table of some queries; gives its file.

        Args:
            span: names these queries.
            ids: of the queries.
            answers: has the Gram matrices.
            scores_KN: of some training examples by x of every query, then by y; ``None`` where
                nothing is scored.
        """
        refinement, store = self.refinement, self.refinement.workers.store
        names = [block.name for block in refinement.workers.blocks]
        files = [open_tensors(answers, _gram_file(name)) for name in names]
        grams = torch.stack([file.numbers("gram", (len(ids), 5, 5)) for file in files])
        together = grams.sum(dim=0)
        whole, parts = Closeness.of(together), Closeness.of(grams, together)
        solved = {row["query_id"]: row for row in self._solved(span)}
        agreed = _agreements(scores_KN, len(ids))
        rows: list[dict[str, Any]] = []
        for q, query in enumerate(ids):
            last = solved[query]
            rows.append(
                _row(query, None, whole, (q,))
                | {"captured": _number(whole.captured[q]), "steps": last["step"]}
                | {"outcome": last["outcome"], "solver_residual": last["residual"]}
                | {"step_cosine": last["cosine"]}
                | {key: _number(values[q]) for key, values in agreed.items()}
            )
            for b, name in enumerate(names):
                if grams[b, q].any():
                    shares = {
                        "share": _number(parts.square[b, q] / whole.square[q]),
                        "refined_share": _number(parts.other_square[b, q] / whole.other_square[q]),
                    }
                    rows.append(_row(query, name, parts, (b, q)) | shares)
        notes = footer({"fit": refinement.curvature.store.root, "span": span})
        file = f"{DIRECTORY}/{span}.parquet"
        write_table(store, file, pa.Table.from_pylist(rows, schema=CERTIFICATE), notes)
        return file

    def _solved(self, span: str) -> list[dict[str, Any]]:
        refinement = self.refinement
        tables = read_directory(refinement.workers.store, refinement.table, SOLVER)
        found: list[dict[str, Any]] = last_steps(tables).to_pylist()
        return found

    def facts(self, compared: int) -> dict[str, Any]:
        """What ``run.json`` says of all queries' certificates.

        Args:
            compared: how many training examples were scored by both answers.
        """
        refinement = self.refinement
        table = read_directory(refinement.workers.store, DIRECTORY, CERTIFICATE)
        whole = table.filter(pc.is_null(table["block"]))
        said: dict[str, Any] = {
            "queries": len(whole),
            "method": str(refinement.curvature.method),
            "solver": refinement.settings.solver,
            "rank": refinement.settings.rank,
            "matrix": refinement.settings.matrix,
            "damping": str(refinement.damping),
            "on": "train" if self.trained else "fit",
            "examples": len(refinement.examples),
            "compared": compared,
            "steps": max(whole["steps"].to_pylist()),
            "converged": whole["outcome"].to_pylist().count("ok"),
        }
        for name in (
            "residual", "refined_residual", "solver_residual", "step_cosine", "cosine", "captured",
            "pearson", "spearman", "top_shared",
        ):  # fmt: skip
            values = np.array(whole[name].drop_null(), np.float64)
            if len(values):
                said[name] = [float(np.median(values)), float(values.min()), float(values.max())]
        return said | {"weakest": weakest} if (weakest := _weakest(table)) else said


def _row(query: str, block: str | None, of: Closeness, at: tuple[int, ...]) -> dict[str, Any]:
    return {
        "query_id": query,
        "block": block,
        "residual": _number(of.residual[at]),
        "refined_residual": _number(of.other_residual[at]),
        "cosine": _number(of.cosine[at]),
    }


def _number(value: Tensor) -> float | None:
    found = float(value)
    return found if math.isfinite(found) else None


def _agreements(scores_KN: Array | None, queries: int) -> dict[str, Tensor]:
    """How alike the scores of each query are by both answers, ``[Q]`` each."""
    if scores_KN is None or scores_KN.shape[1] < 2:
        return {}
    mine, other = torch.from_numpy(scores_KN).split(queries)
    found = {
        "pearson": correlation(mine, other),
        "spearman": correlation(mean_ranks(mine), mean_ranks(other)),
    }
    if mine.shape[1] >= 2 * TOP:
        best = scores_KN.argsort(axis=1, kind="stable")[:, -TOP:]
        pairs = zip(best[:queries], best[queries:], strict=True)
        shared = [len(np.intersect1d(first, second)) / TOP for first, second in pairs]
        found["top_shared"] = torch.tensor(shared, dtype=torch.float64)
    return found


def _weakest(table: pa.Table) -> dict[str, Any] | None:
    """Of the blocks with a part in the refined answers the one whose cosine is lowest."""
    blocks: dict[str, list[tuple[float, float]]] = {}
    for row in table.filter(pc.is_valid(table["block"])).to_pylist():
        if row["cosine"] is not None and row["refined_share"] is not None:
            blocks.setdefault(row["block"], []).append((row["cosine"], row["refined_share"]))
    found: list[dict[str, Any]] = [
        {
            "block": name,
            "cosine": float(np.median([cosine for cosine, _ in numbers])),
            "share": float(np.mean([share for _, share in numbers])),
        }
        for name, numbers in blocks.items()
    ]
    found = [one for one in found if one["share"] >= _LEAST_SHARE]
    return min(found, key=lambda one: one["cosine"], default=None) if len(blocks) > 1 else None


def certificate_words(facts: Mapping[str, Any]) -> list[str]:
    """What a certificate says, in sentences.

    Args:
        facts: of ``run.json``, see :meth:`Certifier.facts`.
    """
    name = "EK-FAC" if facts["method"] == "ekfac" else facts["method"]
    of = "training examples" if facts["on"] == "train" else "examples of the fit"
    matrix, count = MATRICES[facts["matrix"]], facts["queries"]
    known = facts["converged"] == count
    left = f"relative residual {_range(facts, 'solver_residual')}"
    rank = "" if facts["rank"] == "full" else f", truncated to rank {facts['rank']},"
    said = [
        f"certificate of {count:,} quer{'y' if count == 1 else 'ies'} at damping "
        f"{facts['damping']}: answers of {name} beside those to {matrix} over "
        f"{facts['examples']:,} {of}, damped alike, by {facts['steps']} steps of conjugate "
        f"gradients ({left})"
    ]
    if not known:
        turned = ""
        if "step_cosine" in facts:
            turned = f" (cosine to the step before {_range(facts, 'step_cosine', 3)})"
        said.append(
            f"of these {count - facts['converged']:,} of {count:,} had not converged{turned}: what "
            "follows is beside where they stopped; --certify-steps goes on"
        )
    if "cosine" not in facts:
        return [*said, "their gradients, or their answers, are zero: there is nothing to compare"]
    closeness = f"the answers of {name} point in {_direction(facts['cosine'][0])} direction: "
    closeness += f"cosine {_range(facts, 'cosine')}"
    if "captured" in facts:
        closeness += (
            f"; of a query's influence on itself they have {'' if known else 'at most '}"
            f"{_range(facts, 'captured')}"
        )
    said.append(f"{closeness}; relative residual{rank} {_range(facts, 'residual')}")
    if facts["solver"] != "ekfac":
        said.append(
            f"scores are of the refined answers: relative residual{rank} "
            f"{_range(facts, 'refined_residual')}"
        )
    if "spearman" in facts:
        alike = f"scores of {facts['compared']:,} training examples by both correlate "
        alike += f"{_range(facts, 'spearman')} (Spearman), {_range(facts, 'pearson')} (Pearson)"
        if "top_shared" in facts:
            alike += f", and share {_range(facts, 'top_shared')} of the {TOP} highest"
        said.append(alike)
    if weakest := facts.get("weakest"):
        said.append(
            f"lowest cosine of a block: {weakest['block']}, {weakest['cosine']:.2g}, with "
            f"{weakest['share']:.0%} of the refined answers"
        )
    advice = "how near answers are to this matrix's is not how well scores foretell retraining: "
    if facts["solver"] == "ekfac":
        advice += "--solver cg, with its damping of 3 or --damping evidence, has done that better"
    else:
        advice += (
            "with a damping below 2, but for the evidence's, exact answers have done that worse"
        )
    return [*said, f"{advice} (docs/trust.md)"]


def _direction(cosine: float) -> str:
    for least, word in _DIRECTIONS:
        if cosine >= least:
            return word
    return "another"


def _range(facts: Mapping[str, Any], name: str, digits: int = 2) -> str:
    """The median of a number over queries, and where it goes from and to."""
    middle, low, high = (f"{float(f'{value:.{digits}g}'):,g}" for value in facts[name])
    return middle if low == high else f"{middle} ({low} to {high})"
