"""Parameters that transformers makes of several stored tensors, such as a layer's experts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from raycurv.models.pieces import Parts, Piece, Views, meta


def stacked_parts(whole: nn.Module, known: Collection[str]) -> dict[str, Parts]:
    """The stored tensors, by their names, that make up parameters of a loaded model.

    transformers' own reverse of its loading, which it saves a model with, on the meta device: each
    tensor that it would write is a view of the parameter that it comes from. A parameter of which
    it makes anything else, or not all, is left out.

    Args:
        known: parameters that are left out.
    """
    shapes = {n: p.shape for n, p in whole.named_parameters() if n not in known}
    if not shapes:
        return {}
    tensors = {name: meta(shape) for name, shape in shapes.items()}
    owners = {t.untyped_storage()._cdata: name for name, t in tensors.items()}
    with Views():
        written = revert_weight_conversion(cast(Any, whole), dict(tensors))
    found: dict[str, list[Piece]] = {}
    for key, view in written.items():
        name = owners.get(view.untyped_storage()._cdata)
        if name is not None:
            piece = Piece.between(key, view.shape, view, meta(view.shape))
            found.setdefault(name, []).append(piece)
    return {
        name: Parts(tuple(shapes[name]), tuple(pieces))
        for name, pieces in found.items()
        if sum(piece.numel for piece in pieces) == shapes[name].numel()
    }
