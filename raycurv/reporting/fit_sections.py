"""The parts of a page that speak of a fit: its curvature, examples, blocks, parameters and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc

from raycurv.data.findings import sentences
from raycurv.driver.timeline_table import DIRECTORY
from raycurv.errors import DamagedFile, some_of
from raycurv.files.manifest import NAME, Manifest
from raycurv.files.store import Store
from raycurv.jobs.timeline.lanes import read_lanes
from raycurv.reporting.charts import SERIES, Array, Pictures
from raycurv.reporting.page import Cell, Picture, Section, Table
from raycurv.reporting.spectra import Corrected, factor_curves, layer_of, roles
from raycurv.reporting.wording import duration, number, outcome, percent
from raycurv.run import Run

Rows = Sequence[Mapping[str, Any]]
_NORM, _LOSS, _TOKENS = "Gradient norm", "Loss a token", "Tokens"
# Rows of tables that a page shows.
_EXTREMES, _BLOCKS, _ACTORS = 12, 1000, 24


def curvature_section(
    run: Run, corrected: Corrected, blocks: Rows, pictures: Pictures
) -> list[Section]:
    """The spectra of A, G and Λ, and effective ranks by layer; nothing of a fit without any."""
    factors = factor_curves(run)
    role_of = roles(run.block_names())
    order = list(dict.fromkeys(role_of.values()))
    groups = {block: order.index(name) for block, name in role_of.items()}
    made: list[Picture] = []
    for side, caption in (("input", "A, of inputs"), ("output", "G, of output gradients")):
        if factors[side]:
            label = f"Eigenvalues of the factors {caption}, falling"
            picture = pictures.curves(factors[side], groups, label, "eigenvalue")
            made.append((f"Eigenvalues of {caption}", picture))
    if corrected.curves:
        caption = "Eigenvalues Λ of the blocks"
        if len(corrected.curves) < corrected.blocks:
            caption += f" ({len(corrected.curves)} of {corrected.blocks:,}, evenly chosen)"
        picture = pictures.curves(corrected.curves, groups, f"{caption}, falling", "eigenvalue")
        made.append((caption, picture))
    lines = _rank_lines(blocks, groups)
    if lines:
        caption = "Effective ranks of A (solid) and of G (dashed)"
        made.append((caption, pictures.lines(lines, caption, "layer", "effective rank")))
    if not made:
        return []
    last = len(SERIES) - 1
    legend = [(SERIES[min(n, last)], name) for n, name in enumerate(order[: last + 1])]
    if len(order) > len(SERIES):
        legend[-1] = (SERIES[-1], f"{order[last]} and {len(order) - len(SERIES)} more")
    said = (
        "One curve a factor or block, in the colour of its weight; a factor that several weights "
        "share has that of the first. The effective rank is the exponential of the entropy of the "
        "eigenvalues: d for d equal ones, 1 for a single one."
    )
    return [Section("curvature", "Curvature", "Spectra", [said], legend, made)]


def _rank_lines(
    blocks: Rows, groups: Mapping[str, int]
) -> list[tuple[int, bool, list[int], list[float]]]:
    """Of each role a line of A's and one of G's effective ranks over the layers, the mean where a
    layer has several such blocks; none of a single layer."""
    lines: dict[tuple[int, bool], dict[int, list[float]]] = {}
    for row in blocks:
        layer = layer_of(row["block"])
        for side, dashed in (("input", False), ("output", True)):
            rank = row[f"{side}_effective_rank"]
            if layer is not None and rank:
                line = lines.setdefault((groups[row["block"]], dashed), {})
                line.setdefault(layer, []).append(rank)
    return [
        (group, dashed, sorted(line), [float(np.mean(line[layer])) for layer in sorted(line)])
        for (group, dashed), line in lines.items()
        if len(line) > 1
    ]


@dataclass(frozen=True)
class ExampleNumbers:
    """What is on record of the examples of a fit.

    Attributes:
        ids: of all.
        columns: heads, and a number for each example, NaN where there is none.
    """

    ids: list[str]
    columns: dict[str, Array]

    @classmethod
    def of(cls, run: Run, own: Mapping[str, float]) -> ExampleNumbers:
        """Those of a run, and self-influence by example where it was written."""
        table = run.examples()
        ids, tokens = table["id"].to_pylist(), table["tokens"].to_numpy()
        columns = {
            _NORM: np.sqrt(_filled(table["gradient_sq_norm"])),
            _LOSS: _filled(table["loss"]) / np.maximum(tokens, 1),
            _TOKENS: tokens.astype(np.float64),
        }
        if own:
            columns["Self-influence"] = np.array([own.get(id, np.nan) for id in ids], np.float64)
        return cls(ids, columns)

    @cached_property
    def extremes(self) -> list[int]:
        """The places of the largest numbers of each column but tokens, the first column's first."""
        found: dict[int, None] = {}
        for head, values in self.columns.items():
            known = np.flatnonzero(np.isfinite(values))
            if head != _TOKENS:
                order = np.argsort(-values[known], kind="stable")[:_EXTREMES]
                found |= dict.fromkeys(known[order].tolist())
        return list(found)


