"""The report job: one page of finished scores and of the fit that they came from, or of a fit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raycurv import __version__
from raycurv.data.uri import is_uri
from raycurv.driver.settings import IN_MEMORY
from raycurv.errors import UserError
from raycurv.files.manifest import NAME, Manifest
from raycurv.files.single_file import check_single_file, write_single_file
from raycurv.files.store import Store, open_store
from raycurv.jobs.damping_choice import used_damping
from raycurv.jobs.influence.certificate import certificate_words
from raycurv.jobs.recorded import is_of_fit, read_run
from raycurv.mathematics.influence.scores import TOKEN_SCORES
from raycurv.progress.streams import printable, results
from raycurv.reporting import wording
from raycurv.reporting.charts import Pictures
from raycurv.reporting.fit_sections import (
    ExampleNumbers,
    blocks_section,
    coverage_section,
    covered,
    curvature_section,
    examples_section,
    fit_notes,
    reading_notes,
    time_section,
)
from raycurv.reporting.page import Page, Query, Renderer, Section
from raycurv.reporting.passages import looks_like_code
from raycurv.reporting.ranking import Ranking, rank
from raycurv.reporting.report_settings import ReportSettings
from raycurv.reporting.score_sections import (
    Texts,
    frequent_section,
    layers_section,
    mean_shares,
    shown_queries,
)
from raycurv.reporting.spectra import corrected_curves
from raycurv.run import Run
from raycurv.scored import Scores

Facts = list[tuple[str, str, str]]


def report(
    results: Run | Scores | str | os.PathLike[str], out: str | os.PathLike[str], **settings: Any
) -> str:
    """Write one HTML page of a finished fit or of finished scores; gives its path.

    Args:
        results: a run, scores, or the directory of either. Scores show the data that they were
            opened with, unless ``queries`` or ``train`` names another place.
        out: the page, a .html file.
        **settings: further fields of :class:`ReportSettings`.

    Raises:
        UserError: a mistake in settings, results that are not finished, or a library that is not
            installed.
    """
    chosen = ReportSettings(results=os.fspath(results), out=os.fspath(out), **settings)
    page: str = _write(chosen, results if isinstance(results, Scores) else None)["page"]
    return page


def write_report(settings: ReportSettings) -> dict[str, Any]:
    """Write the page that the settings ask for and tell where; gives the same for the last line."""
    found = _write(settings, None)
    print(printable(f"page: {found['page']}"), file=results())
    return found


def _write(settings: ReportSettings, scores: Scores | None) -> dict[str, Any]:
    settings.check()
    check_single_file("--out", settings.out, ".html", ".htm")
    # What is not installed is told before anything is read.
    maker = _Maker(settings, Pictures())
    renderer = Renderer()
    page = maker.page(open_store(settings.results, "report"), scores)
    # Names of files may hold bytes that are no UTF-8, which Python keeps as halves of characters.
    content = renderer.html(page).encode(errors="backslashreplace")
    written = write_single_file(settings.out, content)
    return {"page": written, "bytes": len(content), "queries": len(page.queries)}


@dataclass(frozen=True)
class _Maker:
    """Puts a page together."""

    settings: ReportSettings
    pictures: Pictures

    def page(self, store: Store, scores: Scores | None) -> Page:
        """The page of what a directory holds; UserError where that is no finished fit or scores."""
        found = None if scores is not None else read_run(store)
        job = "influence" if scores is not None else found.job if found is not None else ""
        if job == "fit":
            return self._of_fit(Run(store))
        if job == "influence":
            again = self.settings.queries or None, self.settings.train or None
            if scores is not None and any(again):
                scores = scores.with_data(*again)
            return self._of_scores(scores or Scores(store, *again), store)
        raise UserError(
            store.root, "the directory of a fit or of scores",
            f"no {NAME}" if not job else f"results of {job}",
            "Give the --out of raycurv fit or of raycurv influence.",
        )  # fmt: skip

    def _of_fit(self, run: Run) -> Page:
        fit = run.manifest
        examples = ExampleNumbers.of(run, {})
        texts = Texts.of_fit(run, [examples.ids[n] for n in examples.extremes])
        lines = {id: texts.line(id) for id in texts.by_id}
        sections, notes = self._fit_sections(run, examples, {}, lines)
        count = len(run.block_names())
        return Page(
            title=f"Curvature of {_leaf(fit.facts['model'])}",
            kicker=f"raycurv report: {fit.settings['method']} of {count:,} blocks",
            facts=_fit_facts(fit),
            notes=[*[texts.lacking] * bool(texts.lacking), *notes],
            sections=[
                *sections,
                time_section([("Fit", open_store(run, "report"), fit)], self.pictures),
            ],
            colophon=_colophon(run.path),
        )

    def _of_scores(self, scores: Scores, store: Store) -> Page:
        settings, said = self.settings, scores.manifest
        # Behind the scores that were kept there are others.
        places = min(settings.passages, said.settings["top_k"] or settings.passages)
        ranking = rank(scores.parts(), settings.most_queries, places, scores.path)
        if not ranking.queries:
            raise UserError(
                scores.path, "scores of training examples", "IHVPs alone",
                "Report the fit, or score with --train.",
            )  # fmt: skip
        run, notes = self._fit(scores)
        own = (
            dict(zip(*scores.self_influence().to_pydict().values(), strict=True))
            if said.settings["self_influence"] and _of_the_fit(said)
            else {}
        )
        examples = None if run is None else ExampleNumbers.of(run, own)
        shown = self._shown(scores, ranking, examples, places)
        shares = mean_shares(ranking)
        sections = [
            *frequent_section(ranking, shown.train, places),
            layers_section(shares, not ranking.tokens and "tokenizer_directory" in said.facts),
        ]
        jobs = [("Scoring", store, said)]
        facts: Facts = []
        if run is not None and examples is not None:
            more, warned = self._fit_sections(run, examples, shares, shown.lines)
            sections += more
            notes += warned
            jobs.insert(0, ("Fit", open_store(run, "--run"), run.manifest))
            facts = _fit_facts(run.manifest)
        sections.append(time_section(jobs, self.pictures))
        count, of = len(ranking.queries), said.facts.get("queries_scored", len(ranking.queries))
        measured = "the query's measurement" if said.settings["objective"] else "the query's loss"
        name = scores.path if run is None else _leaf(run.manifest.facts["model"])
        mono = looks_like_code([*shown.queries.by_id.values(), *shown.train.by_id.values()])
        return Page(
            title=f"{of:,} queries against {said.facts.get('examples', 0):,} training examples",
            kicker=f"raycurv report: influence scores of {name}",
            facts=[*facts, *_score_facts(said)],
            notes=list(dict.fromkeys([*shown.notes, *_score_notes(scores), *notes])),
            sections=sections,
            colophon=_colophon(scores.path, *([run.path] if run else [])),
            queries=shown.cards,
            meaning=f"A score above zero: training on the passage lowers {measured}. One below "
            "zero: it raises it. Bars are by the logarithm in the list, to scale within a query.",
            lowers=f"Training on these lowers {measured}",
            raises=f"Training on these raises {measured}",
            left_out=f"The first {count:,} of {of:,} queries; --most-queries shows more."
            if count < of else "",
            coloured=ranking.tokens and bool(shown.tokens),
            mono=mono,
        )  # fmt: skip

    def _fit_sections(
        self, run: Run, examples: ExampleNumbers, shares: dict[str, float], lines: dict[str, str]
    ) -> tuple[list[Section], list[str]]:
        """The parts that speak of a fit, and what to know of it."""
        blocks = run.blocks().to_pylist()
        corrected = corrected_curves(run)
        sections = [
            *curvature_section(run, corrected, blocks, self.pictures),
            *examples_section(examples, lines, self.pictures),
            blocks_section(blocks, corrected, shares),
            *coverage_section(run.manifest),
        ]
        return sections, fit_notes(run, blocks)

    def _fit(self, scores: Scores) -> tuple[Run | None, list[str]]:
        """The fit that scores came from, or why it is not shown."""
        recorded = str(scores.manifest.facts.get("run", ""))
        place = self.settings.run or recorded
        if not self.settings.run and is_uri(recorded):
            return None, [f"The fit is not shown: it lies at {recorded}. Give it by --run."]
        try:
            run = Run(open_store(place, "--run"))
        except UserError as error:
            if self.settings.run:
                raise
            return None, [f"The fit is not shown: {error} It may lie elsewhere: give it by --run."]
        if not is_of_fit(scores.manifest, run.manifest):
            if self.settings.run:
                raise UserError(
                    f"--run {run.path}", "the fit that the scores came from", "another one", ""
                )
            return None, [f"The fit is not shown: {run.path} holds another one by now."]
        return run, []

    def _shown(
        self, scores: Scores, ranking: Ranking, examples: ExampleNumbers | None, places: int
    ) -> _Shown:
        """The queries with their passages, and the texts of whatever else is listed."""
        settings, said = self.settings, scores.manifest
        queries = Texts.of(scores, "queries", [query.id for query in ranking.queries])
        passages = [id for query in ranking.queries for id in query.rows["train_id"].to_pylist()]
        listed = (
            [examples.ids[n] for n in examples.extremes]
            if examples is not None and _of_the_fit(said)
            else []
        )
        train = Texts.of(scores, "train", [*passages, *listed])
        if train.lacking and listed:
            # The fit may have cut its rows another way: some of its examples are none of these.
            train = Texts.of(scores, "train", passages)
        tokens: dict[str, Sequence[str]] = {}
        notes = [one.lacking for one in (queries, train) if one.lacking]
        if ranking.tokens and train.by_id:
            wanted = list(dict.fromkeys(passages))
            try:
                found = dict(zip(wanted, scores.data("train").tokens(wanted), strict=True))
                _check_tokens(ranking, found)
                tokens = found
            except UserError as error:
                notes.append(f"Tokens are not coloured: {error}")
        cards = shown_queries(
            ranking,
            queries,
            train,
            places,
            settings.characters,
            tokens,
            said.settings["top_k"] is not None,
        )
        return _Shown(cards, queries, train, listed, tokens, notes)


def _of_the_fit(scores: Manifest) -> bool:
    """Whether the examples that were scored are of the fit's own data: examples of other data may
    have the same ids."""
    prints = scores.fingerprints
    return bool(prints["fit"].get("data") == prints.get("train"))


def _check_tokens(ranking: Ranking, tokens: Mapping[str, Sequence[str]]) -> None:
    """Refuse tokens that are not those that were scored, with a UserError."""
    for query in ranking.queries:
        for row in query.rows.select(["train_id", TOKEN_SCORES]).to_pylist():
            id, there, here = row["train_id"], row[TOKEN_SCORES], tokens[row["train_id"]]
            if there is None or len(there) != len(here):
                raise UserError(
                    f"example {id!r}", f"{len(here):,} tokens, as the tokenizer makes of it",
                    f"{0 if there is None else len(there):,} that were scored", "",
                )  # fmt: skip


@dataclass(frozen=True)
class _Shown:
    cards: list[Query]
    queries: Texts
    train: Texts
    listed: list[str]
    tokens: dict[str, Sequence[str]]
    notes: list[str]

    @property
    def lines(self) -> dict[str, str]:
        """The beginnings of the texts of the fit's examples that are listed, where known."""
        return {id: self.train.line(id) for id in self.listed if id in self.train.by_id}


