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


def gram(left: Sequence[Tensor], right: Sequence[Tensor] | None = None) -> Tensor:
    """Dot products of vectors ``[Q, ...]`` with others, query by query, float64 ``[Q, V, W]``.

    Args:
        left: V vectors of one shape.
        right: W vectors; by default the same ones.
    """
    queries = len(left[0])
    flat = [[v.reshape(queries, -1) for v in side] for side in (left, right or left)]
    total = torch.zeros(
        queries, len(flat[0]), len(flat[1]), dtype=torch.float64, device=left[0].device
    )
    for start in range(0, flat[0][0].shape[1], _SLICE):
        rows = [
            torch.stack([v[:, start : start + _SLICE].double() for v in side], 1) for side in flat
        ]
        total.baddbmm_(rows[0], rows[1].mT)
    return total
