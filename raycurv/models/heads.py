"""Which of a model's weights read attention heads, and how wide a head is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from raycurv.models.model import Model
from raycurv.models.patched import parts

# What an attention's output projection is called: the last part of its name, and what its parent's
# holds, where other layers are called so, too.
_PROJECTIONS = {"o_proj": "", "out_proj": "", "c_proj": "attn", "dense": "att"}


def head_widths(model: Model, modules: Iterable[str]) -> dict[str, int]:
    """Columns that attention output projections read of each head, by module name.

    Layers that read no heads are left out; models that are not HF's have none to name.
    """
    config: Any = getattr(parts(model)[1], "config", None)
    readers = [module for module in modules if config is not None and _reads_heads(module)]
    if not readers:
        return {}
    text = config.get_text_config()
    width = getattr(text, "head_dim", None)
    if width is None:
        width = text.hidden_size // text.num_attention_heads
    return dict.fromkeys(readers, int(width))


def _reads_heads(module: str) -> bool:
    parent, _, name = module.rpartition(".")
    return name in _PROJECTIONS and _PROJECTIONS[name] in parent
