"""Dot products of vectors that lie on their stages: all that a solver sends of them.

    C_vw = Σ_oi v[o, i] w[o, i]       of one block; of the model the sum over blocks

They are summed in float64, whatever the vectors' dtype, so that norms of combinations of vectors
are found from a Gram matrix without the combinations: ``‖Σ_v c_v v‖² = cᵀ C c``.

Axis letters: Q queries, O outputs, I inputs, V vectors on the left, W on the right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Numbers of a vector that are widened to float64 at a time.
_SLICE = 2**16
# Share of the longest direction, squared, that rounding leaves of one that is not there.
_ROUNDING = 1e-13


def gram(vectors: Sequence[Tensor]) -> Tensor:
    """Dot products of V sets of vectors ``[Q, ...]``, query by query, float64 ``[Q, V, V]``."""
    flat = [v.flatten(1) for v in vectors]
    total = flat[0].new_zeros(len(flat[0]), len(flat), len(flat), dtype=torch.float64)
    for start in range(0, flat[0].shape[1], _SLICE):
        rows = torch.stack([v[:, start : start + _SLICE].double() for v in flat], 1)
        total.baddbmm_(rows, rows.mT)
    return total


def dots(left: Tensor, right: Tensor) -> Tensor:
    """Dot products of vectors ``[V, ...]`` with vectors ``[W, ...]``, float64 ``[V, W]``."""
    left, right = left.flatten(1), right.flatten(1)
    total = left.new_zeros(len(left), len(right), dtype=torch.float64)
    for start in range(0, left.shape[1], _SLICE):
        part = slice(start, start + _SLICE)
        total.addmm_(left[:, part].double(), right[:, part].double().T)
    return total


def combined(vectors: Tensor, coefficients: Tensor) -> Tensor:
    """``Σ_v c_vw v`` of vectors ``[V, ...]`` and coefficients ``[V, W]``: ``[W, ...]``."""
    found: Tensor = torch.tensordot(coefficients.T.to(vectors), vectors, dims=1)
    return found


def orthonormalising(gram_VV: Tensor, least: float = 0.0) -> Tensor:
    """Coefficients ``[V, R]`` of an orthonormal basis of the span of V vectors.

    Args:
        gram_VV: the vectors' dot products, float64.
        least: directions that are no longer than this, squared, are left out; and always those
            which a float64 Gram matrix does not tell from rounding.

    Returns:
        the coefficients, of the longest direction first; R is 0 where none is left.
    """
    lengths, directions = torch.linalg.eigh((gram_VV + gram_VV.T) / 2)
    kept = lengths > max(least, _ROUNDING * float(lengths[-1]))
    found: Tensor = (directions[:, kept] / lengths[kept].sqrt()).flip(1)
    return found
