"""Random signs in place of labels: their second moment is the Hessian, and no run has its own."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import Truth, sign, worst
from networks import LENGTHS, LLAMA_4, MIXER, MLP, REGRESSION, REWARD, VOCAB, Case, sentences
from results import assert_same
from test_corrected import (
    test_corrected_eigenvalues_are_mean_squares_of_the_rotated_gradients as check_lambda,
)
from test_corrected import test_losses_are_summed_over_the_examples_own_targets as check_losses
from test_corrected import (
    test_mean_gradient_norm_is_the_sum_of_traces_and_each_is_the_examples_own as check_norms,
)
from test_factors import stored
from test_factors import (
    test_factors_are_means_of_outer_products_over_unpadded_rows as check_factors,
)
from test_invariance import DOUBLE, HOW, result, same
from test_objectives import Tempered
from torch import Tensor

import raycurv
from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.mathematics.loss.draws import id_keys
from raycurv.mathematics.loss.multi_label import MultiLabel
from raycurv.mathematics.loss.objective import Signed, TokenClassification
from raycurv.mathematics.loss.shipped import open_objective
from raycurv.mathematics.loss.signs import signs

EXACT = 1e-10


def signed(case: Case, **more: Any) -> Case:
    name = f"{case.name}, signs"
    return replace(case, name=name, settings={"draws": 2, **case.settings, **SIGNS, **more})


SIGNS = {"fisher": "signs"}
# Tokens with padding, prompts that are no targets, and slices of positions.
TOKENS = replace(
    MIXER, data=sentences(LENGTHS, True), settings=MIXER.settings | {"logits_chunk": 2 * VOCAB}
)
# A softmax of classes and of tokens; two classes; numbers.
CASES = (signed(MLP), signed(TOKENS), signed(REWARD, draws=1), signed(REGRESSION))


# Signs


def test_signs_are_the_bits_of_the_counter() -> None:
    ids, positions = ["", "a", "naïve id #2"], [0, 1, 100_000]
    for seed, draw, count in ((0, 0, 64), (1, 3, 1), (2**40, 2, 201)):
        got = signs(seed, id_keys(ids), torch.tensor(positions), draw, count)
        assert got.shape == (3, 3, count) and got.dtype == torch.float32
        for n, t, k in itertools.product(range(3), range(3), range(count)):
            assert float(got[n, t, k]) == sign(seed, ids[n], positions[t], draw, k)


def test_signs_are_fair_and_unrelated() -> None:
    e_RV = signs(0, id_keys([f"id {n}" for n in range(300)]), torch.arange(40), 0, 130).flatten(
        0, 1
    )
    # Sums of m signs are normal with deviation √m; of neighbours, words and rows a product each.
    for of in (
        e_RV, e_RV[:, 1:] * e_RV[:, :-1], e_RV[:, 64:] * e_RV[:, :-64], e_RV[1:] * e_RV[:-1],
    ):  # fmt: skip
        assert abs(float(of.double().sum())) < 5 * math.sqrt(of.numel())
        assert (of.double().sum(dim=0).abs() < 6 * math.sqrt(len(of))).all()


# Their gradients


def gradient(objective: Any, outputs: Tensor, epsilon: Tensor, **batch: Any) -> Tensor:
    """Of ``signed`` with respect to the outputs of one example, flat."""
    z = outputs.clone().requires_grad_()
    own = Batch(0, ("a",), torch.zeros(1, 1), **batch)
    (found,) = torch.autograd.grad(objective.signed(z, own, lambda k: epsilon).sum(), z)
    return found.flatten()


def hessian(objective: Any, outputs: Tensor, **batch: Any) -> Tensor:
    own = Batch(0, ("a",), torch.zeros(1, 1), **batch)
    size = outputs.numel()
    found = torch.autograd.functional.hessian(lambda z: objective.loss(z, own).sum(), outputs)
    return found.reshape(size, size)


class Own:
    """A softmax at another temperature, with a weight: what a user would write."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        assert batch.labels is not None
        return 3.0 * torch.nn.functional.cross_entropy(
            outputs / 2, batch.labels, reduction="none"
        )  # fmt: skip

    def sample(self, outputs: Tensor, batch: Batch, uniform: Any) -> Tensor:
        raise AssertionError("nothing is sampled")

    def signed(self, outputs: Tensor, batch: Batch, signs: Callable[[int], Tensor]) -> Tensor:
        root = (outputs / 2).softmax(dim=1).sqrt()
        return 2 * math.sqrt(3.0) * (signs(outputs.shape[1]) * root).sum(dim=1)


