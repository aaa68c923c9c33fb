"""Where the parts of an HF model are, and proof that it may be cut between its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from raycurv.errors import UserError

META = torch.device("meta")
AS_FACTORY = (
    "Give it as package.module:factory instead, since any nn.Module runs as one stage, "
    "or open the directory with another version of transformers."
)
# Integers that a layer may take: they do not depend on which tokens were given.
POSITIONS = ("position_ids", "cache_position")


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of an HF model are, by dotted module name.

    Attributes:
        layers: the list of decoder layers; ``count`` of them, which return tuples if ``tuples``.
        embedding: the input embedding; ``width`` its number of columns.
        early: modules outside the layers with weights that run before the first layer.
        late: the same behind the last layer. A module can be both.
        idle: modules outside the layers with weights that this forward does not run.
        tied: whether the head's weight is the embedding's.
        masked: whether the forward takes a mask that is complete already.
        numel: number of weights of each module above, and of each layer (``layers.3``).
    """

    layers: str
    count: int
    tuples: bool
    embedding: str
    width: int
    head: str
    early: frozenset[str]
    late: frozenset[str]
    idle: frozenset[str]
    tied: bool
    masked: bool
    numel: Mapping[str, int]

    def layer(self, index: int) -> str:
        return f"{self.layers}.{index}"

    def outside(self, units: range) -> set[str]:
        """Modules outside the layers that the segment of ``units`` holds."""
        names: set[str] = set()
        if units.start == 0:
            names |= self.early
        if units.stop == self.count:
            names |= self.late
        return names


