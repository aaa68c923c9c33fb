"""What a job bears: which failures it survives, and how many."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from raycurv.errors import RaycurvError

# So often may an actor die of the same operation on the same microbatch before that is taken for
# the cause.
_SAME = 3
# What a task does.
RUN = "run"
# That a process may take to start, on a machine that is busy or a disk that is far away.
_START_SECONDS = 120.0


@dataclass(frozen=True)
class Limits:
    """How long and how often.

    Attributes:
        failures: of actors and tasks in a whole run.
        actor_failures: of one actor.
        hang_seconds: without any progress, after which an actor counts as hung.
        place_seconds: for room in the cluster.
    """

    failures: int = 20
    actor_failures: int = 5
    hang_seconds: float = 1800.0
    place_seconds: float = 300.0

    @property
    def start_seconds(self) -> float:
        """For a process to start and import what it needs, and then to hang."""
        return _START_SECONDS + self.hang_seconds


@dataclass
class Failures:
    """Counts failures against the limits."""

    limits: Limits
    total: int = 0
    _by_actor: Counter[str] = field(default_factory=Counter)
    _by_operation: Counter[tuple[str, str, int]] = field(default_factory=Counter)

    def count(self, actor: str, operation: str, microbatch: int, cause: str) -> None:
        """An actor, or a task, was lost at an operation, of a microbatch or -1; RaycurvError if it
        is one too many."""
        self.total += 1
        self._by_actor[actor] += 1
        self._by_operation[actor, operation, microbatch] += 1
        at = f"{operation} of microbatch {microbatch}" if microbatch >= 0 else operation
        again = "what was committed is kept, and the same command goes on from there."
        # A call about no microbatch may meet three losses by chance: there the actor's limit holds.
        causes = microbatch >= 0 or operation == RUN
        if causes and self._by_operation[actor, operation, microbatch] >= _SAME:
            raise RaycurvError(
                f"{actor}, {at}", f"to end, in {_SAME} attempts", f"the actor was lost: {cause}",
                "If memory ran out, use more --stages or fewer --batch-tokens (`jobs/plan.py` says "
                f"what is needed); {again}",
            )  # fmt: skip
        for what, found, limit, flag in (
            (actor, self._by_actor[actor], self.limits.actor_failures, "--max-actor-failures"),
            ("the run", self.total, self.limits.failures, "--max-failures"),
        ):
            if found > limit:
                raise RaycurvError(
                    what, f"at most {limit} failures ({flag})",
                    f"{found}; the last at {at}: {cause}",
                    f"Look for the cause, or give a larger {flag}; {again}",
                )  # fmt: skip
