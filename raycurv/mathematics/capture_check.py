"""Proof that what is captured of a block is the gradient of its weight.

    captured   Σ_n s_n Σ_t g_nt a_ntᵀ                  of the rows of a forward and backward for f
    autograd   ∇_W Σ_n s_n f_n                         of the weight itself, wherever it is used

``f_n`` is a random linear function of what leaves the layers for example n, and ``s`` weights two
examples by 1 and -1/2. Both sides are linear in each ``f_n`` by itself: so they agree for random
ones (almost surely) only if they agree for every loss, if the rows of an example hold its own
gradient and nothing of the other's (whose part would have the other's weight), and if the weight is
used by the module's own calls alone. Signs and powers of two are exact in every dtype: a difference
is an error, or rounding.

Two examples of some dozen tokens show it: a forward and a backward with hooks, and a forward
and a backward with the weights' gradients, which are compared and dropped one at a time. Both
forwards are torch's own, in the same order, so that their activations are equal bit for bit: no
unit near its kink, and no token between two experts, can make them differ.

Axis letters as in :mod:`raycurv.mathematics.capture`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from raycurv.batch import Batch
from raycurv.errors import UserError, users_code
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Capture, Captured, Record
from raycurv.mathematics.choice import leaving_out
from raycurv.mathematics.gradients import PIECE, example_gradients

# Of the microbatch that is looked at: how many examples, and positions of each where a model takes
# any number.
EXAMPLES, POSITIONS = 2, 64
# Largest ‖captured − autograd‖ over the larger of both norms. Sums of some hundred rows in another
# order differ by 1e-15 in float64 and 1e-6 in float32; in bfloat16 autograd rounds every entry to
# 8 bits, and each partial sum of a layer that is called several times (1e-2). Models compute some
# parts in float32 whatever their dtype, routers and scans (1e-7).
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 2e-2}

# Runs the layers of a stage, and its head, on the microbatch of a record; gives what leaves them,
# with the first position of each.
Through = Callable[[Record], Sequence[tuple[Tensor, int]]]


@dataclass(frozen=True)
class Agreement:
    """How well captured gradients agreed with autograd's.

    Attributes:
        worst: relative error of the block that agreed least.
        block: its name.
        tolerance: what would have been refused.
        seconds: that the check took.
    """

    worst: float
    block: str
    tolerance: float
    seconds: float

    def joined(self, other: Agreement) -> Agreement:
        """The agreement of the blocks of both: the worse one, and the seconds of both."""
        one = max(self, other, key=lambda agreement: agreement.worst)
        return Agreement(one.worst, one.block, one.tolerance, self.seconds + other.seconds)


@dataclass
class _Norms:
    """Squared norms of a block's gradients: captured, autograd's, their difference."""

    captured: float = 0.0
    autograd: float = 0.0
    difference: float = 0.0

    def relative(self, floor: float) -> float:
        """The difference over the larger of both, and of a floor; 0 where the captured gradient is
        not finite, which is found where it is used, and infinity where autograd's alone is not."""
        if not self.difference or not math.isfinite(self.captured):
            return 0.0
        if not math.isfinite(self.autograd):
            return math.inf
        return math.sqrt(self.difference / max(self.captured, self.autograd, floor * floor))


def chosen_examples(batch: Batch) -> list[int]:
    """Which examples of a microbatch are looked at: its longest and its shortest."""
    if batch.size <= EXAMPLES:
        return list(range(batch.size))
    tokens = batch.tokens()
    longest, shortest = int(tokens.argmax()), int(tokens.argmin())
    return [0, 1] if longest == shortest else [longest, shortest]


def disagreements(
    capture: Capture, batch: Batch, through: Through, dtype: torch.dtype
) -> dict[str, float] | None:
    """Relative error of every block's captured gradient for a microbatch of one or two examples.

    ``None`` if what leaves has no axis of examples, by which it could be weighted; UserError if the
    rows of a block cannot be told apart by example.

    Args:
        through: called once with hooks, and once with the weights' gradients.
        dtype: of the model's computation.
    """
    device = batch.inputs.device
    with _same_randomness(device), torch.enable_grad():
        record = Record(batch)
        with capture.recording(record):
            roots = list(through(record))
        if not roots or (batch.size > 1 and roots[0][0].shape[:1] != (batch.rows,)):
            return None
        with capture.going_back():
            _back(roots, batch, [1.0] * batch.size)
        # Of others (class numbers, complex ones) the objective says what is wrong.
        real = any(root.is_floating_point() for root, _ in roots)
        del roots
        captured = capture.captured(record)
        del record
    if real and all(g is None for g in captured.gradients.values()):
        raise UserError(
            "the model",
            "a forward through which gradients reach its weights",
            f"one that leads to none of {len(capture.blocks)} blocks, {next(iter(capture.blocks))} "
            "among them",
            "Let the forward keep a graph: not under torch.no_grad, nor in a function of autograd "
            "that differentiates its weights alone (reversible layers).",
        )
    scales = [1.0, -0.5][: batch.size]
    sides = _Sides(capture, captured, scales, dtype)
    with _same_randomness(device), torch.enable_grad(), sides.watching():
        _back(through(Record(batch)), batch, scales)
    return sides.relative()


