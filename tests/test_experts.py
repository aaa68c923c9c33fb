"""Experts and routers: their rows against autograd, in every layout that transformers has."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import worst
from networks import MIXTURE, MIXTURE_3
from test_invariance import DOUBLE, result, same
from torch import Tensor, nn
from transformers.integrations.moe import grouped_mm_experts_forward, use_experts_implementation

import raycurv
from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.files.artifacts import read_blocks, read_factor
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Capture, Captured, Record
from raycurv.mathematics.choice import choose_blocks
from raycurv.mathematics.gradients import example_gradients
from raycurv.mathematics.kinds import experts as kind_of_experts
from raycurv.mathematics.kinds.catalogue import kind_of_block
from raycurv.mathematics.kinds.experts import experts_forward

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from dense_gradients import gradient_errors
from tiny_families import tiny_config, tiny_model

EXACT = 1e-10
WIDTH, INNER, EXPERTS, CHOSEN = 8, 8, 5, 2  # multiples of 16 bytes, as grouped_mm wants

LAYOUTS: dict[str, dict[str, bool]] = {
    "plain": {},
    "transposed, interleaved, biases": {
        "is_transposed": True, "is_concatenated": False, "has_bias": True,
    },
    "interleaved": {"is_concatenated": False},
    "transposed, biases": {"is_transposed": True, "has_bias": True},
    "no gate": {"has_gate": False, "has_bias": True},
    "a norm behind": {"has_post_expert_norm": True},
}  # fmt: skip


def _experts(dtype: torch.dtype = torch.float64, **flags: bool) -> Any:
    """A module of experts as transformers' decorator makes it; its own forward is never asked."""

    class Own(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            gate, bias = flags.get("has_gate", True), flags.get("has_bias", False)
            for name, d_in, d_out in (
                ("gate_up_proj" if gate else "up_proj", WIDTH, INNER * (1 + gate)),
                ("down_proj", INNER, WIDTH),
            ):
                shape = (d_in, d_out) if flags.get("is_transposed") else (d_out, d_in)
                setattr(self, name, nn.Parameter(torch.randn(EXPERTS, *shape)))
                if bias:
                    setattr(self, f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, d_out)))
            self.num_experts, self.act_fn = EXPERTS, nn.SiLU()
            if flags.get("has_post_expert_norm"):
                self.post_expert_norm = nn.LayerNorm(WIDTH)

        def _apply_gate(self, y: Tensor) -> Tensor:
            alternate = not flags.get("is_concatenated", True)
            gate, up = (y[:, ::2], y[:, 1::2]) if alternate else y.chunk(2, dim=1)
            return torch.tanh(gate) * (up + 1)

        def forward(self, *args: Any) -> Tensor:
            raise AssertionError("experts have a forward of ours")

    torch.manual_seed(0)
    return use_experts_implementation(**flags)(Own)(None).to(dtype)


class Layer(nn.Module):
    """Examples ``[N, T, d]`` through experts; the fourth of these is no token's."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        scores = flat @ torch.linspace(-2, 2, EXPERTS * WIDTH, dtype=x.dtype).view(WIDTH, EXPERTS)
        scores = scores.index_fill(1, torch.tensor([3]), -torch.inf)
        weights, chosen = scores.softmax(dim=1).topk(CHOSEN, dim=1)
        return x + self.experts(flat, chosen, weights).view_as(x)


MASK = torch.tensor([[True] * 6, [True] * 2 + [False] * 4, [True] * 5 + [False]])


def _batch(dtype: torch.dtype = torch.float64) -> Batch:
    x = torch.randn(3, 6, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Batch(0, ("a", "b", "c"), x.to(dtype), MASK)


def _captured(layer: nn.Module, batch: Batch) -> tuple[dict[str, Block], Captured]:
    capture, record = Capture(layer, choose_blocks(layer, ())), Record(batch)
    with capture.recording(record):
        out = layer(batch.inputs)
    capture.blocks = {block.name: block for block in capture.discover(record)}
    (out.tanh().sum(dim=2) * MASK).sum().backward()
    captured = capture.captured(record)
    capture.close()
    return capture.blocks, captured


def _gradient(captured: Captured, block: Block) -> Tensor:
    g = captured.gradients[block.name]
    assert g is not None
    return example_gradients(captured.inputs[block.input_factor], g)


def _part(block: Block, name: str, parameter: Tensor, flags: dict[str, bool]) -> Tensor:
    """What of a parameter is a block's, ``[O, I]`` or ``[O]``, from the flags alone."""
    own = parameter[block.index]
    own = own.T if flags.get("is_transposed") and own.ndim == 2 else own
    if not block.part:
        return own
    if flags.get("is_concatenated", True):
        return own[:INNER] if block.part == "gate" else own[INNER:]
    return own[0::2] if block.part == "gate" else own[1::2]


