"""The primitives of a block against whole matrices; what is exact, and what is nearer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from dense import ekfac_matrix, worst
from networks import LLAMA, MIXER, MLP, REGRESSION, Case, vectors
from test_ihvp import fit_settings
from test_objectives import numbers
from torch import nn

import raycurv
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import BlockCurvature, Damping
from raycurv.mathematics.eigen import Eigenbasis

# Products of matrices of some dozen columns in float64.
EXACT = 1e-10
METHODS = ("ekfac", "kfac", "diagonal", "identity")
FEW = (MLP, REGRESSION, MIXER, LLAMA)


def expected(truth: Any, run: Any, name: str, method: str) -> torch.Tensor:
    """The curvature of a block by its definition, with the run's basis where there is one."""
    o, i = truth.gradients(name)[0].shape
    if method == "identity":
        return torch.eye(o * i, dtype=torch.float64)
    if method == "diagonal":
        return truth.fisher(name).diag().diag()
    a, g = truth.input_factor(name), truth.output_factor(name)
    if method == "kfac":
        return truth.rows(name) / len(truth.case.data) * torch.kron(g, a)
    block = run.curvature(name)
    q_a, q_g = block.input_basis.dense(), block.output_basis.dense()
    return ekfac_matrix(q_a, q_g, truth.corrected(name, q_a, q_g))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_the_dense_curvature_is_the_definitions(fits, case: Case, method: str) -> None:
    run = fits.run(case, **fit_settings(method))
    for name in run.block_names():
        want = expected(fits.truth(case), run, name, method)
        assert worst(run.curvature(name).dense(), want) < EXACT, name


@pytest.mark.parametrize("method", METHODS)
def test_apply_and_diagonal_are_functions_of_the_dense_matrix(fits, method: str) -> None:
    def damped(lam: torch.Tensor) -> torch.Tensor:
        return 1 / (lam + 0.3)

    run = fits.run(MLP, **fit_settings(method))
    for name in run.block_names():
        block = run.curvature(name)
        x = torch.randn(2, block.block.d_out, block.block.d_in, dtype=torch.float64)
        whole = block.dense()
        inverse = torch.linalg.inv(whole + 0.3 * torch.eye(len(whole), dtype=torch.float64))
        want = (x.flatten(1) @ inverse).view_as(x)
        assert worst(block.apply(x, damped), want) < EXACT
        assert worst(block.diagonal(damped).double().flatten(), inverse.diag()) < EXACT
        assert worst(block.eigenvalues.double().flatten().sort()[0],
                     torch.linalg.eigvalsh(whole)) < EXACT  # fmt: skip
        root = block.apply(block.apply(x, torch.sqrt), torch.sqrt)
        assert worst(root, block.apply(x, lambda lam: lam)) < EXACT


def test_the_identity_needs_no_labels_whatever_the_fisher(fits) -> None:
    run = fits.run(MLP, method="identity", fisher="sampled")
    assert worst(numbers(run.examples(), "loss"), fits.truth(MLP).losses()) < EXACT


@pytest.mark.usefixtures("narrow_tiles")
def test_a_cut_basis_serves_the_same_primitives(fits) -> None:
    run = fits.run(MLP, max_factor_dim=2)
    for name in run.block_names():
        block, truth = run.curvature(name), fits.truth(MLP)
        q_a, q_g = block.input_basis.dense(), block.output_basis.dense()
        want = ekfac_matrix(q_a, q_g, truth.corrected(name, q_a, q_g))
        assert worst(block.dense(), want) < EXACT
        assert worst(block.diagonal(lambda lam: lam).flatten(), want.diag()) < EXACT
        x = torch.randn(block.block.d_out, block.block.d_in, dtype=torch.float64)
        applied = (want @ x.flatten()).view_as(x)
        assert worst(block.apply(x, lambda lam: lam), applied) < EXACT


def test_a_tensor_of_another_shape_is_refused_by_name() -> None:
    block = BlockCurvature(
        Block("layer", "linear", 4, 3, True), Eigenbasis(), Eigenbasis(), torch.ones(3, 4)
    )
    with pytest.raises(raycurv.UserError, match=r"block layer.*\[\.\.\., 3, 4\].*bias"):
        block.apply(torch.ones(3, 3), torch.sqrt)


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_ekfac_is_nearer_to_the_dense_fisher_than_kfac(fits, case: Case) -> None:
    ekfac, kfac = fits.run(case), fits.run(case, method="kfac")
    for name in ekfac.block_names():
        fisher = fits.truth(case).fisher(name)
        near = torch.linalg.norm(ekfac.curvature(name).dense() - fisher)
        far = torch.linalg.norm(kfac.curvature(name).dense() - fisher)
        assert near <= far, name
        assert far > 1e-3 * torch.linalg.norm(fisher), f"{name}: K-FAC is exact, nothing is shown"


@pytest.mark.parametrize("case", [MLP, REGRESSION], ids=lambda case: case.name)
def test_kfac_is_exact_for_one_example_of_one_row(fits, case: Case) -> None:
    # With one input there is no dependence between a and g to lose, whatever the labels.
    alone = replace(case, name=f"{case.name}, alone", data=case.data[:1], settings={"draws": 7})
    kfac = fits.run(alone, method="kfac")
    for name in kfac.block_names():
        want = fits.truth(alone).fisher(name)
        assert worst(kfac.curvature(name).dense(), want) < EXACT
        several = fits.run(case, method="kfac").curvature(name).dense()
        assert worst(several, fits.truth(case).fisher(name)) > 0.01  # the control


def _linear() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)).eval()


def _bent() -> nn.Module:
    first, second = _linear()
    with torch.no_grad():
        first.weight *= 4  # far into where tanh is flat: J depends on the input
    return nn.Sequential(first, nn.Tanh(), second).eval()


@pytest.mark.parametrize("make, exact", [(_linear, True), (_bent, False)])
def test_kfac_is_exact_in_expectation_for_deep_linear_regression(fits, make, exact) -> None:
    # The expected Fisher is mean_n J_nᵀ J_n ⊗ a_n a_nᵀ, and J_n is the same for all n without a
    # nonlinearity. Drawn labels: a variance has the relative deviation sqrt(2 / (300 * 8)) = 0.03;
    # 0.15 is five of them.
    case = Case(make.__name__, make, vectors(8, 4, "numbers"), "regression", {"draws": 300})
    got = fits.run(case, method="kfac").curvature("0").dense()
    network, want = make().double(), torch.zeros(20, 20, dtype=torch.float64)
    for row in case.data:
        x = torch.tensor(row["inputs"], dtype=torch.float64)
        rest = nn.Sequential(*list(network)[1:])
        jacobian = torch.autograd.functional.jacobian(rest, network[0](x))
        want += torch.kron(jacobian.T @ jacobian, torch.outer(x, x)) / len(case.data)
    assert (worst(got, want) < 0.15) == exact


@pytest.mark.parametrize(
    "text, value, absolute", [("0.1", 0.1, False), ("abs:1e-6", 1e-6, True), ("0", 0.0, False)]
)
def test_damping_is_a_factor_or_a_number(text: str, value: float, absolute: bool) -> None:
    damping = Damping.parse(text)
    assert (damping.value, damping.absolute) == (value, absolute)
    assert damping.of(3.0) == (value if absolute else 3.0 * value)
    assert Damping.parse(str(damping)) == damping


@pytest.mark.parametrize("text", ["-1", "nan", "abs:inf", "abs:", "much"])
def test_a_damping_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(raycurv.UserError, match="--damping"):
        Damping.parse(text)
