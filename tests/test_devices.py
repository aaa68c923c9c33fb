"""Claims about devices, on a GPU that is only pretended: no tensor is left on the wrong one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CASES, Case, save_checkpoint
from pretended_gpu import GPU, OnGpu, pretended_gpu
from results import tables, tensors

import raycurv
from raycurv.mathematics.eigen import eigh
from raycurv.mathematics.sums import RunningSum

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with pretended_gpu(monkeypatch):
        yield


def test_what_a_gpu_refuses_is_refused(gpu: None) -> None:
    there, here = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
    assert there.device == GPU and (there.T @ there)[0].double().device == GPU
    for mixed in (
        lambda: there + here,
        lambda: here @ there,
        lambda: here.add_(there),
        lambda: torch.stack([here, there]),
        lambda: here[there.long()],
        lambda: there.numpy(),
    ):
        with pytest.raises((RuntimeError, TypeError), match=r"cuda|indexed"):
            mixed()
    there[here.long()[0], 0] = torch.tensor(3.0)  # an index and a number may be anywhere
    assert there.sum().item() == 6.0
    here[0].copy_(there[1])
    assert torch.equal(here.cpu()[0], there.cpu()[1])


def run(case: Case, methods: tuple[str, ...], place: Path, device: str) -> Path:
    """A case's results, from everything that computes on a stage's device."""
    model: Any = save_checkpoint(case, place / "model") if case.checkpoint else case.network
    how: dict[str, Any] = {
        "address": "none", "device": device, "quiet": True, "batch_tokens": case.batch_tokens,
    }  # fmt: skip
    cut: dict[str, Any] = {"stages": 2, "replicas": 2} if len(methods) > 1 else {}
    out, asked = place / "results", (list(case.queries), list(case.data[:7]))
    for method in methods:
        more: dict[str, Any] = {"rows": 4} if method == "mfac" else {"max_factor_dim": 8}
        fitted = raycurv.fit(
            model, asked[1], out / method, case.objective, method=method, dtype="float64",
            gradients=True, **more, **how, **cut,
        )  # fmt: skip
        fitted.influence(*asked, out / f"{method} full", rank="full", self_influence=True, **how)
        if cut:
            fitted.influence(*asked, out / f"{method} low", rank=1, per_block=True, **how, **cut)
            fitted.prune(out / f"{method} pruned", sparsity=0.5, first_order=True, **how)
    return out


@pytest.mark.parametrize(
    ("name", "methods"),
    [("mlp", ("ekfac", "mfac")), ("conv2d groups circular", ("kfac",)), ("llama", ("ekfac",))],
)
def test_a_gpu_computes_what_a_cpu_does(
    name: str, methods: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = run(BY_NAME[name], methods, tmp_path / "cpu", "cpu")
    # With one solver on both sides all kernels are the same, and so in float64 are the bits.
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: eigh(matrix.cpu()))
    with pretended_gpu(monkeypatch):
        there = run(BY_NAME[name], methods, tmp_path / "cuda", "cuda")
    for results in sorted(here.iterdir()):
        mine, theirs = tensors(there / results.name), tensors(results)
        assert mine.keys() == theirs.keys()
        assert [k for k in theirs if not torch.equal(mine[k], theirs[k])] == []
        for name, table in tables(results).items():
            assert tables(there / results.name)[name].equals(table), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_a_commit_come_back_to_the_gpu(gpu: None, dtype: torch.dtype) -> None:
    sums = [RunningSum((2, 2), dtype, torch.device("cuda")) for _ in range(3)]
    sums[0].add(torch.ones(2, 2, device="cuda"))
    state = {name: tensor.cpu() for name, tensor in sums[0].state().items()}
    sums[1].load(state)
    sums[1].join(state)
    assert sums[1].value("").device == GPU
    assert sums[1].value("").cpu().tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_a_gpu_decomposes_one_matrix_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch loads its solvers for the GPU in the first call, which must not be made twice at once.
    within: list[int] = []
    most: list[int] = []

    def solve(matrix: torch.Tensor) -> Any:
        within.append(1)
        most.append(len(within))
        found = original(matrix)
        within.pop()
        return found

    original = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", solve)
    matrices = [OnGpu(torch.eye(50, dtype=torch.float64)) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(eigh, matrices))
    assert most == [1] * 8
    assert all(w.device == GPU for w, _ in found)
