"""What one forward of a model on the meta device shows: shared inputs, kept activations, FLOPs.

No weights are needed, and no memory: the skeleton runs as it would with values, while hooks look at
the sizes of what they would keep.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raycurv.batch import Batch
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Capture, Record
from raycurv.mathematics.kinds.catalogue import kind_of, kind_of_block
from raycurv.models.model import Outline
from raycurv.models.own_copies import copied
from raycurv.planning.alike import Alike

META = torch.device("meta")


@dataclass(frozen=True)
class Trace:
    """What a microbatch of ``[examples, positions]`` leaves in each unit of a model.

    Attributes:
        blocks: with their input factors.
        seen: whether the model could be run; otherwise every block has an input of its own, and
            what is kept is what the hooks capture alone.
        kept: bytes that each unit keeps for its backward, captured inputs included.
        flops: of each unit's forward (a multiplication and an addition are two).
        head_flops: of what runs behind the last unit.
        shares: rows of a block for each position, where that is not one.
        units: what stands for the blocks of each unit.
    """

    blocks: tuple[Block, ...]
    seen: bool
    kept: tuple[int, ...]
    flops: tuple[int, ...]
    head_flops: int
    shares: Mapping[str, float]
    units: tuple[Alike, ...]


def trace(
    outline: Outline, blocks: Sequence[Block], examples: int, positions: int, dtype: torch.dtype
) -> Trace:
    """Run the model once without values, if it can be, and watch."""
    skeleton = outline.skeleton()
    if _dtype_of(skeleton) != dtype and _on_meta(skeleton):
        skeleton = copied(skeleton, f"model {outline.name}").to(dtype)
    if not _on_meta(skeleton):
        return _unseen(outline, blocks, examples, positions, dtype)
    watcher = _Watcher(outline)
    capture = Capture(skeleton, blocks)
    record = Record(Batch(0, ("",) * examples, torch.empty(examples, positions, device=META)))
    try:
        with watcher.watching(skeleton), capture.recording(record):
            if not outline.rehearse(skeleton, examples, positions):
                return _unseen(outline, blocks, examples, positions, dtype)
    finally:
        capture.close()
    shares: dict[str, float] = {}
    for name, calls in record.calls.items():
        share = 0.0
        for call in calls:
            watcher.keep(outline.unit_of(capture.blocks[name].module), call.x)
            share += capture.kinds[name].share(call)
        if share != len(calls):
            shares[name] = share
    found = capture.discover(record)
    return Trace(
        found,
        True,
        tuple(watcher.kept),
        tuple(watcher.flops[:-1]),
        watcher.flops[-1],
        shares,
        _by_unit(outline, found, shares),
    )


def _by_unit(
    outline: Outline, blocks: Sequence[Block], shares: Mapping[str, float]
) -> tuple[Alike, ...]:
    found: list[list[Block]] = [[] for _ in range(outline.units)]
    for module, mine in itertools.groupby(blocks, lambda block: block.module):
        found[outline.unit_of(module)] += mine
    return tuple(Alike.of(mine, shares) for mine in found)


def _unseen(
    outline: Outline, blocks: Sequence[Block], examples: int, positions: int, dtype: torch.dtype
) -> Trace:
    kept, flops, rows = [0] * outline.units, [0] * outline.units, examples * positions
    named = tuple(replace(b, input_factor=b.input_factor or f"{b.name}.input") for b in blocks)
    shares = {b.name: 1 / positions for b in named if kind_of_block(b).one_row and positions > 1}
    for block in named:
        unit = outline.unit_of(block.module)
        # What is diagonal on the input side is looked up, or multiplied number by number.
        d_in = 1 if block.input_diagonal else block.d_in
        here = round(rows * shares.get(block.name, 1))
        kept[unit] += here * (d_in + block.d_out) * dtype.itemsize
        flops[unit] += 2 * here * d_in * block.d_out
    units = _by_unit(outline, named, shares)
    return Trace(named, False, tuple(kept), tuple(flops), 0, shares, units)


def _on_meta(skeleton: nn.Module) -> bool:
    return all(p.device == META for p in skeleton.parameters())


def _dtype_of(skeleton: nn.Module) -> torch.dtype:
    return next((p.dtype for p in skeleton.parameters()), torch.float32)


@dataclass
class _Watcher:
    """Books every tensor that is saved for the backward, once, on the unit that is running."""

    outline: Outline
    unit: int | None = None
    kept: list[int] = field(init=False)
    flops: list[int] = field(init=False)
    _storages: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kept = [0] * self.outline.units
        self.flops = [0] * (self.outline.units + 1)

    def keep(self, unit: int | None, tensor: Tensor) -> None:
        """Book the memory of a tensor, unless it is booked already."""
        storage = tensor.untyped_storage()
        if unit is not None and id(storage) not in self._storages:
            self._storages[id(storage)] = storage
            self.kept[unit] += storage.nbytes()

    def multiply(self, flops: int) -> None:
        """Book FLOPs."""
        self.flops[-1 if self.unit is None else self.unit] += flops

    @contextmanager
    def watching(self, skeleton: nn.Module) -> Iterator[None]:
        """Within it, what the modules do is booked."""
        for parameter in skeleton.parameters():
            # Weights are frozen: they are saved for the backward, but not on its account.
            self._storages[id(parameter.untyped_storage())] = parameter.untyped_storage()
        with ExitStack() as stack:
            for name, module in skeleton.named_modules():
                hook = module.register_forward_pre_hook(self._enter(name))
                stack.callback(hook.remove)
            stack.enter_context(_FusedAttention(self.multiply))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(
                torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)
            )
            yield

    def _enter(self, name: str) -> Callable[[nn.Module, Any], None]:
        scope = self.outline.default_scope
        inside = not scope or any(name.startswith(prefix) for prefix in scope)
        unit = self.outline.unit_of(name) if inside else None

        def enter(module: nn.Module, args: Any) -> None:
            self.unit = unit
            kind = kind_of(module)
            if kind is not None and args and isinstance(args[0], Tensor):
                self.multiply(kind.flops(module, *args))

        return enter

    def _save(self, tensor: Tensor) -> Tensor:
        self.keep(self.unit, tensor)
        return tensor


class _FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels do it: they keep what enters and leaves, never T x T scores.

    The meta device would take the way of plain products, which keeps them.
    """

    def __init__(self, multiply: Callable[[int], None]) -> None:
        super().__init__()
        self._multiply = multiply

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        widths = query.shape[-1] + value.shape[-1]
        self._multiply(2 * math.prod(query.shape[:-1]) * key.shape[-2] * widths)
        return cast(Any, _Fused).apply(query, key, value)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("a trace has no backward")
