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
    """:func:`head_width` of those that read heads, by name."""
    found = {module: head_width(model, module) for module in modules}
    return {module: width for module, width in found.items() if width is not None}


def head_width(model: Model, module: str) -> int | None:
    """Columns that an attention output projection reads of each head.

    Args:
        model: an HF model, whose configuration states its heads.
        module: dotted name of one of its layers.

    Returns:
        the width; ``None`` for other layers, and for other models.
    """
    config: Any = getattr(parts(model)[1], "config", None)
    parent, _, name = module.rpartition(".")
    if config is None or name not in _PROJECTIONS or _PROJECTIONS[name] not in parent:
        return None
    text = config.get_text_config()
    width = getattr(text, "head_dim", None)
    if width is None:
        width = text.hidden_size // text.num_attention_heads
    return int(width)
