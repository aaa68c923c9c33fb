"""The page ``docs/models.md``: which types of models work, how, and what says so.

    python benchmarks/models_page.py

It is made of two sources: ``results/families.json``, which ``families.py --table`` writes, and the
tables of the tests that try some of the types. A test holds that the page is what they give.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FAMILIES = ROOT / "benchmarks" / "results" / "families.json"
PAGE = ROOT / "docs" / "models.md"
_INTRODUCTION = """\
# Models

Every type of language model that transformers has, tried as a tiny model of its class: saved as a
directory, opened, evaluated and differentiated. A type stands under "Work" if its losses are those
of transformers for each example alone, without padding, and those of three stages are those of one
bit for bit; and if the gradients of each example by each block are autograd's on transformers' own
parameters, in float64 (to 1e-5, where a class computes parts in float32; a class that fails in
float64 by itself is fitted in float32, where a check holds two examples against autograd). Types of
images and text are tried with a text alone. Tests of the suite try those that name one; the rest
was tried by [`families.py`](../benchmarks/results/2026-11-30-families-by-gradients.md).

- **stages**: whether the model may be cut between its layers, or runs as one stage.
- **experts**: whether a mixture's experts have blocks.
- **covered**: share of the tiny model's trainable parameters that have blocks by default.
  Embeddings, norms and heads have none (`--blocks all` takes them), and are a larger part of a tiny
  model than of a large one.
- **to leave out**: weights of no kind that has blocks by default, which a fit asks to be left out:
  give these as `--blocks`, or `--blocks all`.

This page is made by `python benchmarks/models_page.py`.
"""


def page(tested: Mapping[str, str], others: Sequence[Sequence[str]]) -> str:
    """The page as Markdown.

    Args:
        tested: the test that tries a type, by its ``model_type``.
        others: models of other tasks: task, type, stages, test.
    """
    rows = json.loads(FAMILIES.read_text())
    outcomes = ("right", "refused", "not built")
    work, refused, untried = ([r for r in rows if r["outcome"] == o] for o in outcomes)
    assert len(work) + len(refused) + len(untried) == len(rows), "a type that is wrong"
    lines = [
        _INTRODUCTION,
        f"## Work ({len(work)})",
        "",
        *markdown(
            ["type", "class", "stages", "experts", "covered", "to leave out", "tested by"],
            (
                [
                    row["kind"], row["name"], "any" if row["units"] > 1 else "one",
                    "yes" if row["experts"] else "", f"{row['covered']:.0%}",
                    " ".join(f"`{glob}`" for glob in row["left"]),
                    tested.get(row["kind"].split(" ")[0], "benchmark"),
                ]
                for row in work
            ),
        ),
        "",
        "## Other tasks",
        "",
        "The tests try those that are particular; others of their kind are opened alike.",
        "",
        *markdown(["task", "type", "stages", "tested by"], others),
        "",
        f"## Are refused ({len(refused)})",
        "",
        "With these words, and without a result. Encoders are opened as what they are when",
        "`architectures` says so: as masked models, or as classifiers.",
        "",
        *markdown(
            ["type", "class", "expected, and got"],
            ([row["kind"], row["name"], _reason(row["said"])] for row in refused),
        ),
        "",
        f"## Not tried ({len(untried)})",
        "",
        "No tiny model of them could be made by transformers alone: "
        + ", ".join(row["kind"] for row in untried)
        + ".",
    ]  # fmt: skip
    return "\n".join([*lines, ""])


def markdown(header: Sequence[str], rows: Any) -> Iterator[str]:
    """The lines of a table, without padding."""
    yield from (f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _reason(said: str) -> str:
    """What was expected and what was there instead, the beginning of it."""
    words: str = said.split(": expected ", 1)[-1].replace("|", "/")
    return words if len(words) <= 250 else words[:250].rpartition(" ")[0] + " …"


def main() -> None:
    """Write the page."""
    sys.path.append(str(ROOT / "tests"))
    from test_families import models_page

    PAGE.write_text(models_page())


if __name__ == "__main__":
    main()
