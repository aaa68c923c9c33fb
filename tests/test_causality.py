"""Claims about what a next-token loss may be asked of: outputs that see no later token."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import raycurv
from raycurv.driver.causality import TOLERANCE
from raycurv.errors import UserError

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from tiny_families import tiny_config, tiny_model

VOCAB = 23
ROWS = [
    {"id": str(n), "input_ids": [(7 * t + 3 * n) % VOCAB for t in range(n)]} for n in (5, 9, 12)
]


class Averaging(nn.Module):
    """Every position gets a mean of the tokens so far, or of all."""

    def __init__(self, causal: bool, leak: float = 1.0) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB)
        self.causal, self.leak = causal, leak

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(inputs)
        so_far = x.cumsum(dim=1) / torch.arange(1, x.shape[1] + 1)[:, None]
        mean = so_far if self.causal else so_far + self.leak * x.mean(dim=1, keepdim=True)
        return self.head(mean)


def _averaging(causal: bool, leak: float = 1.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Averaging(causal, leak)


def _evaluated(model: Any, out: Path, **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"address": "none", "quiet": True, "batch_tokens": 24} | more
    raycurv.evaluate(model, ROWS, out, **given)
    facts: dict[str, Any] = json.loads((out / "run.json").read_text())["facts"]
    return facts


HOW: dict[str, dict[str, Any]] = {
    "one stage": {},
    "two stages": {"stages": 2},
    "swept": {"stages": 2, "schedule": "swept"},
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("encoder")
    tiny_model(tiny_config("electra", vocab_size=VOCAB)).save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    return folder


def _say(folder: Path, **change: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize("how", HOW)
def test_attention_to_later_tokens_is_refused(encoder: Path, tmp_path: Path, how: str) -> None:
    _say(encoder, architectures=["ElectraForCausalLM"], is_decoder=False)
    with pytest.raises(UserError, match=r"do not change with later tokens.*is_decoder"):
        _evaluated(str(encoder), tmp_path / "out", **HOW[how])
    # Allowed by name, nothing is recorded of it.
    assert "causality" not in _evaluated(
        str(encoder), tmp_path / "out", check_causality=False, **HOW[how]
    )
    # The same weights as a decoder see no later token.
    _say(encoder, is_decoder=True)
    facts = _evaluated(str(encoder), tmp_path / "decoder", **HOW[how])
    assert facts["causality"]["difference"] <= 1e-6 < facts["causality"]["tolerance"]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_network_of_ones_own_is_tried_in_every_dtype(tmp_path: Path, dtype: str) -> None:
    facts = _evaluated(lambda: _averaging(True), tmp_path / "causal", dtype=dtype)
    assert facts["causality"]["tolerance"] == TOLERANCE[getattr(torch, dtype)]
    with pytest.raises(UserError, match="the loss sees its target"):
        _evaluated(lambda: _averaging(False), tmp_path / "both", dtype=dtype)


def test_a_small_leak_is_seen(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="later tokens"):
        _evaluated(lambda: _averaging(False, leak=1e-2), tmp_path / "leak")


def test_fits_and_scorings_try_it_too(tmp_path: Path) -> None:
    given: dict[str, Any] = {"address": "none", "quiet": True, "blocks": ["head"]}
    with pytest.raises(UserError, match="later tokens"):
        raycurv.fit(lambda: _averaging(False), ROWS, out=tmp_path / "run", **given)
    given["check_causality"] = False
    run = raycurv.fit(lambda: _averaging(False), ROWS, out=tmp_path / "run", **given)
    scoring: dict[str, Any] = {"address": "none", "quiet": True}
    with pytest.raises(UserError, match="later tokens"):
        run.influence(ROWS[:1], ROWS, out=tmp_path / "scores", **scoring)
    run.influence(ROWS[:1], ROWS, out=tmp_path / "scores", check_causality=False, **scoring)


class Squares:
    """A loss of each position that may look at all of the tokens."""

    per_token = True

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return outputs.float().square().mean(dim=2).sum(dim=1)

    def sample(self, outputs: Tensor, batch: Any, uniform: Any) -> Tensor:
        raise AssertionError("an evaluation draws nothing")


def test_an_objective_that_says_nothing_of_causality_may_look_ahead(tmp_path: Path) -> None:
    facts = _evaluated(
        lambda: _averaging(False), tmp_path / "out", objective=Squares(), batch_tokens=1
    )
    assert "causality" not in facts
    told = Squares()
    told.causal = True  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="later tokens"):
        _evaluated(lambda: _averaging(False), tmp_path / "told", objective=told)
