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
AS_EXPERTS = (
    "Its experts have no curvature here, and its layers are not separated. Give it as "
    "package.module:factory, which runs as one stage: a fit then names what --blocks has to leave "
    "out."
)
# Examples and tokens of a trial forward: different numbers, so that no axis is taken for another.
TRIED = (2, 3)
# Integers that a layer may take: they do not depend on which tokens were given.
POSITIONS = ("position_ids", "cache_position")


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of an HF model are, by dotted module name.

    Attributes:
        layers: the list of decoder layers, ``count`` of them.
        outputs: how many values the tuple has that a layer returns; 0 if it returns a tensor alone.
        embedding: the input embedding; ``width`` its number of columns.
        writes: whether the forward changes what the input embedding gives in place.
        axes: of each embedding that runs before the layers, how many axes it gives.
        early: modules outside the layers with weights that run before the first layer.
        late: the same behind the last layer. A module can be both.
        idle: modules outside the layers with weights that this forward does not run.
        tied: whether the head's weight is the embedding's.
        masked: whether the forward takes a mask that is complete already.
        numel: number of weights of each module above, and of each layer (``layers.3``).
    """

    layers: str
    count: int
    outputs: int
    embedding: str
    width: int
    writes: bool
    axes: Mapping[str, int]
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
        return refused(whole, directory, got)

    text = config.get_text_config()
    count = getattr(text, "num_hidden_layers", None)
    lists = [
        (sum(p.numel() for p in module.parameters()), name)
        for name, module in whole.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise refuse(f"no list of {count} layers")
    names = {id(module): name for name, module in whole.named_modules()}
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    if id(embedding) not in names or id(head) not in names:
        raise refuse("no input or output embedding")
    # The largest that the forward runs: beside a text model may stand another with as many layers.
    for _, layers_name in sorted(lists, reverse=True):
        layers = cast(nn.ModuleList, whole.get_submodule(layers_name))
        outside = {
            name: module
            for name, module in whole.named_modules()
            if not name.startswith(f"{layers_name}.")
            and next(module.parameters(recurse=False), None) is not None
        }
        errors: list[Exception] = []
        for masked in (True, False):
            try:
                seen = _watch(whole, layers, outside, embedding, masked)
                break
            except Exception as error:
                # Foreign code on a device without values: what it raises becomes the reason to
                # refuse, the first where both ways fail.
                errors.append(error)
        else:
            experts = routed_experts(layers, layers_name)
            if experts:
                raise UserError(
                    f"model {directory} ({type(whole).__name__})",
                    "a decoder without experts", f"a mixture of experts ({experts})", AS_EXPERTS,
                )  # fmt: skip
            got = f"a forward that fails: {type(errors[0]).__name__}: {errors[0]}"
            raise refuse(got) from errors[0]
        if seen.called:
            break
    if seen.problem:
        raise refuse(seen.problem)
    run = seen.early | seen.late
    for name in run:
        prefix = f"{name}." if name else ""
        below = [
            other for other in (*run, layers_name) if other != name and other.startswith(prefix)
        ]
        # Behind the layers, a module with weights of its own is held with all of its parts.
        if below and not (seen.late >= {name, *below} and seen.early.isdisjoint({name, *below})):
            raise refuse(f"{name or 'the model'} with weights beside those of its parts")
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
        outputs=seen.outputs,
        embedding=names[id(embedding)],
        width=embedding.weight.shape[1],
        writes=seen.writes,
        axes=seen.axes,
        head=names[id(head)],
        early=frozenset(seen.early),
        late=frozenset(seen.late),
        idle=frozenset(outside.keys() - run),
        tied=tied,
        masked=masked,
        numel=numel,
    )


def refused(whole: nn.Module, directory: Path, got: str) -> UserError:
    """A model that cannot be cut, and what stands in the way."""
    return UserError(
        f"model {directory} ({type(whole).__name__})",
        "a decoder whose layers pass hidden states on, and nothing else that is learned",
        got,
        AS_FACTORY,
    )


def routed_experts(layers: nn.ModuleList, name: str) -> str:
    """Where the first experts of a mixture are, and their class; empty where there are none."""
    for path, module in layers.named_modules():
        if "expert" in path.rpartition(".")[2] and "shared" not in path:
            return f"{type(module).__name__} in {name}.{path}"
    return ""


def meta_mask(whole: nn.Module, examples: int, tokens: int, masked: bool) -> Tensor | None:
    """A mask ``[N, 1, T, T]`` that is complete already, which models pass on as it is.

    Making one of token masks reads values, of which the meta device has none. Architectures with
    masks of their own take none instead (``None`` unless ``masked``).
    """
    if not masked:
        return None
    dtype = next(whole.parameters()).dtype
    # One example's memory, as much as it takes in a plan.
    one = torch.zeros((1, 1, tokens, tokens), dtype=dtype, device=META)
    return one.expand(examples, -1, -1, -1)


def run_on_meta(whole: nn.Module, examples: int, tokens: int, masked: bool) -> Tensor:
    """Logits ``[N, T, V]`` without values: the forward of a model on the meta device."""
    ids = torch.zeros((examples, tokens), dtype=torch.int64, device=META)
    mask = meta_mask(whole, examples, tokens, masked)
    return cast(Tensor, whole(input_ids=ids, attention_mask=mask, use_cache=False).logits)


@dataclass(frozen=True)
class _Seen:
    """What one forward showed; see :class:`Anatomy`.

    Attributes:
        called: whether it ran any of the layers.
        problem: the first thing that forbids cutting, or "".
    """

    early: set[str]
    late: set[str]
    outputs: int
    writes: bool
    axes: dict[str, int]
    called: bool
    problem: str


def _watch(
    whole: nn.Module,
    layers: nn.ModuleList,
    outside: Mapping[str, nn.Module],
    embedding: nn.Module,
    masked: bool,
) -> _Seen:
    """Run the model once on the meta device, with two examples, and watch what reaches its layers
    and its head.

    Everything is frozen, but what comes out of a weight before the layers, or out of a layer, is
    marked by requiring a gradient. A mark on anything but hidden states, in a layer or in the
    logits, is a path that a cut would miss.
    """
    early: set[str] = set()
    late: set[str] = set()
    axes: dict[str, int] = {}
    called: list[int] = []
    problems: list[str] = []
    outputs: list[int] = []
    current: list[Tensor] = []
    embedded: list[tuple[Tensor, int]] = []
    names = {module: name for name, module in outside.items()}
    numbers = {layer: number for number, layer in enumerate(layers)}

    def mark(tensor: Tensor) -> Tensor:
        # Not a leaf: models may go on in place.
        return tensor.detach().requires_grad_().clone()

    def behind_outside(module: nn.Module, args: Any, output: Any) -> Any:
        (late if called else early).add(names[module])
        if called or not isinstance(output, Tensor):
            return output
        if isinstance(module, nn.Embedding):
            axes[names[module]] = output.ndim
        marked = mark(output)
        if module is embedding:
            embedded.append((marked, marked._version))
        return marked

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
        outputs.append(len(output) if isinstance(output, tuple) else 0)
        hidden = hidden_of(output)
        last = numbers[layer] + 1 == len(layers)
        current[:] = [hidden.detach() if last else mark(hidden)]
        return (current[0], *output[1:]) if isinstance(output, tuple) else current[0]

    trained = [p for p in whole.parameters() if p.requires_grad]
    before = [(name, p, p._version) for name, p in whole.named_parameters()]
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
        logits = run_on_meta(whole, *TRIED, masked)
    changed = [name for name, parameter, version in before if parameter._version != version]
    if changed:
        problems.append(f"a forward that changes its own weights ({changed[0]})")
    if len(called) != len(layers):
        problems.append(f"{len(called)} of {len(layers)} layers called")
    if logits.requires_grad:
        problems.append("logits that depend on more than the last layer's output")
    if len(set(outputs)) > 1:
        problems.append("layers that return different numbers of values")
    return _Seen(
        early=early,
        late=late,
        outputs=outputs[0] if outputs else 0,
        writes=any(tensor._version != version for tensor, version in embedded),
        axes=axes,
        called=bool(called),
        problem=problems[0] if problems else "",
    )


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
