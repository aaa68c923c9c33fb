"""Claims about what blocks leave out: it is said, and of layers it is left out by name alone."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import raycurv
from raycurv.errors import UserError
from raycurv.mathematics.choice import choose_blocks
from raycurv.mathematics.coverage import coverage
from raycurv.models.opening import open_model

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from tiny_families import tiny_config, tiny_model


def _opened(folder: Path, kind: str) -> Any:
    transformers.utils.logging.disable_progress_bar()
    tiny_model(tiny_config(kind)).save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    return open_model(str(folder))


def _chosen(model: Any, *globs: str) -> Any:
    return choose_blocks(model.skeleton(), globs, model.default_scope, model.tied_head)


def _flags(error: UserError) -> list[str]:
    return re.findall(r"--blocks '([^']+)'", error.remedy)


# What stands in the decoder's layers beside linear ones.
IN_LAYERS = {
    "mamba": ["!backbone.layers.*.mixer.A_log"],
}


@pytest.mark.parametrize("kind", IN_LAYERS)
def test_what_has_no_block_in_a_layer_is_left_out_by_name_alone(tmp_path: Path, kind: str) -> None:
    model = _opened(tmp_path / "model", kind)
    with pytest.raises(UserError) as caught:
        _chosen(model)
    assert _flags(caught.value) == IN_LAYERS[kind]
    blocks = _chosen(model, *IN_LAYERS[kind])
    found = coverage(model.skeleton(), blocks, model.idle)
    for glob in IN_LAYERS[kind]:
        assert any(name.startswith(glob[1:]) for name in found.matrices)


def test_experts_and_routers_are_covered(tmp_path: Path) -> None:
    model = _opened(tmp_path / "model", "llama4")
    blocks = _chosen(model)
    layers = model.skeleton().model.layers
    assert coverage(model.skeleton(), blocks, model.idle).covered == sum(
        p.numel() for p in layers.parameters() if p.ndim > 1
    )
    # Control: of one expert less, its three matrices are left out.
    fewer = coverage(model.skeleton(), _chosen(model, "!*.1.*.experts.*.2"), model.idle)
    assert fewer.matrices["model.layers.*.feed_forward.experts.down_proj"] == 48 * 32
    assert fewer.matrices["model.layers.*.feed_forward.experts.gate_up_proj"] == 32 * 96


def test_a_matrix_beside_those_of_a_known_kind_is_named() -> None:
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.beside = nn.Parameter(torch.randn(3, 2))

    with pytest.raises(UserError, match=r"0\.beside \(Adapted\)"):
        choose_blocks(nn.Sequential(Adapted()), ())


def test_every_parameter_is_counted_once(tmp_path: Path) -> None:
    model = _opened(tmp_path / "model", "gemma3")
    found = coverage(model.skeleton(), _chosen(model), model.idle)
    every = sum(p.numel() for p in model.skeleton().parameters())
    assert found.trainable + sum(found.not_run.values()) == every
    assert found.not_run.keys() == {"model.vision_tower", "model.multi_modal_projector"}
    assert found.matrices.keys() == {"model.language_model.embed_tokens.weight"}
    assert "model.vision_tower" in model.notices[-1]
    # Without a block, its weight is among what is left out.
    fewer = coverage(model.skeleton(), _chosen(model, "!*.down_proj"), model.idle)
    assert fewer.covered < found.covered and fewer.trainable == found.trainable
    assert "model.language_model.layers.*.mlp.down_proj.weight" in fewer.matrices


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(4, 3))
        self.weights = nn.Parameter(torch.randn(4, 3, 3))
        self.out = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = (x @ self.gate.T).softmax(dim=-1)
        mixed = torch.einsum("ne,eij,nj->ni", gates, self.weights, x)
        return self.out(mixed)


def _network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential()
        network.add_module("first", nn.Linear(3, 3))
        network.add_module("layers", nn.Sequential(Experts(), Experts()))
        network.add_module("last", nn.Linear(3, 3))
        network.last.weight = network.first.weight
        return network


def test_one_message_names_all_that_has_to_be_left_out(tmp_path: Path) -> None:
    rows = [{"inputs": [1.0, n, -n], "labels": [0.0, 1.0, n]} for n in (0.0, 1.0, 2.0)]
    given: dict[str, Any] = {
        "objective": "regression", "out": tmp_path / "run", "address": "none", "quiet": True,
    }  # fmt: skip
    with pytest.raises(UserError, match="and 3 more") as caught:
        raycurv.fit(_network, rows, **given)
    flags = _flags(caught.value)
    assert flags == ["!layers.*.gate", "!layers.*.weights"]
    # And with these flags it is done.
    run = raycurv.fit(_network, rows, blocks=flags, **given)
    shared = ["first", "first.bias", "last.bias"]
    assert run.blocks()["block"].to_pylist() == [*shared, "layers.0.out", "layers.1.out"]
    said = json.loads((tmp_path / "run" / "run.json").read_text())["facts"]["coverage"]
    assert said["covered"] == 24 + 9 + 6 and said["trainable"] == 24 + 9 + 6 + 24 + 72
    assert said["left_out"] == {"layers.*.gate": 24, "layers.*.weights": 72}


def _half_frozen() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    network[0].bias.requires_grad_(False)
    return network


def test_a_frozen_bias_adds_nothing_to_scores(tmp_path: Path) -> None:
    rows = [{"inputs": [1.0, n, -n], "labels": [0.0, 1.0, n]} for n in (0.0, 1.0, 2.0)]
    how: dict[str, Any] = {"address": "none", "quiet": True}
    fit = {"objective": "regression", "dtype": "float64", "fisher": "empirical"} | how

    def scored(folder: Path, **settings: Any) -> torch.Tensor:
        run = raycurv.fit(_half_frozen, rows, folder / "run", method="identity", **fit, **settings)
        scores = run.influence(rows, rows, folder / "scores", damping="abs:1", rank="full", **how)
        return torch.as_tensor(scores.matrix()[0])

    network, gradients = _half_frozen().double(), []
    trained = [p for p in network.parameters() if p.requires_grad]
    assert len(trained) == 3
    for row in rows:
        out, labels = (torch.tensor(row[k], dtype=torch.float64) for k in ("inputs", "labels"))
        loss = 0.5 * (network(out) - labels).square().sum()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]))
    g = torch.stack(gradients)
    found = scored(tmp_path)
    assert torch.allclose(found / found[0, 0], g @ g.T / (g[0] @ g[0]), rtol=1e-12)
    # A run of before, which took the bias for a column, is read and goes on as it was.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raycurv.mathematics.choice.trained_part", lambda block, *_: block)
        before = scored(tmp_path / "before", gradients=True)
    assert not torch.allclose(before, found)
    shutil.rmtree(tmp_path / "before" / "scores")
    (tmp_path / "before" / "run" / "gradients" / "0.safetensors").unlink()
    assert torch.equal(scored(tmp_path / "before", gradients=True), before)


def test_flags_do_not_leave_out_what_has_a_block() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Embedding(3, 3), nn.Linear(3, 3)])

    with pytest.raises(UserError) as caught:
        choose_blocks(Mixed(), ())
    assert _flags(caught.value) == ["!layers.0"]
    assert [b.name for b in choose_blocks(Mixed(), ("!layers.0",))] == ["layers.1"]
