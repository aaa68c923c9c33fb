"""The parts of ``gpu.py`` that fit and score: the device's results against the CPU's, and the
seconds and the memory of each phase on a model of some size."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from gpu import Notes, Place
from gpu_kernels import peak, settle, start_peak, tf32
from torch import Tensor, nn

import raycurv
from raycurv.driver.settings import IN_MEMORY
from raycurv.jobs.fit.fitting import fit
from raycurv.jobs.influence.scoring import influence
from raycurv.jobs.inputs import Inputs
from raycurv.progress.phase import PhaseProgress
from raycurv.progress.reporter import Reporter

# Largest difference over the largest number. In float64 all is, but for Llama's softmax and norms,
# which transformers takes in float32. Microbatches of other sizes move float32 by 1e-5 at most.
TOLERANCES = {
    "network float64": 1e-9,
    "network float32": 1e-3,
    "llama float64": 1e-4,
    "llama float32": 1e-3,
}
# On one device, where only the order of additions differs; attention's backward on a GPU need not
# give the same bits twice.
SAME_DEVICE = {"network float64": 1e-10, "llama float32": 1e-4}
_VOCAB = 61
# How long a phase goes on until it is said how far it is.
_EVERY_SECONDS = 2.0


class _Mix(nn.Module):
    """Gives each position the mean of those before it, through two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
        mean = x.cumsum(dim=1) / count[:, None]
        mixed: Tensor = x + self.down(torch.tanh(self.up(mean)))
        return mixed


def network() -> nn.Module:
    """A small language model that computes in its own dtype throughout."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(_VOCAB, 24), _Mix(24), _Mix(24), nn.Linear(24, _VOCAB))


@dataclass(frozen=True)
class _Case:
    """What is fitted and scored twice.

    Attributes:
        name: of the model and of its dtype, as :data:`TOLERANCES` has it.
        other: how the second fit is run, on the same device; with nothing, it is on the device and
            the first one on the CPU.
        method: of both.
    """

    name: str
    other: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)

    @property
    def tolerance(self) -> float:
        """Of their largest difference."""
        return (SAME_DEVICE if self.other else TOLERANCES)[self.name]

    def sides(self, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings of both."""
        dtype = self.name.split()[1]
        # Near a tie rounding would draw other labels.
        fisher = "empirical" if dtype == "float32" else "sampled"
        how = {"dtype": dtype, "fisher": fisher, **self.method, "device": device}
        return how | ({} if self.other else {"device": "cpu"}), how | self.other


CASES = (
    _Case("network float64"),
    _Case("network float32"),
    _Case("network float64", {"stages": 3}),
    _Case("network float64", {"schedule": "swept", "replicas": 2}),
    _Case("network float64", {}, {"method": "mfac", "rows": 6}),
    _Case("llama float64"),
    _Case("llama float32"),
    _Case("llama float32", {"stages": 3}),
)


def stages(place: Place, notes: Notes) -> None:
    """Fits and scores small models on the device and on the CPU, and in several ways on it.

    Raises:
        AssertionError: some numbers are further apart than they may be.
    """
    known: dict[str, dict[str, np.ndarray]] = {}
    missed = []
    for case in CASES[:3] if place.small else CASES:
        found = []
        for settings in case.sides(place.device):
            mark = f"{case.name} {settings}"
            notes.at(mark)
            if mark not in known:
                known[mark] = _numbers(case.name.split()[0], settings, place)
            found.append(known[mark])
        first, second = found
        assert first.keys() == second.keys()
        said = [" ".join(f"{k} {v}" for k, v in side.items()) for side in case.sides(place.device)]
        for what, reference in first.items():
            apart = float(np.abs(second[what] - reference).max() / np.abs(reference).max())
            kept = apart <= case.tolerance
            missed += [] if kept else [f"{what} of {case.name}, {said[1]}: {apart:.2g}"]
            notes.row(
                "Largest difference over the largest number", model=case.name, first=said[0],
                second=said[1], what=what, found=apart, tolerance=case.tolerance,
                verdict="kept" if kept else "MISSED",
            )  # fmt: skip
    assert not missed, "further apart than they may be: " + "; ".join(missed)


