"""Claims about gradient statistics: equal to explicit per-example gradients, however they are run.

Tolerances are max |difference| over max |reference|; float64 sums in another order agree to 1e-10.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
import torch
from commands import EXACT_FIT, classified, classifier, run_here, snapshot, write_rows
from dense import Truth, worst
from networks import CASES, LENGTHS, MIXER, MLP, REGRESSION, VOCAB, Case, sentences
from results import CLOSE, assert_same, changed, tables, tensors
from stops import stopped, stopped_everywhere
from torch import Tensor, nn

import raycurv
from raycurv.mathematics.gradient_statistics import GradientNumbers, GradientSum
from raycurv.stages.stage import Stage
from raycurv.stages.transport import pack, unpack

torch.set_num_threads(1)

OWN, SAMPLED = ("mean", "mean_square"), ("mean_square_sampled", "gauss_newton_bartlett")
ROWS = classified(11)
SWEPT: dict[str, Any] = {"schedule": "swept", "stages": 3}
# Files that only --gradients makes; the small tables beside them are written again.
THEIRS = ("gradients/", "tables/gradients/", "tables/gradient_norms/")


# Padding, prompts that are no targets, an example of one token, and a head that sees slices.
MASKED = replace(
    MIXER,
    name="q/k/v, masked",
    data=sentences(LENGTHS, True),
    settings=MIXER.settings | {"draws": 2, "logits_chunk": 2 * VOCAB},
)


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def fit(out: Path, **settings: Any) -> raycurv.Run:
    return raycurv.fit(classifier, ROWS, out, **(EXACT_FIT | settings))


def numbers(values: Any) -> Tensor:
    return torch.tensor(values.to_pylist(), dtype=torch.float64)


def own(truth: Truth, name: str) -> Tensor:
    """``[N, O, I]``, one gradient an example with the data's own labels."""
    return torch.stack([found[name] for found in truth.own_gradients])


def drawn(truth: Truth, name: str) -> Tensor:
    """``[D, N, O, I]``, with the labels of each draw."""
    return torch.stack([torch.stack([e[name].gradient for e in d]) for d in truth.examined])


# Numbers

HOW: tuple[dict[str, Any], ...] = (
    {},
    {"stages": 2, "batch_tokens": 1},
    SWEPT | {"method": "diagonal", "batch_tokens": 4096},
    {"stages": 2, "replicas": 2, "method": "identity"},
)
SOME = (
    MLP, REGRESSION, MASKED, named("mlp, empirical"), named("q/k/v, empirical"),
)  # fmt: skip
# Modules that are not cut into stages, or into two at most.
WHOLE = (named("layer called twice"), named("conv2d stride"), named("conv2d groups"))
MADE = [(case, how) for case in SOME for how in HOW] + [(case, HOW[0]) for case in WHOLE]


@pytest.mark.parametrize(("case", "how"), MADE, ids=lambda value: getattr(value, "name", value))
def test_statistics_are_those_of_explicit_gradients(fits, case: Case, how: dict[str, Any]) -> None:
    run, truth, count = fits.run(case, gradients=True, **how), fits.truth(case), len(case.data)
    table = run.gradients().to_pylist()
    assert [row["block"] for row in table] == run.block_names()
    norms_NB = []
    for row in table:
        name, found = row["block"], run.gradient(row["block"])
        g_NOI = own(truth, name)
        assert worst(found.mean, g_NOI.mean(dim=0)) < CLOSE
        assert worst(found.mean_square, g_NOI.square().mean(dim=0)) < CLOSE
        assert found.examples == row["examples"] == count and found.batches == row["batches"]
        norms_NB.append(g_NOI.flatten(1).square().sum(dim=1))
        # The trace of the covariance, coordinate by coordinate.
        noise = float(g_NOI.var(dim=0, unbiased=True).sum())
        signal = float(g_NOI.mean(dim=0).square().sum()) - noise / count
        for key, want in {
            "mean_sq_norm": float(g_NOI.mean(dim=0).square().sum()),
            "sq_norm": float(norms_NB[-1].mean()),
            "fisher_trace_empirical": float(norms_NB[-1].mean()),
            "noise": noise,
            "signal": signal,
        }.items():
            # A signal is a difference, as exact as what it is the difference of.
            assert row[key] == pytest.approx(want, rel=1e-7, abs=CLOSE * noise), key
        if signal > 0:
            assert row["noise_scale"] == pytest.approx(noise / signal, rel=1e-7)
        else:
            assert row["noise_scale"] is None
        if case.empirical:
            assert found.mean_square_sampled is None and found.gauss_newton_bartlett is None
            assert row["fisher_trace_sampled"] is row["gauss_newton_bartlett_trace"] is None
        else:
            s_DNOI = drawn(truth, name)
            assert worst(found.mean_square_sampled, s_DNOI.square().mean(dim=(0, 1))) < CLOSE
            assert row["fisher_trace_sampled"] == pytest.approx(
                float(s_DNOI.square().mean(dim=(0, 1)).sum()), rel=CLOSE
            )
            assert row["gauss_newton_bartlett_trace"] == pytest.approx(
                float(found.gauss_newton_bartlett.sum()), rel=CLOSE
            )
    norms = run.gradient_norms()
    assert norms["id"].to_pylist() == [row["id"] for row in case.data]
    assert worst(numbers(norms["block_sq_norms"]), torch.stack(norms_NB, dim=1)) < CLOSE
    assert worst(numbers(norms["sq_norm"]), torch.stack(norms_NB).sum(dim=0)) < CLOSE
    said = json.loads(norms.schema.metadata[b"raycurv.blocks"])
    assert said == run.block_names()
    whole = run.manifest.facts["gradients"]
    for key in ("mean_sq_norm", "sq_norm", "noise", "signal"):
        assert whole[key] == pytest.approx(sum(row[key] for row in table), rel=1e-7)


