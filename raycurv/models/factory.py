"""A network that a callable of the user's returns; an ``nn.Sequential`` is cut between children.

What the callable returns may be the user's own network, which is trained on afterwards. So it is
looked at and never changed: stages compute with copies (``own_copies.py``).
"""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from raycurv.batch import Batch, shown_ids
from raycurv.errors import UserError, user_errors, users_code
from raycurv.mathematics.blocks import Block
from raycurv.models.checkpoint import check_finite, describe_tensor
from raycurv.models.checkpoint_files import CheckpointFile, state_file
from raycurv.models.config_print import config_print
from raycurv.models.hf_calls import further_inputs
from raycurv.models.model import Model, Segment
from raycurv.models.own_copies import cast_floats, copied, floats, unwrapped
from raycurv.models.pieces import Parts
from raycurv.models.stored import (
    Patch,
    StoredWeight,
    no_tensor_of_its_own,
    parameter_names,
    replacements,
    shared_names,
)
from raycurv.named_objects import import_named


class FactoryModel(Model):
    """A model that its factory builds whole, wherever a part of it is needed.

    The weights seen first are the model: a later build (in another process, say) that has others
    is refused, since stages of different models would look like one.

    Args:
        make: the callable, or ``None`` when it is imported by ``name``.
        base: directory that an import may also look in.

    Raises:
        UserError: the factory cannot be imported, is not callable, raises, returns something else
            than an ``nn.Module`` of Python code that takes the inputs alone, or weights that are
            not there (lazy, on the meta device), not plain tensors, or not finite.
    """

    def __init__(
        self, name: str, make: Callable[[], nn.Module] | None, base: Path | None = None
    ) -> None:
        self.name = name
        self._make, self._base = make, base
        whole = self._new()
        self._whole: nn.Module | None = whole
        self._fingerprint = _fingerprint(whole)
        self._configuration = _configuration(whole)
        # Runs of children of an nn.Sequential that share no weight with others; else all as one.
        self._unit_children = _cut(whole)
        self._unit_of = {c: unit for unit, names in enumerate(self._unit_children) for c in names}
        parts = [_children_of(whole, names) if names else whole for names in self._unit_children]
        self.units = len(parts)
        numels = [sum(p.numel() for p in part.parameters()) for part in parts]
        self.unit_costs = tuple(float(max(1, numel)) for numel in numels)
        self._bytes = [_float_and_other_bytes(part) for part in parts]
        self.token_inputs = _takes_tokens(whole)
        self.either_inputs = self.token_inputs or bool(_embeddings(whole))
        self.takes = further_inputs(whole)
        dtypes = {p.dtype for p in whole.parameters() if p.is_floating_point()} - {torch.float32}
        if dtypes:
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            self.notices = (f"has weights of {names}; --dtype says what it is computed in",)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_whole": None}

    def skeleton(self) -> nn.Module:
        """The whole model as the factory made it, which may be the user's own object."""
        if self._whole is None:
            self._whole = self._same()
        return self._whole

    def looks_up(self, inputs: Tensor) -> int | None:
        whole = self.skeleton()
        found: list[int] = []

        def watch(module: nn.Module, given: tuple[Any, ...]) -> None:
            values = given[0] if given else None
            flat = values.flatten().to(inputs.dtype) if isinstance(values, Tensor) else None
            if flat is not None and torch.equal(flat, inputs.flatten()):
                found.append(cast(int, module.num_embeddings))

        hooks = [module.register_forward_pre_hook(watch) for module in _embeddings(whole)]
        try:
            # What comes behind the embedding is of no interest, and may fail for its own reasons.
            with torch.no_grad(), torch.random.fork_rng(devices=[]), suppress(Exception):
                whole(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return min(found, default=None)

    def unit_of(self, module_name: str) -> int:
        return self._unit_of.get(module_name.split(".")[0], 0)

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        return self._fingerprint

    def configuration(self) -> dict[str, Any]:
        """That of transformers of which the network, or a part of it, was made."""
        return self._configuration

    def weight_bytes(self, units: range, dtype: torch.dtype) -> int:
        return sum(self._bytes[unit][0] * dtype.itemsize + self._bytes[unit][1] for unit in units)

    def build(self, units: range, dtype: torch.dtype, device: torch.device) -> Segment:
        """As every model's; also refuses weights that differ from those that the factory made at
        first, or that overflow ``dtype``."""
        assert 0 <= units.start < units.stop <= self.units and units.step == 1, units
        # What is kept may be the user's own object; what was made for this call is used itself.
        kept = self._whole
        whole = self._same() if kept is None else kept
        names = [name for unit in units for name in self._unit_children[unit]]
        part: nn.Module = _children_of(whole, names) if names else whole
        if kept is not None:
            part = copied(part, f"model {self.name}")
        cast_floats(part, dtype, device)
        for name, tensor in part.state_dict().items():
            if isinstance(tensor, Tensor):
                check_finite(tensor, f"model {self.name}, tensor {name}")
        part.eval().requires_grad_(False)
        children = part._modules if names else None
        first, last = units.start == 0, units.stop == self.units
        return FactorySegment(part, children, first, last, self.name, dtype)

    def stored(self, block: Block) -> StoredWeight:
        """Where a block's weight stands in the state dict; UserError if it is computed from others,
        or is another module's, too."""
        whole = self.skeleton()
        names: dict[int, list[str]] = {}
        for name, parameter in whole.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        among = set(shared_names(block))
        alone = {group[0] for group in names.values() if set(group[1:]) <= among}
        for key in parameter_names(block):
            if key not in alone:
                shared = any(key in group for group in names.values())
                raise no_tensor_of_its_own(
                    block, "one that several modules share" if shared else "one made of others"
                )
        state = whole.state_dict()
        return StoredWeight.among(state, block, lambda key: Parts.one(key, state[key].shape))

    def block_weight(self, block: Block) -> Tensor:
        state = self.skeleton().state_dict()
        # In memory of its own.
        return self.stored(block).matrix(lambda place: place.of(state[place.key].detach()).clone())

    def files(self, patches: Sequence[Patch] = ()) -> tuple[CheckpointFile, ...]:
        replaced = replacements(self.stored, patches, self._read)
        for patch in patches:
            (weight, *_) = parameter_names(patch.block)
            replaced |= dict.fromkeys(shared_names(patch.block), replaced[weight])
        return (state_file(self.name, self.skeleton().state_dict(), replaced),)

    def _read(self, key: str) -> Tensor:
        return cast(Tensor, self.skeleton().state_dict()[key].detach().clone())

    def _same(self) -> nn.Module:
        whole = self._new()
        found = _fingerprint(whole)
        for name in sorted(found.keys() | self._fingerprint.keys()):
            if found.get(name) != self._fingerprint.get(name):
                raise UserError(
                    f"model {self.name}, tensor {name}",
                    "the same weights from each call of the factory",
                    "others than at its first call",
                    "Load the weights from a file in the factory, or seed it (torch.manual_seed).",
                )
        return whole

    def _new(self) -> nn.Module:
        make = self._make or _import(self.name, self._base)
        with user_errors(
            f"model {self.name}",
            "a factory that returns an nn.Module when called without arguments",
            "Call it in Python to see where it fails.",
            Exception,
        ):
            made = make()
        if not isinstance(made, nn.Module):
            raise UserError(
                f"model {self.name}",
                "a factory that returns an nn.Module",
                f"{type(made).__name__}",
                "Return the network itself.",
            )
        whole = unwrapped(made, f"model {self.name}")
        _check_inputs(whole, f"model {self.name}")
        for name, tensor in whole.state_dict().items():
            if isinstance(tensor, Tensor):
                check_finite(tensor, f"model {self.name}, tensor {name}")
        return whole


class FactorySegment(Segment):
    """A module that is not cut, or consecutive children of an ``nn.Sequential`` under their own
    names, in the order of their calls. Floating-point inputs are cast to ``dtype``."""

    def __init__(
        self,
        module: nn.Module,
        children: Mapping[str, nn.Module | None] | None,
        first: bool,
        last: bool,
        name: str,
        dtype: torch.dtype,
    ) -> None:
        self.module, self.first, self.last = module, first, last
        self._children, self._name, self._dtype = children, name, dtype
        self._parameters = inspect.signature(module.forward).parameters

    def forward(self, batch: Batch, hidden: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """The output ``[N, ...]`` of the last child or of the whole network (its ``logits`` where
        it has them), alone in a tuple as it comes; UserError if it is no tensor."""
        assert (hidden is None) == self.first, "the first segment, and only that, takes no hidden"
        (value,) = (batch.inputs,) if hidden is None else hidden
        if hidden is None and value.is_floating_point():
            value = value.to(self._dtype)
        if self._children is None:
            with self._calling(batch, value, ""):
                output = self.module(value, **self._options(batch))
            output = getattr(output, "logits", output)
            self._check(
                output, "", "a tensor, or an output with logits, from the module's forward",
                "Wrap the module so that its forward returns the tensor that the objective takes.",
            )  # fmt: skip
            return (output,)
        for name, child in self._children.items():
            assert child is not None
            with self._calling(batch, value, f", child {name}"):
                value = child(value)
            self._check(
                value, f", child {name}", "a tensor from each child of an nn.Sequential",
                "Wrap the Sequential in a module of your own: it then runs as one stage.",
            )  # fmt: skip
        return (value,)

    def _calling(self, batch: Batch, value: Tensor, part: str) -> AbstractContextManager[None]:
        """Around a call of the network, or of a part of it: what it raises is about its input."""
        return users_code(
            f"model {self._name}{part}",
            f"a forward that takes a tensor of shape {list(value.shape)}, of the examples "
            f"{shown_ids(batch.ids)}",
            "Give inputs of the shape that the network takes, or correct the network.",
        )

    def _options(self, batch: Batch) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if "attention_mask" in self._parameters:
            options["attention_mask"] = None if batch.mask is None else batch.mask.to(torch.int64)
        if "use_cache" in self._parameters:
            options["use_cache"] = False
        return options | dict(batch.named)

    def _check(self, output: object, part: str, expected: str, remedy: str) -> None:
        if not isinstance(output, Tensor):
            where, got = f"model {self._name}{part}", f"a {type(output).__name__}"
            raise UserError(where, expected, got, remedy)


def _import(name: str, base: Path | None) -> Callable[[], nn.Module]:
    """The callable that ``package.module:factory`` names."""
    folder = str((base or Path.cwd()).absolute())
    wanted = "{1} in an importable module {0}".format(*name.split(":"))
    remedy = f"Check the name; imports also look in {folder}."
    with user_errors(f"model {name}", wanted, remedy, Exception):
        found = import_named(name, folder)
    if not callable(found):
        raise UserError(
            f"model {name}",
            "a callable that returns an nn.Module",
            f"a {type(found).__name__}",
            "Name a function or a class that takes no arguments.",
        )
    return cast("Callable[[], nn.Module]", found)


# What a forward is given beside the inputs, where it takes it.
_OPTIONS = ("attention_mask", "use_cache", "token_type_ids")


def _check_inputs(whole: nn.Module, where: str) -> None:
    """Refuse a forward that cannot be called with the inputs alone; a child's, where it is cut."""
    called = {"": whole} if not _is_cut(whole) else dict(whole.named_children())
    for name, module in called.items():
        parameters = inspect.signature(module.forward).parameters.values()
        takes = [p for p in parameters if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
        several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = [p for p in parameters if p.default is p.empty and p.kind not in several]
        beyond = [p for p in needed if p not in takes[:1] and (name or p.name not in _OPTIONS)]
        if beyond or not takes:
            raise UserError(
                where + (f", child {name}" if name else ""),
                "a forward that is called with the inputs alone"
                + ("" if name else f" ({', '.join(_OPTIONS)} are given where it takes them)"),
                f"forward{inspect.signature(module.forward)}",
                "Return a module of your own around it, whose forward takes one tensor and calls "
                "it with what else it needs; several tensors can be columns of that one.",
            )


def _cut(whole: nn.Module) -> list[list[str]]:
    """Names of the children of each unit; one unit without names when the module is not cut."""
    if not _is_cut(whole):
        return [[]]
    children = list(whole._modules.items())
    reach: dict[int, tuple[int, int]] = {}
    for index, (_, child) in enumerate(children):
        assert child is not None
        # Modules as well: one without weights may still be hooked or hold state.
        for thing in (*child.modules(), *child.parameters(), *child.buffers()):
            first, _last = reach.get(id(thing), (index, index))
            reach[id(thing)] = (first, index)
    joined = {at for first, last in reach.values() for at in range(first + 1, last + 1)}
    units: list[list[str]] = []
    for index, (name, _) in enumerate(children):
        if index in joined:
            units[-1].append(name)
        else:
            units.append([name])
    return units


def _is_cut(whole: nn.Module) -> bool:
    return (
        isinstance(whole, nn.Sequential)
        and type(whole).forward is nn.Sequential.forward
        # A hook on the whole would see only a part.
        and not (whole._forward_hooks or whole._forward_pre_hooks)
        and len(whole) > 0
    )


def _children_of(whole: nn.Module, names: list[str]) -> nn.Sequential:
    # The order of the dictionary is the order of the calls; a module may come twice.
    return nn.Sequential(
        OrderedDict((name, cast(nn.Module, whole._modules[name])) for name in names)
    )


def _float_and_other_bytes(module: nn.Module) -> tuple[int, int]:
    """Number of elements whose dtype is chosen later, and bytes of all others."""
    wanted = floats(module, torch.float32)
    tensors = (*module.parameters(), *module.buffers())
    others = sum(t.nbytes for t in tensors if id(t) not in wanted)
    return sum(t.numel() for t in wanted.values()), others


def _fingerprint(whole: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: describe_tensor(tensor)
        for name, tensor in sorted(whole.state_dict().items())
        if isinstance(tensor, Tensor)
    }


def _configuration(whole: nn.Module) -> dict[str, Any]:
    library = sys.modules.get("transformers")
    if library is None:
        return {}
    held = (getattr(module, "config", None) for module in whole.modules())
    found = next((config for config in held if isinstance(config, library.PreTrainedConfig)), None)
    return {} if found is None else config_print(found)


def _embeddings(whole: nn.Module) -> list[nn.Module]:
    """The modules that look whole numbers up in a table."""
    kinds = nn.Embedding | nn.EmbeddingBag
    return [module for module in whole.modules() if isinstance(module, kinds)]


def _takes_tokens(whole: nn.Module) -> bool:
    """Whether the inputs are token ids: an embedding comes first, or HF's way to get it exists."""
    if callable(getattr(whole, "get_input_embeddings", None)):
        return True
    leaves = [module for module in whole.modules() if not list(module.children())]
    return bool(leaves) and isinstance(leaves[0], nn.Embedding | nn.EmbeddingBag)
