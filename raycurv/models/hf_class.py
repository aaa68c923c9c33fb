"""The class of transformers that a model directory's ``config.json`` names, on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn

from raycurv.errors import RaycurvError, UserError, in_words, shortened
from raycurv.models.anatomy import AS_FACTORY, META
from raycurv.models.architectures import task_of
from raycurv.models.config_file import CONFIG
from raycurv.models.foreign_code import nothing_from_outside, plain_implementations
from raycurv.models.hf_calls import keep_padding_apart
from raycurv.models.mixtures import take_own_forward
from raycurv.models.model_task import Task, refined


def read_config(
    directory: Path, content: Mapping[str, Any], trust_remote_code: bool
) -> tuple[Task, Any]:
    path = str(directory / CONFIG)
    task = task_of(content, path, trust_remote_code)
    wanted = f"a configuration that transformers {transformers.__version__} knows"
    # Each architecture checks its own fields, with errors of several libraries.
    code = nothing_from_outside(directory / CONFIG, trust_remote_code)
    with library_errors(path, wanted, content), quiet(), code:
        config = transformers.AutoConfig.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trust_remote_code
        )
    # Where its code lies, if it has any: whatever the file says of that.
    config._name_or_path = str(directory)
    plain_implementations(config)
    take_own_forward(config)
    # Outputs are taken by their names, whatever other callers are given.
    for part in (config, config.get_text_config()):
        part.return_dict = True
    # Weights come as floating point: their library has nothing to do.
    for part in (config, config.get_text_config()):
        for name in ("quantization_config", "compression_config"):
            if getattr(part, name, None) is not None:
                delattr(part, name)
    return refined(task, config), config


def class_on_meta(
    task: Task, config: Any, content: Mapping[str, Any], directory: Path, trust_remote_code: bool
) -> nn.Module:
    """The whole model on the meta device."""
    path, wanted = directory / CONFIG, f"the configuration of {task.what}"
    code = nothing_from_outside(path, trust_remote_code)
    with library_errors(str(path), wanted, content), META, quiet(), code:
        # Of models of images and text, too, text alone is a causal language model's.
        auto = getattr(transformers, task.auto)
        if task.causal and type(config) not in auto._model_mapping:
            others = (
                transformers.AutoModelForImageTextToText,
                transformers.AutoModelForMultimodalLM,
            )
            auto = next((a for a in others if type(config) in a._model_mapping), auto)
        model = auto.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        keep_padding_apart(model)
    return cast(nn.Module, model)


@contextmanager
def library_errors(
    where: str,
    expected: str,
    content: Mapping[str, Any] | None = None,
    remedy: str = AS_FACTORY,
) -> Iterator[None]:
    """Around foreign code that a directory's content decides about: whatever it raises is
    about that, and those fields of ``content`` whose values it names are named with it."""
    try:
        yield
    except RaycurvError:
        raise
    except Exception as error:
        text = str(error)
        fields = [name for name, value in _texts(content or {}) if repr(value) in text][:3]
        see = f" (see {shortened(' and '.join(fields))})" if fields else ""
        raise UserError(
            where, expected, f"{type(error).__name__}: {in_words(error)}{see}", remedy
        ) from error


def _texts(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The values of a configuration that are text, each with its dotted name."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _texts(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            yield f"{prefix}{key}", value


@contextmanager
def quiet() -> Iterator[None]:
    """Without HF's progress bars and load reports: what they tell is raised as errors here."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