COUNTS = {"mask": torch.tensor([[True]]), "loss_mask": torch.tensor([[True]])}
LABEL = {"labels": torch.tensor([0])}
# The objective, its outputs' shape, how many signs, what else a microbatch has.
OBJECTIVES: dict[str, tuple[Any, tuple[int, ...], int, dict[str, Any]]] = {
    "three classes": (raycurv.Classification(), (1, 3), 3, LABEL),
    "seven classes": (raycurv.Classification(), (1, 7), 7, LABEL),
    "two classes": (raycurv.Classification(), (1, 2), 2, LABEL),
    "tokens": (TokenClassification(), (1, 1, 5), 5, COUNTS | {"labels": torch.tensor([[1]])}),
    "multi-label": (MultiLabel(), (1, 4), 4, {"labels": torch.ones(1, 4)}),
    "numbers": (raycurv.Regression(), (1, 4), 4, {"labels": torch.ones(1, 4)}),
    "own": (open_objective(Own()), (1, 4), 4, LABEL),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_over_all_signs_the_second_moment_is_the_hessian(name: str) -> None:
    objective, shape, count, batch = OBJECTIVES[name]
    torch.manual_seed(0)
    z = 2 * torch.randn(shape, dtype=torch.float64)
    every = torch.tensor(list(itertools.product((1.0, -1.0), repeat=count)))
    each = [gradient(objective, z, e.view(*shape[:-2], -1, count), **batch) for e in every]
    c = torch.stack(each)
    want = hessian(objective, z, **batch)
    assert worst(c.T @ c / len(c), want) < 1e-12
    assert float(c.sum(dim=0).abs().max()) < 1e-12
    alone = max(worst(torch.outer(e, e), want) for e in c)
    if count == 2:
        assert alone < 1e-12, "of two classes either sign is exact"
    else:
        assert alone > 0.1  # the control
    # Another: half of all signs have another second moment, but where each is exact.
    half = c[: len(c) // 2 + 1]
    assert count == 2 or worst(half.T @ half / len(half), want) > 1e-3


def test_over_drawn_signs_the_second_moment_is_the_hessian_and_targets_are_unrelated() -> None:
    torch.manual_seed(1)
    examples, classes = 20_000, 67  # two words of the counter
    z = torch.randn(classes, dtype=torch.float64)
    outputs = z.expand(examples, 2, -1).clone().requires_grad_()
    keys = id_keys([f"id {n}" for n in range(examples)])
    here = torch.ones(examples, 2, dtype=torch.bool)
    batch = Batch(0, ("a",) * examples, here, here, here.long(), here)
    value = TokenClassification().signed(
        outputs, batch, lambda k: signs(0, keys, torch.arange(2), 0, k)
    )
    (c_NTV,) = torch.autograd.grad(value.sum(), outputs)
    p = z.softmax(dim=0)
    want = p.diag() - torch.outer(p, p)
    # Of a mean of products of c_i c_j, with variance R_ii R_jj + R_ij² but for a little.
    scale = torch.outer(want.diag(), want.diag()).sqrt() / math.sqrt(2 * examples)
    rows = c_NTV.flatten(0, 1)
    assert ((rows.T @ rows / len(rows) - want).abs() < 7 * math.sqrt(2) * scale).all()
    between = c_NTV[:, 0].T @ c_NTV[:, 1] / examples
    assert (between.abs() < 7 * math.sqrt(2) * scale).all()
    # The control: of a softmax at another temperature it is another.
    other = (0.95 * z).softmax(dim=0)
    found = (rows.T @ rows / len(rows) - other.diag() + torch.outer(other, other)).abs()
    assert not (found < 7 * math.sqrt(2) * scale).all()


def test_a_class_of_no_weight_has_no_gradient() -> None:
    z = torch.tensor([[0.0, -torch.inf, 1.0, -200.0]])
    found = gradient(raycurv.Classification(), z, torch.ones(1, 4))
    assert torch.isfinite(found).all() and float(found[1]) == 0.0 and found[0] != 0


# Runs


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_curvature_is_that_of_the_gradients_of_signs(fits, case: Case) -> None:
    for check in (check_factors, check_lambda, check_norms, check_losses):
        check(fits, case)
    run = fits.run(case)
    assert not (Path(run.path) / "labels").exists()
    # The control: labels, and another seed.
    for other in ({"fisher": "sampled"}, {"seed": 1}):
        if case.objective != "preference" or other != {"seed": 1}:
            trace = fits.run(case, **other).blocks()["trace"].to_pylist()
            assert (
                worst(torch.tensor(trace), torch.tensor(run.blocks()["trace"].to_pylist())) > 1e-4
            )


def gauss_newton_trace(truth: Truth, name: str) -> float:
    """``tr mean_n J_nᵀ R_n J_n`` of a block, from one gradient an output and example."""
    total, module = 0.0, truth.blocks([name])[name]
    for row in truth.case.data:
        f = truth.outputs(row)
        outs = [torch.autograd.grad(one, list(module.parameters()), retain_graph=True) for one in f]
        j = torch.stack([torch.cat([p.flatten() for p in each]) for each in outs])
        p = f.detach().softmax(dim=0)
        r = p.diag() - torch.outer(p, p)
        if truth.case.objective == "regression":
            r = torch.eye(len(f), dtype=torch.float64)
        total += float((r @ j @ j.T).trace())
    return total / len(truth.case.data)


def test_traces_are_the_gauss_newtons_in_expectation_and_at_once_of_two_classes(fits) -> None:
    many = signed(replace(MLP, name="mlp, many"), draws=300)
    two = replace(
        MLP, name="two classes", network=lambda: torch.nn.Sequential(*MLP.network(), PAIR),
        settings={"draws": 1},
    )  # fmt: skip
    two = replace(two, data=tuple(row | {"labels": row["labels"] % 2} for row in two.data))
    for case, tolerance in ((many, 0.02), (signed(two, draws=1), EXACT)):
        for row in fits.run(case).blocks().to_pylist():
            want = gauss_newton_trace(Truth(case), row["block"])
            assert abs(row["trace"] / want - 1) < tolerance, row["block"]
    # The control: one draw of labels is not that near.
    row = fits.run(two).blocks().to_pylist()[0]
    assert abs(row["trace"] / gauss_newton_trace(Truth(two), row["block"]) - 1) > 0.02


PAIR = torch.nn.Linear(3, 2).double()


@pytest.mark.parametrize(
    ("case", "how"),
    [(MLP, HOW[1]), (TOKENS, HOW[2]), (LLAMA_4, HOW[6])],
    ids=["four stages", "alone", "swept"],
)
def test_results_do_not_depend_on_stages_or_batches(fits, case: Case, how: dict[str, Any]) -> None:
    case = signed(case)
    same(result(fits, case, "float64", **how), result(fits, case, "float64"), DOUBLE)


def test_replicas_and_statistics_are_those_of_the_same_signs(fits) -> None:
    case = signed(MLP)
    one, other = (
        fits.run(case, gradients=True, **how)
        for how in ({}, {"stages": 2, "replicas": 2, "batch_tokens": 1})
    )
    truth = fits.truth(case)
    for name in one.block_names():
        got, again = one.gradient(name), other.gradient(name)
        want = torch.stack(truth.gradients(name)).square().mean(dim=0)
        assert worst(got.mean_square_sampled, want) < EXACT
        assert worst(again.mean_square_sampled, want) < EXACT
        own = torch.stack([found[name] for found in truth.own_gradients])
        assert worst(got.mean_square, own.square().mean(dim=0)) < EXACT
        assert worst(again.gauss_newton_bartlett, got.gauss_newton_bartlett) > 1e-3  # batches


def test_what_is_gone_is_made_again_to_the_bit(fits, tmp_path: Path) -> None:
    case = signed(TOKENS)
    whole, folder = Path(fits.run(case).path), tmp_path / "run"
    for gone in ("corrected", "factors", "eigen"):
        shutil.copytree(whole, folder)
        shutil.rmtree(folder / gone)
        raycurv.fit(
            fits.source(case), list(case.data), folder, objective=case.objective, quiet=True,
            **fits._settings(case, {}),
        )  # fmt: skip
        assert_same(folder, whole)
        shutil.rmtree(folder)


def test_merged_runs_draw_what_the_run_of_all_their_data_draws(fits) -> None:
    case = signed(MLP)
    first, rest = (replace(case, name=f"{case.name} {s}", data=case.data[s]) for s in HALVES)
    how: dict[str, Any] = {"keep_sums": True, "address": "none", "quiet": True}
    runs = [fits.run(first), fits.run(rest)]
    merged = runs[0].merge(runs[1], out=fits.place(), **how)
    left = fits.run(case).subtract(runs[1], out=fits.place(), **how)
    for got, want in ((merged, fits.run(case)), (left, runs[0])):
        for name in want.block_names():
            sums = [stored(r, f"{name}.output")["sum"] for r in (got, want)]
            assert worst(*sums) < EXACT
        traces = [torch.tensor(r.blocks()["trace"].to_pylist()) for r in (got, want)]
        assert worst(*traces) < 1e-9
    # Of another seed the runs do not go together.
    with pytest.raises(UserError, match="--seed"):
        runs[0].merge(fits.run(rest, seed=1), out=fits.place(), **how)


HALVES = (slice(0, 5), slice(5, 9))


# Mistakes


def test_an_objective_without_signs_for_its_own_loss_is_named(fits, tmp_path: Path) -> None:
    for objective in (Plain(), Tempered()):
        assert not isinstance(open_objective(objective), Signed)
        with pytest.raises(UserError, match=f"(?s)--fisher signs.*{type(objective).__name__}"):
            raycurv.fit(
                MLP.network, list(MLP.data), tmp_path / "run", objective=objective, quiet=True,
                address="none", fisher="signs",
            )  # fmt: skip
    # One whose loss is its base's keeps them.
    assert isinstance(open_objective(type("Mine", (raycurv.Classification,), {})()), Signed)


def test_an_objective_of_ones_own_has_signs(fits, tmp_path: Path) -> None:
    how: dict[str, Any] = {"fisher": "signs", "address": "none", "quiet": True, "dtype": "float64"}
    run = raycurv.fit(MLP.network, list(MLP.data), tmp_path / "run", objective=Own(), **how)
    truth, want = Truth(signed(MLP, draws=1)), {}
    for row in MLP.data:
        f = truth.outputs(row)
        p = (f.detach() / 2).softmax(dim=0)
        e = [sign(0, row["id"], 0, 0, k) for k in range(3)]
        c = p.sqrt() * torch.tensor(e, dtype=torch.float64)
        c = math.sqrt(3.0) / 2 * (c - p * (p.sqrt() @ torch.tensor(e, dtype=torch.float64)))
        for name, module in truth.blocks(truth.names).items():
            found = torch.autograd.grad(c @ f, list(module.parameters()), retain_graph=True)
            want[name] = want.get(name, 0.0) + float(sum(g.square().sum() for g in found))
    for row in run.blocks().to_pylist():
        assert abs(row["trace"] * len(MLP.data) / want[row["block"]] - 1) < EXACT
    with pytest.raises(UserError, match="--fisher was 'signs' and is now 'sampled'"):
        raycurv.fit(
            MLP.network, list(MLP.data), tmp_path / "run", objective=Own(),
            **how | {"fisher": "sampled"},
        )  # fmt: skip


# The default


def test_signs_are_the_default_and_a_run_keeps_what_it_was_begun_with(tmp_path: Path) -> None:
    def fit(place: str, rows: Any = MLP.data, **how: Any) -> tuple[str, list[float]]:
        run = raycurv.fit(
            MLP.network, list(rows), tmp_path / place, address="none", quiet=True,
            **{"objective": MLP.objective, "keep_sums": True} | how,
        )  # fmt: skip
        return run.manifest.settings["fisher"], run.blocks()["trace"].to_pylist()

    labels, by_signs = (fit(name, fisher=name) for name in ("sampled", "signs"))
    assert fit("new") == by_signs and by_signs[1] != labels[1]
    # An objective that has none, and one whose labels are its own.
    for name, objective in {"plain": Plain(), "own labels": Labels()}.items():
        assert fit(name, objective=objective)[0] == "sampled"
    # What was begun with labels, as older versions did, goes on with them: finished, or half done.
    before = {p: p.read_bytes() for p in (tmp_path / "sampled").rglob("*.safetensors")}
    shutil.rmtree(tmp_path / "sampled" / "corrected")
    assert fit("sampled") == labels
    assert all(p.read_bytes() == content for p, content in before.items())
    more = [row | {"id": f"more {n}"} for n, row in enumerate(MLP.data)]
    assert fit("extended", more, extend=tmp_path / "sampled")[0] == "sampled"
    assert fit("extended signs", more, extend=tmp_path / "signs")[0] == "signs"
    for begun, now in (("sampled", "signs"), ("signs", "sampled"), ("signs", "empirical")):
        with pytest.raises(UserError, match=f"--fisher was '{begun}' and is now '{now}'"):
            fit(begun, fisher=now)
    fit("empirical", fisher="empirical")
    with pytest.raises(UserError, match="--fisher was 'empirical' and is now 'signs'"):
        fit("empirical")


class Plain:
    """Without signs."""

    loss, sample = Own.loss, raycurv.Classification.sample
    _logits = raycurv.Classification._logits


class Labels(raycurv.Classification):
    """Draws labels of its own."""

    def sample(self, outputs: Tensor, batch: Batch, uniform: Any) -> Tensor:
        return super().sample(outputs, batch, uniform)