def _leaf(place: str) -> str:
    if place == IN_MEMORY:
        return "a model in memory"
    return place.rstrip("/").rpartition("/")[2] or place


def _fit_facts(fit: Manifest) -> Facts:
    """What was fitted."""
    said, settings = fit.facts, fit.settings
    share = f"; {covered(fit)}" if covered(fit) else ""
    adapters = [("Adapter", ", ".join(said["adapter"]), "")] if said.get("adapter") else []
    return [
        ("Model", str(said["model"]), f"{settings['objective']} in {settings['dtype']}{share}"),
        *adapters,
        ("Fitted on", *_data(said)),
        ("Curvature", *wording.method(settings)),
        ("Labels of the fit", *wording.labels(settings)),
    ]


def _data(said: Mapping[str, Any]) -> tuple[str, str]:
    """What a fit was made of, and how much that is."""
    counts = f"{said['examples']:,} examples"
    if "tokens" in said:
        counts += f", {said['tokens']:,} tokens"
    parts = [str(said["data"])] if said["data"] else []
    parts += [f"what went into {run}" for how in ("extend", "merge") for run in said.get(how, ())]
    whole = " and ".join(parts)
    first, *others = said.get("subtract") or [""]
    if others:
        whole = f"what went into {first} without that of {' and '.join(others)}"
    return whole, counts