def cause(module: nn.Module, flags: str, together: bool) -> tuple[str, str]:
    """The likely reason why a block disagrees, and the remedy.

    Args:
        module: that holds the block.
        flags: that leave it out, and others that disagree.
        together: whether it agrees for an example alone.
    """
    leave_out = f"leave it out with {flags}"
    if together:
        return (
            "for an example alone they agree: its rows mix examples (an axis before the examples, "
            "say), or padding enters the result",
            f"Put the examples on the first axis inside the model, or {leave_out}.",
        )
    name = type(module).__name__
    standard = type(module).__module__.startswith(("torch.nn.", "transformers."))
    if not standard and not parametrize.is_parametrized(module):
        return (
            f"{name} computes something else than its weight times its input, or the weight is "
            "used beside the module's own calls as well",
            f"{leave_out[0].upper()}{leave_out[1:]}; or write it with a parametrization, or give "
            "--no-check-capture for the curvature of the matrix that multiplies the input.",
        )
    return (
        "the weight is used beside the module's own calls, too (an autoencoder may take its "
        "encoder's)",
        f"{leave_out[0].upper()}{leave_out[1:]}, or have its module do all of it.",
    )


def refuse(capture: Capture, errors: dict[str, float], together: bool, tolerance: float) -> None:
    """Refuse the block that disagrees most, with a UserError."""
    block = max(errors, key=lambda name: errors[name])
    wrong = [name for name, error in errors.items() if error > tolerance]
    flags = leaving_out(wrong, errors.keys() - set(wrong))
    why, remedy = cause(capture.modules[block], flags, together)
    others = len(wrong) - 1
    more = f"; {others} more block{'s' * (others > 1)} disagree" if others else ""
    raise UserError(
        f"block {block}",
        f"the gradient of its weight from what enters and leaves its module (within "
        f"{tolerance:g}), as autograd gives it for the weight itself",
        f"a relative error of {errors[block]:.2g}: {why}{more}",
        remedy,
    )


