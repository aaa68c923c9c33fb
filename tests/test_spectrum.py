"""Spectra from the command's own functions, against the dense matrices of tiny networks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Fits
from dense import worst
from networks import MLP
from safetensors.torch import load_file, save_file
from test_exact_products import Jacobians
from torch import Tensor

import raycurv
from raycurv import UserError
from raycurv.driver.multiplier import Multiplier
from raycurv.jobs import check
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.choice import choose_blocks

# float64, where sums may be taken in another order.
CLOSE = 1e-9
HERE: dict[str, Any] = {
    "address": "none", "dtype": "float64", "quiet": True, "objective": MLP.objective,
    "batch_tokens": 100, "columns": 3, "steps": 3, "probes": 5, "pairs": 3, "at_once": 100,
}  # fmt: skip
HOW: dict[str, dict[str, Any]] = {
    "small microbatches": {"batch_tokens": MLP.batch_tokens},
    "two stages": {"stages": 2},
    "swept": {"stages": 2, "schedule": "swept"},
    "replicas": {"stages": 2, "replicas": 2, "batch_tokens": MLP.batch_tokens},
    "one vector at a time": {"at_once": 1},
}


def measured(out: Path, **more: Any) -> raycurv.Spectrum:
    return raycurv.spectrum(MLP.network, list(MLP.data), out, **HERE | more)


@pytest.fixture(scope="module")
def blocks() -> dict[str, Block]:
    return {block.name: block for block in choose_blocks(MLP.network(), ())}


@pytest.fixture(scope="module")
def dense(fits: Fits, blocks: dict[str, Block]) -> Callable[[str], Tensor]:
    """The matrices of the network, one row a weight; of the Hessian from autograd's own."""
    found = Jacobians(fits.truth(MLP), blocks)
    found.vector = torch.eye(found.vector.shape[1], dtype=torch.float64)
    return cache(lambda name: _hessian(blocks) if name == "hessian" else found.products(name))


def _hessian(blocks: dict[str, Block]) -> Tensor:
    network = MLP.network().double()
    x = torch.tensor([row["inputs"] for row in MLP.data], dtype=torch.float64)
    y = torch.tensor([row["labels"] for row in MLP.data])
    start = []
    for name, block in blocks.items():
        module = network.get_submodule(name)
        columns = [module.weight] + ([module.bias[:, None]] if block.bias else [])
        start.append(torch.cat(columns, 1).detach().flatten())
    sizes = [len(part) for part in start]

    def loss(weights: Tensor) -> Tensor:
        given = {}
        for (name, b), part in zip(blocks.items(), weights.split(sizes), strict=True):
            matrix = part.view(b.d_out, b.d_in)
            given[f"{name}.weight"] = matrix[:, : b.d_in - b.bias]
            if b.bias:
                given[f"{name}.bias"] = matrix[:, -1]
        outputs = torch.func.functional_call(network, given, x)
        return torch.nn.functional.cross_entropy(outputs, y)

    return torch.autograd.functional.hessian(loss, torch.cat(start))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> raycurv.Spectrum:
    return measured(tmp_path_factory.mktemp("spectrum") / "plain")


def ends(found: raycurv.Spectrum) -> dict[str, Tensor]:
    table = found.eigenvalues()
    kinds, values = table["end"].to_pylist(), table["eigenvalue"].to_pylist()
    return {
        end: torch.tensor([v for k, v in zip(kinds, values, strict=True) if k == end])
        for end in ("top", "bottom")
    }


def test_eigenpairs_and_traces_are_those_of_the_dense_matrix(
    dense: Callable[[str], Tensor], blocks: dict[str, Block], tmp_path: Path
) -> None:
    g = dense("ggn")
    # More random vectors than the matrix has ranks tell its trace without any error.
    found = measured(tmp_path, steps=7, probes=20, pairs=4, eigenvectors=True, diagonal=True)
    values = torch.linalg.eigvalsh(g).flip(0)
    assert worst(ends(found)["top"].double(), values[:4]) < 1e-6
    assert found.numbers["largest"] == pytest.approx(float(values[0]), rel=1e-12)
    assert found.numbers["largest_rate"] == pytest.approx(2 / float(values[0]), rel=1e-12)
    sizes = [b.d_out * b.d_in for b in blocks.values()]
    traces = found.traces()
    assert traces["block"].to_pylist() == list(blocks) and traces["weights"].to_pylist() == sizes
    own = torch.stack([part.sum() for part in g.diagonal().split(sizes)])
    assert worst(torch.tensor(traces["trace"].to_pylist()).double(), own) < 1e-6
    assert found.numbers["trace"] == pytest.approx(float(g.trace()), rel=1e-7)
    folder = Path(found.path)
    vectors = torch.cat(
        [load_file(folder / f"eigenvectors/{n}.safetensors")["top"].flatten(1) for n in blocks], 1
    )
    assert worst(vectors @ g, values[:4, None] * vectors) < 1e-7
    assert worst(vectors @ vectors.T, torch.eye(4, dtype=torch.float64)) < CLOSE
    files = [load_file(folder / f"diagonal/{n}.safetensors") for n in blocks]
    estimate, error = (
        torch.cat([file[key].flatten() for file in files]) for key in ("diagonal", "standard_error")
    )
    inside = (estimate - g.diagonal()).abs() <= 2 * error + CLOSE
    assert float(inside.double().mean()) > 0.85 and not (folder / "work").exists()


