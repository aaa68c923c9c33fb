"""What hooks see: shared inputs, in-place operations, rows that cannot be told apart."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from dense import worst
from networks import Mixer
from results import assert_same
from torch import Tensor, nn

import raycurv
from raycurv.batch import Batch
from raycurv.errors import NumericalError, RaycurvError, UserError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Capture, Captured, Record, check_finite
from raycurv.mathematics.choice import choose_blocks
from raycurv.mathematics.factors import FactorSums

DOUBLE = torch.float64


class Module(nn.Module):
    """Two layers and a forward of the test's own."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self._run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self, x)


def batch_of(x: Tensor, mask: Tensor | None = None) -> Batch:
    return Batch(0, tuple(f"row {n}" for n in range(len(x))), x, mask=mask)


def captured(module: nn.Module, x: Tensor, mask: Tensor | None = None) -> tuple[Capture, Captured]:
    """One forward of the module and a backward of the sum of squares of its output."""
    module = module.double().eval().requires_grad_(False)
    capture = Capture(module, choose_blocks(module, ()))
    record = Record(batch_of(x, mask))
    with capture.recording(record):
        out = module(x)
    blocks = capture.discover(record)
    capture.blocks = {block.name: block for block in blocks}
    if out.requires_grad:
        out.square().sum().backward()
    return capture, capture.captured(record)


def rows(count: int = 4) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)


def test_an_input_changed_in_place_after_its_capture_is_an_error_that_names_the_block() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        hidden = m.a(x)
        return m.b(hidden) + hidden.tanh_()

    with pytest.raises(RaycurvError, match=r"block b.*in-place"):
        captured(Module(forward), rows())


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)], ids=str)
def test_an_output_changed_in_place_keeps_the_gradient_of_what_it_was(
    shape: tuple[int, ...],
) -> None:
    def inplace(m: nn.Module, x: Tensor) -> Tensor:
        return torch.relu_(m.b(torch.relu_(m.a(x))))

    def plain(m: nn.Module, x: Tensor) -> Tensor:
        return torch.relu(m.b(torch.relu(m.a(x))))

    torch.manual_seed(0)
    one = Module(inplace)
    other = Module(plain)
    other.load_state_dict(one.state_dict())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    (_, got), (_, want) = captured(one, x), captured(other, x)
    for name in ("a", "b"):
        assert want.gradients[name] is not None
        assert torch.equal(got.gradients[name], want.gradients[name])
        assert torch.equal(got.inputs[f"{name}.input"], want.inputs[f"{name}.input"])


def test_layers_over_positions_may_be_followed_by_an_operation_in_place(tmp_path: Path) -> None:
    def network(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(3, 5), nn.ReLU(inplace), nn.Linear(5, 5), nn.ReLU(inplace),
            nn.Linear(5, 4), nn.Flatten(),
        )  # fmt: skip

    rows = [{"inputs": x.tolist(), "labels": n} for n, x in enumerate(torch.randn(6, 2, 3))]
    for name, inplace in (("in place", True), ("plain", False)):
        raycurv.fit(
            partial(network, inplace), rows, tmp_path / name, objective="classification",
            address="none", quiet=True, gradients=True,
        )  # fmt: skip
    assert_same(tmp_path / "in place", tmp_path / "plain")


def test_blocks_that_read_one_tensor_share_a_factor_when_their_columns_agree() -> None:
    mixer = Mixer(3).double()
    capture, found = captured(mixer, torch.randn(2, 4, 3, dtype=DOUBLE))
    factors = {name: block.input_factor for name, block in capture.blocks.items()}
    assert factors == {"q": "q.input", "k": "k.input", "v": "q.input", "o": "o.input"}
    assert set(found.inputs) == {"q.input", "k.input", "o.input"}


def test_equal_values_in_different_tensors_are_not_shared() -> None:
    capture, _ = captured(Module(lambda m, x: m.a(x) + m.b(x.clone())), rows())
    assert {b.input_factor for b in capture.blocks.values()} == {"a.input", "b.input"}
    capture, _ = captured(Module(lambda m, x: m.a(x) + m.b(x)), rows())
    assert {b.input_factor for b in capture.blocks.values()} == {"a.input"}


def test_sharing_that_ends_in_a_later_microbatch_is_an_error() -> None:
    module = Module(lambda m, x: m.a(x) + m.b(x if len(x) == 4 else x.clone())).double()
    capture, _ = captured(module, rows())
    record = Record(batch_of(rows(2)))
    with capture.recording(record):
        module(rows(2))
    with pytest.raises(RaycurvError, match=r"input factor a\.input.*a, b"):
        capture.captured(record)


def test_rows_that_mix_examples_are_an_error_that_names_the_block() -> None:
    module = Module(lambda m, x: m.a(m.b(x).flatten().view(-1, 3)[:2]).sum() + m.b(x))
    with pytest.raises(UserError, match=r"block a.*first of 2 or more axes is the 4 examples"):
        captured(module, rows())


def test_a_layer_that_no_gradient_reaches_has_none() -> None:
    _, found = captured(Module(lambda m, x: m.a(x) + m.b(x).detach()), rows())
    assert found.gradients["a"] is not None and found.gradients["b"] is None


def test_a_layer_that_is_not_called_has_neither_rows_nor_gradient() -> None:
    _, found = captured(Module(lambda m, x: m.a(x)), rows())
    assert "b.input" not in found.inputs and found.gradients["b"] is None


def test_padding_leaves_rows_of_zeros_that_do_not_count() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.randn(2, 3, 3, dtype=DOUBLE)
    _, found = captured(Module(lambda m, y: m.b(m.a(y).tanh()) * mask[..., None]), x, mask)
    for tensor in (*found.inputs.values(), *found.gradients.values()):
        assert not tensor[~mask].any() and tensor[mask].any(dim=1).all()
    assert found.rows == {"a.input": 3, "b.input": 3}


