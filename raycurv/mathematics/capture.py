"""What a microbatch leaves for curvature: every block's inputs and output gradients, as rows.

Weights are frozen, so no weight gradient is computed; the exact per-example gradient of a block is
the sum of ``g aᵀ`` over its captured rows, which :mod:`raycurv.mathematics.capture_check` proves.
How its kind of weight is caught and laid out as rows is the kind's own business
(:mod:`raycurv.mathematics.kinds.kind`).

Axis letters: N examples, T rows of an example (tokens x calls of the module, or output positions),
S groups of a convolution, I inputs (with the bias column), O outputs.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from raycurv.batch import Batch
from raycurv.errors import NumericalError, RaycurvError, UserError
from raycurv.mathematics.blocks import Block, role
from raycurv.mathematics.kinds.catalogue import kind_of, kind_of_block, own_parameter
from raycurv.mathematics.kinds.kind import Kind, ModuleCall, Note


@dataclass(frozen=True)
class Captured:
    """What one microbatch leaves for curvature, for one draw of labels.

    Attributes:
        inputs: input factor -> ``a [N, T, I]`` (``[N, T, S, I]`` when grouped), zero at padding;
            where examples have several sequences, T are the rows of all of them.
        columns: input factor -> numbers ``[U]`` of the input columns that its rows ``[N, T, U]``
            are of, where the others are zero; no entry where rows have all columns.
        gradients: block -> ``g [N, T, O]``, zero at padding, or ``None`` where no gradient arrived.
        rows: input factor -> how many rows were not padding.
        first_draw: whether this is the first draw of the microbatch; inputs are the same in all.
        own: whether the labels are the data's own.
        positions: of a block's rows, ``[N, T]``, where these are not the positions in their order,
            call after call (then ``None``).
        live: input factor -> numbers ``[R]`` of the rows that count, among ``N·T``, where products
            of all rows shall be of these alone; no entry for products of all.
        products: of a product of the curvature, whose draws are directions: block -> what the
            microbatch adds to it, ``[O, I]``. There is nothing else then.
    """

    batch: Batch
    inputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor | None]
    rows: Mapping[str, int]
    first_draw: bool = True
    own: bool = False
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    positions: Callable[[Block], Tensor | None] = lambda block: None
    live: Mapping[str, Tensor] = field(default_factory=dict)
    products: Mapping[str, Tensor] = field(default_factory=dict)


def of_fit(draws: Sequence[Captured]) -> Sequence[Captured]:
    """The draws that curvature is fitted to: of drawn labels, or where there are none, all."""
    return [captured for captured in draws if not captured.own] or draws


@dataclass
class Record:
    """The open graph of one microbatch: what the hooks saw in its forward."""

    batch: Batch
    calls: dict[str, list[ModuleCall]] = field(default_factory=dict)
    span: tuple[int, int] | None = None
    draw: int = 0

    @contextmanager
    def positions(self, start: int, count: int) -> Iterator[None]:
        """Tell the hooks that a slice of ``count`` positions from ``start`` on passes through."""
        self.span = (start, count)
        try:
            yield
        finally:
            self.span = None


class Capture:
    """Captures the blocks of one stage.

    Several microbatches may be open at once; each has its own :class:`Record`. Gradients are caught
    by hooks, so a backward has to run through all of the graph: ``torch.autograd.backward``, and
    not ``grad``, which takes only the ways that lead to what it is asked for.

    Attributes:
        blocks: by name.
        kinds, modules: of each block, by its name.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[Block]) -> None:
        self.blocks = {block.name: block for block in blocks}
        self._record: Record | None = None
        self._backward = False
        self.kinds: dict[str, Kind] = {block.name: kind_of_block(block) for block in blocks}
        owners = {name: module.get_submodule(name) for name in {b.module for b in blocks}}
        self.modules = {block.name: owners[block.module] for block in blocks}
        self._uses = {
            block.name: (
                _Use(block, self.kinds[block.name], self.modules[block.name]),
                *(_other_use(block, name, module) for name in block.shared),
            )
            for block in blocks
        }
        self._layouts = {name: uses[0].layout for name, uses in self._uses.items()}
        together: dict[tuple[int, str, Kind], list[_Use]] = {}
        for uses in self._uses.values():
            for number, use in enumerate(uses):
                together.setdefault((number, use.block.module, use.kind), []).append(use)
        self._ends: list[Callable[[], object]] = []
        for (number, _, kind), (first, *others) in together.items():
            for parameter in first.module.parameters():
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self._ends.append(partial(parameter.requires_grad_, True))
            note = _noting(weakref.ref(self), number)
            mine = [use.block for use in (first, *others)]
            self._ends.append(kind.catch(first.module, mine, note))

    def close(self) -> None:
        """Leave the modules as they were."""
        for end in self._ends:
            end()

    @contextmanager
    def recording(self, record: Record) -> Iterator[Record]:
        """Within it, calls of the blocks' modules go into ``record``."""
        self._record = record
        try:
            yield record
        finally:
            self._record = None

    @contextmanager
    def going_back(self) -> Iterator[None]:
        """Within it, a part of the forward that runs again for the backward (a checkpoint) makes
        the graph that it made when it was recorded."""
        self._backward = True
        try:
            yield
        finally:
            self._backward = False

    def discover(self, record: Record) -> tuple[Block, ...]:
        """The blocks with their input factors, found by which of them read the same tensor; those
        that have one keep it."""
        first: dict[object, str] = {}
        found = []
        for name, block in self.blocks.items():
            if block.input_factor:
                found.append(block)
                continue
            calls = record.calls.get(name)
            key: object = name if calls is None else self._key(block, calls)
            found.append(replace(block, input_factor=first.setdefault(key, f"{name}.input")))
        return tuple(found)

    def _key(self, block: Block, calls: Sequence[ModuleCall]) -> object:
        """Equal for blocks whose input factor is the same: the same tensors, the same columns."""
        tensors = tuple(
            (*_place(c.x), c.x.shape, c.x.stride(), c.version, c.x.dtype, c.start, id(c.detail))
            for c in calls
        )
        return tensors, block.bias, self._layouts[block.name]

    def captured(self, record: Record, draw: int = 0, own: bool = False) -> Captured:
        """Rows of inputs and gradients of a microbatch whose backward has run for a draw;
        RaycurvError if an input was changed in place after its capture, or blocks that shared one
        in the first microbatch no longer do."""
        by_factor: dict[str, list[Block]] = {}
        for block in self.blocks.values():
            by_factor.setdefault(block.input_factor, []).append(block)
        inputs: dict[str, Tensor] = {}
        columns: dict[str, Tensor] = {}
        counting: dict[str, Tensor] = {}
        rows: dict[str, int] = {}
        gradients: dict[str, Tensor | None] = dict.fromkeys(self.blocks)
        for factor, blocks in by_factor.items():
            called = [block for block in blocks if block.name in record.calls]
            if called:
                self._check_shared(record, factor, called)
                # The same rows of the same tensors: what is padding in one is so in all.
                parts, live, support = self._inputs(record, called[0], draw)
                if not any(part.shape[1] for part in parts):
                    continue  # of an expert that no token met
                kind = self.kinds[called[0].name]
                one_row = kind.one_row
                joined = _by_example(parts[0] if one_row else _joined(parts), record.batch)
                inputs[factor] = joined[:, :1] if one_row else joined
                if support is not None:
                    columns[factor] = support
                rows[factor] = sum(
                    part.shape[0] * part.shape[1] if mask is None else int(mask.sum())
                    for part, mask in zip(parts[:1] if one_row else parts, live, strict=False)
                ) // (record.batch.sequences if one_row else 1)
                if kind.ragged and rows[factor] < inputs[factor].shape[:2].numel():
                    counting[factor] = _counting(parts, live)
                for block in called:
                    gradients[block.name] = self._gradients(record, block, parts, live, draw)
        positions = partial(self._positions, record)
        return Captured(
            record.batch, inputs, gradients, rows, draw == 0, own, columns, positions, counting
        )

    def _positions(self, record: Record, block: Block) -> Tensor | None:
        kind = self.kinds[block.name]
        parts = [kind.positions(block, call) for call in record.calls[block.name]]
        known = [part for part in parts if part is not None]
        return _by_example(_joined(known), record.batch) if len(known) == len(parts) else None

    def _check_shared(self, record: Record, factor: str, called: Sequence[Block]) -> None:
        keys = {self._key(block, record.calls[block.name]) for block in called}
        if len(keys) > 1:
            names = ", ".join(block.name for block in called)
            raise RaycurvError(
                f"input factor {factor} in microbatch {record.batch.index}",
                f"one tensor for all of {names}, as in the first microbatch",
                "different tensors",
                f"The model's wiring depends on its input: leave out all but one with --blocks "
                f"'!{called[-1].name}'.",
            )

    def _inputs(
        self, record: Record, block: Block, draw: int
    ) -> tuple[list[Tensor], list[Tensor | None], Tensor | None]:
        """Of each call its rows ``[N, T, I]``, and which count, ``[N, T]``, where not all do; and
        of all calls the columns that rows have, where not all are there."""
        parts, live, calls = [], [], record.calls[block.name]
        uses = self._uses[block.name]
        support = None
        if all(uses[call.use].kind is uses[0].kind for call in calls):
            support = uses[0].kind.support(block, calls)
        for call in calls:
            use = uses[call.use]
            call.columns = support
            if call.x._version != call.version:
                raise RaycurvError(
                    f"block {block.name}",
                    "an input that is not changed after the layer has read it",
                    "a tensor that an in-place operation has changed since",
                    "Make that operation out of place, or leave the block out: "
                    f"--blocks '!{block.name}'.",
                )
            a = use.inputs(call, block.d_in, draw)
            if block.bias:
                a = torch.cat([a, a.new_ones((*a.shape[:-1], 1))], dim=-1)
            mask = use.kind.live_rows(use.block, call, call.mask, a.shape[1])
            if mask is not None and mask.all():
                mask = None
            zero = use.kind.ragged and not block.bias
            if mask is not None and not zero:
                swapped = use.swapped
                a = _at_tokens(a, mask, block, record.batch) if swapped else _masked(a, mask)
            parts.append(a)
            live.append(mask)
        return parts, live, support

    def _gradients(
        self,
        record: Record,
        block: Block,
        inputs: Sequence[Tensor],
        live: Sequence[Tensor | None],
        draw: int,
    ) -> Tensor | None:
        calls, parts = record.calls[block.name], []
        if all(draw not in call.g for call in calls):
            return None
        for call, a, mask in zip(calls, inputs, live, strict=True):
            if draw not in call.g:
                parts.append(a.new_zeros((*a.shape[:2], block.d_out)))
                continue
            use = self._uses[block.name][call.use]
            g = use.outputs(call, draw)
            if mask is not None and not use.kind.ragged:
                swapped = use.swapped
                g = _masked(g, mask) if swapped else _at_tokens(g, mask, block, record.batch)
            parts.append(g)
        if self.kinds[block.name].one_row:
            return _by_example(torch.stack(parts).sum(dim=0), record.batch).sum(dim=1, keepdim=True)
        return _by_example(_joined(parts), record.batch)


