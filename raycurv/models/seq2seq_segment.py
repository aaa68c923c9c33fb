"""An encoder with a decoder, as one stage.

The targets go in as ``labels``, so that the class itself makes the decoder's inputs of them, as in
its training: moved by one behind the token that begins them. What leaves is what the decoder gives;
the head is the same forward with that in the decoder's place, on slices of positions.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
)

from raycurv.batch import NOT_A_TARGET, Batch, Hidden
from raycurv.errors import UserError
from raycurv.models.anatomy import AS_FACTORY, META
from raycurv.models.hf_calls import Left, calling, options, run_until_left
from raycurv.models.model import Segment


class Seq2SeqSegment(Segment):
    """A whole model of sources ``batch.source`` and targets ``batch.inputs``."""

    first = last = True

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        decoder = cast(nn.Module, cast(Any, module).get_decoder())
        self._name = next(name for name, part in module.named_modules() if part is decoder)
        self._decoder, self._given = decoder, _Given()
        self._ends = decoder.register_forward_hook(self._given.end)

    def forward(self, batch: Batch, hidden: Hidden | None) -> Hidden:
        """What the decoder gives, ``[N, T, d]``, alone in a tuple: at position t, of which the
        t-th target is predicted."""
        assert hidden is None and batch.source is not None, "one stage, of sources and targets"
        counts = torch.ones_like(batch.inputs, dtype=torch.bool)
        for mask in (batch.mask, batch.loss_mask):
            counts = counts if mask is None else counts & mask
        labels = torch.where(counts, batch.inputs, NOT_A_TARGET)
        mask = None if batch.source_mask is None else batch.source_mask.to(torch.int64)
        with calling(self.module, batch.source):
            return (self._decoded(batch.source, mask, labels),)

    def head(self, part: Tensor, batch: Batch | None = None) -> Tensor:
        """Logits ``[N, t, V]`` of what the decoder gave at some positions."""
        ids = torch.zeros(part.shape[:2], dtype=torch.int64, device=part.device)
        encoded = BaseModelOutput(last_hidden_state=part[:, :1].detach())
        parent, _, name = self._name.rpartition(".")
        owner = self.module.get_submodule(parent)
        self._given.hidden = part
        setattr(owner, name, self._given)
        try:
            with calling(self.module, part):
                found = self.module(
                    encoder_outputs=encoded, decoder_input_ids=ids, **options(self.module)
                )
        finally:
            setattr(owner, name, self._decoder)
            self._given.hidden = None
        return cast(Tensor, found.logits)

    def _decoded(
        self, source: Tensor, mask: Tensor | None, labels: Tensor, **more: Tensor
    ) -> Tensor:
        given = {"input_ids": source, "attention_mask": mask, "labels": labels}
        run_until_left(self.module, given | more)
        decoded, self._given.hidden = self._given.hidden, None
        assert decoded is not None
        return decoded


def check_seq2seq(whole: Any, directory: Path) -> None:
    """Refuse, with a UserError, what transformers count among encoders with a decoder, but is none
    of texts."""
    lacking = {"input_ids", "labels"} - inspect.signature(whole.forward).parameters.keys()
    if lacking or not whole.config.is_encoder_decoder:
        raise UserError(
            f"model {directory} ({type(whole).__name__})",
            "an encoder of token ids with a decoder that takes labels",
            f"a forward without {sorted(lacking)[0]}" if lacking else "a decoder alone",
            AS_FACTORY,
        )


def rehearse_seq2seq(whole: nn.Module, examples: int, tokens: int) -> bool:
    """Run a model on the meta device as a stage does, half of the tokens in each source; gives
    whether that can be: some classes read values, of which there are none."""
    source, target = max(1, tokens // 2), max(1, -(-tokens // 2))
    ids = torch.zeros((examples, source), dtype=torch.int64, device=META)
    labels = torch.zeros((examples, target), dtype=torch.int64, device=META)
    dtype = next(whole.parameters()).dtype
    # Complete masks are passed on as they are; to make some of token masks reads values.
    masks = [torch.zeros((1, 1, *sizes), dtype=dtype, device=META).expand(examples, -1, -1, -1)
             for sizes in ((1, source), (target, target))]  # fmt: skip
    segment = Seq2SeqSegment(whole)
    try:
        left = segment._decoded(ids, masks[0], labels, decoder_attention_mask=masks[1])
        return segment.head(left).shape[:2] == labels.shape
    except Exception:  # foreign code, which may read values that there are not
        return False
    finally:
        segment._ends.remove()


class _Given(nn.Module):
    """In place of a decoder: gives what it gave before. Knows nothing of the model, whose hook
    would keep it."""

    hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=cast(Any, self.hidden))

    def end(self, decoder: nn.Module, args: Any, output: Any) -> None:
        """A hook behind the decoder, where the forward is left."""
        self.hidden = output[0]
        raise Left
