"""A network that a callable of the user's returns; an ``nn.Sequential`` is cut between children."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block
from raycurv.models.checkpoint import check_finite, describe_tensor
from raycurv.models.checkpoint_files import CheckpointFile, state_file
from raycurv.models.stored import Patch, StoredWeight, no_tensor_of_its_own, replacements


class FactoryModel:
    """A model that its factory builds whole, wherever a part of it is needed.

    The weights seen first are the model: a later build (in another process, say) that has others
    is refused, since stages of different models would look like one.

    Args:
        name: what the user gave.
        make: the callable, or ``None`` when it is imported by ``name``.
        base: directory that an import may also look in.

    Raises:
        UserError: the factory cannot be imported, is not callable, raises, returns something else
            than an ``nn.Module``, or weights that are not finite.
    """

    width: int | None = None
    default_scope: tuple[str, ...] = ()
    tied_head: str | None = None
    max_positions: int | None = None
    vocab_size: int | None = None
    tokenizer_dir: str | None = None

    def __init__(
        self, name: str, make: Callable[[], nn.Module] | None, base: Path | None = None
    ) -> None:
        self.name = name
        self._make, self._base = make, base
        whole = self._new()
        self._whole: nn.Module | None = whole
        self._fingerprint = _fingerprint(whole)
        self._children, self._unit_children = _cut(whole)
        self._costs = tuple(
            float(max(1, _numel(_children_of(whole, names)))) if names else float(_numel(whole))
            for names in self._unit_children
        )
        self._bytes = [
            _float_and_other_bytes(_children_of(whole, names) if names else whole)
            for names in self._unit_children
        ]
        self.token_inputs = _takes_tokens(whole)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_whole": None}

    @property
    def units(self) -> int:
        """Runs of children of an ``nn.Sequential`` that share no weight with others; else 1."""
        return len(self._unit_children)

    @property
    def unit_costs(self) -> tuple[float, ...]:
        """Weights of each unit."""
        return self._costs

    def skeleton(self) -> nn.Module:
        """The whole model as the factory made it: frozen, in eval mode. Not to be changed."""
        if self._whole is None:
            self._whole = self._same()
        return self._whole

    def unit_of(self, module_name: str) -> int:
        """The unit that holds a module."""
        child = module_name.split(".")[0]
        for unit, names in enumerate(self._unit_children):
            if child in names:
                return unit
        return 0

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Per entry of the state dict its dtype, shape and a hash of sampled bytes."""
        return self._fingerprint

    def weight_bytes(self, units: range, dtype: torch.dtype) -> int:
        """Bytes of the tensors of ``units``, floating-point ones cast to ``dtype``."""
        return sum(self._bytes[unit][0] * dtype.itemsize + self._bytes[unit][1] for unit in units)

    def rehearse(self, skeleton: nn.Module, examples: int, tokens: int) -> bool:
        """No: what such a network takes is known from the data alone."""
        return False

    def build(
        self, units: range, dtype: torch.dtype, device: torch.device
    ) -> ChildrenSegment | WholeSegment:
        """The children of ``units`` (or the whole module), cast, frozen, in eval mode.

        Raises:
            UserError: the factory's weights differ from those seen first, or overflow ``dtype``.
        """
        assert 0 <= units.start < units.stop <= self.units and units.step == 1, units
        # A model that is kept to be looked at must not change under a cast: copy what is taken.
        whole, kept = (self._same(), False) if self._whole is None else (self._whole, True)
        names = [name for unit in units for name in self._unit_children[unit]]
        part: nn.Module = _children_of(whole, names) if names else whole
        if kept:
            part = copy.deepcopy(part)
        part.to(device=device, dtype=dtype)
        for name, tensor in part.state_dict().items():
            check_finite(tensor, f"model {self.name}, tensor {name}")
        part.eval().requires_grad_(False)
        if not names:
            return WholeSegment(part, self.name, dtype)
        first, last = units.start == 0, units.stop == self.units
        return ChildrenSegment(cast(nn.Sequential, part), first, last, self.name, dtype)

    def stored(self, block: Block) -> StoredWeight:
        """Where a block's weight stands in the state dict.

        Raises:
            UserError: it is computed from others, or it is another module's, too.
        """
        whole = self.skeleton()
        names: dict[int, list[str]] = {}
        for name, parameter in whole.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        alone = {group[0] for group in names.values() if len(group) == 1}
        weight = f"{block.name}.weight"
        bias = f"{block.name}.bias" if block.bias else None
        for key in (weight, bias):
            if key is not None and key not in alone:
                shared = any(key in group for group in names.values())
                raise no_tensor_of_its_own(
                    block, "one that several modules share" if shared else "one made of others"
                )
        return StoredWeight.among(_State(whole), block, weight, bias)

    def block_weight(self, block: Block) -> Tensor:
        """A block's weight as the factory made it, as the matrix ``[O, I]``, in its own memory.

        Raises:
            UserError: see :meth:`stored`.
        """
        return self.stored(block).matrix(_State(self.skeleton()).read)

    def files(self, patches: Sequence[Patch] = ()) -> tuple[CheckpointFile, ...]:
        """``model.safetensors``: the state dict under its own names, with the patches in it.

        Raises:
            UserError: an entry that such a file cannot hold; see :meth:`stored`.
        """
        replaced = replacements(self.stored, patches)
        return (state_file(self.name, self.skeleton().state_dict(), replaced),)

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
        try:
            whole = make()
        except Exception as error:
            raise UserError(
                f"model {self.name}",
                "a factory that returns an nn.Module when called without arguments",
                f"{type(error).__name__}: {error}",
                "Call it in Python to see where it fails.",
            ) from error
        if not isinstance(whole, nn.Module):
            raise UserError(
                f"model {self.name}",
                "a factory that returns an nn.Module",
                f"{type(whole).__name__}",
                "Return the network itself.",
            )
        for name, tensor in whole.state_dict().items():
            if isinstance(tensor, Tensor):
                check_finite(tensor, f"model {self.name}, tensor {name}")
        return whole.eval().requires_grad_(False)


