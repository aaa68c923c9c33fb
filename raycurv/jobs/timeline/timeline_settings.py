"""Settings of showing a timeline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import tyro

from raycurv.driver.settings import Names, Place, Required, bounded, check_fields
from raycurv.errors import UserError

Second = Annotated[float, bounded("a number of seconds", math.isfinite)]


@dataclass(frozen=True)
class TimelineSettings:
    """What the actors of a run did, and when: how busy each was, with each operation as a trace."""

    run: Required[Place] = ""
    """Directory of a fit or a scoring, finished or under way."""
    trace: Place | None = None
    """Where every operation goes, a .json or .json.gz that ui.perfetto.dev and chrome://tracing
    open."""
    picture: Place | None = None
    """Where a small picture goes, a .png or .svg: an actor a lane, an operation a bar, waiting
    empty. Takes matplotlib (`pip install -e '.[plots]'`)."""
    phase: Names = ()
    """Show this phase alone; repeatable. Default: all phases."""
    start: Annotated[Second | None, tyro.conf.arg(name="from")] = None
    """Show what happened from this second on, counted from the first operation."""
    to: Second | None = None
    """Show what happened until this second."""

    def check(self) -> None:
        """Refuse what cannot work, with a UserError that names the flag."""
        check_fields(self)
        if self.start is not None and self.to is not None and self.start >= self.to:
            raise UserError("--from", f"before --to {self.to:g}", f"{self.start:g}", "")
