"""Classes that hold or do not hold, each by itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.mathematics.loss.objective import (
    Objective,
    Signs,
    Uniform,
    check_numbers,
    labels_of,
)
from raycurv.mathematics.loss.signs import with_gradient


class MultiLabel(Objective):
    """Binary cross-entropy in nats of each class, summed over these, of ``outputs [N, V]``.

    Labels are ``[N, V]``, 1 for a class that holds and 0 for one that does not, or a probability.
    An example counts as predicted where each of its classes is.
    """

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        labels = self._targets(outputs, batch)
        logits = outputs if outputs.dtype == torch.float64 else outputs.float()
        each = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
        return each.sum(dim=1)

    def sample(self, outputs: Tensor, batch: Batch, uniform: Uniform) -> Tensor:
        check_numbers("multi-label", outputs)
        return (uniform(outputs.shape[1]) < outputs.double().sigmoid()).to(torch.int64)

    def signed(self, outputs: Tensor, batch: Batch, signs: Signs) -> Tensor:
        check_numbers("multi-label", outputs)
        logits = outputs if outputs.dtype == torch.float64 else outputs.float()
        p = logits.detach().sigmoid()
        root = signs(logits.shape[1]) * (p * (1.0 - p)).sqrt()
        return with_gradient(logits, root.sum(dim=1), root)

    def correct(self, outputs: Tensor, batch: Batch) -> Tensor:
        labels = self._targets(outputs, batch)
        return ((outputs > 0) == (labels > 0.5)).all(dim=1)

    def _targets(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The labels; UserError for others than the outputs take."""
        check_numbers("multi-label", outputs)
        labels = labels_of(batch, "a list of 0 and 1, one a class")
        if outputs.ndim != 2 or labels.shape != outputs.shape:
            raise UserError(
                f"multi-label, example {batch.ids[0]!r}",
                f"a label of shape {list(outputs.shape[1:])}, 0 or 1 for each class",
                f"one of shape {list(labels.shape[1:])}",
                "Write for every class whether it holds, or choose another --objective.",
            )
        wrong = ~((labels >= 0) & (labels <= 1))
        if wrong.any():
            n = int(wrong.any(dim=1).nonzero()[0])
            raise UserError(
                f"example {batch.ids[n]!r}",
                "0 or 1 for each class, or a probability",
                f"{float(labels[n][wrong[n]][0]):g}",
                "Correct the label.",
            )
        return labels
