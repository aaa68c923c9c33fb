"""What candidates hold of scores on all examples: of the 10 highest, and of the positive influence.

    a finished scoring without --candidates, its texts and its tokenizer
      ─► candidates by words and by tokens, b = 0 and 0.75, several K; and by chance
      ─► results/DATE-candidates-NAME.md

Nothing goes through a model: the scores are there.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import tyro
from result_file import Report, command_line, processor, source_state, table

import raycurv
from raycurv.data.examples import Example
from raycurv.data.tokenizer import LazyTokenizer
from raycurv.driver.corpus import Corpus, store_corpus
from raycurv.files.store import Store
from raycurv.jobs.influence.candidates import Candidates, Held, choose_candidates, measure

RESULTS = Path(__file__).parent / "results"
TERMS, LENGTHS = ("words", "tokens"), ("0", "0.75")


@dataclass(frozen=True)
class Settings:
    """Measures on a finished scoring what candidates would hold of it."""

    scores: Path
    """Directory of the scoring."""
    train: Path
    """The Parquet file that was scored: `id`, and `text` or `prompt` and `completion`."""
    queries: Path
    """The queries, likewise."""
    tokenizer: Path
    """Directory of the tokenizer that they went through."""
    name: str
    """Of the result: results/DATE-candidates-NAME.md."""
    k: tuple[int, ...] = (10, 25, 50, 100)
    """How many candidates."""


def stored(store: Store, name: str, file: Path, tokenizer: LazyTokenizer) -> Corpus:
    """The examples of a file."""
    rows = pq.read_table(file).to_pylist()
    texts = [row.get("text") or row["prompt"] + row["completion"] for row in rows]
    ids = [np.array(one, np.int32) for one in tokenizer.encode(texts, special=True)]
    examples = (Example(n, row["id"], ids[n]) for n, row in enumerate(rows))
    return store_corpus(store, name, examples, name, dict)


def by_chance(queries: int, examples: int, k: int) -> Candidates:
    """k examples for each query, drawn at random."""
    draw = np.random.default_rng(0)
    drawn = [np.sort(draw.choice(examples, k, replace=False)) for _ in range(queries)]
    return Candidates(np.repeat(np.arange(queries), k), np.concatenate(drawn))


def section(settings: Settings) -> list[str]:
    """A row for each way to choose candidates."""
    scored = raycurv.open_scores(settings.scores)
    files = [name for some in scored.manifest.facts["files"].values() for name in some]
    names = [name for name in files if name.startswith("scores/")]
    tokenizer, rows = LazyTokenizer(settings.tokenizer), []
    with tempfile.TemporaryDirectory() as folder:
        queries, train = (
            stored(Store(folder), name, file, tokenizer)
            for name, file in (("queries", settings.queries), ("train", settings.train))
        )

        def add(label: list[str], chosen: Candidates) -> None:
            held: Held = measure(
                Store(scored.path), names, chosen, range(len(queries)), queries, train
            )
            share = "" if held.positive is None else f"{held.positive:.1%}"
            each, union = len(chosen) / len(queries), len(chosen.union) / len(train)
            rows.append([*label, f"{each:.0f}", f"{union:.0%}", f"{held.recall:.1%}", share])

        smaller = [k for k in settings.k if k < len(train)]
        for over, b, k in itertools.product(TERMS, LENGTHS, smaller):
            chosen = choose_candidates(f"bm25:{k},b={b},over={over}", queries, train, tokenizer)
            assert chosen is not None
            add([over, b, str(k)], chosen)
        for k in smaller:
            add(["by chance", "", str(k)], by_chance(len(queries), len(train), k))
        said = f"{len(queries)} queries, {len(train):,} training examples, {train.tokens:,} tokens."
    header = ["terms", "b", "K", "each has", "examples of all", "10 highest", "positive influence"]
    return [said, "", *table(header, rows), ""]


def main(settings: Settings) -> None:
    """Measure and write."""
    report = Report()
    report.add("candidates", lambda: section(settings))
    blank = Settings(Path(), Path(), Path(), Path(), "")
    report.write(
        RESULTS / f"{date.today()}-candidates-{settings.name}.md",
        f"# What candidates hold of {settings.name}'s scores, {date.today()}",
        command_line("candidates.py", settings, blank),
        [f"- raycurv at {source_state()}", f"- machine: {processor()}"],
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