@pytest.mark.parametrize("case", [MLP, MASKED], ids=lambda c: c.name)
def test_microbatches_are_only_seen_by_the_bartlett_estimate(fits, case: Case) -> None:
    alone, some, one = (
        fits.run(case, gradients=True, batch_tokens=tokens)
        for tokens in (1, case.batch_tokens, 4096)
    )
    count, truth = len(case.data), fits.truth(case)
    for name in alone.block_names():
        a, b, c = (run.gradient(name) for run in (alone, some, one))
        assert (a.batches, c.batches) == (count, 1) and 1 < b.batches < count
        for kind in (*OWN, SAMPLED[0]):
            assert worst(getattr(b, kind), getattr(a, kind)) < CLOSE
            assert worst(getattr(c, kind), getattr(a, kind)) < CLOSE
        # Examples by themselves are the mean square; all together the square of their sum.
        s_DNOI = drawn(truth, name)
        assert worst(a.gauss_newton_bartlett, a.mean_square_sampled) < CLOSE
        want = s_DNOI.sum(dim=1).square().mean(dim=0) / count
        assert worst(c.gauss_newton_bartlett, want) < CLOSE
        # The control: it is another number, whose expectation alone is the same.
        assert worst(c.gauss_newton_bartlett, a.gauss_newton_bartlett) > 1e-2
        assert worst(b.gauss_newton_bartlett, a.gauss_newton_bartlett) > 1e-2


