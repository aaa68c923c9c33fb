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
    """A loss, a measurement and a way to draw labels.

    An objective with ``per_token = True`` is called on slices of positions, so that a long
    vocabulary never makes whole logits. It then sees ``batch.labels[n, t]`` as the target that
    ``outputs[n, t]`` predicts (already shifted by one from the data's alignment) and
    ``batch.loss_mask[n, t]`` as whether that target counts; padding never counts.
    """

    per_token: bool = False

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The loss of each example, summed over its tokens, ``[N]``."""
        ...

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The function of a query whose change is asked for, ``[N]``; by default the loss."""
        return self.loss(outputs, batch)

    def sample(self, outputs: Tensor, batch: Batch, uniform: Uniform) -> Tensor:
        """Labels drawn from the model's predictive distribution, shaped as ``batch.labels``.

        ``uniform(k)`` gives float64 numbers in (0, 1), ``[N, k]`` (``[N, T, k]`` when per token).
        """
        ...


@runtime_checkable
class Judging(Protocol):
    """What an objective may have besides: a way to count what the model gets right."""

    def correct(self, outputs: Tensor, batch: Batch) -> Tensor:
        """How many of each example's targets are the most probable outcome, ``[N]``."""
        ...


class CausalLM:
    """Next-token cross-entropy in nats, summed over an example's targets."""

    per_token = True

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        labels, counts = batch.labels, batch.loss_mask
        assert labels is not None and counts is not None
        logits = outputs if outputs.dtype == torch.float64 else outputs.float()
        nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return torch.where(counts, nll.view_as(labels), 0.0).sum(dim=1)

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self.loss(outputs, batch)

    def sample(self, outputs: Tensor, batch: Batch, uniform: Uniform) -> Tensor:
        drawn = draw_categorical(outputs.flatten(0, 1), uniform(1).flatten())
        return drawn.view(outputs.shape[:2])

    def correct(self, outputs: Tensor, batch: Batch) -> Tensor:
        labels, counts = batch.labels, batch.loss_mask
        assert labels is not None and counts is not None
        return ((outputs.argmax(dim=2) == labels) & counts).sum(dim=1)


class Classification:
    """Cross-entropy in nats over ``outputs [N, V]`` with class labels ``[N]``."""

    per_token = False

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

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self.loss(outputs, batch)

    def sample(self, outputs: Tensor, batch: Batch, uniform: Uniform) -> Tensor:
        return draw_categorical(outputs, uniform(1)[:, 0])

    def correct(self, outputs: Tensor, batch: Batch) -> Tensor:
        return outputs.argmax(dim=1) == _labels(batch, "a class number an example")


class Regression:
    """``½‖y − f‖²`` with ``outputs`` and labels ``[N, D]``: a Gaussian of unit variance."""

    per_token = False

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

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self.loss(outputs, batch)

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


_SHIPPED: dict[str, Callable[[], Objective]] = {
    "causal-lm": CausalLM,
    "classification": Classification,
    "regression": Regression,
}


def open_objective(name: str | Objective) -> Objective:
    """The objective of that name: one that ships with raycurv, or ``package.module:Name``.

    Raises:
        UserError: no such name, it cannot be imported, or it lacks one of the three methods.
    """
    if not isinstance(name, str):
        return _checked(type(name).__name__, name)
    if name in _SHIPPED:
        return _SHIPPED[name]()
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
    return _checked(name, made)


def _checked(name: str, objective: object) -> Objective:
    missing = [method for method in ("loss", "sample") if not hasattr(objective, method)]
    if missing:
        raise UserError(
            f"--objective {name}",
            "an object with the methods loss and sample",
            f"no {' and no '.join(missing)}",
            "See raycurv.Objective for what each takes and gives.",
        )
    if not (hasattr(objective, "measurement") and hasattr(objective, "per_token")):
        return _Completed(objective)
    assert isinstance(objective, Objective)
    return objective


class _Completed:
    """An objective of the user's, with the defaults for what it leaves out."""

    def __init__(self, own: Any) -> None:
        self.per_token: bool = getattr(own, "per_token", False)
        self.loss = own.loss
        self.sample = own.sample
        self.measurement = getattr(own, "measurement", own.loss)
        if isinstance(own, Judging):
            self.correct = own.correct
