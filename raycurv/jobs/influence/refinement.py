"""IHVPs by a solver: ``(C + λ) x = v`` for the gradients v of queries, C of the fit's examples.

    gradients of queries     PLACE/gradients/         a file a block
    iterations               PLACE/solver/RANGE/      driver/linear_solver.py
    the last iterates        PLACE/ihvp/              truncated as all IHVPs are, a task a block
    residuals and the like   tables/solver/           a row a query and step

RANGE is of blocks: all of them, or where blocks are solved alone as many as fit memory, for every
pair of a query and a block is a direction then.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from raycurv.driver.corpus import Corpus, stored_corpus
from raycurv.driver.iterates import Iteration, System
from raycurv.driver.linear_solver import DescentSolver, LinearSolver
from raycurv.driver.multiplier import Multiplier
from raycurv.driver.settings import parse_bytes
from raycurv.driver.workers import Workers, in_order
from raycurv.errors import UserError
from raycurv.files.artifacts import ihvp_file, read_products, write_products
from raycurv.files.curvature_files import CurvatureFiles
from raycurv.files.manifest import Manifest
from raycurv.files.store import Store
from raycurv.files.tables import SOLVER, footer, read_directory, write_table
from raycurv.files.tensorfile import is_complete
from raycurv.jobs.fitted import Fitted
from raycurv.jobs.influence.influence_settings import InfluenceSettings
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import Damping
from raycurv.mathematics.exact.conjugate_gradients import Progress
from raycurv.mathematics.influence.ihvp import truncated_products
from raycurv.planning.influence_plan import VECTOR
from raycurv.stages.passes import Pass
from raycurv.stages.pool import Need

TABLE = "tables/solver"


def fitted_examples(fitted: Fitted) -> Corpus:
    """The examples of a fit; UserError where they are not all there."""
    found, count = stored_corpus(fitted.store, "data"), int(fitted.manifest.facts["examples"])
    if found is None or len(found) != count:
        there = 0 if found is None else len(found)
        raise UserError(
            f"--run {fitted.store.root}", f"its {count:,} examples, which products are made of",
            f"{there:,} of them",
            "Run the fit again, which makes what is missing; of a fit that extends another one, "
            "fit all of the data into one directory.",
        )  # fmt: skip
    return found


def examples_of_products(
    corpus: Corpus,
    wanted: int | None,
    seed: int,
    store: Store,
    flag: str = "--product-examples",
    directory: str = "work/products",
) -> Corpus:
    """The examples that products are a mean over: all of a corpus, or a seeded sample.

    Args:
        corpus: of them.
        wanted: how many; ``None`` for all.
        seed: of the sample.
        store: of the results, for the sample.
        flag: that says how many, for messages.
        directory: of the sample.

    Raises:
        UserError: there are fewer than are wanted.
    """
    if wanted is None:
        return corpus
    if wanted > len(corpus):
        raise UserError(
            f"{flag} {wanted}", f"at most the {len(corpus):,} examples that there are",
            f"{wanted:,}", "Leave it out to take all of them.",
        )  # fmt: skip
    chosen = np.sort(np.random.default_rng(seed).choice(len(corpus), wanted, replace=False))
    return corpus.among(chosen, store, directory)


@dataclass(frozen=True)
class Refinement:
    """How the IHVPs of some queries are made by a solver.

    Attributes:
        examples: that products are a mean over.
        curvature: of the fit, which preconditions.
        draws: of labels, for products of the Fisher.
        table: where the residuals go.
    """

    settings: InfluenceSettings
    workers: Workers
    manifest: Manifest
    examples: Corpus
    curvature: CurvatureFiles
    damping: Damping
    draws: int
    table: str = TABLE

    @classmethod
    def of(
        cls,
        settings: InfluenceSettings,
        workers: Workers,
        manifest: Manifest,
        examples: Corpus,
        curvature: CurvatureFiles,
        damping: Damping,
        draws: int,
        table: str = TABLE,
    ) -> Refinement:
        """The one that settings ask for.

        Args:
            examples: that products are a mean over.
            table: where the residuals go.

        Raises:
            UserError: the fit's curvature cannot precondition, or gives no damping.
        """
        where = f"--solver {settings.solver}"
        if curvature.method.ranked:
            raise UserError(
                where, "a fit whose blocks have an inverse each, to precondition with",
                f"one with --method {curvature.method}",
                "Fit with --method ekfac, or leave --solver out.",
            )  # fmt: skip
        if not curvature.method.curved and not damping.absolute:
            raise UserError(
                f"{where} --damping {damping}", "a damping that needs no eigenvalues",
                f"a multiple of them, of a fit with --method {curvature.method}",
                "Give an absolute one, --damping abs:1e-3 say; or fit with --method ekfac.",
            )  # fmt: skip
        if damping.value == 0.0:
            raise UserError(
                f"{where} --damping {damping}", "a damping above zero",
                "a system without one solution: there are directions that no example depends on",
                "Leave --damping out, or give a small one.",
            )  # fmt: skip
        return cls(settings, workers, manifest, examples, curvature, damping, draws, table)

    @property
    def coupled(self) -> bool:
        """Whether the blocks are one system."""
        return self.settings.coupling != "blocks"

    def make(self, span: str, label: str, ids: Sequence[str], gradients: Store, out: Store) -> None:
        """Make the IHVPs of some queries.

        Args:
            span: names these queries.
            label: which they are, for the progress.
            ids: their names.
            gradients: has their gradients.
            out: where IHVPs go, and where the solver works meanwhile.
        """
        for part in self._parts(span, len(ids), out):
            table = f"{self.table}/{span}-{_name(part)}.parquet"
            self._solve(part, table, label, ids, gradients, out)
        out.delete_directory("solver")

    def tables(self, span: str) -> list[str]:
        """The files of the table that are about some queries."""
        names = self.workers.store.names(self.table)
        return [name for name in names if name.startswith(f"{self.table}/{span}-")]

    def _parts(self, span: str, queries: int, out: Store) -> list[range]:
        """Blocks, by their places, that are solved together, of those that are not done yet."""
        blocks, done = self.workers.blocks, list[range]()
        for name in self.tables(span):
            start, stop = map(int, name.removesuffix(".parquet").split("-")[-2:])
            if all(is_complete(out, ihvp_file(b.name)) for b in blocks[start:stop]):
                done.append(range(start, stop))
            else:
                self.workers.store.delete(name)
        size = len(blocks)
        if not self.coupled:
            item = VECTOR * max(
                sum(b.d_out * b.d_in for b in mine) for mine in self.workers.by_stage
            )
            memory = parse_bytes("--query-memory", self.settings.query_memory)
            size = max(1, memory // item // queries)
        parts, at = list[range](), 0
        for one in [*done, range(len(blocks), len(blocks))]:
            parts += [range(i, min(i + size, one.start)) for i in range(at, one.start, size)]
            at = one.stop
        return parts

    def _solve(
        self, part: range, table: str, label: str, ids: Sequence[str], gradients: Store, out: Store
    ) -> None:
        settings, count = self.settings, len(ids)
        blocks = self.workers.blocks[part.start : part.stop]
        own = {
            block.name: range(0, count) if self.coupled else range(n * count, (n + 1) * count)
            for n, block in enumerate(blocks)
        }
        place = out.inside(f"solver/{_name(part)}")
        system = System(gradients, place, self.curvature, self.damping, own)
        name = f"solver-{table.removeprefix(self.table).removesuffix('.parquet').strip('/')}"
        work = Pass(name, "product", self.draws, matrix=settings.matrix or "ggn")
        feed = self.workers.feed(self.examples)
        multiplier = Multiplier(self.workers, self.manifest, feed, "products")
        steps, tolerance = settings.steps or 0, settings.tolerance or 0.0
        solver = LinearSolver(multiplier, system, ids, work, self.coupled, steps, tolerance)
        if settings.minibatch is not None:
            rate = torch.full((count,), settings.rate or 0.0, dtype=torch.float64)
            solver = DescentSolver(
                *(getattr(solver, one.name) for one in fields(solver)),
                corpus=self.examples, size=settings.minibatch, seed=settings.seed, rate=rate,
            )  # fmt: skip
            solver = solver if settings.rate else solver.rated(f"learning rate{label}")
            self.workers.reporter.say(f"learning rate {_spread(solver.rate.tolist())}")
        history = solver.solve(f"products{label}", self._show)
        rows = _rows(history, ids, None if self.coupled else [b.name for b in blocks])
        notes = footer({"fit": self.curvature.store.root})
        write_table(self.workers.store, table, pa.table(rows, schema=SOLVER), notes)
        ends = history[-1].outcomes
        if "diverged" in ends:
            query = ends.index("diverged")
            raise UserError(
                f"query {ids[query]!r}, step {len(history)} of descent",
                "an energy below zero, that of no answer at all",
                f"{float(history[-1].energy[query]):.3g}: it has diverged",
                "Give a --rate well below the one that was said above, or a larger --minibatch or "
                "--damping, to another --out.",
            )  # fmt: skip
        needs = [Need(8 * 8 * count * b.d_out * b.d_in, 0.0, b.name) for b in blocks]
        last = solver.answered(history)
        rank, seed = settings.rank_number(), settings.seed
        each = [(last, block, ids, rank, seed, out) for block in blocks]
        in_order(self.workers.run_tasks("IHVPs", write_answers, each, needs))

    def _show(self, number: int, progress: Progress) -> None:
        residual, running = progress.residual.flatten(), progress.outcomes.count("running")
        descends = self.settings.minibatch is not None
        said = f"step {number} of at most {self.settings.steps}: relative residual "
        said += _spread(residual.tolist())
        if descends:
            said += f" and energy {_spread(progress.energy.tolist())} before it, on its minibatch"
        elif number > 1:
            said += f", cosine to the step before {_spread(progress.cosine.flatten().tolist())}"
        self.workers.reporter.say(f"{said}; {running:,} of {len(residual):,} go on")

    def facts(self) -> dict[str, Any]:
        """What ``run.json`` says of the solver."""
        last = last_steps(read_directory(self.workers.store, self.table, SOLVER))
        residual = np.array(last["residual"])
        return {
            "examples": len(self.examples),
            "steps": max(last["step"].to_pylist(), default=0),
            "median_residual": float(np.median(residual)) if len(last) else 0.0,
            "largest_residual": float(residual.max(initial=0.0)),
            "outcomes": dict(Counter(last["outcome"].to_pylist())),
        }

    def said(self) -> str:
        """What was refined, in words."""
        facts, matrix = self.facts(), MATRICES[self.settings.matrix or "ggn"]
        of = "the whole model" if self.coupled else "each block alone"
        lost = facts["outcomes"].get("negative curvature", 0)
        rounded = f"; {lost:,} stopped where rounding left no curvature" if lost else ""
        way, size = "conjugate gradients", self.settings.minibatch
        if size is not None:
            way = f"descent on minibatches of at most {size:,}"
            rounded = " before the last step, on its minibatch"
        return (
            f"IHVPs by {facts['steps']} steps of {way} with {matrix} of {of} over "
            f"{facts['examples']:,} examples, damping {self.damping}: relative residual "
            f"{facts['median_residual']:.2g} at the median, {facts['largest_residual']:.2g} at most"
            f"{rounded}"
        )


MATRICES = {"ggn": "the Gauss-Newton matrix", "hessian": "the Hessian", "fisher": "the Fisher"}


def _name(part: range) -> str:
    return f"{part.start:05d}-{part.stop:05d}"


def _spread(values: Sequence[float]) -> str:
    """The median of some numbers, and their range."""
    found = np.array([value for value in values if value == value])
    if not len(found):
        return "unknown"
    low, middle, high = found.min(), np.median(found), found.max()
    return f"{middle:.3g}" if low == high else f"{middle:.3g} ({low:.3g} to {high:.3g})"


def _rows(
    history: Sequence[Progress], ids: Sequence[str], blocks: Sequence[str] | None
) -> dict[str, list[Any]]:
    """The table's columns: a row a query and step, and block where these are solved alone."""
    names = [(query, block) for block in blocks or ("",) for query in ids]
    rows: dict[str, list[Any]] = {name: [] for name in SOLVER.names}
    before = ["running"] * len(names)
    for number, progress in enumerate(history, start=1):
        told = ("residual", "energy", "cosine", "curvature")
        numbers = {key: getattr(progress, key).flatten().tolist() for key in told}
        for i, outcome in enumerate(before):
            # A query that has stopped has nothing to say of later steps.
            if outcome == "running":
                rows["query_id"].append(names[i][0])
                rows["block"].append(names[i][1] or None)
                rows["step"].append(number)
                rows["outcome"].append(progress.outcomes[i])
                for key, values in numbers.items():
                    rows[key].append(values[i] if math.isfinite(values[i]) else None)
        before = progress.outcomes
    return rows


def last_steps(table: pa.Table) -> pa.Table:
    """Of a table of the solver the row at which each query (and block) stopped."""
    return table.filter(pc.not_equal(table["outcome"], "running"))


def write_answers(
    last: Iteration, block: Block, ids: Sequence[str], rank: int | None, seed: int, out: Store
) -> None:
    """Write a block's IHVPs: its last iterate, truncated to a rank."""
    system = last.system
    x = last.answer(system.curvature.open_spectral(block, {}))
    v = read_products(system.right, block.name)[0].dense()
    squares = torch.linalg.vector_norm(v, dim=(1, 2), dtype=torch.float64).square()
    found = truncated_products(x, rank, seed, ids, block, squares=squares)
    write_products(out, block.name, found, ids)