def _numbers(model: str, settings: dict[str, Any], place: Place) -> dict[str, np.ndarray]:
    """What a fit and its scores say, as far as it depends on no choice of a basis."""
    rng = np.random.default_rng(0)
    rows = [
        {"id": f"{n:03d}", "input_ids": rng.integers(1, _VOCAB, rng.integers(5, 30)).tolist()}
        for n in range(8 if place.small else 40)
    ]
    how: dict[str, Any] = {"address": "none", "batch_tokens": 128, "quiet": True}
    own = {key: settings[key] for key in ("device", "stages", "schedule", "replicas")
           if key in settings}  # fmt: skip
    found = {}
    with TemporaryDirectory(dir=place.directory) as directory:
        made: Any = network if model == "network" else _llama(Path(directory) / "model")
        # An embedding's weight is no matrix that is multiplied.
        blocks = {"blocks": ("!0",)} if model == "network" else {}
        run = raycurv.fit(made, rows, f"{directory}/run", **(how | blocks | settings))
        examples = run.examples().sort_by("id")
        for column in ("loss", "gradient_sq_norm"):
            found[column] = examples[column].to_numpy()
        for name in (run.block_names()[0], run.block_names()[-1]):
            curvature: Any = run.curvature(name)
            shape = (curvature.block.d_out, curvature.block.d_in)
            v = torch.from_numpy(rng.normal(size=shape))
            found[f"F v, {name}"] = curvature.apply(v, lambda x: x).numpy()
        ways: dict[str, dict[str, Any]] = {"scores": {"self_influence": True}}
        if settings.get("method") != "mfac":
            ways["refined scores"] = {"solver": "cg", "steps": 2}
        for what, way in ways.items():
            out = f"{directory}/{what}"
            scored = run.influence(rows[:3], rows, out, rank="full", **(how | own | way))
            scores, queries, columns = scored.matrix()
            found[what] = scores[np.argsort(queries)][:, np.argsort(columns)]
            if "self_influence" in way:
                found["self-influence"] = scored.self_influence().sort_by("id")["score"].to_numpy()
    return found


def _llama(folder: Path) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCAB, hidden_size=32, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return _saved(LlamaForCausalLM, config, folder, torch.device("cpu"))


class Watched(Reporter):
    """Notes what each phase takes, and how far one is that takes long.

    Attributes:
        apart: seconds outside phases: reading, building the model, tables.
    """

    def __init__(self, notes: Notes, job: str, device: torch.device) -> None:
        super().__init__(quiet=True)
        self._notes, self._job, self._device = notes, job, device
        self.apart = 0.0
        self._ended = time.perf_counter()
        start_peak(device)

    @contextmanager
    def phase(self, name: str, total: int, unit: str, where: str = "") -> Iterator[PhaseProgress]:
        self.between()
        said = began = time.perf_counter()

        with super().phase(name, total, unit, where) as phase:
            shown = phase.changed

            def changed(now: PhaseProgress) -> None:
                nonlocal said
                if shown is not None:
                    shown(now)
                if time.perf_counter() - said > _EVERY_SECONDS:
                    said = time.perf_counter()
                    self._notes.at(f"{self._job}, {now.line()} after {said - began:.0f} s")

            phase.changed = changed
            self._notes.at(f"{self._job}, {name}")
            try:
                yield phase
            finally:
                settle(self._device)
                self._ended = time.perf_counter()
                self._notes.row(
                    "Phases", job=self._job, phase=name, seconds=self._ended - began,
                    **peak(self._device),
                )  # fmt: skip
                start_peak(self._device)

    def between(self) -> None:
        """Note what came since the last phase, if it took any time worth a row."""
        settle(self._device)
        seconds = time.perf_counter() - self._ended
        self.apart += seconds
        if seconds > _EVERY_SECONDS / 10:
            self._notes.row(
                "Phases", job=self._job, phase="beside", seconds=seconds, **peak(self._device)
            )
        start_peak(self._device)
        self._ended = time.perf_counter()


