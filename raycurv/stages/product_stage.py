"""Products of curvature with many vectors, on one stage.

    forward     x, ẋ_q  →  y, ẏ_q = J_x ẋ_q + J_θ V_q            beside the hidden states
    the end     c_q = R u_q                                        mathematics/exact/head.py
    backward    c_q  →  J_xᵀ c_q  and  J_θᵀ c_q, summed over the microbatch, for each block

Of the Hessian cotangents have tangents of their own: with the gradient ḡ travels, for each
direction, how it changes along it (forward over reverse; Pearlmutter 1994).

Between stages goes a tuple: hidden states, and behind them of each that is of floating point its
tangents ``[Q, ...]``. Back go cotangents ``[Q, ...]``, as those of draws do; of the Hessian
``[1 + Q, ...]``, the gradient first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from raycurv.batch import Batch, Hidden
from raycurv.errors import in_words, says_no_memory, user_errors
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Captured
from raycurv.mathematics.exact.head import HeadProduct
from raycurv.mathematics.exact.parameters import BlockParameters
from raycurv.mathematics.exact.tangents import Rules, forward_tangents, second
from raycurv.mathematics.loss.objective import Objective
from raycurv.mathematics.sums import Results
from raycurv.models.model import Segment
from raycurv.stages.passes import Pass

Tensors = Mapping[str, Tensor]
T = TypeVar("T")


@dataclass
class _Open:
    """A microbatch between its forward and its backward.

    Attributes:
        entered: hidden states, those of floating point leaves of the graph.
        moved: of those the tangents, ``[Q, ...]``.
        left: the outputs of floating point.
        left_moved: their tangents.
    """

    batch: Batch
    entered: Hidden | None
    moved: tuple[Tensor, ...]
    leaves: dict[str, Tensor]
    left: tuple[Tensor, ...]
    left_moved: tuple[Tensor, ...]


class Products:
    """A pass of products on one stage.

    Args:
        work: the pass.
        segment: the stage's part of the model.
        blocks: the stage's.
        objective: summed over an example's tokens.
        seed: of drawn labels.
        dtype: of the model's computation.
        device: where it computes.
        slice_positions: of a microbatch and its last hidden states, positions of logits at once.

    Attributes:
        apart: why directions go forward one after the other (the words of the error that the
            model's code raises otherwise); empty while all go at once.

    Raises:
        UserError: a block whose weight is no parameter.
    """

    def __init__(
        self,
        work: Pass,
        segment: Segment,
        blocks: tuple[Block, ...],
        objective: Objective,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        slice_positions: Callable[[Batch, Tensor], int],
    ) -> None:
        assert work.directions is not None, "a pass of products has directions"
        self._work, self._segment, self._objective = work, segment, objective
        self._seed, self._dtype, self._device = seed, dtype, device
        self._slice_positions = slice_positions
        self._count = work.directions.count
        self._parameters = BlockParameters(segment.module, blocks)
        vectors = work.directions.open(blocks, dtype, device)
        moved = {name: v.to(device, dtype) for name, v in vectors.items()}
        self._tangents = self._parameters.tangents(moved)
        self.apart = ""
        self._open: dict[int, _Open] = {}

    def forward(self, batch: Batch, hidden: Hidden | None) -> Hidden:
        """Hidden states and their tangents after this stage's last layer."""
        batch, goes_back = batch.to(self._device), self._work.differentiates
        entered, moved = self._entering(hidden)
        leaves = self._parameters.leaves()
        graph = goes_back and self._work.matrix != "hessian"
        with torch.set_grad_enabled(graph), Rules(), self._parameters.replaced(leaves):
            left = self._segment.forward(batch, _own(entered))
        floating = tuple(tensor for tensor in left if tensor.is_floating_point())
        left_moved = self._moved(batch, entered, moved, floating)
        if goes_back:
            opened = _Open(batch, entered, moved, leaves, floating, left_moved)
            self._open[batch.index] = opened
        return (*(tensor.detach() for tensor in left), *left_moved)

    def ends(self, batch: Batch) -> tuple[Hidden, list[dict[str, Tensor]], Results]:
        """At the model's end: cotangents of what the last layer gave, of the head's own parameters
        by direction, and what the driver shall collect."""
        opened = self._open[batch.index]
        hidden, *others = opened.left
        head = HeadProduct(
            self._objective, self._head(opened.batch), self._work.matrix, self._work.draws,
            self._seed, self._slice_positions(opened.batch, hidden), self._work.along,
        )  # fmt: skip
        found = self._tried(
            lambda together: head.ends(
                self._parameters.own, self._tangents, hidden.detach(), opened.left_moved[0],
                opened.batch, together,
            )
        )  # fmt: skip
        # The loss is a function of the hidden states alone, not of what goes with them.
        rest = [t.new_zeros((len(found.hidden), *t.shape)) for t in others]
        results = {name: numbers.cpu() for name, numbers in found.results.items()}
        return (found.hidden, *rest), found.parameters, results

    def backward(
        self, index: int, cotangents: Hidden, of_head: Sequence[Tensors] = ()
    ) -> tuple[Iterator[Captured], Callable[[], Hidden | None]]:
        """Go back through the stage.

        Args:
            cotangents: of the floating-point tensors that ``forward`` gave.
            of_head: by direction what the head has found for its own parameters.

        Returns:
            the products of every direction, made as they are asked for; and what gives the
            cotangents of what entered, once all have been.
        """
        opened = self._open.pop(index)
        given = [c.to(self._device, self._dtype) for c in cotangents]
        back: list[list[Tensor]] = []
        found = (
            self._hessian(opened, given, back)
            if self._work.matrix == "hessian"
            else self._transposed(opened, given, back)
        )

        def products() -> Iterator[Captured]:
            for q, own in enumerate(found):
                parts = dict(own)
                for name, tensor in (of_head[q] if of_head else {}).items():
                    parts[name] = parts[name] + tensor if name in parts else tensor
                matrices = self._parameters.matrices(parts)
                yield Captured(opened.batch, {}, {}, {}, q == 0, products=matrices)

        def leaving() -> Hidden | None:
            if opened.entered is None:
                return None
            return tuple(map(torch.stack, zip(*back, strict=True)))

        return products(), leaving

    def abort(self) -> None:
        """Drop the microbatches under way."""
        self._open.clear()

    def _entering(self, hidden: Hidden | None) -> tuple[Hidden | None, tuple[Tensor, ...]]:
        """The hidden states that enter, and the tangents of those of floating point."""
        if hidden is None:
            return None, ()
        states, floats = 0, 0
        while states + floats < len(hidden):
            floats += hidden[states].is_floating_point()
            states += 1
        entered = []
        for tensor in hidden[:states]:
            arrived = tensor.to(self._device)
            if arrived.is_floating_point():
                graph = self._work.differentiates and self._work.matrix != "hessian"
                arrived = arrived.to(self._dtype).detach().requires_grad_(graph)
            entered.append(arrived)
        moved = tuple(t.to(self._device, self._dtype) for t in hidden[states:])
        return tuple(entered), moved

    def _call(self, batch: Batch, entered: Hidden | None) -> Callable[..., tuple[Tensor, ...]]:
        """The stage as a function of parameters and entering tensors of floating point."""

        def call(parameters: Tensors, floats: Sequence[Tensor]) -> tuple[Tensor, ...]:
            ahead, given = iter(floats), None
            if entered is not None:
                given = tuple(next(ahead) if t.is_floating_point() else t for t in entered)
            with self._parameters.replaced(parameters):
                left = self._segment.forward(batch, _own(given))
            return tuple(tensor for tensor in left if tensor.is_floating_point())

        return call

    def _head(self, batch: Batch) -> Callable[[Tensors, Tensor, int], Tensor]:
        def head(parameters: Tensors, part: Tensor, start: int) -> Tensor:
            with self._parameters.replaced(parameters):
                return self._segment.head(part, batch)

        return head

    def _moved(
        self, batch: Batch, entered: Hidden | None, moved: tuple[Tensor, ...], left: Hidden
    ) -> tuple[Tensor, ...]:
        if not (self._tangents or moved):
            return tuple(t.new_zeros((self._count, *t.shape)) for t in left)
        floats = [t.detach() for t in entered or () if t.is_floating_point()]
        call = self._call(batch, entered)
        return self._tried(
            lambda together: forward_tangents(
                call, self._parameters.own, floats, self._tangents, moved, together
            )
        )

    def _tried(self, find: Callable[[bool], T]) -> T:
        """What a function finds of all directions at once; of models whose code does not bear that,
        from then on of one after the other."""
        if not self.apart:
            try:
                return find(True)
            except RuntimeError as error:
                if says_no_memory(error):
                    raise
                self.apart = in_words(error)
        with user_errors(
            "the model",
            "operations that have forward derivatives",
            "Load it with another attention (attn_implementation eager or sdpa), or write that "
            "operation with others of torch's.",
            RuntimeError,
        ):
            return find(False)

    def _transposed(
        self, opened: _Open, cotangents: Sequence[Tensor], back: list[list[Tensor]]
    ) -> Iterator[dict[str, Tensor]]:
        """``Jᵀ c_q`` of the parameters; adds those of what entered to ``back``."""
        entered = [t for t in opened.entered or () if t.is_floating_point()]
        left = [(y, c) for y, c in zip(opened.left, cotangents, strict=True) if y.requires_grad]
        names = list(opened.leaves)
        for q in range(self._count):
            found: Sequence[Tensor | None] = [None] * (len(names) + len(entered))
            if left:
                found = torch.autograd.grad(
                    [y for y, _ in left], [*opened.leaves.values(), *entered],
                    [c[q] for _, c in left], retain_graph=q + 1 < self._count, allow_unused=True,
                )  # fmt: skip
            own, others = found[: len(names)], found[len(names) :]
            pairs = zip(entered, others, strict=True)
            back.append([torch.zeros_like(x) if g is None else g for x, g in pairs])
            yield {name: g for name, g in zip(names, own, strict=True) if g is not None}

    def _hessian(
        self, opened: _Open, cotangents: Sequence[Tensor], leaving: list[list[Tensor]]
    ) -> Iterator[dict[str, Tensor]]:
        """How ``Jᵀ ḡ`` changes along every direction; adds what goes back to ``leaving``."""
        call = self._call(opened.batch, opened.entered)
        floats = tuple(t.detach() for t in opened.entered or () if t.is_floating_point())
        own, tangents = self._parameters.own, self._tangents
        if not tangents:
            tangents = {n: p.new_zeros((self._count, *p.shape)) for n, p in own.items()}
        for q in range(self._count):

            def back(outputs: tuple[Tensor, ...], moved: tuple[Tensor, ...], q: int = q) -> Tensor:
                of = zip(cotangents, outputs, moved, strict=True)
                return torch.stack(
                    [(c[0] * dy).sum() + (c[1 + q] * y).sum() for c, y, dy in of]
                ).sum()

            found = second(
                call, own, floats, {name: d[q] for name, d in tangents.items()},
                [d[q] for d in opened.moved], back,
            )  # fmt: skip
            if q == 0:
                leaving.append(list(found.gradients))
            leaving.append(list(found.inputs))
            yield found.parameters


def _own(entered: Hidden | None) -> Hidden | None:
    # A layer may change its input in place, which a leaf of the graph would not bear.
    return None if entered is None else tuple(tensor.clone() for tensor in entered)
