"""What the loss of a block rises by when one of its weights is set to zero, for every weight.

    magnitude   w²
    OBD         ½ w² F_kk                       (− g w)
    OBS         u² / (2 [(F + λ)⁻¹]_kk)         u = w (− (F + λ)⁻¹ g)

OBD leaves the other weights where they are; OBS lets them move to where the loss rises least. Both
are of the quadratic model of the mean loss per example (an example's loss is the sum over its
tokens), and the gradient g of that loss is there for a model that has not converged. OBS counts
from the lowest point of the damped model, ``gᵀδ + ½ δᵀ(F + λ)δ``: the step −(F + λ)⁻¹ g leads to
it, whichever weight goes, so what setting w_k to zero costs is the distance of w_k *after that
step* from zero. OBD counts from where the weights are, and may therefore be negative.

LeCun, Denker & Solla 1989 (Optimal Brain Damage); Hassibi & Stork 1992 (Optimal Brain Surgeon);
Singh & Alistarh 2020 (arXiv:2004.14340), sections 3 and 4, and appendix on the first-order term.

Saliencies are computed in float64 and kept in float32. Axis letters: O outputs, I inputs (with the
bias column), M rows of a rank-m Fisher, N weights of a part (flattened), S sets, K weights of a
set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raycurv.mathematics.curvature import BlockCurvature, Damping, SpectralFunction
from raycurv.mathematics.rank.rank_inverse import RankInverse


def magnitude(w: Tensor) -> Tensor:
    """``w²``, float32, of the weight's shape: in the order of ``|w|``, and it adds up over sets.

    It is no prediction: it knows no loss.
    """
    return w.double().square().float()


def obd(w: Tensor, diagonal: Tensor, gradient: Tensor | None = None) -> Tensor:
    """``½ w² F_kk − g w``, float32: the rise of the mean loss per example when the rest stays.

    Args:
        w: weights, of any shape.
        diagonal: of the *undamped* F, of that shape: a mean over examples.
        gradient: mean gradient of the loss over examples, of that shape.
    """
    w = w.double()
    rise = 0.5 * w.square() * diagonal.double()
    if gradient is not None:
        rise -= gradient.double() * w
    return rise.float()


def obs(u: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """``u² / (2 [(F + λ)⁻¹]_kk)``, float32: the least rise of the damped model, the rest moving.

    Args:
        u: weights, of any shape, after the Newton step where there is a first-order term
            (:func:`after_newton_step`).
        inverse_diagonal: of the damped inverse, of that shape.
    """
    return (u.double().square() / (2 * inverse_diagonal.double())).float()


def after_newton_step(
    curvature: BlockCurvature, w_OI: Tensor, damping: Damping, gradient_OI: Tensor | None
) -> Tensor:
    """``u = w − (F + λ)⁻¹ g``, float64 ``[O, I]``; the weights themselves without a gradient.

    Raises:
        UserError: a shape is not the block's, or there is no damping where Λ has a zero.
    """
    curvature.check(w_OI)
    if gradient_OI is None:
        return w_OI.double()
    curvature.check(gradient_OI)
    return w_OI.double() - curvature.apply(gradient_OI.double(), curvature.inverse(damping))


def block_obd(curvature: BlockCurvature, w_OI: Tensor, gradient_OI: Tensor | None = None) -> Tensor:
    """:func:`obd` of a block, ``[O, I]``.

    Raises:
        UserError: a shape is not the block's.
    """
    curvature.check(w_OI)
    if gradient_OI is not None:
        curvature.check(gradient_OI)
    return obd(w_OI, curvature.diagonal(torch.Tensor.double), gradient_OI)


def block_obs(
    curvature: BlockCurvature,
    w_OI: Tensor,
    damping: Damping,
    gradient_OI: Tensor | None = None,
) -> Tensor:
    """:func:`obs` of a block, ``[O, I]``; zero throughout a block whose Λ is zero.

    Raises:
        UserError: a shape is not the block's, or there is no damping where Λ has a zero.
    """
    u_OI = after_newton_step(curvature, w_OI, damping, gradient_OI)
    if curvature.is_zero:
        return torch.zeros_like(u_OI, dtype=torch.float32)
    return obs(u_OI, curvature.diagonal(inverse_in_double(curvature, damping)))


def inverse_in_double(curvature: BlockCurvature, damping: Damping) -> SpectralFunction:
    """``Λ -> 1 / (Λ + λ)`` in float64, whatever Λ is kept in.

    Raises:
        UserError: there is no damping where Λ has a zero.
    """
    inverse = curvature.inverse(damping)
    return lambda lam: inverse(lam.double())


def rank_diagonal(rows_MN: Tensor) -> Tensor:
    """``F_kk = mean_i g_ik²`` of a rank-m Fisher without λ, float64 ``[N]``: for :func:`obd`."""
    return rows_MN.double().square().mean(dim=0)


def rank_obs(inverse: RankInverse, rows_MN: Tensor, u_N: Tensor) -> Tensor:
    """:func:`obs` of a part of a rank-m Fisher, ``[N]``.

    Args:
        inverse: of the whole Fisher, or of one block's.
        rows_MN: the part's columns of G.
        u_N: the part's weights, less its part of F⁻¹g where there is a first-order term.
    """
    return obs(u_N, inverse.diagonal(rows_MN))
