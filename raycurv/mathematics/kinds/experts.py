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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raycurv.mathematics.blocks import Block, block_name
from raycurv.mathematics.kinds.kind import Kind, ModuleCall, Note, check_examples


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

    def __init__(self, transposed: bool, interleaved: bool) -> None:
        self.name = "experts" + "-transposed" * transposed + "-interleaved" * interleaved
        self.transposed, self.interleaved = transposed, interleaved

    def holds(self, module: nn.Module) -> bool:
        return (
            # Set by the decorator, which also gives a class its ``_apply_gate``.
            hasattr(module, "_apply_gate")
            and getattr(module, "is_transposed", None) is self.transposed
            and getattr(module, "is_concatenated", None) is not self.interleaved
        )

    def describe(self, name: str, module: nn.Module) -> tuple[Block, ...]:
        blocks = []
        bias = bool(module.has_bias)
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
            return cast(Tensor, note(there, x, y, routing)) if there else y

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
        rows = _rows_of(block, call)
        # Hidden states by token, or what stands between the matrices by row.
        by_token = block.parameter != "down_proj"
        return rows.padded(call.x.index_select(0, rows.tokens if by_token else rows.rows))

    def output_rows(self, block: Block, module: nn.Module, call: ModuleCall, g: Tensor) -> Tensor:
        rows = _rows_of(block, call)
        return rows.padded(self._half(block, g.index_select(0, rows.rows)))

    def live_rows(
        self, block: Block, call: ModuleCall, mask: Tensor | None, rows: int
    ) -> Tensor | None:
        return _rows_of(block, call).live()

    def parameters(self, block: Block) -> tuple[str, ...]:
        return (block.parameter, f"{block.parameter}_bias") if block.bias else (block.parameter,)

    def part(self, block: Block, parameter: Tensor) -> Tensor:
        own = super().part(block, parameter)
        if self.transposed or own.ndim == 1:
            return self._half(block, own)
        return self._half(block, own.T).T

    def to_rows(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight

    def from_rows(self, rows_OI: Tensor, shape: Sequence[int]) -> Tensor:
        return self.to_rows(rows_OI).reshape(*shape)

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
    routing = Routing.of(top_k_index, len(module.get_parameter(first)))

    def multiplied(name: str, x: Tensor, rows: Tensor) -> Tensor:
        y = routing.multiply(
            rows, module.get_parameter(name), bool(module.is_transposed),
            module.get_parameter(f"{name}_bias") if module.has_bias else None,
        )  # fmt: skip
        return y if noted is None else noted(name, x, y, routing)

    taken = _Taken.apply(hidden_states, routing)  # type: ignore[no-untyped-call]
    y = multiplied(first, hidden_states, taken)
    y = cast(Any, module)._apply_gate(y) if module.has_gate else cast(Any, module).act_fn(y)
    y = multiplied(last, y, y)
    if module.has_post_expert_norm:
        y = cast(Any, module).post_expert_norm(y)
    y = y * top_k_weights.reshape(-1).index_select(0, routing.order)[:, None]
    return routing.summed(y).to(hidden_states.dtype)


@dataclass(eq=False)
class Routing:
    """The rows of one call, sorted by expert, then by example and position: made once for all
    experts of a layer.

    Attributes:
        order: of each row its place among the ``n·k`` choices, ``[S]``.
        inverse: of each choice its row.
        experts: of each row, ``[S]``.
        counts: how many rows each expert got. Without values (on the meta device) all got the same.
        chosen: how many experts a token has, k.
    """

    order: Tensor
    inverse: Tensor
    experts: Tensor
    counts: list[int]
    chosen: int
    _rows: list[_Rows] | None = None

    @classmethod
    def of(cls, index_nk: Tensor, experts: int) -> Routing:
        """From the experts of each token."""
        by_row, order = index_nk.reshape(-1).sort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        if order.is_meta:
            share, more = divmod(len(order), experts)
            counts = [share + (e < more) for e in range(experts)]
        else:
            counts = torch.bincount(by_row, minlength=experts).tolist()
        return cls(order, inverse, by_row, counts, index_nk.shape[-1])

    @property
    def tokens(self) -> Tensor:
        """Of each row its token, ``[S]``."""
        return self.order // self.chosen

    def multiply(
        self, rows: Tensor, weight: Tensor, transposed: bool, bias: Tensor | None
    ) -> Tensor:
        """Rows ``[S, I]`` through the matrices of their experts."""
        made = [
            F.linear(x, w.T if transposed else w)
            for x, w in zip(rows.split(self.counts), weight.unbind(), strict=True)
            if len(x)
        ]
        y = torch.cat(made) if made else rows.new_empty(0, weight.shape[2 if transposed else 1])
        return y if bias is None else y + bias.index_select(0, self.experts)

    def summed(self, rows: Tensor) -> Tensor:
        """Rows ``[S, H]`` added up for each token, ``[n, H]``."""
        by_choice = rows.index_select(0, self.inverse)
        return by_choice.view(-1, self.chosen, rows.shape[1]).sum(dim=1)

    def rows(self, call: ModuleCall) -> list[_Rows]:
        """The rows of each expert that stand for tokens, by example."""
        if self._rows is None:
            self._rows = self._found(call.examples, call.mask)
        return self._rows

    def _found(self, examples: int, mask: Tensor | None) -> list[_Rows]:
        tokens, experts = self.tokens, self.experts
        rows = torch.arange(len(tokens), device=tokens.device)
        if mask is not None:
            live = mask.flatten()[tokens]
            rows, tokens, experts = rows[live], tokens[live], experts[live]
        positions = len(self.order) // self.chosen // examples
        number = len(self.counts)
        # Of one expert and example: these follow each other.
        runs = experts * examples + tokens // positions
        lengths = torch.bincount(runs, minlength=number * examples)
        slots = torch.arange(len(runs), device=runs.device) - (lengths.cumsum(0) - lengths)[runs]
        by_expert = lengths.view(number, examples)
        widths = by_expert.amax(dim=1)
        places = tokens // positions * widths[experts] + slots
        counts = by_expert.sum(dim=1).tolist()
        return [
            _Rows(*one)
            for one in zip(
                rows.split(counts), tokens.split(counts), places.split(counts),
                by_expert.unbind(), widths.tolist(), strict=True,
            )
        ]  # fmt: skip


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


def _rows_of(block: Block, call: ModuleCall) -> _Rows:
    tokens = len(call.detail.order) // call.detail.chosen
    if tokens % call.examples or (call.mask is not None and call.mask.numel() != tokens):
        check_examples(block, call.x[:, None], call.examples, 2)
    assert block.index is not None
    return cast(_Rows, call.detail.rows(call)[block.index])


class _Taken(torch.autograd.Function):
    # Hidden states by row: as an index, but its backward adds up in one order on every device.
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return hidden.index_select(0, routing.tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.routing.summed(gradients[0]), None


def _parameters_of(module: nn.Module) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Names of the parameters in the order of their use, each with the parts of its matrices."""
    first = ("gate_up_proj", ("gate", "up")) if module.has_gate else ("up_proj", ("",))
    return first, ("down_proj", ("",))
