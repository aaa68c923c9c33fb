"""Claims about plans: exact counts, what holds when settings change, refusals by how much."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Outcome, run_here, save_llama, texts, write_rows

from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.jobs import check
from raycurv.mathematics.bases import BASES
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Capture, Record
from raycurv.mathematics.choice import choose_blocks
from raycurv.mathematics.tiles import decomposable
from raycurv.models.model import Outline
from raycurv.models.opening import open_model, open_outline
from raycurv.planning import fit_plan, influence_plan
from raycurv.planning.advice import Bounds, advise, as_sentence
from raycurv.planning.arrangement import Arrangement, Peak
from raycurv.planning.cost import PassCost
from raycurv.planning.job import Job
from raycurv.planning.plan import Phase, Plan
from raycurv.planning.rates import Rates
from raycurv.planning.shapes import DataShape, Recipe, Solving, StageShape, stage_shapes
from raycurv.planning.sizes import sizes
from raycurv.planning.supply import Supply, memory_here
from raycurv.planning.trace import trace
from raycurv.stages.dealing import cut_stages
from raycurv.steps.method_steps import costs_of

# hidden, feed-forward, layers, heads, key-value heads, vocabulary; then sizes worked out by hand:
# factors and Λ in float32 (GB), factors, widest, covariance and propagation (GFLOP a token).
PUBLISHED = {
    "Llama-3-8B": ((4096, 14336, 32, 32, 8, 128256), (92, 28, 352, 14336, 46, 28)),
    "Llama-2-13B": ((5120, 13824, 40, 40, 40, 32000), (125, 51, 440, 13824, 63, 51)),
    "Qwen2.5-32B": ((5120, 27648, 64, 40, 8, 152064), (628, 125, 704, 27648, 314, 125)),
    "Llama-3-70B": ((8192, 28672, 80, 64, 8, 128256), (919, 274, 880, 28672, 459, 274)),
}


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts: its configuration with one layer of experts behind ``dense`` others,
    how many such layers it has, experts that a token meets, and what those of all layers were said
    to have: factors and Λ in float32 (GB), and factors."""

    config: dict[str, Any]
    layers: int
    met: tuple[int, int]
    published: tuple[float, float, int]
    dense: int = 0


MIXTURES = {
    "Qwen3-30B-A3B": Mixture({
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
    }, 48, (8, 128), (250, 116, 30_720)),
    "Mixtral 8x7B": Mixture({
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "vocab_size": 32000,
    }, 32, (2, 8), (666, 180, 1_280)),
    "gpt-oss-20b": Mixture({
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088,
    }, 24, (4, 32), (127, 76, 3_840)),
    "DeepSeek-V3": Mixture({
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_attention_heads": 128, "num_key_value_heads": 128,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8,
        "topk_group": 4, "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280,
    }, 58, (8, 256), (6_850, 2_615, 74_240), dense=3),
}  # fmt: skip
SMALL = (256, 512, 6, 4, 2, 1000)
BASE = 300 * 10**6


def write_config(folder: Path, *shape: int, **more: Any) -> Path:
    """The ``config.json`` of a Llama, without weights."""
    hidden, inner, layers, heads, groups, vocabulary = shape
    said = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(said | more))
    return folder


def chosen(outline: Outline, globs: Sequence[str] = ()) -> tuple[Block, ...]:
    return choose_blocks(outline.skeleton(), globs, outline.default_scope, outline.tied_head)


def shapes(
    outline: Outline,
    recipe: Recipe,
    count: int = 1,
    batch: tuple[int, int] = (8, 512),
    globs: Sequence[str] = (),
) -> tuple[StageShape, ...]:
    traced = trace(outline, chosen(outline, globs), *batch, recipe.dtype)
    assert traced.seen
    cuts = cut_stages(outline.unit_costs, count)
    return stage_shapes(outline, cuts, traced, recipe.dtype, batch[0] * batch[1])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Outline:
    return open_outline(str(write_config(tmp_path_factory.mktemp("small"), *SMALL)))


def job(outline: Outline, stages: int = 1, **more: Any) -> Job:
    place = {k: more.pop(k) for k in ("homes", "replicas", "ray", "nodes", "gpus") if k in more}
    recipe = Recipe(**more)
    return Job(shapes(outline, recipe, stages), recipe, Arrangement(**place), BASE)


