"""Pictures as SVG that stands in a page: drawn by matplotlib, coloured by the page's own style.

The page forbids inline styles, so what matplotlib writes as ``style`` becomes attributes, which the
page's rules override: lines and texts take the colour of the text around them, data the colours of
the page, in the light and in the dark.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from itertools import count
from typing import Any
from xml.etree import ElementTree

import numpy as np

from raycurv.errors import UserError
from raycurv.reporting.wording import short

Array = np.ndarray[Any, Any]

# Colours of groups of curves: names of the page's variables stand for them. They are told apart by
# the colour-blind, too (Okabe and Ito 2008).
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b", "#7a7a7a")
# Curves of a picture: more are not seen.
CURVES = 120
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_INK = "#000000"
_NUMBER = re.compile(r"-?\d+\.\d+")
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "raycurv", "text.parse_math": False,
    "font.size": 9, "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": _INK, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "xtick.minor.size": 0, "ytick.minor.size": 0, "axes.formatter.useoffset": False,
}  # fmt: skip


def figure_class() -> Any:
    """``matplotlib.figure.Figure``; a UserError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("matplotlib", error) from error
    return Figure


def missing(library: str, error: ImportError) -> UserError:
    """The mistake of a report without a library that makes it."""
    return UserError(
        "report", library, f"not installed ({error})", "Install it: pip install 'raycurv[report]'."
    )


@dataclass(frozen=True)
class Curve:
    """Falling values of a block, at some of their ranks, which count from 1."""

    block: str
    ranks: Array
    values: Array


class Pictures:
    """Draws the pictures of one page."""

    def __init__(self) -> None:
        self._figure, self._numbers = figure_class(), count()

    @contextmanager
    def _drawn(self, width: float, height: float, label: str, made: list[str]) -> Iterator[Any]:
        """Axes to draw on, inches wide and high; ``made`` takes the picture."""
        from matplotlib import rc_context
        from matplotlib.ticker import NullLocator

        with rc_context(_STYLE):
            figure = self._figure(figsize=(width, height), layout="constrained")
            axes = figure.add_subplot()
            yield axes
            for axis in (axes.xaxis, axes.yaxis):
                if axis.get_scale() == "log":
                    low, high = sorted(axis.get_view_interval())
                    axis.get_major_locator().set_params(subs=(1, 2, 5) if high < 50 * low else (1,))
                    axis.set_major_formatter(lambda value, _: short(value))
                    axis.set_minor_locator(NullLocator())
            out = StringIO()
            nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
            figure.savefig(out, format="svg", transparent=True, metadata=nothing)
        made.append(_for_page(out.getvalue(), f"p{next(self._numbers)}", label, width > 6))

    def curves(
        self, curves: Sequence[Curve], groups: Mapping[str, int], label: str, unit: str
    ) -> str:
        """Falling values over their rank, both by their logarithms.

        Args:
            groups: the number of the colour of each block's curve.
            label: what the picture shows, for who cannot see it.
            unit: of the values.
        """
        made: list[str] = []
        with self._drawn(4.2, 2.9, label, made) as axes:
            for curve in _some(curves, CURVES):
                axes.loglog(curve.ranks, curve.values, linewidth=0.9, alpha=0.75,
                    color=_series(groups[curve.block]))  # fmt: skip
            axes.set(xlabel="rank", ylabel=unit)
        return made[0]

    def histogram(self, values: Array, label: str, unit: str, logarithms: bool = False) -> str:
        """How many values lie where; with ``logarithms`` those above zero, by theirs."""
        made: list[str] = []
        with self._drawn(4.2, 2.2, label, made) as axes:
            bars = int(np.clip(2 * np.sqrt(len(values)), 5, 40))
            if logarithms:
                values = values[values > 0]
                edges = np.geomspace(values.min(), values.max() * (1 + 1e-9), bars + 1)
                axes.set_xscale("log")
            else:
                edges = np.linspace(values.min(), values.max() + 1e-12, bars + 1)
            heights, _ = np.histogram(values, edges)
            axes.bar(edges[:-1], heights, np.diff(edges), align="edge", color=SERIES[0])
            axes.set(xlabel=unit, ylabel="examples")
        return made[0]

    def scatter(self, x: Array, y: Array, label: str, x_unit: str, y_unit: str) -> str:
        """A dot an example, y by its logarithm; of many a sample, always the same."""
        shown = np.flatnonzero(y > 0)
        if len(shown) > 800:
            shown = np.sort(np.random.default_rng(0).choice(shown, 800, replace=False))
        made: list[str] = []
        with self._drawn(4.2, 2.2, label, made) as axes:
            axes.set_yscale("log")
            axes.plot(x[shown], y[shown], "o", color=SERIES[0], markersize=2.2, alpha=0.5,
                markeredgewidth=0)  # fmt: skip
            axes.set(xlabel=x_unit, ylabel=y_unit)
        return made[0]

    def lines(
        self, lines: Sequence[tuple[int, bool, Sequence[int], Sequence[float]]], label: str,
        x_unit: str, y_unit: str,
    ) -> str:  # fmt: skip
        """Lines of a group each, dashed or not, y by its logarithm, over whole numbers."""
        made: list[str] = []
        with self._drawn(4.2, 2.9, label, made) as axes:
            axes.set_yscale("log")
            for group, dashed, x, y in lines:
                look = "o--" if dashed else "o-"
                axes.plot(x, y, look, color=_series(group), linewidth=1.0, markersize=2.8)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set(xlabel=x_unit, ylabel=y_unit)
        return made[0]

    def spans(self, phases: Mapping[str, Sequence[tuple[float, float]]], label: str) -> str:
        """When each phase went on, in seconds, a row a phase."""
        made: list[str] = []
        with self._drawn(8.6, 0.7 + 0.26 * len(phases), label, made) as axes:
            for row, times in enumerate(phases.values()):
                axes.broken_barh([(a, b - a) for a, b in times], (row - 0.32, 0.64),
                    facecolor=SERIES[0], edgecolor=SERIES[0], linewidth=0.8)  # fmt: skip
            axes.set_yticks(range(len(phases)), list(phases))
            axes.set(xlim=(0, None), ylim=(len(phases) - 0.4, -0.6))
            axes.set_xlabel("seconds from the start")
            axes.tick_params(axis="y", length=0)
        return made[0]


