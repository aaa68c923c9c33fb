"""Stages and tasks, wherever they run: the face that the driver sees, and the one without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from raycurv.stages.memory import give_back
from raycurv.stages.stage import Stage, StageSpec


class Pool(Protocol):
    """Holds the stages of a chain and runs tasks beside them.

    Results are handles; a handle may be given to any later call, and is opened with :meth:`get`.
    """

    @property
    def stages(self) -> int:
        """How many stages there are."""
        ...

    def start(self, specs: Sequence[StageSpec]) -> None:
        """Build the stages, in place of those that were there.

        Raises:
            UserError: a stage cannot load its weights.
        """
        ...

    def call(self, stage: int, method: str, *args: Any, returns: int = 1) -> Any:
        """Call a stage's method; gives one handle, or a tuple of ``returns``."""
        ...

    def put(self, value: Any) -> Any:
        """A handle of a value that many calls take."""
        ...

    def get(self, handle: Any) -> Any:
        """The value of a handle; raises what the call raised."""
        ...

    def map(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, Any]]:
        """Run a function on each tuple of arguments, in the order given; yields (place, result) as
        they end."""
        ...

    def stop(self) -> None:
        """Let the stages go."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class InProcess:
    """Everything in this process, one call after the other: for debugging, and as an oracle."""

    def __init__(self) -> None:
        self._stages: list[Stage] = []

    @property
    def stages(self) -> int:
        return len(self._stages)

    def start(self, specs: Sequence[StageSpec]) -> None:
        self.stop()
        self._stages = [Stage(spec) for spec in specs]

    def call(self, stage: int, method: str, *args: Any, returns: int = 1) -> Any:
        return getattr(self._stages[stage], method)(*args)

    def put(self, value: Any) -> Any:
        return value

    def get(self, handle: Any) -> Any:
        return handle

    def map(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, Any]]:
        for i, args in enumerate(arguments):
            yield i, function(*args)

    def stop(self) -> None:
        if self._stages:
            self._stages = []
            give_back()

    def close(self) -> None:
        self.stop()