def plan_fit(job: Job, data: DataShape) -> Plan:
    return fit_plan.plan_fit(job, data, costs_of(job.recipe))


def plan_influence(
    job: Job, queries: DataShape, train: DataShape, products: DataShape | None = None
) -> Plan:
    return influence_plan.plan_influence(
        job, queries, train, costs_of(replace(job.recipe, gradients=False)), products
    )


DATA = DataShape.uniform(256, 512, 4096)


# Counts


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_worked_out_by_hand(name: str, tmp_path: Path) -> None:
    shape, published = PUBLISHED[name]
    found = sizes(shapes(open_outline(str(write_config(tmp_path, *shape))), Recipe()), Recipe())
    counted = (
        round(found.factors / 1e9),
        round(found.lam / 1e9),
        found.matrices,
        found.widest,
        round(found.covariance / 1e9),
        round(found.propagation / 1e9),
    )
    assert counted == published
    assert found.blocks == 7 * shape[2]


def test_every_parameter_takes_no_square_of_the_vocabulary(tmp_path: Path) -> None:
    outline = open_outline(str(write_config(tmp_path / "wide", *SMALL[:-1], 128256)))
    blocks = decomposable(chosen(outline, ("all",)), None, outline.vocab_size)
    traced = trace(outline, blocks, 8, 512, torch.float32)
    (stage,) = stage_shapes(outline, (range(outline.units),), traced, torch.float32, 8 * 512)
    found = sizes((stage,), Recipe())
    assert stage.elements == sum(p.numel() for p in outline.skeleton().parameters())
    # A of the head and G of the embedding are all that is square; vectors are as long as they are.
    default = sizes(shapes(outline, Recipe()), Recipe())
    vectors = 4 * (2 * 128256 + 13 * (256 + 1))
    assert found.factors - default.factors == 2 * 4 * 256**2 + vectors
    # Rows of the embedding are on the tokens that there are; a norm has one row an example.
    by_name = {block.name: block for block in stage.blocks}
    embedding, norm = by_name["model.embed_tokens"], by_name["model.layers.0.input_layernorm"]
    assert stage.columns(DATA, embedding) == DATA.rows and stage.share(norm) == 1 / 512
    with pytest.raises(UserError, match="stages 1, 2"):
        tied = open_outline(str(write_config(tmp_path / "tied", *SMALL, tie_word_embeddings=True)))
        tied.check_cuts(chosen(tied, ("all",)), cut_stages(tied.unit_costs, 2))


@pytest.mark.parametrize("name", MIXTURES)
def test_sizes_of_experts_are_those_worked_out_by_hand(name: str, tmp_path: Path) -> None:
    mixture, recipe = MIXTURES[name], Recipe()
    said = mixture.config | {"num_hidden_layers": mixture.dense + 1, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(said))
    outline = open_outline(str(tmp_path))
    stages = shapes(outline, recipe, globs=["*.mlp.experts"])
    found, (routed, experts) = sizes(stages, recipe), mixture.met
    factors, lam, matrices = mixture.published
    assert found.factors * mixture.layers / 1e9 == pytest.approx(factors, rel=0.005)
    assert found.lam * mixture.layers / 1e9 == pytest.approx(lam, rel=0.01)
    assert (found.matrices * mixture.layers, found.blocks) == (matrices, 3 * experts)
    # A row of each factor for each expert that a token meets, and weights likewise; all experts
    # have sums and weights.
    share = routed / experts
    assert found.covariance == pytest.approx(2 * found.factors / 4 * share)
    assert found.propagation == pytest.approx(4 * found.lam / 4 * share)
    (covariances, *_), data = costs_of(recipe), DataShape.uniform(8, 512, 4096)
    assert isinstance(covariances, PassCost)
    assert covariances.flops(stages[0], recipe, data) == pytest.approx(
        found.covariance * data.tokens
    )
    assert covariances.held(stages[0], recipe, data) == {"sums of A and G": found.factors}
    # Of experts that are alike one is looked at.
    assert len(stages[0].blocks) == 3


