"""Running sums keep their precision, and go on from where they stopped, bit for bit."""

from __future__ import annotations

import pytest
import torch

from raycurv.errors import NumericalError
from raycurv.mathematics.sums import RunningSum, Sums

ADDITIONS = 40_000
# A float32 part of at most 32 additions has a relative error of 32 roundings of 6e-8 at the worst.
SINGLE = 1e-5


def values(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, generator=generator, dtype=torch.float32).to(dtype)


def test_forty_thousand_additions_in_float32_keep_five_digits() -> None:
    running = RunningSum((3,), torch.float32)
    plain, coarse = torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)
    x = values(ADDITIONS)
    for row in x:
        running.add(row)
        plain += row
        coarse += row.to(torch.bfloat16)
    want = x.double().sum(dim=0)
    error = ((running.value("sum") - want).abs() / want).max()
    assert error < SINGLE
    # The controls: bfloat16 stops growing, and a plain float32 sum is worse.
    assert ((coarse.double() - want).abs() / want).min() > 0.5
    assert ((plain.double() - want).abs() / want).max() > error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outer_products_are_summed_in_float32_at_least(dtype: torch.dtype) -> None:
    running = RunningSum((3, 3), dtype)
    assert running.part.dtype == torch.float32
    x = values(2000, dtype)
    for row in x:
        running.add_gram(row[None])
    want = x.double().T @ x.double()
    assert ((running.value("sum") - want).abs() / want).max() < SINGLE


@pytest.mark.parametrize("at", [1, 31, 32, 45])
def test_a_symmetric_sum_is_whole_wherever_it_is_read(at: int) -> None:
    x = torch.randn(48, 4, 300, generator=torch.Generator().manual_seed(0))
    whole, first, second, other = (RunningSum((300, 300), torch.float32) for _ in range(4))
    for rows in x:
        whole.add_gram(rows)
    for rows in x[:at]:
        first.add_gram(rows)
    second.load({name: t.clone() for name, t in first.state().items()})
    for rows in x[at:]:
        second.add_gram(rows)
        other.add_gram(rows)
    want = x.flatten(0, 1).double().T @ x.flatten(0, 1).double()
    first.join(other.state())
    for found in (whole.value("sum"), second.value("sum"), first.value("sum")):
        assert torch.equal(found, found.T)
        assert (found - want).abs().max() < SINGLE * want.abs().max()
    assert torch.equal(second.value("sum"), whole.value("sum"))


def test_float64_needs_no_master() -> None:
    running = RunningSum((3,), torch.float64)
    x = values(1000, torch.float64)
    for row in x:
        running.add(row)
    assert running.master is None
    want = x.sum(dim=0)
    assert ((running.value("sum") - want).abs() / want).max() < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at", [0, 1, 31, 32, 33, 100])
def test_a_loaded_sum_goes_on_bitwise(dtype: torch.dtype, at: int) -> None:
    x = values(150, dtype)
    whole, first, second = (RunningSum((3,), dtype) for _ in range(3))
    for row in x:
        whole.add(row)
    for row in x[:at]:
        first.add(row)
    second.load({name: t.clone() for name, t in first.state().items()})
    for row in x[at:]:
        second.add(row)
    assert torch.equal(second.value("sum"), whole.value("sum"))
    if dtype == torch.float32 and at == 31:
        # The control: a sum that forgets how many additions wait folds elsewhere.
        forgetful = RunningSum((3,), dtype)
        forgetful.load(first.state() | {"pending": torch.tensor(0)})
        for row in x[at:]:
            forgetful.add(row)
        assert not torch.equal(forgetful.part, whole.part)


def test_a_value_is_a_copy() -> None:
    running = RunningSum((2,), torch.float64)
    running.value("sum").add_(1)
    assert not running.value("sum").any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sum_that_is_not_finite_names_whose_it_is(bad: float) -> None:
    running = RunningSum((2,), torch.float32)
    running.add(torch.tensor([1.0, bad]))
    with pytest.raises(NumericalError, match="block layer"):
        running.value("block layer")


class Means(Sums):
    """A sum of rows, and how many they are."""

    def __init__(self) -> None:
        super().__init__(("mean",), torch.float64, torch.device("cpu"))
        self.sums["mean"] = RunningSum((3,), torch.float64)
        self.counts["mean"] = [0]

    def add(self, draws, counts=True):
        raise AssertionError("rows are put in by hand")

    def put(self, rows: torch.Tensor) -> None:
        self.sums["mean"].add(rows.sum(dim=0))
        self.count("mean", len(rows))


def test_joined_sums_have_the_counts_of_both() -> None:
    x = values(10, torch.float64)
    one, other = Means(), Means()
    one.put(x[:3])
    other.put(x[3:])
    one.join(other.state())
    assert one.counts == {"mean": [10]}
    assert torch.allclose(one.sums["mean"].part, x.sum(dim=0), rtol=1e-14)