def _series(group: int) -> str:
    return SERIES[min(group, len(SERIES) - 1)]


def _some(curves: Sequence[Any], most: int) -> list[Any]:
    """At most so many, evenly out of all."""
    if len(curves) <= most:
        return list(curves)
    return [curves[n * len(curves) // most] for n in range(most)]


def _for_page(svg: str, name: str, label: str, wide: bool) -> str:
    """A picture as part of a page.

    Args:
        svg: as matplotlib writes it.
        name: makes its ids differ from those of other pictures.
        label: what it shows.
        wide: whether it is twice as wide as others.
    """
    root = ElementTree.fromstring(re.sub(r"<!DOCTYPE[^>]*>", "", svg))
    for parent in list(root.iter()):
        parent.text = (parent.text or "").strip()
        for child in list(parent):
            child.tail = ""
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        given = element.attrib
        element.tag = element.tag.rpartition("}")[2]
        for key, value in _declared(given.pop("style", "")):
            given[key] = "currentColor" if value == _INK else value
        if element.tag == "text":
            given.setdefault("fill", "currentColor")
        if _LINK in given:
            given["href"] = given.pop(_LINK)
        for key in ("href", "clip-path"):
            if key in given:
                given[key] = given[key].replace("#", f"#{name}-")
        # Only what is used elsewhere in the picture needs a name.
        own = given.pop("id", "")
        if element.tag in ("path", "clipPath") and own:
            given["id"] = f"{name}-{own}"
        if given.get("transform", "").startswith("rotate(-0 "):
            del given["transform"]
        for key in ("d", "transform", "x", "y", "width", "height"):
            if key in given:
                given[key] = _NUMBER.sub(_rounded, " ".join(given[key].split()))
    for key in ("version", "width", "height"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": label, "class": f"plot{' wide' * wide}"}
    return ElementTree.tostring(root, encoding="unicode")


def _declared(style: str) -> Iterator[tuple[str, str]]:
    """The declarations of an inline style as attributes of SVG; the page has a font of its own."""
    for part in style.split(";"):
        key, _, value = (text.strip() for text in part.partition(":"))
        if key == "font":
            yield "font-size", value.partition("px")[0].split()[-1]
        elif key and (key, value) not in _USUAL:
            yield key, value


def _rounded(found: re.Match[str]) -> str:
    return f"{float(found[0]):.1f}".removesuffix(".0")


# What is so without being said.
_USUAL = {("stroke-linejoin", "miter"), ("stroke-linecap", "butt")}
