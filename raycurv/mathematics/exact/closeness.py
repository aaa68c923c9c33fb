"""How far two answers x and y to ``A x = v`` are from solving it, and from one another.

    residual   ‖v − A x‖ / ‖v‖              of a block ‖v_b − (A x)_b‖ / ‖v‖: squares add up
    cosine     xᵀy / (‖x‖ ‖y‖)              of a block likewise, of x_b and y_b
    attained   (vᵀx)² / xᵀAx  ≤  vᵀA⁻¹v     and by the exact answer all of it
    captured   attained by x / the larger of what x and y attain

The third line is the inequality of Cauchy and Schwarz in the inner product of A, where ``vᵀA⁻¹v``
is a query's influence on itself: of it x, at its best length, has no more than what is captured,
however far from exact y may be.

Axis letters: Q queries, O outputs, I inputs, B blocks. ``...Q`` stands for ``Q``, or ``B, Q``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raycurv.mathematics.exact.grams import gram

_V, _X, _R, _Y, _S = range(5)


def answers_gram(v: Tensor, x: Tensor, ax: Tensor, y: Tensor, ay: Tensor) -> Tensor:
    """Dot products of a block's right-hand sides, both answers and what each leaves of v.

    Args:
        v: right-hand sides ``[Q, O, I]``.
        x: answers, likewise.
        ax: this block's part of ``A x``.
        y: the other answers.
        ay: as ``ax``.

    Returns:
        float64 ``[Q, 5, 5]``; those of a model are the sum over its blocks.
    """
    return gram((v, x, v - ax, y, v - ay))


@dataclass(frozen=True)
class Closeness:
    """Two answers to each of Q right-hand sides, all ``[...Q]``; NaN where a number is none, as the
    cosine to a zero vector.

    Attributes:
        residual: of x.
        other_residual: of y.
        cosine: of x to y.
        square: ``‖x‖²``.
        other_square: ``‖y‖²``.
        captured: by x, between 0 and 1; of a whole system alone.
    """

    residual: Tensor
    other_residual: Tensor
    cosine: Tensor
    square: Tensor
    other_square: Tensor
    captured: Tensor

    @classmethod
    def of(cls, gram: Tensor, whole: Tensor | None = None) -> Closeness:
        """From the Gram matrices of :func:`answers_gram`, ``[...Q, 5, 5]``; of parts, with those of
        the ``whole`` ``[Q, 5, 5]``, whose v residuals are relative to."""
        norm = (gram if whole is None else whole)[..., _V, _V].sqrt()
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        x, y = _attained(gram, _X, _R), _attained(gram, _Y, _S)
        return cls(
            norms[..., _R] / norm,
            norms[..., _S] / norm,
            gram[..., _X, _Y] / (norms[..., _X] * norms[..., _Y]),
            gram[..., _X, _X],
            gram[..., _Y, _Y],
            x / x.maximum(y),
        )


def _attained(gram: Tensor, answer: int, left: int) -> Tensor:
    """``(vᵀx)² / xᵀAx`` of an answer, and NaN along a direction of negative curvature."""
    slope = gram[..., _V, answer]
    bend = slope - gram[..., answer, left]
    return torch.where(bend > 0, slope.square() / bend, torch.nan)
