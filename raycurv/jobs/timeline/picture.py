"""A picture of a timeline: who waits for whom.

A lane an actor, a bar an operation, with its microbatch's number where there is room. Waiting is
empty space. A bar is never thinner than a hairline. Where these would run together, a lane shows
instead how much of each moment went into what, by height: waiting is empty again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raycurv.errors import UserError
from raycurv.jobs.timeline.lanes import Bar, Lane, Lanes, Stretch, length, union

# Inches.
_WIDTH, _LEFT, _RIGHT, _BELOW, _ABOVE = 11.0, 1.25, 0.5, 0.5, 0.35
_LEGEND_LINE, _PHASE_LINE = 0.2, 0.14
_POINTS = 72.0
# Points: the font of small text, how wide one of its letters is, and the thinnest bar.
_FONT, _LETTER, _HAIRLINE = 7.0, 3.9, 0.8
# Lanes are shown by height where bars would fill so much more of them; in moments of so many
# points, each with a least height of what is in it.
_FULLER, _MOMENT, _LEAST = 0.05, 2.0, 0.06
# Of a lane's height, that of a bar.
BAR = 0.72
# More numbers than these are a grey cloud.
_MOST_NUMBERS = 500
_MOST_PHASE_LINES = 3
_LEGEND_COLUMNS = 6


@dataclass(frozen=True)
class Kind:
    """How operations of a kind look.

    Attributes:
        label: in the legend.
        colour: of the bars, to be told apart by the colour-blind too (Okabe and Ito 2008).
    """

    label: str
    colour: str


FORWARD = Kind("forward", "#56B4E9")
TURN = Kind("turn (last stage)", "#0072B2")
BACKWARD = Kind("backward", "#E69F00")
LOAD = Kind("load", "#8A8A8A")
COMMIT = Kind("commit", "#CC79A7")
WRITE = Kind("sums added up and written", "#7A5195")
OTHER = Kind("other calls", "#C8C8C8")
DECOMPOSE = Kind("eigendecomposition", "#009E73")
TASK = Kind("other tasks", "#A6D96A")
_LOST, _REBUILT = Kind("lost", "#D62728"), Kind("rebuild", "#F8D0C8")
_KINDS = {
    "forward": FORWARD, "turn": TURN, "backward": BACKWARD, "load": LOAD, "commit": COMMIT,
    "result": WRITE, "joined": WRITE, "write": WRITE, "decompose_factor": DECOMPOSE,
}  # fmt: skip
_ORDER = (FORWARD, TURN, BACKWARD, LOAD, COMMIT, WRITE, OTHER, DECOMPOSE, TASK)


def kind_of(bar: Bar, task: bool) -> Kind:
    """How a bar looks."""
    return _KINDS.get(bar.operation, TASK if task else OTHER)


def draw(lanes: Lanes, title: str) -> Any:
    """The picture, a ``matplotlib.figure.Figure``.

    The bars of a kind in a lane are one collection whose gid is ``LANE/LABEL``; of losses and of
    rebuilding in a lane, the gids are ``LANE/lost`` and ``LANE/rebuild``.

    Raises:
        UserError: matplotlib is not installed.
    """
    return _Picture(lanes, title).figure


def save(figure: Any, path: str) -> None:
    """Write a picture; the same one gives the same bytes.

    Raises:
        UserError: the ending is neither .png nor .svg.
    """
    check_path(path)
    from matplotlib import rc_context

    date = {"Date": None} if path.endswith(".svg") else {}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "raycurv"}):
        figure.savefig(path, metadata=date)


def check_path(path: str) -> None:
    """Refuse a picture that cannot be made, before anything is read.

    Raises:
        UserError: of another kind than .png and .svg; no such directory; no matplotlib.
    """
    if not path.endswith((".png", ".svg")):
        raise UserError("--picture", "a file that ends in .png or .svg", repr(path), "")
    if not Path(path).absolute().parent.is_dir():
        raise UserError("--picture", "a file in a directory that exists", repr(path), "")
    _figure_class()


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "--picture", "matplotlib", f"not installed ({error})",
            "Install it: pip install -c constraints.txt -e '.[plots]'.",
        ) from error  # fmt: skip
    return Figure


class _Picture:
    def __init__(self, lanes: Lanes, title: str) -> None:
        self._lanes = lanes
        self._kinds = {kind_of(bar, lane.task) for lane in lanes.lanes for bar in lane.bars}
        height = 0.3 if len(lanes.lanes) <= 16 else 0.22
        rows = self._phase_rows()
        phases = _PHASE_LINE * (1 + max((row for _, row in rows), default=-1)) + 0.04
        entries = len(self._kinds) + any(lane.lost for lane in lanes.lanes)
        entries += any(lane.rebuilt for lane in lanes.lanes)
        legend = _LEGEND_LINE * math.ceil(entries / _LEGEND_COLUMNS) + 0.05
        middle = height * max(2, len(lanes.lanes))
        total = _ABOVE + phases + middle + _BELOW + legend
        self.figure = _figure_class()(figsize=(_WIDTH, total), dpi=110)
        across = (_LEFT / _WIDTH, (_WIDTH - _LEFT - _RIGHT) / _WIDTH)
        low = (_BELOW + legend) / total
        self._axes = self.figure.add_axes((across[0], low, across[1], middle / total))
        high = low + middle / total
        strip = self.figure.add_axes(
            (across[0], high, across[1], phases / total), sharex=self._axes
        )
        span = max(lanes.end - lanes.start, 1e-6)
        self._points = (_WIDTH - _LEFT - _RIGHT) * _POINTS / span
        self._axes.set_xlim(lanes.start, lanes.start + span)
        self._by_height = False
        self._numbers: list[tuple[float, float, str, Kind]] = []
        self._phases(strip, rows)
        self._bars()
        self._frame(title)
        self._legend()

    # Phases

    def _phase_rows(self) -> list[tuple[Stretch, int]]:
        """In which line above the lanes each phase's name has room, if in any."""
        span = max(self._lanes.end - self._lanes.start, 1e-6)
        points = (_WIDTH - _LEFT - _RIGHT) * _POINTS / span
        ends: list[float] = []
        found = []
        for one in self._lanes.stretches:
            at = self._named_at(one, points)
            row = next((n for n, end in enumerate(ends) if end <= at), len(ends))
            if row == _MOST_PHASE_LINES:
                continue
            ends[row : row + 1] = [at + _LETTER * (len(one.phase) + 2)]
            found.append((one, row))
        return found

    def _named_at(self, one: Stretch, points: float) -> float:
        """Points from the left to a phase's name: at its start, or as far right as it has room."""
        at = (max(one.start, self._lanes.start) - self._lanes.start) * points
        room = (_WIDTH - _LEFT - 0.1) * _POINTS - _LETTER * (len(one.phase) + 1)
        return min(at, room)

    def _phases(self, strip: Any, rows: Sequence[tuple[Stretch, int]]) -> None:
        strip.axis("off")
        lines = 1 + max((row for _, row in rows), default=0)
        strip.set_ylim(0, lines)
        for number, one in enumerate(self._lanes.stretches):
            if number % 2 == 0:
                self._axes.axvspan(one.start, one.end, color="#F4F4F4", linewidth=0, zorder=0)
            self._axes.axvline(one.start, color="#888888", linewidth=0.6, zorder=1)
        for one, row in rows:
            at = max(one.start, self._lanes.start)
            named = self._lanes.start + self._named_at(one, self._points) / self._points
            if named >= at:
                strip.plot([at, at], [0, row + 0.9], color="#888888", linewidth=0.6, clip_on=False)
            strip.text(
                named, row + 0.45, f" {one.phase}", fontsize=_FONT, va="center", gid="phase",
                clip_on=False,
            )  # fmt: skip

    # Lanes

    def _bars(self) -> None:
        for y, lane in enumerate(self._lanes.lanes):
            kinds: dict[Kind, list[Bar]] = {}
            for bar in lane.bars:
                kinds.setdefault(kind_of(bar, lane.task), []).append(bar)
            ordered = {kind: kinds[kind] for kind in _ORDER if kind in kinds}
            if self._crowded(lane.bars):
                self._heights(y, lane, ordered)
            else:
                for kind, bars in ordered.items():
                    self._of_a_kind(y, lane, kind, bars)
            self._failures(y, lane)
        if len(self._numbers) <= _MOST_NUMBERS:
            for x, at, text, kind in self._numbers:
                colour = "white" if kind in (TURN, WRITE, DECOMPOSE) else "black"
                self._axes.text(
                    x, at, text, fontsize=5.5, ha="center", va="center", color=colour, zorder=5,
                    clip_on=True, gid="number",
                )  # fmt: skip

    def _of_a_kind(self, y: int, lane: Lane, kind: Kind, bars: Sequence[Bar]) -> None:
        times = [(bar.start, bar.end - bar.start) for bar in bars]
        edges = [kind.colour if self._thin(seconds) else "white" for _, seconds in times]
        widths = [_HAIRLINE if self._thin(seconds) else 0.4 for _, seconds in times]
        self._axes.broken_barh(
            times,
            (y - BAR / 2, BAR),
            facecolors=kind.colour,
            edgecolors=edges,
            linewidths=widths,
            zorder=3,
            gid=f"{lane.name}/{kind.label}",
        )
        for bar in bars:
            text = str(bar.microbatch) if bar.microbatch >= 0 else ""
            visible = self._lanes.start <= (bar.start + bar.end) / 2 <= self._lanes.end
            if text and visible and (bar.end - bar.start) * self._points > 3.4 * len(text) + 2:
                self._numbers.append(((bar.start + bar.end) / 2, y, text, kind))

    def _crowded(self, bars: Sequence[Bar]) -> bool:
        """Whether bars that are no thinner than hairlines would make a lane much fuller."""
        least = 2 * _HAIRLINE / self._points
        full = length(union((bar.start, bar.end) for bar in bars))
        drawn = length(union((bar.start, max(bar.end, bar.start + least)) for bar in bars))
        return drawn - full > _FULLER * (self._lanes.end - self._lanes.start)

    def _heights(self, y: int, lane: Lane, kinds: Mapping[Kind, Sequence[Bar]]) -> None:
        """What a lane's actor did in each moment, as heights one on the other."""
        start, end = self._lanes.start, self._lanes.end
        count = max(1, round((end - start) * self._points / _MOMENT))
        edges = np.linspace(start, end, count + 1)
        low = np.full(count, y + BAR / 2)
        for kind, bars in kinds.items():
            share = _shares(bars, edges)
            # The axis points downwards.
            height = BAR * np.where(share > 0, np.maximum(share, _LEAST), 0.0)
            high = np.maximum(low - height, y - BAR / 2)
            self._axes.stairs(
                high, edges, baseline=low, fill=True, color=kind.colour, linewidth=0, zorder=3,
                gid=f"{lane.name}/{kind.label}",
            )  # fmt: skip
            low = high
        self._by_height = True

    def _thin(self, seconds: float) -> bool:
        return seconds * self._points < 3 * _HAIRLINE

    def _failures(self, y: int, lane: Lane) -> None:
        if lane.rebuilt:
            self._axes.broken_barh(
                [(bar.start, bar.end - bar.start) for bar in lane.rebuilt],
                (y - 0.46, 0.92),
                facecolors=_REBUILT.colour,
                edgecolors=_LOST.colour,
                linewidths=_HAIRLINE,
                hatch="////",
                zorder=2,
                gid=f"{lane.name}/rebuild",
            )
        if lane.lost:
            times = [bar.start for bar in lane.lost]
            self._axes.vlines(times, y - 0.5, y + 0.5, color=_LOST.colour, linewidth=1.5, zorder=6)
            self._axes.plot(times, [y] * len(times), gid=f"{lane.name}/lost", zorder=7, **_cross())

    # Around them

    def _frame(self, title: str) -> None:
        axes, lanes = self._axes, self._lanes.lanes
        axes.set_ylim(max(2, len(lanes)) - 0.5, -0.5)
        axes.set_yticks(range(len(lanes)), [lane.name for lane in lanes], fontsize=_FONT + 1)
        axes.tick_params(axis="x", labelsize=_FONT + 1)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("seconds from the start", fontsize=_FONT + 1)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        for y in range(1, len(lanes)):
            between = lanes[y].task and not lanes[y - 1].task
            colour, width = ("#555555", 0.8) if between else ("#DDDDDD", 0.5)
            axes.axhline(y - 0.5, color=colour, linewidth=width, zorder=1)
        shares = {share.actor: share for share in self._lanes.shares()}
        across = axes.get_yaxis_transform()
        for y, lane in enumerate(lanes):
            if not lane.task:
                axes.text(
                    1.005, y, f"{100 * shares[lane.name].busy:.0f} %", transform=across,
                    fontsize=_FONT + 1, va="center", gid="share",
                )  # fmt: skip
        axes.annotate(
            "busy", (1.005, 0), xycoords="axes fraction", xytext=(0, -2),
            textcoords="offset points", fontsize=_FONT + 1, va="top",
        )  # fmt: skip
        if self._by_height:
            text = "where bars would be too thin, height is the share of time"
            self.figure.text(0.99, 1 - 0.08 / self.figure.get_figheight(), text, fontsize=_FONT + 1,
                             va="top", ha="right")  # fmt: skip
        self.figure.text(0.01, 1 - 0.08 / self.figure.get_figheight(), title, fontsize=10, va="top")

    def _legend(self) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        entries: list[Any] = [
            Patch(facecolor=kind.colour, label=kind.label) for kind in _ORDER if kind in self._kinds
        ]
        if any(lane.lost for lane in self._lanes.lanes):
            entries.append(Line2D([], [], label=_LOST.label, **_cross()))
        if any(lane.rebuilt for lane in self._lanes.lanes):
            entries.append(
                Patch(
                    facecolor=_REBUILT.colour, edgecolor=_LOST.colour, hatch="////",
                    label=_REBUILT.label,
                )
            )  # fmt: skip
        self.figure.legend(
            handles=entries, loc="lower left", ncols=_LEGEND_COLUMNS, fontsize=_FONT + 1,
            frameon=False, borderaxespad=0.2, columnspacing=1.5, handlelength=1.5,
        )  # fmt: skip


def _cross() -> dict[str, Any]:
    return {
        "marker": "X", "markersize": 9, "linestyle": "none", "color": _LOST.colour,
        "markeredgecolor": "white",
    }  # fmt: skip


def _shares(bars: Sequence[Bar], edges: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The share of each moment between two edges that bars fill; bars do not overlap."""
    times = np.array([(bar.start, bar.end) for bar in bars])
    # Seconds filled up to each edge: whole bars before it, and a part of the one that it is in.
    filled = np.concatenate([[0.0], np.cumsum(times[:, 1] - times[:, 0])])
    before = np.searchsorted(times[:, 0], edges, side="right")
    beyond = np.where(before > 0, np.maximum(0.0, times[before - 1, 1] - edges), 0.0)
    return np.diff(filled[before] - beyond) / np.diff(edges)
