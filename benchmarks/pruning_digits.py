"""Pruning a small classifier in one shot: which method keeps how much of its accuracy.

    scikit-learn's digits, MLP 64-64-32-10, five seeds, weights chosen globally
    fit of every kind, prune.py at every sparsity    ─► results/DATE-pruning-digits.md

Seeds are paired: every method prunes the same networks, trained and tested on the same splits. The
dampings below were chosen by the training loss at 90 % on networks of two other seeds (`--choose`);
test sets had no say.
"""

from __future__ import annotations

import copy
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import raycurv

ROOT = Path(__file__).parents[1]
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
DAMPINGS = ("abs:1e-5", "abs:1e-4", "abs:1e-3", "abs:1e-2")
WEIGHT_DECAY = 1e-3
FITS: Mapping[str, Mapping[str, Any]] = {
    "diagonal": {"method": "diagonal", "fisher": "sampled", "draws": 8},
    "ekfac": {"method": "ekfac", "fisher": "sampled", "draws": 8},
    "mfac": {"method": "mfac", "rows": 1024, "fisher": "empirical"},
}


@dataclass(frozen=True)
class Way:
    """A way to prune.

    Attributes:
        fit: the curvature that it stands on.
        settings: of prune.py.
    """

    fit: str
    settings: Mapping[str, Any] = field(default_factory=dict)


# The diagonal's OBS and OBD choose the same weights but for λ, and have nothing to update by.
CHOSEN = {"ekfac": "abs:1e-4", "mfac": "abs:1e-5", "mfac, block": "abs:1e-5"}
WAYS: Mapping[str, Way] = {
    "magnitude": Way("ekfac", {"saliency": "magnitude", "no_update": True}),
    "OBD, diagonal": Way("diagonal", {"saliency": "obd", "no_update": True}),
    "OBD, EK-FAC's diagonal": Way("ekfac", {"saliency": "obd", "no_update": True}),
    "OBS, EK-FAC, no update": Way("ekfac", {"no_update": True, "damping": CHOSEN["ekfac"]}),
    "magnitude, EK-FAC's update": Way(
        "ekfac", {"saliency": "magnitude", "damping": CHOSEN["ekfac"]}
    ),
    "OBS, EK-FAC": Way("ekfac", {"damping": CHOSEN["ekfac"]}),
    "OBS, EK-FAC, 5 steps": Way("ekfac", {"damping": CHOSEN["ekfac"], "steps": 5}),
    "OBS, M-FAC, by block": Way("mfac", {"damping": CHOSEN["mfac, block"], "inverse": "block"}),
    "OBS, M-FAC": Way("mfac", {"damping": CHOSEN["mfac"]}),
}


@dataclass(frozen=True)
class Settings:
    """Prunes small networks by every method at every sparsity."""

    place: Path
    """Directory for the runs; its contents are replaced."""
    seeds: int = 5
    """Networks: seed 0 and so on."""
    choose: bool = False
    """Print the training loss at 90 % under several dampings, of two other seeds, and end."""


