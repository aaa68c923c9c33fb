"""Texts as a page shows them: cut to a length, control characters seen, tokens by their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from raycurv.reporting.charts import Array
from raycurv.reporting.wording import visible

# Steps of the colour of a token, of either sign.
LEVELS = 4


@dataclass(frozen=True)
class Excerpt:
    """A text, or a part of it.

    Attributes:
        text: what is shown.
        looks: of its runs of one colour, for the page's script: a letter, ``a`` for none, ``b`` to
            ``e`` for scores above zero, ``f`` to ``i`` for those below, and how many UTF-16 units
            it has, where that is not one; empty for no colours.
        before, after: characters that are left out.
    """

    text: str
    looks: str = ""
    before: int = 0
    after: int = 0


def plain(text: str, most: int) -> Excerpt:
    """The beginning of a text, of at most so many characters."""
    return Excerpt(visible(text[:most]), after=max(0, len(text) - most))


def coloured(tokens: Sequence[str], scores: Sequence[float], most: int) -> Excerpt:
    """The tokens of a text, each in the colour of its score: by its share of the largest one.

    Of a text of more than ``most`` characters the part is shown whose absolute scores add up to
    most.
    """
    values = np.asarray(scores, np.float64)
    lengths = np.array([len(token) for token in tokens])
    start, stop = _window(lengths, np.abs(values), most)
    largest = np.abs(values[start:stop]).max(initial=0.0) or 1.0
    steps = np.ceil(LEVELS * np.abs(values) / largest - 0.5).astype(int)
    looks = np.where(values < 0, steps + LEVELS * (steps > 0), steps)
    runs = []
    for look, same in groupby(range(start, stop), lambda n: int(looks[n])):
        units = len("".join(tokens[n] for n in same).encode("utf-16-le")) // 2
        runs.append("abcdefghi"[look] + (str(units) if units != 1 else ""))
    return Excerpt(
        visible("".join(tokens[start:stop])), "".join(runs),
        int(lengths[:start].sum()), int(lengths[stop:].sum()),
    )  # fmt: skip


def _window(lengths: Array, weights: Array, most: int) -> tuple[int, int]:
    """The tokens from which to which: as many as ``most`` characters hold, whose weights add up to
    most; the first such ones."""
    characters, weight = np.r_[0, np.cumsum(lengths)], np.r_[0.0, np.cumsum(weights)]
    stops = np.maximum(np.searchsorted(characters, characters[:-1] + most, side="right") - 1, 1)
    starts = np.arange(len(lengths))
    held = weight[np.maximum(stops, starts)] - weight[starts]
    # A beginning from where the end is reached anyway would show less.
    last = int(np.searchsorted(stops, len(lengths), side="left"))
    best = int(np.argmax(held[: last + 1])) if len(lengths) else 0
    return best, int(stops[best]) if len(lengths) else 0


def looks_like_code(texts: Sequence[str]) -> bool:
    """Whether texts want letters of one width: many of their lines are indented or end like
    code."""
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    code = sum(line[:1] in " \t" or line.rstrip()[-1] in "{};:(" for line in lines)
    return code > 0.25 * max(1, len(lines))