@dataclass(frozen=True)
class _Use:
    """A module that has a block's weight.

    Attributes:
        block: as the module's own kind describes it.
        swapped: whether that kind's matrix is the block's transposed: what leaves the module then
            stands for the input, and what enters it for the gradient.
    """

    block: Block
    kind: Kind
    module: nn.Module
    swapped: bool = False

    @property
    def layout(self) -> object:
        # Of a weight that several modules have the rows are no other block's.
        own = (self.block.name, self.block.shared) if self.block.shared else None
        return self.kind.layout(self.block, self.module) if own is None else own

    def inputs(self, call: ModuleCall, d_in: int, draw: int) -> Tensor:
        """Rows ``[N, T, I]`` of the block's input side."""
        a = self.kind.input_rows(self.block, self.module, call)
        if not self.swapped:
            return a
        if draw not in call.g:
            return a.new_zeros((*a.shape[:2], d_in))
        return self.kind.output_rows(self.block, self.module, call, call.g[draw])

    def outputs(self, call: ModuleCall, draw: int) -> Tensor:
        """Rows ``[N, T, O]`` of the block's output side."""
        if self.swapped:
            return self.kind.input_rows(self.block, self.module, call)
        return self.kind.output_rows(self.block, self.module, call, call.g[draw])


def _other_use(block: Block, name: str, whole: nn.Module) -> _Use:
    """The use of a block's weight by another module than its own."""
    module, weight = whole.get_submodule(name), own_parameter(whole, _path(block))
    kind = kind_of(module)
    assert kind is not None and weight is not None, f"{name}, which shares {block.name}"
    as_here = replace(block, kind=kind.name, module=name)
    swapped = kind.to_rows(weight).stride() != kind_of_block(block).to_rows(weight).stride()
    return _Use(as_here, kind, module, swapped)


