"""The measures of accuracy in benchmarks/, on cases whose answers are known without them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from attribution import Attribution, Method
from byte_model import Shape
from counterfactual import Mislabelled
from datamodel import GroundTruth, draw_subsets, spearman
from dense_gauss_newton import DenseGaussNewton
from exact_labels import ExactRegression, ExactTwoClasses
from leave_one_out import removal_rises, solve
from numerics import Plain, Raycurv, Stream, sums_of
from refinement import EKFAC, Design, Refinement, cosine, method
from response import bregman, respond
from retraining import gradient_norms, retrain
from tasks import (
    Examples,
    Recipe,
    Task,
    byte_task,
    cross_entropies,
    perceptron,
    squared_errors,
)

from raycurv.batch import Batch

DECAY = 0.1


def small_task(hidden: tuple[int, ...], numbers: bool, batch: int | None = None) -> Task:
    """12 examples of 3 numbers, 4 queries."""
    generator = torch.Generator().manual_seed(0)

    def examples(count: int) -> Examples:
        x = torch.randn(count, 3, generator=generator)
        y = x.sum(dim=1, keepdim=True) + 0.3 * torch.randn(count, 1, generator=generator)
        return Examples(x, y if numbers else (y[:, 0] > 0).long())

    return Task(
        title="small",
        objective="regression" if numbers else "classification",
        make=perceptron([3, *hidden, 1 if numbers else 2]),
        losses=squared_errors if numbers else cross_entropies,
        recipe=Recipe(steps=150, rate=0.05, decay=DECAY, batch=batch),
        train=examples(12),
        queries=examples(4),
        damping=f"abs:{DECAY}",
        draws=1,
    )


def without(task: Task, n: int) -> Task:
    """The task of all examples but one: what a weight of zero should be."""
    kept = [i for i in range(len(task.train)) if i != n]
    return replace(task, train=Examples(task.train.inputs[kept], task.train.targets[kept]))


# Retraining


@pytest.mark.parametrize("batch", [None, 4])
def test_networks_do_not_depend_on_those_they_are_trained_with(batch: int | None) -> None:
    task = small_task((4,), numbers=False, batch=batch)
    # Far from converged, where starts and batches still tell.
    task = replace(task, recipe=replace(task.recipe, steps=20))
    weights_MN = draw_subsets(5, 12, 0.5, 0)
    together = retrain(task, weights_MN, seed=3).losses(task, task.queries)
    alone = [retrain(task, w[None], seed=3).losses(task, task.queries)[0] for w in weights_MN]
    # float32, 20 steps: some hundred roundings of losses of about 1.
    assert (together - torch.stack(alone)).abs().max() < 1e-4
    # The control: another start is seen, and so is another subset.
    other = retrain(task, weights_MN, seed=4).losses(task, task.queries)
    assert (together - other).abs().max() > 1e-2
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_an_example_of_weight_zero_is_as_good_as_absent() -> None:
    task = small_task((4,), numbers=True)
    weights = torch.ones(1, 12)
    weights[0, 5] = 0
    masked = retrain(task, weights, seed=0).losses(task, task.queries)
    absent = retrain(without(task, 5), torch.ones(1, 11), seed=0).losses(task, task.queries)
    assert (masked - absent).abs().max() < 1e-4
    whole = retrain(task, torch.ones(1, 12), seed=0).losses(task, task.queries)
    assert (masked - whole).abs().max() > 1e-2


def test_training_ends_where_the_objective_is_flat() -> None:
    task = small_task((), numbers=True)
    weights = torch.ones(1, 12)
    norms = [
        float(gradient_norms(t, retrain(t, weights, 0), weights))
        for t in (task, replace(task, recipe=replace(task.recipe, steps=5)))
    ]
    assert norms[0] < 1e-2 < norms[1]


# The linear datamodeling score


def test_lds_is_one_of_what_is_linear_and_nought_of_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    scores_QN = torch.randn(20, 30, generator=generator)
    masks_SN = draw_subsets(40, 30, 0.5, 0)
    assert torch.equal(masks_SN.sum(dim=1), torch.full((40,), 15.0))
    truth = GroundTruth(masks_SN, -(masks_SN @ scores_QN.T)[None].double())
    found = truth.lds(scores_QN)
    assert found.mean == pytest.approx(1.0) and found.over_subsets.low == pytest.approx(1.0)
    chance = truth.lds(torch.randn(20, 30, generator=generator))
    # Spearman of 40 pairs has a standard deviation of 1 / sqrt(39), of 20 queries' mean 0.036.
    assert abs(chance.mean) < 0.15
    assert chance.over_queries.low < 0 < chance.over_queries.high
    assert (found - chance).positive and not (chance - chance).positive
    assert truth.lds(-scores_QN).mean == pytest.approx(-1.0)


def test_spearman_counts_an_entry_as_often_as_it_stands() -> None:
    from scipy.stats import spearmanr

    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 5, (30,), generator=generator).double()  # with ties
    b = torch.randn(30, generator=generator, dtype=torch.float64)
    counts = torch.randint(0, 4, (30,), generator=generator).double()
    places = np.repeat(np.arange(30), counts.int().numpy())
    want = spearmanr(a.numpy()[places], b.numpy()[places]).statistic
    assert float(spearman(a, b, counts)) == pytest.approx(want, abs=1e-12)
    assert float(spearman(a, b)) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_reliability_falls_with_the_noise_of_retraining() -> None:
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(50, 8, generator=generator)

    def truth(noise: float) -> GroundTruth:
        seeds = signal + noise * torch.randn(4, 50, 8, generator=generator)
        return GroundTruth(draw_subsets(50, 10, 0.5, 0), seeds)

    assert truth(0.0).reliability() == pytest.approx((1.0, 1.0))
    half, whole = truth(1.0).reliability()
    # Two seeds' mean: signal 1, noise 1/2; four: 1/4. Spearman's is a little below Pearson's.
    assert half == pytest.approx(2 / 3, abs=0.1) and whole == pytest.approx(4 / 5, abs=0.1)
    assert abs(truth(100.0).reliability()[0]) < 0.2
    assert np.isnan(GroundTruth(torch.ones(5, 3), torch.rand(1, 5, 2)).reliability()[0])


# Leave-one-out and the proximal Bregman response


def ridge(task: Task, kept: Tensor) -> Tensor:
    """Losses of the queries, of the closed form over the examples of ``kept``; the sum over N."""
    a, b = (
        nn.functional.pad(e.inputs.double(), (0, 1), value=1.0) for e in (task.train, task.queries)
    )
    y, z = task.train.targets.double(), task.queries.targets.double()
    gram = (a.T * kept) @ a / len(a) + DECAY * torch.eye(4, dtype=torch.float64)
    w = torch.linalg.solve(gram, (a.T * kept) @ y / len(a))
    return 0.5 * (z - b @ w).square()[:, 0]


def test_leaving_out_is_the_closed_form_of_ridge_regression() -> None:
    task = small_task((), numbers=True)
    _, rises_QN = removal_rises(task)
    everything = torch.ones(12, dtype=torch.float64)
    for n in range(12):
        kept = everything.clone()
        kept[n] = 0
        want = ridge(task, kept) - ridge(task, everything)
        assert (rises_QN[:, n] - want).abs().max() < 1e-12


def test_newton_ends_where_autograd_finds_no_slope() -> None:
    task = small_task((), numbers=False)
    weights_MN = draw_subsets(3, 12, 0.5, 1)
    found = solve(task, weights_MN)
    for m, weights_N in enumerate(weights_MN):
        network = found.module(m)
        x, y = task.train.double().inputs, task.train.targets
        losses = nn.functional.cross_entropy(network(x), y, reduction="none")
        squares = sum(p.square().sum() for p in network.parameters())
        ((weights_N * losses).sum() / 12 + DECAY / 2 * squares).backward()
        slopes = [float(p.grad.abs().max()) for p in network.parameters() if p.grad is not None]
        assert len(slopes) == 2 and max(slopes) < 1e-14


def test_the_divergence_is_that_of_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    fixed, moved = torch.randn(2, 12, 2, generator=generator, dtype=torch.float64)
    task = small_task((), numbers=False)
    found = bregman(task, fixed, task.train.targets)(moved[None])[0]
    p, q = fixed.log_softmax(dim=1), moved.log_softmax(dim=1)
    # Of a cross-entropy it is KL(p(y₀) ‖ p(y)), whatever the label.
    assert (found - (p.exp() * (p - q)).sum(dim=1)).abs().max() < 1e-12
    assert found.min() > 0


def test_the_response_of_ridge_regression_is_leaving_out() -> None:
    task = small_task((), numbers=True)
    whole, rises_QN = removal_rises(task)
    # At the minimum, with the decay as damping, the proximal objective is the objective itself.
    response = respond(task, whole.module(0), torch.arange(12), DECAY)
    assert response.residual < 1e-6
    assert (response.rises_QM - rises_QN).abs().max() < 1e-6 * rises_QN.abs().max()
    wrong = respond(task, whole.module(0), torch.arange(12), 2 * DECAY)
    assert (wrong.rises_QM - rises_QN).abs().max() > 1e-2 * rises_QN.abs().max()


def test_one_gradient_has_the_second_moment_over_all_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 2, generator=generator, dtype=torch.float64).requires_grad_()
    batch = Batch(0, tuple("abcdef"), z.detach(), None)

    def second_moment(losses: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(losses.sum(), z)
        return g[:, :, None] * g[:, None, :]

    exact = ExactTwoClasses()
    labels = exact.sample(z.detach(), batch, lambda k: torch.rand(6, k))
    found = second_moment(exact.loss(z, replace(batch, labels=labels)))
    p = z.detach().softmax(dim=1)
    want = torch.zeros_like(found)
    for c in range(2):
        moment = second_moment(cross_entropies(z, torch.full((6,), c)))
        want += p[:, c, None, None] * moment
    assert (found - want).abs().max() < 1e-15
    # The data's own labels are what they were.
    own = exact.loss(z, replace(batch, labels=torch.tensor([0, 1] * 3)))
    assert torch.equal(
        own, nn.functional.cross_entropy(z, torch.tensor([0, 1] * 3), reduction="none")
    )
    drawn = ExactRegression().sample(z[:, :1].detach(), batch, lambda k: torch.rand(6, k))
    assert torch.equal(drawn, z[:, :1].detach() + 1)


# Scores and sums


def test_scores_of_all_labels_are_the_dense_gauss_newton_inverse(tmp_path: Path) -> None:
    task = small_task((), numbers=True)
    network = task.make(0).double()
    method = Method("Gauss-Newton", {"method": "mfac", "rows": 12}, exact=True)
    attribution = Attribution(task, network, tmp_path, {"dtype": "float64"})
    found_QN = attribution.scores(method)
    rows = []
    for e in (task.queries.double(), task.train.double()):
        a = nn.functional.pad(e.inputs, (0, 1), value=1.0)
        rows.append((network(e.inputs) - e.targets).detach() * a)
    a = nn.functional.pad(task.train.double().inputs, (0, 1), value=1.0)
    damped = a.T @ a / 12 + DECAY * torch.eye(4, dtype=torch.float64)
    want_QN = rows[0] @ torch.linalg.solve(damped, rows[1].T)
    assert (found_QN - want_QN).abs().max() < 1e-10 * want_QN.abs().max()
    # The control: the data's own labels have another Fisher.
    own = Method("own", {"method": "mfac", "rows": 12, "fisher": "empirical"})
    assert (attribution.scores(own) - want_QN).abs().max() > 1e-2 * want_QN.abs().max()
    # Self-influence is the score of an example as its own query.
    want_N = (rows[1] * torch.linalg.solve(damped, rows[1].T).T).sum(dim=1)
    found_N = attribution.self_influence(method)
    assert (found_N - want_N).abs().max() < 1e-10 * want_N.abs().max()


def test_sums_are_compared_with_the_definition_on_one_scale() -> None:
    stream = Stream()
    ways = {
        dtype: (Raycurv(stream, dtype), Plain(stream, torch.float64))
        for dtype in (torch.float64, torch.bfloat16)
    }
    for both in ways.values():
        for a_NTI, g_NTO in stream.batches(5):
            for way in both:
                way.add(a_NTI, g_NTO)
    worst = {
        dtype: max(sums_of(stream, ours, 5).worst(sums_of(stream, exact, 5)))
        for dtype, (ours, exact) in ways.items()
    }
    # A few additions in float64; bfloat16 keeps eight bits.
    assert worst[torch.float64] < 1e-12
    assert 1e-5 < worst[torch.bfloat16] < 1e-1


# Wrong labels


def test_wrong_labels_are_counted_as_they_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    task = small_task((), numbers=False)
    wrong = Mislabelled.of(task, 0.25)
    assert int(wrong.wrong_N.sum()) == 3
    assert torch.equal(wrong.task.train.targets != task.train.targets, wrong.wrong_N)
    order = torch.rand(12, generator=generator)
    assert wrong.separation(order) == pytest.approx(roc_auc_score(wrong.wrong_N, order))
    assert wrong.found(wrong.wrong_N.double(), 0.25) == 1.0
    assert wrong.found(-wrong.wrong_N.double(), 0.25) == 0.0


# The dense Gauss-Newton matrix


def linear_layers(network: nn.Module) -> list[str]:
    """Names of those that a fit has blocks of."""
    found = (name for name, m in network.named_modules() if isinstance(m, nn.Linear))
    return [name for name in found if name != "lm_head"]


@pytest.mark.parametrize("numbers", [False, True])
def test_the_dense_matrix_is_the_hessian_where_outputs_are_linear(numbers: bool) -> None:
    task = small_task((), numbers)
    network = task.make(0).double()
    dense = DenseGaussNewton(task, network, ["0"])

    def mean_loss(theta_P: Tensor) -> Tensor:
        weight = theta_P.view(-1, 4)
        outputs = task.train.inputs.double() @ weight[:, :3].T + weight[:, 3]
        return task.losses(outputs, task.train.double().targets).mean()

    want_PP = torch.autograd.functional.hessian(mean_loss, dense.theta_P)
    assert (dense.matrix() - want_PP).abs().max() < 1e-14
    slope_P = dense.gradients(task.train).mean(dim=0)
    assert (slope_P - torch.func.grad(mean_loss)(dense.theta_P)).abs().max() < 1e-14


@pytest.mark.parametrize("text", [False, True])
def test_the_dense_matrix_and_its_products_are_of_one_network(text: bool) -> None:
    task = byte_task(Shape(8, 8, 1, 2, 1), 6, 2, 8, 1) if text else small_task((4,), False)
    network = task.make(0)
    dense = DenseGaussNewton(task, network, linear_layers(network))
    generator = torch.Generator().manual_seed(0)
    v_QP = torch.randn(2, len(dense.theta_P), dtype=torch.float64, generator=generator)
    matrix_PP, products_QP = dense.matrix(), dense.products(v_QP)
    # transformers norms hidden states in float32.
    allowed = 1e-6 if text else 1e-13
    assert (v_QP @ matrix_PP - products_QP).abs().max() < allowed * products_QP.abs().max()
    # The control: other weights have another matrix.
    other = DenseGaussNewton(task, task.make(1), linear_layers(network)).products(v_QP)
    assert (other - products_QP).abs().max() > 0.1 * products_QP.abs().max()


def test_refined_solutions_are_those_of_the_damped_matrix(tmp_path: Path) -> None:
    task = small_task((4,), numbers=False)
    attribution = Attribution(task, task.make(0), tmp_path, {"dtype": "float64"})
    refinement = Refinement.of(attribution)
    inverse, matrix_PP = refinement.inverse, refinement.matrix_PP
    # Unrefined, the scores are raycurv's own.
    found_QN = refinement.scores(refinement.unrefined(EKFAC, "0.1"))
    want_QN = attribution.scores(method(EKFAC), "0.1")
    # A network of float32 that is read as float64; bases and Λ as a fit stores them.
    assert (found_QN - want_QN).abs().max() < 1e-6 * want_QN.abs().max()
    iterates_KQP, exact_QP, system_PP = refinement.whole("0.1")
    left_QP = refinement.queries_QP - exact_QP @ system_PP
    assert left_QP.abs().max() < 1e-12 * refinement.queries_QP.abs().max()
    assert (iterates_KQP[-1] - exact_QP).abs().max() < 1e-6 * exact_QP.abs().max()
    # The first is EK-FAC's solution, at another scale; the exact one is not.
    unrefined_QP = refinement.unrefined(EKFAC, "0.1")
    assert cosine(iterates_KQP[0], unrefined_QP) == pytest.approx(1, abs=1e-9)
    assert cosine(exact_QP, unrefined_QP) < 0.999
    # raycurv's own solver stops at a residual of 1e-3.
    for solution, way_QP in (
        ("whole model", exact_QP),
        ("blocks alone", refinement.blocks("0.1")[1]),
    ):
        own_QN = refinement.own_scores((solution, "0.1", 20))
        assert (own_QN - refinement.scores(way_QP)).abs().max() < 1e-2 * own_QN.abs().max()
        assert (own_QN - found_QN).abs().max() > 0.1 * own_QN.abs().max()
    # Blocks alone: the same with what is between the blocks struck out.
    lone_QP = refinement.blocks("0.1")[1]
    for at, lam in zip(inverse.slices.values(), inverse.damping("0.1").values(), strict=True):
        lone_PP = matrix_PP[at, at] + lam * torch.eye(at.stop - at.start, dtype=torch.float64)
        want_QP = torch.linalg.solve(lone_PP, refinement.queries_QP[:, at].T).T
        assert (lone_QP[:, at] - want_QP).abs().max() < 1e-9 * want_QP.abs().max()
    assert (lone_QP - exact_QP).abs().max() > 1e-2 * exact_QP.abs().max()


def test_losses_that_are_kept_are_of_the_same_training(tmp_path: Path) -> None:
    task = small_task((4,), numbers=True)
    task = replace(task, recipe=replace(task.recipe, steps=3))
    first = Design(task, 4, 2).truth(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    again = Design(task, 4, 2).truth(tmp_path)
    assert torch.equal(first.losses_RSQ, again.losses_RSQ)
    assert len(list(tmp_path.iterdir())) == 2
    # Of another recipe nothing is kept.
    other = Design(replace(task, recipe=replace(task.recipe, steps=4)), 4, 2).truth(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    assert not torch.equal(first.losses_RSQ, other.losses_RSQ)
