"""Tangents of many directions at once, beside one forward.

    ẏ = ẋ Wᵀ + x Ẇᵀ + ḃ                           of a linear layer
    Ȯ = (P ∘ Ṡ) V − rowsum(P ∘ Ṡ) ∘ O + P V̇      of attention, P = softmax(S), S = s Q Kᵀ + M

Forward-mode automatic differentiation with the directions as a batch of tangents (``jvp`` in
``vmap``): what does not depend on the direction is computed once. Two functions have rules of their
own. Linear layers take the kernels of :mod:`raycurv.mathematics.products`; fused attention has no
forward derivative in torch, and its rule makes P once, a run of query positions at a time.

Axis letters: Q directions, R rows, I inputs, O outputs, H heads, T query positions, S keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap
from torch.overrides import TorchFunctionMode

from raycurv.errors import UserError
from raycurv.mathematics.products import outer, rows_times

Tensors = Mapping[str, Tensor]
# Tensors that a part of the network makes of its parameters and its inputs.
Call = Callable[[Tensors, Sequence[Tensor]], tuple[Tensor, ...]]

# Elements of attention's scores and their tangents that are held at once (float32: 256 MiB).
_SCORES = 2**26


class Rules(TorchFunctionMode):
    """While it is entered, linear layers are computed by :class:`_Linear`; with ``directions``,
    attention by :class:`_Attention`, and embeddings have no tangent at their ``padding_idx``.

    Args:
        directions: how many tangents a forward has; ``None`` for a forward that autograd goes back
            through.
    """

    def __init__(self, directions: int | None = None) -> None:
        super().__init__()
        self._directions = directions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func is F.scaled_dot_product_attention and self._directions is not None:
            return _attention(*args, **kwargs, directions=self._directions)
        if func is F.embedding and self._directions is not None:
            return _embedding(*args, **kwargs)
        return func(*args, **kwargs)


def forward_tangents(
    call: Call,
    parameters: Tensors,
    inputs: Sequence[Tensor],
    parameter_tangents: Tensors,
    input_tangents: Sequence[Tensor],
    together: bool,
) -> tuple[Tensor, ...]:
    """The tangents ``[Q, ...]`` of what a part of the network makes.

    Args:
        call: parameters and inputs, of floating point, to outputs of floating point.
        parameter_tangents, input_tangents: ``[Q, ...]`` each.
        together: all directions at once; otherwise one after the other, which more code of other
            people's bears.

    Raises:
        UserError: something in the network has no forward derivative.
    """
    directions = len(next(iter([*parameter_tangents.values(), *input_tangents])))
    generator = torch.get_rng_state()
    with torch.no_grad(), Rules(directions if together else 1):
        if together:

            def tangent(dp: Tensors, dx: Sequence[Tensor]) -> tuple[Tensor, ...]:
                primal = (dict(parameters), tuple(inputs))
                found: tuple[Tensor, ...] = jvp(call, primal, (dict(dp), tuple(dx)))[1]
                return found

            outputs: tuple[Tensor, ...] = vmap(tangent)(parameter_tangents, tuple(input_tangents))
        else:
            each = []
            for q in range(directions):
                dp = {name: d[q] for name, d in parameter_tangents.items()}
                dx = [d[q] for d in input_tangents]
                each.append(_dual(call, parameters, inputs, dp, dx)[1])
            outputs = tuple(map(torch.stack, zip(*each, strict=True)))
    if not torch.equal(generator, torch.get_rng_state()):
        raise UserError(
            "the model",
            "a forward without random numbers, which its tangents would need again",
            "one that draws some",
            "Switch that off in its configuration, or leave out what needs exact products.",
        )
    return outputs


@dataclass(frozen=True)
class Second:
    """What goes back from a part of the network along one direction.

    Attributes:
        parameters: how the gradient with respect to each parameter changes along the direction.
        inputs: the same of what entered.
        gradients: with respect to what entered, the gradient itself.
    """

    parameters: dict[str, Tensor]
    inputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


def second(
    call: Call,
    parameters: Tensors,
    inputs: Sequence[Tensor],
    parameter_tangents: Tensors,
    input_tangents: Sequence[Tensor],
    back: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], Tensor],
) -> Second:
    """Second derivatives along one direction, by going back through its tangents.

    ``∂/∂θ (ḡᵀ ẏ + cᵀ y)`` is how ``Jᵀ ḡ`` changes along the direction, where c is how ḡ does; and
    ``∂/∂ẋ`` of it is ``Jᵀ ḡ`` (reverse over forward; Griewank & Walther 2008, section 5.3).

    Args:
        parameter_tangents, input_tangents: of the direction, shaped as what they are of.
        back: outputs and their tangents to the number that is differentiated.
    """
    leaves = {n: p.detach().requires_grad_() for n, p in parameters.items()}
    entered = [x.detach().requires_grad_() for x in inputs]
    moved = [d.detach().requires_grad_() for d in input_tangents]
    wanted = [*leaves.values(), *entered, *moved]
    found: Sequence[Tensor] = [torch.zeros_like(x) for x in wanted]
    with torch.enable_grad(), _Plain():
        value = back(*_dual(call, leaves, entered, parameter_tangents, moved))
    if value.requires_grad:
        found = torch.autograd.grad(value, wanted, materialize_grads=True)
    own, states = len(leaves), len(leaves) + len(entered)
    by_name = dict(zip(leaves, found, strict=False))
    return Second(by_name, tuple(found[own:states]), tuple(found[states:]))


class _Plain(TorchFunctionMode):
    """While it is entered, softmax, norms and their like are made of plain operations: torch's own
    forward derivatives of these cannot be gone back through, or give another number (LOG.md)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = _PLAIN.get(func)
        return func(*args, **(kwargs or {})) if made is None else made(*args, **(kwargs or {}))


