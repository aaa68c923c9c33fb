"""What is written is finite: a number that is none, or that its dtype does not hold, is named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from commands import classified
from torch import Tensor, nn

import raycurv
from raycurv.errors import NumericalError
from raycurv.files.store import open_store
from raycurv.files.tables import read_table, write_table
from raycurv.files.tensorfile import is_complete, open_tensors, write_tensors

HERE: dict[str, Any] = {"address": "none", "quiet": True}
METHODS = ("ekfac", "kfac", "diagonal", "identity", "mfac")


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.Linear(7, 3))


def rows_of(scale: float) -> list[dict[str, Any]]:
    """Rows of a regression, their numbers of that size."""
    rng = np.random.default_rng(0)
    return [
        {
            "id": f"row {n}",
            "inputs": (rng.normal(size=5) * scale).tolist(),
            "labels": (rng.normal(size=3) * scale).tolist(),
        }
        for n in range(6)
    ]


def scores(method: str, scale: float, place: Path, damping: str, **settings: Any) -> Any:
    rows, own = rows_of(scale), {"rows": 3} if method == "mfac" else {}
    run = raycurv.fit(
        linear, rows, place / "run", objective="regression", method=method, fisher="empirical",
        **HERE, **own, **settings,
    )  # fmt: skip
    return run.influence(
        rows, rows, place / "scores", damping=damping, self_influence=True, ihvp=True, rank="full",
        **HERE,
    )  # fmt: skip


SAYS = {
    "ekfac": "block 0: expected a finite sum",
    "diagonal": "block 0: expected a finite sum",
    "kfac": "block 0: expected 1 / (Λ + λ) that float32 holds",
    "identity": "example 'row 0': expected finite numbers in its scores",
    "mfac": "example 'row 0': expected finite numbers in its gradient_sq_norm",
}


@pytest.mark.parametrize("method", METHODS)
def test_numbers_beyond_float32_are_named_and_float64_is_the_remedy(
    method: str, tmp_path: Path
) -> None:
    with pytest.raises(NumericalError) as caught:
        scores(method, 1e15, tmp_path / "narrow", "0.1")
    assert SAYS[method] in str(caught.value) and "dtype" in caught.value.remedy
    written = list((tmp_path / "narrow").rglob("scores/*.parquet"))
    assert not written, "scores that are none"
    wide = scores(method, 1e15, tmp_path / "wide", "0.1", dtype="float64")
    assert np.isfinite(wide.table()["score"].to_numpy()).all() and wide.manifest.complete


def test_an_ihvp_that_overflows_names_block_and_query(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match="block 0, query 'row 0': expected finite numbers in"):
        scores("kfac", 1e9, tmp_path, "abs:1e-30")
    assert not list(tmp_path.rglob("ihvp/*.safetensors"))


class Silenced(nn.Module):
    """A network whose output, and so every gradient, is zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = 0.0 * self.outer(torch.tanh(self.inner(x)))
        return found


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_are_all_zero_give_zeros(method: str, tmp_path: Path) -> None:
    rows = classified(6)
    own = {"rows": 3} if method == "mfac" else {}
    run = raycurv.fit(
        Silenced, rows, tmp_path / "run", objective="classification", method=method, **HERE, **own
    )
    asked = {"rank": "full", "self_influence": True, "ihvp": True, **HERE}
    for damping in ("0.1", "0", "abs:1e-3"):
        found = run.influence(rows, rows, tmp_path / f"at {damping}", damping=damping, **asked)
        assert not np.any(found.table()["score"].to_numpy()), "a score of nothing"
    if method == "identity":
        return
    assert run.blocks()["eigh_outcome"].to_pylist() == ["zero", "zero"] or method == "kfac"
    pruned = run.prune(tmp_path / "pruned", **HERE)
    assert pruned.sparsity == pytest.approx(0.5, abs=0.02) and pruned.predicted == 0.0
    assert set(pruned.blocks()["update"].to_pylist()) == {"zero"}
    curvature = run.curvature("inner")
    assert float(curvature.trace) == 0.0


def test_a_table_refuses_what_is_no_number_with_the_name_of_its_row(tmp_path: Path) -> None:
    store = open_store(tmp_path / "out", "--out")
    for wrong in (math.nan, math.inf, -math.inf):
        table = pa.table({"id": ["a", "b"], "score": [1.0, wrong]})
        with pytest.raises(NumericalError, match=f"t.parquet, id 'b': .*`score`, got {wrong}"):
            write_table(store, "t.parquet", table)
        lists = pa.table({"block": ["a", "b", "c"], "s": [[[1.0], []], [], [[0.0], [wrong]]]})
        with pytest.raises(NumericalError, match="block 'c': expected finite numbers in `s`"):
            write_table(store, "t.parquet", lists)
    assert not store.exists("t.parquet")
    fine = pa.table({"id": ["a", "b"], "score": [1.0, None], "s": [[2.0], None]})
    write_table(store, "t.parquet", fine)
    assert read_table(store, "t.parquet").equals(fine)


def test_a_tensor_that_its_dtype_does_not_hold_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path / "out", "--out")
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.tensor([1.0, 1e300], dtype=torch.float64).to(dtype)
        with pytest.raises(NumericalError, match=r"block b, .*lam of "):
            write_tensors(store, "x.safetensors", {"lam": values}, {"block": "b"})
    assert not is_complete(store, "x.safetensors")
    # Large numbers are fine, though their sum is not; masks among hidden states may be infinite.
    large = torch.full((4,), 1.7e308, dtype=torch.float64)
    write_tensors(store, "x.safetensors", {"lam": large, "none": torch.zeros(0)}, {})
    assert torch.equal(open_tensors(store, "x.safetensors").read("lam"), large)
    write_tensors(store, "m.safetensors", {"mask": torch.tensor([-math.inf])}, {}, finite=False)


def test_losses_that_add_up_to_no_number_are_named(tmp_path: Path) -> None:
    # Each is finite in float64, and so is not their sum.
    rows = [{**row, "labels": [1.3e154, 0.0, 0.0]} for row in rows_of(1.0)]
    with pytest.raises(NumericalError, match="the losses of all examples"):
        raycurv.evaluate(linear, rows, tmp_path, objective="regression", dtype="float64", **HERE)