def _path(block: Block) -> str:
    return f"{block.module}.{block.parameter}"


def _counting(parts: Sequence[Tensor], live: Sequence[Tensor | None]) -> Tensor:
    """Numbers of the rows that count, among those of all calls behind each other."""
    masks = [
        part.new_ones(part.shape[:2], dtype=torch.bool) if mask is None else mask
        for part, mask in zip(parts, live, strict=True)
    ]
    return _joined(masks).flatten().nonzero()[:, 0]


def _masked(rows: Tensor, live: Tensor) -> Tensor:
    """Rows ``[N, T, ...]`` with zeros in those that do not count."""
    return rows * live.view(*live.shape, *([1] * (rows.ndim - 2))).to(rows.dtype)


def _at_tokens(g: Tensor, live: Tensor, block: Block, batch: Batch) -> Tensor:
    """Gradients ``[N, T, O]`` that are zero at padding, but for rounding; else UserError."""
    there = g[~live]
    if not there.any():
        return g
    share = float(there.norm() / g.norm())
    if share > math.sqrt(torch.finfo(g.dtype).eps):
        n = int((g.abs().sum(dim=2) * ~live).sum(dim=1).argmax()) // batch.sequences
        raise UserError(
            f"block {block.name}, example {batch.ids[n]!r}",
            "no gradient at padding, of which nothing is to depend",
            f"{share:.2g} of the gradient: the objective reads outputs behind an example's last "
            "token, layers mix these with its tokens, or the layer's input has another axis "
            f"as long as the {live.shape[1]} positions",
            "Let the objective follow batch.mask, or read batch.at_last(outputs); let the forward "
            "take an attention_mask; or give --batch-tokens 1, with which nothing is padded.",
        )
    return _masked(g, live)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows of several calls behind each other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _by_example(rows: Tensor, batch: Batch) -> Tensor:
    """Rows ``[N S, T, ...]`` of sequences as ``[N, S T, ...]`` of examples."""
    each = batch.sequences
    return rows if each == 1 else rows.reshape(batch.size, each * rows.shape[1], *rows.shape[2:])


