"""Low-rank matrices in a model, by PEFT's own modules (Hu et al. 2022, arXiv:2106.09685).

    y = W x + s · B A x        LoRA: s = α / r; rsLoRA: s = α / √r
    y = m / |W + s B A| · (W x + s · B A x)        DoRA: the norm of each output's row, a constant
    W ← W + s B A        merged

A layer ``NAME`` that has such matrices becomes PEFT's: the layer itself is ``NAME.base_layer``, and
its matrices are the linear layers ``NAME.lora_A.ADAPTER`` and ``NAME.lora_B.ADAPTER``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raycurv.errors import UserError, in_words, shortened
from raycurv.jsonfile import checksum
from raycurv.models.adapter import INSTALL, MERGE_BY_PEFT, Adapter
from raycurv.models.checkpoint import Checkpoint, check_finite
from raycurv.models.hf_class import library_errors
from raycurv.models.pieces import Place
from raycurv.models.unused import listed

_PREFIX = "base_model.model."
# What PEFT puts below the name of a layer.
_INSIDE = re.compile(r"\.(base_layer|lora_[A-Za-z_]+)(\..*)?$")


@dataclass(frozen=True)
class Change:
    """What one adapter does to one linear layer.

    Attributes:
        a, b: keys of the matrices ``[r, I]`` and ``[O, r]``.
        bias: key of what is added to the layer's bias, if anything is.
        magnitude: key of DoRA's lengths of rows ``[O]``, if it is of that kind.
        rank: r.
        scaling: s.
        transposed: whether the layer holds its weight as ``[I, O]``.
    """

    a: str
    b: str
    bias: str | None
    magnitude: str | None
    rank: int
    scaling: float
    transposed: bool

    def merged(self, weight: Tensor, adapter: Checkpoint) -> Tensor:
        """A layer's weight with the matrices merged into it, bit for bit as PEFT does it in the
        weight's dtype."""
        dtype = dtype_beside(weight.dtype)
        a, b = (adapter.read(key).to(dtype) for key in (self.a, self.b))
        delta = (b @ a).T * self.scaling if self.transposed else (b @ a) * self.scaling
        if self.magnitude is None:
            return weight.add_(delta)
        rows, changed = (w.T if self.transposed else w for w in (weight, delta))
        lengths = torch.linalg.norm(rows + changed, dim=1).to(dtype)
        factor = (adapter.read(self.magnitude).to(dtype) / lengths)[:, None]
        factor = factor.T if self.transposed else factor
        return torch.mul(factor, weight + delta).to(weight.dtype)

    def merged_bias(self, bias: Tensor, adapter: Checkpoint) -> Tensor:
        """As :meth:`merged`, of the layer's bias."""
        assert self.bias is not None
        return bias.add_(adapter.read(self.bias).to(dtype_beside(bias.dtype)) * self.scaling)


@dataclass(frozen=True)
class Placed:
    """Where the tensors of one adapter go in a model.

    Attributes:
        changes: the layers that have its matrices, by name.
        keys: of the tensors, by the names of the parameters in the model with PEFT's modules.
        instead: keys of those in place of weights of the base, by these weights' names there.
    """

    changes: Mapping[str, Change]
    keys: Mapping[str, str]
    instead: Mapping[str, str]

    def fingerprint(self, adapter: Adapter, merged: bool) -> dict[str, dict[str, Any]]:
        """An entry ``adapter NAME KEY`` for each tensor, and one ``adapter NAME`` for how they are
        put in."""
        tensors = adapter.checkpoint.fingerprint().items()
        how = {"changes": {n: asdict(c) for n, c in self.changes.items()}, "merged": merged}
        entry = {"dtype": "adapter", "shape": [len(self.changes)], "hash": checksum(how)}
        named = f"adapter {adapter.name}"
        return {named: entry} | {f"{named} {key}": said for key, said in tensors}

    def __str__(self) -> str:
        ranks = sorted({change.rank for change in self.changes.values()})
        dora = any(change.magnitude for change in self.changes.values())
        said = f"{'DoRA' if dora else 'LoRA'} of rank {', '.join(map(str, ranks))} on "
        said += f"{len(self.changes)} layers"
        return said + (
            f", in place of the base's own {listed(self.instead)}" if self.instead else ""
        )