def test_few_products_come_near_and_say_how_near(
    dense: Callable[[str], Tensor], plain: raycurv.Spectrum
) -> None:
    g = dense("ggn")
    table = plain.traces()
    rows = zip(table["low"].to_pylist(), table["high"].to_pylist(), strict=True)
    sizes = table["weights"].to_pylist()
    own = [float(part.sum()) for part in g.diagonal().split(sizes)]
    assert sum(low <= t <= high for (low, high), t in zip(rows, own, strict=True)) >= 2
    assert abs(plain.numbers["trace"] - float(g.trace())) < 1.5 * plain.numbers["trace_margin"]
    values = torch.linalg.eigvalsh(g)
    table = plain.eigenvalues()
    for value, residual in zip(table["eigenvalue"].to_pylist(), table["residual"].to_pylist(),
                               strict=True):  # fmt: skip
        assert float((values - value).abs().min()) <= residual
    density = plain.density()
    x, y = (torch.tensor(density[n].to_pylist(), dtype=torch.float64)
            for n in ("eigenvalue", "density"))  # fmt: skip
    assert float(torch.trapezoid(y, x)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("how", HOW)
def test_numbers_do_not_depend_on_how_it_is_run(
    how: str, plain: raycurv.Spectrum, tmp_path: Path
) -> None:
    found = measured(tmp_path, **HOW[how])
    for name in ("traces", "eigenvalues", "density"):
        mine, theirs = getattr(found, name)(), getattr(plain, name)()
        for column in theirs.column_names:
            a, b = mine[column].to_pylist(), theirs[column].to_pylist()
            if not isinstance(b[0], float):
                assert a == b
            elif column != "residual":
                assert worst(torch.tensor(a).double(), torch.tensor(b).double()) < 1e-6, column
    assert found.numbers["trace"] == pytest.approx(plain.numbers["trace"], rel=CLOSE)
    assert measured(tmp_path / "seed", seed=1, steps=0).numbers["trace"] != pytest.approx(
        plain.numbers["trace"], rel=1e-4
    )


def test_a_run_that_was_stopped_goes_on_and_ends_bit_for_bit_alike(
    plain: raycurv.Spectrum, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[str] = []
    multiply = Multiplier.multiply
    stops = [1, 3, 4]

    def counted(self: Multiplier, work: Any, label: str) -> Any:
        if len(passes) in stops:
            stops.remove(len(passes))
            raise KeyboardInterrupt
        passes.append(work.name)
        return multiply(self, work, label)

    monkeypatch.setattr(Multiplier, "multiply", counted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            measured(tmp_path)
    found = measured(tmp_path)
    # Two for the traces and one a step; none of them twice.
    assert len(passes) == len(set(passes)) == 2 + HERE["steps"]
    for name in ("traces", "eigenvalues", "density"):
        assert getattr(found, name)().equals(getattr(plain, name)())
    assert measured(tmp_path).numbers == found.numbers and len(passes) == 5
    # A table that is damaged is made again.
    (tmp_path / "tables/traces/part-00000.parquet").write_bytes(b"no table")
    assert measured(tmp_path).traces().equals(plain.traces())


def test_of_a_fit_its_own_traces_stand_beside_and_blocks_are_chosen(
    dense: Callable[[str], Tensor], blocks: dict[str, Block], fits: Fits, tmp_path: Path
) -> None:
    run, name = fits.run(MLP), list(blocks)[1]
    found = raycurv.spectrum(
        MLP.network, out=tmp_path, run=run.path, blocks=[name], **HERE | {"steps": 8, "probes": 24},
    )  # fmt: skip
    start = sum(b.d_out * b.d_in for b in blocks.values() if b.name < name)
    stop = start + blocks[name].d_out * blocks[name].d_in
    g = dense("ggn")[start:stop, start:stop]
    (row,) = found.traces().to_pylist()
    of_fit = dict(zip(*run.blocks().select(["block", "trace"]).to_pydict().values(), strict=True))
    assert (row["block"], row["fitted"]) == (name, of_fit[name])
    assert row["trace"] == pytest.approx(float(g.trace()), rel=1e-7)
    assert found.numbers["largest"] == pytest.approx(float(torch.linalg.eigvalsh(g)[-1]), rel=1e-9)


def test_the_hessian_has_both_ends(dense: Callable[[str], Tensor], tmp_path: Path) -> None:
    found = measured(tmp_path, matrix="hessian", steps=6, columns=14, traces="none")
    values = torch.linalg.eigvalsh(dense("hessian"))
    assert values[0] < -1e-3
    top, bottom = ends(found).values()
    assert worst(top.double(), values.flip(0)[:3]) < 1e-6
    assert worst(bottom.double(), values[:3]) < 1e-6


def test_the_largest_eigenvalue_is_told_for_fewer_examples(
    dense: Callable[[str], Tensor], tmp_path: Path
) -> None:
    found = measured(tmp_path, steps=4, sizes=True, traces="none")
    table = found.sizes().to_pylist()
    assert [row["examples"] for row in table] == [2, 4, 9]
    assert table[-1]["eigenvalue"] == pytest.approx(
        float(torch.linalg.eigvalsh(dense("ggn"))[-1]), rel=1e-6
    )
    assert found.numbers["largest_limit"] < table[-1]["eigenvalue"]
    assert found.numbers["largest_bias"] == pytest.approx(
        table[-1]["eigenvalue"] - found.numbers["largest_limit"], abs=0.1
    )


def moved(size: float) -> torch.nn.Module:
    """The network at another place."""
    network = MLP.network()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        for parameter in network.parameters():
            parameter += size * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize("how", ["a checkpoint", "an update"])
@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
def test_the_loss_along_a_step_is_that_of_the_dense_model(
    how: str, matrix: str, dense: Callable[[str], Tensor], fits: Fits, blocks: dict[str, Block],
    tmp_path: Path,
) -> None:  # fmt: skip
    size = 0.02
    here, there = MLP.network().state_dict(), moved(size).state_dict()
    place: Any = lambda: moved(size)  # noqa: E731
    if how == "an update":
        place = str(tmp_path / "step.safetensors")
        save_file({n: (there[n].double() - here[n].double()) for n in here}, place)
    found = measured(
        tmp_path / "out", direction=place, traces="none", steps=0, matrix=matrix, stages=2
    ).numbers["along"]
    parts = []
    for name, block in blocks.items():
        names = [f"{name}.weight", f"{name}.bias"][: 1 + block.bias]
        columns = [(there[n].double() - here[n].double()).reshape(block.d_out, -1) for n in names]
        parts.append(torch.cat(columns, 1).flatten())
    v = torch.cat(parts)
    truth = fits.truth(MLP)
    gradients = [torch.cat([g[n].flatten() for n in blocks]) for g in truth.own_gradients]
    slope = float(torch.stack(gradients).mean(0) @ v)
    curvature = float(v @ dense(matrix) @ v)
    loss = float(truth.losses().mean())
    network = moved(size).double()
    x = torch.tensor([row["inputs"] for row in MLP.data], dtype=torch.float64)
    y = torch.tensor([row["labels"] for row in MLP.data])
    after = float(torch.nn.functional.cross_entropy(network(x), y).detach())
    assert found["loss"] == pytest.approx(loss, rel=CLOSE)
    assert found["slope"] == pytest.approx(slope, rel=1e-7)
    assert found["curvature"] == pytest.approx(curvature, rel=1e-7)
    assert found["predicted"] == pytest.approx(loss + slope + curvature / 2, rel=1e-7)
    assert found["measured"] == pytest.approx(after, rel=1e-6)
    assert found["norm"] == pytest.approx(float(v.norm()), rel=1e-7)
    # The radius, from the logits' change along the step.
    plain = MLP.network().double()
    weights = {n: t.double() for n, t in here.items()}
    _, a = torch.func.jvp(
        lambda given: torch.func.functional_call(plain, given, x),
        (weights,), ({n: there[n].double() - here[n].double() for n in here},),
    )  # fmt: skip
    reach = float((a.amax(1) - a.amin(1)).max())
    assert found["radius"] == pytest.approx(torch.pi / reach, rel=1e-6)
    if matrix == "hessian":
        assert abs(found["predicted"] - after) < 0.1 * abs(after - loss)


def test_a_small_step_is_not_rounded_to_what_the_model_is_stored_in(tmp_path: Path) -> None:
    step = str(tmp_path / "step.safetensors")
    save_file({n: torch.full_like(t, 1e-4) for n, t in MLP.network().state_dict().items()}, step)
    networks = (lambda: MLP.network().bfloat16(), lambda: MLP.network().bfloat16().float())
    short, wide = (
        raycurv.spectrum(
            network, list(MLP.data), tmp_path / str(n), direction=step,
            **HERE | {"traces": "none", "steps": 0},
        ).numbers["along"]
        for n, network in enumerate(networks)
    )  # fmt: skip
    assert short["measured"] == pytest.approx(wide["measured"], rel=1e-12)
    assert short["measured"] - short["loss"] == pytest.approx(short["slope"], rel=0.01)


def test_residuals_are_no_smaller_than_the_dtype_of_the_products_tells(
    dense: Callable[[str], Tensor], tmp_path: Path
) -> None:
    numbers = measured(tmp_path, dtype="bfloat16", steps=8, traces="none").numbers
    error = abs(numbers["largest"] - float(torch.linalg.eigvalsh(dense("ggn"))[-1]))
    assert 1e-6 < error < 2 * numbers["largest_residual"]


def test_a_hessian_is_of_the_data_s_own_labels(tmp_path: Path) -> None:
    rows = [{"id": row["id"], "inputs": row["inputs"]} for row in MLP.data]
    how = HERE | {"traces": "none", "steps": 1}
    raycurv.spectrum(MLP.network, rows, tmp_path / "ggn", **how)
    with pytest.raises(UserError, match="expected a label"):
        raycurv.spectrum(MLP.network, rows, tmp_path / "out", **how, matrix="hessian")


def test_a_step_beyond_the_blocks_is_refused(tmp_path: Path) -> None:
    step = str(tmp_path / "step.safetensors")
    save_file({"0.weight": torch.ones(6, 5), "2.weight": torch.ones(4, 6)}, step)
    how = {"traces": "none", "steps": 0, "direction": step}
    with pytest.raises(UserError, match=r"one that changes '2\.weight'"):
        measured(tmp_path / "out", blocks=["0"], **how)
    save_file({"0.weight": torch.ones(5, 6)}, step)
    with pytest.raises(UserError, match=r"0.weight of shape \[6, 5\]"):
        measured(tmp_path / "out", **how)
    with pytest.raises(UserError, match="with the same tensors"):
        measured(
            tmp_path / "out",
            **how | {"direction": lambda: torch.nn.Sequential(torch.nn.Linear(5, 3))},
        )


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to measure": ({"traces": "none", "steps": 0}, "something to measure"),
    "too few probes": ({"probes": 3}, "at least 4"),
    "a diagonal without probes": ({"traces": "none", "diagonal": True}, "--diagonal"),
    "eigenvectors without steps": ({"steps": 0, "eigenvectors": True}, "--eigenvectors"),
    "a picture of another kind": ({"picture": "a.gif"}, "ends in .png or .svg"),
    "no such block": ({"blocks": ["nothing"]}, "--blocks 'nothing'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_mistakes_are_named(wrong: str, tmp_path: Path) -> None:
    settings, says = WRONG[wrong]
    with pytest.raises(UserError, match=says):
        measured(tmp_path, **settings)


def test_what_cannot_fit_is_refused_with_the_number_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"traces": "none", "steps": 1}
    there = check.supply_here
    monkeypatch.setattr(check, "supply_here", lambda where: replace(there(where), memory=2**30))
    # Of so small a network a million vectors take more than this process.
    with pytest.raises(UserError, match=r"--at-once \d+") as caught:
        measured(tmp_path / "out", at_once=10**6, **how)
    fits = int(re.findall(r"--at-once (\d+)", str(caught.value))[1])
    assert 10**4 < fits < 10**6
    measured(tmp_path / "out", at_once=fits - 10**4, **how)
    with pytest.raises(UserError, match="too much"):
        measured(tmp_path / "more", at_once=2 * fits, **how)
    measured(tmp_path / "more", at_once=2 * fits, force=True, **how)


def test_a_picture_is_drawn(tmp_path: Path, plain: raycurv.Spectrum) -> None:
    picture = tmp_path / "picture.svg"
    measured(Path(plain.path), picture=picture)
    assert picture.read_bytes().count(b"<path") > 20
