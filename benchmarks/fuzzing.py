"""What all fuzzing of files does alike: numbered cases, and how each of them ended."""

from __future__ import annotations

import resource
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from raycurv.errors import DamagedFile, UserError

# What a job ends by with exit code 2, if a file is at fault.
TOLD = (UserError, DamagedFile)
MOST_CHARACTERS = 4000


@dataclass
class Outcome:
    """How cases ended.

    Attributes:
        ends: how many ended how: as the case says, or by the name of the error that was told.
        faults: number of the case -> traceback of what must not be raised.
        slowest: seconds of the slowest case, and its number.
        memory: bytes of the largest resident memory of this process.
    """

    ends: Counter[str] = field(default_factory=Counter)
    faults: dict[int, str] = field(default_factory=dict)
    slowest: tuple[float, int] = (0.0, -1)
    memory: int = 0

    def joined(self, other: Outcome) -> Outcome:
        """Of the cases of both."""
        return Outcome(
            self.ends + other.ends,
            self.faults | other.faults,
            max(self.slowest, other.slowest),
            max(self.memory, other.memory),
        )


def tried(case: Callable[[int], str], numbers: Iterable[int]) -> Outcome:
    """Run cases by their numbers.

    Args:
        case: changes a file as its number says, reads it, and gives how that ended. A mistake that
            is told in four parts is an end as well; whatever else it raises is a fault.
    """
    outcome = Outcome()
    for number in numbers:
        began = time.monotonic()
        try:
            ended = case(number)
        except TOLD as error:
            ended = type(error).__name__
            parts = (error.where, error.expected, error.got, error.remedy)
            if not all(parts) or len(str(error)) > MOST_CHARACTERS:
                outcome.faults[number] = f"a message without its parts, or too long: {parts!r:.600}"
        except Exception:
            ended = "fault"
            outcome.faults[number] = traceback.format_exc()
        outcome.ends[ended] += 1
        outcome.slowest = max(outcome.slowest, (time.monotonic() - began, number))
    outcome.memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return outcome
