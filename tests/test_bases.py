"""Claims about ``--basis``: which factors are summed up, what is exact in them, and what is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import Truth, worst
from networks import CASES, DEEP, LLAMA, MIXER, MLP, REGRESSION, Case, vectors
from safetensors.torch import load_file
from torch import Tensor, nn

import raycurv
from raycurv import UserError
from raycurv.mathematics import gradient_factors
from raycurv.mathematics.tiles import tile_widths
from raycurv.stages.stage import Stage

# Sums of some dozen float64 products of numbers near 1.
EXACT = 1e-10
PASSES = 3
BASES = ("kfac", "weighted", "shampoo", "kronecker")
Pair = tuple[Tensor, Tensor]
_BY_NAME = {case.name: case for case in CASES}
SOME = [
    _BY_NAME[name] for name in ("mlp, two draws", "llama", "mixture of experts", "conv2d groups")
]


def settings(basis: str, **more: Any) -> dict[str, Any]:
    passes = {"basis_passes": PASSES} if basis == "kronecker" else {}
    return {"basis": basis} | passes | more


# The truth: G and A, and the Kronecker product that stands for the block's Fisher


def weighted(truth: Truth, name: str) -> Pair:
    total, rows = 0.0, 0
    for draw in truth.examined:
        for example in draw:
            a, g = example[name].a, example[name].g
            groups = len(a) // len(g) if len(g) else 1
            lengths = g.square().unflatten(1, (groups, -1)).sum(dim=2).flatten()
            total, rows = total + (a * lengths[:, None]).T @ a, rows + len(g)
    return truth.output_factor(name), torch.as_tensor(total) / max(1, rows)


def powers(steps: int, tile: int | None = None) -> Callable[[Truth, str], Pair]:
    def pair(truth: Truth, name: str) -> Pair:
        m = torch.stack(truth.gradients(name))
        left, right = (torch.eye(n, dtype=m.dtype) for n in m.shape[1:])
        cut = [
            torch.block_diag(*(torch.ones(t, t) for t in tile_widths(n, tile))) for n in m.shape[1:]
        ]
        for step in range(steps):
            if step:
                left, right = (x / (x.norm() or 1) for x in (left, right))
            left, right = (m @ right @ m.mT).mean(dim=0), (m.mT @ left @ m).mean(dim=0)
            left, right = left * cut[0], right * cut[1]
        return left, right

    return pair


PAIRS: dict[str, Callable[[Truth, str], Pair]] = {
    "weighted": weighted, "shampoo": powers(1), "kronecker": powers(PASSES),
}  # fmt: skip


def product(truth: Truth, name: str, basis: str, left: Tensor, right: Tensor) -> Tensor:
    size = float(left.norm() if basis == "kronecker" else left.trace())
    rows = truth.rows(name) / len(truth.case.data) if basis == "weighted" else 1.0
    return torch.kron(left, right) * (rows / size if size else 0.0)


@pytest.mark.parametrize("basis", PAIRS)
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_factors_and_their_product_are_what_the_basis_says(fits, case: Case, basis: str) -> None:
    run, truth = fits.run(case, **settings(basis, method="kfac")), fits.truth(case)
    for row in run.blocks().to_pylist():
        name = row["block"]
        pair = PAIRS[basis](truth, name)
        for factor, want in zip((f"{name}.output", f"{name}.input"), pair, strict=True):
            file = load_file(f"{run.path}/factors/{factor}.safetensors")
            assert worst(file["sum"] / max(1, int(file["count"])), want) < EXACT, factor
        want = product(truth, name, basis, *pair)
        assert worst(run.curvature(name).dense(), want) < EXACT, name
        assert row["input_factor"] == f"{name}.input" and row["tokens"] == truth.rows(name)
        assert abs(row["trace"] - float(want.trace())) < EXACT
        if basis != "kronecker":  # where one row is an example, or M is whole, the trace is F's
            exact = float(truth.fisher(name).trace())
            assert basis == "weighted" or abs(row["trace"] - exact) < EXACT


def test_of_tiles_it_is_the_nearest_product_among_those_in_tiles(fits) -> None:
    how = settings("kronecker", method="kfac", max_factor_dim=8)
    run, truth = fits.run(LLAMA, **how), fits.truth(LLAMA)
    for row in run.blocks().to_pylist():
        name = row["block"]
        want = product(truth, name, "kronecker", *powers(PASSES, 8)(truth, name))
        assert worst(run.curvature(name).dense(), want) < EXACT
    assert any(len(row["input_tiles"]) > 1 for row in run.blocks().to_pylist())


@pytest.mark.parametrize("rows", [True, False])
def test_through_rows_or_through_gradients_the_factors_are_the_same(
    fits, rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_factors, "through_rows", lambda *shape: rows)
    monkeypatch.setattr(gradient_factors, "CHUNK", 50)  # some examples at a time
    how = settings("kronecker", method="kfac")
    run, plain = fits.run(LLAMA, commit_seconds=1e6 + rows, **how), fits.run(LLAMA, **how)
    for name in run.block_names():
        assert worst(run.curvature(name).dense(), plain.curvature(name).dense()) < EXACT


def test_the_sum_of_corrected_eigenvalues_is_the_same_in_every_basis(fits) -> None:
    """Where several blocks read one tensor, which share A in ``kfac`` alone."""
    truth, plain = fits.truth(MIXER), fits.run(MIXER)
    for basis in BASES[1:]:
        run = fits.run(MIXER, **settings(basis))
        for row, before in zip(run.blocks().to_pylist(), plain.blocks().to_pylist(), strict=True):
            found, name = run.curvature(row["block"]), row["block"]
            assert abs(row["trace"] - before["trace"]) < EXACT * before["trace"]
            q_a, q_g = found.input_basis.dense(), found.output_basis.dense()
            assert worst(found.eigenvalues, truth.corrected(name, q_a, q_g)) < EXACT
            # The control: it is another basis.
            assert worst(q_a, plain.curvature(name).input_basis.dense()) > 1e-3


# What is exact


def test_of_two_classes_and_one_layer_weighted_kfac_is_the_fisher(fits) -> None:
    rows = [row | {"labels": row["labels"] % 2} for row in vectors(9, 5, "classes")]
    case = replace(MLP, name="two classes", data=tuple(rows))
    layer = nn.Sequential(nn.Linear(5, 2))
    case = replace(case, network=lambda: copy.deepcopy(layer))
    want = fits.truth(case).fisher("0")
    found = {b: fits.run(case, **settings(b, method="kfac")).curvature("0").dense() for b in BASES}
    assert worst(found["weighted"], want) < EXACT and worst(found["kfac"], want) > 1e-2
    # Of one direction of gradients it is also its own nearest Kronecker product.
    assert worst(found["kronecker"], want) < EXACT


def test_power_iteration_comes_to_the_nearest_kronecker_product(fits) -> None:
    case, truth = REGRESSION, fits.truth(REGRESSION)
    run = fits.run(case, basis="kronecker", basis_passes=16, method="kfac")
    few = {b: fits.run(case, **settings(b, method="kfac")) for b in ("shampoo", "kfac")}
    for name in run.block_names():
        want, block = truth.fisher(name), run.curvature(name).block
        d_out, d_in = block.d_out, block.d_in
        turned = want.view(d_out, d_in, d_out, d_in).transpose(1, 2).reshape(d_out**2, d_in**2)
        u, s, v = torch.linalg.svd(turned)
        best = s[0] * torch.kron(u[:, 0].view(d_out, d_out), v[0].view(d_in, d_in))
        assert worst(run.curvature(name).dense(), best) < 1e-7, name
        least = float((want - best).norm())
        errors = {b: float((want - r.curvature(name).dense()).norm()) for b, r in few.items()}
        assert all(error > 1.001 * least for error in errors.values()), (name, errors, least)


# However the passes run


@pytest.mark.parametrize(
    "how",
    [{"replicas": 2}, {"stages": 2, "schedule": "swept", "commit_seconds": 1e-9}],
    ids=["replicas", "swept"],
)
def test_a_power_iteration_does_not_depend_on_how_its_passes_run(fits, how: Any) -> None:
    run, plain = (fits.run(DEEP, **settings("kronecker", **h)) for h in (how, {}))
    for name in run.block_names():
        one, other = run.curvature(name), plain.curvature(name)
        assert worst(one.dense(), other.dense()) < EXACT


@pytest.mark.parametrize("microbatch", [5, 9])
def test_a_stopped_power_iteration_goes_on_where_it_stopped(
    fits, tmp_path: Path, microbatch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the passes, and the one of Λ, has three microbatches."""
    plain = fits.run(MLP, **settings("kronecker"))

    def fit() -> raycurv.Run:
        return raycurv.fit(
            MLP.network, list(MLP.data), tmp_path / "run", objective=MLP.objective, quiet=True,
            address="none", dtype="float64", batch_tokens=4, commit_seconds=1e-9,
            fisher="sampled", **settings("kronecker"),
        )  # fmt: skip

    seen, backward = [], Stage.backward

    def failing(self: Stage, *args: Any, **more: Any) -> Any:
        seen.append(args)
        if len(seen) == microbatch:
            raise KeyboardInterrupt
        return backward(self, *args, **more)

    monkeypatch.setattr(Stage, "backward", failing)
    with pytest.raises(KeyboardInterrupt):
        fit()
    run = fit()
    assert len(seen) <= 3 * (PASSES + 1) + 1  # the one that was stopped is done again
    lost = tmp_path / "run" / "eigen" / "0.input.safetensors"
    for damage in (lambda: None, lost.unlink):  # one factor takes the steps of both sides
        damage()
        fit()
        for name in run.block_names():
            assert torch.equal(run.curvature(name).dense(), plain.curvature(name).dense())
        assert not any((tmp_path / "run" / name).exists() for name in ("work", "factors"))


