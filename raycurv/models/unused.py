"""Tensors of a checkpoint that its model does not take, and those that it lacks.

A tensor that is left unused can mean another model than the one that was trained: an adapter that
is not applied, biases or layers that ``config.json`` does not know. So each is either known not to
matter, by one of the rules in :func:`reason`, or allowed by the user, or an error.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from raycurv.errors import UserError
from raycurv.models.checkpoint import Entry

FLAG = "--ignore-tensors"
# Of modules put around a network or its parts, which leave their names in those of the tensors.
_INNER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER = ("module.", "base_model.model.", "base_model.", "model.")
_ADAPTER = re.compile(
    r"(^|\.)(lora_[A-Z]\w*|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save|base_layer|"
    r"ia3_l|vera_lambda_[bd]|hada_w\d_[ab]|oft_r|boft_[RS])(\.|$)"
)
_QUANTISED = re.compile(
    r"(^|[._])(qweight|qzeros|scales|g_idx|weight_packed|weight_scale(_inv)?|input_scale|absmax|"
    r"quant_map|quant_state|SCB|weight_zero_point|weight_shape)([._]|$)"
)
# How many patterns of names a message shows.
_SHOWN = 8


def unwrapped(keys: Iterable[str], expected: Collection[str]) -> dict[str, str] | None:
    """Names without what wrappers put before them -> the keys, or ``None`` if none did.

    Args:
        keys: of the tensors that are stored.
        expected: names of the model's tensors, which no wrapper has changed.
    """
    keys = tuple(keys)
    names = [_INNER.sub("", key) for key in keys]
    while names:
        for prefix in _OUTER:
            everywhere = all(name.startswith(prefix) for name in names)
            if everywhere and not any(name.startswith(prefix) for name in expected):
                names = [name.removeprefix(prefix) for name in names]
                break
        else:
            break
    if names == list(keys) or len(set(names)) < len(names):
        return None
    return dict(zip(names, keys, strict=True))


def wrapper_note(keys: Mapping[str, str]) -> str:
    """What a person is told about names that were taken out of a wrapper."""
    name, key = next((name, key) for name, key in keys.items() if name != key)
    return f"the checkpoint was saved from inside a wrapper: {key} is read as {name}, and so on"


@dataclass(frozen=True)
class Known:
    """What a model class says of tensors that it does not take.

    Attributes:
        patterns: on names that may be left unused.
        buffers: names of the tensors that are computed, not loaded.
        modules: names of the modules.
        pretrained: names of the weights that models of its kind have when they are pretrained.
    """

    patterns: tuple[str, ...]
    buffers: frozenset[str]
    modules: frozenset[str]
    pretrained: frozenset[str]

    @classmethod
    def of(
        cls, module: nn.Module, patterns: Iterable[str], pretrained: Iterable[str] = ()
    ) -> Known:
        """Of a model, with the patterns that its class has for itself."""
        buffers = frozenset(name for name, _ in module.named_buffers())
        modules = frozenset(name for name, _ in module.named_modules())
        return cls(tuple(patterns), buffers, modules, frozenset(pretrained))


def reason(name: str, entry: Entry, known: Known) -> str:
    """Why a tensor that the model does not take cannot change its numbers, or ``""``.

    Args:
        name: of the tensor, without a wrapper's prefix.
        entry: where it lies.
        known: of the model.
    """
    if any(re.search(pattern, name) for pattern in known.patterns):
        return "transformers leaves it unused, too"
    last = name.rpartition(".")[2]
    # The base model's name may stand before it or not.
    tails = {name, name.partition(".")[2]}
    if known.buffers & tails or any(buffer.endswith(f".{name}") for buffer in known.buffers):
        return "computed, not loaded"
    if last in ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "freqs_cis"):
        return "a rotary table, computed from config.json"
    if last in ("position_ids", "token_type_ids") and not entry.floating:
        return "positions, computed"
    triangle = len(entry.shape) == 4 and entry.shape[:2] == (1, 1)
    square = triangle and entry.shape[2] == entry.shape[3]
    if last == "bias" and re.search("attn|attention", name) and square:
        return "a causal mask, computed"
    if name in known.pretrained:
        return "of its pretraining, and no part of this model"
    numel = math.prod(entry.shape)
    if last == "masked_bias" and numel == 1:
        return "a constant of a causal mask"
    if not entry.floating:
        return "integers, no weights"
    # A single number beside a weight may scale it; by itself it counts or dates something.
    if numel == 1 and (name.rpartition(".")[0] not in known.modules or "." not in name):
        return "a single number beside the model"
    return ""


def allowed(name: str, key: str, globs: Sequence[str]) -> bool:
    """Whether the user lets a tensor be unused."""
    return any(fnmatch.fnmatchcase(one, glob) for glob in globs for one in (name, key))


def refuse_unused(where: str, unused: Mapping[str, Entry], model: str) -> UserError:
    """The error of tensors that a model does not take, by their keys."""
    return UserError(
        where,
        f"every tensor of the checkpoint in the model ({model})",
        f"{len(unused)} that it does not take: {listed(unused)}",
        f"{_looks_like(unused)} To leave them out on purpose: {FLAG} '{_glob(unused)}'.",
    )


def refuse_missing(
    where: str, missing: Collection[str], unused: Mapping[str, Entry], model: str
) -> UserError:
    """The error of weights that a checkpoint lacks, by the names that the model has for them."""
    instead = f"; it has instead {listed(unused)}" if unused else ""
    if unused and (_adapter(unused) or any(_QUANTISED.search(key) for key in unused)):
        advice = _looks_like(unused)
    else:
        advice = (
            "A missing weight would be a random one: complete the checkpoint, or correct "
            "config.json."
        )
    return UserError(
        where,
        f"every weight of the model ({model}) in the checkpoint",
        f"{len(missing)} missing: {listed(missing)}{instead}",
        advice,
    )


def listed(names: Iterable[str]) -> str:
    """Names in short: those that differ by numbers alone as one, ``layers.{0..3}.weight``."""
    groups: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for name in sorted(names):
        numbers = tuple(map(int, re.findall(r"(?<![^.])\d{1,9}(?![^.])", name)))
        groups[re.sub(r"(?<![^.])\d{1,9}(?![^.])", "{}", name)].append(numbers)
    shown = [_braced(template, numbers) for template, numbers in groups.items()]
    more = f" and {len(shown) - _SHOWN} more of other names" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more


def _braced(template: str, numbers: Sequence[tuple[int, ...]]) -> str:
    parts = template.split("{}")
    if len(parts) != len(numbers[0]) + 1:  # braces of the name's own
        return template
    text = parts[0]
    for column, part in zip(zip(*numbers, strict=True), parts[1:], strict=True):
        values = sorted(set(column))
        run = values == list(range(values[0], values[-1] + 1))
        inner = f"{values[0]}..{values[-1]}" if run else ",".join(map(str, values[:8]))
        inner += "" if run or len(values) <= 8 else ",…"
        text += (str(values[0]) if len(values) == 1 else f"{{{inner}}}") + part
    return text


def _adapter(keys: Iterable[str]) -> bool:
    return any(_ADAPTER.search(key) for key in keys)


def _glob(keys: Iterable[str]) -> str:
    """A glob that takes all of these names."""
    keys = sorted(keys)
    if len(keys) == 1:
        return _plain(keys[0])
    prefix = _common_start(keys)
    ends = [key[len(prefix) :][::-1] for key in keys]
    return f"{_plain(prefix)}*{_plain(_common_start(ends)[::-1])}"


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    length = min(len(first), len(last))
    return first[: next((n for n in range(length) if first[n] != last[n]), length)]


def _plain(name: str) -> str:
    """A name as a glob, any character in place of those that mean something there."""
    return re.sub(r"[][*?]", "?", name)


def _looks_like(unused: Mapping[str, Entry]) -> str:
    """What unused tensors seem to be, and what to do then."""
    if _adapter(unused):
        return (
            "These are the weights of an adapter that was not merged: the model that was trained "
            "is the base with them. Merge them with PEFT (model.merge_and_unload()) and save that."
        )
    if any(_QUANTISED.search(key) for key in unused):
        return (
            "These belong to quantised weights, and config.json does not say how to read them: "
            "copy it again, with its quantization_config, from where the model was saved."
        )
    if any(re.search(r"(^|\.)(score|classifier|v_head|qa_outputs|regression_head)\.", key)
           for key in unused):  # fmt: skip
        return (
            "These are the head of a classifier or a reward model: give it as "
            "package.module:factory with an objective of its own."
        )
    if all(key.endswith(".bias") for key in unused):
        return (
            "These are biases that config.json does not know: correct it (attention_bias, "
            "mlp_bias, use_bias or the like)."
        )
    if all(re.search(r"\.\d+\.", key) for key in unused):
        return (
            "These are layers or parts of layers that config.json does not know: correct it "
            "(num_hidden_layers or the like)."
        )
    return "The model would be another one than what was saved: correct config.json."
