"""Cholesky roots that name what has none."""

from __future__ import annotations

import torch
from torch import Tensor

from raycurv.errors import NumericalError


def cholesky(matrix: Tensor, what: str) -> Tensor:
    """The lower root of one positive definite matrix or a batch of them ``[..., K, K]``;
    NumericalError if ``what`` is not positive definite, or not finite."""
    root: Tensor
    root, info = torch.linalg.cholesky_ex(matrix)
    if bool(info.any()):
        raise NumericalError(
            what,
            "a positive definite matrix",
            f"{int((info != 0).sum())} that rounding, or a damping too small, left without",
            "Give --damping a larger value.",
        )
    return root
