"""Influence: scores of every query against every training example, into a directory of results.

    queries  -> IHVPs -> work/pass-000/ihvp/      as many queries as fit --query-memory
    training examples · IHVPs -> scores/          streamed, a file a commit
                                 self/            with --self

With ``--candidates`` a pass goes over what its queries ask for alone (candidates.py), and with
``--candidates-check`` one more over all examples, to check/. With ``--certify`` some queries are
answered once more, by exact products (certificate.py).

Queries that do not fit together take several passes over the training examples; the products of a
finished query pass are files, so a restart does not make them again. Only where all is one process
and they are whole (``--rank full``) they stay in memory: each is of the model's size, and takes
longer to write and read than to make.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raycurv.data.bm25 import Matching, check_installed
from raycurv.data.sources import Source, fingerprint
from raycurv.data.tokenizer import LazyTokenizer, has_tokenizer
from raycurv.driver.commits import last_commit, plan_mark, read_commit
from raycurv.driver.corpus import Corpus, open_corpus, stored_corpus
from raycurv.driver.settings import DTYPES, identity, parse_bytes
from raycurv.driver.sinks import Array, Sink
from raycurv.driver.sweep import Sweep, Task, commit_directory
from raycurv.driver.workers import Workers, in_order
from raycurv.errors import DamagedFile, UserError
from raycurv.files.artifacts import (
    ihvp_file,
    keeps_beside,
    read_beside,
    read_products,
    write_products,
)
from raycurv.files.block_rows import unreached_blocks
from raycurv.files.curvature_files import CurvatureFiles
from raycurv.files.lock import hold
from raycurv.files.manifest import Manifest
from raycurv.files.row_files import open_inverses
from raycurv.files.store import Store
from raycurv.files.tables import ROWS, footer, lengths_schema, read_rows, score_matrix, write_tables
from raycurv.files.tensorfile import is_complete
from raycurv.jobs.damping_choice import choose_damping, record_heldout, used_damping
from raycurv.jobs.drafts import recipe_of
from raycurv.jobs.fitted import Fitted, GivenAgain, columns_given, fitted_blocks, open_fitted
from raycurv.jobs.influence.candidates import (
    TOP,
    Candidates,
    Pairs,
    candidates_print,
    choose_candidates,
    measure,
    store_candidates,
    stored_candidates,
)
from raycurv.jobs.influence.certificate import (
    COMPARED,
    DIRECTORY,
    SOLVED,
    Certifier,
    are_trained,
    asked_for,
    both_named,
    certificate_words,
    check_certified,
    solving,
)
from raycurv.jobs.influence.gatherers import GradientsGatherer, ProductsGatherer, ScoreGatherer
from raycurv.jobs.influence.influence_settings import InfluenceSettings
from raycurv.jobs.influence.refinement import (
    TABLE,
    Refinement,
    examples_of_products,
    fitted_examples,
)
from raycurv.jobs.influence.removals import GRID, Removals, named, read_removals
from raycurv.jobs.influence.score_rows import ScoreRows
from raycurv.jobs.inputs import Inputs
from raycurv.jobs.loss_check import check_loss
from raycurv.jobs.objectives import check_fits
from raycurv.jobs.rank_products import RankProducts
from raycurv.jobs.recorded import fit_prints, read_run
from raycurv.jobs.scored_data import recorded_data
from raycurv.jobs.shell import Shell, open_shell
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import CHOSEN, Damping
from raycurv.mathematics.influence.ihvp import BlockProducts, product_elements
from raycurv.mathematics.loss.objective import Objective
from raycurv.mathematics.loss.shipped import open_measurement, open_objective
from raycurv.mathematics.rank.rank_inverse import RankInverses
from raycurv.models.model import Model
from raycurv.planning.influence_plan import VECTOR
from raycurv.progress.reporter import Reporter
from raycurv.stages.passes import Pass


def influence(
    settings: InfluenceSettings, inputs: Inputs | None = None, reporter: Reporter | None = None
) -> Store:
    """Score queries against training examples; gives the store of the results.

    Args:
        settings: of the job; without ``train`` only IHVPs are made.
        inputs: queries, training examples, and the fit's model and objective where they are in
            memory.
        reporter: shows progress; by default to the terminal.

    Raises:
        UserError: a mistake in settings, run, model or data, or another job works on the same
            directory; nothing that was computed is lost.
    """
    with open_shell("influence", settings, settings.out, inputs or Inputs(), reporter) as shell:
        _score(shell)
    return shell.store


def influence_and_tell(
    settings: InfluenceSettings, reporter: Reporter
) -> tuple[Store, dict[str, Any]]:
    """As :func:`influence`; gives the store, and where there are any: under ``unreached`` how many
    queries have a part of their gradient in blocks that nothing of the fit reached, and the largest
    such part; under ``candidates`` how many they were, and what they hold; under ``damping`` what
    was chosen; under ``certificate`` how far answers are from exact ones."""
    store = influence(settings, reporter=reporter)
    manifest = read_run(store)
    found: dict[str, Any] = {}
    if manifest is not None and (shares := _shares(manifest)):
        found["unreached"] = {"queries": len(shares), "largest_share": max(shares.values())}
    for name in ("candidates", "damping", "certificate"):
        if manifest is not None and name in manifest.facts:
            found[name] = manifest.facts[name]
    return store, found


def _shares(manifest: Manifest) -> dict[str, float]:
    found: dict[str, float] = manifest.facts.get("unreached_shares", {})
    return found


def _score(shell: Shell[InfluenceSettings]) -> None:
    settings, store = shell.settings, shell.store
    queries = shell.inputs.source("queries", settings)
    # Without training examples only IHVPs are made.
    train = shell.inputs.source("train", settings) if settings.train else None
    chosen = shell.inputs.or_named("candidates", settings) if settings.candidates else None
    fitted = open_fitted(
        settings.run,
        shell.inputs,
        GivenAgain(
            settings.model,
            settings.adapter,
            settings.fit_objective,
            "--fit-objective",
            settings.trust_remote_code,
            settings.tokenizer,
        ),
    )
    blocks = fitted_blocks(fitted.store, fitted.network)
    objective = open_objective(fitted.objective)
    # Of the queries; in memory, or by name, or the fit's own.
    named = shell.inputs.or_named("objective", settings)
    if named is not None:
        check_fits(fitted.network, named)
    measured = objective if named is None else open_measurement(named)
    if settings.per_token and not objective.per_token:
        raise UserError(
            "--per-token", "an objective that is called on positions (causal-lm)",
            str(fitted.objective), "Leave --per-token out.",
        )  # fmt: skip
    dtype = settings.dtype or fitted.settings["dtype"]
    prints = fit_prints(fitted.manifest) | {"queries": fingerprint(queries)}
    if train is not None:
        prints["train"] = fingerprint(train)
    if chosen is not None:
        prints["candidates"] = candidates_print(chosen)
    tried = shell.inputs.or_named("removals", settings) if settings.removals else None
    if tried is not None:
        prints["removals"] = fingerprint(tried)
    prints |= shell.tokenizer_print()
    places: dict[str, Any] = {"run": fitted.store.root} | shell.notes_of(fitted.network)
    places |= recorded_data(settings, shell.inputs, fitted.network)
    # An index of many examples takes long: what makes it is missed at once.
    if isinstance(chosen, str) and Matching.parse("--candidates", chosen) is not None:
        check_installed()
    manifest = shell.begin(prints, places, {"dtype": dtype}, fitted.network)
    for sentence in _read_otherwise(fitted.manifest, settings, prints):
        shell.reporter.say(sentence)
    products = blocks if settings.ihvp else ()
    unchecked = " and ".join(_lacking(manifest, settings))
    lost = {"lost": f"{unchecked} is still to be made"} if unchecked else {}
    if shell.is_complete(
        "scores", lambda: _forget_damaged(store, manifest, products, bool(unchecked)), **lost
    ):
        return
    corpora = _Corpora(store, fitted, settings, objective)
    sources = [lambda: corpora.open("queries", queries, prints["queries"], None, measured)]
    if train is not None:
        most = settings.max_examples
        sources.append(lambda: corpora.open("train", train, prints["train"], most, objective))
    asked, *others = shell.examples(*sources)
    if measured.per_token and _measures_loss(measured):
        asked.check_targets("--queries")
    training = others[0] if others else None
    multiplied = None
    if settings.solver != "ekfac":
        multiplied = examples_of_products(
            fitted_examples(fitted), settings.product_examples, settings.seed, store
        )
    seed: int = fitted.settings["seed"]
    with shell.workers(
        fitted.network, fitted.objective, blocks, DTYPES[dtype], seed, named,
        settings.check_capture,
    ) as workers:  # fmt: skip
        recipe = recipe_of(fitted.settings | {"dtype": dtype}, settings.logits_chunk, settings)
        recipe = replace(recipe, whole_queries=not measured.per_token)
        candidates = None
        if chosen is not None:
            assert training is not None
            candidates = _candidates(shell, chosen, asked, training, fitted.network)
        widths = None if training is None else training.widths
        if widths is not None and candidates is not None and not settings.candidates_check:
            widths = widths[candidates.union]
        shell.check_plan(
            fitted.network, blocks, recipe, widths, asked.widths,
            None if multiplied is None else multiplied.widths,
        )  # fmt: skip
        if settings.check_causality:
            shell.check_causality(workers, objective, asked if training is None else training)
        curvature = CurvatureFiles.of(fitted.store, fitted.manifest)
        if settings.inverse is not None and not curvature.method.ranked:
            raise UserError(
                "--inverse", "a fit with --method mfac", f"one with {curvature.method}",
                "Leave --inverse out: the other methods have each block's own inverse.",
            )  # fmt: skip
        joint = settings.inverse != "block"
        assert settings.damping is not None
        damping = choose_damping(settings.damping, workers, fitted, manifest, joint)
        refinement = None
        if multiplied is not None:
            assert damping is not None, "chosen by the scores of another solver"
            draws = int(fitted.settings.get("draws", 1))
            refinement = Refinement.of(
                settings, workers, manifest, multiplied, curvature, damping, draws
            )
        certifier = None
        if settings.certify:
            certifier = _certifier(settings, workers, manifest, fitted, curvature, training)
        removals = None
        if tried is not None and damping is None:
            assert training is not None
            removals = read_removals(tried, asked, training)
        if settings.check_causality:
            check_loss(workers, manifest, fitted)
        job = _Influence(
            settings, workers, manifest, asked, training, curvature, damping or Damping(),
            candidates, removals, refinement, certifier,
        )  # fmt: skip
        job.run()
    if settings.certify:
        for sentence in certificate_words(manifest.facts["certificate"]):
            shell.reporter.say(sentence)
    shell.end(job.said())


def _certifier(
    settings: InfluenceSettings, workers: Workers, manifest: Manifest, fitted: Fitted,
    curvature: CurvatureFiles, train: Corpus | None,
) -> Certifier:  # fmt: skip
    """What makes the certificate that is asked for; its damping is still to be said."""
    check_certified(curvature.method)
    how, trained = solving(settings), are_trained(settings, train, fitted)
    of = train if trained and train is not None else fitted_examples(fitted)
    multiplied = examples_of_products(
        of, how.product_examples, how.seed, workers.store, "--certify-examples",
        f"work/certified-{'train' if trained else 'fit'}-{how.product_examples}",
    )  # fmt: skip
    draws = int(fitted.settings.get("draws", 1))
    refinement = Refinement.of(
        how, workers, manifest, multiplied, curvature, Damping(), draws, SOLVED
    )
    return Certifier(refinement, trained)


def _read_otherwise(
    fit: Manifest, settings: InfluenceSettings, prints: Mapping[str, Any]
) -> Iterator[str]:
    """What a fit was told of how data is read, and a scoring was not: a line each."""
    longest, data = fit.settings.get("max_length"), fit.fingerprints["data"]
    if longest is not None and settings.max_length is None:
        yield (
            f"the fit had --max-length {longest:,}, which is not given here: examples are as long "
            "as the model takes them"
        )
    flags = columns_given(data)
    if not flags:
        return
    content = {name: said for name, said in data.items() if name not in ("split", "columns")}
    for name in ("queries", "train"):
        own = prints.get(name, {})
        if "columns" not in own and content.items() <= own.items():
            yield f"{name}: the fit's data, which it read with {flags}; not given here"


def _candidates(
    shell: Shell[InfluenceSettings], chosen: Any, asked: Corpus, training: Corpus, network: Model
) -> Candidates | None:
    """The candidates of all queries, as a phase with its progress; ``None`` for all examples."""
    found = stored_candidates(shell.store, asked, training)
    if found is not None:
        return found
    tokenizer = None
    if network.tokenizer_dir is not None and has_tokenizer(network.tokenizer_dir):
        tokenizer = LazyTokenizer(network.tokenizer_dir, network.trust_remote_code)
    with shell.reporter.phase("candidates", len(training), "examples") as phase:
        forced = shell.settings.force
        found = choose_candidates(chosen, asked, training, tokenizer, phase.advance, forced)
    if found is None:
        shell.reporter.say(
            f"--candidates: all {len(training):,} training examples are candidates of every query; "
            "scores are those without it"
        )
    else:
        store_candidates(shell.store, found)
    return found


def _lacking(manifest: Manifest, settings: InfluenceSettings) -> Iterator[str]:
    """What finished scores lack of the measurements that are asked for."""
    there: dict[str, Any] | None = manifest.facts.get("candidates")
    wanted = min(settings.candidates_check, manifest.facts.get("queries_scored", 0))
    if wanted and there and there.get("check", {}).get("queries") != wanted:
        yield "the measurement of candidates"
    asked = manifest.facts.get("certificate", {}).get("asked")
    if settings.certify and asked != asked_for(settings):
        yield "the certificate"


def _forget_damaged(
    store: Store, manifest: Manifest, products: Sequence[Block], unchecked: bool
) -> bool:
    """Take back that passes are finished whose files are gone or of another length, and that all is
    where something is ``unchecked``."""
    files: dict[str, dict[str, int]] = manifest.facts["files"]
    damaged = [
        name
        for name, sizes in files.items()
        if any(store.size(file) != size for file, size in sizes.items())
    ]
    whole = all(is_complete(store, ihvp_file(block.name)) for block in products)
    if whole and not damaged and not unchecked:
        return False
    manifest.facts["files"] = {n: sizes for n, sizes in files.items() if n not in damaged}
    manifest.complete.remove("scores")
    manifest.write(store)
    return True


def _measures_loss(objective: Objective) -> bool:
    """Whether what is measured of a query is its loss: an example without one measures nothing."""
    own = getattr(type(objective), "measurement", None)
    return own is Objective.measurement or objective.measurement is objective.loss


@dataclass(frozen=True)
class _Corpora:
    """Finds the examples in the fit's directory, or stores them beside the results."""

    store: Store
    fitted: Fitted
    settings: InfluenceSettings
    objective: Objective

    def open(
        self, name: str, source: Source, mark: Any, max_examples: int | None, asks: Objective
    ) -> Corpus:
        """The examples of a source.

        Args:
            name: ``queries`` or ``train``.
            source: where they come from.
            mark: tells it from other sources.
            max_examples: a seeded sample of so many.
            asks: the objective that looks at them.
        """
        fit, network = self.fitted.manifest, self.fitted.network
        loss_on = self.settings.loss_on or fit.settings.get("loss_on")
        settings = replace(self.settings, loss_on=loss_on)
        flag, of_fit, masks = f"--{name}", self.objective, fit.settings["seed"]
        same = mark == fit.fingerprints["data"] and set(asks.columns) <= set(of_fit.columns)
        same &= (asks.reads, asks.shift) == (of_fit.reads, of_fit.shift)
        # A fit of before there was a setting has its default.
        alike = {"loss_on": None, "max_length": None, "long": "error", "empty": "error"}
        same &= all(getattr(settings, k) == fit.settings.get(k, v) for k, v in alike.items())
        if same and max_examples is None and fit.settings["max_examples"] is None:
            # Reading beside another job needs no lock: files are whole. Making them again does.
            there = stored_corpus(self.fitted.store, "data")
            if there is not None:
                return there
            with hold(self.fitted.store, "influence.py", flag="--run"):
                return open_corpus(
                    self.fitted.store, "data", source, flag, network, settings, None,
                    settings.seed, of_fit, masks=masks, read_as=fit.facts.get("tokenizer"),
                )  # fmt: skip
        # A measurement of one's own may look at what is no target.
        return open_corpus(
            self.store, f"work/{name}", source, flag, network, settings, max_examples,
            settings.seed, asks, needs_loss=asks is self.objective, masks=masks,
            read_as=fit.facts.get("tokenizer"),
        )  # fmt: skip


