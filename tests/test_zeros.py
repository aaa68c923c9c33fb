"""Weights that are zero before a pruning stay zero, count as removed, and are told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import classified, classifier, flags_of, run_here, save_llama, texts, write_rows
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import raycurv
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.pruning.masks import kept_of
from raycurv.pruned import Pruned

HERE: dict[str, Any] = {"address": "none", "quiet": True}
FIT: dict[str, Any] = HERE | {"objective": "classification", "dtype": "float64", "batch_tokens": 4}
ROWS = classified(11)
# Weights of the classifier without biases, and how many of them are zero in the sparse one.
WEIGHTS, ZEROS = 95, 66


def sparse() -> nn.Module:
    """The classifier with 66 of its 95 weights at zero; two outputs of the first layer are zero
    throughout, one of them with its bias."""
    network = classifier()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        layers = [network[i].weight for i in (0, 2, 4)]
        layers[0][1:3] = 0.0
        network[0].bias[1] = 0.0
        # Of a living output: no weight that a pruning counts.
        network[0].bias[4] = 0.0
        flat = torch.cat([w.flatten() for w in layers])
        left = flat.nonzero()[:, 0]
        order = left[torch.randperm(len(left), generator=generator)]
        flat[order[: ZEROS - int((flat == 0).sum())]] = 0.0
        for layer, part in zip(layers, flat.split([w.numel() for w in layers]), strict=True):
            layer.copy_(part.view_as(layer))
    return network


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, raycurv.Run]:
    folder = tmp_path_factory.mktemp("zeros")
    more = {"mfac": {"rows": 4}}
    found = {
        method: raycurv.fit(
            sparse, ROWS, folder / method, method=method, gradients=True, **more.get(method, {}),
            **FIT,
        )
        for method in ("ekfac", "mfac", "identity")
    }  # fmt: skip
    found["dense"] = raycurv.fit(classifier, ROWS, folder / "dense", **FIT)
    return found


def matrices(network: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: w for name, w in network.items() if w.ndim == 2}


def weights_of(pruned: Pruned) -> dict[str, Tensor]:
    return load_file(Path(pruned.model) / "model.safetensors")


def revived(before: dict[str, Tensor], after: dict[str, Tensor]) -> int:
    """How many weights were zero and are no more."""
    pairs = [(w, after[name]) for name, w in matrices(before).items()]
    return sum(int(((w == 0) & (new != 0)).sum()) for w, new in pairs)


HOW: dict[str, dict[str, Any]] = {
    "obs": {},
    "obd": {"saliency": "obd"},
    "magnitude": {"saliency": "magnitude"},
    "no update": {"no_update": True},
    "each block": {"scope": "block"},
    "first order": {"first_order": True},
    "rows": {"structure": "rows", "sparsity": 0.4},
    "rows of each": {"structure": "rows", "scope": "block", "sparsity": 0.2},
    "steps": {"steps": 2, "sparsity": 0.85},
    "steps of each": {"steps": 2, "sparsity": 0.85, "scope": "block"},
    "runs of two": {"structure": "1:2", "blocks": ["4"]},
}
CASES = [("ekfac", how) for how in HOW] + [("identity", "magnitude")]
CASES += [("mfac", how) for how in ("obs", "each block", "first order", "rows", "runs of two")]


@pytest.mark.parametrize(("method", "how"), CASES)
def test_what_was_zero_stays_zero_and_is_counted(
    runs: dict[str, raycurv.Run], method: str, how: str, tmp_path: Path
) -> None:
    settings = {"sparsity": 0.8, "measure": "none"} | HOW[how]
    if ":" in settings.get("structure", ""):
        del settings["sparsity"]
    pruned = runs[method].prune(tmp_path / "out", **settings, **HERE)
    before, after = sparse().state_dict(), weights_of(pruned)
    assert revived(before, after) == 0
    table = pruned.blocks().to_pylist()
    for row in table:
        name = f"{row['block']}.weight"
        was, now = before[name] == 0, after[name] == 0
        assert row["zero_before"] == int(was.sum()) and row["removed"] == int(now.sum())
        said = pruned.saliency(row["block"])
        assert torch.equal(torch.tensor(said["keep"].to_pylist()), ~now)
    facts = pruned.manifest.facts
    assert facts["zero_before"] == sum(row["zero_before"] for row in table)
    assert facts["removed"] == sum(row["removed"] for row in table)
    if how in ("obs", "obd", "magnitude", "no update", "first order"):
        assert facts["zero_before"] == ZEROS and facts["removed"] == int(0.8 * WEIGHTS)
    if how == "steps":
        first, last = (sum(b["removed"] for b in step["blocks"]) for step in facts["steps"])
        # The same share of what is left in both: from 29 of 95 to their geometric mean with 15 %.
        left = (WEIGHTS - ZEROS) / WEIGHTS
        assert first == int(WEIGHTS * (1 - (left * 0.15) ** 0.5)) > ZEROS
        assert last == int(0.85 * WEIGHTS)
    if how == "runs of two":
        assert ((after["4.weight"].view(-1, 2) == 0).sum(dim=1) >= 1).all()
    # An output that is gone as a whole gets no bias from the others' step.
    assert float(after["0.bias"][1]) == 0.0


def test_with_revive_zeros_are_weights_as_any_others(
    runs: dict[str, raycurv.Run], tmp_path: Path
) -> None:
    pruned = runs["ekfac"].prune(
        tmp_path / "out", structure="1:2", blocks=["4"], revive=True, measure="none", **HERE
    )
    assert revived(sparse().state_dict(), weights_of(pruned)) > 0
    assert pruned.sparsity == 0.5 and pruned.manifest.facts["zero_before"] == 0


@pytest.mark.parametrize("settings", [{"sparsity": 0.6}, {"structure": "rows"}, {"steps": 2}])
def test_a_model_without_zeros_is_pruned_as_ever(
    settings: dict[str, Any], runs: dict[str, raycurv.Run], tmp_path: Path
) -> None:
    plain, other = (
        runs["dense"].prune(tmp_path / name, revive=name == "revive", **settings, **HERE)
        for name in ("plain", "revive")
    )
    for name, tensor in weights_of(plain).items():
        assert torch.equal(tensor, weights_of(other)[name])
    assert plain.predicted == other.predicted and plain.manifest.facts["zero_before"] == 0


def test_the_job_says_how_many_were_zero_and_how_many_were_removed(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.parquet", ROWS)
    raycurv.fit("test_zeros:sparse", data, tmp_path / "run", **FIT)
    flags = {"run": tmp_path / "run", "model": "test_zeros:sparse", "address": "none"}
    outcome = run_here("prune.py", flags_of(flags | {"out": tmp_path / "less", "sparsity": 0.5}))
    assert outcome.code == 0, outcome.err
    assert "69.5% of 95 weights are zero: 66 were before and stay so, no more" in outcome.err
    assert "50.0%" not in outcome.err and "weights removed" not in outcome.err
    outcome = run_here("prune.py", flags_of(flags | {"out": tmp_path / "more", "sparsity": 0.9}))
    assert (
        "89.5% of 95 weights are zero: 66 were before and stay so, 19 were removed" in outcome.err
    )
    said = json.loads(outcome.out.splitlines()[-1])
    assert (said["zero_before"], said["removed"], said["sparsity"]) == (66, 85, 85 / 95)


def test_zeros_stay_in_heads_and_in_runs_of_a_checkpoint(tmp_path: Path) -> None:
    save_llama(tmp_path / "model", layers=1)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(0)
    for name, weight in tensors.items():
        if "proj" in name:
            weight[torch.rand(weight.shape, generator=generator) < 0.7] = 0.0
    save_file(tensors, file, {"format": "pt"})
    rows = write_rows(tmp_path / "texts.parquet", texts(6))
    run = raycurv.fit(tmp_path / "model", rows, tmp_path / "run", batch_tokens=64, **HERE)
    for structure in ("heads", "2:4"):
        pruned = run.prune(tmp_path / structure, structure=structure, measure="none", **HERE)
        assert revived(tensors, weights_of(pruned)) == 0
        assert pruned.sparsity > 0.7, "the share of zeros is said, not the pattern's"
        if structure == "2:4":
            for name, weight in weights_of(pruned).items():
                if "proj" in name:
                    assert ((weight.view(-1, 4) == 0).sum(dim=1) >= 2).all()
        else:
            kept = pruned.heads()["keep"].to_pylist()
            assert len(kept) == 2 * sum(kept), "half of the heads went"
    free = run.prune(tmp_path / "free", structure="2:4", measure="none", revive=True, **HERE)
    assert free.sparsity == 0.5 and revived(tensors, weights_of(free)) > 0


def test_a_bias_goes_with_a_whole_output_alone() -> None:
    w = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 1.0, 0.0], [3.0, 1.0, 1.0]])
    keep = kept_of(Block("b", "b", 3, 4, True), w)
    assert keep.tolist() == [
        [False] * 3, [False, False, True], [False, True, True], [True] * 3
    ]  # fmt: skip
    assert kept_of(Block("b", "b", 3, 4, False), w).tolist() == (w != 0).tolist()
