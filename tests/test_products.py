"""Products of rows: whichever kernel multiplies, the numbers are those of float64."""

from __future__ import annotations

import pytest
import torch

from raycurv.mathematics import products

# max |difference| / max |reference|: float32 rounding over 300 terms; float64's; bf16 inputs.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}
SHAPES = [(300, 17, 9), (1, 5, 7), (0, 4, 3), (64, 128, 1)]


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    if not want.numel() or not want.any():
        return float((got.double() - want).abs().max()) if want.numel() else 0.0
    return float((got.double() - want).abs().max() / want.abs().max())


@pytest.fixture(params=["fast", "torch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(products, "_multiply", None)
    return str(request.param)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows,inputs,outputs", SHAPES)
def test_rows_times_a_matrix(kernel, dtype, rows: int, inputs: int, outputs: int) -> None:
    x = torch.randn(2, rows, inputs).to(dtype)
    w = torch.randn(outputs, inputs).to(dtype).T  # not contiguous, as an eigenbasis turned back is
    got = products.rows_times(x, w)
    assert got.shape == (2, rows, outputs) and got.dtype == dtype
    assert worst(got, x.double() @ w.double()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows,inputs,outputs", SHAPES)
def test_sums_of_outer_products(kernel, dtype, rows: int, inputs: int, outputs: int) -> None:
    left, right = torch.randn(rows, outputs).to(dtype), torch.randn(rows, 2 * inputs).to(dtype)
    right = right[:, ::2]  # not contiguous, as a tile of a wide axis is
    total = torch.ones(outputs, inputs, dtype=dtype)
    products.add_outer(total, left, right)
    assert worst(total, 1 + left.double().T @ right.double()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows,width", [(300, 17), (0, 200), (1, 257), (300, 400), (7, 1100)])
def test_symmetric_products(kernel, dtype, rows: int, width: int) -> None:
    wider = torch.randn(rows, width + 3).to(dtype)
    x = wider[:, 1:-2]  # a tile of a wide axis
    total, whole = torch.ones(width, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    above = products.add_gram(total, x)
    assert products.add_gram(total, x) == above
    if above:
        products.mirror(total)
        assert torch.equal(total, total.T)
    assert worst(total, 1 + 2 * x.double().T @ x.double()) <= TOLERANCE[dtype]
    assert above == (kernel == "fast" and dtype == torch.float32 and rows > 0)
    # The control: without what is below the diagonal it is another matrix.
    products.add_gram(whole, x)
    assert not above or width <= 128 or worst(whole, 1 + x.double().T @ x.double()) > 0.1


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("examples,rows,x,y", [(3, 64, 150, 120), (5, 7, 9, 4), (0, 64, 150, 120)])
def test_outer_products_of_each_example(
    kernel, dtype, examples: int, rows: int, x: int, y: int
) -> None:
    left, right = torch.randn(examples, rows, x), torch.randn(examples, rows, 2 * y)
    # Some outputs of wider rows, and rows that are not contiguous.
    left, right = left.to(dtype)[:, :, : x // 2], right.to(dtype)[:, :, ::2]
    got = products.outer(left, right)
    assert got.shape == (examples, x // 2, y) and got.dtype == dtype
    assert (
        worst(got, torch.einsum("ntx,nty->nxy", left.double(), right.double()))
        <= (TOLERANCE[dtype])
    )


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def _linear_pointwise(self, x, w, *rest):  # type: ignore[no-untyped-def]
            return x @ w.T + 1

    monkeypatch.setattr(torch.ops, "mkldnn", Wrong())
    assert products._one_dnn() is None


def test_a_torch_without_the_kernel_multiplies_as_torch_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert products._one_dnn() is None
