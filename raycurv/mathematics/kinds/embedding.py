"""Embeddings: a row of the weight for each token.

    y_t = W e_t        e_t one-hot, of the token's number
    ∇W = Σ_t g_t e_tᵀ        A = mean of e eᵀ: how often each token comes, a diagonal

The matrix is ``[O, I]``, width times vocabulary: the weight transposed. Its rows are given on the
tokens that a microbatch has, so that the cost follows these. A token that no example has has Λ = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.kinds.kind import Kind, ModuleCall, Note, check_examples
from raycurv.mathematics.kinds.own_forward import catch_calls


class Embedding(Kind):
    """``torch.nn.Embedding``, of tokens, positions or types. What its class does with the rows that
    it has looked up (scales them, say) comes behind the block."""

    name = "embedding"
    label = "Embedding"
    by_default = False
    in_slices = False

    def __init__(self) -> None:
        # Whether a module is given the numbers of positions [T], and not of examples [N].
        self._of_positions: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def describe(self, name: str, module: nn.Module) -> tuple[Block, ...]:
        (block,) = super().describe(name, module)
        return (replace(block, input_diagonal=True),)

    def catch(self, module: nn.Module, blocks: Sequence[Block], note: Note) -> Callable[[], None]:
        (block,) = blocks

        def seen(args: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
            return note(block.name, args[0] if args else options["input"], output)

        return catch_calls(module, block.parameter, (F.embedding,), seen)

    def by_example(
        self, block: Block, module: nn.Module, x: Tensor, y: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Positions ``[1, T]`` or ``[T]`` that all examples have in common are each one's own."""
        count, positions = batch.rows, batch.inputs.shape[1] if batch.inputs.ndim > 1 else 1
        if x.ndim == 1 and len(x) in (count, positions) and count != positions:
            self._of_positions[module] = len(x) == positions
        if count == 1:
            return x, y
        if x.ndim == 1 and len(x) == count == positions and module not in self._of_positions:
            raise UserError(
                f"block {block.name}",
                "numbers of tokens or positions, [examples, positions]",
                f"{count} numbers, which may be those of examples as well as of positions",
                f"Give another --batch-tokens, or leave it out with --blocks '!{block.name}'.",
            )
        if x.ndim == 1 and self._of_positions.get(module, False):
            x, y = x[None], y[None]
        if x.ndim > 1 and len(x) == 1:
            x, y = (t.expand(count, *t.shape[1:]) for t in (x, y))
        return x, y

    def support(self, block: Block, calls: Sequence[ModuleCall]) -> Tensor:
        found: Tensor = torch.cat([call.x.flatten() for call in calls]).unique()
        return found

    def layout(self, block: Block, module: nn.Module) -> object:
        return self.name, block.d_in, getattr(module, "padding_idx", None)

    def input_rows(self, block: Block, module: nn.Module, call: ModuleCall) -> Tensor:
        check_examples(block, _split(call), call.examples, 1)
        numbers = call.x.reshape(call.examples, -1).contiguous()
        weight, width = module.get_parameter(block.parameter), block.d_in
        if call.columns is not None:
            numbers_there, width = torch.searchsorted(call.columns, numbers), len(call.columns)
        else:
            numbers_there = numbers
        rows = weight.new_zeros(*numbers.shape, width)
        rows.scatter_(2, numbers_there[..., None], 1.0)
        padding = getattr(module, "padding_idx", None)
        if padding is not None:
            # torch gives this row of the weight no gradient.
            rows *= (numbers != padding)[..., None]
        return rows

    def output_rows(self, block: Block, module: nn.Module, call: ModuleCall, g: Tensor) -> Tensor:
        return g.reshape(call.examples, -1, g.shape[-1])

    def live_rows(
        self, block: Block, call: ModuleCall, mask: Tensor | None, rows: int
    ) -> Tensor | None:
        x = _split(call)
        if mask is None or x.ndim < 2 or x.shape[1] != mask.shape[1]:
            return None
        return mask.repeat_interleave(rows // mask.shape[1], dim=1)

    def to_rows(self, weight: Tensor) -> Tensor:
        return weight.T

    def flops(self, module: nn.Module, x: Tensor, *more: Any) -> int:
        return 0


def _split(call: ModuleCall) -> Tensor:
    """Numbers by example and position, where they came in one axis."""
    x = call.x
    if call.positions is not None and x.ndim == 1 and len(x) == call.examples * call.positions:
        return x.view(call.examples, call.positions)
    return x
