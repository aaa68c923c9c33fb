"""What raycurv needs of other packages, as its metadata declares it, and what of that is there.

At its top is Python's own library alone: this tells a person what is missing when all else fails.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

from raycurv.errors import RaycurvError, UserError, in_words

# Extras that jobs may ask for, and what each is for.
PURPOSES = {
    "adapters": "models with adapters (LoRA)",
    "candidates": "influence --candidates bm25:K",
    "hub": "data by name from the hub, and what `datasets` has saved",
    "images": "data of image files",
    "plots": "timeline --picture",
    "report": "the report",
}
# Where a package is imported by another name than it is installed by.
_MODULES = {"pillow": "PIL"}


@dataclass(frozen=True)
class Requirement:
    """One package that raycurv needs, or that an extra of it brings.

    Attributes:
        text: as declared: ``torch>=2.4``.
        extra: which brings it; empty for what every job needs.
        version: that is installed; empty if none is.
        problem: why it cannot be used; empty if it can.
    """

    text: str
    extra: str = ""
    version: str = ""
    problem: str = ""

    def as_error(self) -> UserError:
        """The problem, with what to do about it."""
        what = f"raycurv[{self.extra}]" if self.extra else self.text
        return UserError(
            self.text, "installed, and importable", self.problem, f"pip install --upgrade '{what}'"
        )


def requirements() -> Iterator[Requirement]:
    """All that raycurv declares, each imported to see whether that works: first what every job
    needs, then the extras of :data:`PURPOSES`.

    Raises:
        UserError: raycurv is not installed, or its metadata is that of an older one.
    """
    try:
        of = metadata.metadata("raycurv")
    except metadata.PackageNotFoundError:
        raise _unknown("no metadata: raycurv is imported from where its sources lie") from None
    extras = of.get_all("Provides-Extra") or []
    if not PURPOSES.keys() <= set(extras):
        raise _unknown(f"the metadata of an older raycurv ({of['Version']})")
    try:
        from packaging.requirements import Requirement as Declared
        from packaging.specifiers import SpecifierSet
    except ImportError as error:
        yield Requirement("packaging", problem=f"not installed ({in_words(error)})")
        return
    running = platform.python_version()
    wanted = SpecifierSet(of["Requires-Python"])
    problem = "" if wanted.contains(running, prereleases=True) else f"Python {running} runs it"
    yield Requirement(f"Python{wanted}", version=running, problem=problem)
    declared = [Declared(line) for line in of.get_all("Requires-Dist") or ()]
    for extra in ("", *PURPOSES):
        for one in declared:
            # What has no marker holds with every extra, and is said once.
            if (not extra) if one.marker is None else one.marker.evaluate({"extra": extra}):
                yield _looked_at(one, extra)


def missing() -> list[Requirement]:
    """What every job needs and cannot have."""
    return [one for one in requirements() if one.problem and not one.extra]


def together(problems: Sequence[UserError]) -> UserError:
    """Several problems as one, which names each."""
    if len(problems) == 1:
        return problems[0]
    return UserError(
        "; ".join(one.where for one in problems),
        "; ".join(dict.fromkeys(one.expected for one in problems)),
        "; ".join(f"{one.where}: {one.got}" for one in problems),
        "; ".join(dict.fromkeys(one.remedy for one in problems)),
    )


def explained(error: BaseException) -> BaseException:
    """What keeps a job from being imported: what is missing, if that is why; else the same."""
    if isinstance(error, RaycurvError) or not isinstance(error, Exception):
        return error
    try:
        found = [one.as_error() for one in missing()]
    except UserError:
        return error
    return together(found) if found else error


def _looked_at(declared: Any, extra: str) -> Requirement:
    """A requirement as `packaging` reads it, and what is there of it."""
    text = f"{declared.name}{declared.specifier}"
    try:
        version = metadata.version(declared.name)
    except metadata.PackageNotFoundError:
        return Requirement(text, extra, problem="not installed")
    if not declared.specifier.contains(version, prereleases=True):
        return Requirement(text, extra, version, f"{version} is installed")
    try:
        import_module(_MODULES.get(declared.name.lower(), declared.name))
    except Exception as error:  # whatever a broken library may raise
        return Requirement(text, extra, version, f"{version} cannot be imported: {in_words(error)}")
    return Requirement(text, extra, version)


def _unknown(got: str) -> UserError:
    return UserError(
        "raycurv's requirements", "the metadata of this raycurv", got,
        "Install it (in a checkout: pip install -e .); until then no versions are compared.",
    )  # fmt: skip