@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_of_an_expert_give_the_gradient_of_its_matrix(flags: dict[str, bool]) -> None:
    layer = Layer(_experts(**flags))
    layer.experts.forward = lambda *args: experts_forward(layer.experts, *args)
    batch = _batch()
    parameters = [p for p in layer.parameters() if p.ndim > 1]
    names = {id(p): name for name, p in layer.experts.named_parameters(recurse=False)}
    want = []
    for x, live in zip(batch.inputs, MASK, strict=True):
        loss = layer(x[live][None]).tanh().sum()
        found = torch.autograd.grad(loss, parameters)
        want.append({names[id(p)]: g for p, g in zip(parameters, found, strict=True)})
    blocks, captured = _captured(layer, batch)
    assert len(blocks) == EXPERTS * (3 if flags.get("has_gate", True) else 2)
    seen = 0
    for block in blocks.values():
        kind = kind_of_block(block)
        views = [_part(block, n, layer.experts.get_parameter(n), flags)
                 for n in kind.parameters(block)]  # fmt: skip
        seen += sum(view.numel() for view in views)
        own = [kind.part(block, layer.experts.get_parameter(n)) for n in kind.parameters(block)]
        assert torch.equal(kind.to_rows(own[0]), views[0])
        if block.index == 3:
            # None of the tokens has met it.
            assert captured.gradients[block.name] is None
            assert block.input_factor not in captured.inputs
            continue
        for n, gradient in enumerate(_gradient(captured, block)):
            parts = [_part(block, k, want[n][k], flags) for k in kind.parameters(block)]
            dense = torch.cat([p if p.ndim == 2 else p[:, None] for p in parts], dim=1)
            assert worst(gradient, dense) < EXACT, block.name
    assert seen == sum(p.numel() for p in parameters)
    # Each row is one token's, and no padding is among them.
    factors = {b.input_factor for b in blocks.values() if b.parameter == "down_proj"}
    assert sum(captured.rows.get(f, 0) for f in factors) == CHOSEN * int(MASK.sum())


def test_gate_and_up_read_the_same_rows_and_down_its_own() -> None:
    blocks, captured = _captured(Layer(_experts()), _batch())
    one = "experts.gate_up_proj.1"
    assert blocks[f"{one}.gate"].input_factor == blocks[f"{one}.up"].input_factor
    assert len({b.input_factor for b in blocks.values()}) == 2 * EXPERTS
    a = captured.inputs[blocks[f"{one}.gate"].input_factor]
    assert a.shape[1] < MASK.shape[1] or int(MASK.sum()) == captured.rows[f"{one}.gate.input"]


