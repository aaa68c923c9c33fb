"""What a job works on, where a Python caller holds it in memory instead of naming where it lies."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from torch import nn

from raycurv.data.sources import Source
from raycurv.driver.corpus import Corpus
from raycurv.driver.settings import IN_MEMORY, INPUT, declarations
from raycurv.mathematics.loss.objective import Objective
from raycurv.models.adapter import Adapters
from raycurv.models.model import Model
from raycurv.models.opening import NONE, ModelSource, open_model

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
        objective: its name, or itself.
        fit_objective: for a job that follows a fit, that fit's objective.
    """

    model: ModelSource | None = None
    network: Model | None = None
    data: Source | Corpus | None = None
    queries: Source | None = None
    train: Source | None = None
    objective: str | Objective | None = None
    fit_objective: str | Objective | None = None

    def or_named(self, name: str, settings: Any) -> Any:
        """What is held under a name, else what the settings say."""
        held = getattr(self, name)
        return getattr(settings, name) if held is None else held

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
        source = self.model if self.model is not None else named
        found = open_model(
            source, trust_remote_code=trust_remote_code, ignored=ignored, adapters=adapters
        )
        if tokenizer:
            found.tokenizer_dir = str(Path(tokenizer).absolute())
        return found


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
