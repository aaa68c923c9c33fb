"""Where the parts of an HF model are, and proof that it may be cut between its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raycurv.errors import UserError
from raycurv.models.hf_calls import options
from raycurv.models.mixtures import routed_experts
from raycurv.models.travelling import Marks, Travels, Watched, axis_of, leaves

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
# Examples and tokens of a trial forward: different numbers, so that no axis is taken for another;
# and of a second one, which tells what grows with each.
TRIED = (2, 3)
TRIED_AGAIN = (5, 7)


@dataclass(frozen=True)
class Given:
    """How a forward without values is called.

    Attributes:
        masked: with a mask that is complete already, since making one of token masks reads values.
        counted: with token ids on the CPU, for classes that read numbers of them.
    """

    masked: bool
    counted: bool = False

    def arguments(self, whole: nn.Module, examples: int, tokens: int) -> dict[str, Any]:
        """Of a forward of so many examples and tokens."""
        device = torch.device("cpu") if self.counted else META
        ids = torch.ones((examples, tokens), dtype=torch.int64, device=device)
        mask = None
        if self.masked:
            # One example's memory, as much as it takes in a plan.
            dtype = next(whole.parameters()).dtype
            one = torch.zeros((1, 1, tokens, tokens), dtype=dtype, device=META)
            mask = one.expand(examples, -1, -1, -1)
        return {"input_ids": ids, "attention_mask": mask, **options(whole)}


# In the order in which they are tried.
WAYS = (Given(masked=True), Given(masked=False, counted=True), Given(masked=False))


@dataclass(frozen=True)
class Made:
    """What a module that runs before the layers gives.

    Attributes:
        axes: how many.
        columns: of the last.
        writes: whether the forward changes it in place.
    """

    axes: int
    columns: int
    writes: bool = False


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of an HF model are, by dotted module name.

    Attributes:
        layers: the list of layers, ``count`` of them; "" for a model that is not cut, which is one
            unit with all that there is.
        outputs: of each layer, how many values the tuple has that it returns; 0 if it returns a
            tensor alone.
        travels: what goes from layer to layer beside hidden states.
        embedding: the input embedding; ``width`` its number of columns.
        made: what each module gives that runs before the layers, if that is a tensor.
        early: modules outside the layers with weights that run before the first layer.
        late: the same behind the last layer. A module can be both.
        idle: modules outside the layers with weights that this forward does not run.
        held: modules in the layers with weights that this forward does not call.
        head: the output embedding; "" where there is none.
        tied: whether its weight is the input embedding's.
        given: how a forward without values is called; ``None`` where none runs.
        pooled: whether outputs are one row a text, ``[N, V]``, and no rows of its positions.
        causal: whether a token sees those before it alone.
        numel: number of weights of each module above, and of each layer (``layers.3``).
    """

    layers: str
    count: int
    outputs: tuple[int, ...]
    travels: Travels
    embedding: str
    width: int
    made: Mapping[str, Made]
    head: str
    early: frozenset[str]
    late: frozenset[str]
    idle: frozenset[str]
    held: frozenset[str]
    tied: bool
    given: Given | None
    pooled: bool
    causal: bool
    numel: Mapping[str, int]

    @property
    def cut(self) -> bool:
        """Whether it may be cut between its layers."""
        return bool(self.layers)

    @property
    def head_numel(self) -> int:
        """Number of weights behind the last layer that multiply at each token or text."""
        if self.head:
            return self.numel[self.head]
        return sum(self.numel[name] for name in self.late)

    def layer(self, index: int) -> str:
        """The name of a unit; "" for the whole model that is not cut."""
        return f"{self.layers}.{index}" if self.layers else ""

    def outside(self, units: range) -> set[str]:
        """Modules outside the layers that the segment of ``units`` holds."""
        names: set[str] = set()
        if units.start == 0:
            names |= self.early
        if units.stop == self.count:
            names |= self.late
        return names


