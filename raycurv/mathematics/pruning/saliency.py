"""What the loss rises by when a weight is set to zero, for every weight at once.

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

Saliencies are computed in float64 and kept in float32.
"""

from __future__ import annotations

from torch import Tensor


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
        u: weights, of any shape, after the Newton step where there is a first-order term.
        inverse_diagonal: of the damped inverse, of that shape.
    """
    return (u.double().square() / (2 * inverse_diagonal.double())).float()
