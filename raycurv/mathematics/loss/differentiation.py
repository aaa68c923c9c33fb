"""The end of the network: losses, drawn labels, and the gradient that goes back from them.

A per-token objective is evaluated on slices of positions, forward and backward, so that a long
vocabulary never makes whole logits: 8,192 tokens x 128,256 words would be 4.2 GB in float32.

Axis letters: D draws, N examples, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.mathematics.loss.draws import id_keys, uniforms
from raycurv.mathematics.loss.objective import Judging, Objective

# What a pass differentiates: labels drawn from the model, the data's own, the drawn ones and then
# the data's own, the measurement of a query, or nothing (only the loss is wanted).
Target = Literal["sampled", "labels", "both", "measurement", "nothing"]

Head = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Evaluated:
    """What the last stage finds.

    Attributes:
        gradients: one a draw, with respect to the hidden states, of their shape; each holds for
            every example the gradient of that example's own number. For ``both`` one more, of the
            data's own labels, is the last.
        loss: of the data's own labels, summed over tokens, ``[N]``; ``None`` without labels.
        drawn: labels that were drawn here, ``[D, N, ...]``; ``None`` if given or not drawn.
        correct: targets that the model predicts, ``[N]``; ``None`` where something is
            differentiated, without labels, or where the objective does not count them.
    """

    gradients: tuple[Tensor, ...]
    loss: Tensor | None
    drawn: Tensor | None
    correct: Tensor | None = None


def evaluate(
    objective: Objective,
    head: Head,
    hidden: Tensor,
    batch: Batch,
    target: Target,
    draws: int,
    seed: int,
    slice_positions: int,
    begin_draw: Callable[[int], None],
) -> Evaluated:
    """Run head and objective on a microbatch, and differentiate.

    Args:
        objective: summed over an example's tokens.
        head: ``(hidden slice, first position) -> outputs``.
        hidden: what the last layer put out; its graph is not entered.
        target: what to differentiate.
        draws: of labels, for ``sampled`` and ``both``.
        seed: of the draws.
        slice_positions: positions at once, for a per-token objective.
        begin_draw: called before the backward of each draw, so that hooks can tell them apart.

    Raises:
        UserError: a loss is not finite (names the example), or labels are missing.
    """
    if objective.per_token:
        found = _by_slices(
            objective, head, hidden, batch, target, draws, seed, slice_positions, begin_draw
        )
    else:
        found = _whole(objective, head, hidden, batch, target, draws, seed, begin_draw)
    if found.loss is not None:
        _check_losses(found.loss, batch, "loss")
    return found


def _whole(
    objective: Objective,
    head: Head,
    hidden: Tensor,
    batch: Batch,
    target: Target,
    draws: int,
    seed: int,
    begin_draw: Callable[[int], None],
) -> Evaluated:
    leaf = hidden.detach().requires_grad_(target != "nothing")
    outputs = head(leaf, 0)
    loss: Tensor | None = None
    if batch.labels is not None and target in ("sampled", "nothing"):
        with torch.no_grad():
            loss = objective.loss(outputs, batch)
    if target == "nothing":
        correct: Tensor | None = None
        if loss is not None and isinstance(objective, Judging):
            correct = objective.correct(outputs, batch)
        return Evaluated((), loss, None, correct)
    drawn: list[Tensor] = []
    if target in ("sampled", "both"):
        keys = id_keys(batch.ids)
        at_start = torch.zeros(1, dtype=torch.int64, device=hidden.device)
        if batch.drawn is not None:
            labels = list(batch.drawn)
        else:
            for draw in range(draws):

                def uniform(k: int, draw: int = draw) -> Tensor:
                    return uniforms(seed, keys, at_start, draw, k)[:, 0]

                drawn.append(objective.sample(outputs.detach(), batch, uniform))
            labels = drawn
        values = [objective.loss(outputs, replace(batch, labels=y)) for y in labels]
        if target == "both":
            values.append(objective.loss(outputs, batch))
            loss = None if batch.labels is None else values[-1]
    else:
        measure = objective.loss if target == "labels" else objective.measurement
        values = [measure(outputs, batch)]
        if target == "labels":
            loss = values[0]
    for value in values:
        _check_losses(value.detach(), batch, "loss")
    gradients = []
    for draw, value in enumerate(values):
        begin_draw(draw)
        gradients.append(_gradient(value.sum(), leaf, draw + 1 < len(values)))
    return Evaluated(
        tuple(gradients),
        None if loss is None else loss.detach(),
        torch.stack(drawn) if drawn else None,
    )


def _by_slices(
    objective: Objective,
    head: Head,
    hidden: Tensor,
    batch: Batch,
    target: Target,
    draws: int,
    seed: int,
    slice_positions: int,
    begin_draw: Callable[[int], None],
) -> Evaluated:
    if hidden.ndim < 3 or batch.mask is None:
        raise UserError(
            "the objective",
            "token data and hidden states [examples, positions, width]",
            f"hidden states of shape {tuple(hidden.shape)}",
            "A per-token objective needs a token axis: choose another --objective.",
        )
    count = hidden.shape[1]
    labels_NT, counts_NT = _shifted(batch)
    loss = torch.zeros(batch.size, dtype=torch.float64, device=hidden.device)
    counts = {"sampled": draws, "both": draws + 1}
    sums = [torch.zeros_like(loss) for _ in range(counts.get(target, 1))]
    gradients: list[Tensor] = []
    if target != "nothing":
        gradients = [torch.zeros_like(hidden) for _ in sums]
    drawn_DNT: Tensor | None = None
    correct: Tensor | None = None
    keys = id_keys(batch.ids)
    for start in range(0, count, slice_positions):
        part = slice(start, min(start + slice_positions, count))
        own = replace(batch, labels=labels_NT[:, part], loss_mask=counts_NT[:, part])
        leaf = hidden[:, part].detach().requires_grad_(target != "nothing")
        outputs = head(leaf, start)
        if target in ("sampled", "nothing"):
            with torch.no_grad():
                loss += objective.loss(outputs, own).double()
        if target == "nothing":
            if isinstance(objective, Judging):
                found = objective.correct(outputs, own)
                correct = found if correct is None else correct + found
            continue
        # Position of the target: one behind the position that predicts it.
        places = torch.arange(part.start + 1, part.stop + 1, device=hidden.device)
        for draw in range(len(sums)):
            if target in ("sampled", "both") and draw < draws:
                if batch.drawn is not None:
                    y = _ahead(batch.drawn[draw])[:, part]
                else:

                    def uniform(k: int, draw: int = draw, places: Tensor = places) -> Tensor:
                        return uniforms(seed, keys, places, draw, k)

                    y = objective.sample(outputs.detach(), own, uniform)
                    if drawn_DNT is None:
                        drawn_DNT = y.new_zeros(draws, batch.size, count + 1)
                    drawn_DNT[draw, :, part.start + 1 : part.stop + 1] = y
                value = objective.loss(outputs, replace(own, labels=y))
            elif target != "measurement":
                value = objective.loss(outputs, own)
            else:
                value = objective.measurement(outputs, own)
            sums[draw] += value.detach().double()
            begin_draw(draw)
            gradients[draw][:, part] = _gradient(value.sum(), leaf, draw + 1 < len(sums))
    for total in sums:
        _check_losses(total, batch, "loss")
    if target in ("labels", "both"):
        loss = sums[-1]
    elif target == "measurement":
        return Evaluated(tuple(gradients), None, None)
    drawn = None if drawn_DNT is None else drawn_DNT[:, :, :count]
    return Evaluated(tuple(gradients), loss, drawn, correct)


def _gradient(value: Tensor, leaf: Tensor, again: bool) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    (found,) = torch.autograd.grad(value, leaf, retain_graph=again, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found


def _shifted(batch: Batch) -> tuple[Tensor, Tensor]:
    """Targets and whether they count, aligned with the positions that predict them, ``[N, T]``."""
    assert batch.mask is not None
    labels = batch.inputs if batch.labels is None else batch.labels
    counts = batch.mask if batch.loss_mask is None else batch.mask & batch.loss_mask
    return _ahead(labels), _ahead(counts)


def _ahead(values_NT: Tensor) -> Tensor:
    """Move a row's entries one position to the left; the last becomes zero."""
    moved = torch.zeros_like(values_NT)
    moved[:, :-1] = values_NT[:, 1:]
    return moved


def _check_losses(losses: Tensor, batch: Batch, what: str) -> None:
    finite = torch.isfinite(losses)
    if not finite.all():
        n = int((~finite).nonzero()[0])
        raise UserError(
            f"example {batch.ids[n]!r}",
            f"a finite {what}",
            str(float(losses[n])),
            "Leave the example out, or run the model in a wider --dtype.",
        )