class _State:
    """The tensors of a module, as those of a checkpoint."""

    def __init__(self, module: nn.Module) -> None:
        self._state = module.state_dict()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._state[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return cast(torch.dtype, self._state[key].dtype)

    def read(self, key: str) -> Tensor:
        return cast(Tensor, self._state[key].detach().clone())


class ChildrenSegment:
    """Consecutive children of an ``nn.Sequential``, under their names in the whole."""

    def __init__(
        self, module: nn.Sequential, first: bool, last: bool, name: str, dtype: torch.dtype
    ) -> None:
        self.module: nn.Module = module
        self.first, self.last = first, last
        self._name, self._dtype = name, dtype

    def forward(self, batch: Batch, hidden: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """Output of the last child ``[N, ...]``, alone in a tuple.

        Args:
            batch: the microbatch.
            hidden: ``[N, ...]`` from the segment before, alone in a tuple; ``None`` for the first
                segment, which takes ``batch.inputs``, cast to the model's dtype when they are
                floating point.

        Raises:
            UserError: a child that returns something else than a tensor.
        """
        assert (hidden is None) == self.first, "the first segment, and only that, takes no hidden"
        (value,) = (_cast(batch.inputs, self._dtype),) if hidden is None else hidden
        for name, child in self.module._modules.items():
            assert child is not None
            value = child(value)
            if not isinstance(value, Tensor):
                raise UserError(
                    f"model {self._name}, child {name}",
                    "a tensor from each child of an nn.Sequential",
                    f"a {type(value).__name__}",
                    "Wrap the Sequential in a module of your own: it then runs as one stage.",
                )
        return (value,)

    def head(self, part: Tensor) -> Tensor:
        """The outputs are those of the last child: ``part`` itself."""
        assert self.last, "only the last segment holds the head"
        return part


class WholeSegment:
    """A module that is not cut."""

    first = True
    last = True

    def __init__(self, module: nn.Module, name: str, dtype: torch.dtype) -> None:
        self.module = module
        self._name, self._dtype = name, dtype
        parameters = inspect.signature(module.forward).parameters
        self._masked = "attention_mask" in parameters
        self._cached = "use_cache" in parameters

    def forward(self, batch: Batch, hidden: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """The module's output ``[N, ...]``, or its ``logits`` where it has them; in a tuple.

        Raises:
            UserError: the output is not a tensor.
        """
        assert hidden is None, "a whole module takes no hidden states"
        options: dict[str, Any] = {}
        if self._masked:
            options["attention_mask"] = None if batch.mask is None else batch.mask.to(torch.int64)
        if self._cached:
            options["use_cache"] = False
        output = self.module(_cast(batch.inputs, self._dtype), **options)
        output = getattr(output, "logits", output)
        if not isinstance(output, Tensor):
            raise UserError(
                f"model {self._name}",
                "a tensor, or an output with logits, from the module's forward",
                f"a {type(output).__name__}",
                "Wrap the module so that its forward returns the tensor that the objective takes.",
            )
        return (output,)

    def head(self, part: Tensor) -> Tensor:
        """The outputs are those of the module: ``part`` itself."""
        return part


def _import(name: str, base: Path | None) -> Callable[[], nn.Module]:
    """The callable that ``package.module:factory`` names."""
    module_name, _, attribute = name.partition(":")
    # Where a script lives in jobs/, the working directory is not on the path; as for `python -m`.
    folder = str((base or Path.cwd()).absolute())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise UserError(
            f"model {name}",
            f"{attribute} in an importable module {module_name}",
            f"{type(error).__name__}: {error}",
            f"Check the name; imports also look in {folder}.",
        ) from error
    if not callable(found):
        raise UserError(
            f"model {name}",
            "a callable that returns an nn.Module",
            f"a {type(found).__name__}",
            "Name a function or a class that takes no arguments.",
        )
    return cast("Callable[[], nn.Module]", found)


def _cut(whole: nn.Module) -> tuple[list[str], list[list[str]]]:
    """Names of the children, and those of each unit; one unit without names for other modules."""
    plain = (
        isinstance(whole, nn.Sequential)
        and type(whole).forward is nn.Sequential.forward
        # A hook on the whole would see only a part.
        and not (whole._forward_hooks or whole._forward_pre_hooks)
        and len(whole) > 0
    )
    if not plain:
        return [], [[]]
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
    return [name for name, _ in children], units


def _children_of(whole: nn.Module, names: list[str]) -> nn.Sequential:
    # The order of the dictionary is the order of the calls; a module may come twice.
    return nn.Sequential(
        OrderedDict((name, cast(nn.Module, whole._modules[name])) for name in names)
    )


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _float_and_other_bytes(module: nn.Module) -> tuple[int, int]:
    """Number of floating-point elements (their dtype is chosen later), and bytes of all others."""
    floats = others = 0
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            floats += tensor.numel()
        else:
            others += tensor.numel() * tensor.element_size()
    return floats, others


def _fingerprint(whole: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: describe_tensor(tensor)
        for name, tensor in sorted(whole.state_dict().items())
        if isinstance(tensor, Tensor)
    }


def _takes_tokens(whole: nn.Module) -> bool:
    """Whether the inputs are token ids: an embedding comes first, or HF's way to get it exists."""
    if callable(getattr(whole, "get_input_embeddings", None)):
        return True
    leaves = [module for module in whole.modules() if not list(module.children())]
    return bool(leaves) and isinstance(leaves[0], nn.Embedding | nn.EmbeddingBag)


def _cast(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    return inputs.to(dtype) if inputs.is_floating_point() else inputs
