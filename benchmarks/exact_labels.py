"""The Fisher over all labels at once, where one gradient has its second moment exactly.

Drawn labels y give E_y[g gᵀ] on average; these "labels" give it with a single gradient:

    one Gaussian number:  g = −(y − f) ∇f, and E(y − f)² = 1        label f + 1
    two classes:          g = (p₁ − [y = 1]) ∇(z₁ − z₀), of second moment p₀ p₁
                          loss √(p₀ p₁) (z₁ − z₀), p held fixed     label 2

Both are the Gauss-Newton matrix of the loss. For more outputs there is no single such gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

import raycurv
from raycurv.batch import Batch
from raycurv.mathematics.loss.objective import Uniform

_EXACT = 2  # a class that two classes do not have


class ExactRegression(raycurv.Regression):
    """Regression of one number."""

    def sample(self, outputs: Tensor, batch: Batch, uniform: Uniform) -> Tensor:
        assert outputs.shape[1:] == (1,), outputs.shape
        return outputs.double() + 1.0


class ExactTwoClasses(raycurv.Classification):
    """Classification with two classes."""

    def sample(self, outputs: Tensor, batch: Batch, uniform: Uniform) -> Tensor:
        assert outputs.shape[1:] == (2,), outputs.shape
        return torch.full((len(outputs),), _EXACT, device=outputs.device)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        labels = batch.labels
        assert labels is not None
        exact = labels == _EXACT
        own = replace(batch, labels=labels.masked_fill(exact, 0))
        p = outputs.detach().softmax(dim=1).prod(dim=1).sqrt()
        return torch.where(exact, p * (outputs[:, 1] - outputs[:, 0]), super().loss(outputs, own))


EXACT: Mapping[str, Callable[[], raycurv.Objective]] = {
    "regression": ExactRegression,
    "classification": ExactTwoClasses,
}
