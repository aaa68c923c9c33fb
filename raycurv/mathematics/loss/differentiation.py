"""The end of the network: losses, drawn labels, and the gradient that goes back from them.

A per-token objective is evaluated on slices of positions, forward and backward, so that a long
vocabulary never makes whole logits: 8,192 tokens x 128,256 words would be 4.2 GB in float32. Any
other objective sees the whole microbatch as one slice. Axis letters: D draws, N examples, T
positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from raycurv.batch import Batch, shown_ids
from raycurv.errors import UserError
from raycurv.mathematics.loss.draws import id_keys, uniforms
from raycurv.mathematics.loss.objective import Judging, Objective, Signed
from raycurv.mathematics.loss.signs import signs as signs_of
from raycurv.mathematics.sums import Combine, Results

# What a pass differentiates: labels drawn from the model (or signs in their place), the data's own
# labels, the drawn ones and then the data's own, the measurement of a query, or nothing (only the
# loss is wanted). A product of the curvature is of another kind, see mathematics/exact/head.py.
Target = Literal["sampled", "labels", "both", "measurement", "nothing", "product"]
Head = Callable[[Tensor, int], Tensor]

# Of each example: loss of its own labels, summed over its tokens; labels that were drawn here; how
# many of its targets the model predicts.
LOSS, DRAWN, CORRECT = "loss", "drawn", "correct"
RESULTS: dict[str, Combine] = {LOSS: "last", DRAWN: "last", CORRECT: "last"}


@dataclass(frozen=True)
class LossGradients:
    """What the last stage finds of a microbatch.

    Attributes:
        gradients: one a draw, with respect to the hidden states, of their shape; each holds for
            every example the gradient of that example's own number. For ``both`` one more, of the
            data's own labels, is the last.
        results: ``loss [N]`` float64 of the data's own labels, summed over tokens, where there are
            labels; ``drawn [D, N, ...]``, labels that were drawn here; ``correct [N]``, targets
            that the model predicts, where nothing is differentiated and the objective counts them.
    """

    gradients: tuple[Tensor, ...]
    results: Results = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """A part of a microbatch that head and objective see at once.

    Attributes:
        at: which part of the hidden states.
        batch: with the labels that its outputs are held against.
        places: positions of its targets, for the draws.
        drawn: labels that were drawn earlier, a draw each; ``None`` where they are drawn here.
    """

    at: tuple[slice, ...]
    batch: Batch
    places: Tensor
    drawn: list[Tensor] | None

    def counted(
        self, numbers: Callable[..., Tensor], objective: Objective, seed: int, draw: int
    ) -> Callable[[int], Tensor]:
        """What a counter gives of a draw for these positions, as an objective takes it."""
        of_tokens = partial(numbers, seed, id_keys(self.batch.ids), self.places, draw)
        return of_tokens if objective.per_token else lambda k: of_tokens(k)[:, 0]


def differentiate(
    objective: Objective,
    head: Head,
    hidden: Tensor,
    batch: Batch,
    target: Target,
    draws: int,
    seed: int,
    slice_positions: int,
    begin_draw: Callable[[int], None],
    signs: bool = False,
) -> LossGradients:
    """Run head and objective on a microbatch, and differentiate.

    Args:
        objective: summed over an example's tokens.
        head: ``(hidden slice, first position) -> outputs``.
        hidden: what the last layer put out; its graph is not entered.
        draws: of labels (or signs), for ``sampled`` and ``both``.
        slice_positions: positions at once, for a per-token objective.
        begin_draw: called before the backward of each draw, so that hooks can tell them apart.
        signs: draw signs in place of labels, of an objective that has them (``Signed``).

    Raises:
        UserError: a loss or a measurement is not finite (names the example) or not one number an
            example, or labels are missing.
    """
    samples = draws if target in ("sampled", "both") else 0
    count = 0 if target == "nothing" else samples + (target != "sampled")
    if not hidden.ndim:
        raise UserError(
            "the model",
            f"outputs with examples first, [{batch.size}, …]",
            "[], one number for all",
            "Let it return what each example's loss is made of.",
        )
    if count and not hidden.is_floating_point():
        raise UserError(
            "the model",
            "outputs of floating point, which have gradients",
            f"{str(hidden.dtype).removeprefix('torch.')}",
            "Let it return what its predictions are made of (logits), not the predictions.",
        )
    gradients = [torch.zeros_like(hidden) for _ in range(count)]
    values = torch.zeros(count, batch.size, dtype=torch.float64, device=hidden.device)
    loss: Tensor | None = None
    correct: Tensor | None = None
    drawn: list[list[Tensor]] = [[] for _ in range(samples)]
    what = "measurement" if target == "measurement" else "loss"
    for part in slices(objective, hidden, batch, slice_positions):
        own = part.batch
        leaf = hidden[part.at].detach().requires_grad_(count > 0)
        outputs = head(leaf, own.start)
        if target in ("sampled", "nothing") and own.labels is not None:
            with torch.no_grad():
                found = objective.loss(outputs, own).double()
            loss = found if loss is None else loss + found
            if target == "nothing" and isinstance(objective, Judging):
                right = objective.correct(outputs, own)
                correct = right if correct is None else correct + right
        for draw in range(count):
            if draw >= samples:
                measure = objective.measurement if target == "measurement" else objective.loss
                value = measure(outputs, own)
            elif signs:
                assert isinstance(objective, Signed)
                value = objective.signed(
                    outputs, own, part.counted(signs_of, objective, seed, draw)
                )
            else:
                if part.drawn is not None:
                    y = part.drawn[draw]
                else:
                    uniform = part.counted(uniforms, objective, seed, draw)
                    y = objective.sample(outputs.detach(), own, uniform)
                    drawn[draw].append(y)
                value = objective.loss(outputs, replace(own, labels=y))
            check_loss_shape(value, batch, what)
            values[draw] += value.detach().double()
            _check_finite(values[draw], batch, what)
            begin_draw(draw)
            gradients[draw][part.at] = _gradient(value.sum(), leaf, draw + 1 < count)
    if target == "labels" or (target == "both" and _labelled(objective, batch)):
        loss = values[-1]
    results: Results = {}
    if loss is not None:
        _check_finite(loss, batch, what)
        results[LOSS] = loss
    if samples and drawn[0]:
        results[DRAWN] = torch.stack([_behind(parts, objective) for parts in drawn])
    if correct is not None:
        results[CORRECT] = correct
    return LossGradients(tuple(gradients), results)


def _labelled(objective: Objective, batch: Batch) -> bool:
    """Whether a microbatch has labels; tokens are their own."""
    return objective.per_token or batch.labels is not None


def slices(
    objective: Objective, hidden: Tensor, batch: Batch, slice_positions: int
) -> Iterator[Slice]:
    """The parts of a microbatch's hidden states that head and objective see at once; UserError for
    states that have no axis of positions."""
    drawn = None if batch.drawn is None else list(batch.drawn)
    if not objective.per_token:
        place = torch.zeros(1, dtype=torch.int64, device=hidden.device)
        yield Slice((slice(None),), batch, place, drawn)
        return
    if hidden.ndim < 3 or batch.mask is None:
        raise UserError(
            "the objective",
            "token data and hidden states [examples, positions, width]",
            f"hidden states of shape {tuple(hidden.shape)}",
            "A per-token objective needs a token axis: choose another --objective.",
        )
    if hidden.shape[:2] != batch.mask.shape:
        # Which of the tokens other positions speak of is for nobody to guess.
        raise UserError(
            f"the model, examples {shown_ids(batch.ids)}",
            f"outputs for {list(batch.mask.shape)} examples and positions, as the tokens",
            f"{list(hidden.shape[:2])}",
            "Let the model return one row for each token, examples first, and an objective that is "
            "not per_token choose among them.",
        )
    shift = objective.shift
    labels_NT, counts_NT = _shifted(batch, shift)
    ahead = None if drawn is None else [_ahead(y, shift) for y in drawn]
    for start in range(0, hidden.shape[1], slice_positions):
        part = slice(start, min(start + slice_positions, hidden.shape[1]))
        yield Slice(
            (slice(None), part),
            replace(batch, labels=labels_NT[:, part], loss_mask=counts_NT[:, part], start=start),
            # Positions of the targets, behind those that predict them.
            torch.arange(part.start + shift, part.stop + shift, device=hidden.device),
            None if ahead is None else [y[:, part] for y in ahead],
        )


def _behind(parts: list[Tensor], objective: Objective) -> Tensor:
    """Drawn labels of all slices, aligned as the data's own, behind what predicts them."""
    if not objective.per_token:
        (whole,) = parts
        return whole
    drawn = torch.cat(parts, dim=1)
    if not objective.shift:
        return drawn
    return torch.cat([torch.zeros_like(drawn[:, :1]), drawn[:, :-1]], dim=1)


