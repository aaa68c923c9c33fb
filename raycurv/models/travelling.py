"""What travels from layer to layer beside hidden states: values that a layer is called with, and
that a part of the model which begins at that layer could not make by itself.

Such values are learned (inputs of each layer made of the tokens before the first one, keys and
values that later layers share) or come out of earlier layers. Where each is among a layer's
arguments is found once, on the meta device, by :mod:`raycurv.models.anatomy`. Masks, positions and
whatever else follows from token ids and masks alone are not among them: every part has these.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Where a value is among the arguments of a layer: its place or name, then keys and places within.
Path = tuple[Any, ...]
# Arguments of a call: those by place, and those by name.
Given = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Travels:
    """The values that travel, numbered.

    Attributes:
        taken: for each layer, where it is called with which value.
        made: for each value, how many layers run before it is there.
        axes: for each value, the axis of examples and that of tokens, as far as it has them; none
            if examples share it.
        hidden: the axes of examples and tokens of hidden states, as layers take them.
        columns: numbers of a token that travel over a cut at most, hidden states included.
    """

    taken: tuple[tuple[tuple[Path, int], ...], ...]
    made: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    hidden: tuple[int, int]
    columns: int

    def over(self, cut: int) -> tuple[int, ...]:
        """The values that travel over the cut before layer ``cut``."""
        later = {value for taken in self.taken[cut:] for _, value in taken}
        return tuple(v for v in sorted(later) if cut > 0 and self.made[v] <= cut)

    def pack(self, hidden: Tensor, values: Iterable[tuple[int, Tensor]]) -> tuple[Tensor, ...]:
        """What travels, with axes of examples first and of tokens second; a value that examples
        share has an axis of one in front."""
        return (hidden.movedim(self.hidden, (0, 1)), *(self._packed(v, t) for v, t in values))

    def unpack(
        self, packed: Sequence[Tensor], values: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The hidden states and the values, by number, of what :meth:`pack` gave."""
        hidden, *others = packed
        pairs = zip(values, others, strict=True)
        return hidden.movedim((0, 1), self.hidden), {v: self._unpacked(v, t) for v, t in pairs}

    def _packed(self, value: int, tensor: Tensor) -> Tensor:
        axes = self.axes[value]
        return tensor.movedim(axes, tuple(range(len(axes)))) if axes else tensor[None]

    def _unpacked(self, value: int, tensor: Tensor) -> Tensor:
        axes = self.axes[value]
        return tensor.movedim(tuple(range(len(axes))), axes) if axes else tensor[0]

    def found(
        self, layer: int, given: Given, wanted: Collection[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Those of the ``wanted`` values that a layer is called with, by number."""
        for (key, *rest), value in self.taken[layer]:
            if value not in wanted:
                continue
            tensor = given[0][key] if isinstance(key, int) else given[1][key]
            for step in rest:
                tensor = tensor[step]
            yield value, tensor

    def put(self, layer: int, given: Given, values: Mapping[int, Tensor]) -> Given:
        """The arguments with those of ``values`` in their places; mappings are changed in place, as
        layers speak through them."""
        args, kwargs = list(given[0]), dict(given[1])
        for (key, *rest), value in self.taken[layer]:
            if value not in values:
                continue
            if isinstance(key, int):
                args[key] = _put(args[key], rest, values[value])
            else:
                kwargs[key] = _put(kwargs.get(key), rest, values[value])
        return tuple(args), kwargs


def _put(tree: Any, path: Sequence[Any], value: Tensor) -> Any:
    if not path:
        return value
    key, *rest = path
    if isinstance(tree, MutableMapping) or not isinstance(key, int):
        tree = {} if tree is None else tree
        tree[key] = _put(tree.get(key), rest, value)
        return tree
    items = list(tree or ())
    items.extend([None] * (key + 1 - len(items)))
    items[key] = _put(items[key], rest, value)
    return items if isinstance(tree, list) else tuple(items)


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """The tensors in mappings, lists and tuples, each with its path."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from leaves(item, (*path, key))
    elif isinstance(tree, list | tuple):
        for number, item in enumerate(tree):
            yield from leaves(item, (*path, number))


class Marks:
    """Where graphs are followed back to: tensors that say how many layers ran before them."""

    def __init__(self) -> None:
        self._made: dict[int, int] = {}
        self._kept: list[Tensor] = []

    def mark(self, tensor: Tensor, made: int) -> Tensor:
        """The tensor, cut off from what it was made of. Not a leaf: models may go on in place."""
        leaf = tensor.detach().requires_grad_()
        self._made[id(leaf)] = made
        self._kept.append(leaf)
        return leaf.clone()

    def made(self, tensor: Tensor) -> int:
        """How many layers had run when a tensor could be made: the latest of its marks."""
        latest, seen, nodes = 0, set(), [tensor.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            latest = max(latest, self._made.get(id(leaf), 0))
            nodes += [following for following, _ in node.next_functions]
        return latest


class Watched:
    """Takes notes of what the layers of one forward are called with, and makes its travels of them.

    Values are told apart by identity, so tensors are kept.
    """

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._taken: list[tuple[tuple[Path, int], ...]] = []
        self._numbers: dict[int, int] = {}
        self._values: list[Tensor] = []
        self._made: list[int] = []
        # Tensors that layers gave beside hidden states, by identity: how many layers had run.
        self._given: dict[int, int] = {}
        self._kept: list[Any] = []
        # Mappings that layers were called with, by identity: the tensors in them at first.
        self._mappings: dict[int, set[int]] = {}

    def enter(self, arguments: Mapping[Any, Any]) -> None:
        """A layer is called, with these beside hidden states."""
        layer, taken = len(self._taken), []
        for key, argument in arguments.items():
            shared = isinstance(argument, MutableMapping)
            tensors = list(leaves(argument, (key,)))
            first = self._mappings.setdefault(id(argument), {id(t) for _, t in tensors})
            for path, tensor in tensors:
                if tensor.requires_grad:
                    made = self._marks.made(tensor)
                elif id(tensor) in self._given:
                    made = self._given[id(tensor)]
                elif shared and id(tensor) not in first:
                    made = layer
                else:
                    continue
                if id(tensor) not in self._numbers:
                    self._numbers[id(tensor)] = len(self._values)
                    self._values.append(tensor)
                    self._made.append(made)
                taken.append((path, self._numbers[id(tensor)]))
            self._kept += [argument, tensors]
        self._taken.append(tuple(taken))

    def leave(self, output: Any) -> None:
        """A layer gave this, hidden states among it."""
        for _, tensor in leaves(output):
            self._given[id(tensor)] = len(self._taken)
        self._kept.append(output)

    @property
    def shapes(self) -> list[torch.Size]:
        """The shape of each value that travels, by its number."""
        return [value.shape for value in self._values]

    def travels(
        self,
        axes: Sequence[tuple[int, ...]],
        hidden_axes: tuple[int, int],
        hidden_columns: int,
        tokens: int,
    ) -> Travels:
        """What it saw, of a forward of so many ``tokens`` in all."""
        found = Travels(
            tuple(self._taken), tuple(self._made), tuple(axes), hidden_axes, hidden_columns
        )
        most = max(
            (
                sum(self._values[v].numel() for v in found.over(cut))
                for cut in range(len(self._taken))
            ),
            default=0,
        )
        columns = hidden_columns + -(-most // tokens)
        return Travels(found.taken, found.made, found.axes, hidden_axes, columns)


def axis_of(size: int, first: torch.Size, other: int, second: torch.Size) -> list[int]:
    """The axes of a value that are ``size`` in its first shape, and ``other`` in its second."""
    pairs = enumerate(zip(first, second, strict=True))
    return [axis for axis, both in pairs if both == (size, other)]
