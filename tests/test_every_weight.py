"""Every parameter of a network has a block: curvature and scores against the dense truth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import Truth, solve, worst
from networks import EVERY, VOCAB, Case
from safetensors.torch import load_file
from torch import Tensor, nn

import raycurv
from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.files.artifacts import read_blocks
from raycurv.files.store import Store
from raycurv.files.weights import write_checkpoint
from raycurv.mathematics import tiles
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Captured
from raycurv.mathematics.choice import choose_blocks
from raycurv.mathematics.corrected import CorrectedSums
from raycurv.mathematics.curvature import BlockCurvature, Damping
from raycurv.mathematics.eigen import Eigenbasis
from raycurv.mathematics.factors import FactorSums
from raycurv.mathematics.gradient_statistics import GradientSums
from raycurv.mathematics.influence.ihvp import QueryGradients, QueryProducts
from raycurv.mathematics.influence.scores import PairwiseScores, SpectralSelfScores
from raycurv.mathematics.rank.rank_fisher import RowSums
from raycurv.models.opening import open_model
from raycurv.models.patched import Patched
from raycurv.models.pieces import Parts
from raycurv.models.stored import Patch, StoredWeight

DOUBLE = torch.float64
# Sums of some hundred float64 products of numbers near 1; HF takes some of a norm in float32.
EXACT, SOLVED = 1e-10, 1e-9
CASES = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)


def _blocks(run: Any) -> tuple[Block, ...]:
    return read_blocks(Store(run.path))


def _gradients(truth: Truth, blocks: Sequence[Block], labels: Sequence[Any]) -> dict[str, Tensor]:
    """``[N, O, I]`` of each block, by autograd on the parameters, one unpadded example a time."""
    parameters = dict(truth.network.named_parameters())
    found: dict[str, list[Tensor]] = {block.name: [] for block in blocks}
    for row, y in zip(truth.case.data, labels, strict=True):
        loss = truth.loss(row, truth.outputs(row), y)
        gradients = dict(
            zip(
                parameters,
                torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True),
                strict=True,
            )
        )
        for block in blocks:
            own = StoredWeight.among(
                parameters, block, lambda name: Parts.one(name, parameters[name].shape)
            )
            matrix = own.matrix(lambda p, of=gradients: p.of(of[p.key].contiguous()))
            found[block.name].append(matrix)
    return {name: torch.stack(some) for name, some in found.items()}


@CASES
def test_curvature_and_norms_are_those_of_dense_matrices(fits: Any, case: Case) -> None:
    run, truth = fits.run(case), fits.truth(case)
    coverage = json.loads((Path(run.path) / "run.json").read_text())["facts"]["coverage"]
    assert coverage["covered"] == coverage["trainable"]
    assert coverage["covered"] == sum(p.numel() for p in truth.network.parameters())
    blocks = _blocks(run)
    assert sum(b.d_in * b.d_out for b in blocks) == coverage["covered"]
    draws = [_gradients(truth, blocks, labels) for labels in truth.labels]
    traces = {row["block"]: row["trace"] for row in run.blocks().to_pylist()}
    squares = torch.zeros(len(case.data), dtype=DOUBLE)
    for block in blocks:
        gradients = torch.stack([draw[block.name] for draw in draws])
        curvature = run.curvature(block.name)
        q_a, q_g = curvature.input_basis.dense(), curvature.output_basis.dense()
        assert block.output_diagonal == torch.equal(q_g, torch.eye(block.d_out)), block.name
        want = ((q_g.T @ gradients @ q_a) ** 2).mean(dim=(0, 1))
        assert worst(curvature.eigenvalues, want) < EXACT, block.name
        assert traces[block.name] == pytest.approx(float(want.sum()), rel=EXACT)
        squares += gradients.square().sum(dim=(2, 3)).mean(dim=0)
    norms = torch.tensor(run.examples()["gradient_sq_norm"].to_pylist(), dtype=DOUBLE)
    assert worst(norms, squares) < EXACT
    assert sum(traces.values()) == pytest.approx(float(norms.mean()), rel=EXACT)


@CASES
def test_scores_are_those_of_dense_matrices(fits: Any, case: Case) -> None:
    run, truth = fits.run(case), fits.truth(case)
    own = [truth.own(row) for row in case.data]
    gradients = _gradients(truth, _blocks(run), own)
    want = torch.zeros(len(case.queries), len(case.data), dtype=DOUBLE)
    for name, matrices in gradients.items():
        curvature = run.curvature(name)
        damping = 0.1 * float(curvature.eigenvalues.mean())
        products = torch.stack(
            [solve(curvature.dense(), damping, v) for v in matrices[: len(want)]]
        )
        want += products.flatten(1) @ matrices.flatten(1).T
    scores = torch.as_tensor(fits.scores(case).matrix()[0])
    assert worst(scores, want) < SOLVED
    # Truncated to a rank that they have, they are the same.
    low = torch.as_tensor(fits.scores(case, rank="5").matrix()[0])
    assert worst(low, want) < 0.5


def test_a_vector_has_one_row_an_example_and_kfac_is_exact(fits: Any) -> None:
    case = EVERY[0]
    run, other = fits.run(case), fits.run(case, method="kfac")
    vectors = [block for block in _blocks(run) if block.output_diagonal]
    assert len(vectors) > 5
    for block in vectors:
        want = run.curvature(block.name).eigenvalues
        assert worst(other.curvature(block.name).eigenvalues, want) < EXACT
    # Control: of a matrix it is not.
    assert worst(other.curvature("7").eigenvalues, run.curvature("7").eigenvalues) > 1e-2


def test_the_input_factor_of_an_embedding_is_how_often_tokens_come(fits: Any) -> None:
    case = EVERY[0]
    run = fits.run(case)
    tokens = torch.tensor([token for row in case.data for token in row["input_ids"]])
    want = torch.bincount(tokens, minlength=23).double() / len(tokens)
    want[4] = 0  # padding_idx
    assert (want == 0).sum() > 1
    assert worst(run.curvature("0").input_basis.eigenvalues(), want) < EXACT
    assert not run.curvature("0").eigenvalues[:, want == 0].any()
    row = next(row for row in run.blocks().to_pylist() if row["block"] == "0")
    assert row["tokens"] == len(tokens) and row["input_tiles"] == [1] * 23
    spectrum = run.spectrum().filter(run.spectrum()["factor"].to_numpy() == row["input_factor"])
    assert spectrum["tile_start"].to_pylist() == list(range(23))


def test_a_weight_of_both_ends_is_in_one_stage(fits: Any) -> None:
    gpt2 = EVERY[3]
    run = fits.run(gpt2)
    assert _blocks(run)[0].shared == ("lm_head",)
    llama = EVERY[2]
    assert not any(block.shared for block in _blocks(fits.run(llama)))
    assert (
        worst(
            torch.as_tensor(fits.scores(llama, {"stages": 2}, stages=2).matrix()[0]),
            torch.as_tensor(fits.scores(llama).matrix()[0]),
        )
        < EXACT
    )


def test_the_vocabularys_side_of_a_head_that_nothing_decomposes_is_a_diagonal(
    fits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama, narrow = EVERY[2], fits.run(EVERY[2])
    monkeypatch.setattr(tiles, "LARGEST_EIGH", VOCAB - 1)
    case = replace(llama, name="a llama whose head is wide")
    run = fits.run(case)
    wide, before = (next(b for b in _blocks(r) if b.name == "lm_head") for r in (run, narrow))
    assert wide == replace(before, output_diagonal=True)
    curvature, full = run.curvature("lm_head"), narrow.curvature("lm_head")
    g = full.output_basis.dense()
    diagonal = ((g * full.output_basis.eigenvalues()) @ g.T).diagonal()
    assert worst(curvature.output_basis.eigenvalues(), diagonal) < EXACT
    # Λ is exact in any basis; and a block's scores are those of its dense matrix.
    assert curvature.trace == pytest.approx(full.trace, rel=EXACT)
    v = torch.randn(wide.d_out, wide.d_in, dtype=DOUBLE)
    want = solve(curvature.dense(), 0.5, v)
    assert worst(curvature.apply(v, lambda lam: 1 / (lam + 0.5)), want) < SOLVED
    # Control: with tiles there is a factor.
    tiled = fits.run(replace(llama, name="a llama whose head is cut"), max_factor_dim=8)
    assert not next(b for b in _blocks(tiled) if b.name == "lm_head").output_diagonal


@pytest.mark.parametrize("case", [EVERY[1], EVERY[3]], ids=lambda case: case.name)
def test_a_weight_of_both_ends_is_replaced_at_both(fits: Any, tmp_path: Path, case: Case) -> None:
    model = open_model(fits.source(case))
    block = next(b for b in choose_blocks(model.skeleton(), ("all",)) if b.shared)
    weight = model.block_weight(block)
    assert torch.equal(weight, fits.truth(case).network.get_parameter(f"{block.name}.weight").T)
    patched = Patched(model, [Patch.of(block, 2 * weight)])
    write_checkpoint(Store(str(tmp_path)), patched)
    stored = load_file(tmp_path / "model.safetensors")
    held = [key for key in stored if stored[key].shape == weight.T.shape]
    assert held and all(torch.equal(stored[key], 2 * weight.T) for key in held)
    # In each stage that has an end of the model.
    for units in {range(model.units), range(model.units - 1, model.units)}:
        module = patched.build(units, torch.float32, torch.device("cpu")).module
        head = module.get_parameter(f"{block.shared[0]}.weight")
        assert torch.equal(head, 2 * weight.T)


class Beside(nn.Module):
    """Its embedding's weight, or its norm's, is used beside the module's own calls as well."""

    def __init__(self, of_norm: bool) -> None:
        super().__init__()
        self.of_norm, self.embed, self.norm = of_norm, nn.Embedding(VOCAB, 6), nn.LayerNorm(6)
        self.out = nn.Linear(6, VOCAB)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.embed(x))
        if self.of_norm:
            return self.out(hidden * self.norm.weight)
        return self.out(hidden) + nn.functional.linear(hidden, self.embed.weight)