def _gradient(value: Tensor, leaf: Tensor, again: bool) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    # All of the graph, whose hooks catch the gradients of blocks in the head: see Capture.
    torch.autograd.backward(value, retain_graph=again)
    found, leaf.grad = leaf.grad, None
    return torch.zeros_like(leaf) if found is None else found


def _shifted(batch: Batch, shift: int) -> tuple[Tensor, Tensor]:
    """Targets and whether they count, aligned with the positions that predict them, ``[N, T]``."""
    assert batch.mask is not None
    labels = batch.inputs if batch.labels is None else batch.labels
    counts = batch.mask if batch.loss_mask is None else batch.mask & batch.loss_mask
    return _ahead(labels, shift), _ahead(counts, shift)


def _ahead(values_NT: Tensor, shift: int) -> Tensor:
    """Move a row's entries one position to the left, unless ``shift`` is 0; the last becomes 0."""
    if not shift:
        return values_NT
    moved = torch.zeros_like(values_NT)
    moved[:, :-1] = values_NT[:, 1:]
    return moved


def check_loss_shape(value: Any, batch: Batch, what: str) -> None:
    """Refuse what an objective gives if it is not one number an example."""
    if isinstance(value, Tensor) and value.shape == (batch.size,):
        return
    got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise UserError(
        f"the {what} of the objective",
        f"one number for each example, a tensor of shape [{batch.size}]",
        got,
        "Sum over an example's tokens and outputs, and over nothing else.",
    )


def _check_finite(values: Tensor, batch: Batch, what: str) -> None:
    finite = torch.isfinite(values)
    if not finite.all():
        n = int((~finite).nonzero()[0])
        raise UserError(
            f"example {batch.ids[n]!r}",
            f"a finite {what}",
            str(float(values[n])),
            "Leave the example out, or run the model in a wider --dtype.",
        )
