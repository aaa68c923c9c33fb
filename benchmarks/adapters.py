"""An adapter on the demo's model: scores beside the dense formula, costs beside PEFT's own passes.

demo/passages.py, demo/train.py        the base and its text
PEFT: a LoRA adapter, trained for some steps
  ─► EK-FAC in float64 on some passages, and Λ and scores by autograd on PEFT's model
  ─► forward and backward by PEFT, and each pass of raycurv, in turn: processor seconds
                                       ─► results/DATE-adapters.md
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import peft
import pyarrow.parquet as pq
import torch
import tyro
from clock import Clock
from result_file import command_line, loads, processor, source_state, table, write_figures
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import raycurv
from raycurv.driver.settings import IN_MEMORY
from raycurv.jobs.fit.fitting import fit
from raycurv.jobs.influence.scoring import influence
from raycurv.jobs.inputs import Inputs
from raycurv.progress.phase import PhaseProgress
from raycurv.progress.reporter import Reporter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "demo"))
TARGETS: Mapping[str, Sequence[str] | str] = {
    "q_proj and v_proj": ["q_proj", "v_proj"],
    "all linear layers": "all-linear",
}
PASSES = {
    "first pass: A and G": "fit: A and G",
    "second pass: Λ": "fit: Λ",
    "scores": "scores",
}
DAMPING = 0.1
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Measures what an adapter's curvature costs on the demo's model."""

    demo: Path
    """Directory of demo/passages.py and demo/train.py: `model` and `train.parquet`."""
    place: Path
    """Directory for adapters and runs; its contents are replaced."""
    rank: int = 16
    """Of the adapters."""
    steps: int = 40
    """Steps of Adam that an adapter is trained for, of 8 passages each."""
    passages: int = 512
    """Passages that costs are measured on, of up to 256 bytes each."""
    dense: int = 32
    """Passages of the dense formula."""
    batch: int = 16
    """Passages of a microbatch."""
    queries: int = 4
    """Queries of a scoring."""
    repeats: int = 3
    """Measurements of each cost, of which the median is shown."""
    threads: int = 1
    """Threads of torch, on both sides."""
    results: Path = ROOT / "benchmarks" / "results"
    """Directory of the result file."""
    figures: Path | None = None
    """JSON file for the figures that targets are judged by."""


class Watched(Reporter):
    """Tells a clock which phase begins."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(quiet=True)
        self._clock = clock

    def phase(
        self, name: str, total: int, unit: str, where: str = ""
    ) -> AbstractContextManager[PhaseProgress]:
        self._clock.begin(name)
        return super().phase(name, total, unit, where)


def load(settings: Settings, adapter: Path | None = None, dtype: Any = torch.float32) -> Any:
    """The base, with PEFT's adapter if there is one."""
    base = AutoModelForCausalLM.from_pretrained(settings.demo / "model", dtype=dtype)
    if adapter is None:
        return base
    return peft.PeftModel.from_pretrained(base, str(adapter), is_trainable=True).eval()