def dtype_beside(dtype: torch.dtype) -> torch.dtype:
    """In which dtype the matrices are that stand beside weights of a dtype: as PEFT loads them, in
    no less than float32."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def below(name: str) -> str:
    """The name of a base's layer or parameter, of one that has PEFT's modules in it."""
    return _INSIDE.sub("", name)


def put_matrices(
    model: nn.Module, adapters: Sequence[Adapter], placed: Sequence[Placed] = ()
) -> tuple[Any, ...]:
    """Put the matrices of adapters into a model, on the meta device; all of them are active, and
    trained, and the base's weights are not.

    Args:
        model: an HF model, maybe on the meta device.
        adapters: in the order in which their outputs are added.
        placed: where the matrices go that are put in, if that is known; else it follows from each
            adapter's configuration.

    Returns:
        for each adapter the names of its layers.

    Raises:
        UserError: PEFT is not there; an adapter does not fit the model.
    """
    peft = _peft(adapters[0])
    found = []
    for n, adapter in enumerate(adapters):
        exactly = {}
        if placed:
            if not placed[n].changes:
                continue
            # In the spelling that PEFT takes names of layers from.
            exactly = {
                "state_dict": {f"{layer}.lora_A.weight": None for layer in placed[n].changes}
            }
        with _library_errors(adapter, model):
            peft.inject_adapter_in_model(
                _peft_config(peft, adapter), model, adapter.name, low_cpu_mem_usage=True, **exactly
            )
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer) and adapter.name in module.r
        }
        _check_kinds(peft, adapter, layers)
        found.append(tuple(layers))
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_adapter([a.name for a in adapters if a.name in module.r])
            for lengths in module.lora_magnitude_vector.values():
                lengths.get_lora_weight = _product
    for adapter in adapters:
        for _, module in _kept_whole(model, adapter):
            module.requires_grad_(True)
    return tuple(found)


def find_places(model: nn.Module, adapters: Sequence[Adapter]) -> tuple[Placed, ...]:
    """Put adapters into a model on the meta device, and find where each of their tensors goes.

    Raises:
        UserError: as for :func:`put_matrices`; a tensor that is missing, misshapen, or that nothing
            in the model takes.
    """
    base = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    layers = put_matrices(model, adapters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tuple(
            _placed(model, adapter, names, base)
            for adapter, names in zip(adapters, layers, strict=True)
        )


def take_out(model: nn.Module, placed: Sequence[Placed]) -> None:
    """Give a model the layers back that matrices were put into; all its weights are trained."""
    for name in {name for one in placed for name in one.changes}:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, getattr(owner, child).base_layer)
    del model.peft_config
    model.requires_grad_(True)


def fill(
    model: nn.Module,
    adapters: Sequence[Adapter],
    placed: Sequence[Placed],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Read the tensors of adapters that a model has a place for.

    Raises:
        UserError: one that is not finite, or in a damaged file.
    """
    there = dict(model.named_parameters(remove_duplicate=False))
    for adapter, one in zip(adapters, placed, strict=True):
        for name, key in {**one.keys, **one.instead}.items():
            if name not in there:
                continue
            owner, _, leaf = name.rpartition(".")
            held = dtype_beside(dtype) if name in one.keys else there[name].dtype
            tensor = adapter.checkpoint.read(key).to(held)
            check_finite(tensor, f"{adapter.where}, tensor {key}")
            module = model.get_submodule(owner)
            setattr(module, leaf, nn.Parameter(tensor.to(device), requires_grad=False))


