"""Random signs in place of labels: gradients at the outputs whose covariance is the loss's Hessian.

A label y that is drawn from the model gives the gradient p − e_y, whose covariance over y is
R = diag(p) − p pᵀ = D½ (1 − √p √pᵀ) D½, D = diag(p). Any root of R times independent signs ε has
that covariance, too. This one has no more columns than R has rank, V − 1: those of the Householder
reflection that takes e₀ to −√p, but for the first, span what is orthogonal to √p.

    s = Σ_{v>0} √p_v ε_v      c₀ = −√p₀ s      c_v = √p_v ε_v − p_v s / (1 + √p₀)      E[c cᵀ] = R

Of two classes c cᵀ = R for either sign; of more it is less noisy in its square than p − e_y, and
than the root √p∘ε − p (√pᵀε), which has a column too many.

Signs are bits of the counter of draws.py, so that each pass makes the same ones again:

    ε_v = ±1 by bit v mod 64 of hash(seed, id, position, draw, v div 64)

Axis letters: N examples, T positions, V classes, B bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raycurv.mathematics.loss.draws import hashes

_BITS = 64


def signs(seed: int, keys_N: Tensor, positions_T: Tensor, draw: int, count: int) -> Tensor:
    """Independent signs, 1 or -1, float32 ``[N, T, count]``; arguments as :func:`hashes`."""
    h_NTK = hashes(seed, keys_N, positions_T, draw, -(-count // _BITS))
    device = h_NTK.device
    # A byte at a time, from a table of the 8 signs of each.
    bytes_B = (h_NTK[..., None] >> torch.arange(0, _BITS, 8, device=device)).flatten() & 255
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    table = (2 * bits - 1).float()
    return table.index_select(0, bytes_B).view(*h_NTK.shape[:2], -1)[..., :count]


def signed_softmax(logits: Tensor, signs: Tensor) -> Tensor:
    """Numbers ``[...]`` whose gradients in ``logits [..., V]`` are c, for signs ``[..., V]``, the
    first of which counts for nothing."""
    with torch.no_grad():
        p = logits.softmax(dim=-1)
        c = p.sqrt()
        first = c[..., :1].clone()
        c.mul_(signs)[..., 0] = 0.0
        s = c.sum(dim=-1, keepdim=True)
        c.addcmul_(p, s / (1.0 + first), value=-1.0)
        c[..., :1] = -first * s
    return with_gradient(logits, s.squeeze(-1), c)


def with_gradient(outputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """The numbers ``value [...]``, as functions of ``outputs [..., V]`` with these gradients."""
    found: Tensor = _WithGradient.apply(outputs, value, gradient)  # type: ignore[no-untyped-call]
    return found


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, of_value: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return of_value.unsqueeze(-1) * gradient, None, None
