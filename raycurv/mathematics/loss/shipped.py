"""The objectives that come with raycurv, by name, and opening one of these or of the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

from torch import Tensor

from raycurv.batch import Batch, shown_ids
from raycurv.errors import UserError, users_code
from raycurv.mathematics.loss.multi_label import MultiLabel
from raycurv.mathematics.loss.objective import (
    CausalLM,
    Classification,
    Judging,
    MaskedLM,
    Objective,
    Reads,
    Regression,
    Seq2SeqLM,
    Signed,
    TokenClassification,
)
from raycurv.mathematics.loss.preference import Preference
from raycurv.named_objects import import_named, is_named_object

# Columns of the data that every microbatch has, and what it calls them.
BATCHED = {
    "id": "ids", "input_ids": "inputs", "inputs": "inputs", "labels": "labels",
    "loss_mask": "loss_mask",
}  # fmt: skip

_SHIPPED: dict[str, Callable[[], Objective]] = {
    "causal-lm": CausalLM,
    "classification": Classification,
    "regression": Regression,
    "multi-label": MultiLabel,
    "token-classification": TokenClassification,
    "masked-lm": MaskedLM,
    "seq2seq-lm": Seq2SeqLM,
    "preference": Preference,
}


def is_ours(objective: Objective) -> bool:
    """Whether an objective is one that comes with raycurv."""
    return type(objective) in _SHIPPED.values()


def shipped_name(objective: str | Objective) -> str | None:
    """The name of an objective that comes with raycurv, given by it or itself; ``None`` for the
    user's own."""
    if isinstance(objective, str):
        return objective if objective in _SHIPPED else None
    return next((name for name, kind in _SHIPPED.items() if type(objective) is kind), None)


def is_shipped(name: str) -> bool:
    """Whether an objective of that name comes with raycurv, so that naming it imports nothing."""
    return name in _SHIPPED


def open_objective(name: str | Objective, folder: str | None = None) -> Objective:
    """The objective of that name: one that ships with raycurv, or ``package.module:Name``, looked
    for in ``folder``, too (the working directory when ``None``);
    UserError if there is none, it cannot be imported, or it lacks loss or sample."""
    named, own = _found(name, folder)
    missing = [method for method in ("loss", "sample") if not hasattr(own, method)]
    if missing:
        raise UserError(
            f"--objective {named}",
            "an object with the methods loss and sample",
            f"no {' and no '.join(missing)}",
            "See raycurv.Objective for what each takes and gives.",
        )
    return _complete(named, own)


def open_measurement(name: str | Objective, folder: str | None = None) -> Objective:
    """The objective whose measurement queries are measured by, looked for as by
    :func:`open_objective`; only that may be asked of it.
    UserError if there is none, it cannot be imported, or it has neither measurement nor loss."""
    named, own = _found(name, folder)
    if not (hasattr(own, "measurement") or hasattr(own, "loss")):
        raise UserError(
            f"--objective {named}",
            "an object with the method measurement, for the queries",
            "no measurement, and no loss that could stand for it",
            "See raycurv.Objective for what it takes and gives.",
        )
    return _complete(named, own)


def _found(name: str | Objective, folder: str | None) -> tuple[str, Any]:
    """An objective as its author made it, and what messages call it."""
    if isinstance(name, type):
        raise UserError(
            "--objective",
            "an object",
            f"the class {name.__name__}",
            f"Give {name.__name__}().",
        )
    if not isinstance(name, str):
        return type(name).__name__, name
    if name in _SHIPPED:
        return name, _SHIPPED[name]()
    if not is_named_object(name):
        raise UserError(
            "--objective",
            ", ".join(_SHIPPED) + " or package.module:Name",
            repr(name),
            "Name an objective that ships with raycurv, or your own as package.module:Name.",
        )
    try:
        found = import_named(name, folder)
        made = found() if isinstance(found, type) else found
    except Exception as error:  # the user's module raises whatever it does
        raise UserError(
            f"--objective {name}",
            "an importable class or instance",
            f"{type(error).__name__}: {error}",
            "Check the spelling, and that the module is on the Python path of every worker.",
        ) from error
    return name, made


def _complete(name: str, own: Any) -> Objective:
    """An objective with the defaults for what its author left out."""
    columns = getattr(own, "columns", ())
    if isinstance(columns, str) or not all(isinstance(column, str) for column in columns):
        raise UserError(
            f"--objective {name}", "columns: a tuple of names", repr(columns),
            f"Give ({columns!r},)." if isinstance(columns, str) else "Give their names.",
        )  # fmt: skip
    for attribute, value, known in (
        ("shift", getattr(own, "shift", 1), (0, 1)),
        ("reads", getattr(own, "reads", "texts"), get_args(Reads)),
    ):
        if value not in known:
            raise UserError(
                f"--objective {name}", f"{attribute} as one of {', '.join(map(str, known))}",
                repr(value), "See raycurv.Objective for what each means.",
            )  # fmt: skip
    taken = [column for column in columns if column in BATCHED]
    if taken:
        raise UserError(
            f"--objective {name}", "columns beside those that every microbatch has",
            f"{taken[0]!r}", f"Leave it out: batch.{BATCHED[taken[0]]} is it.",
        )  # fmt: skip
    return own if type(own) in _SHIPPED.values() else _Completed(name, own)


class _Completed:
    """An objective of the user's, with the defaults for what it leaves out.

    What its methods raise is told as a mistake, with their own words and what they were given.
    """

    def __init__(self, name: str, own: Any) -> None:
        self.per_token: bool = getattr(own, "per_token", False)
        self.shift: int = getattr(own, "shift", 1)
        self.reads: Reads = getattr(own, "reads", "texts")
        self.causal: bool = getattr(own, "causal", False)
        self.columns: tuple[str, ...] = tuple(getattr(own, "columns", ()))

        def method(called: str) -> Callable[..., Tensor]:
            found = getattr(own, called, None)
            return _not_asked_for if found is None else _telling(f"{name}, {called}", found)

        self.loss, self.sample = method("loss"), method("sample")
        self.measurement = method("measurement") if hasattr(own, "measurement") else self.loss
        if isinstance(own, Judging):
            self.correct = method("correct")
        if isinstance(own, Signed) and _is_of_its_own(type(own), "signed", ("loss", "sample")):
            self.signed = method("signed")


def _is_of_its_own(kind: type, method: str, others: Sequence[str]) -> bool:
    """Whether a class has a method from no base of which it replaces one of the other methods."""

    def place(name: str) -> int:
        return next((n for n, base in enumerate(kind.__mro__) if name in vars(base)), -1)

    return place(method) <= min(map(place, others))


def _telling(name: str, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A method of an objective whose failures name it."""

    def call(outputs: Tensor, batch: Batch, *rest: Any) -> Tensor:
        labels = batch.labels
        given = f"outputs {list(outputs.shape)} and "
        given += "no labels" if labels is None else f"labels {list(labels.shape)}"
        with users_code(
            f"--objective {name}",
            f"a tensor for {given} of the examples {shown_ids(batch.ids)}",
            "Correct the method, or the labels of the data.",
        ):
            return method(outputs, batch, *rest)

    return call


def _not_asked_for(*_: Any) -> Tensor:
    raise AssertionError("only the measurement of this objective may be asked for")
