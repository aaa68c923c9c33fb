"""Pruning the demo's language model at 50 % and at 2:4: loss by method, predicted and measured.

demo/passages.py, demo/train.py        the model and what it was trained on
fit of EK-FAC and of M-FAC, prune.py every way, evaluate.py on other source files
                                       ─► results/DATE-pruning-language-model.md
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import source_texts
import tyro

import raycurv

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "demo"))
FITS: Mapping[str, Mapping[str, Any]] = {
    "ekfac": {"method": "ekfac"},
    "mfac": {"method": "mfac", "rows": 64},
}
STRUCTURES: Mapping[str, Mapping[str, Any]] = {
    "50 % of the weights": {"sparsity": 0.5},
    "2:4": {"structure": "2:4"},
}
# The fit of each way, and settings of prune.py.
WAYS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "magnitude": ("ekfac", {"saliency": "magnitude", "no_update": True}),
    "OBD, EK-FAC's diagonal": ("ekfac", {"saliency": "obd", "no_update": True}),
    "OBS, EK-FAC, no update": ("ekfac", {"no_update": True}),
    "magnitude, EK-FAC's update": ("ekfac", {"saliency": "magnitude"}),
    "OBS, EK-FAC": ("ekfac", {}),
    "OBS, M-FAC": ("mfac", {}),
}


@dataclass(frozen=True)
class Settings:
    """Prunes the demo's model by every method, and evaluates what is left."""

    demo: Path
    """Directory of demo/passages.py and demo/train.py: `model` and `train.parquet`."""
    place: Path
    """Directory for the runs; its contents are replaced."""
    damping: str = "0.1"
    """Of the damped curvature; the same for all."""
    held_out: int = 200
    """Passages of 256 bytes from source files that the model has not seen."""
    passages: int = 512
    """Training passages that rises are measured on."""


def held_out(demo: Path, count: int) -> list[dict[str, Any]]:
    """Text of files that gave no training passage."""
    from passages import FILES

    texts = source_texts.choose(source_texts.standard_library(), 4 * count, 256, 0)
    own = {f.rpartition("#")[0] for f in pq.read_table(demo / "train.parquet")["id"].to_pylist()}
    unseen = [t for t in texts if t.id.rpartition("#")[0] not in own | set(FILES)]
    return [{"id": t.id, "text": t.text} for t in unseen[:count]]


def line(name: str, *numbers: float | None) -> str:
    """A row of a table."""
    return f"| {name} | " + " | ".join("-" if n is None else f"{n:.4f}" for n in numbers) + " |"


def main(settings: Settings) -> None:
    started = time.perf_counter()
    shutil.rmtree(settings.place, ignore_errors=True)
    model, train = settings.demo / "model", settings.demo / "train.parquet"
    here: dict[str, Any] = {"quiet": True, "address": "none"}
    runs = {
        name: raycurv.fit(model, train, settings.place / name, **chosen, **here)
        for name, chosen in FITS.items()
    }
    fitted = time.perf_counter() - started
    texts = held_out(settings.demo, settings.held_out)

    def loss(folder: str | Path, name: str) -> float:
        found = raycurv.evaluate(folder, texts, settings.place / f"evaluated-{name}", **here)
        return found.loss_per_target

    whole = loss(model, "whole")
    tables = []
    for structure, what in STRUCTURES.items():
        tables += [
            "", f"## {structure}", "",
            "| | held-out loss, nats a byte | rise on training passages, measured | predicted |",
            "|---|---|---|---|", line("before", whole, None, None),
        ]  # fmt: skip
        blocks: raycurv.Pruned | None = None
        for name, (fit, chosen) in WAYS.items():
            best = name == "OBS, EK-FAC"
            slug = f"{structure} {name}".replace(" ", "-").replace(",", "").replace("%", "percent")
            pruned = runs[fit].prune(
                settings.place / slug, damping=settings.damping,
                measure="blocks" if best else "total", measure_examples=settings.passages,
                **what, **chosen, **here,
            )  # fmt: skip
            tables.append(line(name, loss(pruned.model, slug), pruned.measured, pruned.predicted))
            print(tables[-1], f"{time.perf_counter() - started:.0f} s", flush=True)
            blocks = pruned if best else blocks
        assert blocks is not None
        correlation = blocks.manifest.facts["correlation"]
        tables += [
            "", f"OBS with EK-FAC, each block alone: predicted and measured rise, correlation over "
            f"{len(blocks.blocks())} blocks **{correlation:.3f}**:", "",
            "| block | removed | predicted | measured | solver |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for row in blocks.blocks().to_pylist():
            solver = f"{row['iterations']} steps, residual {row['residual']:.0e}"
            tables.append(
                f"| {row['block']} | {row['sparsity']:.1%} | {row['predicted']:.4f} | "
                f"{row['measured']:.4f} | {solver} |"
            )
    facts = runs["ekfac"].manifest.facts
    lines = [
        f"# Pruning the demo's language model, {date.today()}",
        "",
        "    python demo/passages.py --out DEMO; python demo/train.py --out DEMO",
        "    python benchmarks/pruning_language_model.py --demo DEMO --place PLACE",
        "",
        f"- byte-level Llama-shaped model of the demo, {facts['examples']:,} training passages, "
        f"{facts['tokens']:,} tokens; {len(texts)} held-out passages of other files",
        f"- damping {settings.damping}, one shot, weights chosen globally; M-FAC of 64 gradients, "
        "the whole model's inverse",
        "- rises are of the mean loss a passage (its sum over bytes), on "
        f"{settings.passages} training passages",
        f"- {fitted:.0f} s for both fits, {time.perf_counter() - started:.0f} s in all, 2 cores",
        *tables,
    ]
    path = ROOT / "benchmarks" / "results" / f"{date.today()}-pruning-language-model.md"
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main(tyro.cli(Settings))