def test_rows_dealt_to_another_expert_are_seen(fits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Control of all above.
    layer = Layer(_experts())
    blocks, captured = _captured(layer, _batch())
    right = {name: _gradient(captured, block) for name, block in blocks.items() if block.index == 1}
    own = kind_of_experts.Dealt.of

    def next_one(dealt: Any, block: Any, call: Any) -> Any:
        return own(dealt, replace(block, index=(block.index + 1) % dealt.sizes[0]), call)

    monkeypatch.setattr(kind_of_experts.Dealt, "of", next_one)
    blocks, captured = _captured(layer, _batch())
    for name, gradient in right.items():
        assert worst(_gradient(captured, blocks[name]), gradient) > 1e-2
    # A fit sees it itself.
    with pytest.raises(UserError, match=r"block model.layers.0.mlp.experts[\s\S]*relative error"):
        fits.run(MIXTURE, seed=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS)
def test_the_forward_is_that_of_grouped_mm(flags: dict[str, bool], dtype: torch.dtype) -> None:
    experts = _experts(dtype, **flags)
    x = torch.randn(40, WIDTH, dtype=dtype)
    chosen = torch.rand(40, EXPERTS).topk(CHOSEN, dim=1).indices
    weights = torch.rand(40, CHOSEN)
    with torch.no_grad():
        want = grouped_mm_experts_forward(experts, x, chosen, weights)
        got = experts_forward(experts, x, chosen, weights)
    assert got.dtype == want.dtype
    # In bfloat16 the same products and sums, rounded alike.
    assert torch.equal(got, want) if dtype == torch.bfloat16 else worst(got, want) < 1e-6


def test_experts_behind_the_positions_have_a_row_an_example() -> None:
    class Pooled(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mean(dim=1, keepdim=True))

    blocks, captured = _captured(Pooled(_experts()), _batch())
    downs = [b for b in blocks.values() if b.parameter == "down_proj"]
    assert sum(captured.rows.get(b.input_factor, 0) for b in downs) == CHOSEN * len(MASK)


def test_rows_that_mix_examples_are_refused() -> None:
    layer = Layer(_experts())
    x = _batch().inputs
    capture, record = Capture(layer, choose_blocks(layer, ())), Record(Batch(0, tuple("abcd"), x))
    with capture.recording(record):
        layer(x[:, :5]).sum().backward()
    capture.blocks = {block.name: block for block in capture.discover(record)}
    with pytest.raises(UserError, match="the 4 examples"):
        capture.captured(record)


def test_a_subclass_that_computes_otherwise_is_no_module_of_experts() -> None:
    decorated = type(_experts())

    class Doubled(decorated):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any) -> Tensor:
            return 2 * grouped_mm_experts_forward(self, *args)

    class Same(decorated):  # type: ignore[misc, valid-type]
        pass

    # Ours would take the place of its forward.
    with pytest.raises(UserError, match=r"experts.gate_up_proj.*of another kind"):
        choose_blocks(Layer(Doubled(None)), ())
    assert len(choose_blocks(Layer(Same(None)), ())) == 3 * EXPERTS


# Routers


