"""Any other parameter: norms' scales, biases by themselves, whatever a module uses in its own way.

    ∇_n = Σ_calls (∂y_n/∂θ)ᵀ g_n        the exact gradient of an example, as a vector

The matrix is ``[O, 1]``, of all numbers of the parameter; an example's row is a = 1 and g = its
gradient, and both factors are diagonal: Λ is the diagonal of the Fisher.

A module that multiplies by θ, or adds it, element by element shows what each number does in its
output, for all examples at once:

    y = y|θ=0 + θ ∘ (y|θ=1 − y|θ=0),        ∇_n = Σ_positions g_n ∘ (y|θ=1 − y|θ=0)_n

Whether it does is found by θ that are drawn, below zero, since ``|θ|`` is θ above, and by its own.
Any other module is run again, an example at a time, with a gradient for θ; it has to give what it
gave before. So a module must map examples along its first axis.

Axis letters: N examples, O numbers of the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from raycurv.errors import UserError, in_words
from raycurv.mathematics.blocks import Block, block_name
from raycurv.mathematics.kinds.kind import Kind, ModuleCall, Note, is_only_held

# Largest difference, relative to the largest number, between two runs of a module on one example:
# of another cut it would be of the order of 1. Modules of float64 compute in float32 in places.
_SAME = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}


_Places = dict[tuple[str, int], tuple[int, ...]]


class FreeParameter(Kind):
    """Every parameter of a module that no other kind describes."""

    name = "free"
    label = "norm, bias or other parameter"
    rows_are_tokens = False
    one_row = True
    by_default = False

    def __init__(self) -> None:
        # The shapes in which parameters stand in outputs of so many axes, () for none.
        self._places: WeakKeyDictionary[nn.Module, _Places] = WeakKeyDictionary()

    def holds(self, module: nn.Module) -> bool:
        return any(True for _ in _own_parameters(module))

    def describe(self, name: str, module: nn.Module) -> tuple[Block, ...]:
        return tuple(
            Block(
                block_name(name, parameter), self.name, 1, tensor.numel(), False,
                module=name, parameter=parameter, input_diagonal=True, output_diagonal=True,
            )
            for parameter, tensor in _own_parameters(module)
        )  # fmt: skip

    def catch(self, module: nn.Module, blocks: Sequence[Block], note: Note) -> Callable[[], None]:
        names = tuple(block.parameter for block in blocks)
        noted = [block.name for block in blocks]

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            leaves, form = tree_flatten(output)
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            again: _Again | None = None
            tensors = {n: leaf for n, leaf in enumerate(leaves) if _is_floating(leaf)}
            for place, leaf in tensors.items():
                # One may be made of another inside the module, whose gradient it must not have.
                leaf = leaf.clone() if len(tensors) > 1 else leaf
                again = again or _Again(module, args, kwargs, names)
                left = _Output(again, place, leaf.detach(), leaf._version)
                x = given[0] if given else leaf
                leaves[place] = note(noted, x, leaf, left)
            return output if again is None else tree_unflatten(leaves, form)

        # Before a hook that ends the forward here.
        return module.register_forward_hook(hook, with_kwargs=True, prepend=True).remove

    def layout(self, block: Block, module: nn.Module) -> object:
        return self.name

    def input_rows(self, block: Block, module: nn.Module, call: ModuleCall) -> Tensor:
        rows: Tensor = call.detail.y.new_ones(call.examples, 1, 1)
        return rows

    def output_rows(self, block: Block, module: nn.Module, call: ModuleCall, g: Tensor) -> Tensor:
        left: _Output = call.detail
        if left.y.ndim == 0 or len(left.y) % call.examples:
            raise _mixed(block, call, f"an output of shape {tuple(left.y.shape)}")
        left.again.check_inputs(block)
        shape = self._place(block, module, call)
        if shape:
            difference = left.again.difference(block.parameter, left.place)
            wide = torch.promote_types(g.dtype, torch.float32)
            products = g.to(wide) * difference.to(wide)
            of_all: Tensor = products.unflatten(0, (call.examples, -1)).sum(dim=1)
            of_all = of_all.sum_to_size(call.examples, *shape[1:])
            return of_all.reshape(call.examples, 1, block.d_out)
        found: Tensor = left.again.gradients(block, call, g)[block.parameter]
        return found

    def live_rows(
        self, block: Block, call: ModuleCall, mask: Tensor | None, rows: int
    ) -> Tensor | None:
        return None

    def share(self, call: ModuleCall) -> float:
        y: Tensor = call.detail.y
        return 1 / max(1, y.shape[1]) if y.ndim > 2 else 1.0

    def part(self, block: Block, parameter: Tensor) -> Tensor:
        return parameter

    def to_rows(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, 1)

    def flops(self, module: nn.Module, x: Tensor, *more: Any) -> int:
        return 0

    def _place(self, block: Block, module: nn.Module, call: ModuleCall) -> tuple[int, ...]:
        """The shape in which a parameter is multiplied or added to the output; () where it is not,
        or not seen to be."""
        known = self._places.setdefault(module, {})
        key = (block.parameter, call.detail.y.ndim)
        if key not in known:
            found = _place_of(block.parameter, module, call)
            if found is None:
                return ()
            known[key] = found
        return known[key]


def _place_of(parameter: str, module: nn.Module, call: ModuleCall) -> tuple[int, ...] | None:
    """See :meth:`FreeParameter._place`; ``None`` if this call does not tell."""
    left: _Output = call.detail
    theta, y = module.get_parameter(parameter), left.y
    shapes = list(dict.fromkeys(_shapes(theta, y)))
    if not shapes or any(True for child in module.children() for _ in child.parameters()):
        return ()
    one = left.again.difference(parameter, left.place)
    generator = torch.Generator().manual_seed(0)
    drawn = -(torch.rand(theta.shape, generator=generator, dtype=torch.float64) + 0.5)
    for tried in (drawn.to(theta), theta.detach()):
        got = left.again.difference(parameter, left.place, tried)
        if not one.isfinite().all() or not got.isfinite().all() or not one.any():
            return None
        scale = float(got.abs().max())
        shapes = [
            shape
            for shape in shapes
            if float((got - one * tried.reshape(shape).to(y.dtype)).abs().max())
            <= _SAME[y.dtype] * scale
        ]
    return shapes[0] if len(shapes) == 1 else ()


def _shapes(theta: Tensor, y: Tensor) -> Iterator[tuple[int, ...]]:
    """The shapes in which a parameter may stand in an output whose first axis is the examples."""
    if theta.ndim <= y.ndim:
        whole = (*[1] * (y.ndim - theta.ndim), *theta.shape)
        if whole[:1] == (1,) and all(n in (1, m) for n, m in zip(whole, y.shape, strict=True)):
            yield whole
    if theta.ndim == 1:
        for axis in range(1, y.ndim):
            if y.shape[axis] == len(theta):
                yield tuple(len(theta) if a == axis else 1 for a in range(y.ndim))


@dataclass
class _Again:
    """A call of a module, to be run again.

    Attributes:
        names: of the parameters that have blocks.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]
    _versions: list[tuple[Tensor, int]] = field(init=False)
    _latest: tuple[int, Tensor, dict[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        self.args, self.kwargs = tree_map(_detached, (self.args, self.kwargs))
        given = [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]
        self._versions = [(t, t._version) for t in given]

    def check_inputs(self, block: Block) -> None:
        """Refuse, with a UserError, arguments that were changed in place since the call."""
        if any(t._version != version for t, version in self._versions):
            raise UserError(
                f"block {block.name}",
                "arguments of its module that are not changed after it has read them",
                "a tensor that an in-place operation has changed since",
                f"Make that out of place, or leave the block out: --blocks '!{block.name}'.",
            )

    def run(self, given: tuple[Any, Any], parameters: Mapping[str, Tensor], place: int) -> Tensor:
        """One of its outputs for other arguments and parameters, without its module's own hooks."""
        args, kwargs = given
        own = {f"module.{name}": tensor for name, tensor in parameters.items()}
        output = functional_call(_Forward(self.module), own, args, kwargs)
        found = tree_leaves(output)[place]
        assert isinstance(found, Tensor)
        return found

    def difference(self, name: str, place: int, theta: Tensor | None = None) -> Tensor:
        """``y|θ − y|0``; of θ = 1 by default."""
        own = self.module.get_parameter(name).detach()
        given = (self.args, self.kwargs)
        with torch.no_grad():
            some = self.run(given, {name: torch.ones_like(own) if theta is None else theta}, place)
            return some - self.run(given, {name: torch.zeros_like(own)}, place)

    def gradients(self, block: Block, call: ModuleCall, g: Tensor) -> dict[str, Tensor]:
        """By parameter the gradients of all examples ``[N, 1, O]``, one after the other."""
        left: _Output = call.detail
        if self._latest is not None:
            # Outputs that are added up have one gradient.
            place, latest, gradients = self._latest
            if place == left.place and latest.data_ptr() == g.data_ptr():
                return gradients
        outputs = left.y
        if outputs._version != left.version:
            with torch.no_grad():
                outputs = self.run((self.args, self.kwargs), {}, left.place)
        found: dict[str, list[Tensor]] = {name: [] for name in self.names}
        rows = len(outputs) // call.examples
        for n in range(call.examples):
            mine = slice(n * rows, (n + 1) * rows)
            parts = self._gradient(block, call, left.place, outputs, g, mine)
            for name, gradient in parts.items():
                found[name].append(gradient.reshape(1, -1))
        gradients = {name: torch.stack(some) for name, some in found.items()}
        self._latest = left.place, g, gradients
        return gradients

    def _gradient(
        self, block: Block, call: ModuleCall, place: int, outputs: Tensor, g: Tensor, mine: slice
    ) -> dict[str, Tensor]:
        """The gradients of the example that has some rows of what left."""
        want, got = outputs[mine], ""
        # A tensor as long as the examples may be of positions, which all of them have.
        for axes in (1, 2):

            def cut(value: Any, axes: int = axes) -> Any:
                ours = isinstance(value, Tensor) and value.ndim >= axes
                return value[mine] if ours and len(value) == len(outputs) else value

            parameters = {
                name: self.module.get_parameter(name).detach().requires_grad_()
                for name in self.names
            }
            with torch.enable_grad():
                try:
                    y = self.run(tree_map(cut, (self.args, self.kwargs)), parameters, place)
                except Exception as error:  # the user's code, on a part of what it was given
                    got = f"{type(error).__name__}: {in_words(error)}"
                    continue
                if y.shape != want.shape or not _alike(y.detach(), want):
                    got = "another output for an example alone"
                    continue
                if not y.requires_grad:
                    return {name: torch.zeros_like(p) for name, p in parameters.items()}
                gradients = torch.autograd.grad(
                    y, list(parameters.values()), g[mine], materialize_grads=True
                )
            return dict(zip(self.names, gradients, strict=True))
        raise _mixed(block, call, got)


@dataclass(frozen=True)
class _Output:
    """One of the tensors that left a call: the call, its place among all, and what it was."""

    again: _Again
    place: int
    y: Tensor
    version: int


class _Forward(nn.Module):
    """A module's forward, without hooks on the module itself."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters, and those of children that are never called: lists of parameters,
    and the output projection of torch's attention."""
    yield from module.named_parameters(recurse=False)
    for name, child in module.named_children():
        if is_only_held(child):
            for key, parameter in child.named_parameters():
                yield f"{name}.{key}", parameter


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _alike(y: Tensor, want: Tensor) -> bool:
    largest = float(want.abs().max()) if want.numel() else 0.0
    return float((y - want).abs().max() if want.numel() else 0.0) <= _SAME[y.dtype] * largest


def _mixed(block: Block, call: ModuleCall, got: str) -> UserError:
    return UserError(
        f"block {block.name}",
        f"a module that maps {call.examples} examples along its first axis, each by itself, so "
        "that it can be run again on one",
        got,
        "Without that a parameter that is used in the module's own way has no per-example "
        f"gradient: leave it out with --blocks '!{block.name}'.",
    )
