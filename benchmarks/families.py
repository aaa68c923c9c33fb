"""Every type of language model that transformers has, tiny: right, refused, or wrong?

    python benchmarks/families.py --out FILE.md          # all of them
    python benchmarks/families.py llama xglm             # some, to stdout

Each is saved as a directory, opened, and evaluated in one stage and in two, on examples of several
lengths in one microbatch. The loss must be that of transformers for each example alone, without
padding; and that of two stages, that of one bit for bit. With ``--gradients`` those of each example
by each block must be autograd's on transformers' own parameters, in float64 and three stages. A
model that is refused, is refused by a UserError before the first microbatch.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import datetime
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from dense_gradients import gradient_errors
from result_file import processor, table
from tiny_families import auto_class, causal_types, image_types, tiny_config, tiny_model
from torch import nn

import raycurv
from raycurv.errors import UserError

LENGTHS = (9, 5, 12, 2)
VOCAB = 57  # below the tokens that stand for images
TOLERANCE = 2e-5  # float32, of a loss relative to its size; transformers may run other kernels
SINGLE = 1e-5  # of gradients in float64, some of whose parts transformers computes in float32


@dataclass(frozen=True)
class Found:
    """What became of one type.

    Attributes:
        outcome: ``right``, ``refused``, ``wrong``, ``crash``, or ``not built``: no tiny model of
            it by transformers alone.
        said: the message, or the numbers.
    """

    kind: str
    outcome: str
    said: str


def examples() -> list[dict[str, Any]]:
    """Token rows of several lengths."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"id": str(n), "input_ids": torch.randint(3, VOCAB, (n,), generator=generator).tolist()}
        for n in LENGTHS
    ]


def true_loss(model: nn.Module) -> float:
    """Mean over examples of their summed next-token losses, in nats, by transformers alone."""
    total = 0.0
    for row in examples():
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0].double()
        total += torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").item()
    return total / len(LENGTHS)


def tried(kind: str, folder: Path, gradients: bool, **more: Any) -> Found:
    """What becomes of one type of model."""
    name = kind + "".join(f" ({key})" for key in more)
    try:
        config = tiny_config(kind, **more)
        tiny_model(config).save_pretrained(folder)
        # Of some types transformers does not read back what it has saved.
        true = true_loss(auto_class(config).from_pretrained(folder).eval())
    except Exception as error:
        return Found(name, "not built", f"{type(error).__name__}: {_line(error)}")
    losses: dict[int, Any] = {}
    for stages in (1, 2):
        try:
            evaluation = raycurv.evaluate(
                str(folder), examples(), folder / f"out-{stages}", quiet=True, stages=stages,
                address="none",
            )  # fmt: skip
        except UserError as error:
            return Found(name, "refused", _line(error).replace(str(folder), "DIR"))
        except Exception as error:
            return Found(name, "crash", f"{stages} stages: {type(error).__name__}: {_line(error)}")
        losses[stages] = evaluation.examples()["loss"].to_pylist()
    mean = sum(losses[1]) / len(LENGTHS)
    said = f"loss {mean:.6f}, by transformers {true:.6f}"
    if losses[1] != losses[2]:
        return Found(name, "wrong", f"{said}; two stages {losses[2]}, one {losses[1]}")
    right = abs(mean - true) <= TOLERANCE * abs(true)
    if gradients:
        try:
            errors = gradient_errors(str(folder), 3)
        except UserError as error:
            said += f"; no gradients: {_line(error).replace(str(folder), 'DIR')}"
        else:
            worst = max(errors, key=lambda block: errors[block])
            said += f"; gradients of {len(errors) - 1} blocks within {errors[worst]:.1e} ({worst})"
            right &= errors[worst] <= SINGLE
    return Found(name, "right" if right else "wrong", said)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def main(
    kinds: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    out: Path | None = None,
    gradients: bool = False,
) -> None:
    """Try types of models.

    Args:
        kinds: which, by their ``model_type``; all by default.
        out: file of results.
        gradients: whether those of each example and block are compared, too.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    started, found = time.perf_counter(), []
    for kind in kinds or [*causal_types(), *image_types()]:
        # What has an encoder's attention unless it is told to be a decoder is tried as both.
        for more in ({}, {"is_decoder": True}) if _both(kind) else ({},):
            with tempfile.TemporaryDirectory() as folder:
                found.append(tried(kind, Path(folder) / "model", gradients, **more))
            print(*(found[-1].kind, found[-1].outcome, found[-1].said), sep=" | ", flush=True)
    counts = Counter(f.outcome for f in found)
    took = time.perf_counter() - started
    summary = f"{len(found)} models in {took:.0f} s: " + ", ".join(
        f"{counts[outcome]} {outcome}" for outcome in sorted(counts)
    )
    print(summary)
    if out is not None:
        command = f"python benchmarks/families.py --out {out.name}"
        out.write_text(_page(found, summary, command))
    if counts["wrong"] or counts["crash"]:
        sys.exit(1)


def _both(kind: str) -> bool:
    """Whether a type attends both ways unless its configuration says that it is a decoder."""
    try:
        return getattr(tiny_config(kind), "is_decoder", None) is False
    except Exception:
        return False  # named where it is tried


def _page(found: list[Found], summary: str, command: str) -> str:
    """The results as Markdown: right ones by name, a row for each other one."""
    lines = [
        "# Types of causal language models",
        "",
        f"{datetime.date.today()}, {processor()}; transformers {transformers.__version__}, "
        f"torch {torch.__version__}.",
        f"Command: `{command}`",
        "",
        f"{summary}.",
        "",
        "Right, in one stage and two bit for bit, and as by transformers: "
        + ", ".join(f.kind for f in found if f.outcome == "right")
        + ".",
        "",
    ]
    rows = [[f.kind, f.outcome, f.said.replace("|", "/")] for f in found if f.outcome != "right"]
    return "\n".join([*lines, *table(["type", "outcome", "what was said"], rows), ""])


if __name__ == "__main__":
    tyro.cli(main)