def small() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def gauss_newton_diagonal(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Of the mean loss: diagonals of Jᵀ (diag p − p pᵀ) J, exactly, block by block."""
    network = small().double()
    total = {name: 0.0 for name in ("0", "2")}
    for row in rows:
        logits = network(torch.tensor(row["inputs"], dtype=torch.float64))
        p = logits.softmax(dim=0).detach()
        hessian = torch.diag(p) - torch.outer(p, p)
        jacobian: dict[str, list[Tensor]] = {name: [] for name in total}
        for logit in logits:
            for name in total:
                layer = network.get_submodule(name)
                weight, bias = torch.autograd.grad(
                    logit, (layer.weight, layer.bias), retain_graph=True
                )
                jacobian[name].append(torch.cat([weight, bias[:, None]], dim=1))
        for name, found in jacobian.items():
            j = torch.stack(found)
            total[name] = total[name] + torch.einsum("coi,cd,doi->oi", j, hessian, j) / len(rows)
    return total


def test_bartlett_converges_to_the_gauss_newton_diagonal_at_the_rate_of_its_draws(
    tmp_path: Path,
) -> None:
    rows = [{"id": row["id"], "inputs": row["inputs"][:3], "labels": row["labels"]} for row in ROWS]
    want = gauss_newton_diagonal(rows)
    seeds, error = range(4), {}
    for draws in (16, 256):
        for seed in seeds:
            run = raycurv.fit(
                small, rows, tmp_path / f"{draws}-{seed}", draws=draws, seed=seed,
                gradients=True, method="identity", **(EXACT_FIT | {"batch_tokens": 4096}),
            )  # fmt: skip
            for kind in SAMPLED:
                off = sum(
                    float((getattr(run.gradient(n), kind) - w).square().sum())
                    for n, w in want.items()
                )
                error[kind, draws] = error.get((kind, draws), 0.0) + off / len(seeds)
    size = sum(float(w.square().sum()) for w in want.values())
    for kind in SAMPLED:
        few, many = (math.sqrt(error[kind, draws] / size) for draws in (16, 256))
        # Sixteen times the draws, a quarter of the error; the quotient of two estimates from four
        # seeds each, of coordinates that move together, is within a factor of two of that.
        assert 2 < few / many < 8, kind
        assert many < 0.15, kind
    # One microbatch of eleven examples has more noise than eleven gradients apart.
    assert error[SAMPLED[1], 16] > error[SAMPLED[0], 16]


def test_noise_and_signal_are_unbiased(fits) -> None:
    """The mean of an unbiased estimate over all subsets is the estimate of the whole, exactly."""
    g_NP = own(fits.truth(MLP), "0").flatten(1)

    def estimate(rows: Tensor) -> GradientNumbers:
        mean = float(rows.mean(dim=0).square().sum())
        return GradientNumbers(len(rows), mean, float(rows.square().sum(dim=1).mean()))

    whole = estimate(g_NP)
    parts = [estimate(g_NP[list(some)]) for some in itertools.combinations(range(len(g_NP)), 3)]
    assert sum(part.noise for part in parts) / len(parts) == pytest.approx(whole.noise, rel=CLOSE)
    signal = sum(part.signal for part in parts) / len(parts)
    assert signal == pytest.approx(whole.signal, rel=1e-8)
    # The control: the squared norm of the mean as it is grows with the noise.
    raw = sum(part.mean_sq_norm for part in parts) / len(parts)
    assert raw > whole.mean_sq_norm + 0.2 * whole.noise
    assert estimate(g_NP[:1]).noise is estimate(g_NP[:1]).signal is None
    assert GradientNumbers(9, 1.0, 10.0).signal < 0 and GradientNumbers(9, 1.0, 10.0).scale is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_models_are_summed_in_float32(fits, dtype: str) -> None:
    run, exact = (fits.run(MASKED, dtype=d, gradients=True) for d in (dtype, "float64"))
    # float32 rounds to 6e-8, bfloat16 to 4e-3, which a few layers multiply.
    tolerance = {"float32": 1e-4, "bfloat16": 0.1}[dtype]
    for name in run.block_names():
        got, want = run.gradient(name), exact.gradient(name)
        for kind in OWN:
            assert getattr(got, kind).dtype == torch.float32
            assert worst(getattr(got, kind), getattr(want, kind)) < tolerance
    assert run.gradient_norms().schema.field("sq_norm").type == pa.float32()


# How they are gathered


@pytest.mark.parametrize("how", [{}, SWEPT | {"homes": 2, "replicas": 2}], ids=str)
@pytest.mark.parametrize(
    "what",
    [{"draws": 2}, {"fisher": "empirical"}, {"method": "kfac"}, {"method": "diagonal"},
     {"method": "identity"}],
    ids=str,
)  # fmt: skip
def test_the_fit_is_the_same_bit_for_bit_with_and_without(
    what: dict[str, Any], how: dict[str, Any], tmp_path: Path
) -> None:
    fit(tmp_path / "with", gradients=True, **what, **how)
    fit(tmp_path / "without", **what, **how)
    mine, plain = tmp_path / "with", tmp_path / "without"
    assert tables(mine).keys() == tables(plain).keys()
    assert all(table.equals(tables(plain)[name]) for name, table in tables(mine).items())
    found = {k: t for k, t in tensors(mine).items() if not k.startswith("gradients/")}
    assert len(found) < len(tensors(mine))
    expected = tensors(plain)
    assert found.keys() == expected.keys()
    assert all(torch.equal(t, expected[k]) for k, t in found.items())
    # The control: another seed's labels are others, and the data's own are not drawn.
    if what == {"draws": 2} and not how:
        fit(tmp_path / "other", gradients=True, seed=1, **what)
        other, this = tensors(tmp_path / "other"), tensors(mine)
        for kind in OWN:
            assert torch.equal(other[f"gradients/0.safetensors/{kind}"],
                               this[f"gradients/0.safetensors/{kind}"])  # fmt: skip
        for kind in SAMPLED:
            key = f"gradients/0.safetensors/{kind}"
            assert worst(other[key], this[key]) > 1e-3


@pytest.mark.parametrize("how", [{}, SWEPT], ids=str)
@pytest.mark.parametrize("method", ["ekfac", "kfac", "diagonal", "identity"])
def test_a_finished_run_is_given_its_statistics_and_nothing_else(
    method: str, how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path / "whole", method=method, gradients=True, **how)
    fit(tmp_path / "run", method=method, **how)
    with pytest.raises(raycurv.UserError, match="--gradients"):
        raycurv.open(tmp_path / "run").gradients()
    before, passes = snapshot(tmp_path / "run"), []
    backward = Stage.backward

    def noted(stage: Stage, index: int, *args: Any) -> Any:
        passes.append(stage._pass.name)
        return backward(stage, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "backward", noted)
        patch.setattr("raycurv.steps.decompositions.decompose", None)
        fit(tmp_path / "run", method=method, gradients=True, **how)
    assert set(passes) == {"gradients"}
    allowed = (*THEIRS, "tables/blocks/", "tables/spectrum/")
    if method == "identity":
        allowed = (*allowed, "labels/")
    assert all(name.startswith(allowed) for name in changed(before, tmp_path / "run"))
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert_statistics(tmp_path / "run", tmp_path / "whole")
    # And then it has them.
    before = snapshot(tmp_path / "run")
    fit(tmp_path / "run", method=method, gradients=True, **how)
    fit(tmp_path / "run", method=method, **how)
    assert not changed(before, tmp_path / "run")


def assert_statistics(folder: Path, reference: Path) -> None:
    """The tables of two runs are equal."""
    a, b = (raycurv.open(f) for f in (folder, reference))
    assert a.gradients().equals(b.gradients())
    assert a.gradient_norms().equals(b.gradient_norms())
    assert a.manifest.facts["gradients"] == b.manifest.facts["gradients"]


@pytest.mark.parametrize(
    ("point", "after", "how"),
    [
        ("a write", False, {}),
        ("a backward", True, {"replicas": 2, "fisher": "empirical"}),
        ("a write", True, SWEPT),
        ("a backward", False, SWEPT | {"method": "diagonal"}),
    ],
    ids=str,
)
def test_stopped_everywhere_the_run_goes_on_to_the_same_end(
    point: str, after: bool, how: dict[str, Any], tmp_path: Path
) -> None:
    settings, out = how | {"gradients": True, "commit_seconds": 1e-9}, tmp_path / "run"
    fit(tmp_path / "whole", **settings)
    assert stopped_everywhere(point, after, lambda out: fit(out, **settings), out) > 1
    assert_same(out, tmp_path / "whole")
    assert_statistics(out, tmp_path / "whole")


@pytest.mark.parametrize("how", [{}, SWEPT], ids=str)
@pytest.mark.parametrize("first", [False, True])
def test_a_run_that_stopped_in_a_pass_goes_on_with_them_or_without(
    first: bool, how: dict[str, Any], tmp_path: Path
) -> None:
    settings = how | {"commit_seconds": 1e-9}
    fit(tmp_path / "whole", gradients=not first, **settings)
    out = tmp_path / "run"
    assert stopped("a backward", 3, False, lambda: fit(out, gradients=first, **settings))
    fit(out, gradients=not first, **settings)
    found, expected = tensors(out), tensors(tmp_path / "whole")
    assert {k for k in found if not first or not k.startswith("gradients/")} == expected.keys()
    assert all(torch.equal(found[k], t) for k, t in expected.items())
    if not first:
        assert_statistics(out, tmp_path / "whole")


@pytest.mark.parametrize(
    "name", ["gradients/2.safetensors", *(f"{t}part-00000.parquet" for t in THEIRS[1:])]
)
def test_a_file_that_is_gone_is_made_again_alone(name: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for folder in (out, tmp_path / "whole"):
        fit(folder, gradients=True)
    (out / name).unlink()
    before = snapshot(out)
    fit(out, gradients=True)
    again = {n for n in changed(before, out) if not n.startswith(("tables/blocks", "tables/spec"))}
    assert name in again and again <= {name, "tables/gradients/part-00000.parquet"}
    assert_same(out, tmp_path / "whole")
    assert_statistics(out, tmp_path / "whole")


def test_runs_that_are_merged_have_the_statistics_of_all_their_data(tmp_path: Path) -> None:
    def part(rows: list[dict[str, Any]], name: str) -> raycurv.Run:
        return raycurv.fit(classifier, rows, tmp_path / name, keep_sums=True, **EXACT_FIT)

    merged = part(ROWS[:6], "a").merge(
        part(ROWS[6:], "b"), out=tmp_path / "merged", gradients=True, quiet=True, address="none"
    )
    whole = fit(tmp_path / "whole", gradients=True)
    for name in whole.block_names():
        for kind in (*OWN, SAMPLED[0]):
            mine, theirs = (getattr(run.gradient(name), kind) for run in (merged, whole))
            assert worst(mine, theirs) < CLOSE
    assert merged.gradient_norms().num_rows == len(ROWS)


def test_sums_of_two_replicas_travel_and_add_up() -> None:
    totals = {kind: torch.full((2, 3), float(n)) for n, kind in enumerate((*OWN, *SAMPLED))}
    one = GradientSum("a", totals, examples=4, draws=2, batches=1)
    both = one.plus(unpack(pack(one)))
    assert (both.examples, both.draws, both.batches) == (8, 2, 2)
    assert all(torch.equal(both.mean(kind), one.mean(kind)) for kind in totals)


# Reading, and mistakes


def test_the_tables_are_read_without_raycurv(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", gradients=True, fisher="empirical")
    path = tmp_path / "run" / "tables"
    joined = duckdb.sql(f"""
        select count(*), max(abs(sq_norm - gradient_sq_norm) / sq_norm),
               max(abs(list_sum(block_sq_norms) - sq_norm) / sq_norm)
        from '{path}/gradient_norms/*.parquet' join '{path}/examples/*.parquet' using (id)
    """).fetchall()[0]
    assert joined[0] == len(ROWS) and max(joined[1:]) < CLOSE
    total = duckdb.sql(f"""
        select sum(sq_norm), sum(noise) / sum(signal), sum(trace)
        from '{path}/gradients/*.parquet' join '{path}/blocks/*.parquet' using (block)
    """).fetchall()[0]
    said = run.manifest.facts["gradients"]
    assert total[0] == pytest.approx(said["sq_norm"]) == pytest.approx(total[2])
    if said["noise_scale"] is not None:
        assert total[1] == pytest.approx(said["noise_scale"])


def test_one_example_has_no_noise_and_a_dead_block_no_scale(tmp_path: Path) -> None:
    run = raycurv.fit(classifier, ROWS[:1], tmp_path / "run", gradients=True, **EXACT_FIT)
    for row in run.gradients().to_pylist():
        assert row["noise"] is row["signal"] is row["noise_scale"] is None
        assert row["sq_norm"] == pytest.approx(row["mean_sq_norm"], rel=CLOSE)
    assert run.manifest.facts["gradients"]["noise_scale"] is None


def test_mistakes_are_named(tmp_path: Path) -> None:
    unlabelled = [{k: v for k, v in row.items() if k != "labels"} for row in ROWS]
    fitting = EXACT_FIT | {"gradients": True}
    with pytest.raises(raycurv.UserError, match="labels"):
        raycurv.fit(classifier, unlabelled, tmp_path / "a", **fitting)
    # Drawn labels alone need none.
    raycurv.fit(classifier, unlabelled, tmp_path / "a", **EXACT_FIT)
    run = fit(tmp_path / "b", gradients=True)
    with pytest.raises(raycurv.UserError, match=r"--extend.*no --gradients"):
        run.extend(classified(3, seed=1), tmp_path / "c", gradients=True)
    with pytest.raises(raycurv.UserError, match="no such name"):
        run.gradient("7")
    # Squares that float32 does not hold, of gradients that it does.
    large = [row | {"inputs": [1e25 * x for x in row["inputs"]]} for row in ROWS]
    with pytest.raises(raycurv.NumericalError, match=r"'row 0': .*block_sq_norms"):
        raycurv.fit(
            lambda: nn.Sequential(nn.Linear(5, 3)), large, tmp_path / "d",
            **(fitting | {"dtype": "float32", "method": "identity"}),
        )  # fmt: skip
    (tmp_path / "b" / "gradients" / "0.safetensors").unlink()
    with pytest.raises(raycurv.DamagedFile, match="--gradients"):
        run.gradient("0")


def test_the_job_takes_the_flag_and_the_plan_counts_it(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.parquet", ROWS)
    flags = ["--model", "commands:classifier", "--data", data, "--objective", "classification"]
    flags += ["--gradients"]
    done = run_here("fit.py", [*flags, "--out", tmp_path / "run", "--address", "none"])
    assert done.code == 0, done.err
    assert raycurv.open(tmp_path / "run").gradients().num_rows == 3