@pytest.mark.parametrize("length", [16, 4096])
def test_factors_of_gradients_take_what_their_passes_do(small: Outline, length: int) -> None:
    mine = job(small, basis=BASES["kronecker"], basis_passes=3)
    data = DataShape.uniform(8, length, 4096)
    phases = [phase.name for phase in plan_fit(mine, data).phases]
    assert phases.count("power iteration: A and G") == 2
    first, power, _, *_ = costs_of(mine.recipe)
    assert isinstance(first, PassCost) and isinstance(power, PassCost)
    (stage,) = mine.stages
    # A few rows are multiplied with each other; of many the gradient is formed.
    want = 0.0
    for b in stage.blocks:
        o, i = b.d_out, b.d_in
        rows = 2 * length**2 * (i + o) + length * (i * i + o * o)
        want += 2 * stage.count(b) * (rows if length == 16 else o * i * (length + o + i))
    assert first.flops(stage, mine.recipe, data) == pytest.approx(8 * want)
    before = power.held(stage, mine.recipe, data)["A and G of the step before"]
    assert before == sizes(mine.stages, mine.recipe).factors


@pytest.mark.parametrize("tied", [False, True])
def test_an_outline_says_what_the_model_says(tmp_path: Path, tied: bool) -> None:
    folder = save_llama(tmp_path / "m", layers=3, tie_word_embeddings=tied)
    model, outline = open_model(str(folder)), open_outline(str(folder))
    (folder / "model.safetensors").unlink()
    assert open_outline(str(folder)).units == 3
    assert (outline.unit_costs, outline.width) == (model.unit_costs, model.width)
    assert outline.tied_head == model.tied_head and (outline.tied_head is not None) == tied
    assert chosen(outline) == chosen(model)
    for units in (range(0, 1), range(1, 3), range(0, 3)):
        assert outline.weight_bytes(units, torch.float32) == model.weight_bytes(
            units, torch.float32
        )
    with pytest.raises(UserError, match=r"model\.safetensors"):
        open_model(str(folder))


def test_a_trace_keeps_what_a_forward_keeps(tmp_path: Path) -> None:
    """With padding, where attention kernels take a mask; activations dominate at this length."""
    model = open_model(str(save_llama(tmp_path / "m", max_position_embeddings=128)))
    blocks = chosen(model)
    mask = torch.ones(4, 64, dtype=torch.bool)
    mask[0, 40:] = False
    batch = Batch(0, ("a", "b", "c", "d"), torch.zeros(4, 64, dtype=torch.int64), mask)
    segment = model.build(range(0, 2), torch.float32, torch.device("cpu"))
    capture, record = Capture(segment.module, blocks), Record(batch)
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage
        return tensor

    with capture.recording(record), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        segment.forward(batch, None)
    for calls in record.calls.values():
        keep(calls[0].x)
    for parameter in segment.module.parameters():
        kept.pop(id(parameter.untyped_storage()), None)
    really = sum(storage.nbytes() for storage in kept.values())
    traced = trace(open_outline(str(tmp_path / "m")), blocks, 4, 64, torch.float32)
    # The mask and the rotary tables are the model's, not a layer's.
    assert sum(traced.kept) == pytest.approx(really, rel=0.1)
    half = trace(open_outline(str(tmp_path / "m")), blocks, 2, 64, torch.float32)
    assert sum(half.kept) < 0.6 * sum(traced.kept)
    found = capture.discover(record)
    assert traced.blocks == found
    assert len({b.input_factor for b in found}) == 2 * 4 < len(found)


@pytest.mark.parametrize("more", [(), ("--gradients",)], ids=["plain", "gradients"])
def test_a_fits_files_take_what_was_planned(more: tuple[str, ...], tmp_path: Path) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 2}
    model = save_llama(tmp_path / "m", **shape)
    data = write_rows(tmp_path / "d.parquet", texts(12))
    flags = ["--model", model, "--data", data, "--keep-sums", "--store-dtype", "bfloat16"]
    flags += more
    said = run_here("plan.py", [*flags, "--json", "--out", tmp_path])
    planned = json.loads(said.out)["plans"]["fit"]
    assert run_here("fit.py", [*flags, "--out", tmp_path / "r", "--address", "none"]).code == 0
    large = ["factors", "eigen", "corrected"] + (["gradients"] if more else [])
    files = [f for name in large for f in (tmp_path / "r" / name).iterdir()]
    taken = sum(file.stat().st_size for file in files)
    # Headers and checksums are 2 % of matrices as small as these.
    assert planned["kept"] == pytest.approx(taken, rel=0.03)
    assert planned["disk"] >= planned["kept"]


