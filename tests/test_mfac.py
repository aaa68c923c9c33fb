"""M-FAC is the dense inverse of the rank-m Fisher, whoever holds which columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import snapshot
from dense import Truth, worst
from failures import timeline
from networks import DEEP, LLAMA, MLP, Case
from results import changed
from test_scores import by_id, own_scores
from torch import Tensor, nn

import raycurv
from raycurv.errors import NumericalError, UserError
from raycurv.files.row_files import open_rows
from raycurv.jobs import rank_products
from raycurv.mathematics.rank.rank_fisher import RankFisher
from raycurv.mathematics.rank.rank_inverse import rank_inverse

# Sums of a handful of gradients in float64.
EXACT = 1e-10
# The inverse loses eps · (largest eigenvalue / λ): at most 1e-16 · 1e2 / 1e-8, times some tens.
INVERSE = {1e-2: 1e-9, 1e-6: 1e-7, 1e-8: 1e-5}


def rows_of(
    truth: Truth, count: int, names: list[str] | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """``G`` by block, and whole ``[M, D]``: example n in row n mod m."""
    case = truth.case
    found = {}
    for name in names or truth.names:
        gradients = truth.gradients(name)
        rows = []
        for row in range(count):
            mine = [g for k, g in enumerate(gradients) if k % len(case.data) % count == row]
            rows.append(sum(mine) / len(mine) ** 0.5)
        found[name] = torch.stack(rows)
    return found, torch.cat([r.flatten(1) for r in found.values()], dim=1)


def dense_inverse(whole_MD: Tensor, damping: float) -> Tensor:
    fisher = whole_MD.T @ whole_MD / len(whole_MD)
    return torch.linalg.inv(fisher + damping * torch.eye(len(fisher), dtype=torch.float64))


def random_fisher(rows: int, size: int) -> RankFisher:
    """Two blocks, the second of (a multiple of) three columns."""
    torch.manual_seed(rows * size)
    g = torch.randn(rows, size, dtype=torch.float64)
    split = size // 2 - size // 2 % 3
    return RankFisher(
        {"a": g[:, : size - split].unsqueeze(1), "b": g[:, -split:].view(rows, -1, 3)}
    )


def joined(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.flatten() for p in parts.values()])


@pytest.mark.parametrize("count", [3, 9])
@pytest.mark.parametrize(
    ("case", "settings"),
    [
        (MLP, {}),
        (DEEP, {"stages": 3}),
        (LLAMA, {"draws": 2}),
        (LLAMA, {"fisher": "empirical"}),
        (MLP, {"fisher": "signs", "draws": 2}),
    ],
    ids=["mlp", "three stages", "two draws", "empirical", "signs"],
)
def test_rows_are_scaled_sums_of_explicit_gradients(
    fits, case: Case, settings: dict[str, Any], count: int
) -> None:
    count = min(count, len(case.data))
    changed = Case(
        case.name, case.network, case.data, case.objective, {**case.settings, **settings},
        case.checkpoint, case.batch_tokens,
    )  # fmt: skip
    run = fits.run(changed, method="mfac", rows=count)
    want, _ = rows_of(Truth(changed), count)
    for block in raycurv.run.read_blocks(run._store):
        rows = open_rows(run._store, block)
        assert worst(rows.whole(), want[block.name]) < EXACT
        flat = want[block.name].flatten(1)
        assert worst(rows.gram(), flat @ flat.T) < EXACT
        row = {r["block"]: r for r in run.blocks().to_pylist()}[block.name]
        assert row["trace"] == pytest.approx(float(flat.square().sum()) / count, rel=1e-9)


@pytest.mark.parametrize("damping", [1e-2, 1e-6, 1e-8])
@pytest.mark.parametrize(("rows", "size"), [(7, 40), (64, 40), (40, 40), (1, 40)])
def test_the_inverse_is_the_dense_inverse(rows: int, size: int, damping: float) -> None:
    fisher = random_fisher(rows, size)
    whole = torch.cat([r.flatten(1) for r in fisher.rows.values()], dim=1)
    want = dense_inverse(whole, damping)
    setting, tolerance = f"abs:{damping}", INVERSE[damping]
    x = {name: torch.randn(2, *r.shape[1:], dtype=torch.float64) for name, r in fisher.rows.items()}
    flat = torch.cat([v.flatten(1) for v in x.values()], dim=1)
    got = torch.cat([v.flatten(1) for v in fisher.apply(x, setting).values()], dim=1)
    assert worst(got, flat @ want) < tolerance
    assert worst(joined(fisher.diagonal(setting)), want.diag()) < tolerance
    split = fisher.rows["a"][0].numel()
    pairs = [(("a", 0, 2), ("b", 1, 2)), (("a", 0, 2), ("a", 0, 2)), (("b", 0, 1), ("b", 2, 0))]
    places = [(2, split + 5), (2, 2), (split + 1, split + 6)]
    for (first, second), (k, l) in zip(pairs, places, strict=True):
        found = fisher.element(first, second, setting)
        assert abs(found - want[k, l]) < tolerance * want.abs().max()


@pytest.mark.parametrize("damping", [1e-6, 1e-8])
def test_where_gradients_span_everything_small_elements_are_right_too(damping: float) -> None:
    # Relative to each element, which 1/λ less a number near it would miss by far.
    fisher = random_fisher(64, 40)
    whole = torch.cat([r.flatten(1) for r in fisher.rows.values()], dim=1)
    want = dense_inverse(whole, damping).diag()
    got = joined(fisher.diagonal(f"abs:{damping}"))
    assert float(((got - want) / want).abs().max()) < 1e-9
    # The inverse of C, formed: what one must not do.
    inner = torch.linalg.inv(whole @ whole.T / damping + 64 * torch.eye(64, dtype=torch.float64))
    formed = 1 / damping - (whole * (inner @ whole)).sum(dim=0) / damping**2
    assert float(((formed - want) / want).abs().max()) > 1e-5


def test_all_rows_count() -> None:
    fisher = random_fisher(7, 40)
    whole = torch.cat([r.flatten(1) for r in fisher.rows.values()], dim=1)
    got = joined(fisher.diagonal("abs:0.01"))
    for left_out in range(7):
        fewer = whole[[i for i in range(7) if i != left_out]]
        assert worst(got, dense_inverse(fewer, 0.01).diag()) > 1e-3


@pytest.mark.parametrize("size", [6, 40])
def test_a_window_that_moves_is_the_window_made_anew(size: int) -> None:
    fisher = random_fisher(9, size)
    kept = {name: r.clone() for name, r in fisher.rows.items()}
    for step in range(4):
        gradient = {n: torch.randn(r.shape[1:], dtype=torch.float64) for n, r in kept.items()}
        fisher.add(gradient)
        fisher.remove(step % 3)
        for name, rows in kept.items():
            grown = torch.cat([rows, gradient[name][None]])
            kept[name] = torch.cat([grown[: step % 3], grown[step % 3 + 1 :]])
    fresh = RankFisher(kept)
    assert len(fisher) == 9 and worst(fisher.gram, fresh.gram) < 1e-13
    assert worst(joined(fisher.diagonal("0.1")), joined(fresh.diagonal("0.1"))) < 1e-12


def settings_of(case: Case, **more: Any) -> dict[str, Any]:
    return {"method": "mfac", "rows": len(case.data) - 2} | more


@pytest.mark.parametrize("scope", ["model", "block"])
@pytest.mark.parametrize(
    ("case", "stages"), [(DEEP, 1), (DEEP, 2), (DEEP, 4), (LLAMA, 2)], ids=lambda v: str(v)[:12]
)
def test_ihvps_and_scores_are_dense_solves_whatever_the_stages(
    fits, case: Case, stages: int, scope: str
) -> None:
    run, truth = fits.run(case, **settings_of(case, stages=stages)), Truth(case)
    names = run.block_names()
    rows, whole = rows_of(truth, len(case.data) - 2, names)
    gradients = [torch.cat([g[n].flatten() for n in names]) for g in truth.own_gradients]
    if scope == "model":
        inverse = dense_inverse(whole, 0.1 * float(whole.square().sum()) / whole.numel())
    else:
        inverse = torch.block_diag(
            *(
                dense_inverse(rows[n].flatten(1), 0.1 * float(rows[n].square().mean()))
                for n in names
            )
        )
    out = fits.place()
    scores = run.influence(
        list(case.queries), list(case.data), out, quiet=True, address="none", rank="full",
        inverse=scope, stages=stages, self_influence=True, ihvp=True,
        batch_tokens=case.batch_tokens,
    )  # fmt: skip
    want = torch.stack([torch.stack([q @ inverse @ n for n in gradients]) for q in gradients[:3]])
    assert worst(by_id(scores, case), want) < 1e-9
    own = torch.stack([n @ inverse @ n for n in gradients])
    assert worst(own_scores(scores, case), own) < 1e-9
    made, at = raycurv.run.Products(scores._store), 0
    for name in names:
        size = rows[name][0].numel()
        dense = torch.stack([(inverse @ q)[at : at + size] for q in gradients[:3]])
        assert worst(made.block(name)[0].flatten(1), dense) < 1e-9
        at += size
    # The tasks that made them are in the timeline of the results.
    tasks = {row["operation"] for row in timeline(out) if row["phase"] == "IHVPs"}
    assert tasks >= {"apply_inverse", *(["project_gradients"] if scope == "model" else [])}


def test_a_truncated_product_is_the_truncation_of_the_whole_one(fits) -> None:
    run = fits.run(LLAMA, **settings_of(LLAMA))
    whole, low = (
        run.ihvp(list(LLAMA.queries), fits.place(), quiet=True, address="none", rank=rank)
        for rank in ("full", 2)
    )
    for name in run.block_names():
        full, _ = whole.block(name)
        u, s, v = torch.linalg.svd(full, full_matrices=False)
        best = (u[..., :2] * s[:, None, :2]) @ v[:, :2]
        assert worst(low.block(name)[0], best) < 1e-3


@pytest.mark.parametrize("how", [{"replicas": 2}, {"schedule": "swept"}, {"batch_tokens": 64}])
def test_rows_do_not_depend_on_how_they_were_gathered(fits, how: dict[str, Any]) -> None:
    plain = fits.run(DEEP, **settings_of(DEEP, stages=2))
    other = fits.run(DEEP, **settings_of(DEEP, stages=2, **how))
    for block in raycurv.run.read_blocks(plain._store):
        a, b = (open_rows(run._store, block).whole() for run in (plain, other))
        assert worst(a, b) < EXACT
    # Another number of rows makes other rows.
    fewer = fits.run(DEEP, method="mfac", rows=3)
    block = raycurv.run.read_blocks(plain._store)[0]
    first = open_rows(plain._store, block).whole()[:3]
    assert worst(open_rows(fewer._store, block).whole(), first) > 1e-3


def test_curvature_of_a_block_has_the_primitives_of_the_others(fits) -> None:
    run = fits.run(MLP, **settings_of(MLP))
    for name in run.block_names():
        block = run.curvature(name)
        dense = block.dense()
        x = torch.randn(2, block.block.d_out, block.block.d_in, dtype=torch.float64)
        for f in (lambda s: 1 / (s + 0.01), lambda s: s, torch.sqrt):
            values, vectors = torch.linalg.eigh(dense)
            whole = (vectors * f(values.clamp_min(0))) @ vectors.T
            assert worst(block.apply(x, f).flatten(1), x.flatten(1) @ whole) < 1e-6
            assert worst(block.diagonal(f).flatten(), whole.diag()) < 1e-6
        assert block.damping(raycurv.Damping(0.1)) == pytest.approx(
            0.1 * float(dense.diag().mean())
        )


def test_what_stages_tell_each_other_does_not_grow_with_the_parameters(fits, monkeypatch) -> None:
    def exchanged(width: int) -> int:
        case = Case(
            f"wide {width}", lambda: _seeded_mlp(width), MLP.data, "classification", {}, False, 4
        )
        run = fits.run(case, **settings_of(case, stages=2))
        told: list[int] = []

        def count(function: Any) -> Any:
            def counted(*args: Any) -> Any:
                found = function(*args)
                tensors = found if isinstance(found, tuple) else (found,)
                told.append(sum(t.nbytes for t in tensors))
                return found

            return counted

        for name in ("project_gradients", "apply_inverse"):
            monkeypatch.setattr(rank_products, name, count(getattr(rank_products, name)))
        run.ihvp(list(case.queries), fits.place(), quiet=True, address="none", stages=2)
        monkeypatch.undo()
        grams = sum(
            open_rows(run._store, b).gram().nbytes for b in raycurv.run.read_blocks(run._store)
        )
        return sum(told) + grams

    assert exchanged(12) == exchanged(48) > 0


def _seeded_mlp(width: int) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)).eval()


def test_more_rows_than_examples_are_refused(fits) -> None:
    with pytest.raises(UserError, match="at most 9"):
        fits.run(MLP, method="mfac", rows=10)
    with pytest.raises(UserError, match="--rows"):
        fits.run(MLP, rows=4)


def test_a_damping_too_small_is_refused_and_none_at_all_too(fits) -> None:
    run = fits.run(MLP, **settings_of(MLP))
    for damping, error, words in (
        ("abs:1e-30", NumericalError, "larger --damping"), ("0", UserError, "positive"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            run.ihvp(list(MLP.queries), fits.place(), quiet=True, address="none", damping=damping)
    torch.manual_seed(0)
    rows = torch.randn(5, 30, dtype=torch.float64)
    with pytest.raises(NumericalError, match="larger --damping"):
        rank_inverse(rows @ rows.T, 30, 1e-17, "it")
    rank_inverse(rows @ rows.T, 30, 1e-12, "it")


def test_float32_products_that_are_rounding_are_refused(fits) -> None:
    run = fits.run(MLP, **settings_of(MLP, dtype="float32"))
    asked = dict(quiet=True, address="none", rank="full")
    with pytest.raises(NumericalError, match="float32"):
        run.ihvp(list(MLP.queries), fits.place(), damping="abs:1e-9", **asked)
    made = run.ihvp(list(MLP.queries), fits.place(), damping="abs:1e-3", **asked)
    assert raycurv.run.Manifest.read(made._store).facts["residual"] < 1e-2


def test_a_fit_that_lost_rows_makes_them_again_and_no_others(fits) -> None:
    def fit(out: str) -> raycurv.Run:
        settings = settings_of(DEEP, address="none", dtype="float64", batch_tokens=4)
        data = list(DEEP.data)
        return raycurv.fit(DEEP.network, data, out, DEEP.objective, quiet=True, **settings)

    run = fit(fits.place())
    folder = Path(run.path)
    before = snapshot(folder)
    lost = folder / f"rows/{run.block_names()[1]}.safetensors"
    lost.write_bytes(b"no rows")
    fit(run.path)
    name = f"rows/{lost.name}"
    assert changed(before, folder) == {name, "tables/blocks/part-00000.parquet"}
    assert snapshot(folder)[name][1] == before[name][1]


@pytest.mark.parametrize("inverse", ["model", "block"])
def test_a_fisher_of_gradients_that_are_all_zero_has_products_and_scores_of_zero(
    inverse: str, tmp_path: Path
) -> None:
    def still() -> nn.Module:
        layer = nn.Linear(3, 2)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return nn.Sequential(layer).eval()

    here: dict[str, Any] = {"quiet": True, "address": "none"}
    rows = [{"inputs": [1.0, 2.0, float(n)], "labels": [0.0, 0.0]} for n in range(4)]
    run = raycurv.fit(
        still, rows, tmp_path / "run", objective="regression", method="mfac", rows=2,
        fisher="empirical", **here,
    )  # fmt: skip
    queries = [{"inputs": [1.0, 1.0, 1.0], "labels": [1.0, 2.0]}]
    how = here | {"inverse": inverse, "rank": "full", "self_influence": True, "ihvp": True}
    scores = run.influence(queries, rows, tmp_path / "scores", **how)
    products, _ = raycurv.Products(scores._store).block("0")
    assert products.shape == (1, 2, 4) and not products.any()
    assert not any(scores.table()["score"].to_pylist())
    assert not any(scores.self_influence()["score"].to_pylist())
