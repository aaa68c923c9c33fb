"""Losses on slices of positions, objectives of the user's own, and examples without a loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from dense import uniform, worst
from networks import LLAMA, LLAMA_4, MIXER, MLP, VOCAB, Case, sentences
from test_corrected import recorded_labels
from test_scores import by_id, own_scores
from torch import Tensor

import raycurv
from raycurv.batch import Batch
from raycurv.mathematics.loss.differentiation import differentiate

EXACT = 1e-10  # float64; slices add up in another order


def numbers(table: Any, column: str) -> Tensor:
    return torch.tensor(table[column].to_pylist(), dtype=torch.float64)


@pytest.mark.parametrize("positions", [1, 2, 3, 7])
@pytest.mark.parametrize("target", ["sampled", "labels", "measurement", "nothing"])
def test_slices_of_positions_give_what_the_whole_gives(target: Any, positions: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(VOCAB, 5, dtype=torch.float64)
    hidden = torch.randn(3, 7, 5, dtype=torch.float64)
    lengths = torch.tensor([7, 4, 1])
    batch = Batch(
        0, ("a", "b", "c"), torch.randint(VOCAB, (3, 7)),
        mask=torch.arange(7) < lengths[:, None], loss_mask=torch.arange(7).expand(3, 7) != 2,
    )  # fmt: skip
    starts: list[int] = []

    def head(part: Tensor, start: int) -> Tensor:
        starts.append(start)
        return part @ weight.T

    def run(count: int) -> Any:
        starts.clear()
        return differentiate(
            raycurv.CausalLM(), head, hidden, batch, target, 2, 0, count, lambda draw: None
        )

    whole, sliced = run(100), run(positions)
    assert starts == list(range(0, 7, positions))
    assert ("loss" in whole.results) == (target != "measurement")
    if "loss" in whole.results:
        loss = whole.results["loss"]
        assert worst(sliced.results["loss"], loss) < EXACT
        assert float(loss[2]) == 0.0 and float(loss[0]) > 0
    for got, want in zip(sliced.gradients, whole.gradients, strict=True):
        assert worst(got, want) < EXACT
        assert not want[2].any() and not want[1, 3:].any() and want[0].any()
        assert not want[:, 1].any(), "position 1 predicts token 2, which is no target"
    assert len(whole.gradients) == {"sampled": 2, "nothing": 0}.get(target, 1)
    if target == "sampled":
        assert torch.equal(sliced.results["drawn"], whole.results["drawn"])


@pytest.mark.parametrize("case", [LLAMA_4, MIXER], ids=lambda case: case.name)
def test_a_small_logits_chunk_gives_the_same_run(fits, case: Case) -> None:
    whole, sliced = fits.run(case), fits.run(case, logits_chunk=3 * VOCAB)
    for column in ("loss", "gradient_sq_norm"):
        got, want = (numbers(r.examples(), column) for r in (sliced, whole))
        assert worst(got, want) < EXACT
    for a, b in zip(recorded_labels(sliced), recorded_labels(whole), strict=True):
        assert np.array_equal(a, b)
    for got, want in zip(*(r.blocks()["trace"].to_pylist() for r in (sliced, whole)), strict=True):
        assert abs(got - want) < EXACT * want


# Objectives of the user's own


class Scaled:
    """Regression with a variance of its own, whose measurement is the first output."""

    per_token = False

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        assert batch.labels is not None
        return 2.0 * (batch.labels.to(outputs.dtype) - outputs).square().sum(dim=1)

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        return outputs[:, 0]

    def sample(self, outputs: Tensor, batch: Batch, uniform: Any) -> Tensor:
        return outputs + 0.5 * torch.special.ndtri(uniform(outputs.shape[1]))


class Tempered(raycurv.CausalLM):
    """Cross-entropy at another temperature, with one draw among classes by a Gumbel each."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return super().loss(outputs / 2, batch)

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        counts = batch.loss_mask
        assert counts is not None
        return torch.where(counts, outputs[:, :, 0], 0.0).sum(dim=1)

    def sample(self, outputs: Tensor, batch: Batch, uniform: Any) -> Tensor:
        gumbel = -(-uniform(outputs.shape[2]).log()).log()
        return (outputs / 2 + gumbel).argmax(dim=2)