# What holds when settings change


@pytest.mark.parametrize("method", ["ekfac", "kfac", "diagonal", "identity"])
def test_gradient_statistics_take_their_sums_and_files(small: Outline, method: str) -> None:
    plain = plan_fit(job(small, method=method, ray=False), DATA)
    weights = sum(b.d_in * b.d_out for b in chosen(small))
    written = 4 * DATA.examples * len(chosen(small))
    for own, sums in ((False, 2), (True, 4)):
        more = {"gradients": True, "own": own, "method": method}
        found = plan_fit(job(small, ray=False, **more), DATA)
        assert found.kept - plain.kept == 4 * sums * weights + written
        first, before = (plan.phases[1] for plan in (found, plain))
        # 4 bytes an element, and 12 of those that are added to more than 32 times.
        taken = first.peak.parts["sums of gradients"]
        assert 4 * sums * weights <= taken <= 12 * sums * weights
        assert first.peak.bytes > before.peak.bytes and first.flops > before.flops
        if method == "ekfac":
            # Resident stages gather in the first pass alone.
            assert found.phases[3].peak == plain.phases[3].peak
    # In a sweep the passes share what is spooled: one gradient more.
    swept = {"homes": 1, "method": method, "gradients": True}
    one, two = (plan_fit(job(small, 6, own=own, **swept), DATA) for own in (False, True))
    moved = [sum(phase.moved for phase in plan.phases) for plan in (one, two)]
    assert moved[1] > moved[0]


def test_each_stage_of_many_takes_less(small: Outline) -> None:
    """A stage for each layer: fewer sums and weights, though more microbatches are open."""
    one, six = (plan_fit(job(small, k, nodes=k), DATA) for k in (1, 6))
    assert six.process.peak.bytes < one.process.peak.bytes
    together = plan_fit(job(small, 6, ray=False), DATA)
    assert together.process.peak.bytes > one.process.peak.bytes - BASE  # nothing is won in one


def test_a_sweep_takes_one_stage_of_memory_and_a_spool(small: Outline) -> None:
    whole, swept = (plan_fit(job(small, 6, ray=False, homes=homes), DATA) for homes in (6, 1))
    assert swept.memory.node < whole.memory.node
    assert swept.disk.disk > whole.disk.disk
    assert swept.kept == whole.kept
    hidden = DATA.positions * 256 * 4
    forward = next(phase for phase in swept.phases if phase.name == "forward")
    assert forward.disk - 8 * DATA.tokens == 5 * hidden


def test_replicas_divide_time_and_not_memory(small: Outline) -> None:
    rates = Rates(1e12, 1e12, 1e10, 1e9, 1e9, "")
    plans = [
        plan_fit(replace(job(small, 2, replicas=r, nodes=2 * r), rates=rates), DATA) for r in (1, 2)
    ]
    assert plans[0].process.peak.bytes == plans[1].process.peak.bytes
    assert plans[1].seconds is not None and plans[0].seconds is not None
    assert plans[1].seconds < plans[0].seconds


@pytest.mark.parametrize(
    ("change", "phase"),
    [
        ({"max_factor_dim": 128}, "eigendecompositions"),
        ({"store_dtype": torch.bfloat16}, "second pass: Λ"),
        ({"dtype": torch.bfloat16}, "first pass: A and G"),
    ],
    ids=["tiles", "narrow store", "narrow model"],
)
def test_narrower_takes_less(small: Outline, change: dict[str, Any], phase: str) -> None:
    def peak(**more: Any) -> int:
        plan = plan_fit(job(small, ray=False, **more), DATA)
        return next(p.peak.bytes for p in plan.phases if p.name == phase)

    assert peak(**change) < peak()


def test_a_gpu_takes_the_stage_and_the_node_its_process(small: Outline) -> None:
    plan = plan_fit(job(small, 2, gpus=2), DATA)
    assert plan.gpu.gpu > plan.process.peak.bytes
    assert "this process" not in plan.process.peak.parts
    assert plan_fit(job(small, 2), DATA).gpu.gpu == 0


