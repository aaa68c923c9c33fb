"""Linear layers of a frozen model by the fastest kernel at hand.

    y = x Wᵀ + b,     ∂f/∂x = ∂f/∂y W,     and nothing for W, which gets no gradient

The passes spend half their time here. torch's own ``linear`` stays for all that is not a frozen
float32 weight on a CPU (see :mod:`raycurv.mathematics.products`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from raycurv.mathematics.products import rows_times, suits


class _Frozen(torch.autograd.Function):
    # Of rows [R, I]: what it gives is no view, so that a model may go on to change it in place.
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(w)
        y = rows_times(x, w.T)
        return y if b is None else y.add_(b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (w,) = ctx.saved_tensors
        return rows_times(g, w), None, None


class FrozenLinear(TorchFunctionMode):
    """While it is entered, ``linear`` with a frozen weight is computed by :func:`rows_times`.

    It sees every call, of a ``torch.nn.Linear`` or of a module's own, and changes no module.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is linear and _is_frozen(*args, **kwargs):
            return _frozen(*args, **kwargs)
        return func(*args, **kwargs)


def _is_frozen(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    parameters = [weight] if bias is None else [weight, bias]
    return (
        all(type(p) in (Tensor, torch.nn.Parameter) and not p.requires_grad for p in parameters)
        and input.ndim >= 2
        and weight.ndim == 2
        and suits(input)
        and suits(weight)
        and not is_functorch_wrapped_tensor(input)
        and not torch.is_autocast_enabled("cpu")
    )


def _frozen(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = input.flatten(0, -2)
    result: Tensor = _Frozen.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    return result if input.ndim == 2 else result.view(*input.shape[:-1], len(weight))