def _softmax(input: Tensor, dim: Any = None, *more: Any, **named: Any) -> Tensor:
    return _log_softmax(input, dim, *more, **named).exp()


def _log_softmax(input: Tensor, dim: Any = None, *more: Any, **named: Any) -> Tensor:
    assert dim is not None, "which axis"
    # Third comes a dtype of some of them, and of torch.nn.functional's a level of the stack.
    dtype = next((x for x in (*more, named.get("dtype")) if isinstance(x, torch.dtype)), None)
    x = input if dtype is None else input.to(dtype)
    return x - _logsumexp(x, dim, keepdim=True)


def _logsumexp(input: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    with torch.no_grad():
        # All -inf gives -inf, as it should.
        most = input.amax(dim, keepdim=True).nan_to_num(neginf=0.0)
    found = (input - most).exp().sum(dim, keepdim=True).log() + most
    return found if keepdim else found.squeeze(dim)


def _dual(
    call: Call, parameters: Tensors, inputs: Sequence[Tensor], dp: Tensors, dx: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs, and their tangents along one direction."""
    # torch annotates neither of the two.
    make: Any = forward_ad.make_dual
    unpack: Any = forward_ad.unpack_dual
    with forward_ad.dual_level():
        moved = {n: make(p, dp[n]) if n in dp else p for n, p in parameters.items()}
        found = call(moved, [make(x, d) for x, d in zip(inputs, dx, strict=True)])
        pairs = [unpack(y) for y in found]
    tangents = (torch.zeros_like(y) if dy is None else dy for y, dy in pairs)
    return tuple(y for y, _ in pairs), tuple(tangents)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.ndim != 2 or input.ndim < 2 or not input.is_floating_point():
        with torch._C.DisableTorchFunction():
            return F.linear(input, weight, bias)
    rows = input.flatten(0, -2)
    y: Tensor = _Linear.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    return y if input.ndim == 2 else y.view(*input.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    # Of rows [R, I].
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        y = rows_times(x, w.T)
        return y if b is None else y.add_(b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w)
        ctx.save_for_forward(x, w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        to_x, to_w, to_b = ctx.needs_input_grad
        return (
            rows_times(g, w) if to_x else None,
            outer(g[None], x[None])[0] if to_w else None,
            g.sum(dim=0) if to_b else None,
        )

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None) -> Tensor:
        x, w = ctx.saved_tensors
        parts = [] if dx is None else [_rows(dx, w)]
        if dw is not None:
            parts.append(_rows(x, dw))
        if db is not None:
            parts.append(db)
        found: Tensor = parts[0]
        for part in parts[1:]:
            found = found + part
        return found


def _rows(x: Tensor, w: Tensor) -> Tensor:
    y: Tensor = _Rows.apply(x, w)  # type: ignore[no-untyped-call]
    return y


class _Rows(torch.autograd.Function):
    # x wᵀ, of directions on either side: all in one product.
    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return rows_times(x, w.T)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, w: Tensor) -> tuple[Tensor, int]:
        of_x, of_w = in_dims
        if of_x is not None and of_w is not None:
            return x.movedim(of_x, 0) @ w.movedim(of_w, 0).transpose(1, 2), 0
        if of_x is not None:
            x = x.movedim(of_x, 0)
            y = rows_times(x.reshape(-1, x.shape[-1]), w.T)
            return y.view(*x.shape[:-1], len(w)), 0
        w = w.movedim(of_w, 0)
        y = rows_times(x, w.reshape(-1, w.shape[-1]).T)
        return y.view(len(x), *w.shape[:2]), 1


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    directions: int | None = None,
) -> Tensor:
    """As torch's; for so many tangents, or of plain operations."""
    assert not dropout_p, "a model in eval mode has no dropout"
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        each = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(each, dim=-3) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if is_causal:
        ones = query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
        attn_mask = ones.tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = query.new_zeros(attn_mask.shape).masked_fill(~attn_mask, -math.inf)
    if directions is None:
        scores = (query * scale) @ key.transpose(-1, -2)
        if attn_mask is None:
            return _softmax(scores, -1) @ value
        # A row that sees nothing, as of padding behind a sliding window, gives nothing.
        blind = (attn_mask == -math.inf).all(dim=-1, keepdim=True)
        seen = scores + attn_mask.masked_fill(blind, 0.0)
        return _softmax(seen, -1).masked_fill(blind, 0.0) @ value
    found: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        query, key, value, attn_mask, scale, directions
    )
    return found


class _Attention(torch.autograd.Function):
    # Of queries [..., T, d], keys and values [..., S, d], and a mask that is added.
    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, m: Any, scale: float, directions: int) -> Tensor:
        with torch._C.DisableTorchFunction():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, v, m, ctx.scale, ctx.directions = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(q, k, v, m, output)
        ctx.save_for_backward()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        raise AssertionError("tangents go forward")

    @staticmethod
    def jvp(ctx: Any, dq: Any, dk: Any, dv: Any, dm: Any, *rest: Any) -> Tensor:
        q, k, v, m, o = ctx.saved_tensors
        made, rows, keys = [], q.shape[-2], k.shape[-2]
        held = (ctx.directions + 1) * keys * max(1, q[..., 0, 0].numel())
        step = max(1, _SCORES // held)
        for start in range(0, rows, step):
            at = slice(start, min(start + step, rows))

            def cut(x: Any, at: slice = at) -> Any:
                return x[..., at, :] if x is not None and x.shape[-2] == rows else x

            scores = (q[..., at, :] * ctx.scale) @ k.transpose(-1, -2)
            wide = torch.promote_types(o.dtype, torch.float32)
            p = torch.softmax(scores if m is None else scores + cut(m), dim=-1, dtype=wide)
            p = p.to(o.dtype)
            if m is not None:
                # A row that sees nothing gives nothing.
                p = torch.nan_to_num(p) if (cut(m).amax(dim=-1) == -math.inf).any() else p
            ds = []
            if dq is not None:
                ds.append((dq[..., at, :] * ctx.scale) @ k.transpose(-1, -2))
            if dk is not None:
                ds.append((q[..., at, :] * ctx.scale) @ dk.transpose(-1, -2))
            if dm is not None:
                ds.append(cut(dm))
            parts = [] if dv is None else [p @ dv]
            if ds:
                weighted = p * (ds[0] if len(ds) == 1 else sum(ds[1:], ds[0]))
                parts.append(weighted @ v - weighted.sum(dim=-1, keepdim=True) * o[..., at, :])
            made.append(parts[0] if len(parts) == 1 else parts[0] + parts[1])
        return torch.cat(made, dim=-2)


def _layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, *rest: Any,
) -> Tensor:  # fmt: skip
    axes = tuple(range(-len(normalized_shape), 0))
    apart = input - input.mean(axes, keepdim=True)
    y = apart * (apart.square().mean(axes, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    parts = input.unflatten(1, (num_groups, -1))
    y = _layer_norm(parts, parts.shape[2:], eps=eps).view_as(input)
    along = (-1, *[1] * (input.ndim - 2))
    y = y if weight is None else y * weight.view(along)
    return y if bias is None else y + bias.view(along)


def _instance_norm(
    input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not use_input_stats:
        return F.batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    return _group_norm(input, input.shape[1], weight, bias, eps)


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *rest: Any, **named: Any
) -> Tensor:
    y = F.embedding(input, weight, padding_idx, *rest, **named)
    if padding_idx is None:
        return y
    # torch gives this row no gradient where it is looked up, so nothing may move with it there.
    return torch.where((input == padding_idx % len(weight))[..., None], y.detach(), y)


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    a, b = input.chunk(2, dim)
    return a * b.sigmoid()


_PLAIN: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _softmax),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, Tensor.log_softmax), _log_softmax),
    **dict.fromkeys((torch.logsumexp, Tensor.logsumexp), _logsumexp),
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _layer_norm),
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.embedding: _embedding,
    F.glu: _glu,
    F.scaled_dot_product_attention: _attention,
}