def find_anatomy(
    whole: Any,
    config: Any,
    stored_twice: Callable[[torch.Size], bool],
    directory: Path,
    causal: bool = True,
) -> Anatomy:
    """Find the parts, and prove on the meta device that layers speak through hidden states only.

    Args:
        stored_twice: whether two weights of a shape hold the same values: HF ties them then.
        causal: whether it is a causal language model.
    """

    def refuse(got: str) -> UserError:
        return refused(whole, directory, got)

    text = config.get_text_config()
    count = getattr(text, "num_hidden_layers", None)
    lists = [
        (_size(module), name)
        for name, module in whole.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:  # some count otherwise, such as two for a layer
        lists = [(_size(whole.get_submodule(name)), name) for name in _outermost_lists(whole)]
    if not lists:
        raise refuse("no list of layers")
    names = {id(module): name for name, module in whole.named_modules()}
    embedding, head = input_embedding(whole), whole.get_output_embeddings()
    if embedding is None or id(embedding) not in names or (causal and id(head) not in names):
        raise refuse("no input or output embedding")
    head_name = names.get(id(head), "")
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
        for given in WAYS:
            try:
                seen = _watch(whole, layers, outside, given, TRIED)
                break
            except Exception as error:
                # Foreign code on a device without values: what it raises becomes the reason to
                # refuse, the first where all ways fail.
                errors.append(error)
        else:
            experts = routed_experts(layers, layers_name)
            if experts:
                raise UserError(
                    f"model {directory} ({type(whole).__name__})",
                    "experts that take their tokens as most of transformers' do",
                    f"a mixture of others ({experts})", AS_EXPERTS,
                )  # fmt: skip
            got = f"a forward that fails: {type(errors[0]).__name__}: {errors[0]}"
            raise refuse(got) from errors[0]
        if seen.called:
            break
    if seen.changed:
        raise UserError(
            f"model {directory} ({type(whole).__name__})",
            "a forward that leaves the weights as they are",
            f"one that changes its own ({seen.changed})",
            "Curvature is of weights that stay: give it as package.module:factory, with a forward "
            "that changes none.",
        )
    if seen.problem:
        raise refuse(seen.problem)
    # Around the layers, what has weights of its own may not use them.
    around = {name for name in seen.early | seen.late if f"{layers_name}.".startswith(f"{name}.")}
    around |= {""} & (seen.early | seen.late)
    unused = {name for name in around if not _used(whole, name, given)}
    run = (seen.early | seen.late) - unused
    for name in run:
        prefix = f"{name}." if name else ""
        below = [
            other for other in (*run, layers_name) if other != name and other.startswith(prefix)
        ]
        # Behind the layers, a module with weights of its own is held with all of its parts.
        if below and not (seen.late >= {name, *below} and seen.early.isdisjoint({name, *below})):
            raise refuse(f"{name or 'the model'} with weights beside those of its parts")
    tied = f"{head_name}.weight" in whole.all_tied_weights_keys and (
        head.weight is embedding.weight or stored_twice(embedding.weight.shape)
    )
    numel = {
        name: sum(p.numel() for p in whole.get_submodule(name).parameters(recurse=False))
        for name in outside
    }
    for index, layer in enumerate(layers):
        numel[f"{layers_name}.{index}"] = _size(layer)
    return Anatomy(
        layers=layers_name,
        count=len(layers),
        outputs=seen.outputs,
        travels=_travels(seen, lambda: _watch(whole, layers, outside, given, TRIED_AGAIN), refuse),
        embedding=names[id(embedding)],
        width=embedding.weight.shape[1],
        made=seen.made,
        head=head_name,
        early=frozenset(seen.early - unused),
        late=frozenset(seen.late - unused),
        idle=frozenset(outside.keys() - run),
        held=frozenset(
            name
            for name, module in whole.named_modules()
            if name.startswith(f"{layers_name}.")
            and next(module.parameters(recurse=False), None) is not None
            and module not in seen.inside
        ),
        tied=tied,
        given=given,
        pooled=seen.pooled,
        causal=causal or _sees_behind_alone(layers),
        numel=numel,
    )


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _outermost_lists(whole: nn.Module) -> list[str]:
    """Names of the lists of modules that are in no other."""
    found: list[str] = []
    for name, module in whole.named_modules():  # a module comes before its parts
        inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and not inside:
            found.append(name)
    return found


class _Uses(TorchFunctionMode):
    """Takes note of which of some tensors torch's functions are given."""

    def __init__(self, watched: Iterable[Tensor]) -> None:
        super().__init__()
        self.used: bool = False
        self.watched = {id(tensor) for tensor in watched}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = leaves((args, kwargs or {}))
        self.used = self.used or any(id(tensor) in self.watched for _, tensor in given)
        return func(*args, **kwargs or {})


def _used(whole: nn.Module, name: str, given: Given) -> bool:
    """Whether a forward uses the weights that a module has beside those of its parts."""
    uses = _Uses(whole.get_submodule(name).parameters(recurse=False))
    with uses:
        run_on_meta(whole, *TRIED, given)
    return uses.used


def _sees_behind_alone(layers: nn.ModuleList) -> bool:
    """Whether all attention in some layers says that it is causal."""
    said = [module.is_causal for module in layers.modules() if hasattr(module, "is_causal")]
    return bool(said) and all(map(bool, said))


def input_embedding(whole: Any) -> Any:
    """What looks token ids up, where the class says that; ``None`` for one that hashes characters,
    say."""
    try:
        return whole.get_input_embeddings()
    except NotImplementedError:
        return None


class NotCutError(UserError):
    """A model that cannot be cut, and may run as one stage."""


def refused(whole: nn.Module, directory: Path, got: str) -> NotCutError:
    """A model that cannot be cut, and what stands in the way."""
    return NotCutError(
        f"model {directory} ({type(whole).__name__})",
        "a model that may be cut between its layers",
        got,
        AS_FACTORY,
    )


def run_on_meta(whole: nn.Module, examples: int, tokens: int, given: Given) -> Tensor:
    """Logits ``[N, T, V]`` or ``[N, V]`` without values: a model's forward on the meta device."""
    return cast(Tensor, whole(**given.arguments(whole, examples, tokens)).logits)


@contextmanager
def frozen(whole: nn.Module) -> Iterator[None]:
    """Within it, a model evaluates, and gradients are required of what is marked alone."""
    trained = [p for p in whole.parameters() if p.requires_grad]
    whole.eval().requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class _Seen:
    """What one forward showed; see :class:`Anatomy`.

    Attributes:
        inside: the modules that it called.
        watched: what its layers were called with, beside hidden states of the shape ``hidden``.
        called: whether it ran any of the layers.
        changed: the first of its own weights that it changed, or "".
        problem: the first thing that forbids cutting, or "".
    """

    early: set[str]
    late: set[str]
    outputs: tuple[int, ...]
    made: dict[str, Made]
    inside: set[nn.Module]
    watched: Watched
    hidden: torch.Size
    called: bool
    pooled: bool
    changed: str
    problem: str


def _watch(
    whole: nn.Module,
    layers: nn.ModuleList,
    outside: Mapping[str, nn.Module],
    given: Given,
    sizes: tuple[int, int],
) -> _Seen:
    """Run the model once on the meta device, with so many examples and tokens, and watch what
    reaches its layers.

    Everything is frozen, but what comes out of a weight before the layers, and what goes into and
    out of a layer, is marked by requiring a gradient.
    """
    early: set[str] = set()
    late: set[str] = set()
    made: dict[str, tuple[Tensor, int]] = {}
    inside: set[nn.Module] = set()
    called: list[int] = []
    problems: list[str] = []
    outputs: list[int] = []
    shapes: list[torch.Size] = []
    marks = Marks()
    watched = Watched(marks)
    names = {module: name for name, module in outside.items()}
    numbers = {layer: number for number, layer in enumerate(layers)}

    def behind_outside(module: nn.Module, args: Any, output: Any) -> Any:
        (late if called else early).add(names[module])
        if called or not isinstance(output, Tensor):
            return output
        marked = marks.mark(output, 0)
        made[names[module]] = marked, marked._version
        return marked

    def before_layer(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        index = numbers[layer]
        if index != len(called):
            problems.append(f"layer {index} called as number {len(called)}")
        called.append(index)
        entering = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(entering, Tensor):
            problems.append(f"layer {index} called without hidden states")
            return None
        shapes.append(entering.shape)
        beside = dict(enumerate(args)) | kwargs
        del beside[0 if args else "hidden_states"]
        watched.enter(beside)
        entered = marks.mark(entering, index + 1)
        return (
            ((entered, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": entered})
        )

    def behind_layer(layer: nn.Module, args: Any, output: Any) -> Any:
        outputs.append(len(output) if isinstance(output, tuple | list) else 0)
        watched.leave(output)
        hidden = marks.mark(hidden_of(output), numbers[layer] + 1)
        return (hidden, *output[1:]) if isinstance(output, tuple | list) else hidden

    before = [(name, p, p._version) for name, p in whole.named_parameters()]
    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_hook(behind_outside).remove)
        for module in layers.modules():
            hook = module.register_forward_pre_hook(lambda module, args: inside.add(module))
            stack.callback(hook.remove)
        for layer in numbers:
            hook = layer.register_forward_pre_hook(before_layer, with_kwargs=True)
            stack.callback(hook.remove)
            stack.callback(layer.register_forward_hook(behind_layer).remove)
        stack.enter_context(frozen(whole))
        logits = run_on_meta(whole, *sizes, given)
    changed = [name for name, parameter, version in before if parameter._version != version]
    if len(called) != len(layers):
        problems.append(f"{len(called)} of {len(layers)} layers called")
    if len(set(shapes)) > 1:
        problems.append("hidden states of several shapes")
    return _Seen(
        early=early,
        late=late,
        outputs=tuple(outputs),
        made={
            name: Made(tensor.ndim, tensor.shape[-1] if tensor.ndim else 1, tensor._version != was)
            for name, (tensor, was) in made.items()
        },
        inside=inside,
        watched=watched,
        hidden=shapes[0] if shapes else torch.Size(),
        called=bool(called),
        pooled=logits.ndim < 3,
        changed=changed[0] if changed else "",
        problem=problems[0] if problems else "",
    )


def _travels(
    seen: _Seen, again: Callable[[], _Seen], refuse: Callable[[str], UserError]
) -> Travels:
    """What goes from layer to layer; where the axes of it are, a second forward tells."""
    first = seen.watched
    columns = seen.hidden.numel() // math.prod(TRIED)
    if not first.shapes and seen.hidden[:2] == TRIED and len(seen.hidden) == 3:
        return first.travels((), (0, 1), columns, math.prod(TRIED))
    other = again()
    (one, tokens), (two, more) = TRIED, TRIED_AGAIN
    hidden = (
        axis_of(one, seen.hidden, two, other.hidden),
        axis_of(tokens, seen.hidden, more, other.hidden),
    )
    if [len(axes) for axes in hidden] != [1, 1]:
        raise refuse(
            f"hidden states of shape {list(seen.hidden)} of {one} texts of {tokens} tokens"
        )
    axes: list[tuple[int, ...]] = []
    for shape, larger in zip(first.shapes, other.watched.shapes, strict=True):
        found = axis_of(one, shape, two, larger)
        along = axis_of(tokens, shape, more, larger)
        grown = [a for a, (x, y) in enumerate(zip(shape, larger, strict=True)) if x != y]
        if len(found) > 1 or not {*found, *along}.issuperset(grown):
            raise refuse(f"values beside hidden states, of shape {list(shape)}")
        axes.append((*found, *along[:1]) if found else ())
    return first.travels(axes, (hidden[0][0], hidden[1][0]), columns, math.prod(TRIED))


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a layer returns."""
    return cast(Tensor, output[0] if isinstance(output, tuple | list) else output)
