"""Losses on slices of positions, objectives of the user's own, and examples without a loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from dense import matrix_of, solve, uniform, worst
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


# What queries are measured by


class LogitDifference:
    """How much more likely the right answer is than the wrong one, behind a prompt's last token."""

    per_token = True
    columns = ("right", "wrong")

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        logits, here = batch.at_last(outputs)
        n = torch.arange(batch.size)
        right, wrong = batch.columns["right"], batch.columns["wrong"]
        return torch.where(here, logits[n, right] - logits[n, wrong], 0.0)


class WholeDifference(LogitDifference):
    """The same of whole outputs."""

    per_token = False

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        assert batch.start == 0 and outputs.shape[1] == batch.inputs.shape[1]
        return super().measurement(outputs, batch)


class NamedDifference:
    """The same, the answers being text."""

    per_token = True
    columns = ("answers",)

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        logits, here = batch.at_last(outputs)
        pairs = torch.tensor(
            [[int(n) for n in text.split("|")] for text in batch.columns["answers"]]
        )
        chosen = logits.gather(1, pairs)
        return torch.where(here, chosen[:, 0] - chosen[:, 1], 0.0)


class LogOdds:
    """The log-odds of a class that the query names."""

    columns = ("favoured",)

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        log_p = outputs.log_softmax(dim=1)[torch.arange(batch.size), batch.columns["favoured"]]
        return log_p - torch.log1p(-log_p.exp())


class PerPosition(LogitDifference):
    """A measurement that forgets to add up."""

    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        return outputs.sum(dim=2)


class Infinite(LogitDifference):
    def measurement(self, outputs: Tensor, batch: Batch) -> Tensor:
        return super().measurement(outputs, batch) / 0.0


class Nothing:
    columns = ("right",)


class Reserved(LogitDifference):
    columns = ("labels",)


# Prompts of several lengths, one of them a token alone, in microbatches with padding.
PROMPTS = tuple(
    {"id": f"prompt {n}", "input_ids": row["input_ids"], "right": 3 + n, "wrong": 11 - n,
     "answers": f"{3 + n}|{11 - n}"}
    for n, row in enumerate(sentences((6, 1, 3, 7), False, seed=5))
)  # fmt: skip
FAVOURED = tuple({"id": f"asks {n}", "inputs": MLP.data[n]["inputs"], "favoured": (2 - n) % 3}
                 for n in range(4))  # fmt: skip


def dense_scores(fits: Any, case: Case, measured: Any, queries: Any) -> Tensor:
    """``∇mᵀ (F + λ)⁻¹ ∇L``, summed over blocks, from autograd and dense matrices."""
    run, truth = fits.run(case), fits.truth(case)
    found = torch.zeros(len(queries), len(case.data), dtype=torch.float64)
    for name, module in truth.blocks(run.block_names()).items():
        curvature = run.curvature(name).dense()
        damping = 0.1 * float(curvature.diag().mean())
        weights = [module.weight] + ([] if module.bias is None else [module.bias])
        for q, row in enumerate(queries):
            own, *bias = torch.autograd.grad(
                measured(truth.outputs(row), row), weights, materialize_grads=True
            )
            asked = solve(curvature, damping, matrix_of(module, own, bias[0] if bias else None))
            for n, gradients in enumerate(truth.own_gradients):
                found[q, n] += (asked * gradients[name]).sum()
    return found


def measured_by(
    fits: Any, case: Case, queries: Any, objective: Any, place: Any, **settings: Any
) -> Any:
    how = {"address": "none", "rank": "full", "batch_tokens": 14, "quiet": True} | settings
    return fits.run(case).influence(
        list(queries), list(case.data), str(place), objective=objective, **how
    )


def matrix(scores: Any, queries: Any, case: Case) -> Tensor:
    values, asked, trained = scores.matrix()
    q = [asked.index(row["id"]) for row in queries]
    n = [trained.index(row["id"]) for row in case.data]
    return torch.from_numpy(values)[q][:, n]


def difference(outputs: Tensor, row: dict[str, Any]) -> Tensor:
    return outputs[-1, row["right"]] - outputs[-1, row["wrong"]]


def log_odds(outputs: Tensor, row: dict[str, Any]) -> Tensor:
    p = outputs.softmax(dim=0)[row["favoured"]]
    return (p / (1 - p)).log()