def _score_facts(scores: Manifest) -> Facts:
    """What was scored."""
    said, settings = scores.facts, scores.settings
    measured, kept = settings["objective"], settings["top_k"]
    return [
        ("Queries", str(said.get("queries", "")), f"measured by {measured}" if measured else ""),
        (
            "Training examples", str(said.get("train", "")),
            "" if kept is None else f"of each query the {kept:,} highest and lowest are kept",
        ),
        ("Damping", *wording.damping(used_damping(scores), said.get("damping", {}))),
        *([("Solver", *wording.solver(settings))] if settings["solver"] != "ekfac" else []),
        ("Rank of IHVPs", *wording.rank(settings["rank"])),
    ]  # fmt: skip


def _score_notes(of: Scores) -> list[str]:
    """What to know of scores before they are believed."""
    scores = of.manifest
    shares = scores.facts.get("unreached_shares", {})
    chosen = scores.facts.get("candidates", {})
    check = chosen.get("check", {})
    said = [*scores.facts.get("model_notes", ()), *reading_notes(scores, of.path)]
    if chosen:
        held = "what of the influence these hold was not measured (--candidates-check)"
        if check.get("recall") is not None:
            held = f"on a sample they hold {check['recall']:.0%} of the 10 highest scores"
        if check.get("positive") is not None:
            held += f" and {check['positive']:.0%} of the positive influence"
        said.append(
            f"Queries were scored on candidates alone, {chosen.get('pairs', 0):,} pairs: of other "
            f"examples nothing is known; {held}"
        )
    if certificate := scores.facts.get("certificate"):
        said.append(". ".join(one[0].upper() + one[1:] for one in certificate_words(certificate)))
    if shares:
        said.append(
            f"{len(shares):,} queries have up to {max(shares.values()):.1%} of their squared "
            "gradient in blocks that the fit never saw used, which add nothing to scores"
        )
    return said


def _colophon(*places: str) -> list[str]:
    return [f"Made by raycurv {__version__} from", *places]