def test_sums_of_gradients_are_merged_and_runs_extended(fits) -> None:
    case, (first, rest) = MLP, (MLP.data[:4], MLP.data[4:])
    own = {"address": "none", "dtype": "float64", "keep_sums": True, "quiet": True}
    own |= {"fisher": "sampled"}

    def fit(data: Any = None, **more: Any) -> raycurv.Run:
        return raycurv.fit(
            case.network, data, fits.place(), objective=case.objective, **own, **more
        )

    for basis in ("shampoo", "weighted"):
        parts = [fit(list(rows), basis=basis) for rows in (first, rest)]
        merged = fit(basis=basis, merge=[part.path for part in parts])
        whole = fits.run(case, basis=basis)
        for name in whole.block_names():
            assert worst(merged.curvature(name).dense(), whole.curvature(name).dense()) < EXACT
    part = fit(list(first), **settings("kronecker"))
    more = fit(list(rest), extend=part.path, **settings("kronecker"))
    assert more.curvature("0").block == part.curvature("0").block
    assert (
        worst(more.curvature("0").input_basis.dense(), part.curvature("0").input_basis.dense()) == 0
    )
    with pytest.raises(UserError, match="--basis was 'weighted' and is now 'kfac'"):
        raycurv.fit(case.network, list(case.data), merged.path, objective=case.objective, **own)
    with pytest.raises(UserError, match="weighted theirs"):
        fit(merge=[part.path, part.path], **settings("kronecker"))
    with pytest.raises(UserError, match="Give --basis kronecker --basis-passes 3"):
        fit(list(rest), extend=part.path, basis="shampoo")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"basis": "shampoo", "method": "mfac"}, "--method ekfac or kfac"),
        ({"basis": "weighted", "method": "diagonal"}, "--method ekfac or kfac"),
        ({"basis": "shampoo", "basis_passes": 3}, "--basis kronecker"),
        ({"basis": "kronecker", "basis_passes": 1}, "--basis shampoo"),
        ({"basis": "shampoo", "share_output_factor": True}, "--share-output-factor"),
        ({"basis": "shampoo", "blocks": ("*.input_layernorm",)}, "diagonal ones alone"),
        ({"basis": "curved"}, "kronecker"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_basis_that_does_not_apply_is_refused(fits, given: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        fits.run(LLAMA, **given)
