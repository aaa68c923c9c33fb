"""Every type of language model that transformers has, tiny: right, refused, or wrong?

    python benchmarks/families.py --out FILE.md          # all of them
    python benchmarks/families.py llama xglm             # some, to stdout

Each is saved as a directory, opened, and evaluated in one stage and in three, on examples of
several lengths in one microbatch. The loss must be that of transformers for each example alone,
without padding; and that of three stages, that of one bit for bit. With ``--gradients`` those of
each example by each block must be autograd's on transformers' own parameters, in float64 and three
stages. A model that is refused, is refused by a UserError before the first microbatch. What has to
be left out of the blocks is what the refusal of a fit says.

``--table`` keeps what was found for ``docs/models.md``, see ``models_page.py``.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import datetime
import json
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from dense_gradients import gradient_errors
from models_page import markdown
from result_file import processor
from tiny_families import auto_class, causal_types, image_types, tiny_config, tiny_model
from torch import nn

import raycurv
from raycurv.errors import UserError
from raycurv.mathematics.choice import choose_blocks
from raycurv.mathematics.coverage import coverage
from raycurv.models.opening import open_model

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
        name: of its class.
        units: into how many pieces it may be cut.
        experts: whether it has blocks of experts.
        covered: share of its trainable parameters that have blocks by default.
        left: what has to be left out of the blocks by default.
    """

    kind: str
    outcome: str
    said: str
    name: str = ""
    units: int = 0
    experts: bool = False
    covered: float = 0.0
    left: tuple[str, ...] = ()


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
    try:
        about = _described(str(folder))
        shared = about.pop("shared")
    except UserError as error:
        return Found(name, "refused", _line(error).replace(str(folder), "DIR"), _class(folder))
    except Exception as error:
        return Found(name, "crash", f"{type(error).__name__}: {_line(error)}")
    whole, cut = 1, min(3, about["units"])
    for stages in (whole, cut):
        try:
            evaluation = raycurv.evaluate(
                str(folder), examples(), folder / f"out-{stages}", quiet=True, stages=stages,
                address="none",
            )  # fmt: skip
        except UserError as error:
            return Found(name, "refused", _line(error).replace(str(folder), "DIR"), _class(folder))
        except Exception as error:
            return Found(name, "crash", f"{stages} stages: {type(error).__name__}: {_line(error)}")
        losses[stages] = evaluation.examples()["loss"].to_pylist()
    mean = sum(losses[whole]) / len(LENGTHS)
    said = f"loss {mean:.6f}, by transformers {true:.6f}"
    if losses[whole] != losses[cut]:
        return Found(name, "wrong", f"{said}; {cut} stages {losses[cut]}, one {losses[whole]}")
    right = abs(mean - true) <= TOLERANCE * abs(true)
    if gradients:
        try:
            # What several layers share is one block, of one stage.
            errors = gradient_errors(str(folder), 1 if shared else cut, about["left"])
        except Exception as error:
            # Some of transformers' code fails in float64; a fit in float32 checks gradients.
            said += f"; in float32 as a fit checks gradients, in float64 {_line(error)}"
            try:
                out, left = folder / "fit", about["left"] or ("default",)
                raycurv.fit(str(folder), examples(), out, quiet=True, address="none", blocks=left)
            except UserError as refused:
                told = _line(refused).replace(str(folder), "DIR")
                return Found(name, "refused", f"evaluated as by transformers, not fitted: {told}")
        else:
            worst = max(errors, key=lambda block: errors[block])
            said += f"; gradients of {len(errors) - 1} blocks within {errors[worst]:.1e} ({worst})"
            right &= errors[worst] <= SINGLE
    return Found(name, "right" if right else "wrong", said, _class(folder), **about)


def _described(folder: str) -> dict[str, Any]:
    """What a fit would say of a model before it starts: units, experts, coverage, and what has to
    be left out."""
    model, left = open_model(folder), ()
    for _ in range(2):
        try:
            blocks = choose_blocks(
                model.skeleton(), left, model.default_scope, model.tied_head, model.idle, model.held
            )
            break
        except UserError as error:
            left = tuple(re.findall(r"--blocks '(![^']+)'", str(error)))
            if not left:
                raise
    share = coverage(model.skeleton(), blocks, model.idle)
    return {
        "units": model.units,
        "experts": any(block.kind.startswith("experts") for block in blocks),
        "covered": share.covered / max(1, share.trainable),
        "left": left,
        "shared": any(block.shared for block in blocks),
    }


def _class(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["architectures"][0])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def main(
    kinds: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    out: Path | None = None,
    gradients: bool = False,
    table: Path | None = None,
) -> None:
    """Try types of models.

    Args:
        kinds: which, by their ``model_type``; all by default.
        out: file of results.
        gradients: whether those of each example and block are compared, too.
        table: file for what was found, as JSON.
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
            if table is not None:
                rows = [asdict(one) | {"covered": round(one.covered, 4)} for one in found]
                table.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    counts = Counter(f.outcome for f in found)
    took = time.perf_counter() - started
    summary = f"{len(found)} models in {took:.0f} s: " + ", ".join(
        f"{counts[outcome]} {outcome}" for outcome in sorted(counts)
    )
    print(summary)
    if out is not None:
        words = [*kinds, *(["--gradients"] if gradients else []), "--out", out.name]
        command = f"python benchmarks/families.py {' '.join(words)}"
        out.write_text(_page(found, summary, command, gradients))
    if counts["wrong"] or counts["crash"]:
        sys.exit(1)


def _both(kind: str) -> bool:
    """Whether a type attends both ways unless its configuration says that it is a decoder."""
    try:
        return getattr(tiny_config(kind), "is_decoder", None) is False
    except Exception:
        return False  # named where it is tried


def _page(found: list[Found], summary: str, command: str, every: bool) -> str:
    """The results as Markdown: right ones by name; a row for each other one, or for every one."""
    lines = [
        "# Types of causal language models",
        "",
        f"{datetime.date.today()}, {processor()}; transformers {transformers.__version__}, "
        f"torch {torch.__version__}.",
        f"Command: `{command}`",
        "",
        f"{summary}.",
        "",
        "Right, in one stage and three bit for bit, and as by transformers: "
        + ", ".join(f.kind for f in found if f.outcome == "right")
        + ".",
        "",
    ]
    shown = [f for f in found if every or f.outcome != "right"]
    rows = [[f.kind, f.outcome, f.said.replace("|", "/")] for f in shown]
    return "\n".join([*lines, *markdown(["type", "outcome", "what was said"], rows), ""])


if __name__ == "__main__":
    tyro.cli(main)