@contextmanager
def _same_randomness(device: torch.device) -> Iterator[None]:
    """The body starts with the generators as they are, and leaves them so."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _back(roots: Sequence[tuple[Tensor, int]], batch: Batch, scales: Sequence[float]) -> None:
    """Differentiate the sum over examples of ``scales`` times their random linear functions: a
    sign for each number of a root, half of the root's before. What leaves the layers may be what
    the head gives, too, and signs of the same size would cancel out, all of those of an example
    with a single number at times."""
    tensors, cotangents = [], []
    for number, (root, start) in enumerate(roots):
        if not root.requires_grad or not root.is_floating_point():
            continue
        if batch.size > 1 and root.shape[:1] != (batch.rows,):
            continue  # what all examples share
        generator = torch.Generator().manual_seed(number)
        signs = torch.randint(0, 2, root.shape, generator=generator, dtype=torch.int8)
        cotangent = (2 * signs - 1).to(root.device, root.dtype) * 2.0**-number
        if batch.mask is not None and root.ndim > 1:
            live = batch.mask[:, start : start + root.shape[1]]
            if live.shape == root.shape[:2]:
                cotangent *= live.view(*live.shape, *([1] * (root.ndim - 2))).to(root.dtype)
        if batch.size > 1:
            weights = torch.tensor(scales, dtype=root.dtype, device=root.device)
            weights = weights.repeat_interleave(batch.sequences)
            cotangent *= weights.view(-1, *([1] * (root.ndim - 1)))
        tensors.append(root)
        cotangents.append(cotangent)
    if tensors:
        with users_code(
            "the model",
            "layers whose backward runs, as it does in training",
            "Correct the forward: an in-place operation may have changed what a layer keeps for "
            "its backward.",
        ):
            torch.autograd.backward(tensors, cotangents)


@dataclass
class _Sides:
    """Both sides of every block: rows, and the norms that are known so far.

    The gradient of a weight is compared as soon as autograd has it, and dropped: so only a few are
    ever there.
    """

    capture: Capture
    captured: Captured
    scales: Sequence[float]
    dtype: torch.dtype
    _norms: dict[str, _Norms] = field(default_factory=dict)
    _seen: set[tuple[str, str]] = field(default_factory=set)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, weights have gradients, which are compared with what was captured."""
        by_tensor: dict[tuple[str, str], list[Block]] = {}
        for block in self.capture.blocks.values():
            for name in self.capture.kinds[block.name].parameters(block):
                by_tensor.setdefault((block.module, name), []).append(block)
        with ExitStack() as stack:
            stack.enter_context(parametrize.cached())
            for (_, name), blocks in by_tensor.items():
                module = self.capture.modules[blocks[0].name]
                weight = attrgetter(name)(module)
                if isinstance(weight, nn.Parameter) or parametrize.is_parametrized(module, name):
                    self._watch(stack, weight, name, blocks)
                else:
                    self._watch_computed(stack, module, name, blocks)
            yield

    def relative(self) -> dict[str, float]:
        """Relative error of each block."""
        found = {}
        for name, block in self.capture.blocks.items():
            for parameter in self.capture.kinds[name].parameters(block):
                if (name, parameter) not in self._seen:
                    self._compare(block, parameter, None)
            found[name] = self._norms[name].relative(self._floor(block))
        return found

    def _watch(self, stack: ExitStack, weight: Tensor, name: str, blocks: list[Block]) -> None:
        def compare(leaf: Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None
            for block in blocks:
                self._compare(block, name, gradient)

        stack.callback(weight.requires_grad_, False)
        weight.requires_grad_(True)
        stack.callback(weight.register_post_accumulate_grad_hook(compare).remove)

    def _watch_computed(
        self, stack: ExitStack, module: nn.Module, name: str, blocks: list[Block]
    ) -> None:
        """A weight that hooks before the forward compute anew, of others, for every call."""
        leaves: list[Tensor] = []

        def replaced(module: nn.Module, args: Any) -> None:
            if not leaves:
                leaves.append(getattr(module, name).detach().clone())
                self._watch(stack, leaves[0], name, blocks)
            setattr(module, name, leaves[0])

        stack.callback(setattr, module, name, getattr(module, name))
        stack.callback(module.register_forward_pre_hook(replaced).remove)

    def _compare(self, block: Block, name: str, gradient: Tensor | None) -> None:
        """Add a parameter's part to the norms of its block."""
        norms = self._norms.setdefault(block.name, _Norms())
        if (block.name, name) in self._seen:
            norms.difference = math.inf  # in parts, which nothing here can add up
            return
        self._seen.add((block.name, name))
        kind, want = self.capture.kinds[block.name], None
        if gradient is not None:
            part = kind.part(block, gradient.to_dense() if gradient.is_sparse else gradient)
            want = kind.to_rows(part) if name == block.parameter else part[:, None]
            norms.autograd += _square(want)
        of_bias = name != block.parameter
        columns = slice(-1, None) if of_bias else slice(0, block.d_in - block.bias)
        empty, support = True, self.captured.columns.get(block.input_factor)
        for outputs, got in self._products(block, columns):
            empty = False
            norms.captured += _square(got)
            there = None if want is None else want[outputs]
            if there is not None and support is not None:
                # Outside of the columns that rows have the gradient is to be zero.
                norms.difference += _square(there.index_fill(1, support, 0))
                there = there[:, support]
            norms.difference += _square(got if there is None else got - there)
        if empty and want is not None:
            norms.difference += _square(want)

    def _products(self, block: Block, columns: slice) -> Iterator[tuple[slice, Tensor]]:
        """``Σ_n s_n Σ_t g_nt a_ntᵀ`` of some columns, some outputs at a time."""
        rows = self._rows(block)
        if rows is None:
            return
        a, g = rows[0][..., columns], rows[1]
        step = max(1, PIECE // max(1, a.shape[-1])) if a.ndim == 3 else block.d_out
        for start in range(0, block.d_out, step):
            outputs = slice(start, min(start + step, block.d_out))
            yield outputs, example_gradients(a, g[..., outputs])[0]

    def _rows(self, block: Block) -> tuple[Tensor, Tensor] | None:
        """``a [1, N·T, …]`` and ``s g [1, N·T, O]``, in the dtype to compare in."""
        g = self.captured.gradients[block.name]
        if g is None:
            return None
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        a = self.captured.inputs[block.input_factor].to(dtype)
        g = torch.stack([rows.to(dtype) * s for rows, s in zip(g, self.scales, strict=True)])
        return a.flatten(0, 1)[None], g.flatten(0, 1)[None]

    def _floor(self, block: Block) -> float:
        """Rounding of a sum that cancels: ``eps √Σ_t |g_t|²|a_t|²``, in terms of the tolerance."""
        rows = self._rows(block)
        if rows is None:
            return 0.0
        a, g = rows
        found = self.captured.gradients[block.name]
        # Coarser than the rest of the model under autocast.
        kinds = {self.dtype} if found is None else {self.dtype, found.dtype}
        eps = max(torch.finfo(kind).eps for kind in kinds)
        terms = a.flatten(2).square().sum(dim=2, dtype=torch.float64)
        terms = terms * g.square().sum(dim=2, dtype=torch.float64)
        return eps / TOLERANCE[self.dtype] * math.sqrt(float(terms.sum()))


def _square(values: Tensor) -> float:
    # Along rows in their own dtype: torch reduces float32 into float64 at a tenth of the speed.
    return float(values.square().sum(-1).sum(dtype=torch.float64))
