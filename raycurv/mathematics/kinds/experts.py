"""Experts of a mixture: three matrices each, which a token meets if it is routed to the expert.

    y_t = Σ_e w_te D_e (act(G_e a_t) ∘ U_e a_t)        e over the experts that t is routed to
    ∇G_e = Σ_t g_t a_tᵀ        t over the tokens that expert e got, and likewise U_e and D_e

All experts of a layer lie in two parameters of three axes, gate and up in one of them. Their
forward is here (:func:`experts_forward`): it sorts the rows of all tokens by expert once, and keeps
the hidden states once.

Axis letters: n tokens of all examples, k experts of a token, S = n·k rows, W the most rows that an
example has of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raycurv.mathematics.blocks import Block, block_name
from raycurv.mathematics.kinds.kind import Kind, ModuleCall, Note, check_examples
from raycurv.mathematics.kinds.own_forward import catch_calls


class Experts(Kind):
    """The matrices of transformers' classes with ``use_experts_implementation``, whose flags say
    how they are stored: one block a matrix.

    Gate and up read the same rows, and share an input factor; each expert's factors are means over
    the rows that it got. Of the parameter of both, gate has the first half of the outputs, or every
    second one.

    Args:
        transposed: whether matrices are stored ``[E, I, O]``.
        interleaved: whether outputs of gate and up alternate.
    """

    label = "module of experts"
    ragged = True

    def __init__(self, transposed: bool, interleaved: bool) -> None:
        self.name = "experts" + "-transposed" * transposed + "-interleaved" * interleaved
        self.transposed, self.interleaved = transposed, interleaved

    def holds(self, module: nn.Module) -> bool:
        return (
            # Set by the decorator, which also gives a class its ``_apply_gate``.
            hasattr(module, "_apply_gate")
            and _is_decorated(type(module))
            and getattr(module, "is_transposed", None) is self.transposed
            and getattr(module, "is_concatenated", None) is not self.interleaved
        )

    def describe(self, name: str, module: nn.Module) -> tuple[Block, ...]:
        blocks = []
        bias = bool(getattr(module, "has_bias", False))
        for parameter, parts in _parameters_of(module):
            experts, *shape = module.get_parameter(parameter).shape
            d_in, d_out = shape if self.transposed else reversed(shape)
            blocks += [
                Block(
                    block_name(name, parameter, index, part), self.name, d_in + bias,
                    d_out // len(parts), bias, module=name, parameter=parameter, index=index,
                    part=part,
                )
                for index in range(experts)
                for part in parts
            ]  # fmt: skip
        return tuple(blocks)

    def catch(self, module: nn.Module, blocks: Sequence[Block], note: Note) -> Callable[[], None]:
        names: dict[str, list[str]] = {}
        for block in blocks:
            names.setdefault(block.parameter, []).append(block.name)

        def noted(parameter: str, x: Tensor, y: Tensor, routing: Routing) -> Tensor:
            there = names.get(parameter)
            return cast(Tensor, note(there, x, y, routing.dealt)) if there else y

        before = vars(module).get("forward")
        module.forward = partial(experts_forward, module, noted=noted)

        def end() -> None:
            del module.forward
            if before is not None:
                module.forward = before

        return end

    def layout(self, block: Block, module: nn.Module) -> object:
        return self.name, block.index

    def input_rows(self, block: Block, module: nn.Module, call: ModuleCall) -> Tensor:
        rows = self._rows(block, call)
        return rows.padded(self._entered(block, call.x, rows))

    def output_rows(self, block: Block, module: nn.Module, call: ModuleCall, g: Tensor) -> Tensor:
        rows = self._rows(block, call)
        return rows.padded(self._half(block, g.flatten(0, -2).index_select(0, rows.rows)))

    def live_rows(
        self, block: Block, call: ModuleCall, mask: Tensor | None, rows: int
    ) -> Tensor | None:
        return self._rows(block, call).live()

    def positions(self, block: Block, call: ModuleCall) -> Tensor | None:
        rows = self._rows(block, call)
        positions = call.detail.sizes[1] // call.examples
        return rows.padded((rows.tokens % positions)[:, None])[..., 0]

    def _rows(self, block: Block, call: ModuleCall) -> _Rows:
        return cast(Dealt, call.detail).of(block, call)

    def _entered(self, block: Block, x: Tensor, rows: _Rows) -> Tensor:
        """Of what entered the rows of an expert: hidden states by token, or what stands between the
        matrices by row."""
        return x.index_select(0, rows.rows if block.parameter == "down_proj" else rows.tokens)

    def may_share_output(self, block: Block) -> bool:
        # What leaves them is added up to the hidden states.
        return block.parameter == "down_proj"

    def share(self, call: ModuleCall) -> float:
        return cast(Dealt, call.detail).share

    def parameters(self, block: Block) -> tuple[str, ...]:
        return (block.parameter, f"{block.parameter}_bias") if block.bias else (block.parameter,)

    def part(self, block: Block, parameter: Tensor) -> Tensor:
        own = super().part(block, parameter)
        if self.transposed or own.ndim == 1:
            return self._half(block, own)
        return self._half(block, own.T).T

    def to_rows(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight

    def flops(self, module: nn.Module, x: Tensor, *more: Any) -> int:
        chosen = more[0].shape[-1] if more else 1
        return sum(
            2 * len(x) * chosen * module.get_parameter(name)[0].numel()
            for name, _ in _parameters_of(module)
        )

    def _half(self, block: Block, outputs: Tensor) -> Tensor:
        """Of outputs ``[..., O]`` of a parameter those of a block."""
        if not block.part:
            return outputs
        second = block.part == "up"
        if self.interleaved:
            return outputs[..., second::2]
        return outputs.chunk(2, dim=-1)[second]


class BatchedExperts(Experts):
    """The matrices of modules that are given a row for every token and expert (Llama 4), zero where
    a token is not routed, and multiply them with ``torch.bmm``: the others are the rows."""

    def __init__(self) -> None:
        super().__init__(transposed=True, interleaved=False)
        self.name = "experts-batched"

    def holds(self, module: nn.Module) -> bool:
        own = module._parameters
        first, last = own.get("gate_up_proj"), own.get("down_proj")
        if first is None or last is None or hasattr(module, "_apply_gate"):
            return False
        inner = (last.shape[2], 2 * last.shape[1]) if last.ndim == 3 else ()
        return first.ndim == 3 and tuple(first.shape[1:]) == inner

    def catch(self, module: nn.Module, blocks: Sequence[Block], note: Note) -> Callable[[], None]:
        dealt: list[Dealt] = []
        ends: list[Callable[[], None]] = []
        for parameter, _ in _parameters_of(module):
            names = [block.name for block in blocks if block.parameter == parameter]

            def seen(
                args: tuple[Any, ...], options: dict[str, Any], output: Any,
                names: list[str] = names, first: bool = not ends,
            ) -> Any:  # fmt: skip
                x = args[0]
                if first:
                    dealt[:] = [_nonzero(x)]
                return note(names, x, output, dealt[0]) if names else output

            ends.append(catch_calls(module, parameter, (torch.bmm,), seen))

        def end() -> None:
            for one in reversed(ends):
                one()

        return end

    def _entered(self, block: Block, x: Tensor, rows: _Rows) -> Tensor:
        return x.flatten(0, 1).index_select(0, rows.rows)


def _nonzero(x: Tensor) -> Dealt:
    """The rows of ``x [E, n, H]`` that are not zero."""
    experts, tokens = x.shape[:2]
    if x.is_meta:
        rows = torch.arange(experts * tokens, device=x.device)
    else:
        rows = x.any(dim=2).flatten().nonzero()[:, 0]
    return Dealt(rows, rows % tokens, rows // tokens, (experts, tokens))


def experts_forward(
    module: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    noted: Callable[[str, Tensor, Tensor, Routing], Tensor] | None = None,
) -> Tensor:
    """What the experts make of hidden states ``[n, H]``, ``[n, H]``: as ``grouped_mm`` of
    transformers does it, in every dtype and on the meta device.

    Args:
        top_k_index: the experts of each token, ``[n, k]``.
        top_k_weights: of what they make, ``[n, k]``.
        noted: is given a parameter's name, what its matrices read (hidden states as they came, or
            a row for each of the routing), and what they made, ``[S, O]``; gives what goes on.
    """
    (first, _), (last, _) = _parameters_of(module)
    # Not always parameters: a product of the curvature puts others in their place.
    routing = Routing(top_k_index, len(getattr(module, first)))

    def multiplied(name: str, x: Tensor, rows: Tensor) -> Tensor:
        y = routing.multiply(
            rows, getattr(module, name), bool(module.is_transposed),
            getattr(module, f"{name}_bias") if module.has_bias else None,
        )  # fmt: skip
        return y if noted is None else noted(name, x, y, routing)

    taken = _Taken.apply(  # type: ignore[no-untyped-call]
        hidden_states, routing.tokens, routing
    )
    y = multiplied(first, hidden_states, taken)
    y = cast(Any, module)._apply_gate(y) if module.has_gate else cast(Any, module).act_fn(y)
    y = multiplied(last, y, y)
    if module.has_post_expert_norm:
        y = cast(Any, module).post_expert_norm(y)
    y = y * top_k_weights.reshape(-1).index_select(0, routing.order)[:, None]
    return routing.summed(y).to(hidden_states.dtype)


class Dealt:
    """Which rows of a call are whose: of an expert, and of an example.

    Args:
        rows: where they stand in what the call made, sorted by expert, then by example and
            position, ``[S]``.
        tokens: of each its token, ``[S]``.
        experts: of each its expert, ``[S]``.
        sizes: numbers of experts and of tokens.
    """

    def __init__(
        self, rows: Tensor, tokens: Tensor, experts: Tensor, sizes: tuple[int, int]
    ) -> None:
        self._rows, self._tokens, self._experts, self.sizes = rows, tokens, experts, sizes
        self._found: list[_Rows] | None = None

    @property
    def share(self) -> float:
        """Rows of an expert for each token, on the mean."""
        return len(self._rows) / math.prod(self.sizes)

    def of(self, block: Block, call: ModuleCall) -> _Rows:
        """The rows of a block's expert that stand for tokens, by example: found once for all."""
        if self._found is None:
            tokens, mask = self.sizes[1], call.mask
            if tokens % call.examples:
                # Refused by what entered.
                check_examples(block, call.x[:, None], call.examples, 2)
            if mask is not None and mask.numel() != tokens:
                mask = None  # of no positions, or of others
            self._found = self._by_expert(call.examples, mask)
        assert block.index is not None
        return self._found[block.index]

    def _by_expert(self, examples: int, mask: Tensor | None) -> list[_Rows]:
        rows, tokens, experts = self._rows, self._tokens, self._experts
        if mask is not None:
            live = mask.flatten()[tokens]
            rows, tokens, experts = rows[live], tokens[live], experts[live]
        number, count = self.sizes
        own = tokens // (count // examples)
        # Rows of one expert and example follow each other.
        runs = experts * examples + own
        lengths = torch.bincount(runs, minlength=number * examples)
        slots = torch.arange(len(runs), device=runs.device) - (lengths.cumsum(0) - lengths)[runs]
        by_expert = lengths.view(number, examples)
        widths = by_expert.amax(dim=1)
        places = own * widths[experts] + slots
        counts = by_expert.sum(dim=1).tolist()
        return [
            _Rows(*one)
            for one in zip(
                rows.split(counts), tokens.split(counts), places.split(counts),
                by_expert.unbind(), widths.tolist(), strict=True,
            )
        ]  # fmt: skip


