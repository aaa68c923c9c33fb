"""What a report says, and the HTML that it becomes.

The page holds all that it shows. Its policy allows its own style and its own script, by their
hashes, and nothing else: no address is fetched, no inline style or handler works. Texts enter
escaped; pictures are made by :mod:`raycurv.reporting.charts`, whose texts are escaped as well.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

from raycurv.reporting.charts import missing
from raycurv.reporting.passages import Excerpt
from raycurv.reporting.wording import number

# A caption and a picture, as SVG.
Picture = tuple[str, str]


@dataclass(frozen=True)
class Passage:
    """A training example as a query has it: its score, and that as a share of the longest bar."""

    id: str
    score: float
    share: float
    excerpt: Excerpt | None


@dataclass(frozen=True)
class Query:
    """A query with its passages.

    Attributes:
        place: from 1.
        line: the beginning of its text.
        best, worst: its highest and lowest score; their shares of the largest of all queries.
        counts, held: how many scores there are, and how much of them the highest hold, in words.
        layers: what a layer has of its scores in words, and as a share of the most.
    """

    place: int
    id: str
    line: str
    excerpt: Excerpt | None
    best: float
    worst: float
    best_share: float
    worst_share: float
    counts: str
    held: str
    layers: Sequence[tuple[str, float]]
    highest: Sequence[Passage]
    lowest: Sequence[Passage]


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        shown: its text.
        value: a number by which its column is sorted; ``None`` for a text.
        share: of a bar beside the text, 0 to 1; ``None`` for none.
        shade: steps of shading, 0 to 5.
    """

    shown: str
    value: float | None = None
    share: float | None = None
    shade: int = 0

    @property
    def key(self) -> str:
        """The number, as text, by which the page sorts the cell; empty for none or infinity."""
        return "" if self.value is None or math.isinf(self.value) else repr(self.value)

    @classmethod
    def of(cls, value: float | None, words: Callable[[float | None], str] = number) -> Cell:
        """A number in words; one that there is not is below all others."""
        return cls(words(value), -math.inf if value is None else float(value))


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it.

    Attributes:
        title: above it.
        heads: of the columns.
        said: beneath its title.
        sortable: by each column.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    said: str = ""
    sortable: bool = False


@dataclass(frozen=True)
class Section:
    """A part of a page: what it says, then pictures, then tables.

    Attributes:
        anchor: by which it is linked to.
        name: in the page's list of its parts.
        title: above it.
        said: paragraphs.
        legend: colours and what has them.
    """

    anchor: str
    name: str
    title: str
    said: Sequence[str] = ()
    legend: Sequence[tuple[str, str]] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        kicker: above its title.
        facts: what it is of: a term, what it is, and more about it.
        notes: what to know before its numbers are believed.
        meaning: of the scores; ``lowers`` and ``raises``: of those above and below zero.
        left_out: which queries are not shown.
        coloured: whether tokens have the colours of their scores.
        mono: whether texts want letters of one width.
        colophon: at its end.
    """

    title: str
    kicker: str
    facts: Sequence[tuple[str, str, str]]
    notes: Sequence[str]
    sections: Sequence[Section]
    colophon: Sequence[str]
    queries: Sequence[Query] = ()
    meaning: str = ""
    lowers: str = ""
    raises: str = ""
    left_out: str = ""
    coloured: bool = False
    mono: bool = False


class Renderer:
    """Makes pages by jinja2, with every text escaped."""

    def __init__(self) -> None:
        try:
            from jinja2 import Environment, PackageLoader, StrictUndefined
            from markupsafe import Markup
        except ImportError as error:
            raise missing("jinja2", error) from error
        self._markup = Markup
        self._environment = Environment(
            loader=PackageLoader("raycurv.reporting"), autoescape=True, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        self._environment.filters |= {
            "signed": lambda value: number(value, signed=True),
            "picture": Markup,
        }

    def html(self, page: Page) -> str:
        """The page as HTML, with its style, its script and the policy that allows these alone."""
        folder = resources.files("raycurv.reporting") / "templates"
        style, script = (
            (folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
        )
        policy = (
            f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
            "base-uri 'none'; form-action 'none'"
        )
        template = self._environment.get_template("report.html.jinja")
        return template.render(
            page=page, policy=policy, style=self._markup(style), script=self._markup(script)
        )


def _hash(content: str) -> str:
    """How a policy names what stands between two tags."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