def fitted(fits: Any, case: Case, objective: Any, place: str, **settings: Any) -> Any:
    own = {"address": "none", "dtype": "float64", "batch_tokens": case.batch_tokens}
    return raycurv.fit(
        fits.source(case), list(case.data), place, objective=objective, quiet=True,
        **own, **case.settings, **settings,
    )  # fmt: skip


def check_objective(
    fits: Any, case: Case, objective: Any, tmp_path: Any, loss: Any, measurement: Any, sample: Any
) -> None:
    """Trace, labels and scores of a custom objective against autograd of its plain twin."""
    run = fitted(fits, case, objective, str(tmp_path / "run"))
    network = case.network().double().requires_grad_(True)
    modules = {name: network.get_submodule(name) for name in run.block_names()}

    def gradient(value: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, module in modules.items():
            parameters = [p for p in (module.weight, module.bias) if p is not None]
            w, *b = torch.autograd.grad(
                value, parameters, retain_graph=True, materialize_grads=True
            )
            found[name] = torch.cat([w, *(x[:, None] for x in b)], dim=1)
        return found

    def outputs(row: dict[str, Any]) -> Tensor:
        if "input_ids" in row:
            return network(torch.tensor([row["input_ids"]]))[0]
        return network(torch.tensor([row["inputs"]], dtype=torch.float64))[0]

    drawn, own, asked = [], [], []
    for n, row in enumerate(case.data):
        f = outputs(row)
        y = sample(f.detach(), row["id"])
        got = torch.as_tensor(recorded_labels(run)[n][0])
        assert worst(got[-len(y) :], y) < 1e-12
        drawn.append(gradient(loss(f, y)))
        own.append(gradient(loss(f, torch.tensor(row.get("labels", row.get("input_ids", [])[1:])))))
        asked.append(gradient(measurement(f)))
    for row in run.blocks().to_pylist():
        want = sum(float((g[row["block"]] ** 2).sum()) for g in drawn) / len(drawn)
        assert abs(row["trace"] - want) < EXACT * want
    scores = run.influence(
        list(case.queries), list(case.data), str(tmp_path / "scores"), quiet=True, address="none",
        rank="full",
    )  # fmt: skip
    want = torch.zeros(len(case.queries), len(case.data), dtype=torch.float64)
    for name in run.block_names():
        block = run.curvature(name)
        matrix = block.dense()
        damped = matrix + 0.1 * matrix.diag().mean() * torch.eye(len(matrix), dtype=torch.float64)
        left = torch.stack([g[name].flatten() for g in asked[: len(case.queries)]])
        right = torch.stack([g[name].flatten() for g in own])
        want += left @ torch.linalg.solve(damped, right.T)
    assert worst(by_id(scores, case), want) < 1e-9


def test_an_objective_of_ones_own_on_whole_examples(fits, tmp_path) -> None:
    def sample(f: Tensor, name: str) -> Tensor:
        u = torch.tensor([uniform(0, name, 0, 0, k) for k in range(len(f))], dtype=torch.float64)
        return f + 0.5 * torch.special.ndtri(u)

    case = replace(MLP, data=tuple({**r, "labels": [0.5, -1.0, 2.0]} for r in MLP.data))
    check_objective(
        fits, case, Scaled(), tmp_path,
        loss=lambda f, y: 2 * ((y - f) ** 2).sum(), measurement=lambda f: f[0], sample=sample,
    )  # fmt: skip


def test_an_objective_of_ones_own_on_tokens(fits, tmp_path) -> None:
    def sample(f: Tensor, name: str) -> Tensor:
        found = []
        for t in range(1, len(f)):
            u = torch.tensor([uniform(0, name, t, 0, k) for k in range(VOCAB)], dtype=torch.float64)
            found.append(int((f[t - 1] / 2 - (-u.log()).log()).argmax()))
        return torch.tensor(found)

    def loss(f: Tensor, y: Tensor) -> Tensor:
        log_p = (f / 2).log_softmax(dim=1)
        return sum((-log_p[t, int(v)] for t, v in enumerate(y)), 0.0 * f.sum())

    case = replace(MIXER, data=tuple(r for r in MIXER.data if len(r["input_ids"]) > 1))
    check_objective(
        fits, case, Tempered(), tmp_path,
        loss=loss, measurement=lambda f: f[:-1, 0].sum(), sample=sample,
    )  # fmt: skip


class Whole(raycurv.CausalLM):
    """A causal language model's loss without slices: one call on whole examples."""

    per_token = False

    def _own(self, batch: Batch) -> Batch:
        assert batch.mask is not None
        labels = batch.inputs if batch.labels is None else batch.labels
        counts = batch.mask if batch.loss_mask is None else batch.mask & batch.loss_mask
        return replace(batch, labels=labels[:, 1:], loss_mask=counts[:, 1:])

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return super().loss(outputs[:, :-1], self._own(batch))


def test_a_whole_token_objective_fits_as_the_sliced_one(fits, tmp_path) -> None:
    # Empirical: the counter numbers whole examples and positions differently.
    settings = {"fisher": "empirical"}
    run = fitted(fits, MIXER, Whole(), str(tmp_path), **settings)
    got, want = (numbers(r.blocks(), "trace") for r in (run, fits.run(MIXER, **settings)))
    assert worst(got, want) < EXACT


@pytest.mark.parametrize("case", [LLAMA, MIXER], ids=lambda case: case.name)
def test_an_example_of_one_token_has_loss_norm_and_scores_of_zero(fits, case: Case) -> None:
    (lone,) = [n for n, row in enumerate(case.data) if len(row["input_ids"]) == 1]
    row = fits.run(case).examples().to_pylist()[lone]
    assert (row["tokens"], row["loss"], row["gradient_sq_norm"]) == (1, 0.0, 0.0)
    scores = fits.scores(case, self_influence=True, per_block=True)
    matrix = by_id(scores, case)
    assert not matrix[:, lone].any()
    assert float(own_scores(scores, case)[lone]) == 0.0
    others = [n for n in range(len(case.data)) if n != lone]
    assert (matrix[:, others] != 0).all()


def test_an_example_of_one_token_changes_nothing_for_the_others(fits) -> None:
    rows = sentences((5, 2, 7, 4), False)
    lone = {"id": "lone", "input_ids": [3]}
    one = replace(MIXER, name="without", data=rows, batch_tokens=100)
    # In one microbatch with the others, and in one of its own.
    for batch_tokens in (100, 1):
        other = replace(MIXER, name="with", data=(*rows, lone), batch_tokens=batch_tokens)
        a, b = fits.run(one), fits.run(other)
        for column in ("loss", "gradient_sq_norm"):
            got, want = b.examples()[column].to_pylist(), a.examples()[column].to_pylist()
            assert got[-1] == 0.0
            assert np.allclose(got[:-1], want, rtol=EXACT, atol=0)
        for got, want in zip(recorded_labels(b)[:-1], recorded_labels(a), strict=True):
            assert np.array_equal(got, want)
        # A mean over one example more.
        for x, y in zip(a.blocks().to_pylist(), b.blocks().to_pylist(), strict=True):
            assert abs(x["trace"] * len(rows) - y["trace"] * (len(rows) + 1)) < EXACT * x["trace"]
            assert y["tokens"] == x["tokens"] + 1, "its token is an input all the same"