def examples_section(
    examples: ExampleNumbers, lines: Mapping[str, str], pictures: Pictures
) -> list[Section]:
    """Losses and gradient norms of the examples; nothing of a fit that has neither.

    Args:
        lines: the beginnings of texts by example, where they are known.
    """
    ids, columns = examples.ids, examples.columns
    made: list[Picture] = []
    for head, unit, logarithms in ((_LOSS, "loss / tokens", False), (_NORM, "norm", True)):
        known = columns[head][np.isfinite(columns[head])]
        if len(known) and known.max() > max(known.min(), 0):
            picture = pictures.histogram(known, f"Histogram: {head}", unit, logarithms)
            made.append((f"{head} of an example", picture))
    both = np.isfinite(columns[_LOSS]) & (columns[_NORM] > 0)
    if both.any() and len(made) == 2:
        caption = "Loss a token and gradient norm"
        loss, norm = columns[_LOSS][both], columns[_NORM][both]
        made.append((caption, pictures.scatter(loss, norm, caption, "loss / tokens", "norm")))
    if not examples.extremes:
        return []
    rows = [
        [
            Cell(ids[n]),
            *(
                Cell.of(
                    float(of[n]) if np.isfinite(of[n]) else None,
                    _counted if head == _TOKENS else number,
                )
                for head, of in columns.items()
            ),
            *[Cell(lines.get(ids[n], ""))] * bool(lines),
        ]
        for n in examples.extremes
    ]
    what = ", ".join(head.lower() for head in columns if head != _TOKENS)
    said = (
        f"Of {len(ids):,} examples the {_EXTREMES} with the largest {what}, each: where broken or "
        "mislabelled ones are found first."
    )
    heads = ["Example", *columns, *["Text"] * bool(lines)]
    tables = [Table("The extreme ones", heads, rows, said, sortable=True)]
    return [Section("examples", "Examples", "Examples of the fit", (), (), made, tables)]


def _filled(column: Any) -> Array:
    """Numbers of a column, NaN where there is none."""
    filled: Array = pc.fill_null(column.cast("float64"), np.nan).to_numpy()
    return filled


def blocks_section(blocks: Rows, corrected: Corrected, shares: Mapping[str, float]) -> Section:
    """A row a block: shapes, traces, effective ranks, how its eigendecompositions ended.

    Args:
        blocks: rows of ``tables/blocks``.
        corrected: Λ of some.
        shares: of influence, by block; empty where it is not known.
    """
    said = "One row a weight with curvature."
    shown = list(blocks)
    if len(shown) > _BLOCKS:
        # What did not go as usual is the last to be left out.
        order = sorted(
            range(len(shown)),
            key=lambda n: (shown[n]["eigh_outcome"] == "ok", -(shown[n]["trace"] or 0.0)),
        )
        said = (
            f"The {_BLOCKS:,} weights of {len(blocks):,} whose decompositions did not go as usual, "
            "or of the largest traces; tables/blocks has all."
        )
        shown = [shown[n] for n in sorted(order[:_BLOCKS])]
    heads = ["Block", "Stage", "Outputs", "Inputs", "Rows", *["Influence"] * bool(shares), "Trace"]
    heads += ["Mean eigenvalue", "Eff. rank A", "Eff. rank G"]
    heads += ["Eff. rank Λ"] * bool(corrected.effective_ranks)
    rows = []
    for row in shown:
        name = row["block"]
        cells = [Cell(name)]
        cells += [Cell.of(row[key], _counted) for key in ("stage", "d_out", "d_in", "tokens")]
        if shares:
            share = shares.get(name, 0.0)
            cells.append(Cell(percent(share), share, share / max(shares.values())))
        cells += [Cell.of(row["trace"]), Cell.of(row["mean_eigenvalue"])]
        cells += [Cell.of(row[f"{side}_effective_rank"]) for side in ("input", "output")]
        if corrected.effective_ranks:
            cells.append(Cell.of(corrected.effective_ranks.get(name)))
        rows.append([*cells, Cell(outcome(row["eigh_outcome"]))])
    table = Table("", [*heads, "Eigendecomposition"], rows, sortable=True)
    return Section("blocks", "Blocks", "Blocks", [said], tables=[table])


