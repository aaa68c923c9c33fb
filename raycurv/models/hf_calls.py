"""How the forward of one of transformers' models is called."""

from __future__ import annotations

import inspect
import re
import traceback
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from raycurv.batch import Batch
from raycurv.errors import users_code

# Inputs beside the token ids that data may have.
_FURTHER = frozenset({"token_type_ids"})
# What no token is, for a configuration that names no padding.
NO_TOKEN = -1


# Inputs that are no text, and what a configuration calls the tokens that stand for them.
_OTHERS = ("pixel_values", "pixel_values_videos", "input_features", "input_values")
_PLACEHOLDER = re.compile(r"^(image|video|audio)_token_(id|index)$")


def placeholders_of(module: Any) -> frozenset[int] | None:
    """The tokens of a model's in whose place it sees an image or the like; ``None`` for a model
    that sees none."""
    said = vars(module.config).items()
    found = frozenset(n for name, n in said if _PLACEHOLDER.match(name) and isinstance(n, int))
    sees = set(_OTHERS) & inspect.signature(module.forward).parameters.keys()
    return found if found or sees else None


def keep_padding_apart(module: Any) -> None:
    """Let a configuration that names no padding name what no token is: a class that reads its
    outputs at the last token that is not padding then finds that of each example."""
    config = module.config.get_text_config()
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = NO_TOKEN


def padded_ids(module: Any, batch: Batch) -> Tensor:
    """The token ids of a microbatch, padded with what the configuration calls padding."""
    padding = getattr(module.config.get_text_config(), "pad_token_id", None)
    if batch.mask is None or not padding:
        return batch.inputs
    return torch.where(batch.mask, batch.inputs, padding)


def given_beside(module: nn.Module, batch: Batch) -> dict[str, Any]:
    """What a forward is given beside the token ids."""
    return {
        "attention_mask": None if batch.mask is None else batch.mask.to(torch.int64),
        **batch.named,
        **options(module),
    }


def further_inputs(module: nn.Module) -> frozenset[str]:
    """Inputs that data may have beside the token ids, and a forward takes."""
    return _FURTHER & inspect.signature(module.forward).parameters.keys()


def options(module: nn.Module) -> dict[str, Any]:
    """Settings of a forward, where it takes them."""
    parameters = inspect.signature(module.forward).parameters.values()
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = open_ended or any(p.name == "use_cache" for p in parameters)
    return {"use_cache": False} if known else {}


def calling(module: nn.Module, given: Tensor) -> AbstractContextManager[None]:
    """Around a call of HF's code: what it raises is about the model and its input."""
    return users_code(
        f"model {type(module).__name__}",
        f"a forward that takes examples and positions of shape {list(given.shape)}",
        "If transformers alone takes them, give the model as package.module:factory, which runs as "
        "one stage.",
    )


class Left(BaseException):
    """Leaves a forward. Not an ``Exception``: no handler on the way keeps it."""


def run_until_left(module: nn.Module, given: dict[str, Any]) -> None:
    """Call a model whose hooks take what is wanted of its forward, and leave it there."""
    try:
        module(**given | options(module))
    except Left as left:
        # The frames between hold activations that nothing else needs.
        traceback.clear_frames(left.__traceback__)
    else:
        raise AssertionError("the forward came to its end")