@pytest.mark.parametrize("flat", [True, False])
def test_rows_of_positions_do_not_depend_on_where_their_axis_is(flat: bool) -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    x = torch.randn(2, 4, 2, 3, dtype=DOUBLE)  # [N, T, H, d]
    live = mask.double()[..., None, None]  # no loss is of padding
    plain = Module(lambda m, y: (m.a(y) * live).sum())
    moved = Module(
        lambda m, y: (
            (m.a(y.flatten(0, 1)) * live.flatten(0, 1)).sum()
            if flat
            else (m.a(y.transpose(1, 2)) * live.transpose(1, 2)).sum()
        )
    )
    moved.load_state_dict(plain.state_dict())
    (_, want), (_, got) = captured(plain, x, mask), captured(moved, x, mask)
    assert got.rows["a.input"] == want.rows["a.input"] == int(mask.sum()) * 2
    assert torch.equal(got.inputs["a.input"], want.inputs["a.input"])
    assert worst(got.gradients["a"], want.gradients["a"]) < 1e-12  # sums in another order


def test_hooks_come_off_again_and_hold_nothing() -> None:
    module = Module(lambda m, x: m.b(m.a(x)))
    capture = Capture(module, choose_blocks(module, ()))
    assert all(len(m._forward_hooks) == 1 for m in (module.a, module.b))
    assert not any(p.requires_grad for p in module.parameters())
    capture.close()
    assert not any(m._forward_hooks for m in (module.a, module.b))
    assert all(p.requires_grad for p in module.parameters())
    capture = Capture(module, choose_blocks(module, ()))
    del capture
    gc.collect()
    assert module(torch.randn(1, 3)).shape == (1, 3)


def test_outside_a_recording_nothing_is_captured() -> None:
    module = Module(lambda m, x: m.b(m.a(x))).double()
    capture = Capture(module, choose_blocks(module, ()))
    record = Record(batch_of(rows()))
    module(rows())
    assert not record.calls
    with capture.recording(record):
        module(rows())
    assert set(record.calls) == {"a", "b"}


def test_a_module_of_two_outputs_is_refused_by_name() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    module = nn.Sequential(Pair(3, 3))
    with pytest.raises(UserError, match=r"block 0.*tuple"):
        captured(module, rows())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_an_input_that_is_not_finite_names_the_example(bad: float) -> None:
    x = torch.ones(4, 3)
    x[2] = bad
    found = Captured(
        batch_of(x), {"layer.input": x[:, None]}, {"layer": torch.ones(4, 1, 1)}, {"layer.input": 4}
    )
    with pytest.raises(NumericalError, match=r"layer\.input.*'row 2'"):
        check_finite(found)


class Root(torch.nn.Module):
    """Finite everywhere, with an infinite derivative at 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp_min(0).sqrt()


def test_a_gradient_that_is_not_finite_ends_any_pass_with_the_examples_name(tmp_path) -> None:
    def network() -> torch.nn.Module:
        layer = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(layer.weight)
        return torch.nn.Sequential(layer, Root())

    rows = [{"id": name, "inputs": [x], "labels": [2.0]} for name, x in (("a", 1.0), ("b", 0.0))]
    for method in ("diagonal", "ekfac"):
        with pytest.raises(NumericalError, match="example 'b'"):
            raycurv.fit(
                network, rows, tmp_path / method, objective="regression", method=method,
                fisher="empirical", address="none", quiet=True,
            )  # fmt: skip
    run = raycurv.fit(
        network, rows[:1], tmp_path / "one", objective="regression", address="none", quiet=True
    )
    with pytest.raises(NumericalError, match="example 'b'"):
        run.influence(rows[:1], rows, tmp_path / "scores", address="none", quiet=True)


def test_factor_sums_go_on_from_a_commit_bitwise() -> None:
    block = Block("layer", "linear", 3, 3, False, input_factor="layer.input")

    def fresh() -> FactorSums:
        return FactorSums((block,), torch.float32, torch.device("cpu"))

    def one(n: int) -> list[Captured]:
        x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(n))
        return [Captured(batch_of(x), {"layer.input": x}, {"layer": x + 1}, {"layer.input": 10})]

    whole, first, second = fresh(), fresh(), fresh()
    for n in range(70):
        whole.add(one(n))
    for n in range(40):
        first.add(one(n))
    second.load({name: t.clone() for name, t in first.state().items()})
    for n in range(40, 70):
        second.add(one(n))
    for got, want in ((second.result(n), whole.result(n)) for n in whole.names):
        assert got.count == want.count and got.rows == want.rows
        assert torch.equal(got.tiles[0], want.tiles[0])


def test_unit_rows_make_unit_factors() -> None:
    # The scale once, by hand: two examples of one row each.
    block = Block("layer", "linear", 2, 1, False, input_factor="layer.input")
    sums = FactorSums((block,), DOUBLE, torch.device("cpu"))
    a = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]], dtype=DOUBLE)
    g = torch.tensor([[[3.0]], [[1.0]]], dtype=DOUBLE)
    sums.add([Captured(batch_of(a), {"layer.input": a}, {"layer": g}, {"layer.input": 2})])
    found = {name: sums.result(name).mean()[0] for name in sums.names}
    assert worst(found["layer.input"], torch.tensor([[0.5, 0], [0, 2.0]], dtype=DOUBLE)) == 0
    assert worst(found["layer.output"], torch.tensor([[5.0]], dtype=DOUBLE)) == 0
