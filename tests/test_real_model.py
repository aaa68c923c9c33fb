"""A real pretrained model, where it can be had: an ALBERT, whose one layer is used 12 times."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForMaskedLM

import raycurv

sys.path.append(str(Path(__file__).parents[1] / "demo"))
from wheels import NotReached, unpacked

FILES = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"
CACHE = Path("~/.cache/raycurv-wheels").expanduser()


@pytest.fixture(scope="module")
def albert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a directory of safetensors."""
    try:
        source = unpacked("rxnmapper", "0.4.3", CACHE, tries=0) / FILES
    except NotReached as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("albert")
    weights = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    # The head's weight is the embedding's.
    shared = {"predictions.decoder.weight", "predictions.decoder.bias"}
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items() if name not in shared},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def rows(count: int = 6) -> list[dict[str, Any]]:
    """Token ids of several lengths, of which some are hidden (by token 14, say)."""
    rng = np.random.default_rng(0)
    found = []
    for n in range(count):
        ids = rng.integers(20, 590, size=5 + 3 * n)
        hidden = rng.random(len(ids)) < 0.3
        hidden[1] = True
        labels, given = np.where(hidden, ids, -100), np.where(hidden, 14, ids)
        found.append({"id": str(n), "input_ids": given.tolist(), "labels": labels.tolist()})
    return found


def test_traces_of_a_layer_that_is_used_twelve_times_are_autograds(
    albert: Path, tmp_path: Path
) -> None:
    run = raycurv.fit(
        albert, rows(), tmp_path / "run", fisher="empirical", dtype="float64", address="none",
        quiet=True,
    )  # fmt: skip
    # It is saved with the pooler of its pretraining, which a masked language model has not.
    (note,) = (one for one in run.manifest.facts["model_notes"] if "albert.pooler" in one)
    assert "pretraining" in note
    network: nn.Module = AutoModelForMaskedLM.from_pretrained(albert, dtype=torch.float64).eval()
    blocks = run.blocks().to_pylist()
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0."
    assert sum(block["block"].startswith(layer) for block in blocks) == 6
    want = dict.fromkeys((block["block"] for block in blocks), 0.0)
    losses = []
    for row in rows():
        network.zero_grad()
        logits = network(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        loss = nn.functional.cross_entropy(logits, torch.tensor(row["labels"]), reduction="sum")
        loss.backward()
        losses.append(loss.item())
        for name in want:
            for parameter in network.get_submodule(name).parameters():
                want[name] += float(parameter.grad.square().sum()) / len(rows())
    for block in blocks:
        assert block["trace"] == pytest.approx(want[block["block"]], rel=1e-9)
    assert run.examples()["loss"].to_pylist() == pytest.approx(losses, rel=1e-10)
    # Control: all twelve uses enter.
    tokens = sum(len(row["input_ids"]) for row in rows())
    used = {b["block"].removeprefix(layer): b["tokens"] for b in blocks if layer in b["block"]}
    assert set(used.values()) == {12 * tokens}, used
