"""Objectives: what is differentiated, and how labels are drawn from the model's own distribution.

Every method is summed over an example's tokens, never averaged, and returns one number an example.

Axis letters: N examples, T positions, V classes, D outputs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.mathematics.loss.draws import draw_categorical

Uniform = Callable[[int], Tensor]


@runtime_checkable
class Objective(Protocol):
    """What is differentiated: a loss, a way to draw labels from the model, and a measurement.

    An object of your own needs no base class. A fit takes ``loss`` and ``sample``; the queries of a
    scoring take ``measurement``, or where there is none ``loss``. For example, how much more likely
    the right answer is than the wrong one, behind the last token of a prompt::

        class LogitDifference:
            per_token = True
            columns = ("right", "wrong")        # token ids, columns of the queries' data

            def measurement(self, outputs, batch):
                logits, here = batch.at_last(outputs)          # [N, V], [N]
                n = torch.arange(batch.size)
                right, wrong = batch.columns["right"], batch.columns["wrong"]
                return torch.where(here, logits[n, right] - logits[n, wrong], 0.0)

    Every method gives one number for each example, ``[N]``, summed over its tokens and never
    averaged.

    Attributes:
        per_token: whether the methods are called on slices of positions, so that a long vocabulary
            never makes whole logits; what slices give is added up. They then see
            ``batch.labels[n, t]`` as the target that ``outputs[n, t]`` predicts (already shifted by
            one from the data's alignment) and ``batch.loss_mask[n, t]`` as whether that target
            counts; padding never counts. ``batch.start`` is the slice's first position, and
            ``batch.at_last`` finds last tokens. With ``False`` the methods are called once, on
            whole outputs ``[N, T, V]``: ``--batch-tokens`` times the vocabulary of memory.
        columns: names of further columns of the data that the methods read, as
            ``batch.columns[name]``: numbers as a tensor ``[N, ...]``, of one shape in all examples,
            text as a list of strings. They speak of an example, not of its tokens: with ``--long
            truncate`` it keeps them, with ``--long split`` each of its pieces has them.
    """

    per_token: bool = False
    columns: tuple[str, ...] = ()

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The loss of each example, summed over its tokens, ``[N]``."""

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The function of a query whose change is asked for, ``[N]``; by default the loss."""
        return self.loss(outputs, batch)

    def sample(self, outputs: Tensor, batch: Batch, uniform: Uniform) -> Tensor:
        """Labels drawn from the model's predictive distribution, shaped as ``batch.labels``.

        ``uniform(k)`` gives float64 numbers in (0, 1), ``[N, k]`` (``[N, T, k]`` when per token).
        """


@runtime_checkable
class Judging(Protocol):
    """What an objective may have besides: a way to count what the model gets right."""

    def correct(self, outputs: Tensor, batch: Batch) -> Tensor:
        """How many of each example's targets are the most probable outcome, ``[N]``."""


class CausalLM(Objective):
    """Next-token cross-entropy in nats, summed over an example's targets."""

    per_token = True

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        labels, counts = batch.labels, batch.loss_mask
        assert labels is not None and counts is not None
        logits = outputs if outputs.dtype == torch.float64 else outputs.float()
        nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return torch.where(counts, nll.view_as(labels), 0.0).sum(dim=1)

    def sample(self, outputs: Tensor, batch: Batch, uniform: Uniform) -> Tensor:
        drawn = draw_categorical(outputs.flatten(0, 1), uniform(1).flatten())
        return drawn.view(outputs.shape[:2])

    def correct(self, outputs: Tensor, batch: Batch) -> Tensor:
        labels, counts = batch.labels, batch.loss_mask
        assert labels is not None and counts is not None
        return ((outputs.argmax(dim=2) == labels) & counts).sum(dim=1)


class Classification(Objective):
    """Cross-entropy in nats over ``outputs [N, V]`` with class labels ``[N]``."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        labels = _labels(batch, "a class number an example")
        if outputs.ndim != 2:
            raise UserError(
                "classification",
                "outputs of shape [examples, classes]",
                f"{tuple(outputs.shape)}",
                "Choose another --objective, or let the model return one row of logits an example.",
            )
        labels = labels.long()
        outside = (labels < 0) | (labels >= outputs.shape[1])
        if outside.any():
            n = int(outside.nonzero()[0])
            raise UserError(
                f"example {batch.ids[n]!r}",
                f"a class from 0 to {outputs.shape[1] - 1}",
                f"label {int(labels[n])}",
                "Correct the label, or give the model that class.",
            )
        logits = outputs if outputs.dtype == torch.float64 else outputs.float()
        return F.cross_entropy(logits, labels, reduction="none")

    def sample(self, outputs: Tensor, batch: Batch, uniform: Uniform) -> Tensor:
        return draw_categorical(outputs, uniform(1)[:, 0])

    def correct(self, outputs: Tensor, batch: Batch) -> Tensor:
        return outputs.argmax(dim=1) == _labels(batch, "a class number an example")


class Regression(Objective):
    """``½‖y − f‖²`` with ``outputs`` and labels ``[N, D]``: a Gaussian of unit variance."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        labels = _labels(batch, "a number or a list of numbers an example")
        f, y = outputs.flatten(1), labels.reshape(labels.shape[0], -1)
        if f.shape != y.shape:
            raise UserError(
                "regression",
                f"labels of shape {tuple(f.shape)}, as the outputs",
                f"{tuple(y.shape)}",
                "Make labels and outputs of one size.",
            )
        f = f if f.dtype == torch.float64 else f.float()
        return 0.5 * (y.to(f.dtype) - f).square().sum(dim=1)

    def sample(self, outputs: Tensor, batch: Batch, uniform: Uniform) -> Tensor:
        f = outputs.flatten(1)
        noise = torch.special.ndtri(uniform(f.shape[1]))
        drawn: Tensor = (f.double() + noise).reshape(outputs.shape)
        return drawn


def _labels(batch: Batch, wanted: str) -> Tensor:
    if batch.labels is None:
        raise UserError(
            f"example {batch.ids[0]!r}",
            f"a label ({wanted})",
            "none",
            "Add a column `labels` to the data.",
        )
    return batch.labels


# Columns of the data that every microbatch has, and what it calls them.
BATCHED = {
    "id": "ids", "input_ids": "inputs", "inputs": "inputs", "labels": "labels",
    "loss_mask": "loss_mask",
}  # fmt: skip

_SHIPPED: dict[str, Callable[[], Objective]] = {
    "causal-lm": CausalLM,
    "classification": Classification,
    "regression": Regression,
}


def open_objective(name: str | Objective) -> Objective:
    """The objective of that name: one that ships with raycurv, or ``package.module:Name``;
    UserError if there is none, it cannot be imported, or it lacks loss or sample."""
    named, own = _found(name)
    missing = [method for method in ("loss", "sample") if not hasattr(own, method)]
    if missing:
        raise UserError(
            f"--objective {named}",
            "an object with the methods loss and sample",
            f"no {' and no '.join(missing)}",
            "See raycurv.Objective for what each takes and gives.",
        )
    return _complete(named, own)


def open_measurement(name: str | Objective) -> Objective:
    """The objective whose measurement queries are measured by; only that may be asked of it.
    UserError if there is none, it cannot be imported, or it has neither measurement nor loss."""
    named, own = _found(name)
    if not (hasattr(own, "measurement") or hasattr(own, "loss")):
        raise UserError(
            f"--objective {named}",
            "an object with the method measurement, for the queries",
            "no measurement, and no loss that could stand for it",
            "See raycurv.Objective for what it takes and gives.",
        )
    return _complete(named, own)


def _found(name: str | Objective) -> tuple[str, Any]:
    """An objective as its author made it, and what messages call it."""
    if not isinstance(name, str):
        return type(name).__name__, name
    if name in _SHIPPED:
        return name, _SHIPPED[name]()
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(
            "--objective",
            ", ".join(_SHIPPED) + " or package.module:Name",
            repr(name),
            "Name an objective that ships with raycurv, or your own as package.module:Name.",
        )
    # Where a script lives in jobs/, the working directory is not on the path; as for `python -m`.
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        found = getattr(importlib.import_module(module), attribute)
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
    taken = [column for column in columns if column in BATCHED]
    if taken:
        raise UserError(
            f"--objective {name}", "columns beside those that every microbatch has",
            f"{taken[0]!r}", f"Leave it out: batch.{BATCHED[taken[0]]} is it.",
        )  # fmt: skip
    return own if isinstance(own, Objective) else _Completed(own)


class _Completed:
    """An objective of the user's, with the defaults for what it leaves out."""

    def __init__(self, own: Any) -> None:
        self.per_token: bool = getattr(own, "per_token", False)
        self.columns: tuple[str, ...] = tuple(getattr(own, "columns", ()))
        self.loss = getattr(own, "loss", _not_asked_for)
        self.sample = getattr(own, "sample", _not_asked_for)
        self.measurement = getattr(own, "measurement", self.loss)
        if isinstance(own, Judging):
            self.correct = own.correct


def _not_asked_for(*_: Any) -> Tensor:
    raise AssertionError("only the measurement of this objective may be asked for")