class Merged(Checkpoint):
    """A checkpoint with adapters merged into its weights, each as it is read, in the dtype in which
    it is stored (or in float32, if it is dequantised).

    Attributes:
        changes: by the checkpoint's key, what is done to its tensor, in order.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapters: Sequence[Adapter],
        placed: Sequence[Placed],
        keys: Mapping[str, str],
    ) -> None:
        self.__dict__ |= base.__dict__
        self._base = base
        self.changes: dict[str, list[Any]] = {}
        for adapter, one in zip(adapters, placed, strict=True):
            source = adapter.checkpoint
            for name, key in one.instead.items():
                self._change(adapter, keys, below_parameter(name), partial(_replaced, source, key))
            for layer, change in one.changes.items():
                with_matrices = partial(change.merged, adapter=source)
                self._change(adapter, keys, f"{layer}.weight", with_matrices)
                if change.bias is not None:
                    with_bias = partial(change.merged_bias, adapter=source)
                    self._change(adapter, keys, f"{layer}.bias", with_bias)

    def _change(self, adapter: Adapter, keys: Mapping[str, str], name: str, change: Any) -> None:
        key = keys.get(name)
        others = [other for other, k in keys.items() if k == key and other != name]
        if key is None or others:
            raise UserError(
                f"--merge-adapter {adapter.directory}", "weights that are one tensor each",
                f"{name}, which is {others[0]}, too" if others
                else f"{name}, which the base's checkpoint has not as one tensor",
                "Leave --merge-adapter out: its matrices then stand beside the base's weights.",
            )  # fmt: skip
        self.changes.setdefault(key, []).append(change)

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        if key not in self.changes:
            return self._base.read(key, dtype)
        tensor = self._base.read(key)
        for change in self.changes[key]:
            tensor = change(tensor)
        return tensor if dtype is None else tensor.to(dtype)

    def read_part(self, place: Place) -> Tensor:
        if place.key not in self.changes:
            return self._base.read_part(place)
        return place.of(self.read(place.key)).clone()

    def chunks(self, file: str, replaced: Mapping[str, Any]) -> Iterator[bytes | memoryview]:
        merged = {key: partial(self.read, key) for key in self.changes}
        return super().chunks(file, {**merged, **replaced})


def below_parameter(name: str) -> str:
    """The base's name of a parameter of its own in a model with PEFT's modules."""
    return name.replace(".base_layer.", ".")


def _replaced(adapter: Checkpoint, key: str, weight: Tensor) -> Tensor:
    return adapter.read(key).to(weight.dtype)


def _product(lora_A: Any, lora_B: Any, adapter_name: str | None = None) -> Tensor:
    """``B A`` without a call of the two layers: only the model's own rows go through these."""
    found: Tensor = lora_B.weight @ lora_A.weight
    return found


def _peft(adapter: Adapter) -> Any:
    """The library, which takes seconds to import."""
    try:
        import peft
    except ImportError as error:
        raise UserError(
            adapter.where, "PEFT, whose modules hold an adapter's matrices", in_words(error),
            f"Install it: {INSTALL}.",
        ) from error  # fmt: skip
    return peft


def _peft_config(peft: Any, adapter: Adapter) -> Any:
    """What PEFT makes of an adapter's configuration, without dropout, and without a start of its
    own: every tensor is read."""
    said = dict(adapter.config)
    saved = said.pop("modules_to_save", None)
    if saved:
        # PEFT puts no matrices into a module that is there as a whole.
        left = said.get("exclude_modules") or []
        if not isinstance(left, str):
            left = "|".join(rf"(.*\.)?{re.escape(name)}" for name in left)
        whole = "|".join(rf"(.*\.)?{re.escape(name)}(\..*)?" for name in saved)
        said["exclude_modules"] = f"({left})|{whole}" if left else whole
    return peft.LoraConfig(**said, lora_dropout=0.0, init_lora_weights=False, inference_mode=False)


@contextmanager
def _library_errors(adapter: Adapter, model: nn.Module) -> Iterator[None]:
    """Around PEFT: whatever it raises is about an adapter that does not fit."""
    base = f"an adapter of this base ({type(model).__name__})"
    remedy = f"Give the base that it was trained on as --model{adapter.made_for}."
    with warnings.catch_warnings(), library_errors(adapter.where, base, remedy=remedy):
        warnings.simplefilter("ignore")
        yield


def _check_kinds(peft: Any, adapter: Adapter, layers: Mapping[str, nn.Module]) -> None:
    """Refuse matrices of other layers than linear ones."""
    for name, layer in layers.items():
        if type(layer) is not peft.tuners.lora.Linear:
            of = getattr(layer, "base_layer", layer)
            raise UserError(
                f"{adapter.where}, {name}", "LoRA on a linear layer",
                f"LoRA on {type(of).__name__} ({type(layer).__name__})", MERGE_BY_PEFT,
            )  # fmt: skip