def _place(x: Tensor) -> tuple[int, int]:
    """Equal for tensors that lie in the same memory; on the meta device, where none has any, too.

    torch keeps one Python object for a storage as long as the storage lives.
    """
    return id(x.untyped_storage()), int(x.storage_offset())


def check_finite(captured: Captured) -> None:
    """Refuse inputs and gradients that are not finite, with a NumericalError that names the factor
    and the example."""
    tensors: list[tuple[str, Tensor]] = list(captured.inputs.items())
    tensors += [(f"{name}.output", g) for name, g in captured.gradients.items() if g is not None]
    for name, tensor in tensors:
        # One number tells: a sum of finite numbers that overflows has squares that do so, too.
        if not torch.isfinite(tensor.sum()):
            finite = torch.isfinite(tensor.square()).flatten(1).all(dim=1)
            example = captured.batch.ids[int((~finite).nonzero()[0])]
            raise NumericalError(
                f"factor {name}, example {example!r}",
                "finite inputs and gradients",
                "NaN or infinity",
                "Leave the example out, or run the model in a wider --dtype.",
            )


class _Root(torch.autograd.Function):
    # Of the anchor, whose only use is to require a gradient, and an output. A copy, so that the
    # model may go on to change it in place.
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def _rooted(y: Any) -> Any:
    """A module's output, with a graph that starts here where everything before is frozen; never a
    view, whose hooks an in-place operation of the model's would leave behind without a word."""
    if not isinstance(y, Tensor) or not torch.is_grad_enabled():
        return y
    if y.requires_grad:
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y
    anchor = torch.zeros((), device=y.device, requires_grad=True)
    return _Root.apply(anchor, y)  # type: ignore[no-untyped-call]


def _noting(capture: weakref.ref[Capture], use: int) -> Note:
    def note(blocks: str | Sequence[str], x: Any, y: Any, detail: Any = None) -> Any:
        owner = capture()
        if owner is not None and owner._backward:
            return _rooted(y)
        record = None if owner is None else owner._record
        if record is None:
            return y
        names = (blocks,) if isinstance(blocks, str) else tuple(blocks)
        block = names[0]
        if any(isinstance(t, Tensor) and is_functorch_wrapped_tensor(t) for t in (x, y)):
            raise UserError(
                f"block {block}",
                "a module that is called with plain tensors, examples first",
                "a call inside vmap, grad or another of torch.func",
                f"Call it outside of that, or leave it out: --blocks '!{block}'.",
            )
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise UserError(
                f"block {block}",
                "a module that maps one tensor to one tensor",
                f"{type(x).__name__} to {type(y).__name__}",
                f"Leave out what is like it: --blocks '!{role(block)}'.",
            )
        assert owner is not None
        mine = owner._uses[block][use]
        if record.span is not None and not mine.kind.in_slices:
            return y
        x, y = mine.kind.by_example(mine.block, mine.module, x, y, record.batch)
        mask = record.batch.mask_of(x)
        start, positions = record.span or (None, None)
        if record.span is None and mask is not None:
            positions = mask.shape[1]
        if mask is not None and positions is not None:
            mask = mask[:, start or 0 : (start or 0) + positions]
        sequences = record.batch.rows
        call = ModuleCall(
            x.detach(), x._version, sequences, start, positions, mask, detail, use=use
        )
        for name in names:
            record.calls.setdefault(name, []).append(call)
        y = _rooted(y)
        if not y.requires_grad:
            return y

        def keep(g: Tensor) -> None:
            call.g[record.draw] = g.detach()

        y.register_hook(keep)
        return y

    return note