def losses(model: Any, rows: Sequence[Row]) -> Tensor:
    """Summed over all targets of some passages, padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids_NT = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask_NT = torch.zeros_like(ids_NT)
    for n, row in enumerate(rows):
        ids_NT[n, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask_NT[n, : len(row["input_ids"])] = 1
    logits = model(input_ids=ids_NT, attention_mask=mask_NT, use_cache=False).logits[:, :-1]
    targets = ids_NT[:, 1:].masked_fill(mask_NT[:, 1:] == 0, -100)
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def make_adapter(settings: Settings, name: str, rows: Sequence[Row]) -> Path:
    """Train a LoRA adapter by PEFT; gives its directory."""
    torch.manual_seed(0)
    wanted = peft.LoraConfig(
        r=settings.rank, lora_alpha=2 * settings.rank, task_type="CAUSAL_LM",
        target_modules=TARGETS[name],
    )  # fmt: skip
    model = peft.get_peft_model(load(settings), wanted)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for step in range(settings.steps):
        some = [rows[(8 * step + n) % len(rows)] for n in range(8)]
        losses(model, some).div(sum(len(r["input_ids"]) for r in some)).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = settings.place / f"adapter-{name.replace(' ', '-')}"
    model.save_pretrained(str(folder))
    return folder


def dense_difference(settings: Settings, adapter: Path, rows: Sequence[Row]) -> tuple[float, float]:
    """EK-FAC's Λ and scores in float64 beside the dense formula on the adapter's parameters.

    ``Λ = mean (Q_Gᵀ ∇W Q_A)²`` and ``Σ_blocks ⟨g_q, Q_G (Q_Gᵀ g_n Q_A / (Λ + λ)) Q_Aᵀ⟩``, with the
    gradients that autograd finds of PEFT's own parameters, one passage at a time; gives the largest
    differences over the largest values.
    """
    run = raycurv.fit(
        settings.demo / "model", rows, settings.place / f"dense-{adapter.name}", adapter=[adapter],
        fisher="empirical", dtype="float64", address="none", quiet=True, stages=2,
    )  # fmt: skip
    scores, queries, trains = run.influence(
        rows[: settings.queries], rows, settings.place / f"dense-scores-{adapter.name}",
        address="none", quiet=True, rank="full", damping=str(DAMPING),
    ).matrix()  # fmt: skip
    model = load(settings, adapter, torch.float64)
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients: dict[str, list[Tensor]] = {name: [] for name in names}
    for row in rows:
        found = torch.autograd.grad(losses(model, [row]), list(names.values()))
        for name, gradient in zip(names, found, strict=True):
            gradients[name].append(gradient)
    want = torch.zeros(settings.queries, len(rows), dtype=torch.float64)
    off = 0.0
    for name, mine in gradients.items():
        block = run.curvature(name.removeprefix("base_model.model.").removesuffix(".weight"))
        q_a, q_g = block.input_basis.dense(), block.output_basis.dense()
        turned_NOI = q_g.T @ torch.stack(mine) @ q_a
        lam_OI = turned_NOI.square().mean(0)
        off = max(off, float((lam_OI - block.eigenvalues).abs().max() / lam_OI.max()))
        solved_NOI = turned_NOI / (lam_OI + DAMPING * lam_OI.mean())
        want += solved_NOI[: settings.queries].flatten(1) @ turned_NOI.flatten(1).T
    order_Q = [queries.index(row["id"]) for row in rows[: settings.queries]]
    order_N = [trains.index(row["id"]) for row in rows]
    got = torch.from_numpy(scores)[order_Q][:, order_N]
    return off, float((got - want).abs().max() / want.abs().max())


def costs(settings: Settings, adapter: Path, rows: Sequence[Row]) -> dict[str, float]:
    """Processor seconds of PEFT's forward and backward over all passages, and of each pass."""
    model = load(settings, adapter)
    found: dict[str, list[float]] = {}
    for repeat in range(settings.repeats):
        clock = Clock()
        # A pass of raycurv takes microbatches by tokens, and examples in their order.
        with clock.phase("PEFT: forward and backward"):
            for start in range(0, len(rows), settings.batch):
                losses(model, rows[start : start + settings.batch]).backward()
                model.zero_grad()
        longest = max(len(row["input_ids"]) for row in rows)
        how: dict[str, Any] = {"address": "none", "batch_tokens": settings.batch * longest}
        run = settings.place / f"cost-{adapter.name}-{repeat}"
        chosen = raycurv.FitSettings(
            model=str(settings.demo / "model"), data=IN_MEMORY, out=str(run),
            adapter=(str(adapter),), fisher="empirical", **how,
        )  # fmt: skip
        fit(chosen, Inputs(data=list(rows)), Watched(clock))
        scoring = raycurv.InfluenceSettings(
            run=str(run), queries=IN_MEMORY, train=IN_MEMORY, out=f"{run}-scores", **how
        )
        asked = list(rows[: settings.queries])
        influence(scoring, Inputs(queries=asked, train=list(rows)), Watched(clock))
        clock.end()
        for name, cost in clock.phases.items():
            found.setdefault(PASSES.get(name, name), []).append(cost.cpu)
    return {name: median(seconds) for name, seconds in found.items()}


def main(settings: Settings) -> None:
    """Make adapters, compare, measure, report."""
    disable_progress_bar()
    torch.set_num_threads(settings.threads)
    shutil.rmtree(settings.place, ignore_errors=True)
    settings.place.mkdir(parents=True)
    texts = pq.read_table(settings.demo / "train.parquet").to_pylist()
    # BOS and the text's bytes, as the demo trains on.
    rows: list[Row] = [
        {"id": text["id"], "input_ids": [256, *text["text"].encode()]}
        for text in texts[:: max(1, len(texts) // settings.passages)][: settings.passages]
    ]
    before, lines, figures = loads(), [], {}
    for name in TARGETS:
        adapter = make_adapter(settings, name, rows)
        off, scored = dense_difference(settings, adapter, rows[: settings.dense])
        seconds = costs(settings, adapter, rows)
        theirs = seconds["PEFT: forward and backward"]
        shown = ["PEFT: forward and backward", *PASSES.values()]
        figures[name] = {"lambda": off, "scores": scored, "seconds": seconds}
        lines += [
            "", f"## {name}", "",
            f"float64, {settings.dense} passages: Λ within {off:.1e} of the dense formula's, and "
            f"scores within {scored:.1e}", "",
            *table(
                ["", "processor seconds", "over forward and backward"],
                [[n, f"{seconds[n]:.2f}", f"{seconds[n] / theirs:.2f}"] for n in shown],
            ),
        ]  # fmt: skip
        print("\n".join(lines), flush=True)
    write_figures(settings.figures, figures)
    tokens = sum(len(row["input_ids"]) for row in rows)
    head = [
        f"# Adapters of rank {settings.rank}, {date.today()}",
        "",
        f"    {command_line('adapters.py', settings, Settings(Path(), Path()))}",
        "",
        f"- {processor()}; loads before {before}, after {loads()}; torch {torch.__version__}, peft "
        f"{peft.__version__}; threads: {settings.threads}",
        f"- raycurv {source_state()}",
        f"- the demo's model; {len(rows)} passages, {tokens:,} tokens; {settings.queries} queries, "
        f"rank 32; medians of {settings.repeats}",
        "- PEFT's model in eval mode, gradients of the adapter's parameters summed over a "
        "microbatch; each pass of raycurv has those of every passage",
    ]
    file = settings.results / f"{date.today()}-adapters.md"
    settings.results.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([*head, *lines]) + "\n")
    print(file)


if __name__ == "__main__":
    main(tyro.cli(Settings))
