"""Spectrum: traces, extreme eigenpairs and the density of curvature, into a directory of results.

    examples  -> data/                    tokenised once, or those of the fit
    traces    -> work/traces/             products with random vectors, and with their range
    Lanczos   -> work/lanczos/            a product a step, and the basis of what it reaches
    direction -> work/direction/          the product with one step from the model
    tables    -> tables/

Every arrow leaves finished files, so the same command goes on where it stopped. Vectors are files
of their blocks; between these travel dot products alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raycurv.data.sources import fingerprint
from raycurv.data.uri import shown
from raycurv.driver.corpus import Corpus, open_corpus
from raycurv.driver.multiplier import Multiplier
from raycurv.driver.settings import DTYPES, identity
from raycurv.driver.workers import Workers
from raycurv.errors import DamagedFile
from raycurv.files.artifacts import check_names
from raycurv.files.block_rows import BLOCKS_FILE
from raycurv.files.manifest import Manifest
from raycurv.files.store import Store
from raycurv.files.tables import (
    DENSITY,
    DIRECTION,
    EIGENVALUES,
    SIZES,
    TRACES,
    footer,
    read_rows,
    read_table,
    write_table,
)
from raycurv.files.tensorfile import is_complete
from raycurv.jobs.drafts import recipe_of
from raycurv.jobs.fitted import Fitted, GivenAgain, chosen_blocks, fitted_blocks, open_fitted
from raycurv.jobs.influence.refinement import examples_of_products, fitted_examples
from raycurv.jobs.inputs import Inputs
from raycurv.jobs.losses import Losses
from raycurv.jobs.recorded import fit_prints
from raycurv.jobs.shell import Shell, open_shell
from raycurv.jobs.spectrum.lanczos_files import Lanczos, run_lanczos, write_eigenvectors
from raycurv.jobs.spectrum.spectrum_settings import SpectrumSettings
from raycurv.jobs.spectrum.stepping import open_step, stepped
from raycurv.jobs.spectrum.trace_files import diagonal_file, estimate_traces, write_diagonals
from raycurv.jobs.spectrum.vector_files import Probes, Products, Stored, Vectors
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.choice import choose_blocks
from raycurv.mathematics.exact.grams import dots
from raycurv.mathematics.exact.head import REACH, SLOPE
from raycurv.mathematics.exact.lanczos import End
from raycurv.mathematics.exact.quadratic_model import (
    AlongDirection,
    SampleBias,
    largest_rate,
    softmax_radius,
)
from raycurv.mathematics.loss.differentiation import LOSS
from raycurv.mathematics.loss.objective import Classification, Objective, TokenLabels
from raycurv.mathematics.loss.shipped import open_objective
from raycurv.models.model import Model
from raycurv.progress.reporter import Reporter

# The seeds of probes are the job's own, for what needs others.
_OF_TRACES, _OF_LANCZOS, _OF_SAMPLES = 0, 1, 2
# Points of the density, and its smoothing as a share of the width of the spectrum.
_POINTS, _SMOOTHING = 512, 1 / 200
# An eigenvalue's residual, as a share of the largest one, up to which it is called converged.
CONVERGED = 1e-2

Numbers = dict[str, Any]


def measure_spectrum(
    settings: SpectrumSettings, inputs: Inputs | None = None, reporter: Reporter | None = None
) -> tuple[Store, Numbers]:
    """Measure what the settings ask for; gives the store of the results, and the numbers.

    Args:
        settings: of the job.
        inputs: model, data and objective where they are in memory.
        reporter: shows progress; by default to the terminal.

    Returns:
        the store, and the numbers: ``trace`` and its ``trace_margin`` (95 %), ``fitted_trace``;
        ``largest`` and ``smallest`` eigenvalue with their residuals, ``largest_rate``;
        ``direction``; ``examples``, ``weights``, ``blocks``. Only those that were measured.

    Raises:
        UserError: a mistake in settings, model or data, or another job works on the same directory;
            nothing that was computed is lost.
        NumericalError: a product is not finite.
    """
    with open_shell("spectrum", settings, settings.out, inputs or Inputs(), reporter) as shell:
        return shell.store, _measure(shell)


@dataclass(frozen=True)
class _Subject:
    """What is measured.

    Attributes:
        fitted: the fit that it is of, if there is one.
    """

    network: Model
    objective: str | Objective
    blocks: tuple[Block, ...]
    fitted: Fitted | None


def _measure(shell: Shell[SpectrumSettings]) -> Numbers:
    store = shell.store
    subject = _subject(shell)
    network, settings = subject.network, shell.settings
    source = shell.inputs.source("data", settings) if settings.data else None
    fit = None if subject.fitted is None else subject.fitted.manifest
    prints: Numbers = {} if fit is None else fit_prints(fit)
    prints |= shell.prints_of(network)
    if source is not None:
        prints["data"] = fingerprint(source)
    step: Vectors | None = None
    if settings.direction:
        step, prints["direction"] = open_step(settings, network, subject.blocks, shell.inputs)
    places = {n: shown(getattr(settings, n)) for n in ("run", "model", "data", "direction")}
    places = {name: place for name, place in places.items() if place}
    dtype = settings.dtype or ("float32" if fit is None else fit.settings["dtype"])
    manifest = shell.begin(prints, places | shell.notes_of(network), {"dtype": dtype})
    if shell.is_complete("tables", lambda: _forget_damaged(store, manifest, subject.blocks)):
        return _numbers(manifest)
    opened = open_objective(subject.objective)
    (corpus,) = shell.examples(lambda: _examples(shell, subject, source, opened))
    recipe = recipe_of(
        {"method": "identity", "dtype": dtype, "store_dtype": dtype}, settings.logits_chunk
    )
    recipe = replace(recipe, directions=settings.at_once, vectors=_vectors(settings))
    shell.check_plan(network, subject.blocks, recipe, corpus.widths)
    with shell.workers(
        network, subject.objective, subject.blocks, DTYPES[dtype], settings.seed
    ) as workers:
        if settings.check_causality:
            shell.check_causality(workers, opened, corpus)
        job = _Measurement(settings, workers, manifest, corpus, subject, step)
        job.run()
    manifest.facts["spectrum"] = job.numbers
    store.delete_directory("work")
    if subject.fitted is None or source is not None:
        store.delete_directory("data")
    manifest.complete.append("tables")
    shell.end(_sentence(_numbers(manifest), settings))
    return _numbers(manifest)


def _vectors(settings: SpectrumSettings) -> int:
    """How many vectors lie in files at most."""
    traces = {"none": 0, "hutchinson": 1}.get(settings.traces, 2) * settings.probes
    # What is left of every step, and the product of the last one.
    basis = (settings.steps + 2) * settings.columns * (2 if settings.sizes else 1)
    return traces + (basis if settings.steps else 0) + 2 * bool(settings.direction)


def _subject(shell: Shell[SpectrumSettings]) -> _Subject:
    settings, inputs = shell.settings, shell.inputs
    if settings.run:
        given = GivenAgain(
            settings.model, settings.adapter, settings.objective or "", "--objective",
            settings.trust_remote_code, settings.tokenizer,
        )  # fmt: skip
        fitted = open_fitted(settings.run, inputs, given)
        blocks = chosen_blocks(fitted_blocks(fitted.store, fitted.network), settings.blocks)
        return _Subject(fitted.network, fitted.objective, blocks, fitted)
    network = inputs.open_model(
        settings.model, settings.trust_remote_code, settings.ignore_tensors, settings.adapters(),
        settings.tokenizer,
    )  # fmt: skip
    objective = shell.objective_for(network)
    blocks = choose_blocks(
        network.skeleton(), settings.blocks, network.default_scope, network.tied_head,
        network.idle, network.held,
    )  # fmt: skip
    check_names(blocks)
    return _Subject(network, objective, blocks, None)


def _examples(
    shell: Shell[SpectrumSettings], subject: _Subject, source: Any, objective: Objective
) -> Corpus:
    """The examples that are given, or those of the fit; a sample of them, if that is asked for."""
    settings, fitted, store = shell.settings, subject.fitted, shell.store
    most, seed = settings.max_examples, settings.seed
    if source is not None or fitted is None:
        masks = seed if fitted is None else fitted.settings["seed"]
        read_as = None if fitted is None else fitted.manifest.facts.get("tokenizer")
        return open_corpus(
            store, "data", source, "--data", subject.network, settings, most, seed, objective,
            masks=masks, read_as=read_as,
        )  # fmt: skip
    everything = most is None or most >= int(fitted.manifest.facts["examples"])
    return examples_of_products(fitted_examples(fitted), None if everything else most, seed, store)


def _sample(count: int, most: int, seed: int) -> np.ndarray[Any, Any]:
    """So many numbers below ``count``, ascending; of a seed, smaller samples are part of larger."""
    return np.sort(np.random.default_rng([seed % 2**64, _OF_SAMPLES]).permutation(count)[:most])


@dataclass
class _Measurement:
    """A spectrum under way, from the examples to the tables."""

    settings: SpectrumSettings
    workers: Workers
    manifest: Manifest
    corpus: Corpus
    subject: _Subject
    step: Vectors | None
    numbers: Numbers = field(default_factory=dict)

    @property
    def store(self) -> Store:
        """The directory of the results."""
        return self.workers.store

    def run(self) -> None:
        settings, blocks = self.settings, self.workers.blocks
        self.numbers |= {
            "examples": len(self.corpus), "blocks": len(blocks),
            "weights": sum(b.d_out * b.d_in for b in blocks),
        }  # fmt: skip
        products = self._products(self.corpus)
        if settings.traces != "none":
            self._traces(products)
        if settings.steps:
            found = self._lanczos(products)
            if settings.sizes:
                self._sizes(found)
        if self.step is not None:
            self._along(products, self.step)

    def _products(self, corpus: Corpus, mark: str = "") -> Products:
        multiplier = Multiplier(
            self.workers, self.manifest, self.workers.feed(corpus), f"data{mark}"
        )
        settings = self.settings
        return Products(multiplier, settings.matrix, settings.draws, settings.at_once, mark)

    def _write(self, name: str, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
        write_table(self.store, table_file(name), table, footer(identity(self.settings)))

    def _traces(self, products: Products) -> None:
        settings, seed = self.settings, _seed(self.settings.seed, _OF_TRACES)
        found = estimate_traces(products, settings.traces, settings.probes, seed)
        if settings.diagonal:
            write_diagonals(products, settings.probes, seed)
        fitted = self._fitted_traces()
        numbers = zip(
            found.value.tolist(), found.standard_error.tolist(), found.margin.tolist(), strict=True
        )
        *own, (total, _, margin) = numbers
        rows = [
            {
                "block": block.name, "weights": block.d_out * block.d_in, "trace": trace,
                "standard_error": error, "low": trace - half, "high": trace + half,
                "fitted": fitted.get(block.name),
            }
            for block, (trace, error, half) in zip(self.workers.blocks, own, strict=True)
        ]  # fmt: skip
        self._write("traces", rows, TRACES)
        self.numbers |= {"trace": total, "trace_margin": margin}
        if len(fitted) == len(rows):
            self.numbers["fitted_trace"] = math.fsum(fitted.values())
            assert self.subject.fitted is not None
            self.numbers["fitted_examples"] = self.subject.fitted.manifest.facts["examples"]

    def _fitted_traces(self) -> dict[str, float]:
        """ΣΛ of the blocks of a fit that has curvature."""
        if self.subject.fitted is None:
            return {}
        table = read_table(self.subject.fitted.store, BLOCKS_FILE)
        pairs = zip(table["block"].to_pylist(), table["trace"].to_pylist(), strict=True)
        mine = {block.name for block in self.workers.blocks}
        return {name: trace for name, trace in pairs if name in mine and trace is not None}

    def _lanczos(self, products: Products) -> Lanczos:
        settings = self.settings
        weights = self.numbers["weights"]
        columns = min(settings.columns, weights)
        start = Probes(_seed(settings.seed, _OF_LANCZOS), range(columns))
        found = run_lanczos(products, start, settings.steps)
        krylov = found.krylov
        ends: tuple[End, ...] = ("top", "bottom")
        pairs = {
            end: _pairs(found, end, max(1, settings.pairs), self.workers.dtype) for end in ends
        }
        rows = [
            {"end": end, "index": index, "eigenvalue": value, "residual": residual}
            for end in ends
            for index, (value, residual) in enumerate(pairs[end][: settings.pairs])
        ]
        self._write("eigenvalues", rows, EIGENVALUES)
        (largest, of_largest), (smallest, of_smallest) = (pairs[end][0] for end in ends)
        width = (largest - smallest) * _SMOOTHING or 1.0
        margin = 4 * width
        grid = torch.linspace(smallest - margin, largest + margin, _POINTS, dtype=torch.float64)
        density, error = krylov.density(grid, width)
        self._write(
            "density",
            [
                {"eigenvalue": x, "density": y, "standard_error": None if math.isnan(e) else e}
                for x, y, e in zip(grid.tolist(), density.tolist(), error.tolist(), strict=True)
            ],
            DENSITY,
        )
        self.numbers |= {
            "largest": largest, "largest_residual": of_largest, "smallest": smallest,
            "smallest_residual": of_smallest, "steps": len(krylov.sizes), "smoothing": width,
            "exhausted": len(krylov.sizes) < settings.steps,
        }  # fmt: skip
        if largest > 0:
            self.numbers["largest_rate"] = largest_rate(largest)
        if settings.eigenvectors:
            each = {end: krylov.end(end, settings.pairs).coefficients for end in ends}
            parts = {end: found.combinations(c) for end, c in each.items()}
            out = Stored(self.store, "eigenvectors", settings.pairs)
            products.of_blocks(write_eigenvectors, parts, out, products.dtype)
        return found

    def _sizes(self, found: Lanczos) -> None:
        """The largest eigenvalue on parts of the examples, begun at what it is on all."""
        settings, count = self.settings, len(self.corpus)
        top = found.krylov.end("top", min(settings.columns, len(found.krylov.h_KK)))
        start = found.combinations(top.coefficients)
        rows = []
        for share in (4, 2):
            part = count // share
            if part < 1:
                continue
            numbers = _sample(count, part, settings.seed)
            corpus = self.corpus.among(numbers, self.store, f"work/part-{share}")
            products = self._products(corpus, f"part-{share}-")
            part_found = run_lanczos(products, start, settings.steps)
            value, residual = _pairs(part_found, "top", 1, self.workers.dtype)[0]
            rows.append({"examples": part, "eigenvalue": value, "residual": residual})
        facts = self.numbers
        rows.append({
            "examples": count, "eigenvalue": facts["largest"],
            "residual": facts["largest_residual"],
        })  # fmt: skip
        self._write("sizes", rows, SIZES)
        if len(rows) > 1:
            counts, values = zip(
                *((row["examples"], row["eigenvalue"]) for row in rows), strict=True
            )
            line = SampleBias.through([int(n) for n in counts], values)
            facts |= {"largest_bias": line.at(count), "largest_limit": line.limit}

    def _along(self, products: Products, step: Vectors) -> None:
        """The loss along a step: its slope, its curvature, and what it is at its end."""
        image, found = products.along("direction", step, "products with the step")
        made: Vectors = image
        if self.settings.matrix != "ggn":
            made = products.of("direction-matrix", step, "products with the step")
        blocks = self.workers.blocks
        dotted = products.of_blocks(_step_dots, step, made, products.dtype)
        rows = [
            {"block": block.name, "sq_norm": square, "curvature": curvature}
            for block, (square, curvature) in zip(blocks, dotted, strict=True)
        ]
        self._write("direction", rows, DIRECTION)
        reach = float(found[REACH])
        softmax = isinstance(open_objective(self.subject.objective), TokenLabels | Classification)
        along = AlongDirection(
            float(found[LOSS]), float(found[SLOPE]), math.fsum(c for _, c in dotted),
            softmax_radius(reach) if softmax else math.inf,
        )  # fmt: skip
        behind = stepped(self.subject.network, blocks, step, "the step")
        losses = Losses(self.workers, self.manifest, self.corpus)
        measured = float(losses.of(behind, "losses behind the step").mean())
        self.workers.become(self.subject.network)
        self.numbers["along"] = {
            "loss": along.loss, "slope": along.slope, "curvature": along.curvature,
            "norm": math.sqrt(math.fsum(s for s, _ in dotted)), "predicted": along.predicted,
            "measured": measured, "best": along.best if math.isfinite(along.best) else None,
            "radius": along.radius if math.isfinite(along.radius) else None,
        }  # fmt: skip


def _step_dots(
    block: Block, step: Vectors, image: Vectors, dtype: torch.dtype
) -> tuple[float, float]:
    v = step.read(block, dtype)
    return float(dots(v, v)), float(dots(v, image.read(block, dtype)))


def table_file(name: str) -> str:
    """Where a table of a spectrum lies."""
    return f"tables/{name}/part-00000.parquet"


def _pairs(found: Lanczos, end: End, count: int, dtype: torch.dtype) -> list[tuple[float, float]]:
    """Eigenvalues and their residuals, which are no smaller than what the dtype tells."""
    pairs = found.krylov.end(end, count)
    least = torch.finfo(dtype).eps * float(found.krylov.pairs.values.abs().max())
    return list(zip(pairs.values.tolist(), pairs.residuals.clamp(min=least).tolist(), strict=True))


def _seed(seed: int, purpose: int) -> int:
    """Another seed for each purpose."""
    return (seed << 2) + purpose


def _forget_damaged(store: Store, manifest: Manifest, blocks: Sequence[Block]) -> bool:
    """Take back that all is finished, unless every table and file is whole."""
    settings = manifest.settings
    wanted = ["traces"] * (settings["traces"] != "none")
    wanted += ["eigenvalues", "density"] * (settings["steps"] > 0)
    wanted += ["sizes"] * settings["sizes"] + ["direction"] * ("direction" in manifest.fingerprints)
    files = [diagonal_file(b.name) for b in blocks] if settings["diagonal"] else []
    if settings["eigenvectors"]:
        files += [Stored(store, "eigenvectors", 0).file(b.name) for b in blocks]
    try:
        if all(read_rows(store, table_file(name)) >= 0 for name in wanted) and all(
            is_complete(store, name) for name in files
        ):
            return False
    except (DamagedFile, FileNotFoundError):
        pass
    manifest.complete.remove("tables")
    manifest.write(store)
    return True


def _numbers(manifest: Manifest) -> Numbers:
    found: Numbers = manifest.facts["spectrum"]
    return found


_NAMES = {
    "ggn": "the Gauss-Newton matrix", "hessian": "the Hessian", "fisher": "the Fisher matrix",
    "empirical": "the empirical Fisher matrix",
}  # fmt: skip


def _sentence(found: Numbers, settings: SpectrumSettings) -> str:
    """What was found, in words."""
    said = []
    if "trace" in found:
        of_fit = ""
        if "fitted_trace" in found:
            of_fit = f"; ΣΛ of {found['fitted_examples']:,} examples {found['fitted_trace']:.4g}"
        said.append(f"trace {found['trace']:.4g} ± {found['trace_margin']:.2g} (95 %{of_fit})")
    if "largest" in found:
        said.append(
            f"largest eigenvalue {found['largest']:.4g} (residual {found['largest_residual']:.1g}"
            + _unsure(found, "largest")
            + f"), smallest {found['smallest']:.3g} (residual {found['smallest_residual']:.1g}"
            + _unsure(found, "smallest") + ")"
        )  # fmt: skip
    if "largest_rate" in found:
        said.append(
            "gradient descent is stable at learning rates below "
            f"{found['largest_rate']:.3g} along its quadratic model"
        )
    if "largest_bias" in found:
        said.append(
            f"for so few examples the largest eigenvalue is about {found['largest_bias']:.2g} "
            "too large"
        )
    if "along" in found:
        said.append(_said_along(found["along"]))
    counts = ", ".join(f"{found[name]:,} {name}" for name in ("blocks", "weights", "examples"))
    return f"{_NAMES[settings.matrix]} of {counts}: " + "; ".join(said)


def _unsure(found: Numbers, which: str) -> str:
    scale = max(abs(found["largest"]), abs(found["smallest"]))
    if found[f"{which}_residual"] <= CONVERGED * scale:
        return ""
    return ", not converged: give more --steps"


def _said_along(found: Numbers) -> str:
    """What a step does, in words."""
    said = (
        f"along the step the loss goes from {found['loss']:.6g} to {found['measured']:.6g}; to "
        f"second order {found['predicted']:.6g} (slope {found['slope']:.3g}, curvature "
        f"{found['curvature']:.3g})"
    )
    if found["radius"] is None:
        return said
    kept = "within" if found["radius"] > 1 else "beyond"
    return f"{said}, {kept} the softmax radius of {found['radius']:.3g} steps"