def _counted(value: float | None) -> str:
    return number(None) if value is None else f"{value:,.0f}"


def covered(fit: Manifest) -> str:
    """Which share of the parameters has curvature, in words; nothing where it is not on record."""
    facts = fit.facts.get("coverage", {})
    if not facts.keys() >= {"covered", "trainable"}:
        return ""
    share = percent(facts["covered"] / max(1, facts["trainable"]))
    return f"{share} of {facts['trainable']:,} trainable parameters have curvature"


def coverage_section(fit: Manifest) -> list[Section]:
    """Which parameters have curvature, and which do not and why; nothing where it is not on
    record."""
    facts, said = fit.facts.get("coverage", {}), covered(fit)
    if not said:
        return []
    trainable = max(1, facts["trainable"])
    rows = [
        [Cell(name), Cell.of(count, _counted), Cell.of(count / trainable, _share), Cell(why)]
        for key, why in (
            ("left_out", "not among --blocks"),
            ("left_out_vectors", "a norm, bias or other vector"),
            ("frozen", "frozen"),
            ("not_run", "not run by the model's forward"),
        )
        for name, count in facts.get(key, {}).items()
    ]
    heads = ["Without curvature", "Numbers", "Of the trainable", "Why"]
    tables = [Table("", heads, rows)] if rows else []
    return [Section("coverage", "Parameters", "Parameters", [f"{said}."], tables=tables)]


def _share(value: float | None) -> str:
    return percent(value or 0.0)


def time_section(jobs: Sequence[tuple[str, Store, Manifest]], pictures: Pictures) -> Section:
    """How long each phase of each job took, when it went on, and how busy the actors were."""
    made: list[Picture] = []
    tables = []
    for title, store, manifest in jobs:
        seconds = manifest.seconds
        longest = max(seconds.values(), default=0.0) or 1.0
        # A run in this process, or one whose results were taken over, has no timeline.
        lanes = read_lanes(store) if store.names(DIRECTORY, ".parquet") else None
        order = [] if lanes is None else list(lanes.phases)
        phases = [
            [Cell(name), Cell(duration(seconds[name]), seconds[name], seconds[name] / longest)]
            for name in sorted(seconds, key=lambda name: order.index(name) if name in order else -1)
        ]
        tables.append(
            Table(f"{title}: {duration(sum(seconds.values()))}", ["Phase", "Time"], phases)
        )
        if lanes is None:
            continue
        if lanes.phases:
            caption = f"{title}: when each phase went on"
            made.append((caption, pictures.spans(lanes.phases, caption)))
        actors = [
            [
                Cell(share.actor + (f", {share.at_a_time} at a time" * (share.at_a_time > 1))),
                *(Cell.of(s, _duration) for s in (share.compute, share.transport, share.waiting)),
                Cell(percent(share.busy), share.busy, share.busy),
            ]
            for share in lanes.shares()[:_ACTORS]
        ]
        heads = ["Actor", "Compute", "Transport", "Waiting", "Busy"]
        tables.append(Table(f"{title}, by actor", heads, actors))
    return Section("time", "Time", "Time", (), (), made, tables)


def _duration(seconds: float | None) -> str:
    return duration(seconds or 0.0)


def fit_notes(run: Run, blocks: Rows) -> list[str]:
    """What to know of a fit before its numbers are believed; DamagedFile as for
    :func:`reading_notes`."""
    said = [*run.manifest.facts.get("model_notes", ()), *reading_notes(run.manifest, run.path)]
    outcomes: dict[str, list[str]] = {}
    for row in blocks:
        if row["eigh_outcome"] != "ok":
            outcomes.setdefault(row["eigh_outcome"], []).append(row["block"])
    for text, names in outcomes.items():
        said.append(f"{some_of(names, 1)}: {outcome(text)}")
    thin = sum(bool(row.get("thin")) for row in blocks)
    if thin:
        said.append(
            f"{thin:,} of {len(blocks):,} blocks were reached by fewer rows than twice the longer "
            "of their axes: their factors are rough"
        )
    return said


def reading_notes(manifest: Manifest, where: str) -> list[str]:
    """What of a job's data was not taken as it stood.

    Args:
        where: the directory, for errors.

    Raises:
        DamagedFile: what is on record of it is nothing that a job writes.
    """
    said = []
    for name, recorded in manifest.facts.get("reading", {}).items():
        without = recorded.get("examples_without_loss", 0)
        try:
            told = sentences(recorded, recorded.get("examples", 0), without)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedFile(
                f"{where}/{NAME}", f"what a job tells of the {name} that it read", repr(error),
                "Restore the file, or run the job again into another directory.",
            ) from error  # fmt: skip
        said += [f"{name}: {sentence}" for sentence in told]
    return said