@pytest.mark.parametrize("block", ["norm", "embed"])
def test_a_weight_that_is_used_beside_its_module_is_refused(tmp_path: Path, block: str) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return Beside(block == "norm").eval()

    case = EVERY[1]
    given: dict[str, Any] = {"address": "none", "quiet": True, "objective": case.objective}
    with pytest.raises(UserError, match=rf"block {block}:[\s\S]*relative error") as caught:
        raycurv.fit(network, list(case.data), tmp_path / "run", blocks=("all",), **given)
    flag = f"!{block}"
    assert flag in caught.value.remedy
    raycurv.fit(network, list(case.data), tmp_path / "run", blocks=("all", flag), **given)


# Rows on the columns that they have


def _captured(columns: Tensor | None, width: int) -> Captured:
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randint(3, (4, 5), generator=generator)
    a = torch.nn.functional.one_hot(numbers, 3).double()
    if columns is not None:
        whole = a.new_zeros(4, 5, width)
        a = whole.index_copy_(2, columns, a)
    g = torch.randn(4, 5, 6, generator=generator, dtype=DOUBLE)
    batch = Batch(0, ("a", "b", "c", "d"), numbers, numbers=(0, 1, 2, 3))
    return Captured(batch, {"e.input": a}, {"e": g}, {"e.input": 20}, own=True)