class Routing:
    """The rows of one call, sorted by expert, then by example and position: made once for all
    experts of a layer.

    Attributes:
        order: of each row its place among the ``n·k`` choices, ``[S]``.
        tokens: of each row its token.
        experts: of each row its expert.
        counts: how many rows each expert got. Without values (on the meta device) all got the same.
        dealt: the rows by expert and example.
    """

    def __init__(self, index_nk: Tensor, experts: int) -> None:
        self._chosen = index_nk.shape[-1]
        self.experts, self.order = index_nk.reshape(-1).sort(stable=True)
        self._inverse = torch.empty_like(self.order)
        self._inverse[self.order] = torch.arange(len(self.order), device=self.order.device)
        if self.order.is_meta:
            share, more = divmod(len(self.order), experts)
            self.counts = [share + (e < more) for e in range(experts)]
        else:
            self.counts = torch.bincount(self.experts, minlength=experts).tolist()
        self.tokens = self.order // self._chosen
        rows = torch.arange(len(self.order), device=self.order.device)
        self.dealt = Dealt(rows, self.tokens, self.experts, (experts, len(index_nk)))

    def multiply(
        self, rows: Tensor, weight: Tensor, transposed: bool, bias: Tensor | None
    ) -> Tensor:
        """Rows ``[S, I]`` through the matrices of their experts."""
        runs, matrices = rows.split(self.counts), weight.unbind()
        if rows.is_meta:
            # Without values one matrix is as good as another.
            runs, matrices = (rows,), matrices[:1]
        made = [
            F.linear(x, w.T if transposed else w)
            for x, w in zip(runs, matrices, strict=True)
            if len(x)
        ]
        y = torch.cat(made)
        return y if bias is None else y + bias.index_select(0, self.experts)

    def summed(self, rows: Tensor) -> Tensor:
        """Rows ``[S, H]`` added up for each token, ``[n, H]``."""
        by_choice = rows.index_select(0, self._inverse)
        return by_choice.view(-1, self._chosen, rows.shape[1]).sum(dim=1)


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of one expert that stand for tokens, R of them.

    Attributes:
        rows: where they stand among all rows of the call, ``[R]``.
        tokens: of which tokens they are, ``[R]``.
        places: where they go in ``[N·W]``.
        counts: how many each example has, ``[N]``.
        width: the most that one has, W.
    """

    rows: Tensor
    tokens: Tensor
    places: Tensor
    counts: Tensor
    width: int

    def padded(self, values: Tensor) -> Tensor:
        """Values ``[R, X]`` by example, ``[N, W, X]``, zero where one has fewer."""
        examples, columns = len(self.counts), values.shape[1]
        if len(self.places) == examples * self.width:
            return values.reshape(examples, self.width, columns)
        out = values.new_zeros(examples * self.width, columns)
        return out.index_copy_(0, self.places, values).view(examples, self.width, columns)

    def live(self) -> Tensor | None:
        """Which of the rows ``[N, W]`` are there; ``None`` for all."""
        if len(self.places) == len(self.counts) * self.width:
            return None
        slots = torch.arange(self.width, device=self.counts.device)
        return slots < self.counts[:, None]


class _Taken(torch.autograd.Function):
    # Hidden states by row: as an index, but its backward adds up in one order on every device.
    generate_vmap_rule = True

    @staticmethod
    def forward(hidden: Tensor, tokens: Tensor, routing: Routing) -> Tensor:
        return hidden.index_select(0, tokens)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, tokens, ctx.routing = inputs
        ctx.save_for_forward(tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.routing.summed(gradients[0]), None, None

    @staticmethod
    def jvp(ctx: Any, moved: Tensor, *_: None) -> Tensor:
        (tokens,) = ctx.saved_tensors
        return moved.index_select(0, tokens)


def _is_decorated(cls: type) -> bool:
    """Whether a class' forward is the decorator's, and not one of a subclass, unlike ours."""
    forward: Any = getattr(cls, "forward", None)
    found = getattr(forward, "__globals__", {}).get("__name__")
    return bool(found == "transformers.integrations.moe")


def _parameters_of(module: nn.Module) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Names of the parameters in the order of their use, each with the parts of its matrices."""
    gated = "gate_up_proj" in module._parameters
    first = ("gate_up_proj", ("gate", "up")) if gated else ("up_proj", ("",))
    return first, ("down_proj", ("",))