def shape(place: Place, notes: Notes) -> None:
    """Fits a model of Qwen2.5-0.5B's shape, of random weights, to 64 examples of 512 tokens, and
    scores them on one query."""
    device = torch.device(place.device)
    layers = place.layers or 2
    model = _qwen(layers, place, notes)
    count, length = (4, 16) if place.small else (64, 512)
    rng = np.random.default_rng(0)
    vocab = 97 if place.small else 151_936
    rows = [
        {"id": f"{n:03d}", "input_ids": rng.integers(0, vocab, length).tolist()}
        for n in range(count + 1)
    ]
    # What a machine has is asked of it by running, not by a plan.
    how: dict[str, Any] = {"address": "none", "device": place.device, "force": True}
    dtype = "bfloat16" if place.mode == "bfloat16" else "float32"
    with TemporaryDirectory(dir=place.directory) as directory, tf32(place.mode == "tf32"):
        run = f"{directory}/run"
        chosen = raycurv.FitSettings(
            model=model, data=IN_MEMORY, out=run, method="ekfac", dtype=dtype, **how
        )
        watched = Watched(notes, "fit", device)
        began = time.perf_counter()
        fit(chosen, Inputs(data=rows[:count]), watched)
        watched.between()
        fitted = time.perf_counter() - began
        asked = raycurv.InfluenceSettings(
            run=run, queries=IN_MEMORY, train=IN_MEMORY, out=f"{directory}/scores", rank="full",
            **how,
        )  # fmt: skip
        watched = Watched(notes, "score", device)
        began = time.perf_counter()
        influence(asked, Inputs(queries=rows[count:], train=rows[:count]), watched)
        watched.between()
        scored = time.perf_counter() - began
        scores, _, columns = raycurv.open_scores(asked.out).matrix()
        assert scores.shape == (1, count) and np.isfinite(scores).all(), (
            "scores that are no numbers"
        )
        agreement = _agreement(scores[0, np.argsort(columns)], place)
        disk = sum(path.stat().st_size for path in Path(run).rglob("*") if path.is_file())
        table = raycurv.open(run).blocks()
    notes.row(
        "In all", mode=place.mode, layers=layers, blocks=len(table), examples=count, tokens=length,
        **{"fit, s": fitted, "score, s": scored, "run directory, GB": disk / 1e9},
        decomposed=", ".join(sorted(set(table["eigh_outcome"].to_pylist()))), **agreement,
        threads=torch.get_num_threads(),
    )  # fmt: skip


def _agreement(scores: np.ndarray, place: Place) -> dict[str, float]:
    """The correlation with the scores in float32 of the same model, where there are any."""
    of = Path(place.directory) / f"scores-{place.layers}-{{}}.npy"
    np.save(str(of).format(place.mode), scores)
    if place.mode == "float32" or not Path(str(of).format("float32")).exists():
        return {}
    exact = np.load(str(of).format("float32"))
    return {"Pearson with float32": float(np.corrcoef(scores, exact)[0, 1])}


def _qwen(layers: int, place: Place, notes: Notes) -> str:
    """A checkpoint of that shape, made once for all modes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = Path(place.directory) / f"qwen-{layers}"
    if folder.exists():
        return str(folder)
    notes.at("making the model")
    began = time.perf_counter()
    sizes: dict[str, Any] = {
        "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151_936, "max_position_embeddings": 32_768,
    }  # fmt: skip
    if place.small:
        sizes = {
            "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 64,
        }  # fmt: skip
    config = Qwen2Config(
        num_hidden_layers=layers, tie_word_embeddings=True, rms_norm_eps=1e-6,
        bos_token_id=None, eos_token_id=None, **sizes,
    )  # fmt: skip
    made = folder.with_suffix(f".{os.getpid()}")
    _saved(Qwen2ForCausalLM, config, made, torch.device(place.device))
    made.rename(folder)
    notes.row("The model", layers=layers, seconds=time.perf_counter() - began,
              GB=sum(path.stat().st_size for path in folder.iterdir()) / 1e9)  # fmt: skip
    return str(folder)


def _saved(kind: Any, config: Any, folder: Path, device: torch.device) -> str:
    """A checkpoint of random weights, made on the device."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    with device:
        model = kind(config)
    model.cpu().save_pretrained(folder)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return str(folder)