def test_rows_on_some_columns_are_rows_with_zeros_in_the_others() -> None:
    columns, width = torch.tensor([1, 4, 7]), 9
    block = Block("e", "embedding", width, 6, False, input_factor="e.input", input_diagonal=True)
    whole = _captured(columns, width)
    some = _captured(None, width)
    some = Captured(
        some.batch, some.inputs, some.gradients, some.rows, own=True, columns={"e.input": columns}
    )
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=DOUBLE))
    bases = {
        "e.input": Eigenbasis((), (torch.rand(width, dtype=DOUBLE),)),
        "e.output": Eigenbasis((q,)),
    }
    lam = torch.rand(6, width, dtype=DOUBLE)
    curvature = {"e": BlockCurvature(block, bases["e.input"], bases["e.output"], lam)}
    cpu, damping = torch.device("cpu"), Damping(0.1)
    ids = whole.batch.ids

    def products(rank: int | None, scored: int | None = None) -> QueryProducts:
        return QueryProducts(curvature, ids, damping, rank, 0, DOUBLE, cpu, scored)

    dense = products(None)
    dense.add([whole])
    low = products(2)
    low.add([whole])
    spectral = SpectralSelfScores(curvature, damping, DOUBLE, cpu)
    makers: dict[str, Any] = {
        "factors": lambda: FactorSums([block], DOUBLE, cpu),
        "corrected": lambda: CorrectedSums([block], bases, DOUBLE, cpu),
        "statistics": lambda: GradientSums([block], 0, DOUBLE, cpu),
        "rows of a Fisher": lambda: RowSums([block], 2, DOUBLE, cpu, frozenset({"e"})),
        "gradients": lambda: QueryGradients([block], ids, DOUBLE, cpu),
        "products": lambda: products(None),
        "turned products": lambda: products(None, 1),
        "scores": lambda: PairwiseScores(
            [block], dense.products, 4, True, False, DOUBLE, cpu, own=spectral
        ),
        "scores by rank": lambda: PairwiseScores(
            [block], low.products, 4, False, False, DOUBLE, cpu
        ),
    }
    for name, make in makers.items():
        one, other = make(), make()
        results = [sums.add([captured]) for sums, captured in ((one, whole), (other, some))]
        for key, value in results[0].items():
            assert worst(results[1][key], value) < EXACT, (name, key)
        for key, total in one.sums.items():
            assert worst(other.sums[key].part, total.part) < EXACT, (name, key)
        assert one.counts == other.counts
    # Truncated to a rank that all have, and to one below it.
    for rank in (2, 3):
        one, other = products(rank), products(rank)
        one.add([whole])
        other.add([some])
        assert one.products["e"].left is not None
        assert worst(other.products["e"].dense(), one.products["e"].dense()) < 1e-6
    # Control: other columns are others.
    moved = Captured(
        some.batch, some.inputs, some.gradients, some.rows, own=True,
        columns={"e.input": columns + 1},
    )  # fmt: skip
    sums = makers["corrected"]()
    sums.add([moved])
    want = makers["corrected"]()
    want.add([whole])
    assert worst(sums.sums["e"].part, want.sums["e"].part) > 0.1
