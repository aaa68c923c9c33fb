"""An HF model with adapters: their matrices beside its weights, or merged into these.

The base is opened, cut and loaded as it is by itself; PEFT's modules are put into each segment
behind that, where the layers are that an adapter changes.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raycurv.errors import UserError, shortened
from raycurv.mathematics.blocks import Block
from raycurv.models.adapter import ADAPTER, Adapter, Adapters
from raycurv.models.checkpoint_files import TOKENIZER_FILES, CheckpointFile
from raycurv.models.hf import HFModel, HFOutline
from raycurv.models.lora import (
    Merged,
    Placed,
    below,
    below_parameter,
    fill,
    find_places,
    put_matrices,
    take_out,
)
from raycurv.models.model import Segment
from raycurv.models.pieces import Parts
from raycurv.models.stored import Patch, StoredWeight
from raycurv.models.unused import listed

# The class of transformers that PEFT's tasks are opened by; one is of any that has no head.
_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
_ANY_TASK = ("FEATURE_EXTRACTION",)
# What a tokenizer makes other tokens of texts or conversations by. (Its configuration is written
# anew by each version of transformers.)
_OF_TEXT = (*(f for f in TOKENIZER_FILES if f != "tokenizer_config.json"), "chat_template.jinja")


class _WithMatrices(HFOutline):
    """What an outline and a model with adapters have in common.

    Attributes:
        adapters: as they were given.
    """

    adapters: Adapters
    _opened: tuple[Adapter, ...]
    _placed: tuple[Placed, ...]

    def _put_in(self) -> None:
        """Put the adapters into the skeleton of the base."""
        base = super().skeleton()
        _check_task(self, self._opened, base)
        self._placed = find_places(base, self._opened)
        _check_layers(self, self._opened, self._placed)
        self._count_matrices(base)
        # The adapters' own are trained, wherever they are; the base's are not.
        self.default_scope = ()
        if self.tied_head is not None and any(self.tied_head in p.changes for p in self._placed):
            self.tied_head = f"{self.tied_head}.base_layer"
        self.notices += tuple(_notices(self, "beside the base's weights"))

    def _count_matrices(self, whole: nn.Module) -> None:
        """Count the weights of the adapters to the layers and modules that they are in."""
        numel = dict(self.anatomy.numel)
        own = {name for one in self._placed for name in one.keys}
        for name, parameter in whole.named_parameters():
            if name in own:
                at = below(name)
                if not self.anatomy.cut:
                    at = ""
                elif at.startswith(f"{self.anatomy.layers}."):
                    at = self.anatomy.layer(self.unit_of(at))
                numel[at] += parameter.numel()
        self.anatomy = replace(self.anatomy, numel=numel)

    def skeleton(self) -> nn.Module:
        if self._skeleton is None:
            put_matrices(super().skeleton(), self._opened)
        return super().skeleton()

    def unit_of(self, module_name: str) -> int:
        return super().unit_of(below(module_name))


class AdaptedOutline(_WithMatrices):
    """As :class:`HFOutline`, with adapters, of which the headers are read."""

    def __init__(
        self, name: str, directory: Path, adapters: Adapters, trust_remote_code: bool = False
    ) -> None:
        self.adapters, self._opened = adapters, adapters.open()
        super().__init__(name, directory, trust_remote_code)
        self._put_in()

    def _made_of(self) -> tuple[Any, ...]:
        return self.name, self.directory, self.adapters, self.trust_remote_code


class _OnBase(HFModel):
    """A model that is made of a base and adapters.

    Args:
        adapters: at least one.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        adapters: Adapters,
        trust_remote_code: bool = False,
        ignored: Sequence[str] = (),
    ) -> None:
        self.adapters, self._opened = adapters, adapters.open()
        self._placed: tuple[Placed, ...] = ()
        self._applied = {a.directory / ADAPTER for a in self._opened}
        super().__init__(name, directory, trust_remote_code, ignored)

    def _made_of(self) -> tuple[Any, ...]:
        name, directory, *more = super()._made_of()
        return name, directory, self.adapters, *more

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """The base's fingerprint, and that of each adapter."""
        found = super().fingerprint()
        for adapter, placed in zip(self._opened, self._placed, strict=True):
            found |= placed.fingerprint(adapter, self.adapters.merged)
        return found


