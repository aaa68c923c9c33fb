"""What a job works on, where a Python caller holds it in memory instead of naming where it lies."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from torch import nn

from raycurv.data.objects import settled
from raycurv.data.sources import Source
from raycurv.driver.corpus import Corpus
from raycurv.driver.settings import IN_MEMORY, INPUT, declarations
from raycurv.hub import Snapshot
from raycurv.mathematics.loss.objective import Objective
from raycurv.models.adapter import Adapters
from raycurv.models.model import Model
from raycurv.models.opening import NONE, ModelSource, open_directory, open_model

S = TypeVar("S")
# Settings that name an objective, which may be given itself.
_OBJECTIVES = ("objective", "fit_objective")
# What Python functions take as a model: a path, a name, or a callable that makes the module.
AnyModel: TypeAlias = "str | os.PathLike[str] | Callable[[], nn.Module]"
AnySource: TypeAlias = "Source | os.PathLike[str]"


@dataclass(frozen=True)
class Inputs:
    """What is held in memory, each instead of what the setting of its name says.

    Attributes:
        model: a callable that makes the module; for a job that follows a fit, that fit's.
        network: a model that is described already, a patched one say; instead of ``model``.
        data: a table or rows; or examples that are stored already.
        queries: a table or rows.
        train: a table or rows.
        direction: a callable that makes the model behind a step.
        candidates: a table or rows of pairs of a query and a training example.
        removals: a table or rows of what retraining without some examples did.
        objective: its name, or itself.
        fit_objective: for a job that follows a fit, that fit's objective.
        snapshots: what settings name of the hub, at its commit: where it lies on this machine.
        files: of data that a setting names on the hub, by the setting: those of one split.
        commits: of each name without one, by its flag, which commit it is.
    """

    model: ModelSource | None = None
    network: Model | None = None
    data: Source | Corpus | None = None
    queries: Source | None = None
    train: Source | None = None
    direction: ModelSource | None = None
    candidates: Source | None = None
    removals: Source | None = None
    objective: str | Objective | None = None
    fit_objective: str | Objective | None = None
    snapshots: Mapping[str, Snapshot] = field(default_factory=dict)
    files: Mapping[str, Snapshot] = field(default_factory=dict)
    commits: Mapping[str, str] = field(default_factory=dict)

    def or_named(self, name: str, settings: Any) -> Any:
        """What is held under a name, else what the settings say, where it lies."""
        held = getattr(self, name)
        there = self.files.get(name, getattr(settings, name))
        return self.at(there) if held is None else held

    def at(self, named: Any) -> Any:
        """Where a path, or a name of the hub, lies on this machine."""
        snapshot = self.snapshots.get(named) if isinstance(named, str) else None
        return named if snapshot is None else str(snapshot.directory)

    def source(self, name: str, settings: Any) -> Any:
        """As :meth:`or_named`, of data: what the settings take of it."""
        found = self.or_named(name, settings)
        return found if isinstance(found, Corpus) else settled(settings.select(name, found))

    def open_model(
        self,
        named: str,
        trust_remote_code: bool,
        ignored: Sequence[str] = (),
        adapters: Adapters = NONE,
        tokenizer: str = "",
    ) -> Model:
        """The model that is held, else the one of a path or name; see :func:`open_model`. Texts go
        through the ``tokenizer`` in a directory, where one is given."""
        if self.network is not None:
            return self.network
        source = self.model if self.model is not None else self.at(named)
        found = open_model(
            source, trust_remote_code=trust_remote_code, ignored=ignored,
            adapters=self.placed(adapters),
        )  # fmt: skip
        if tokenizer:
            found.tokenizer_dir = str(Path(self.at(tokenizer)).absolute())
        return self._travelling(found, named, adapters)

    def open_recorded(self, named: str, ignored: Sequence[str], adapters: Adapters) -> Model:
        """As :meth:`open_model`, of what a run directory names: nothing is imported."""
        place = Path(self.at(named))
        found = open_directory(place, ignored=ignored, adapters=self.placed(adapters))
        return self._travelling(found, named, adapters)

    def placed(self, adapters: Adapters) -> Adapters:
        """The same, where they lie."""
        return replace(adapters, directories=tuple(map(self.at, adapters.directories)))

    def _travelling(self, model: Model, named: str, adapters: Adapters) -> Model:
        """The model, which brings its files along from the hub."""
        names = [name for name in (named, *adapters.directories) if name in self.snapshots]
        model.snapshots = tuple(self.snapshots[name] for name in names)
        if named in names:
            model.name = named
        return model


def settings_and_inputs(kind: type[S], given: Mapping[str, Any]) -> tuple[S, Inputs]:
    """What a Python caller gave for the fields of settings, as settings and what is in memory.

    Paths become text, and so do numbers where the setting is text (a rank, say); numbers of numpy
    become Python's. An input that is
    neither path nor name is kept apart, and the settings say that it is in memory.

    Args:
        kind: the dataclass of settings.
        given: a value for each name; ``None`` for an input that there is not.

    Raises:
        TypeError: there is no setting of a name.
    """
    declared = {name: (kinds, marks) for name, kinds, marks in declarations(kind)}
    said: dict[str, Any] = {}
    held: dict[str, Any] = {}
    for name, value in given.items():
        kinds, marks = declared.get(name, ((), ()))
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif isinstance(value, np.generic):
            value = value.item()
        if value is None and INPUT in marks:
            value = ""
        elif not isinstance(value, str) and (INPUT in marks or (name in _OBJECTIVES and value)):
            held[name] = value
            value = IN_MEMORY if INPUT in marks else type(value).__name__
        elif str in kinds and value is not None:
            value = str(value)
        elif isinstance(value, Iterable) and not isinstance(value, str):
            value = tuple(map(os.fspath, value))
        said[name] = value
    return kind(**said), Inputs(**held)
