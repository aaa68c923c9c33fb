"""An adapter as PEFT saves it: ``adapter_config.json``, and tensors beside it, which wait.

What the configuration says is data of a stranger's. Of its fields those are handed to PEFT that say
where low-rank matrices go and how they are scaled; whatever else would change the model is refused
by its name. The base that it names is told, and never opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycurv.errors import UserError, shortened
from raycurv.jsonfile import misfit, read_json
from raycurv.models.checkpoint import Checkpoint
from raycurv.models.patterns import is_bounded
from raycurv.names import regular_file

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
INSTALL = "pip install 'raycurv[adapters]'"
MERGE_BY_PEFT = "Merge it into its base with PEFT (merge_and_unload) and give what that saves."

# Fields that PEFT is given, and their types.
_FIELDS: Mapping[str, Any] = {
    "r": int,
    "lora_alpha": int | float,
    "target_modules": str | list[str],
    "exclude_modules": str | list[str] | None,
    "fan_in_fan_out": bool,
    "bias": str,
    "use_rslora": bool,
    "use_dora": bool,
    "lora_bias": bool,
    "layers_to_transform": int | list[int] | None,
    "layers_pattern": str | list[str] | None,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, int | float] | None,
    "modules_to_save": list[str] | None,
}
# Fields that do not change what a trained adapter computes, whatever they say.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode",
    "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# How matrices were started that leave the base's weights as they are.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_MOST_RANK = 65_536


@dataclass(frozen=True)
class Adapters:
    """Which adapters a model is given with, all of them active together.

    Attributes:
        directories: of the adapters, in the order in which their outputs are added.
        merged: whether they are merged into the base's weights.
    """

    directories: tuple[str, ...] = ()
    merged: bool = False

    def given(self) -> bool:
        """Whether there are any; UserError if there is none to merge."""
        if self.merged and not self.directories:
            remedy = "Give --adapter, or leave --merge-adapter out."
            raise UserError("--merge-adapter", "an --adapter to merge", "none", remedy)
        return bool(self.directories)

    def open(self) -> tuple[Adapter, ...]:
        """Describe each; see :class:`Adapter`."""
        places = [Path(os.path.abspath(os.path.expanduser(one))) for one in self.directories]
        if len({os.path.realpath(place) for place in places}) < len(places):
            raise UserError("--adapter", "different directories", "one of them twice", "Leave one.")
        names = ["default", *(f"adapter{n}" for n in range(2, len(places) + 1))]
        return tuple(Adapter(name, place) for name, place in zip(names, places, strict=False))


class Adapter:
    """A LoRA adapter in a directory; of its tensors the header is read.

    Attributes:
        name: under which PEFT keeps it in a model, such as ``default``.
        directory: where it lies.
        config: what PEFT's configuration is made of.
        base: what its configuration calls its base; empty if nothing.
        task: the ``task_type`` of its configuration, if that says so.
        model_class: the class that it was trained on, if its configuration says so.
        checkpoint: its tensors.

    Raises:
        UserError: no adapter there, one of another kind than LoRA, or a configuration that says
            what is not understood here.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory = name, directory
        self._check_directory()
        place = regular_file(directory, ADAPTER_CONFIG, self.where)
        content = read_json(place, self._config, "a JSON object", "Copy the adapter again.")
        base = content.get("base_model_name_or_path")
        self.base = shortened(base) if isinstance(base, str) and base.isprintable() else ""
        self.config = self._checked(content)
        task = content.get("task_type")
        self.task = task if isinstance(task, str) else None
        mapped = content.get("auto_mapping")
        named = mapped.get("base_model_class") if isinstance(mapped, dict) else None
        self.model_class = shortened(named) if isinstance(named, str) else None
        self.checkpoint = Checkpoint(directory, ADAPTER)

    @property
    def where(self) -> str:
        """The adapter as messages name it, by its directory."""
        return f"adapter {self.directory}"

    @property
    def made_for(self) -> str:
        """The base that it names, as messages have it; empty if none."""
        return f" ({self.base!r}, by its configuration)" if self.base else ""

    @property
    def _config(self) -> str:
        return str(self.directory / ADAPTER_CONFIG)

    def _check_directory(self) -> None:
        expected = f"a directory with {ADAPTER_CONFIG} and {ADAPTER}, as PEFT saves it"
        if not self.directory.is_dir():
            got = "a file" if self.directory.exists() else "no such directory"
            raise UserError(self.where, expected, got, "Check the path of the adapter.")
        there = set(os.listdir(self.directory))
        lacking = [name for name in (ADAPTER_CONFIG, ADAPTER) if name not in there]
        if not lacking:
            return
        got, remedy = f"no {lacking[0]}", "Give the directory that PEFT's save_pretrained wrote."
        if "adapter_model.bin" in there:
            got, remedy = (
                "adapter_model.bin, a pickle",
                ("Load it with PEFT and save it again, which writes safetensors."),
            )
        raise UserError(self.where, expected, got, remedy)

    def _checked(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that PEFT is given; UserError for what is not understood."""
        kind = content.get("peft_type")
        if kind != "LORA":
            raise UserError(
                f"{self._config}, peft_type", "LORA (rsLoRA and DoRA are of this type)",
                shortened(repr(kind)), MERGE_BY_PEFT,
            )  # fmt: skip
        for name, value in content.items():
            self._check_field(name, value)
        start = content.get("init_lora_weights")
        if not any(start is known or start == known for known in _STARTS):
            raise UserError(
                f"{self._config}, init_lora_weights", "matrices added to the base as it is",
                f"{shortened(repr(start))}, which changes the base's weights",
                "Save it with PEFT's path_initial_model_for_weight_conversion, which makes it an "
                f"adapter of the base as it is. {MERGE_BY_PEFT}",
            )  # fmt: skip
        return {name: content[name] for name in _FIELDS if content.get(name) is not None}

    def _check_field(self, name: str, value: Any) -> None:
        where = f"{self._config}, {shortened(name)}"
        kind = _FIELDS.get(name)
        if kind is None:
            # PEFT writes down every option that it has, and most of them say nothing.
            if value and name not in _WITHOUT_EFFECT:
                raise UserError(
                    where, "LoRA matrices of linear layers (also rsLoRA and DoRA)",
                    f"{shortened(repr(value))}, an option that is not taken here", MERGE_BY_PEFT,
                )  # fmt: skip
            return
        wrong = misfit(value, kind) if value is not None else ""
        if not wrong and name == "bias" and value not in ("none", "all", "lora_only"):
            wrong = shortened(repr(value))
        ranks = [value] if name == "r" else (value or {}).values() if name == "rank_pattern" else ()
        if not wrong and any(not 1 <= rank <= _MOST_RANK for rank in ranks):
            wrong = f"a rank outside 1 to {_MOST_RANK:,}"
        if wrong:
            raise UserError(where, "what PEFT writes there", wrong, "Copy the adapter again.")
        for pattern in _patterns(name, value):
            if not is_bounded(pattern):
                raise UserError(
                    where, "a pattern of names that takes no long time to match",
                    shortened(repr(pattern)),
                    "Name the modules one by one in it, or take what repeats a group out of it.",
                )  # fmt: skip


def _patterns(name: str, value: Any) -> Sequence[str]:
    """Regular expressions in a field: PEFT takes keys, and a text that stands alone, for one."""
    if name in ("rank_pattern", "alpha_pattern"):
        return list(value or {})
    if name == "layers_pattern":
        return [value] if isinstance(value, str) else value or []
    return (
        [value] if name in ("target_modules", "exclude_modules") and isinstance(value, str) else []
    )