class TopRouter(nn.Module):
    """Weights of the best experts, whose scores are computed in float32."""

    def __init__(self, multiply: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, dtype=torch.float64) / 4)
        self.multiply = multiply

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weight.float()
        if self.multiply == "otherwise":
            scores = x.float() @ weight.T
        else:
            scores = torch.nn.functional.linear(x.float(), weight)
        weights, chosen = scores.softmax(dim=-1).topk(CHOSEN, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        return (weights.detach() if self.multiply == "detached" else weights), chosen


class Routed(nn.Module):
    def __init__(self, multiply: str = "linear") -> None:
        super().__init__()
        torch.manual_seed(2)
        self.router = TopRouter(multiply)
        self.values = nn.Linear(WIDTH, EXPERTS).double()

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        return (self.values(x).gather(-1, chosen) * weights).sum(dim=-1, keepdim=True)


def test_a_router_is_caught_inside_its_forward() -> None:
    network = Routed()
    batch = _batch()
    want = [
        torch.autograd.grad(network(x[live][None]).tanh().sum(), network.router.weight)[0]
        for x, live in zip(batch.inputs, MASK, strict=True)
    ]
    blocks, captured = _captured(network, batch)
    assert blocks["router"].kind == "router"
    assert worst(_gradient(captured, blocks["router"]), torch.stack(want)) < 1e-6  # float32
    # One whose weights carry no gradient has none.
    assert _captured(Routed("detached"), batch)[1].gradients["router"] is None


def test_a_router_that_multiplies_otherwise_is_refused(tmp_path: Path) -> None:
    rows = [{"inputs": [0.5, -1.0, 2.0, n, 1, 1, 1, 1], "labels": [float(n)]} for n in range(3)]
    given: dict[str, Any] = {
        "objective": "regression", "address": "none", "quiet": True, "dtype": "float64",
    }  # fmt: skip
    run = raycurv.fit(lambda: Routed("detached"), rows, tmp_path / "detached", **given)
    outcomes = {row["block"]: row["eigh_outcome"] for row in run.blocks().to_pylist()}
    assert outcomes == {"router": "zero", "values": "ok"}
    with pytest.raises(UserError, match="block router"):
        raycurv.fit(lambda: Routed("otherwise"), rows, tmp_path / "otherwise", **given)


# Families, as transformers itself computes them: in float64, on three stages, with padding. The
# tolerance is that of the parts that transformers computes in float32.
FAMILIES = {
    "qwen2_moe": ("a gate for shared experts", EXACT),
    "phimoe": ("a router without a gradient", EXACT),
    "llama4": ("bmm over all experts, scores in float32", 1e-6),
    "deepseek_v3": ("a router in float32", 1e-6),
}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.usefixtures("quiet_transformers")
def test_gradients_of_a_family_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    folder = str(tmp_path / "model")
    tiny_model(tiny_config(kind)).save_pretrained(folder)
    errors = gradient_errors(folder, 3)
    assert any("router" in name or name.endswith("gate") for name in errors)
    assert sum(".experts.down_proj." in name for name in errors) >= 4
    assert max(errors.values()) < FAMILIES[kind][1], max(errors, key=lambda name: errors[name])


# Fits


def test_results_do_not_depend_on_stages_or_batches(fits: Any) -> None:
    how: dict[str, Any] = {"stages": 3, "schedule": "swept", "batch_tokens": 9}
    want = result(fits, MIXTURE_3, "float64")
    same(result(fits, MIXTURE_3, "float64", **how), want, DOUBLE)


def test_an_expert_without_tokens_has_the_outcome_zero(fits: Any) -> None:
    table = {row["block"]: row for row in fits.run(MIXTURE).blocks().to_pylist()}
    zero = {name for name, row in table.items() if row["eigh_outcome"] == "zero"}
    assert zero == {name for name, row in table.items() if row["tokens"] == 0}
    assert zero >= {name for name in table if ".2" in name.partition("experts")[2]}
    assert 3 <= len(zero) <= 6
    met = sum(r["tokens"] for name, r in table.items() if ".down_proj." in name)
    assert met == 2 * sum(len(row["input_ids"]) for row in MIXTURE.data)


@pytest.mark.parametrize(
    "globs, count",
    [
        (("*.experts",), 12),
        (("*.experts.down_proj",), 4),
        (("*.experts.*.1",), 3),
        (("*.experts.gate_up_proj.*.up",), 4),
        (("*.router",), 1),
        (("!*.experts",), 5),
        (("*.mlp", "!*.3"), 10),
        (("*.mlp", "!*.experts.gate_up_proj.3.gate"), 12),
    ],
)
def test_globs_reach_experts(fits: Any, globs: tuple[str, ...], count: int) -> None:
    from raycurv.models.opening import open_model

    model = open_model(fits.source(MIXTURE))
    chosen = choose_blocks(model.skeleton(), globs, model.default_scope, model.tied_head)
    assert len(chosen) == count


# What the fit never saw


def test_a_query_says_how_much_of_it_lies_in_experts_that_the_fit_never_saw(
    fits: Any, tmp_path: Path
) -> None:
    source = fits.source(MIXTURE_3)
    data = [row for row in MIXTURE_3.data if len(row["input_ids"]) > 1][:4]
    how: dict[str, Any] = {"address": "none", "dtype": "float64", "quiet": True}
    run = raycurv.fit(source, data[:1], str(tmp_path / "run"), objective="causal-lm", **how)
    rows = run.blocks().to_pylist()
    unreached = [row["block"] for row in rows if row["tokens"] == 0]
    experts = [row for row in rows if ".experts." in row["block"]]
    assert 0 < len(unreached) < len(experts)
    thin = [r["block"] for r in experts if r["tokens"] < 2 * max(r["d_in"], r["d_out"])]
    assert [row["block"] for row in experts if row["thin"]] == thin
    assert run.manifest.facts["experts"] == {
        "blocks": len(experts), "unreached": unreached, "thin": len(thin) - len(unreached),
    }  # fmt: skip
    # Where it is extended, what the new examples reach has curvature, in bases of no rows.
    more = raycurv.fit(
        source, data[1:], str(tmp_path / "more"), objective="causal-lm", extend=run.path, **how
    )
    found = {row["block"]: row for row in more.blocks().to_pylist()}
    reached = {name for name in unreached if found[name]["mean_eigenvalue"]}
    assert reached and all(found[name]["tokens"] == 0 for name in reached)
    assert set(more.manifest.facts["experts"]["unreached"]) == set(unreached) - reached
    # With no curvature at all the score of a query on itself is its squared gradient, block by
    # block.
    plain = raycurv.fit(
        source, data, str(tmp_path / "plain"), objective="causal-lm", method="identity", **how
    )
    own = plain.influence(
        data, data, str(tmp_path / "own"), rank="full", per_block=True, address="none", quiet=True
    )
    table = own.table()
    names = json.loads(table.schema.metadata[b"raycurv.blocks"])
    want = {}
    for row in table.to_pylist():
        if row["query_id"] == row["train_id"]:
            parts = dict(zip(names, row["block_scores"], strict=True))
            want[row["query_id"]] = sum(parts[n] for n in unreached) / sum(parts.values())
    want = {query: share for query, share in want.items() if share > 0}
    assert want
    ways = ({"rank": "full"}, {"rank": "2", "stages": 3, "query_memory": "1"})
    for number, more in enumerate(ways):
        out = str(tmp_path / f"scores-{number}")
        scores = run.influence(data, data[:1], out, address="none", quiet=True, **more)
        assert scores.manifest.facts["unreached_shares"] == pytest.approx(want, rel=1e-9)
    # Control: a fit of everything that is asked about sees it all.
    seen = fits.run(MIXTURE_3).influence(
        data, data[:1], str(tmp_path / "seen"), address="none", quiet=True
    )
    assert "unreached_shares" not in seen.manifest.facts


def test_pruning_tells_of_experts_whose_weights_seem_to_cost_nothing(
    fits: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [row for row in MIXTURE_3.data if len(row["input_ids"]) > 1][:1]
    run = raycurv.fit(
        fits.source(MIXTURE_3), data, str(tmp_path / "run"), objective="causal-lm",
        address="none", dtype="float64", quiet=True,
    )  # fmt: skip
    down = [row["block"] for row in run.blocks().to_pylist() if ".down_proj." in row["block"]]
    unreached = [name for name in run.manifest.facts["experts"]["unreached"] if name in down]
    how: dict[str, Any] = {"blocks": ("*.down_proj",), "address": "none", "measure": "none"}
    run.prune(str(tmp_path / "pruned"), sparsity=0.1, **how)
    assert f"{len(unreached)} blocks have no curvature" in capsys.readouterr().err
    run.prune(str(tmp_path / "magnitude"), sparsity=0.1, saliency="magnitude", **how)
    assert "no curvature" not in capsys.readouterr().err


# One output factor for all


def test_experts_of_a_layer_may_share_their_last_output_factor(fits: Any) -> None:
    own, shared = (fits.run(MIXTURE, share_output_factor=s, keep_sums=True) for s in (False, True))
    blocks = {b.name: b for b in read_blocks(shared._store)}
    down = [b for b in blocks.values() if b.parameter == "down_proj"]
    (name,) = {b.output_factor for b in down}
    assert {b.name for b in blocks.values() if b.output_factor == name} == {b.name for b in down}
    # The mean over all of their rows; each expert's own is over its own.
    parts = [read_factor(own._store, f"{b.name}.output") for b in down]
    joined = read_factor(shared._store, name)
    assert (joined.count, joined.rows) == (sum(p.count for p in parts), sum(p.rows for p in parts))
    assert worst(joined.tiles[0], torch.stack([p.tiles[0] for p in parts]).sum(dim=0)) < EXACT
    # Rows, and what is exact in every basis, stay those of each matrix.
    mine, theirs = (run.blocks().to_pylist() for run in (own, shared))
    for one, other in zip(mine, theirs, strict=True):
        assert (one["block"], one["tokens"], one["thin"]) == tuple(
            other[key] for key in ("block", "tokens", "thin")
        )
        assert other["trace"] == pytest.approx(one["trace"], rel=1e-9)
    # What Λ says in a basis is the second moment of the gradients there: the diagonal in that of
    # the weights is not the same.
    block = max(down, key=lambda b: {r["block"]: r["trace"] for r in theirs}[b.name]).name
    first, second = (run.curvature(block).dense() for run in (own, shared))
    assert torch.trace(first).item() == pytest.approx(torch.trace(second).item(), rel=1e-9)
    assert worst(first, second) > 1e-3
    # And so on several stages, and of K-FAC.
    more = fits.run(MIXTURE, share_output_factor=True, method="kfac")
    rows = {row["block"]: row for row in more.blocks().to_pylist()}
    assert all(rows[r["block"]]["tokens"] == r["tokens"] for r in theirs)
    examples, names = theirs[0]["examples"], [b.name for b in down]
    for one in names:
        (a,), (g,) = (read_factor(shared._store, f).mean() for f in (f"{one}.input", name))
        want = rows[one]["tokens"] / examples * torch.trace(a) * torch.trace(g)
        assert rows[one]["trace"] == pytest.approx(want.item(), rel=1e-9)
    with pytest.raises(UserError, match=r"--share-output-factor.*none"):
        fits.run(MIXTURE, share_output_factor=True, blocks=("*.q_proj",))
    with pytest.raises(UserError, match=r"--share-output-factor.*--method diagonal"):
        fits.run(MIXTURE, share_output_factor=True, method="diagonal")
