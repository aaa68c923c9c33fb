"""A microbatch: the examples that go through the stages together.

Axis letters: N examples, T positions (the longest sequence of the microbatch), padded on the right;
S sequences of an example: two of a pair of texts that are compared, else one. On an axis ``N S``
those of an example stand together, in row ``n S + s``. R positions of the sources that an encoder
reads; never as many as T, so that an axis tells which of both a tensor has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# The label of what is no target, as HF writes it.
NOT_A_TARGET = -100
# What travels between stages: hidden states ``[N, T, d]``, and what goes with them.
Hidden = tuple[Tensor, ...]


@dataclass(frozen=True)
class Batch:
    """One microbatch, the unit of accumulation, replay and resume.

    Attributes:
        index: number of the microbatch in the plan of its pass.
        ids: the N example ids.
        inputs: token ids ``[N S, T]`` (int64, 0 where padded), or numbers ``[N, ...]``.
        mask: ``[N S, T]`` bool, True at a token and False at padding; ``None`` without a token
            axis.
        labels: targets. Of tokens ``[N, T]`` int64 in HF's alignment (``labels[n, t]`` speaks of
            token t, which position t-1 predicts where the next token is predicted); otherwise
            whatever the objective takes, N first. ``None`` when the data has none.
        loss_mask: ``[N, T]`` bool, so aligned: which tokens are targets. ``None`` for all.
        drawn: labels drawn from the model in an earlier pass, ``[draws, N, ...]``, else ``None``.
        numbers: places of the N examples among those of their data, from 0 on.
        columns: what the objective asked for of the data, by the column's name: of numbers a tensor
            ``[N, ...]`` (int64 for whole numbers), of text a list of N strings.
        source: of a model with an encoder, what that reads: token ids ``[N, R]``, 0 where padded;
            ``inputs`` are the targets then.
        source_mask: ``[N, R]`` bool, True at its tokens.
        named: further inputs of the model by the name that its forward gives them, ``[N S, ...]``;
            of tokens (``token_type_ids``) padded as ``inputs`` are.
        start: where an objective is called on a slice of positions, the first of them: ``outputs[:,
            t]`` is of position ``start + t``; else 0. ``inputs``, ``mask`` and ``columns`` are
            those of whole examples all the same.
    """

    index: int
    ids: tuple[str, ...]
    inputs: Tensor
    mask: Tensor | None = None
    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    drawn: Tensor | None = None
    numbers: tuple[int, ...] = ()
    columns: Mapping[str, Tensor | list[str]] = field(default_factory=dict)
    named: Mapping[str, Tensor] = field(default_factory=dict)
    source: Tensor | None = None
    source_mask: Tensor | None = None
    start: int = 0

    @property
    def size(self) -> int:
        """N, the number of examples."""
        return len(self.ids)

    @property
    def sequences(self) -> int:
        """S, the number of sequences that each example has."""
        each, left = divmod(len(self.inputs), self.size)
        return each if each and not left else 1

    @property
    def rows(self) -> int:
        """N S, the number of sequences in all."""
        return self.size * self.sequences

    def tokens(self) -> Tensor:
        """Positions that are not padding, ``[N]`` int64; ones without a token axis."""
        if self.mask is None:
            return torch.ones(self.size, dtype=torch.int64)
        return self.mask.view(self.size, -1).sum(dim=1)

    def rows_of(self, examples: Sequence[int]) -> list[int]:
        """The rows of some examples' sequences, by the places of the examples."""
        each = self.sequences
        return [n * each + s for n in examples for s in range(each)]

    def mask_of(self, values: Tensor) -> Tensor | None:
        """The mask of the positions that a tensor ``[N, …]`` has, or one whose first axis is all
        positions: ``source_mask`` where they are the sources'. Of numbers the last axis is none."""
        if self.mask is None or self.source_mask is None:
            return self.mask
        masks = {mask.shape[1]: mask for mask in (self.source_mask, self.mask)}
        flat = {mask.numel(): mask for mask in masks.values()}
        axes = values.shape[1:-1] if values.is_floating_point() else values.shape[1:]
        found = [masks[size] for size in axes if size in masks]
        return found[0] if found else flat.get(values.shape[0], self.mask)

    def at_last(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs at each example's last token, for an objective that reads nothing else.

        Args:
            outputs: ``[N, t, ...]``, of the positions from ``start`` on.

        Returns:
            ``[N, ...]``, and ``[N]`` bool: whether the example's last token is among these
            positions. Where it is not, what is given is of another position, and is to be left out:
            ``torch.where(here, value, 0.0)``. Slices together hold each last token once.
        """
        assert self.sequences == 1, "which of an example's sequences ends it"
        at = self.tokens().to(outputs.device) - 1 - self.start
        here = (at >= 0) & (at < outputs.shape[1])
        examples = torch.arange(self.size, device=outputs.device)
        return outputs[examples, at.clamp(0, outputs.shape[1] - 1)], here

    def part(self, examples: Sequence[int], positions: int | None = None) -> Batch:
        """Some examples, by their places in the microbatch, and of token data no more than the
        first so many positions."""
        rows = torch.tensor(list(examples), device=self.inputs.device)
        sequences = torch.tensor(self.rows_of(examples), device=self.inputs.device)
        end = None if self.mask is None else positions

        def cut(tensor: Tensor, rows: Tensor = rows) -> Tensor:
            tokens = self.mask is not None and tensor.shape[:2] == self.mask.shape
            return tensor[rows, :end] if tokens else tensor[rows]

        # Labels in floating point are of whole texts, however many positions these have.
        of_texts = self.labels is not None and self.labels.is_floating_point()

        def cut_labels(tensor: Tensor) -> Tensor:
            return tensor[rows] if of_texts else cut(tensor)

        source = mask = None
        if self.source is not None and self.source_mask is not None:
            longest = int(self.source_mask[rows].sum(dim=1).max())
            source, mask = (t[rows, :longest] for t in (self.source, self.source_mask))
            source, mask = apart(source, mask, cut(self.inputs, sequences).shape[1])
        return replace(
            self,
            ids=tuple(self.ids[n] for n in examples),
            inputs=cut(self.inputs, sequences),
            mask=None if self.mask is None else cut(self.mask, sequences),
            labels=None if self.labels is None else cut_labels(self.labels),
            loss_mask=None if self.loss_mask is None else cut(self.loss_mask),
            drawn=None if self.drawn is None else torch.stack([cut_labels(y) for y in self.drawn]),
            numbers=tuple(self.numbers[n] for n in examples) if self.numbers else (),
            columns={
                name: c[rows] if isinstance(c, Tensor) else [c[n] for n in examples]
                for name, c in self.columns.items()
            },
            named={name: cut(tensor, sequences) for name, tensor in self.named.items()},
            source=source,
            source_mask=mask,
        )

    def to(self, device: torch.device) -> Batch:
        """The same microbatch with its tensors on ``device``."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            inputs=self.inputs.to(device),
            mask=move(self.mask),
            labels=move(self.labels),
            loss_mask=move(self.loss_mask),
            drawn=move(self.drawn),
            columns={
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in self.columns.items()
            },
            named={name: tensor.to(device) for name, tensor in self.named.items()},
            source=move(self.source),
            source_mask=move(self.source_mask),
        )


def apart(source: Tensor, mask: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Sources and their mask, ``[N, R]``, padded by one where R would be the targets' positions."""
    if source.shape[1] != positions:
        return source, mask
    return torch.nn.functional.pad(source, (0, 1)), torch.nn.functional.pad(mask, (0, 1))


def shown_ids(ids: Sequence[str], most: int = 3) -> str:
    """Some examples' names, for a message: the first, and how many more."""
    more = "" if len(ids) <= most else f" and {len(ids) - most} more"
    return ", ".join(repr(name) for name in ids[:most]) + more