def test_queries_are_measured_by_a_function_of_ones_own(fits, tmp_path) -> None:
    want = dense_scores(fits, LLAMA, difference, PROMPTS)
    ways = {
        "whole slices": (LogitDifference(), {}),
        "a position at a time": (LogitDifference(), {"logits_chunk": 1, "stages": 2}),
        "two at a time, swept": (
            LogitDifference(), {"logits_chunk": 4 * VOCAB, "schedule": "swept", "stages": 2},
        ),
        "whole outputs": (WholeDifference(), {"logits_chunk": 1}),
        "by name": ("test_objectives:LogitDifference", {"query_memory": 1}),
        "answers as text": (NamedDifference(), {}),
    }  # fmt: skip
    for name, (objective, settings) in ways.items():
        scores = measured_by(fits, LLAMA, PROMPTS, objective, tmp_path / name, **settings)
        assert worst(matrix(scores, PROMPTS, LLAMA), want) < 1e-9, name
    # Control: the fit's own measurement is another one, and a prompt of one token has none.
    with pytest.raises(raycurv.UserError, match=r"'prompt 1' of --queries.*1 of 4 examples"):
        measured_by(fits, LLAMA, PROMPTS, None, tmp_path / "a loss of nothing")
    kept = [0, 2, 3]
    plain = measured_by(fits, LLAMA, [PROMPTS[q] for q in kept], None, tmp_path / "the loss")
    assert worst(matrix(plain, [PROMPTS[q] for q in kept], LLAMA), want[kept]) > 1e-2


def test_the_log_odds_of_a_class_are_a_measurement(fits, tmp_path) -> None:
    want = dense_scores(fits, MLP, log_odds, FAVOURED)
    scores = measured_by(fits, MLP, FAVOURED, LogOdds(), tmp_path, batch_tokens=3)
    assert worst(matrix(scores, FAVOURED, MLP), want) < 1e-9
    assert scores.manifest.settings["objective"] == "LogOdds"


def test_last_tokens_are_each_in_one_slice() -> None:
    lengths = torch.tensor([5, 1, 3])
    mask = torch.arange(5) < lengths[:, None]
    outputs = torch.arange(15.0).view(3, 5, 1)
    batch = Batch(0, ("a", "b", "c"), torch.zeros(3, 5, dtype=torch.int64), mask=mask)
    for width in (1, 2, 5):
        total, seen = torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)
        for start in range(0, 5, width):
            last, here = replace(batch, start=start).at_last(outputs[:, start : start + width])
            total += torch.where(here[:, None], last, 0.0)
            seen += here
        assert total[:, 0].tolist() == [4.0, 5.0, 12.0] and seen.tolist() == [1, 1, 1]


MEASURING_MISTAKES: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "a missing column": (
        LogitDifference(), [{"id": "a", "input_ids": [1, 2], "right": 1}],
        ("`wrong`, which the objective reads", "`right`"),
    ),
    "no measurement": (Nothing(), PROMPTS, ("--objective Nothing", "the method measurement")),
    "no such name": ("test_objectives:Nobody", PROMPTS, ("test_objectives:Nobody", "importable")),
    "another shape": (PerPosition(), PROMPTS, ("the measurement", "one number for each example")),
    "infinite": (Infinite(), PROMPTS, ("a finite measurement", "prompt")),
    "a column that there is": (Reserved(), PROMPTS, ("'labels'", "batch.labels")),
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURING_MISTAKES)
def test_a_mistake_in_a_measurement_is_named(name: str, fits, tmp_path) -> None:
    objective, queries, says = MEASURING_MISTAKES[name]
    with pytest.raises(raycurv.UserError) as caught:
        measured_by(fits, LLAMA, queries, objective, tmp_path)
    assert all(piece in str(caught.value) for piece in says), caught.value


def test_another_measurement_is_another_result(fits, tmp_path) -> None:
    measured_by(fits, LLAMA, PROMPTS, LogitDifference(), tmp_path)
    with pytest.raises(raycurv.UserError, match="--objective was 'LogitDifference'"):
        measured_by(fits, LLAMA, PROMPTS, None, tmp_path)


def test_a_fits_own_objective_may_read_columns(fits, tmp_path) -> None:
    """Weighted examples: a fit and its scores as those of the weighted loss."""
    rows = [{**row, "weight": 1.0 + n} for n, row in enumerate(MLP.data)]
    case = replace(MLP, name="weighted", data=tuple(rows))
    run = fitted(fits, case, Weighted(), str(tmp_path / "run"), fisher="empirical")
    plain = fits.run(MLP, fisher="empirical")
    losses = numbers(run.examples(), "loss") / numbers(plain.examples(), "loss")
    assert worst(losses, torch.tensor([row["weight"] for row in rows], dtype=torch.float64)) < EXACT
    scores = run.influence(rows[:2], rows, tmp_path / "scores", address="none", quiet=True)
    assert scores.table().num_rows == 2 * len(rows)
    with pytest.raises(raycurv.UserError, match="`weight`, which the objective reads"):
        run.influence(rows[:2], list(MLP.data), tmp_path / "x", address="none", quiet=True)


class Weighted(raycurv.Classification):
    """Cross-entropy, times a weight that the data has."""

    columns = ("weight",)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return super().loss(outputs, batch) * batch.columns["weight"]
