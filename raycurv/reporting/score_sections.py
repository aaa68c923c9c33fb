"""The parts of a page that speak of scores: the queries with their passages, and where the
influence lies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raycurv.data.tokenizer import FILES, LazyTokenizer
from raycurv.driver.corpus import corpus_of_run
from raycurv.errors import RaycurvError, UserError
from raycurv.files.store import open_store
from raycurv.mathematics.influence.scores import TOKEN_SCORES
from raycurv.reporting.charts import Array
from raycurv.reporting.page import Cell, Passage, Query, Section, Table
from raycurv.reporting.passages import coloured, plain
from raycurv.reporting.ranking import RankedQuery, Ranking
from raycurv.reporting.spectra import layer_of, roles
from raycurv.reporting.wording import percent, visible
from raycurv.run import Run
from raycurv.scored import Scores

_LINE = 160
_SHADES = 5


@dataclass
class Texts:
    """Texts of queries or of training examples, by id.

    Attributes:
        lacking: why there are none, in words; empty where there are.
    """

    by_id: Mapping[str, str] = field(default_factory=dict)
    lacking: str = ""

    @classmethod
    def of(cls, scores: Scores, name: Any, ids: Sequence[str]) -> Texts:
        """Those of some examples, read again from where the data of the scores lies."""
        wanted = list(dict.fromkeys(ids))
        try:
            texts = scores.data(name).rows(wanted)["text"].to_pylist()
        except UserError as error:
            what = "queries" if name == "queries" else "training examples"
            return cls(lacking=f"Texts of the {what} are not shown, see --{name}: {error}")
        return cls({id: text for id, text in zip(wanted, texts, strict=True) if text is not None})

    @classmethod
    def of_fit(cls, run: Run, ids: Sequence[str]) -> Texts:
        """Those of some examples of a fit, as the tokens in its directory spell them: without their
        source, and for want of other runs' examples of those that it was fitted on itself."""
        facts = run.manifest.facts
        tokenizer = LazyTokenizer(str(facts.get("tokenizer_directory", facts["model"])))
        try:
            corpus = corpus_of_run(open_store(run, "report"))
            places = pc.index_in(pa.array(ids, pa.large_string()), value_set=corpus.ids)
            found = corpus.some(np.unique(places.drop_null().to_numpy()))
            tokens = {one.id: one.input_ids for one in found if one.input_ids is not None}
            files = tokenizer.files()
            if tokens and (not files or corpus.tokenizer.get(FILES, files) != files):
                got = "another one by now" if files else "none in its model's directory"
                raise UserError("their tokenizer", f"that of {run.path}", got, "")
            return cls({id: tokenizer.decode(own[:_LINE].tolist()) for id, own in tokens.items()})
        except RaycurvError as error:
            return cls(lacking=f"Texts of the examples are not shown: {error}")

    def line(self, id: str) -> str:
        """The beginning of a text, in one line; empty where it is not known."""
        return visible(" ".join(self.by_id.get(id, "")[: 4 * _LINE].split())[:_LINE])


def shown_queries(
    ranking: Ranking, queries: Texts, train: Texts, places: int, most: int,
    tokens: Mapping[str, Sequence[str]], kept: bool,
) -> list[Query]:  # fmt: skip
    """The queries as a page shows them.

    Args:
        places: passages of either sign.
        most: characters of a text.
        tokens: of training examples, where scores of tokens were written and the texts are there.
        kept: whether some scores of each query alone were kept.
    """
    ends = [float(query.rows["score"][n].as_py()) for query in ranking.queries for n in (0, -1)]
    sizes = [abs(score) for score in ends if score]
    largest, smallest = max(sizes, default=1.0), min(sizes, default=1.0)
    layers = [layer_of(name) for name in ranking.blocks]
    made = []
    for place, query in enumerate(ranking.queries, start=1):
        rows = query.rows.to_pylist()
        longest = _largest(query) or 1.0

        def passage(row: Mapping[str, Any], longest: float = longest) -> Passage:
            id, score = row["train_id"], row["score"]
            excerpt = None
            if id in tokens:
                excerpt = coloured(tokens[id], row[TOKEN_SCORES], most)
            elif id in train.by_id:
                excerpt = plain(train.by_id[id], most)
            return Passage(id, score, abs(score) / longest, excerpt)

        highest = [passage(row) for row in rows[:places] if row["score"] > 0]
        lowest = [passage(row) for row in rows[::-1][:places] if row["score"] < 0]
        text = queries.by_id.get(query.id)
        best, worst = rows[0]["score"], rows[-1]["score"]
        made.append(
            Query(
                place=place, id=query.id, line=queries.line(query.id),
                excerpt=None if text is None else plain(text, 2 * most), best=best, worst=worst,
                best_share=_by_logarithm(best, smallest, largest),
                worst_share=_by_logarithm(worst, smallest, largest),
                counts=f"{query.scored:,}{' kept' * kept}: {query.positive:,} above zero, "
                f"{query.negative:,} below",
                held="" if kept else _concentration(query, highest),
                layers=_strip(query.block_shares, layers), highest=highest, lowest=lowest,
            )
        )  # fmt: skip
    return made


