"""A model with other weights in some blocks; all else is another model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raycurv.mathematics.blocks import Block
from raycurv.models.checkpoint_files import CheckpointFile
from raycurv.models.model import Model, Outline, Segment
from raycurv.models.stored import Patch, StoredWeight


class Patched(Model):
    """A model whose blocks have the weights of patches where there are any.

    Args:
        base: the model that everything else is taken from; where it is patched itself, its patches
            of the same blocks give way.
        patches: at most one a block.

    Raises:
        UserError: a block whose weight is not one tensor of its own.
    """

    def __init__(self, base: Model, patches: Sequence[Patch]) -> None:
        assert len({p.block.name for p in patches}) == len(patches), "two patches of one block"
        before, inner = parts(base)
        for patch in patches:
            inner.stored(patch.block)
        self.base = inner
        self.patches = {**before, **{patch.block.name: patch for patch in patches}}
        # Whatever does not depend on the weights of blocks is the base's.
        for known in Outline.__annotations__:
            found = getattr(inner, known)
            if found is not getattr(type(self), known, None):
                setattr(self, known, found)

    def skeleton(self) -> nn.Module:
        return self.base.skeleton()

    def unit_of(self, module_name: str) -> int:
        return self.base.unit_of(module_name)

    def weight_bytes(self, units: range, dtype: torch.dtype) -> int:
        return self.base.weight_bytes(units, dtype)

    def rehearse(self, skeleton: nn.Module, examples: int, tokens: int) -> bool:
        return self.base.rehearse(skeleton, examples, tokens)

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """The base's fingerprint, and an entry ``patch of BLOCK`` for each patch."""
        found = dict(self.base.fingerprint())
        for name, patch in sorted(self.patches.items()):
            stored = self.base.stored(patch.block)
            found[f"patch of {name}"] = {
                "dtype": str(stored.dtype).removeprefix("torch."),
                "shape": [patch.block.d_out, patch.block.d_in],
                "hash": patch.mark,
            }
        return found

    def configuration(self) -> dict[str, Any]:
        return self.base.configuration()

    def build(self, units: range, dtype: torch.dtype, device: torch.device) -> Segment:
        """The base's segment, and in it the patches; UserError as the base, or for a patch of
        another shape or dtype, or that is not finite."""
        segment = self.base.build(units, dtype, device)
        repatch(segment.module, units, self.base, self)
        return segment

    def stored(self, block: Block) -> StoredWeight:
        return self.base.stored(block)

    def block_weight(self, block: Block) -> Tensor:
        patch = self.patches.get(block.name)
        return self.base.block_weight(block) if patch is None else patch.read()

    def files(self, patches: Sequence[Patch] = ()) -> tuple[CheckpointFile, ...]:
        named = {patch.block.name: patch for patch in patches}
        return self.base.files(tuple({**self.patches, **named}.values()))


def parts(model: Model) -> tuple[dict[str, Patch], Model]:
    """A model's patches by block (none of most models), and the model that they are put in."""
    return (model.patches, model.base) if isinstance(model, Patched) else ({}, model)


def repatch(module: nn.Module, units: range, before: Model, after: Model) -> None:
    """Make a segment's module, built of one model, that of another which differs in patches alone.

    What the module then holds equals, bit for bit, what ``after`` would build; a patch that does
    not fit is the same UserError.
    """
    old, base = parts(before)
    new, _ = parts(after)
    for name in sorted({**old, **new}):
        patch, gone = new.get(name), old.get(name)
        block = (patch or old[name]).block
        holders = [n for n in (block.module, *block.shared) if base.unit_of(n) in units]
        if not holders:
            continue
        if patch is not None and gone is not None and patch.mark == gone.mark:
            continue
        matrix = base.block_weight(block) if patch is None else patch.read()
        wide = patch is not None and patch.wide
        base.stored(block).put(module.get_submodule(holders[0]), matrix, wide)