def _placed(
    model: nn.Module, adapter: Adapter, layers: Collection[str], base: Mapping[str, tuple[int, ...]]
) -> Placed:
    """Where the tensors of one adapter go, by the names under which PEFT would save them."""
    peft = _peft(adapter)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with _library_errors(adapter, model):
        saved = peft.get_peft_model_state_dict(
            model, dict(parameters), adapter.name, save_embedding_layers=False
        )
    names = {id(parameter): name for name, parameter in parameters.items()}
    expected = {key.removeprefix(_PREFIX): names[id(p)] for key, p in saved.items()}
    entries = adapter.checkpoint.entries
    given = {key.removeprefix(_PREFIX): key for key in entries}
    keys: dict[str, str] = {}
    instead: dict[str, str] = {}
    strangers = []
    for short, key in given.items():
        name = expected.get(short)
        if name is None and short in parameters and below_parameter(short) in base:
            name = short
        if name is None:
            strangers.append(key)
            continue
        _check_shape(adapter, key, name, tuple(parameters[name].shape))
        (instead if below_parameter(name) in base else keys)[name] = key
    if strangers:
        raise UserError(
            adapter.where, f"every tensor of it in the base ({type(model).__name__})",
            f"{len(strangers)} that have no place there: {listed(strangers)}",
            f"Give the base that it was trained on as --model{adapter.made_for}; or, if that is "
            f"this one: {MERGE_BY_PEFT}",
        )  # fmt: skip
    missing = [short for short, name in expected.items() if name not in keys | instead]
    missing += _missing_modules(model, adapter, instead)
    if missing:
        raise UserError(
            adapter.where, f"every tensor that {adapter.directory.name}'s configuration asks for",
            f"{len(missing)} missing: {listed(missing)}", "Copy the adapter again.",
        )  # fmt: skip
    changes = {}
    for layer in sorted(layers):
        module: Any = model.get_submodule(layer)
        inner = {
            part: keys.get(f"{layer}.{part.replace('NAME', adapter.name)}")
            for part in ("lora_A.NAME.weight", "lora_B.NAME.weight", "lora_B.NAME.bias",
                         "lora_magnitude_vector.NAME.weight")
        }  # fmt: skip
        a, b, bias, magnitude = inner.values()
        assert a is not None and b is not None, layer
        changes[layer] = Change(
            a, b, bias, magnitude, module.r[adapter.name], float(module.scaling[adapter.name]),
            bool(module.fan_in_fan_out),
        )  # fmt: skip
    return Placed(changes, keys, instead)


def _missing_modules(model: nn.Module, adapter: Adapter, instead: Mapping[str, str]) -> list[str]:
    """Weights of modules that the adapter has as a whole, and that it lacks."""
    whole = _kept_whole(model, adapter)
    inner = (name for start, module in whole for name, _ in module.named_parameters(prefix=start))
    return [name for name in inner if name not in instead]


def _kept_whole(model: nn.Module, adapter: Adapter) -> Iterator[tuple[str, nn.Module]]:
    """Modules that an adapter has as a whole, and trains: as in PEFT all whose names end so, with
    ``norm`` ``input_layernorm`` as well. Names that none ends in are of none: PEFT has those of
    heads of classifiers in several spellings."""
    whole = tuple(adapter.config.get("modules_to_save") or ())
    for name, module in model.named_modules():
        if whole and name.endswith(whole):
            yield name, module


def _check_shape(adapter: Adapter, key: str, name: str, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape than its place."""
    entry = adapter.checkpoint.entries[key]
    if not entry.floating or entry.shape != shape:
        rank = re.search(r"\.lora_([AB])\.", name)
        got, remedy = (
            f"{list(entry.shape)} of {entry.stored}",
            (f"Give the base that it was trained on as --model{adapter.made_for}."),
        )
        axis = {"A": 0, "B": 1}[rank.group(1)] if rank else -1
        if rank and len(entry.shape) == 2 and entry.shape[axis] != shape[axis]:
            got += f": rank {entry.shape[axis]}, and not {shape[axis]}"
            remedy = "Take adapter_config.json from where the adapter was saved (r, rank_pattern)."
        raise UserError(
            f"{adapter.where}, tensor {shortened(key)}",
            f"shape {list(shape)}, as adapter_config.json and the base say", got, remedy,
        )  # fmt: skip
