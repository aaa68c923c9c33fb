"""Reads the demo's scores back and prints each query's most influential passages.

Of raycurv it needs nothing: scores are plain Parquet.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

WIDTH = 100  # columns of a terminal


@dataclass(frozen=True)
class Passage:
    """What passages.py or smollm.py wrote of one passage.

    Attributes:
        file: that it is of; of a fact, its module.
    """

    id: str
    file: str
    text: str


@dataclass(frozen=True)
class Top:
    """A query's most influential training passages, highest score first."""

    query: Passage
    ranked: list[tuple[Passage, float]]

    def own(self) -> int:
        """How many of them come from the query's own file."""
        return sum(passage.file == self.query.file for passage, _ in self.ranked)


@dataclass(frozen=True)
class Enrichment:
    """How often the top places went to the query's own file, and how often chance would send them.

    Chance is a top drawn at random from the training passages, for the same queries.
    """

    own: int
    places: int
    by_chance: float

    @classmethod
    def of(cls, tops: list[Top], train: dict[str, Passage]) -> Enrichment:
        by_file: dict[str, int] = {}
        for passage in train.values():
            by_file[passage.file] = by_file.get(passage.file, 0) + 1
        return cls(
            own=sum(top.own() for top in tops),
            places=sum(len(top.ranked) for top in tops),
            by_chance=sum(
                len(top.ranked) * by_file.get(top.query.file, 0) / len(train) for top in tops
            ),
        )

    def line(self, source: str = "file") -> str:
        """In words, ``source`` being what passages are of."""
        times = f"{self.own / self.by_chance:.1f}" if self.by_chance else "undefined"
        return (
            f"own-{source} passages fill {self.own} of {self.places} top-five places: "
            f"{times} times chance"
        )


def read_passages(path: Path, source: str = "file") -> dict[str, Passage]:
    """Passages by id, in the file's order; ``source`` is the column that says what they are of."""
    found = {}
    for row in pq.read_table(path).to_pylist():
        text = row["text"] if "text" in row else f"{row['prompt']} ▸{row['completion']}"
        found[row["id"]] = Passage(row["id"], row[source], text)
    return found


def read_tops(
    scores: Path, queries: dict[str, Passage], train: dict[str, Passage], places: int = 5
) -> list[Top]:
    """Each query's highest scores, from the directory of score files.

    Raises:
        SystemExit: a query has no scores there.
    """
    tops = []
    for query in queries.values():
        table = pq.read_table(
            scores,
            columns=["train_id", "score"],
            filters=[("query_id", "==", query.id)],
        )
        if not table.num_rows:
            raise SystemExit(
                f"{scores}: expected scores of query {query.id!r}, got none. "
                "Score these queries first, or give the --queries that were scored."
            )
        best = table.sort_by([("score", "descending")]).slice(0, places).to_pylist()
        if strange := [row["train_id"] for row in best if row["train_id"] not in train]:
            raise SystemExit(
                f"{scores}: expected scores of the training passages, got {strange[0]!r}. "
                "Give the --train that was scored."
            )
        tops.append(Top(query, [(train[row["train_id"]], row["score"]) for row in best]))
    return tops


def longest_line(text: str) -> str:
    """The line that says most of what a passage is about, without its indentation."""
    return max((" ".join(line.split()) for line in text.splitlines()), key=len, default="")


def excerpt(text: str, lines: int) -> list[str]:
    """The first lines that are not blank, their common indentation taken off."""
    full = [line.expandtabs().rstrip() for line in text.splitlines() if line.strip()][:lines]
    margin = min((len(line) - len(line.lstrip()) for line in full), default=0)
    return [line[margin:] for line in full]


def clip(text: str, width: int = WIDTH) -> str:
    """The text, its end replaced by an ellipsis where it is too wide."""
    return text if len(text) <= width else text[: width - 1] + "…"


def show(top: Top, id_width: int) -> list[str]:
    """Lines for one query: its own text, then a line for each influential passage."""
    lines = [f"query {top.query.id}"]
    lines += [f"    | {line}" for line in excerpt(top.query.text, 2)]
    for place, (passage, score) in enumerate(top.ranked, start=1):
        mark = "*" if passage.file == top.query.file else " "
        lines.append(
            f"  {place} {mark} {passage.id:{id_width}} {score:10.3e}  {longest_line(passage.text)}"
        )
    return [clip(line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--scores", type=Path, required=True, help="what influence.py was given as --out"
    )
    parser.add_argument("--train", type=Path, required=True, help="training passages (Parquet)")
    parser.add_argument("--queries", type=Path, required=True, help="queries (Parquet)")
    parser.add_argument("--source", default="file", help="column of what passages are of")
    args = parser.parse_args()
    train, queries = (read_passages(path, args.source) for path in (args.train, args.queries))
    directory = args.scores / "scores"
    if not list(directory.glob("*.parquet")):
        raise SystemExit(
            f"{directory}: expected Parquet files of scores, got none. "
            "Run influence.py with this directory's parent as --out first."
        )
    tops = read_tops(directory, queries, train)
    id_width = max(len(passage.id) for top in tops for passage, _ in top.ranked)
    for top in tops:
        print("\n".join(show(top, id_width)), end="\n\n")
    print(f"* a passage of the query's own {args.source}")
    print(Enrichment.of(tops, train).line(args.source))
    print(directory)


if __name__ == "__main__":
    main()
