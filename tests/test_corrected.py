"""Λ, losses, norms and drawn labels are what their definitions say, example by example."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from dense import worst
from networks import CASES, LLAMA, MIXER, MLP, REGRESSION, Case

from raycurv.mathematics.eigen import Eigenbasis

# Sums of some dozen float64 products; the basis is taken as it is stored.
EXACT = 1e-10
# The stored basis is rounded to float32, and rows are turned in float32.
SINGLE = 1e-5


def bases(run: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    curvature = run.curvature(name)
    return curvature.input_basis.dense(), curvature.output_basis.dense()


def recorded_labels(run: Any) -> list[np.ndarray]:
    rows = pq.read_table(f"{run.path}/labels/part-00000.parquet").to_pylist()
    return [np.array(row["drawn"]).reshape(row["shape"]) for row in rows]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_corrected_eigenvalues_are_mean_squares_of_the_rotated_gradients(fits, case: Case) -> None:
    run, truth = fits.run(case), fits.truth(case)
    for name in run.block_names():
        want = truth.corrected(name, *bases(run, name))
        assert worst(run.curvature(name).eigenvalues, want) < EXACT, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_mean_gradient_norm_is_the_sum_of_traces_and_each_is_the_examples_own(
    fits, case: Case
) -> None:
    run, truth = fits.run(case), fits.truth(case)
    got = torch.tensor(run.examples()["gradient_sq_norm"].to_pylist(), dtype=torch.float64)
    want = torch.zeros(case.draws, len(case.data), dtype=torch.float64)
    for name in run.block_names():
        norms = [float((gradient**2).sum()) for gradient in truth.gradients(name)]
        want += torch.tensor(norms, dtype=torch.float64).view_as(want)
    assert worst(got, want.mean(dim=0)) < EXACT
    trace = sum(run.blocks()["trace"].to_pylist())
    assert abs(float(got.mean()) - trace) < EXACT * trace


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_are_summed_over_the_examples_own_targets(fits, case: Case) -> None:
    got = torch.tensor(fits.run(case).examples()["loss"].to_pylist(), dtype=torch.float64)
    assert worst(got, fits.truth(case).losses()) < EXACT


@pytest.mark.parametrize("case", [c for c in CASES if not c.empirical], ids=lambda case: case.name)
def test_drawn_labels_are_the_counters(fits, case: Case) -> None:
    truth = fits.truth(case)
    for n, got in enumerate(recorded_labels(fits.run(case))):
        row = case.data[n]
        for draw in range(case.draws):
            want = np.array(truth.labels[draw][n])
            if "input_ids" in row and not truth.of_texts:
                where = truth.targets(row)
                assert got[draw][where].tolist() == want[where].tolist()
            else:
                # Gaussian labels: another implementation of the normal quantile.
                assert np.allclose(got[draw], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [MLP, MIXER, LLAMA], ids=lambda case: case.name)
def test_sum_of_eigenvalues_is_the_same_in_any_orthonormal_basis(
    fits, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(name: str, tiles: Any, dtype: torch.dtype, *_: Any) -> Eigenbasis:
        generator = torch.Generator().manual_seed(len(name))
        normal = torch.randn(tiles[0].shape, generator=generator, dtype=torch.float64)
        q = torch.linalg.qr(normal).Q.contiguous()
        return Eigenbasis((q.to(dtype),), (torch.ones(len(q), dtype=torch.float64),))

    fitted = fits.run(case).blocks().to_pylist()
    monkeypatch.setattr("raycurv.steps.decompositions.decompose", elsewhere)
    run = fits.run(case, commit_seconds=1e6)  # a run of its own
    truth = fits.truth(case)
    for before, after in zip(fitted, run.blocks().to_pylist(), strict=True):
        name = before["block"]
        assert abs(after["trace"] - before["trace"]) < EXACT * before["trace"]
        got = run.curvature(name).eigenvalues
        assert worst(got, truth.corrected(name, *bases(run, name))) < EXACT
        # The control: it is another basis, in which Λ is another.
        assert worst(got.sort()[0], fits.run(case).curvature(name).eigenvalues.sort()[0]) > 1e-3


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("case", [MLP, REGRESSION, LLAMA], ids=lambda case: case.name)
def test_the_diagonal_method_is_the_diagonal_of_the_fisher(fits, case: Case, fisher: str) -> None:
    changed = Case(**{**vars(case), "settings": {**case.settings, "fisher": fisher}})
    run, truth = fits.run(changed, method="diagonal"), fits.truth(case)
    for name in run.block_names():
        gradients = (
            truth.gradients(name)
            if fisher == "sampled"
            else [own[name] for own in truth.own_gradients]
        )
        want = sum(g**2 for g in gradients) / len(gradients)
        assert worst(run.curvature(name).eigenvalues, want) < EXACT


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("case", [MLP, MIXER, LLAMA], ids=lambda case: case.name)
def test_the_order_of_multiplication_does_not_change_the_numbers(
    fits, case: Case, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def chosen(*shape: int) -> bool:
        calls.append(shape)
        return before

    monkeypatch.setattr("raycurv.mathematics.gradients.rotate_before", chosen)
    run = fits.run(case, commit_seconds=2e6 + before)
    for name in run.block_names():
        want = fits.truth(case).corrected(name, *bases(run, name))
        assert worst(run.curvature(name).eigenvalues, want) < EXACT
    assert calls


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("case", [MLP, LLAMA], ids=lambda case: case.name)
def test_wide_factors_are_cut_and_lambda_stays_whole(fits, case: Case, width: int) -> None:
    run, truth = fits.run(case, max_factor_dim=width), fits.truth(case)
    for row in run.blocks().to_pylist():
        name = row["block"]
        assert max(row["input_tiles"] + row["output_tiles"]) <= width
        assert sum(row["input_tiles"]) == row["d_in"] and sum(row["output_tiles"]) == row["d_out"]
        q_a, q_g = bases(run, name)
        a = truth.input_factor(name)
        tiles = run.curvature(name).input_tiles
        assert [len(tile) for tile in tiles] == row["input_tiles"]
        assert [i for tile in tiles for i in tile] == list(range(row["d_in"]))
        for tile in tiles:
            part = slice(tile.start, tile.stop)
            turned = q_a[:, part].T @ a @ q_a[:, part]
            assert float((turned - turned.diag().diag()).abs().max()) < EXACT * float(a.max())
            outside = torch.cat([q_a[: part.start, part], q_a[part.stop :, part]])
            assert not outside.any()
        lam = run.curvature(name).eigenvalues
        assert worst(lam, truth.corrected(name, q_a, q_g)) < EXACT


@pytest.mark.parametrize("case", [MLP, LLAMA], ids=lambda case: case.name)
def test_float32_holds_the_trace(fits, case: Case) -> None:
    single, double = fits.run(case, dtype="float32"), fits.run(case)
    got = torch.tensor(single.blocks()["trace"].to_pylist(), dtype=torch.float64)
    want = torch.tensor(double.blocks()["trace"].to_pylist(), dtype=torch.float64)
    assert worst(got, want) < SINGLE
