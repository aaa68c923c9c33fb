"""Linear layers of a frozen model: another kernel, the same function and gradient."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from networks import vectors
from test_products import worst
from torch import Tensor, nn
from torch.nn.functional import linear

import raycurv
from raycurv.mathematics import frozen_linear as module
from raycurv.mathematics.frozen_linear import FrozenLinear

# float32 rounding over 300 terms.
ROUNDING = 2e-6


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the rows that the other kernel multiplied."""
    seen: list[tuple[int, ...]] = []
    multiply = module.rows_times

    def counted(x: Tensor, w: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return multiply(x, w)

    monkeypatch.setattr(module, "rows_times", counted)
    yield seen


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 40, 300), (300, 300), (1, 3, 300), (0, 300)])
def test_output_and_gradient_are_those_of_linear(calls, bias: bool, shape: tuple[int, ...]) -> None:
    layer = nn.Linear(300, 50, bias=bias).requires_grad_(False)
    x = torch.randn(shape, requires_grad=True)
    back = torch.randn(*shape[:-1], 50)
    with FrozenLinear():
        y = layer(x)
    (got,) = torch.autograd.grad(y, x, back)
    want = x.detach().double() @ layer.weight.double().T
    assert worst(y.detach(), want if layer.bias is None else want + layer.bias) <= ROUNDING
    assert worst(got, back.double() @ layer.weight.double()) <= ROUNDING
    # Forward and backward; an empty microbatch is torch's.
    assert len(calls) == (2 if x.numel() else 0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(40, 64), (2, 20, 64)])
def test_a_model_may_change_the_output_in_place(calls, bias: bool, shape: tuple[int, ...]) -> None:
    layer = nn.Linear(64, 64, bias=bias).requires_grad_(False)

    def model(x: Tensor) -> Tensor:
        y = layer(x)
        y[..., :32].mul_(3)
        return nn.functional.relu(y, inplace=True)

    x = torch.randn(shape, requires_grad=True)
    (want,) = torch.autograd.grad(model(x).sum(), x)
    with FrozenLinear():
        y = model(x)
    (got,) = torch.autograd.grad(y.sum(), x)
    assert worst(got, want.double()) <= ROUNDING
    assert len(calls) == 2


def test_passes_go_through_it_and_end_as_with_torch(
    calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(40, 64), nn.ReLU(inplace=True), nn.Linear(64, 64), nn.SiLU(inplace=True),
            nn.Linear(64, 40),
        )  # fmt: skip

    rows = vectors(80, 40, "classes")

    def scored(name: str) -> Tensor:
        how = dict(address="none", quiet=True, batch_tokens=40)
        run = raycurv.fit(
            network, rows, tmp_path / name, objective="classification", fisher="empirical", **how
        )
        scores = run.influence(rows[:3], rows, tmp_path / f"{name}-scores", rank="full", **how)
        return torch.from_numpy(scores.matrix()[0])

    fast = scored("fast")
    assert calls
    calls.clear()
    monkeypatch.setattr(module, "suits", lambda _: False)
    assert worst(fast, scored("torch").double()) <= 1e-4
    assert not calls


def test_two_draws_go_back_through_one_graph() -> None:
    layer = nn.Linear(64, 64).requires_grad_(False)
    x = torch.randn(40, 64, requires_grad=True)
    with FrozenLinear():
        y = layer(x)
    for back in torch.randn(2, 40, 64):
        (got,) = torch.autograd.grad(y, x, back, retain_graph=True)
        assert worst(got, back.double() @ layer.weight.double()) <= ROUNDING


@pytest.mark.parametrize(
    "what", ["trained weight", "trained bias", "float64", "autocast", "vector"]
)
def test_what_is_not_frozen_float32_rows_is_left_to_torch(calls, what: str) -> None:
    layer = nn.Linear(64, 64).requires_grad_(False)
    x = torch.randn(40, 64)
    if what == "trained weight":
        layer.weight.requires_grad_()
    if what == "trained bias":
        assert layer.bias is not None
        layer.bias.requires_grad_()
    if what == "float64":
        layer, x = layer.double(), x.double()
    if what == "vector":
        x = x[0]
    with FrozenLinear(), torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        got = layer(x)
        assert torch.equal(got, linear(x, layer.weight, layer.bias))
    assert not calls
    assert got.requires_grad == what.startswith("trained")


def test_it_ends_where_it_is_left(calls) -> None:
    layer = nn.Linear(64, 64).requires_grad_(False)
    with FrozenLinear():
        layer(torch.randn(40, 64))
    assert len(calls) == 1
    layer(torch.randn(40, 64))
    assert len(calls) == 1