class AdaptedModel(_WithMatrices, _OnBase):
    """A model with the matrices of adapters beside its weights, which are frozen."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._put_in()

    def build(self, units: range, dtype: torch.dtype, device: torch.device) -> Segment:
        segment = super().build(units, dtype, device)
        module = segment.module
        # What stands in for another segment's layer has no weights of its own.
        there = {n for n, m in module.named_modules() if m._parameters}
        here = tuple(
            replace(one, changes={n: c for n, c in one.changes.items() if n in there})
            for one in self._placed
        )
        put_matrices(module, self._opened, here)
        fill(module, self._opened, here, dtype, device)
        module.eval().requires_grad_(False)
        return segment

    def stored(self, block: Block) -> StoredWeight:
        raise self._unmerged(f"block {block.name}")

    def files(self, patches: Sequence[Patch] = ()) -> tuple[CheckpointFile, ...]:
        raise self._unmerged(f"the model {self.name}")

    def _unmerged(self, where: str) -> UserError:
        return UserError(
            where, "a model whose weights are all its own",
            f"one with an adapter beside them ({self._opened[0].directory})",
            "Fit with --merge-adapter, which takes the adapter into the weights.",
        )  # fmt: skip


class MergedModel(_OnBase):
    """A model with adapters merged into its weights, as if PEFT had saved it so: in the dtype in
    which the base's checkpoint has them."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        _check_layers(self, self._opened, self._placed)
        self.notices += tuple(_notices(self, "merged into the base's weights"))

    def _on_meta(self) -> nn.Module:
        whole = super()._on_meta()
        _check_task(self, self._opened, whole)
        self._placed = find_places(whole, self._opened)
        take_out(whole, self._placed)
        keys = {
            name: parts.pieces[0].key
            for name, parts in self._parts.items()
            if parts == Parts.one(parts.pieces[0].key, parts.shape)
        }
        self.checkpoint = Merged(self.checkpoint, self._opened, self._placed, keys)
        return whole


def _check_task(outline: HFOutline, adapters: Sequence[Adapter], whole: nn.Module) -> None:
    """Refuse an adapter of a model of another task, or of another class."""
    opened = type(whole).__name__
    for adapter in adapters:
        auto, remedy = _TASKS.get(adapter.task or "", ""), f"Give its base{adapter.made_for}."
        got = ""
        if adapter.task not in (None, *_ANY_TASK) and auto != outline.task.auto:
            got = f"one of a model of another task ({shortened(repr(adapter.task), 40)})"
            if auto:
                remedy = (
                    f"Save the base as such a model (transformers.{auto}.from_pretrained(BASE, "
                    "…).save_pretrained(DIR), a classifier's with num_labels) and give --model DIR."
                )
        elif adapter.model_class not in (None, opened):
            got = f"one of a {adapter.model_class}"
        if got:
            wanted = f"an adapter of a {opened}, as which {outline.directory} is opened"
            raise UserError(adapter.where, wanted, got, remedy)


def _check_layers(
    outline: HFOutline, adapters: Sequence[Adapter], placed: Sequence[Placed]
) -> None:
    """Refuse what an adapter changes of modules that are not run, or of tied weights, and what
    several have in place of one weight."""
    anatomy = outline.anatomy
    tied = {anatomy.embedding, anatomy.head} if anatomy.tied else set()
    instead: dict[str, Adapter] = {}
    for adapter, one in zip(adapters, placed, strict=True):
        twice = sorted(instead.keys() & one.instead.keys())
        if twice:
            first = instead[twice[0]]
            raise UserError(
                f"--adapter {adapter.directory}",
                "adapters of which one at most has another weight in place of the base's",
                f"{below_parameter(twice[0])} in it and in {first.directory}",
                "Give one of them. To have both, make them a single model with PEFT, and give what "
                "that saves.",
            )  # fmt: skip
        instead |= dict.fromkeys(one.instead, adapter)
        changed = {*one.changes, *(name.rpartition(".")[0] for name in one.instead)}
        idle = sorted(changed & (outline.idle | outline.held))
        replaced = {name.rpartition(".")[0] for name in one.instead} & tied
        if idle or replaced:
            raise UserError(
                f"model {outline.directory}, {(idle or sorted(replaced))[0]}",
                "modules that run with tokens, with weights of their own, where an adapter is",
                "one that is not called" if idle else "the head, which is the input embedding",
                "Merge the adapter into the base with PEFT (merge_and_unload) and give what that "
                "saves.",
            )  # fmt: skip


def _notices(outline: _WithMatrices | _OnBase, how: str) -> Iterator[str]:
    """What is told of each adapter."""
    for adapter, one in zip(outline._opened, outline._placed, strict=True):
        made_for = f", made for {adapter.base}" if adapter.base else ""
        yield f"adapter {adapter.name} of {adapter.directory}{made_for}: {one}, {how}"
        others = [n for n in _OF_TEXT if _differs(outline.directory / n, adapter.directory / n)]
        if others:
            yield (
                f"adapter {adapter.name} has a tokenizer of its own ({listed(others)} differ), "
                f"which texts go through by --tokenizer {adapter.directory} alone"
            )


def _differs(base: Path, own: Path) -> bool:
    """Whether an adapter has a file that its base has not."""
    return own.is_file() and not (base.is_file() and filecmp.cmp(base, own, shallow=False))
