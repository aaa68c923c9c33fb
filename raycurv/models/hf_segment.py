"""The part of an HF model that one stage holds: the whole class, with stand-ins for other parts.

The layers of other segments are replaced by modules that pass their input on, so that masks, rotary
tables, scalings and the head are HF's own code. What enters a segment is put in by the layer before
its first one; what leaves is caught behind its last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from raycurv.batch import Batch
from raycurv.models.anatomy import META, TRIED, Anatomy, Made, frozen, hidden_of, refused
from raycurv.models.hf_calls import Left, calling, given_beside, options, padded_ids, run_until_left
from raycurv.models.model import Segment
from raycurv.models.travelling import Travels, leaves


class HFSegment(Segment):
    """The part of an HF model that one stage holds.

    ``module`` is the whole HF class, pruned, so that names are the whole model's.
    """

    def __init__(self, module: nn.Module, units: range, anatomy: Anatomy) -> None:
        self.module = module
        self.first = units.start == 0
        self.last = units.stop == anatomy.count
        self._anatomy = anatomy
        layers = cast(nn.ModuleList, module.get_submodule(anatomy.layers))
        self._layers = layers
        self._entry = None if self.first else cast(_Passed, layers[units.start - 1])
        self._passed = nn.ModuleList(
            layer if isinstance(layer, _Passed) else _Passed(layer, outputs)
            for layer, outputs in zip(layers, anatomy.outputs, strict=True)
        )
        # In place of what runs before the layers alone, when the head runs.
        self._before = {
            name: _Absent(module.get_submodule(name), anatomy.made.get(name))
            for name in sorted(anatomy.early - anatomy.late if self.first and self.last else ())
        }
        weight = next(layers[units.start].parameters())
        self._stand_ins = [
            part
            for part in (*module.modules(), *self._passed, *self._before.values())
            if isinstance(part, _StandIn)
        ]
        for part in self._stand_ins:
            if isinstance(part, _Absent):
                part.to_give(weight.dtype, weight.device)
        # HF's eager attention takes its softmax in float32, where a mask of float64's lowest number
        # is -Inf: a padded row that sees only padding (sliding windows) becomes NaN and poisons
        # the rest. Padded on the right, no token of a causal model sees padding anyway.
        eager = getattr(getattr(module, "config", None), "_attn_implementation", None) == "eager"
        self._masked = not (anatomy.causal and eager and weight.dtype == torch.float64)
        travels = anatomy.travels
        self._enters = travels.over(units.start)
        # Hooks know what they catch, and not the segment: it goes as soon as nobody has it.
        self._caught = _Caught(travels, travels.over(units.stop))
        self._hooks = [layers[units.stop - 1].register_forward_hook(self._caught.ended)]
        for index in range(units.start, anatomy.count):
            takes = {value for _, value in travels.taken[index]}
            if index in units and takes & set(self._enters):
                hook = self._caught.filling(index)
            elif index not in units and takes & set(self._caught.leaves):
                hook = self._caught.collecting(index)
            else:
                continue
            self._hooks.append(layers[index].register_forward_pre_hook(hook, with_kwargs=True))

    def forward(self, batch: Batch, hidden: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """Hidden states ``[N, T, d]`` behind the last layer of the segment, and what travels
        with them; the first segment embeds ``batch.inputs``."""
        assert (hidden is None) == self.first, "the first segment, and only that, takes no hidden"
        with calling(self.module, batch.inputs):
            return self._run({"input_ids": batch.inputs, **self._beside(batch)}, hidden)

    def _beside(self, batch: Batch) -> dict[str, Any]:
        given = given_beside(self.module, batch)
        return given if self._masked else given | {"attention_mask": None}

    def rehearse(self, hidden: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """What :meth:`forward` gives of a segment on the meta device, and the head in the last; its
        layers are left without hooks.

        Whatever stands in for other segments gives values that are marked by requiring a gradient,
        and nothing else does.

        Raises:
            MarkedError: such a value reached a layer of the segment, or what it gives.
        """
        given, problems = self._anatomy.given, list[str]()
        assert given is not None, "a forward that did not run"

        def watch(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            for path, tensor in leaves((args, kwargs)):
                if tensor.requires_grad:
                    problems.append(f"called with learned values ({path[1]})")

        for layer in self._layers:
            if not isinstance(layer, _Passed):
                hook = layer.register_forward_pre_hook(watch, with_kwargs=True)
                self._hooks.append(hook)
        try:
            for stand_in in self._stand_ins:
                stand_in.marks = True
            with frozen(self.module):
                left = self._run(given.arguments(self.module, *TRIED), hidden)
                if any(tensor.requires_grad for tensor in left):
                    problems.append("with outputs that depend on other layers")
                if self.last:
                    rows, sizes = left[0], TRIED
                    if not self.pooled:
                        rows = rows.flatten(0, 1)[:, None]
                        sizes = len(rows), 1
                    if self._logits(rows, given.arguments(self.module, *sizes)).requires_grad:
                        problems.append("before logits that depend on more than its output")
        finally:
            for stand_in in self._stand_ins:
                stand_in.marks = False
            for hook in self._hooks:
                hook.remove()
        if problems:
            raise MarkedError(problems[0])
        return left

    @property
    def pooled(self) -> bool:
        return self._anatomy.pooled

    def head(self, part: Tensor, batch: Batch | None = None) -> Tensor:
        """Outputs of hidden states, differentiable in these: ``[N, t, V]`` of ``[N, t, d]`` at some
        positions, or where the head pools ``[N S, V]`` of the whole texts' ``[N S, T, d]``.

        HF's forward with every layer passed over. Behind the layers of a language model nothing
        looks from one position to another, so each position goes alone: no masks of t x t, no limit
        on N·t.
        """
        assert self.last, "only the last segment holds the head"
        with calling(self.module, part):
            if self.pooled:
                assert batch is not None
                # Some classes find the last token of a text by its id.
                ids = padded_ids(self.module, batch)
                return self._logits(part, {"input_ids": ids, **self._beside(batch)})
            rows = part.flatten(0, 1)[:, None]
            ids = torch.full(rows.shape[:2], self._no_padding, device=rows.device)
            logits = self._logits(rows, {"input_ids": ids})
        return logits.reshape(*part.shape[:2], -1)

    @property
    def _no_padding(self) -> int:
        """A token that is not the one of padding."""
        config: Any = self.module.config
        return int(getattr(config.get_text_config(), "pad_token_id", None) == 0)

    def _logits(self, rows: Tensor, given: dict[str, Any]) -> Tensor:
        """What the model gives where ``rows`` leave its layers: ``[R, 1, V]`` of hidden states
        ``[R, 1, ...]``, or where its head pools ``[N S, V]`` of ``[N S, T, d]``."""
        entry = cast(_Passed, self._passed[-1])
        hidden, _ = self._anatomy.travels.unpack((rows,), ())
        before = {name: self.module.get_submodule(name) for name in self._before}
        for name, stand_in in (self._before | {self._anatomy.layers: self._passed}).items():
            _replace(self.module, name, stand_in)
        entry.instead = hidden
        try:
            output = self.module(**given | options(self.module))
        finally:
            entry.instead = None
            for name, module in (before | {self._anatomy.layers: self._layers}).items():
                _replace(self.module, name, module)
        return cast(Tensor, output.logits)

    def _run(
        self, given: dict[str, Any], entering: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        caught, travels = self._caught, self._anatomy.travels
        caught.values, caught.hidden = {}, None
        if entering is not None:
            assert self._entry is not None
            self._entry.instead, caught.values = travels.unpack(entering, self._enters)
        try:
            run_until_left(self.module, given)
            assert caught.hidden is not None
            return travels.pack(caught.hidden, [(v, caught.values[v]) for v in caught.leaves])
        finally:
            if self._entry is not None:
                self._entry.instead = None
            caught.values, caught.hidden = {}, None


@dataclass
class _Caught:
    """What enters and leaves a segment, of the forward under way.

    Attributes:
        leaves: numbers of the values that leave beside hidden states.
        values: those that are there, by number.
        hidden: what leaves its last layer.
    """

    travels: Travels
    leaves: tuple[int, ...]
    values: dict[int, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None

    def ended(self, layer: nn.Module, args: Any, output: Any) -> None:
        """A hook behind the segment's last layer."""
        self.hidden = hidden_of(output)
        self._leave()

    def filling(self, index: int) -> Callable[..., Any]:
        """A hook before a layer of the segment, which is called with the values that entered."""

        def fill(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return self.travels.put(index, (args, kwargs), self.values)

        return fill

    def collecting(self, index: int) -> Callable[..., Any]:
        """A hook before a layer behind the segment, of whose arguments some leave."""

        def collect(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            missing = set(self.leaves) - self.values.keys()
            self.values |= self.travels.found(index, (args, kwargs), missing)
            self._leave()

        return collect

    def _leave(self) -> None:
        """Leave the forward where all is there that leaves."""
        if self.values.keys() >= set(self.leaves):
            raise Left


class MarkedError(Exception):
    """What would not be the whole model's in a part of it: what a layer is called with, say."""


class _StandIn(nn.Module):
    """In place of a module that another segment holds.

    What model classes read off that module is read off it still, on the meta device, where it was
    built and stays: plain facts such as a layer's kind of attention, or weights to be initialised.

    Attributes:
        marks: whether what it gives requires a gradient, for a trial.
    """

    marks = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_module" not in self.__dict__:
                raise
            return getattr(self.__dict__["_module"], name)


class _Passed(_StandIn):
    """In place of a layer: returns its input, or the tensor that was put ``instead``, in a tuple of
    ``outputs`` values where the layer does so."""

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        super().__init__(layer)
        self.outputs = outputs
        self.instead: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_states if self.instead is None else self.instead
        return (hidden, *[None] * (self.outputs - 1)) if self.outputs else hidden


class _Absent(_StandIn):
    """In place of a module with weights outside the layers: gives nothing in the shape of what it
    gave to the whole model. What is made of it is replaced at the first layer."""

    def __init__(self, module: nn.Module, made: Made | None) -> None:
        super().__init__(module)
        self.made = made
        self.reading = False

    def to_give(self, dtype: torch.dtype, device: torch.device) -> None:
        """Give what is of this dtype, on this device; the same in place of weights that are read
        off it, once the model is built."""
        self.dtype, self.device = dtype, device
        self.reading = True

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if not isinstance(found, nn.Parameter) or not (found.is_meta and self.reading):
            return found
        return self._nothing(found.shape)

    def _nothing(self, shape: Sequence[int]) -> Tensor:
        zero = torch.zeros((), dtype=self.dtype, device=self.device, requires_grad=self.marks)
        return zero.expand(*shape)

    def forward(self, given: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self.made is None:
            return given
        shape: Sequence[int] = (1,) * (self.made.axes - 1)
        if isinstance(given, Tensor):
            # Token ids, and what is looked up by others (a length, say); or hidden states.
            like = given.shape[:-1] if given.is_floating_point() else given.shape
            if len(like) + 1 == self.made.axes:
                shape = like
        nothing = self._nothing((*shape, self.made.columns))
        return nothing.contiguous() if self.made.writes else nothing


def _stand_ins(module: nn.Module, units: range, anatomy: Anatomy) -> dict[str, nn.Module]:
    """What takes the place of the modules that other segments than that of ``units`` hold."""
    found: dict[str, nn.Module] = {
        anatomy.layer(index): _Passed(
            module.get_submodule(anatomy.layer(index)), anatomy.outputs[index]
        )
        for index in range(anatomy.count)
        if index not in units
    }
    kept = anatomy.outside(units)
    # A tie is resolved by HF, from whichever of the two a checkpoint has.
    if anatomy.tied and kept & {anatomy.embedding, anatomy.head}:
        kept |= {anatomy.embedding, anatomy.head}
    for name in sorted((anatomy.early | anatomy.late | anatomy.idle) - kept):
        # What stands below another one that goes, goes with it; above one that stays, stays.
        goes = any(name.startswith(f"{other}.") for other in found)
        stays = {*kept, f"{anatomy.layers}." if anatomy.cut else ""}
        if not goes and not any(other.startswith(f"{name}.") for other in stays):
            found[name] = _Absent(module.get_submodule(name), anatomy.made.get(name))
    return found


def prune(module: Any, units: range, anatomy: Anatomy) -> None:
    """Replace what other segments hold, before anything is loaded."""
    for name, stand_in in _stand_ins(module, units, anatomy).items():
        _replace(module, name, stand_in)
    there = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    module.all_tied_weights_keys = {
        target: source
        for target, source in module.all_tied_weights_keys.items()
        if target in there and source in there
    }


def untie(module: nn.Module, units: range, anatomy: Anatomy) -> None:
    """Replace the end of a tie that other segments hold, once the tie is resolved: both ends were
    there for that."""
    tied = {anatomy.embedding, anatomy.head} if anatomy.tied else set()
    for name in tied - anatomy.outside(units):
        if next(module.get_submodule(name).parameters(), None) is not None:
            # A stand-in keeps what it stands for, which must not keep weights.
            gone = module.get_submodule(name).to(META)
            _replace(module, name, _Absent(gone, anatomy.made.get(name)))


def try_cuts(whole: nn.Module, anatomy: Anatomy, directory: Path) -> None:
    """Run the first, a middle and the last layer on the meta device, each as a segment of its own;
    all of them where more than hidden states travels.

    Raises:
        UserError: a segment fails that is a part of a model that ran whole, or takes what is not
            the whole model's.
    """
    # One layer each, for all layers have run whole.
    count, more = anatomy.count, any(anatomy.travels.taken)
    tried = range(count) if more else sorted({0, min(1, count - 1), count - 1})
    hidden: tuple[Tensor, ...] | None = None
    for index in tried:
        units = range(index, index + 1)
        stand_ins = _stand_ins(whole, units, anatomy)
        held = {name: whole.get_submodule(name) for name in stand_ins}
        for name, stand_in in stand_ins.items():
            _replace(whole, name, stand_in)
        try:
            hidden = HFSegment(whole, units, anatomy).rehearse(hidden)
        except MarkedError as error:
            raise refused(whole, directory, f"layer {index} {error}") from error
        except Exception as error:
            # Foreign code, as in finding the parts.
            part = "last" if index + 1 == count else "first" if index == 0 else "middle"
            got = f"a {part} layer that fails alone: {type(error).__name__}: {error}"
            raise refused(whole, directory, got) from error
        finally:
            for name, module in held.items():
                _replace(whole, name, module)


def _replace(module: nn.Module, name: str, by: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, by)
