"""What a result is, as a notebook shows it: a heading and a small table, without any library."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from raycurv.errors import shortened


def summary_html(what: str, place: str, facts: Mapping[str, object]) -> str:
    """A few facts as HTML; whatever they hold stays text.

    Args:
        what: kind of the result.
        place: its directory.
        facts: by name; those of no text are left out.
    """
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th>"
        f"<td style='text-align:left'>{escape(shortened(str(value), 200))}</td></tr>"
        for name, value in facts.items()
        if str(value)
    )
    head = f"<b>raycurv {escape(what)}</b> <code>{escape(shortened(place, 200))}</code>"
    return f"<div>{head}<table>{rows}</table></div>"