def find_anatomy(
    whole: Any, config: Any, stored_twice: Callable[[torch.Size], bool], directory: Path
) -> Anatomy:
    """Find the parts, and prove on the meta device that layers speak through hidden states only.

    ``stored_twice`` tells whether two weights of a shape hold the same values: HF ties them then.
    """

    def refuse(got: str) -> UserError:
        return UserError(
            f"model {directory} ({type(whole).__name__})",
            "a decoder whose layers pass hidden states on, and nothing else that is learned",
            got,
            AS_FACTORY,
        )

    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = [
        (sum(p.numel() for p in module.parameters()), name)
        for name, module in whole.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise refuse(f"no list of {count} layers")
    layers_name = max(lists)[1]
    layers = cast(nn.ModuleList, whole.get_submodule(layers_name))
    names = {id(module): name for name, module in whole.named_modules()}
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    if id(embedding) not in names or id(head) not in names:
        raise refuse("no input or output embedding")
    outside = {
        name: module
        for name, module in whole.named_modules()
        if not name.startswith(f"{layers_name}.")
        and next(module.parameters(recurse=False), None) is not None
    }
    for name in outside:
        prefix = f"{name}." if name else ""
        if any(other != name and other.startswith(prefix) for other in (*outside, layers_name)):
            raise refuse(f"{name or 'the model'} with weights beside those of its parts")
    for masked in (True, False):
        try:
            early, late, tuples, problem = _watch(whole, layers, outside, masked)
            break
        except Exception as error:
            # Foreign code on a device without values: what it raises becomes the reason to refuse.
            if not masked:
                got = f"a forward that fails: {type(error).__name__}: {error}"
                raise refuse(got) from error
    if problem:
        raise refuse(problem)
    tied = names[id(head)] + ".weight" in whole.all_tied_weights_keys and (
        head.weight is embedding.weight or stored_twice(embedding.weight.shape)
    )
    numel = {
        name: sum(p.numel() for p in whole.get_submodule(name).parameters(recurse=False))
        for name in outside
    }
    for index, layer in enumerate(layers):
        numel[f"{layers_name}.{index}"] = sum(p.numel() for p in layer.parameters())
    return Anatomy(
        layers=layers_name,
        count=len(layers),
        tuples=tuples,
        embedding=names[id(embedding)],
        width=embedding.weight.shape[1],
        head=names[id(head)],
        early=frozenset(early),
        late=frozenset(late),
        idle=frozenset(outside.keys() - early - late),
        tied=tied,
        masked=masked,
        numel=numel,
    )


def run_on_meta(whole: nn.Module, examples: int, tokens: int, masked: bool) -> Tensor:
    """Logits ``[N, T, V]`` without values: the forward of a model on the meta device.

    A mask that is complete already is passed on as it is; making one reads values, of which the
    meta device has none. Architectures with masks of their own take none instead.
    """
    ids = torch.zeros((examples, tokens), dtype=torch.int64, device=META)
    mask: Tensor | None = None
    if masked:
        dtype = next(whole.parameters()).dtype
        mask = torch.zeros((1, 1, tokens, tokens), dtype=dtype, device=META)
    return cast(Tensor, whole(input_ids=ids, attention_mask=mask, use_cache=False).logits)


def _watch(
    whole: nn.Module, layers: nn.ModuleList, outside: Mapping[str, nn.Module], masked: bool
) -> tuple[set[str], set[str], bool, str]:
    """Run the model once on the meta device and watch what reaches its layers and its head.

    Everything is frozen, but what comes out of a weight before the layers, or out of a layer, is
    marked by requiring a gradient. A mark on anything but hidden states, in a layer or in the
    logits, is a path that a cut would miss.

    Returns:
        names that run before and behind the layers, whether layers return tuples, and the first
        thing that forbids cutting, or "".
    """
    early: set[str] = set()
    late: set[str] = set()
    called: list[int] = []
    problems: list[str] = []
    tuples: list[bool] = []
    current: list[Tensor] = []
    names = {module: name for name, module in outside.items()}
    numbers = {layer: number for number, layer in enumerate(layers)}

    def mark(tensor: Tensor) -> Tensor:
        # Not a leaf: models may go on in place.
        return tensor.detach().requires_grad_().clone()

    def behind_outside(module: nn.Module, args: Any, output: Any) -> Any:
        (late if called else early).add(names[module])
        return output if called or not isinstance(output, Tensor) else mark(output)

    def before_layer(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        index, given = numbers[layer], dict(enumerate(args)) | kwargs
        hidden = given.pop(0, None)
        if hidden is None:
            hidden = given.pop("hidden_states", None)
        if index != len(called):
            problems.append(f"layer {index} called as number {len(called)}")
        elif called and hidden is not current[0]:
            problems.append(f"layer {index} not called with the output of layer {index - 1}")
        for key, value in given.items():
            for tensor in _tensors(value):
                if tensor.requires_grad:
                    problems.append(f"layer {index} also called with learned values ({key})")
                elif tensor.dtype == torch.int64 and key not in POSITIONS:
                    problems.append(f"layer {index} also called with integers ({key})")
        called.append(index)

    def behind_layer(layer: nn.Module, args: Any, output: Any) -> Any:
        tuples.append(isinstance(output, tuple))
        hidden = hidden_of(output)
        last = numbers[layer] + 1 == len(layers)
        current[:] = [hidden.detach() if last else mark(hidden)]
        return (current[0], *output[1:]) if isinstance(output, tuple) else current[0]

    trained = [p for p in whole.parameters() if p.requires_grad]
    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_hook(behind_outside).remove)
        for layer in numbers:
            hook = layer.register_forward_pre_hook(before_layer, with_kwargs=True)
            stack.callback(hook.remove)
            stack.callback(layer.register_forward_hook(behind_layer).remove)
        for parameter in trained:
            stack.callback(parameter.requires_grad_, True)
        whole.eval().requires_grad_(False)
        logits = run_on_meta(whole, 1, 2, masked)
    if len(called) != len(layers):
        problems.append(f"{len(called)} of {len(layers)} layers called")
    if logits.requires_grad:
        problems.append("logits that depend on more than the last layer's output")
    if len(set(tuples)) > 1:
        problems.append("layers of which some return tuples")
    return early, late, bool(tuples and tuples[0]), problems[0] if problems else ""


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a layer returns."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