@dataclass(frozen=True)
class _Asked:
    """Queries whose IHVPs fit into memory together: they share a pass over the examples.

    Attributes:
        numbers: which of all queries.
        span: names the pass by its queries: a name never means others after a restart.
        ids: their names, in order.
        place: where their IHVPs lie.
        label: which pass it is, for the progress, where there are several.
        dampings: under each of which they are scored; empty for the job's own.
        names: what their IHVPs are called, where there are several of each.
        examples: numbers of the training examples that alone they are scored on.
    """

    numbers: Sequence[int]
    span: str
    ids: tuple[str, ...]
    place: Store
    label: str
    dampings: tuple[Damping, ...] = ()
    names: tuple[str, ...] = ()
    examples: Array | None = None

    @property
    def checks(self) -> bool:
        """Whether they are a sample whose scores are no results, but measure something."""
        return not isinstance(self.numbers, range)

    @property
    def products(self) -> tuple[str, ...]:
        """What each IHVP is called."""
        return self.names or self.ids


@dataclass
class _Influence:
    """A scoring under way, from the queries and the examples to the tables of scores."""

    settings: InfluenceSettings
    workers: Workers
    manifest: Manifest
    queries: Corpus
    train: Corpus | None
    curvature: CurvatureFiles
    damping: Damping
    candidates: Candidates | None = None
    removals: Removals | None = None
    refinement: Refinement | None = None
    certifier: Certifier | None = None
    held: dict[str, BlockProducts] = field(default_factory=dict)
    """Products that stay in memory, of the queries and stages under way; by block."""
    own: dict[str, Array] = field(default_factory=dict)
    """Shares of the self-influence of the queries under way, ``[Q]``; by block."""

    @property
    def store(self) -> Store:
        """The directory of the scores."""
        return self.workers.store

    def said(self) -> str:
        """What was done, in one line."""
        said = f"made the IHVPs of {len(self.queries):,} queries"
        if self.train is not None:
            said = f"scored {len(self.queries):,} queries against {len(self.train):,} examples"
        if self.candidates is not None:
            said = self._said_of_candidates(self.candidates)
        if self.refinement is not None:
            said += f"; {self.refinement.said()}"
        shares = _shares(self.manifest)
        if shares:
            said += (
                f"; {len(shares):,} of them have up to {max(shares.values()):.1%} of their squared "
                "gradient in blocks that the fit never saw used, which add nothing to scores"
            )
        return said

    def run(self) -> None:
        if self.removals is not None:
            self._choose(self.removals)
        if self.certifier is not None:
            self.certifier = self.certifier.damped(self.damping)
        passes, examples = self._passes(), 0 if self.train is None else len(self.train)
        certified = self._certified()
        self.manifest.facts |= {
            "queries_scored": len(self.queries), "examples": examples, "passes": len(passes),
        }  # fmt: skip
        over = f"{examples:,}"
        if self.candidates is not None:
            union = len(self.candidates.union)
            self.manifest.facts["candidates"] = {"pairs": len(self.candidates), "examples": union}
            over = f"{union:,} of {over}"
        scored = sum(not asked.checks for asked in passes)
        self.workers.reporter.say(
            f"{len(self.queries):,} queries in {scored} pass{'es' if scored > 1 else ''} over "
            f"{over} training examples, rank {self.settings.rank}, damping {self.damping}"
        )
        # Another sample that was measured before.
        for name in self._finished.keys() - {asked.span for asked in [*passes, *certified]}:
            del self._finished[name]
        self._sweep_leftovers([*passes, *certified])
        self._take(passes)
        if self.refinement is not None:
            self.manifest.facts["solver"] = self.refinement.facts()
        self._measure([asked for asked in passes if asked.checks])
        if self.settings.ihvp:
            self._collect_products([asked for asked in passes if not asked.checks])
        self.manifest.facts.pop("certificate", None)
        if self.certifier is not None:
            self._take(certified)
            facts = self.certifier.facts(self._compared) | {"asked": asked_for(self.settings)}
            self.manifest.facts["certificate"] = facts
        self.store.delete_directory("work")
        self.manifest.complete.append("scores")
        self.manifest.write(self.store)

    def _take(self, passes: Sequence[_Asked]) -> None:
        """Run those of some passes that are not finished."""
        for asked in passes:
            if asked.span in self._finished:
                continue
            if asked.names and not asked.dampings:
                files = self._certify(asked)
            else:
                files = self._products(asked, score=self.train is not None)
                if not asked.dampings:
                    self._note_unreached(asked)
            solved = [] if self.refinement is None else self.refinement.tables(asked.span)
            self._finished[asked.span] = self._sizes([*files, *self._lengths(asked), *solved])
            self.manifest.write(self.store)
            self.store.delete_directory(f"work/candidates/{asked.span}")
            if asked.names or not self.settings.ihvp:
                self.store.delete_directory(f"work/pass-{asked.span}")

    def _choose(self, removals: Removals) -> None:
        """Take the damping whose scores foretell the removals best, and record how well each
        does."""
        assert self.train is not None
        size, passes = max(1, self._fitting(False) // len(GRID)), []
        for at in range(0, len(removals.queries), size):
            some = removals.queries[at : at + size]
            span = f"{_CHECK}-damping-{at:06d}-{at + len(some):06d}"
            asked = self._asked(some, span, ", to choose the damping")
            names = named(asked.ids, GRID)
            passes.append(replace(asked, dampings=GRID, names=names, examples=removals.union))
        self._sweep_leftovers(passes)
        self._take(passes)
        files = [name for asked in passes for name in self._finished[asked.span]]
        found = removals.agreements(self.store, files, self.queries, self.train)
        self.damping = record_heldout(self.workers, self.manifest, found, len(removals))
        for asked in passes:
            del self._finished[asked.span]
        self.manifest.write(self.store)
        self.store.delete_directory(_CHECK)

    @cached_property
    def _unreached(self) -> tuple[str, ...]:
        """The fit's blocks that have no curvature, for nothing reached them."""
        if not self.curvature.method.curved or self.curvature.method.ranked:
            return ()
        return unreached_blocks(self.curvature.store)

    def _note_unreached(self, asked: _Asked) -> None:
        """Record of each query which share of its squared gradient lies in such blocks."""
        if not self._unreached:
            return
        squares = {b.name: read_beside(asked.place, b.name, "squares") for b in self.workers.blocks}
        total = sum(squares.values(), np.zeros(len(asked.ids)))
        lost = sum((squares[name] for name in self._unreached), np.zeros(len(asked.ids)))
        shares = {
            query: float(part / whole)
            for query, part, whole in zip(asked.ids, lost, total, strict=True)
            if part > 0
        }
        if shares:
            self.manifest.facts["unreached_shares"] = _shares(self.manifest) | shares

    def _note_own(self, group: int, place: Store) -> None:
        """Keep what a group of stages says of the self-influence of queries, where it was asked."""
        for block in self.workers.blocks_of(self.workers.groups[group]):
            held = self.held.get(block.name)
            if held is not None and held.own is not None:
                self.own[block.name] = held.own.cpu().numpy()
            elif self.settings.self_influence and keeps_beside(place, block.name, "own"):
                self.own[block.name] = read_beside(place, block.name, "own")

    def _lengths(self, asked: _Asked) -> list[str]:
        """Write what views of scores divide by: tokens of queries and of training examples, and
        the self-influence of queries; gives the files."""
        if self.train is None or not isinstance(asked.numbers, range):
            self.own.clear()
            return []
        # In the order of the blocks, or the sum would depend on how stages are cut. A version that
        # did not keep them may have made the products of some.
        shares = [self.own[b.name] for b in self.workers.blocks if b.name in self.own]
        own = np.sum(shares, axis=0) if len(shares) == len(self.workers.blocks) else None
        self.own.clear()
        files = [f"tables/queries/{asked.span}.parquet"]
        self._write_lengths(files[0], self.queries, asked.numbers, own)
        if asked.numbers.start == 0:
            files.append("tables/train/lengths.parquet")
            self._write_lengths(files[1], self.train, range(len(self.train)), None)
        return files

    def _write_lengths(self, name: str, corpus: Corpus, numbers: range, own: Array | None) -> None:
        double = self.workers.dtype == torch.float64
        schema = lengths_schema(None if own is None else double)

        def tables() -> Iterator[pa.Table]:
            for start in range(0, len(numbers), ROWS):
                some = np.array(numbers[start : start + ROWS])
                columns = [corpus.named(some), pa.array(corpus.lengths[some])]
                if own is not None:
                    values = pa.array(own[start : start + ROWS])
                    columns.append(values.cast(schema.field("self_influence").type))
                yield pa.table(columns, schema=schema)

        write_tables(self.store, name, schema, tables(), self._notes(), repeated=[])

    @property
    def _finished(self) -> dict[str, dict[str, int]]:
        """Finished passes: the span of their queries -> their files, with their bytes."""
        found: dict[str, dict[str, int]] = self.manifest.facts.setdefault("files", {})
        return found

    def _sizes(self, files: Sequence[str]) -> dict[str, int]:
        sizes = {}
        for name in files:
            size = self.store.size(name)
            if size is None or read_rows(self.store, name) < 0:
                raise DamagedFile(self.store.path(name), "a finished file", "none", "Run it again.")
            sizes[name] = size
        return sizes

    def _fitting(self, multiplied: bool) -> int:
        """How many IHVPs keep every stage's within ``--query-memory``, one at least.

        Args:
            multiplied: they are of a solver, whose products are as large again.
        """
        # Those that no stage makes alone start as whole gradients.
        rank = None if multiplied or self.curvature.method.ranked else self.settings.rank_number()
        item = 8 if self.workers.dtype == torch.float64 else 4
        item = VECTOR if multiplied else item
        largest = max(
            sum(product_elements(rank, b.d_out, b.d_in) for b in blocks)
            for blocks in self.workers.by_stage
        )
        memory = parse_bytes("--query-memory", self.settings.query_memory)
        return max(1, memory // (largest * item))

    def _passes(self) -> list[_Asked]:
        """Queries by pass: as many as fit together."""
        size = self._fitting(self.refinement is not None)
        # What is finished stays; the rest is dealt out anew, for stages or memory may have changed.
        numbered = [name for name in sorted(self._finished) if not name.startswith(_CHECK)]
        finished = [tuple(map(int, name.split("-"))) for name in numbered]
        spans, at = [], 0
        for start, stop in [*finished, (len(self.queries), len(self.queries))]:
            spans += [range(i, min(i + size, start)) for i in range(at, start, size)]
            spans += [range(start, stop)] if start < stop else []
            at = stop
        passes = [
            self._asked(
                numbers, f"{numbers.start:06d}-{numbers.stop:06d}",
                "" if len(spans) == 1 else f", pass {n} of {len(spans)}",
            )
            for n, numbers in enumerate(spans, start=1)
        ]  # fmt: skip
        checked = min(self.settings.candidates_check, len(self.queries))
        if self.candidates is not None and checked:
            name, label = f"{_CHECK}-{checked:06d}", ", to measure candidates"
            passes += self._of_sample(checked, size, name, label)
        return passes

    def _of_sample(self, count: int, size: int, name: str, label: str) -> list[_Asked]:
        """A seeded sample of the queries, at most so many together."""
        draw = np.random.default_rng(self.settings.seed)
        sample = np.sort(draw.choice(len(self.queries), count, replace=False)).tolist()
        parts = [sample[i : i + size] for i in range(0, count, size)]
        return [
            self._asked(some, f"{name}-{n * size:06d}-{n * size + len(some):06d}", label)
            for n, some in enumerate(parts)
        ]

    def _certified(self) -> list[_Asked]:
        """The queries whose answers get a certificate: each has two."""
        if self.certifier is None:
            return []
        count = min(self.settings.certify, len(self.queries))
        name = f"{_CHECK}-certificate-{count:06d}-{self.certifier.mark}"
        size = max(1, self._fitting(True) // 2)
        drawn = None
        if self.train is not None:
            draw = np.random.default_rng(self.settings.seed)
            drawn = np.sort(draw.choice(len(self.train), self._compared, replace=False))
        return [
            replace(one, names=both_named(one.ids), examples=drawn)
            for one in self._of_sample(count, size, name, ", certificate")
        ]

    @property
    def _compared(self) -> int:
        """How many training examples are scored by both answers of a certificate."""
        return 0 if self.train is None else min(COMPARED, len(self.train))

    def _certify(self, asked: _Asked) -> list[str]:
        """Make the certificate of some queries; gives its file."""
        assert self.certifier is not None
        gradients, fit, refined = map(asked.place.inside, ("gradients", "fit", "refined"))
        plain = GradientsGatherer(asked.ids, gradients)
        self._sweep(asked, plain, f"{asked.label}, gradients", score=False)
        rank, seed = self.settings.rank_number(), self.settings.seed
        own = ProductsGatherer(asked.ids, fit, self.curvature, self.damping, rank, seed)
        self._sweep(asked, own, asked.label, score=False)
        refinement, blocks = self.certifier.refinement, self.workers.blocks
        if self._without_products(refined, blocks):
            refinement.make(asked.span, asked.label, asked.ids, gradients, refined)
        missing = [b.name for b in blocks if not is_complete(asked.place, ihvp_file(b.name))]
        both = [((fit, refined), asked.place, name) for name in missing]
        in_order(self.workers.run_tasks("IHVPs", join_products, both))
        self.certifier.residuals(
            asked.span, f"products{asked.label}", gradients, asked.place, len(asked.ids)
        )
        files, scores_KN = [], None
        if asked.examples is not None:
            assert self.train is not None
            files = self._sweep(asked, replace(own, out=asked.place), asked.label, score=True)
            names, examples = pa.array(asked.names), self.train.named(asked.examples)
            scores_KN = score_matrix(self.store, files, names, examples)
        table = self.certifier.write(asked.span, asked.ids, asked.place, scores_KN)
        for name in files:
            self.store.delete(name)
        return [table]

    def _asked(self, numbers: Sequence[int], span: str, label: str) -> _Asked:
        ids = tuple(self.queries.named(numbers).to_pylist())
        return _Asked(numbers, span, ids, self.store.inside(f"work/pass-{span}"), label)

    def _scored_by(self, asked: _Asked) -> tuple[Corpus, Pairs | None]:
        """The training examples that go through the model for some queries, and the pairs that are
        written; all where these are ``None``."""
        assert self.train is not None
        if asked.examples is not None:
            place = f"work/candidates/{asked.span}"
            return self.train.among(asked.examples, self.store, place), None
        if self.candidates is None or not isinstance(asked.numbers, range):
            return self.train, None
        union, pairs = self.candidates.of_pass(asked.numbers)
        return self.train.among(union, self.store, f"work/candidates/{asked.span}"), pairs

    def _measure(self, passes: Sequence[_Asked]) -> None:
        """Record what candidates hold of the exact scores that some passes have made."""
        if not passes:
            return
        assert self.train is not None and self.candidates is not None
        files = [n for a in passes for n in self._finished[a.span] if n.startswith(f"{_CHECK}/")]
        sample = [number for asked in passes for number in asked.numbers]
        held = measure(self.store, files, self.candidates, sample, self.queries, self.train)
        self.manifest.facts["candidates"]["check"] = asdict(held)

    def _said_of_candidates(self, candidates: Candidates) -> str:
        facts = self.manifest.facts["candidates"]
        said = (
            f"scored {len(self.queries):,} queries against {len(candidates):,} candidates, which "
            f"are {facts['examples']:,} of {self.manifest.facts['examples']:,} examples"
        )
        check = facts.get("check")
        if check is None:
            return f"{said}; what of the influence they hold was not measured (--candidates-check)"
        held = f"{check['recall']:.0%} of the {TOP} highest scores"
        if check["positive"] is not None:
            held += f" and {check['positive']:.0%} of the positive influence"
        return f"{said}; on {check['queries']:,} of the queries they hold {held}"

    @cached_property
    def _inverses(self) -> RankInverses:
        """The inverses of a ranked method's Fisher."""
        joint = self.settings.inverse != "block"
        return open_inverses(self.curvature.store, self.workers.blocks, self.damping, joint)

    def _products(self, asked: _Asked, score: bool) -> list[str]:
        """The IHVPs of some queries, and with ``score`` the training examples' scores on them;
        gives the files of these."""
        settings, rank = self.settings, self.settings.rank_number()
        if self._apart and self._without_products(asked.place, self.workers.blocks):
            self._products_apart(asked)
        train = None
        if self.train is not None and (asked.dampings or not settings.ihvp):
            train, _ = self._scored_by(asked)
        # What files say beside the products is read at the end.
        holds = train is not None and self.workers.in_process and rank is None
        holds = holds and not (self._apart or self._unreached)
        beside = ("squares",) * bool(self._unreached) + ("own",) * settings.self_influence
        gatherer = ProductsGatherer(
            asked.ids,
            asked.place,
            self.curvature,
            asked.dampings or self.damping,
            rank,
            settings.seed,
            scored=None if train is None else train.tokens,
            held=self.held if holds else None,
            beside=() if asked.dampings else beside,
        )
        return self._sweep(asked, gatherer, asked.label, score)

    @property
    def _apart(self) -> bool:
        """Whether IHVPs are made of gradients in files: of a ranked method, and by a solver."""
        return self.curvature.method.ranked or self.refinement is not None

    def _products_apart(self, asked: _Asked) -> None:
        """The IHVPs that no stage can make alone."""
        gradients = asked.place.inside("gradients")
        gatherer = GradientsGatherer(asked.ids, gradients)
        self._sweep(asked, gatherer, f"{asked.label}, gradients", score=False)
        if self.refinement is None:
            self._rank_products(asked, gradients)
        else:
            self.refinement.make(asked.span, asked.label, asked.ids, gradients, asked.place)
        asked.place.delete_directory("gradients")

    def _rank_products(self, asked: _Asked, gradients: Store) -> None:
        job = RankProducts(
            gradients,
            asked.place,
            self.curvature.store,
            self.settings.rank_number(),
            self.settings.seed,
            self.workers.dtype,
        )
        residual = job.make(self.workers.blocks, self._inverses, self.workers)
        facts = self.manifest.facts
        facts["residual"] = max(residual, facts.get("residual", 0.0))

    def _sweep(
        self,
        asked: _Asked,
        gatherer: ProductsGatherer | GradientsGatherer,
        label: str,
        score: bool,
    ) -> list[str]:
        """A pass over some queries, and with ``score`` the training examples' scores on their
        IHVPs; gives the files of these."""
        place, feed = gatherer.out, self.workers.feed(self.queries)
        feeds = {"queries": replace(feed, plan=feed.plan.only(asked.numbers))}
        if score:
            feeds["train"] = self.workers.feed(self._scored_by(asked)[0])
        # What waits in the spool is of use whether or not all products have been made by now.
        sweep = Sweep(self.workers, self.manifest, feeds)
        if not self._without_products(place, self.workers.blocks):
            del sweep.streams["queries"]
        if not sweep.streams:
            return []
        work = Pass(f"{gatherer.name}-{asked.span}", "measurement", 1, (gatherer,))
        lowest = 0 if score else min(self._unasked(place))
        sweep.forward()
        files: list[str] = []
        for group in range(sweep.level, lowest - 1, -1):
            if "queries" in sweep.streams:
                self._query(sweep, group, work, place, label)
            if score:
                files = self._score(sweep, group, asked)
                if not asked.checks:
                    self._note_own(group, place)
            self.held.clear()
            sweep.descend(group)
        sweep.end()
        return files

    def _without_products(self, place: Store, blocks: Sequence[Block]) -> bool:
        return not all(
            block.name in self.held or is_complete(place, ihvp_file(block.name)) for block in blocks
        )

    def _unasked(self, place: Store) -> list[int]:
        """Groups of stages that have products still to make."""
        mine = [self.workers.blocks_of(stages) for stages in self.workers.groups]
        return [g for g, blocks in enumerate(mine) if self._without_products(place, blocks)]

    def _query(self, sweep: Sweep, group: int, work: Pass, place: Store, label: str) -> None:
        """The pass over a group of stages, and the gradients for those before that lack theirs."""
        unasked = self._unasked(place)
        lowest = min(unasked, default=group)
        task = Task("queries", sweep.streams["queries"], work, work.replay(), carries=False)
        if group in unasked:
            commits = sweep.commit_directory(work.name, group)
            commit = read_commit(self.store, commits)
            if commit is not None and commit.finished:
                # A product of a finished pass has gone since: it has to run again.
                self.store.delete_directory(commits)
            sweep.run(group, task, f"queries: IHVPs{label}", lowest)
        if lowest < group:
            sweep.replay(group, replace(task, work=task.again))

    def _score(self, sweep: Sweep, group: int, asked: _Asked) -> list[str]:
        """Partial scores of a group of stages, added to what those behind it found."""
        settings = self.settings
        if asked.checks:
            settings = replace(
                settings, per_block=False, per_token=False, self_influence=False, top_k=None
            )
        train, pairs = self._scored_by(asked)
        ranked = self.curvature.method.ranked and settings.self_influence
        inverses = self._inverses if ranked else None
        gatherer = ScoreGatherer(
            self.curvature,
            self.damping,
            asked.place,
            len(asked.products),
            settings.per_block,
            settings.per_token,
            settings.self_influence and (pairs is not None or asked.numbers[0] == 0),
            inverses,
            self.held,
        )
        work = Pass(_scoring(asked), "labels", 1, (gatherer,))
        rows = ScoreRows(
            self.store,
            f"part-{asked.span}",
            asked.products,
            train,
            settings,
            self.workers.dtype == torch.float64,
            self._notes(),
            inverses,
            pairs,
            _CHECK if asked.checks else "scores",
        )
        sink = rows if group == 0 else Sink()
        task = Task("train", sweep.streams["train"], work, work, carries=True, sink=sink)
        names = sweep.run(group, task, f"scores{asked.label}", 0)
        return rows.finished(names) if group == 0 else names

    def _sweep_leftovers(self, passes: Sequence[_Asked]) -> None:
        """Files that no commit speaks of were written by a run that then died: forget them."""
        spans = tuple(f"{TABLE}/{asked.span}-" for asked in passes)
        spans += tuple(f"{DIRECTORY}/{asked.span}." for asked in passes)
        for name in (*self.store.names(TABLE), *self.store.names(DIRECTORY)):
            if not name.startswith(spans):
                self.store.delete(name)
        if self.train is None:
            return
        known = {name for files in self._finished.values() for name in files}
        for asked in passes:
            place = commit_directory(_scoring(asked), 0, len(self.workers.groups))
            if asked.span not in self._finished and read_commit(self.store, place) is not None:
                plan = self._scored_by(asked)[0].plan(self.settings.batch_tokens)
                commit = last_commit(self.store, place, plan_mark(plan))
                known |= set() if commit is None else set(commit.rows)
        for directory in ("scores", _CHECK, "self", "work/top"):
            for name in self.store.names(directory, ".parquet"):
                if name not in known:
                    self.store.delete(name)

    def _collect_products(self, passes: Sequence[_Asked]) -> None:
        """``ihvp/``: every block's products of all passes in one file."""
        missing = [
            b.name for b in self.workers.blocks if not is_complete(self.store, ihvp_file(b.name))
        ]
        if not missing:
            return
        for asked in passes:
            self._products(asked, score=False)
        arguments = [([asked.place for asked in passes], self.store, name) for name in missing]
        in_order(self.workers.run_tasks("IHVPs", join_products, arguments))

    def _notes(self) -> dict[str, str]:
        """The footer of the scores, with the blocks in the order in which stages give them."""
        said = identity(self.settings) | {"fit": self.curvature.store.root}
        blocks = self.workers.blocks_of(range(len(self.workers.cuts)))
        chosen = {"damping": used_damping(self.manifest)} if self.settings.damping in CHOSEN else {}
        return footer(said, blocks=[b.name for b in blocks], **chosen)


# Where the exact scores of queries lie that candidates are measured on, and how their passes begin.
_CHECK = "check"


def _scoring(asked: _Asked) -> str:
    """The name of the pass over the training examples."""
    return f"scores-{asked.span}"


def join_products(places: Sequence[Store], out: Store, block: str) -> None:
    """Put the IHVPs of a block from several passes into one file."""
    parts = [read_products(place, block) for place in places]
    joined = {
        key: torch.cat([products.tensors()[key] for products, _ in parts])
        for key in parts[0][0].tensors()
    }
    write_products(out, block, BlockProducts(**joined), [q for _, ids in parts for q in ids])
