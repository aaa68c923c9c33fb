"""Settings, outcomes and numbers in the words of a page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from raycurv.mathematics.curvature import Damping

_METHODS = {
    "ekfac": ("EK-FAC", "eigenbases of the factors A and G, eigenvalues Λ corrected in them"),
    "kfac": ("K-FAC", "products of the eigenvalues of the factors A and G"),
    "diagonal": ("diagonal", "the mean squared gradient of every weight"),
    "identity": ("identity", "no curvature: scores are dot products of gradients"),
    "mfac": ("M-FAC", "the Fisher of {rows} gradients, across blocks"),
}
_OUTCOMES = {
    "ok": "at the first attempt",
    "jittered": "decomposed only after a small multiple of the identity was added",
    "cpu": "decomposed on the CPU, after the GPU had failed",
    "clamped": "{count} eigenvalues below zero by more than rounding were set to zero",
    "zero": "no gradient reached it: its IHVPs are zero",
}
_MINUS, _TIMES, _DASH = "\u2212", "\u00d7", "\u2013"
_POWERS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Control characters have pictures of their own, one for each: what stands in a text is seen.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_VISIBLE |= {0x7F: 0x2421} | {code: 0xFFFD for code in range(0x80, 0xA0)}


def number(value: float | None, signed: bool = False) -> str:
    """Three significant digits: ``0.0123``, ``4,560``, ``2.86×10⁵``; a dash for none."""
    if value is None:
        return _DASH
    if value == 0 or not math.isfinite(value):
        return f"{value or 0:g}"
    sign = _MINUS if value < 0 else "+" if signed else ""
    digits, _, power = f"{abs(value):.2e}".partition("e")
    exponent = int(power)
    if -4 < exponent < 4:
        shown = round(abs(value), 2 - exponent)
        text = f"{shown:,.{max(0, 2 - exponent)}f}"
        return sign + (text.rstrip("0").rstrip(".") if "." in text and exponent > 1 else text)
    return f"{sign}{digits}{_TIMES}10{str(exponent).translate(_POWERS)}"


def short(value: float) -> str:
    """A round number: ``0.01``, ``500``, ``10⁻⁶``."""
    if 0.9e-3 < value < 1e4:
        return f"{value:g}"
    return number(value).removeprefix(f"1.00{_TIMES}")


def percent(share: float) -> str:
    """A share as percent, of two digits at least where there are any."""
    return f"{share:.1%}" if share >= 0.001 or share == 0 else "< 0.1%"


def duration(seconds: float) -> str:
    """``< 0.01 s``, ``12.3 s``, ``4 min 05 s``, ``2 h 03 min``."""
    if seconds < 0.01:
        return "< 0.01 s" if seconds else "0 s"
    if seconds < 60:
        return f"{number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def visible(text: str) -> str:
    """A text of the same length whose control characters are seen, but for tabs and ends of
    lines."""
    return text.translate(_VISIBLE)


def method(settings: Mapping[str, Any]) -> tuple[str, str]:
    """How a fit approximates the curvature: in a word, and what that is."""
    name, what = _METHODS[settings["method"]]
    return name, what.format(rows=settings.get("rows"))


def labels(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Whose labels a fit's gradients have, or what is in their place, and what that makes of it."""
    if settings["fisher"] == "empirical":
        return "the data's own", "the empirical Fisher"
    draws = settings["draws"]
    times = "once" if draws == 1 else f"{draws} times"
    what = "random signs" if settings["fisher"] == "signs" else "drawn from the model"
    return what, f"{times} for each target: the Fisher"


def damping(text: str, chosen: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, str]:
    """What is added to eigenvalues before they are inverted, and what it was chosen by, if it
    was."""
    found = Damping.parse(text)
    why = f", by {chosen.get('why', '')}" if chosen else ""
    if found.value == 0:
        return "none", "eigenvalues are inverted as they are"
    if found.absolute:
        shown = number(found.value) if chosen else short(found.value)
        return shown, f"is added to the eigenvalues of every block{why}"
    return f"{found.value:g} {_TIMES} mean Λ", f"of each block is added to its eigenvalues{why}"


def solver(settings: Mapping[str, Any]) -> tuple[str, str]:
    """How IHVPs were made that are not of the fit's curvature alone."""
    matrices = {"ggn": "Gauss-Newton matrix", "hessian": "Hessian", "fisher": "Fisher"}
    of = "the whole model" if settings["coupling"] == "model" else "each block alone"
    way = "conjugate gradients" if settings["solver"] == "cg" else "descent on minibatches"
    steps = f"at most {settings['steps']} steps of {way}"
    return settings["solver"], f"{steps} with the {matrices[settings['matrix']]} of {of}"


def rank(text: str) -> tuple[str, str]:
    """How far the IHVPs of queries are truncated."""
    return (text, "nothing is truncated") if text == "full" else (text, "of each query and block")


def outcome(text: str) -> str:
    """How the eigendecompositions of a block ended, from ``tables/blocks``."""
    said = []
    for part in text.split("+"):
        name, _, count = part.partition(" ")
        said.append(_OUTCOMES.get(name, part).format(count=count))
    return "; ".join(said)
