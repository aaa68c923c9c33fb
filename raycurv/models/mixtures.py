"""Mixtures of experts in transformers' models: whose forward they run, and which have none here."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from raycurv.mathematics.kinds.catalogue import kind_of
from raycurv.mathematics.kinds.experts import experts_forward

_NAME = "raycurv"
ALL_EXPERTS_FUNCTIONS.register(_NAME, experts_forward)


def take_own_forward(config: Any) -> None:
    """Have the experts of a model of this configuration, and of its parts, run the forward of
    :mod:`raycurv.mathematics.kinds.experts`: transformers' own ones give no single expert's rows,
    or run in some dtypes alone."""
    config._experts_implementation = _NAME


def routed_experts(layers: nn.ModuleList, name: str) -> str:
    """Where the first experts of a mixture are that have no blocks, and their class; empty where
    there are none."""
    for path, module in layers.named_modules():
        routed = "expert" in path.rpartition(".")[2] and "shared" not in path
        if routed and kind_of(module) is None:
            return f"{type(module).__name__} in {name}.{path}"
    return ""
