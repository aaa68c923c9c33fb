"""A small picture of a timeline: a lane an actor, a bar an operation, waiting is empty."""

from __future__ import annotations

from typing import Any

from raycurv.errors import UserError
from raycurv.jobs.timeline.lanes import Lane, Lanes
from raycurv.progress.streams import printable
from raycurv.stages.spans import Span

# The colours of operations by their names in the legend, to be told apart by the colour-blind too
# (Okabe and Ito 2008).
FORWARD, TURN, BACKWARD, RESULTS = "forward", "turn (last stage)", "backward", "results"
DECOMPOSE = "eigendecomposition"
_COLOURS = {
    FORWARD: "#56B4E9", TURN: "#0072B2", BACKWARD: "#E69F00", "load": "#8A8A8A",
    "commit": "#CC79A7", RESULTS: "#7A5195", "other calls": "#C8C8C8", DECOMPOSE: "#009E73",
    "other tasks": "#A6D96A", "lost": "#D62728", "rebuild": "#D62728",
}  # fmt: skip
_LABELS = {
    "forward": FORWARD, "turn": TURN, "backward": BACKWARD, "load": "load", "commit": "commit",
    "result": RESULTS, "joined": RESULTS, "write": RESULTS, "decompose_factors": DECOMPOSE,
    "decompose_factor": DECOMPOSE,  # of earlier versions
}  # fmt: skip
# Inches: the picture's width, what is free around the lanes, and a lane. Points: of the font, and
# of the thinnest lone bar.
_WIDTH, _LEFT, _RIGHT, _BELOW, _ABOVE, _LANE = 11.0, 1.35, 0.55, 0.95, 0.8, 0.28
_FONT, _HAIRLINE = 7.5, 0.8


def save_picture(lanes: Lanes, title: str, path: str) -> None:
    """Write the picture, as .png or .svg; the same timeline gives the same bytes."""
    from matplotlib import rc_context

    date = {"Date": None} if path.endswith(".svg") else {}
    plain = {"svg.fonttype": "none", "svg.hashsalt": "raycurv", "text.parse_math": False}
    with rc_context(plain):
        draw(lanes, printable(title)).savefig(path, metadata=date)


def figure_class() -> Any:
    """``matplotlib.figure.Figure``; a UserError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "--picture", "matplotlib", f"not installed ({error})",
            "Install it: pip install -c constraints.txt -e '.[plots]'.",
        ) from error  # fmt: skip
    return Figure


def draw(lanes: Lanes, title: str) -> Any:
    """The picture, a ``matplotlib.figure.Figure``.

    The bars of a kind in a lane are one artist whose gid is ``LANE/LABEL``; those of losses and of
    rebuilding are ``LANE/lost`` and ``LANE/rebuild``.
    """
    count = max(2, len(lanes.lanes))
    height = _BELOW + _ABOVE + _LANE * count
    figure = figure_class()(figsize=(_WIDTH, height), dpi=110, facecolor="white")
    middle = ((_WIDTH - _LEFT - _RIGHT) / _WIDTH, _LANE * count / height)
    axes = figure.add_axes((_LEFT / _WIDTH, _BELOW / height, *middle))
    axes.set(xlim=(lanes.start, max(lanes.end, lanes.start + 1e-6)), ylim=(count - 0.5, -0.5))
    axes.set_yticks(range(len(lanes.lanes)), [lane.name for lane in lanes.lanes])
    axes.tick_params(labelsize=_FONT, left=False)
    axes.set_xlabel("seconds from the start", fontsize=_FONT)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.text(0.01, 1 - 0.08 / height, title, fontsize=10, va="top")
    for number, (phase, times) in enumerate(lanes.phases.items()):
        axes.vlines(
            [start for start, _ in times], -0.5, count - 0.5, color="#999999", linewidth=0.6
        )
        # On three lines by turns, since phases may follow each other closely.
        y = -0.65 - 0.5 * (number % 3)
        axes.text(times[0][0], y, f" {phase}", fontsize=_FONT, gid="phase")
    shown: dict[str, Any] = {}
    shares = {share.actor: share.busy for share in lanes.shares()}
    for y, lane in enumerate(lanes.lanes):
        shown |= _draw_lane(axes, y, lane)
        if not lane.task:
            text = f" {100 * shares[lane.name]:.0f} %"
            axes.text(axes.get_xlim()[1], y, text, fontsize=_FONT, va="center", gid="share")
    labels = [label for label in _COLOURS if label in shown]
    figure.legend(
        [shown[label] for label in labels], labels, loc="lower left", ncols=6, fontsize=_FONT,
        frameon=False,
    )  # fmt: skip
    return figure


def _draw_lane(axes: Any, y: int, lane: Lane) -> dict[str, Any]:
    """Draw what an actor did; gives an artist of each label, for the legend."""
    start, end = axes.get_xlim()
    hairline = _HAIRLINE * (end - start) / (72 * (_WIDTH - _LEFT - _RIGHT))
    # Many hairlines would fill a lane that is mostly empty: without them, its shade says how busy.
    thin = sum(span.end - span.start < hairline for span in lane.work)
    width = _HAIRLINE if thin * hairline < 0.05 * (end - start) else 0.0
    other = "other tasks" if lane.task else "other calls"
    kinds: dict[str, list[Span]] = {}
    for span in (*lane.work, *lane.failures):
        label = span.operation if span.failure else _LABELS.get(span.operation, other)
        kinds.setdefault(label, []).append(span)
    shown = {}
    for label, spans in kinds.items():
        colour, gid = _COLOURS[label], f"{lane.name}/{label}"
        if label == "lost":
            times = [span.start for span in spans]
            (shown[label],) = axes.plot(
                times, [y] * len(times), "X", color=colour, markersize=9, markeredgecolor="white",
                gid=gid, zorder=4,
            )  # fmt: skip
            continue
        hatched = label == "rebuild"
        # Bars that follow each other closely are told apart by white edges, if they are wide.
        wide = [span.end - span.start > 3 * hairline and not hatched for span in spans]
        edges = ["white" if one else colour for one in wide]
        shown[label] = axes.broken_barh(
            [(span.start, span.end - span.start) for span in spans], (y - 0.36, 0.72),
            facecolor="none" if hatched else colour, hatch="////" if hatched else None,
            edgecolor=edges, linewidth=width, snap=False, gid=gid, zorder=2 if hatched else 3,
        )  # fmt: skip
    return shown