@dataclass(frozen=True)
class Digits:
    """One split: 80 % to train on, the rest to test.

    Attributes:
        train, test: inputs ``[N, 64]`` from -1 to 1, and labels.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def split(cls, seed: int) -> Digits:
        pixels, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(pixels / 8.0 - 1.0, dtype=torch.float32), torch.tensor(labels)
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
        first, rest = order[: int(0.8 * len(x))], order[int(0.8 * len(x)) :]
        return cls((x[first], y[first]), (x[rest], y[rest]))

    def rows(self) -> list[dict[str, Any]]:
        """The training examples as raycurv takes them."""
        x, y = self.train
        return [
            {"id": f"digit {n}", "inputs": a.tolist(), "labels": int(b)}
            for n, (a, b) in enumerate(zip(x, y, strict=True))
        ]


def train(seed: int, digits: Digits) -> nn.Sequential:
    """SGD with momentum 0.9, rate 0.1 falling to 0 as a cosine, 100 epochs in batches of 64."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)
    )
    x, y = digits.train
    batches = len(x) // 64
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100 * batches)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(100):
        for batch in torch.randperm(len(x), generator=generator)[: 64 * batches].split(64):
            optimizer.zero_grad()
            cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def measure(network: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Loss and accuracy."""
    x, y = data
    outputs = network(x)
    accuracy = (outputs.argmax(dim=1) == y).double().mean()
    return float(cross_entropy(outputs, y)), float(accuracy)


class Bench:
    """One network, its fits and its pruned copies."""

    def __init__(self, place: Path, seed: int) -> None:
        self.digits = Digits.split(seed)
        self.network = train(seed, self.digits)
        self._place, self._count = place / f"seed-{seed}", 0
        shutil.rmtree(self._place, ignore_errors=True)
        kept = copy.deepcopy(self.network)
        make: Callable[[], nn.Module] = lambda: copy.deepcopy(kept)  # noqa: E731
        self.runs = {
            name: raycurv.fit(
                make, self.digits.rows(), self._place / name, objective="classification",
                quiet=True, address="none", batch_tokens=512, **chosen,
            )
            for name, chosen in FITS.items()
        }  # fmt: skip

    def pruned(self, fit: str, **settings: Any) -> nn.Module:
        """The network after pruning."""
        self._count += 1
        found = self.runs[fit].prune(
            self._place / f"pruned-{self._count}", quiet=True, address="none", measure="none",
            batch_tokens=512, **settings,
        )  # fmt: skip
        network = copy.deepcopy(self.network)
        network.load_state_dict(load_file(Path(found.model) / "model.safetensors"))
        return network


def choose(place: Path) -> None:
    """Training loss at 90 % of two other networks, under each damping."""
    benches = [Bench(place, seed) for seed in (5, 6)]
    for name in ("OBS, EK-FAC", "OBS, M-FAC", "OBS, M-FAC, by block"):
        way = WAYS[name]
        for damping in DAMPINGS:
            settings = {**way.settings, "damping": damping, "sparsity": 0.9}
            losses = [measure(b.pruned(way.fit, **settings), b.digits.train)[0] for b in benches]
            print(f"{name:24s} {damping:9s} {statistics.mean(losses):.3f}")


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def main(settings: Settings) -> None:
    if settings.choose:
        choose(settings.place)
        return
    started = time.perf_counter()
    found: dict[tuple[str, float], list[float]] = {}
    whole: list[float] = []
    for seed in range(settings.seeds):
        bench = Bench(settings.place, seed)
        whole.append(measure(bench.network, bench.digits.test)[1])
        for name, way in WAYS.items():
            for sparsity in SPARSITIES:
                network = bench.pruned(way.fit, sparsity=sparsity, **way.settings)
                accuracy = measure(network, bench.digits.test)[1]
                found.setdefault((name, sparsity), []).append(accuracy)
        print(f"seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    shutil.rmtree(settings.place, ignore_errors=True)
    lines = [
        f"# Pruning a small classifier, {date.today()}",
        "",
        "    python benchmarks/pruning_digits.py --place PLACE",
        "",
        "- scikit-learn's digits, MLP 64-64-32-10 (tanh), SGD with weight decay 1e-3, 1,437 "
        f"examples to train on, 360 to test; {settings.seeds} seeds, paired",
        f"- test accuracy before pruning: {spread(whole)}; weights pruned in one shot (5 steps "
        "where it says so), chosen globally",
        f"- damping: EK-FAC {CHOSEN['ekfac']}, M-FAC {CHOSEN['mfac']} (1,024 gradients), chosen "
        "by training loss on two other seeds (`--choose`)",
        f"- {time.perf_counter() - started:.0f} s on 2 cores",
        "",
        "Test accuracy, mean ± standard deviation over seeds:",
        "",
        "| removed | " + " | ".join(f"{s:.0%}" for s in SPARSITIES) + " |",
        "|---|" + "---|" * len(SPARSITIES),
    ]
    for name in WAYS:
        lines.append(f"| {name} | " + " | ".join(spread(found[name, s]) for s in SPARSITIES) + " |")
    lines += ["", "Better than magnitude by, paired, at 90 %:", ""]
    for name in WAYS:
        pairs = zip(found[name, 0.9], found["magnitude", 0.9], strict=True)
        gains = [mine - theirs for mine, theirs in pairs]
        if name != "magnitude":
            lines.append(f"- {name}: {spread(gains)}, least {min(gains):+.3f}")
    path = ROOT / "benchmarks" / "results" / f"{date.today()}-pruning-digits.md"
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main(tyro.cli(Settings))
