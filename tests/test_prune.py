"""Claims about the numbers of prune.py: masks, weights and rises are those of dense matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Fits
from dense import Truth, ekfac_matrix, matrix_of, set_weight, worst
from networks import CASES, LLAMA, MLP, Case
from pruning import Quadratic, rank_quadratic
from safetensors.torch import load_file
from test_mfac import rows_of
from torch import Tensor

import raycurv
from raycurv.pruned import Pruned

torch.set_num_threads(1)

HERE: dict[str, Any] = {"address": "none", "quiet": True}
# Weights are rounded to the checkpoint's float32 (half of 1.2e-7, relative) from float64.
ROUNDED = 1e-7
# Saliencies are kept in float32.
KEPT = 2e-7
# float64, from the weights as they were rounded: sums in another order.
CLOSE = 1e-8
ROWS = 4
NAMED = {case.name: case for case in CASES}
HEADS = {"llama": (".o_proj", 4), "gpt2": ("attn.c_proj", 3)}


def part(case: Case, **settings: Any) -> Case:
    """The case with other settings of its fit, and a name of its own."""
    return replace(case, name=f"{case.name} {settings}", settings={**case.settings, **settings})


# The oracle


@dataclass
class Dense:
    """A pruning from its definition, on whole matrices in float64.

    Attributes:
        truth: of the model.
        names: blocks, in the model's order.
        method: ``ekfac``, ``kfac``, ``diagonal``, ``mfac`` (the whole model's) or ``mfac block``.
        first_order: whether the mean gradient counts.
        gone: mask of what went before, by block.
    """

    truth: Truth
    names: Sequence[str]
    method: str
    first_order: bool = False
    damping: float = 0.1

    def weight(self, name: str) -> Tensor:
        module: Any = self.truth.network.get_submodule(name)
        bias = None if module.bias is None else module.bias.detach()
        return matrix_of(module, module.weight.detach(), bias)

    def bias(self, name: str) -> bool:
        module: Any = self.truth.network.get_submodule(name)
        return module.bias is not None

    def candidates(self, name: str) -> Tensor:
        found = torch.ones_like(self.weight(name), dtype=torch.bool)
        if self.bias(name):
            found[:, -1] = False
        return found

    @property
    def groups(self) -> list[list[str]]:
        """Blocks that have one curvature between them."""
        return [list(self.names)] if self.method == "mfac" else [[name] for name in self.names]

    @cached_property
    def models(self) -> dict[str, Quadratic]:
        """By the first block of each group."""
        return {group[0]: self._model(group) for group in self.groups}

    @cached_property
    def inverses(self) -> dict[str, Tensor]:
        """Of the damped models."""
        return {name: torch.linalg.inv(model.damped) for name, model in self.models.items()}

    def _model(self, group: list[str]) -> Quadratic:
        gradient = torch.zeros(sum(self.weight(n).numel() for n in group), dtype=torch.float64)
        if self.first_order:
            own = self.truth.own_gradients
            gradient = torch.cat([sum(g[name] for g in own).flatten() / len(own) for name in group])
        if self.method.startswith("mfac"):
            rows = rows_of(self.truth, ROWS, group)[1]
            lam = self.damping * float(rows.square().sum()) / rows.numel()
            return replace(rank_quadratic(rows, lam, None), gradient=gradient)
        (name,) = group
        matrix, mean = self._matrix(name)
        return Quadratic(matrix, self.damping * mean, gradient)

    def _matrix(self, name: str) -> tuple[Tensor, float]:
        """F, and the mean of its eigenvalues."""
        truth = self.truth
        if self.method == "diagonal":
            eye = (torch.eye(d, dtype=torch.float64) for d in self.weight(name).T.shape)
            lam = truth.corrected(name, *eye)
            return torch.diag(lam.flatten()), float(lam.mean())
        a, g = truth.input_factor(name), truth.output_factor(name)
        if self.method == "kfac":
            rows = truth.rows(name) / len(truth.case.data)
            matrix = rows * torch.kron(g, a)
            return matrix, float(matrix.trace()) / len(matrix)
        q_a, q_g = torch.linalg.eigh(a).eigenvectors, torch.linalg.eigh(g).eigenvectors
        lam = truth.corrected(name, q_a, q_g)
        return ekfac_matrix(q_a, q_g, lam), float(lam.mean())

    def pieces(self, group: list[str], flat: Tensor) -> dict[str, Tensor]:
        """A vector over a group's weights, block by block."""
        shapes = [self.weight(name).shape for name in group]
        parts = flat.split([s.numel() for s in shapes])
        return {n: p.view(s) for n, p, s in zip(group, parts, shapes, strict=True)}

    def flat(self, group: list[str]) -> Tensor:
        return torch.cat([self.weight(name).flatten() for name in group])

    def obs(self, name: str, places: Sequence[Sequence[int]]) -> Tensor:
        """½ u_Qᵀ ([F⁻¹]_QQ)⁻¹ u_Q of sets of places of a block."""
        (group,) = (g for g in self.groups if name in g)
        model, inverse = self.models[group[0]], self.inverses[group[0]]
        start = sum(self.weight(n).numel() for n in group[: group.index(name)])
        u = self.flat(group) - inverse @ model.gradient
        costs = []
        for place in places:
            at = torch.tensor(place) + start
            costs.append(0.5 * u[at] @ torch.linalg.solve(inverse[at][:, at], u[at]))
        return torch.stack(costs)

    def single(self, criterion: str, name: str) -> Tensor:
        """Saliencies of single weights, ``[O, I]``."""
        w = self.weight(name)
        if criterion == "magnitude":
            return w**2
        (group,) = (g for g in self.groups if name in g)
        model = self.models[group[0]]
        if criterion == "obs":
            inverse = self.inverses[group[0]]
            u = self.flat(group) - inverse @ model.gradient
            return self.pieces(group, u**2 / (2 * inverse.diag()))[name]
        diagonal = self.pieces(group, model.undamped.diag())[name]
        return w**2 * diagonal / 2 - self.pieces(group, model.gradient)[name] * w

    def after(self, keep: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights once some are gone and the others have moved."""
        found = {}
        for group in self.groups:
            gone = ~torch.cat([keep[name].flatten() for name in group])
            w = self.flat(group)
            step = self.models[group[0]].minimum(w, gone.nonzero()[:, 0].tolist())
            found |= self.pieces(group, w + step)
        return found

    def prediction(self, step: dict[str, Tensor]) -> float:
        """The rise of the mean loss by the undamped model."""
        return sum(
            self.models[g[0]].prediction(torch.cat([step[n].flatten() for n in g]))
            for g in self.groups
        )


def smallest(costs: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Which of the numbers that are no NaN go, the first of equal ones first: ⌊share · count⌋."""
    flat = torch.cat([c.flatten() for c in costs.values()]).float().numpy()
    order = np.argsort(flat, kind="stable")
    gone = torch.zeros(len(flat), dtype=torch.bool)
    gone[torch.from_numpy(order[: int(share * int((~np.isnan(flat)).sum()) + 1e-9)])] = True
    parts = gone.split([c.numel() for c in costs.values()])
    return {n: p.view(c.shape) for p, (n, c) in zip(parts, costs.items(), strict=True)}


def masks(dense: Dense, structure: str, scope: str, criterion: str, share: float) -> Any:
    """Which weights stay, by block, and what every single one, row, head or run costs."""
    singles = {name: dense.single(criterion, name) for name in dense.names}
    indices = {n: torch.arange(s.numel()).view(s.shape) for n, s in singles.items()}

    def cost(name: str, places: Sequence[Tensor]) -> Tensor:
        sets = [p.flatten().tolist() for p in places]
        if criterion == "obs":
            return dense.obs(name, sets)
        return torch.stack([singles[name].flatten()[s].sum() for s in sets])

    def chosen(costs: dict[str, Tensor]) -> dict[str, Tensor]:
        if scope == "global":
            return smallest(costs, share)
        return {n: smallest({n: c}, share)[n] for n, c in costs.items()}

    if structure == "unstructured":
        costs = {n: torch.where(dense.candidates(n), s, torch.nan) for n, s in singles.items()}
        return {n: ~gone for n, gone in chosen(costs).items()}, singles, None
    keep = {n: torch.ones_like(s, dtype=torch.bool) for n, s in singles.items()}
    if structure == "rows":
        units = {n: cost(n, list(indices[n])) for n in dense.names}
        for name, gone in chosen(units).items():
            keep[name][gone] = False
    elif structure == "heads":
        width = next(w for end, w in HEADS.values() if dense.names[0].endswith(end))
        units = {}
        for name in dense.names:
            inputs = int(dense.candidates(name).any(dim=0).sum())
            units[name] = cost(name, indices[name][:, :inputs].split(width, dim=1))
        for name, gone in chosen(units).items():
            for head in gone.nonzero()[:, 0].tolist():
                keep[name][:, head * width : (head + 1) * width] = False
    else:
        stay, of = map(int, structure.split(":"))
        units = {}
        for name in dense.names:
            inputs = int(dense.candidates(name).any(dim=0).sum())
            runs = indices[name][:, :inputs].reshape(-1, of)
            least = []
            for run in runs:
                ways = [run[list(q)] for q in combinations(range(of), of - stay)]
                costs_C = cost(name, ways).float()
                best = int(costs_C.argmin())
                keep[name].view(-1)[ways[best]] = False
                least.append(costs_C[best])
            units[name] = torch.stack(least).view(len(keep[name]), -1)
    return keep, singles, units


# What a pruning left


def network(case: Case, found: Pruned) -> Any:
    """The case's module with the weights of the checkpoint, by plain torch."""
    made = case.network()
    made.load_state_dict(load_file(Path(found.model) / "model.safetensors"), strict=False)
    return made


def weights(case: Case, found: Pruned) -> dict[str, Tensor]:
    made = network(case, found)
    result = {}
    for name in found.blocks()["block"].to_pylist():
        module: Any = made.get_submodule(name)
        bias = None if module.bias is None else module.bias.detach()
        result[name] = matrix_of(module, module.weight.detach(), bias)
    return result


def kept(found: Pruned, name: str) -> tuple[Tensor, Tensor]:
    """Masks and saliencies of the table, without the bias."""
    table = found.saliency(name)
    assert table["row"].to_pylist() == list(range(len(table)))
    return tuple(torch.tensor(table[c].to_pylist()) for c in ("keep", "saliency"))


def pruned(fits: Fits, case: Case, method: str, out: Path, **settings: Any) -> Pruned:
    """The case's pruning."""
    kind, _, alone = method.partition(" ")
    fit: dict[str, Any] = {"method": kind, **({"rows": ROWS} if kind == "mfac" else {})}
    if settings.get("first_order"):
        fit["gradients"] = True
    if alone:
        settings["inverse"] = "block"
    return fits.run(case, **fit).prune(out, **HERE | {"measure": "none"} | settings)


CONV = "conv2d stride"
NUMBERS: list[tuple[str, str, dict[str, Any]]] = [
    ("mlp", "ekfac", {}),
    ("mlp", "kfac", {"scope": "block", "sparsity": 0.7}),
    ("mlp", "diagonal", {"saliency": "obd"}),
    ("mlp", "mfac", {}),
    ("mlp", "mfac block", {"scope": "block", "sparsity": 0.9}),
    ("mlp", "ekfac", {"structure": "rows", "sparsity": 0.4}),
    ("mlp", "mfac", {"structure": "rows", "sparsity": 0.4, "scope": "block"}),
    ("mlp", "ekfac", {"first_order": True}),
    ("mlp", "diagonal", {"first_order": True, "saliency": "obd"}),
    ("mlp", "mfac", {"first_order": True}),
    ("mlp", "mfac block", {"first_order": True, "structure": "rows"}),
    ("mlp", "ekfac", {"no_update": True}),
    ("mlp", "kfac", {"saliency": "magnitude", "sparsity": 0.0}),
    (CONV, "ekfac", {"sparsity": 0.6}),
    (CONV, "diagonal", {"structure": "2:4"}),
    ("llama", "ekfac", {}),
    ("llama", "kfac", {"structure": "2:4", "blocks": ("*.0.*",)}),
    ("llama", "mfac", {"structure": "1:4", "blocks": ("*.1.mlp.*", "!*up*")}),
    ("llama", "ekfac", {"structure": "heads"}),
    ("llama", "mfac", {"structure": "heads", "first_order": True}),
    ("llama", "diagonal", {"saliency": "magnitude", "structure": "2:4", "blocks": ("*o_proj",)}),
    ("gpt2", "mfac block", {"structure": "heads", "blocks": ("*attn*",)}),
    ("gpt2", "ekfac", {"sparsity": 0.3}),
]


@pytest.mark.parametrize(
    ("name", "method", "settings"),
    NUMBERS,
    ids=[f"{n}, {m}, {' '.join(map(str, s.values()))}" for n, m, s in NUMBERS],
)
def test_masks_weights_and_rises_are_those_of_dense_matrices(
    name: str, method: str, settings: dict[str, Any], fits: Fits, tmp_path: Path
) -> None:
    case = NAMED[name]
    found = pruned(fits, case, method, tmp_path, **settings)
    structure = settings.get("structure", "unstructured")
    names = found.blocks()["block"].to_pylist()
    if structure == "heads":
        assert all(n.endswith(HEADS[name][0]) for n in names)
    elif "blocks" not in settings:
        assert len(names) == {"mlp": 3, CONV: 1, "llama": 14, "gpt2": 4}[name]
    dense = Dense(fits.truth(case), names, method, settings.get("first_order", False))
    criterion, share = settings.get("saliency", "obs"), settings.get("sparsity", 0.5)
    keep, singles, units = masks(
        dense, structure, settings.get("scope", "global"), criterion, share
    )
    new = weights(case, found)
    wanted = {} if settings.get("no_update") else dense.after(keep)
    before = {n: dense.weight(n) for n in names}
    for block in names:
        inputs = int(dense.candidates(block).any(dim=0).sum())
        stays, saliency = kept(found, block)
        assert torch.equal(stays, keep[block][:, :inputs]), block
        assert worst(saliency, singles[block][:, :inputs]) < KEPT, block
        assert not new[block][~keep[block]].any(), block
        if settings.get("no_update"):
            wanted[block] = before[block]
        # What the multipliers leave of zero is none.
        wanted[block] = torch.where(keep[block], wanted[block], 0)
        assert worst(new[block], wanted[block]) < ROUNDED, block
        if structure not in ("heads", "unstructured"):
            given = torch.tensor(found.saliency(block)["unit_saliency"].to_pylist())
            assert worst(given.view(units[block].shape), units[block]) < 1e-6
    if structure == "heads":
        table = found.heads().to_pylist()
        assert [row["keep"] for row in table] == [
            bool(keep[r["block"]][:, r["start"]].all()) for r in table
        ]
        given = torch.tensor([row["saliency"] for row in table])
        assert worst(given, torch.cat([units[n] for n in names])) < 1e-6
    # Counts leave biases out; predictions are of the weights as they were written.
    rows = {row["block"]: row for row in found.blocks().to_pylist()}
    gone = {n: ~keep[n] & dense.candidates(n) for n in names}
    total = sum(int(dense.candidates(n).sum()) for n in names)
    for block, row in rows.items():
        assert row["weights"] == int(dense.candidates(block).sum())
        assert row["removed"] == int(gone[block].sum())
        assert row["saliency"] == pytest.approx(float(singles[block][gone[block]].sum()), rel=1e-6)
    assert found.sparsity == sum(int(g.sum()) for g in gone.values()) / total
    step = {n: new[n].double() - before[n] for n in names}
    assert found.predicted == pytest.approx(dense.prediction(step), rel=CLOSE, abs=1e-18)
    if method != "mfac":
        assert sum(r["predicted"] for r in rows.values()) == pytest.approx(found.predicted)
    nobody_else_changed(case, found, set(names))


def nobody_else_changed(case: Case, found: Pruned, names: set[str]) -> None:
    """Tensors of other modules are byte for byte as they were."""
    old, new = case.network().state_dict(), network(case, found).state_dict()
    others = [k for k in old if k.rpartition(".")[0] not in names]
    assert all(torch.equal(old[k], new[k]) for k in others)
    if names:
        assert any(not torch.equal(old[k], new[k]) for k in old.keys() - set(others)) or (
            found.sparsity == 0
        )


# However it is run

HOW: dict[str, dict[str, Any]] = {
    "two stages": {"stages": 2},
    "three stages, swept": {"schedule": "swept", "stages": 3},
    "two replicas": {"replicas": 2, "stages": 3},
    "small batches": {"batch_tokens": 2},
}


def same_weights(a: Pruned, b: Pruned) -> bool:
    files = [load_file(Path(found.model) / "model.safetensors") for found in (a, b)]
    assert files[0].keys() == files[1].keys()
    return all(torch.equal(files[0][k], files[1][k]) for k in files[0])


def same_saliencies(a: Pruned, b: Pruned) -> bool:
    tables = [found.saliency().replace_schema_metadata(None) for found in (a, b)]
    return bool(tables[0].equals(tables[1]))


@pytest.mark.parametrize("how", HOW)
def test_a_pruning_does_not_depend_on_how_it_is_run(how: str, fits: Fits, tmp_path: Path) -> None:
    run = fits.run(MLP)
    alone = fits.once("pruned", lambda: run.prune(fits.place(), **HERE, measure="blocks"))
    found = run.prune(tmp_path / "a", **HERE, measure="blocks", **HOW[how])
    assert same_weights(found, alone) and same_saliencies(found, alone)
    assert found.predicted == alone.predicted
    # Losses are summed over other batches.
    for column in ("measured", "predicted", "removed"):
        mine, theirs = (torch.tensor(f.blocks()[column].to_pylist()) for f in (found, alone))
        assert worst(mine.double(), theirs) < 1e-6
    assert found.measured == pytest.approx(alone.measured, rel=1e-9)


def test_another_damping_is_another_pruning(fits: Fits, tmp_path: Path) -> None:
    run = fits.run(MLP)
    found = [run.prune(tmp_path / d, **HERE, measure="none", damping=d) for d in ("0.1", "1")]
    assert not same_weights(*found) and not same_saliencies(*found)


# Measured rises


@pytest.mark.parametrize("case", [MLP, LLAMA], ids=lambda case: case.name)
def test_the_measured_rise_is_that_of_the_checkpoint(
    case: Case, fits: Fits, tmp_path: Path
) -> None:
    settings = {"blocks": ("*.1.mlp.*",)} if case is LLAMA else {}
    found = pruned(fits, case, "ekfac", tmp_path, measure="blocks", **settings)
    base = float(fits.truth(case).losses().mean())
    new = weights(case, found)

    def rise(*names: str) -> float:
        def changed() -> Any:
            made = case.network()
            for name in names:
                set_weight(made.get_submodule(name), new[name])
            return made

        return float(Truth(replace(case, network=changed)).losses().mean()) - base

    # Differences of losses near 1, in float64.
    assert found.measured == pytest.approx(rise(*new), rel=CLOSE)
    by_hand = Truth(replace(case, network=lambda: network(case, found)))
    assert found.measured == pytest.approx(float(by_hand.losses().mean()) - base, rel=CLOSE)
    rows = found.blocks().to_pylist()
    for row in rows:
        assert row["measured"] == pytest.approx(rise(row["block"]), rel=CLOSE)
    correlation = np.corrcoef(
        [row["predicted"] for row in rows], [row["measured"] for row in rows]
    )[0, 1]
    assert found.manifest.facts["correlation"] == pytest.approx(correlation)


def test_a_sample_of_the_examples_is_the_same_each_time(fits: Fits, tmp_path: Path) -> None:
    def loss(folder: str, **settings: Any) -> float:
        found = pruned(fits, MLP, "ekfac", tmp_path / folder, measure="total", **settings)
        return float(found.manifest.facts["loss"])

    losses = fits.truth(MLP).losses()
    found = loss("a", measure_examples=4)
    means = [float(losses[list(four)].mean()) for four in combinations(range(len(losses)), 4)]
    assert min(abs(found - mean) for mean in means) < 1e-12
    assert found == loss("b", measure_examples=4, stages=2)
    assert found != loss("c", measure_examples=4, seed=1)
    assert loss("d", measure_examples=9) == pytest.approx(float(losses.mean()), rel=1e-12)


# Several steps


@pytest.mark.parametrize("method", ["ekfac", "mfac"])
def test_steps_are_prunings_and_fits_in_turn(method: str, fits: Fits, tmp_path: Path) -> None:
    steps = 3
    found = pruned(fits, MLP, method, tmp_path / "steps", sparsity=0.75, steps=steps)
    more = {"rows": ROWS} if method == "mfac" else {}
    case, predicted = MLP, []
    for step in range(1, steps + 1):
        run = raycurv.fit(
            case.network, list(MLP.data), tmp_path / f"run {step}", "classification",
            dtype="float64", batch_tokens=MLP.batch_tokens, method=method, fisher="sampled", **more,
            **HERE,
        )  # fmt: skip
        last = run.prune(
            tmp_path / f"pruned {step}", **HERE, measure="none",
            sparsity=1.0 - float(0.25 ** (step / steps)),
        )  # fmt: skip
        predicted.append(last.predicted)
        case = replace(MLP, network=lambda case=case, last=last: network(case, last))
    assert same_weights(found, last)
    masks = [f.saliency()["keep"].to_pylist() for f in (found, last)]
    assert masks[0] == masks[1]
    assert found.predicted == pytest.approx(sum(predicted), rel=1e-12)
    assert found.sparsity == last.sparsity == int(0.75 * 66) / 66
    assert not (tmp_path / "steps" / "work").exists()
    once = pruned(fits, MLP, method, tmp_path / "once", sparsity=0.75)
    assert once.sparsity == found.sparsity and not same_weights(once, found)


def test_what_is_gone_stays_away_in_later_steps(fits: Fits, tmp_path: Path) -> None:
    for structure in ("rows", "unstructured"):
        settings = {"structure": structure, "first_order": True, "sparsity": 0.6}
        found = pruned(fits, MLP, "ekfac", tmp_path / structure, steps=2, **settings)
        new = weights(MLP, found)
        for name in new:
            stays, _ = kept(found, name)
            assert not new[name][:, : stays.shape[1]][~stays].any()
    assert found.sparsity == int(0.6 * 66) / 66


# Less than float64


@pytest.mark.parametrize("method", ["ekfac", "mfac"])
def test_a_checkpoint_in_bfloat16_stays_so_and_is_rounded_once(
    method: str, fits: Fits, tmp_path: Path
) -> None:
    def narrow() -> Any:
        return MLP.network().to(torch.bfloat16)

    case = replace(MLP, name="mlp, bf16", network=narrow)
    found = pruned(fits, case, method, tmp_path)
    file = load_file(Path(found.model) / "model.safetensors")
    assert {t.dtype for t in file.values()} == {torch.bfloat16}
    truth = Truth(replace(MLP, network=lambda: narrow().float()))
    names = found.blocks()["block"].to_pylist()
    dense = Dense(truth, names, method)
    keep = masks(dense, "unstructured", "global", "obs", 0.5)[0]
    wanted, new = dense.after(keep), weights(case, found)
    for name in names:
        exact = torch.where(keep[name], wanted[name], 0).float()
        assert torch.equal(new[name], exact.to(torch.bfloat16))


def test_what_went_stays_away_though_the_gradient_would_have_it_back(fits) -> None:
    # A weight of zero costs nothing to leave out, but for the first-order term.
    run = fits.run(MLP, gradients=True)
    how = {"address": "none", "quiet": True, "measure": "none", "first_order": True}
    first = run.prune(fits.place(), sparsity=1 - 0.5**0.5, **how)
    both = run.prune(fits.place(), sparsity=0.5, steps=2, **how)
    for name in run.block_names():
        before, after = (p.saliency(name)["keep"].to_pylist() for p in (first, both))
        pairs = [
            (a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True)
        ]
        assert not any(b and not a for a, b in pairs), name