def test_queries_share_a_pass_as_far_as_memory_goes(small: Outline) -> None:
    queries = DataShape.uniform(64, 512, 4096)
    much = plan_influence(job(small), queries, DATA)
    little = plan_influence(job(small, query_memory=2**22), queries, DATA)
    assert little.process.peak.bytes < much.process.peak.bytes
    assert little.phases[1].flops > 5 * much.phases[1].flops


def test_a_solver_takes_a_pass_a_step_and_memory_for_each_query(small: Outline) -> None:
    queries, plans = DataShape.uniform(8, 512, 4096), {}
    for name, solving, memory in (
        ("usual", Solving(10, True), 2**31), ("more steps", Solving(20, True), 2**31),
        ("less memory", Solving(10, True), 2**28), ("blocks", Solving(10, False), 2**31),
        ("a quarter", Solving(10, True, DATA.examples // 4), 2**31),
    ):  # fmt: skip
        made = job(small, solving=solving, query_memory=memory)
        plans[name] = plan_influence(made, queries, DATA, DATA)
    assert [phase.name for phase in plans["usual"].phases][1] == "products"
    flops = {name: plan.phases[1].flops for name, plan in plans.items()}
    assert flops["a quarter"] == flops["usual"] / 4
    assert flops["more steps"] == 2 * flops["usual"] < flops["blocks"]
    usual, less = (plans[name].phases[1] for name in ("usual", "less memory"))
    elements = sum(stage.elements for stage in job(small).stages)
    # Tangents, and sums with their masters; on disk two steps of six vectors, and the gradients.
    assert usual.peak.bytes - less.peak.bytes > 16 * 4 * elements
    assert usual.disk > 13 * 4 * 8 * elements
    plain = plan_influence(job(small), queries, DATA)
    assert len(plain.phases) == 2 and plain.phases[1] == plans["usual"].phases[2]


def test_a_measurement_of_whole_outputs_takes_whole_logits_for_queries_alone(
    small: Outline,
) -> None:
    queries = DataShape.uniform(64, 512, 4096)
    chunked, whole, at_once = (
        plan_influence(job(small, **how), queries, DATA)
        for how in (
            {"logits_chunk": 2**16},
            {"logits_chunk": 2**16, "whole_queries": True},
            {"logits_chunk": 2**40},
        )
    )
    assert chunked.phases[0].peak.bytes < whole.phases[0].peak.bytes
    assert whole.phases[0].peak.bytes == at_once.phases[0].peak.bytes
    assert whole.phases[1].peak.bytes == chunked.phases[1].peak.bytes < at_once.phases[1].peak.bytes


# Advice


def made(memory: int) -> Plan:
    peak = Peak(0, "", {"all": memory})
    return Plan("fit", (Phase("first pass", peak, memory, 0, 0),), 0)


def test_advice_names_the_fewest_stages_that_fit() -> None:
    def attempt(changes: Mapping[str, Any]) -> Plan:
        if changes.get("schedule") == "swept":
            return made(10)
        return made(
            1000 // changes.get("stages", 1) // (4096 // changes.get("max_factor_dim", 4096))
        )

    found = advise(
        lambda changes: attempt(changes).memory.node <= 180,
        {"stages": 2, "schedule": "pipelined"},
        Bounds(units=32, widest=4096, batch_tokens=512, longest=512),
    )
    assert {"stages": 6} in found and {"max_factor_dim": 512} in found
    assert attempt({"stages": 5}).memory.node > 180
    assert as_sentence(found) == (
        "It would fit with at least --stages 6, or --max-factor-dim 512, "
        "or --schedule swept --stages 32."
    )


def test_advice_names_as_many_queries_as_fit() -> None:
    bounds = Bounds(1, 4096, 512, 512, query_memory=(400, 200, 100))
    found = advise(lambda changes: changes.get("query_memory", 800) <= 250, {}, bounds)
    assert found == [{"query_memory": 200}] and "--query-memory 200" in as_sentence(found)


def test_no_advice_where_nothing_helps() -> None:
    now = {"stages": 2, "schedule": "pipelined"}
    found = advise(lambda changes: False, now, Bounds(32, 4096, 512, 512))
    assert found == [] and "more memory" in as_sentence(found)


# The check


def fit_here(tmp_path: Path, *flags: Any) -> Outcome:
    model = save_llama(tmp_path / "model")
    data = write_rows(tmp_path / "data.parquet", texts(6))
    common = ["--model", model, "--data", data, "--out", tmp_path / "run", "--address", "none"]
    return run_here("fit.py", [*common, *flags])


@pytest.mark.parametrize(
    ("supply", "missing"),
    [
        (Supply(10**6, None), "memory of a node"),
        (Supply(10**12, 1000), "free disk"),
        (Supply(10**12, None, process=10**6), "RLIMIT_DATA"),
    ],
    ids=["memory", "disk", "a process"],
)
def test_a_fit_that_cannot_fit_is_refused_by_how_much(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, supply: Supply, missing: str
) -> None:
    monkeypatch.setattr(check, "supply_here", lambda directory: supply)
    refused = fit_here(tmp_path)
    assert refused.code == 2
    assert missing in refused.err and "too much" in refused.err and "--force" in refused.err
    assert not (tmp_path / "run/factors").exists()
    assert fit_here(tmp_path, "--force").code == 0
    # What is there need not be written again.
    assert fit_here(tmp_path).code == 0


def test_a_scoring_is_checked_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert fit_here(tmp_path).code == 0
    flags = ["--run", tmp_path / "run", "--queries", tmp_path / "data.parquet"]
    flags += ["--train", tmp_path / "data.parquet", "--out", tmp_path / "s", "--address", "none"]
    with monkeypatch.context() as patch:
        patch.setattr(check, "supply_here", lambda directory: Supply(10**6, None))
        refused = run_here("influence.py", flags)
    assert refused.code == 2 and "too much" in refused.err
    assert run_here("influence.py", flags).code == 0


def test_limits_of_control_groups_and_free_memory_are_seen(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    groups.mkdir()
    (proc / "self/statm").write_text("100 50 10 0 0 0 0")
    (proc / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:    8000000 kB\n")
    own = 40 * os.sysconf("SC_PAGE_SIZE")
    assert memory_here(groups, proc) == (8_192_000_000 + own, "free memory of this machine")
    (groups / "memory.max").write_text("5000000000\n")
    (groups / "memory.current").write_text("2000000000\n")
    (groups / "memory.stat").write_text("anon 1\ninactive_file 500000000\n")
    assert memory_here(groups, proc)[0] == 3_500_000_000 + own
    (groups / "memory.max").write_text("max\n")
    assert memory_here(groups, proc)[0] == 8_192_000_000 + own


# The job


def test_plan_py_shows_a_model_without_weights(tmp_path: Path) -> None:
    model = write_config(tmp_path / "m", *SMALL)
    shown = run_here("plan.py", ["--model", model, "--examples", 50, "--memory", "64GB"])
    assert shown.code == 0, shown.err
    assert "first pass: A and G" in shown.out and "fits: 64.0 GB" in shown.out
    assert json.loads(shown.out.splitlines()[-1])["fits"] is True
    said = run_here("plan.py", ["--model", model, "--memory", "400MB", "--json"])
    (line,) = said.out.splitlines()
    found = json.loads(line)
    assert found["status"] == "complete" and found["fits"] is False and found["short"]
    assert found["plans"]["fit"]["memory"] > 400_000_000


def test_plan_py_names_a_mistake(tmp_path: Path) -> None:
    nothing = run_here("plan.py", ["--model", tmp_path / "none"])
    assert nothing.code == 2 and "no such directory" in nothing.err
    size = run_here("plan.py", ["--model", write_config(tmp_path, *SMALL), "--memory", "much"])
    assert size.code == 2 and "--memory" in size.err
    # What a fit would refuse.
    wide = write_config(tmp_path / "wide", 64, 40_000, 1, 4, 2, 100)
    whole = run_here("plan.py", ["--model", wide])
    assert whole.code == 2 and "mlp.gate_proj" in whole.err and "--max-factor-dim" in whole.err
    assert run_here("plan.py", ["--model", wide, "--max-factor-dim", "4000"]).code == 0