def _by_logarithm(score: float, smallest: float, largest: float) -> float:
    """The length of a bar: 1 for the largest score, a tenth for the smallest, or for one that is a
    decade below the largest."""
    if not score:
        return 0.0
    span = max(1.0, math.log10(largest / smallest))
    return 1.0 - 0.9 * math.log10(largest / abs(score)) / span


def _largest(query: RankedQuery) -> float:
    scores = query.rows["score"].to_numpy()
    return float(np.abs(scores).max(initial=0.0))


def _concentration(query: RankedQuery, highest: Sequence[Passage]) -> str:
    if not highest or query.scored <= len(query.rows):
        return ""
    share = sum(row.score for row in highest) / query.gain
    return f"the {len(highest)} highest hold {percent(share)} of what is above zero"


def _strip(shares: Array, layers: Sequence[int | None]) -> list[tuple[str, float]]:
    """Of each layer its share and that as a share of the largest, for a row of bars; nothing where
    blocks have no layers."""
    by_layer: dict[int, float] = {}
    for layer, share in zip(layers, shares, strict=True):
        if layer is not None:
            by_layer[layer] = by_layer.get(layer, 0.0) + float(share)
    most = max(by_layer.values(), default=0.0)
    if not most or len(by_layer) < 2:
        return []
    return [(f"layer {n}: {percent(by_layer[n])}", by_layer[n] / most) for n in sorted(by_layer)]


def mean_shares(ranking: Ranking) -> dict[str, float]:
    """The share of the absolute scores that each block carries, the mean over the queries; empty
    without scores of blocks."""
    if not ranking.blocks:
        return {}
    shares = np.mean([query.block_shares for query in ranking.queries], axis=0)
    return dict(zip(ranking.blocks, shares.tolist(), strict=True))


def layers_section(shares: Mapping[str, float], more: bool) -> Section:
    """Which weights and layers carry the influence, or which flags write that down; with ``more``,
    that there may be scores of tokens, too."""
    title = ("layers", "Layers", "Where the influence lies")
    tokens = "Which tokens of a passage matter is on record with --per-token of raycurv influence."
    if not shares:
        said = (
            "Not on record: these scores are sums over all blocks. With --per-block of raycurv "
            "influence the scores of every block are written, too, and shown here by weight and "
            "layer."
        )
        return Section(*title, [said, *[tokens] * more])
    role_of = roles(list(shares))
    layers = sorted({layer_of(name) for name in shares}, key=lambda n: -1 if n is None else n)
    names = list(dict.fromkeys(role_of.values()))
    grid = np.zeros((len(names), len(layers)))
    for block, share in shares.items():
        grid[names.index(role_of[block]), layers.index(layer_of(block))] += share
    most = grid.max() or 1.0
    heads = ["Weight", *("no layer" if n is None else f"layer {n}" for n in layers), "all layers"]
    rows = [
        [
            Cell(name),
            *(
                Cell(percent(s), float(s), None, int(np.ceil(_SHADES * s / most - 0.5)))
                for s in row
            ),
            Cell(percent(row.sum()), float(row.sum())),
        ]
        for name, row in zip(names, grid, strict=True)
    ]
    rows.append(
        [Cell("all weights"), *(Cell(percent(s), float(s)) for s in grid.sum(axis=0)),
         Cell(percent(grid.sum()), float(grid.sum()))]
    )  # fmt: skip
    said = (
        "The share of the absolute scores that each weight carries, as the mean over the queries "
        "that are shown."
    )
    return Section(*title, [said, *[tokens] * more], tables=[Table("", heads, rows)])


def frequent_section(ranking: Ranking, train: Texts, places: int) -> list[Section]:
    """Training examples among the highest of several queries; nothing where there are none."""
    found = ranking.frequent(places)
    if not found:
        return []
    rows = [
        [Cell(id), Cell(f"{count:,}", count, count / len(ranking.queries)),
         *[Cell(train.line(id))] * bool(train.by_id)]
        for id, count in found
    ]  # fmt: skip
    said = (
        f"Training examples among the {places} highest of several queries. One that is there for "
        "most of them says more of itself, of a large gradient say, than of the queries."
    )
    heads = ["Training example", "Queries", *["Text"] * bool(train.by_id)]
    title = ("frequent", "Recurring", "Examples that come up again and again")
    return [Section(*title, [said], tables=[Table("", heads, rows)])]
