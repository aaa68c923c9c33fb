"""Gradients of each example as raycurv captures them, beside those of transformers and autograd.

raycurv's of padded examples together, through its segments; transformers' own of one example after
the other, unpadded, with its plainest code (eager experts) and autograd on the parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from tiny_families import auto_class
from torch import Tensor
from transformers import AutoConfig

from raycurv.batch import Batch
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Capture, Record
from raycurv.mathematics.choice import choose_blocks
from raycurv.mathematics.gradients import example_gradients
from raycurv.mathematics.kinds.catalogue import kind_of_block
from raycurv.models.opening import open_model

LENGTHS = (9, 4, 12, 1)
VOCAB = 57  # below the tokens that stand for images
ROUNDING = 1e-9
CPU = torch.device("cpu")


def sentences() -> list[Tensor]:
    """Token rows of several lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (n,), generator=generator) for n in LENGTHS]


def cotangent(number: int, shape: Sequence[int]) -> Tensor:
    """Of the logits of an example: what is differentiated is a random linear function of them."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gradient_errors(folder: str, stages: int = 1, globs: Sequence[str] = ()) -> dict[str, float]:
    """By block the largest difference of a gradient from transformers', over the largest gradient
    of the block; and under ``""`` that of the logits. In float64.

    Args:
        folder: an HF directory.
        globs: as ``--blocks`` takes them.
    """
    rows = sentences()
    captured, logits = _captured(folder, rows, stages, globs)
    whole: Any = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    whole.eval().requires_grad_(True)
    found, worst = dict.fromkeys(captured, 0.0), 0.0
    largest = {block: float(g.abs().max()) for block, g in captured.items()}
    for n, row in enumerate(rows):
        whole.zero_grad()
        out = whole(input_ids=row[None], use_cache=False).logits[0]
        scale = float(out.detach().abs().max())
        worst = max(worst, _apart(logits[n, : len(row)], out) / scale)
        (out * cotangent(n, out.shape)).sum().backward()
        for block, gradients in captured.items():
            want = _matrix(whole, block)
            largest[block] = max(largest[block], float(want.abs().max()))
            found[block] = max(found[block], _apart(gradients[n], want))
    # A gradient that is zero but for rounding has no size of its own.
    least = ROUNDING * max(largest.values())
    errors = {b.name: found[b] / max(largest[b], least) for b in captured}
    return {"": worst} | errors


def _captured(
    folder: str, rows: list[Tensor], stages: int, globs: Sequence[str]
) -> tuple[dict[Block, Tensor], Tensor]:
    """By block the gradients ``[N, O, I]``, and the logits ``[N, T, V]``."""
    model = open_model(folder)
    blocks = choose_blocks(
        model.skeleton(), globs, model.default_scope, model.tied_head, model.idle, model.held
    )
    longest = max(map(len, rows))
    mask = torch.stack([torch.arange(longest) < len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    batch = Batch(0, tuple(map(str, range(len(rows)))), ids, mask)
    hidden: tuple[Tensor, ...] | None = None
    held = []
    cuts = [model.units * stage // stages for stage in range(stages + 1)]
    for start, stop in itertools.pairwise(cuts):
        segment = model.build(range(start, stop), torch.float64, CPU)
        own = [b for b in blocks if start <= model.unit_of(b.module) < stop]
        capture, record = Capture(segment.module, own), Record(batch)
        entered = None
        if hidden is not None:
            entered = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in hidden)
        with capture.recording(record):
            hidden = segment.forward(batch, entered)
        capture.blocks = {b.name: b for b in capture.discover(record)}
        held.append((capture, record, entered, hidden))
    assert hidden is not None
    left = hidden[0].detach().requires_grad_()
    logits = segment.head(left)
    wanted = torch.zeros_like(logits)
    for n, row in enumerate(rows):
        wanted[n, : len(row)] = cotangent(n, (len(row), logits.shape[-1]))
    logits.backward(wanted)
    back: list[Tensor | None] = [left.grad]
    found = {}
    for capture, record, entered, hidden in reversed(held):
        pairs = [
            (t, g) for t, g in zip(hidden, back, strict=False) if g is not None and t.requires_grad
        ]
        if pairs:
            torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        back = [tensor.grad for tensor in entered or ()]
        seen = capture.captured(record)
        for block in capture.blocks.values():
            g = seen.gradients[block.name]
            found[block] = torch.zeros(len(rows), block.d_out, block.d_in, dtype=torch.float64)
            if g is not None:
                found[block] += example_gradients(seen.inputs[block.input_factor], g)
    return found, logits.detach()


def _matrix(whole: Any, block: Block) -> Tensor:
    """The gradient ``[O, I]`` that autograd left for a block."""
    kind, columns = kind_of_block(block), []
    for name in kind.parameters(block):
        parameter = whole.get_submodule(block.module).get_parameter(name)
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        part = kind.part(block, gradient)
        columns.append(kind.to_rows(part) if name == block.parameter else part[:, None])
    return torch.cat(columns, dim=1)


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.detach() - other.detach()).abs().max())
