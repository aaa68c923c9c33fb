"""Products of the Gauss-Newton matrix with vectors: exact for every family, and what they cost.

transformers' own modules, tiny, float64, on 1, 2 and 4 stages, beside J, R and Jᵀ by plain autograd
processor seconds of a direction, in forward-backwards of the same model by transformers, in turn
                                                                   ─► results/DATE-products.md
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
import tyro
from clock import resident
from result_file import command_line, processor, source_state, table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

import raycurv
from raycurv.driver.corpus import stored_corpus
from raycurv.driver.multiplier import Multiplier
from raycurv.driver.workers import Workers
from raycurv.jobs.fitted import GivenAgain, fitted_blocks, open_fitted
from raycurv.jobs.influence.influence_settings import InfluenceSettings
from raycurv.jobs.inputs import Inputs
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.exact.parameters import BlockParameters
from raycurv.progress.reporter import Reporter
from raycurv.stages.passes import Directions, Pass, ProductGatherer

HERE = Path(__file__).parent
VOCAB = 61
_BASE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _BASE,
    "qwen3": _BASE | {"head_dim": 8},
    "mistral": _BASE | {"sliding_window": 6},
    "gemma3_text": _BASE | {"head_dim": 8, "sliding_window": 6},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64},
    "gpt_neox": {k: v for k, v in _BASE.items() if k != "num_key_value_heads"},
    "qwen3_moe": _BASE | _EXPERTS | {"head_dim": 8, "num_experts": 4},
    "mixtral": _BASE | _EXPERTS | {"num_local_experts": 4},
}
LENGTHS = (9, 4, 12, 1, 7)


@dataclass(frozen=True)
class Settings:
    """Measures products of the Gauss-Newton matrix."""

    results: Path = HERE / "results"
    """Directory of the result file."""
    directions: tuple[int, ...] = (1, 4, 8, 16)
    """Vectors that are multiplied at once."""
    width: int = 512
    """Of the hidden states of the model whose cost is measured."""
    layers: int = 4
    """Of that model."""
    vocabulary: int = 2048
    """Of that model."""
    tokens: int = 512
    """Of each of its examples."""
    examples: int = 4
    """Examples, which are one microbatch."""
    repeats: int = 3
    """Measurements of each cost, of which the median is shown."""
    threads: int = 1
    """Threads of torch, on both sides."""


@dataclass(frozen=True)
class Drawn(Directions):
    """Gaussian vectors that depend on their block alone."""

    count: int

    def open(
        self, blocks: tuple[Block, ...], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        return {block.name: self.of(block).to(device, dtype) for block in blocks}

    def of(self, block: Block) -> Tensor:
        generator = torch.Generator().manual_seed(sum(block.name.encode()))
        shape = (self.count, block.d_out, block.d_in)
        return torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Kept(ProductGatherer):
    """Keeps the products in this process."""

    found: dict[str, Tensor] = field(default_factory=dict)

    def write(self, name: str, result: Any, blocks: Mapping[str, Block]) -> None:
        self.found[name] = result.mean


def save(place: Path, config: Any) -> Path:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    for parameter in network.parameters():
        # Norms begin at ones and biases at zero, where some terms vanish.
        parameter.data += 0.1 * torch.randn_like(parameter)
    network.save_pretrained(place)
    return place


def rows(lengths: tuple[int, ...], vocabulary: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(3, vocabulary, (length,), generator=generator).tolist()}
        for length in lengths
    ]


class Products:
    """Products over the data of one fit.

    Args:
        model: its directory.
        data: the examples.
        place: where the fit goes.
        how: options of jobs.
    """

    def __init__(self, model: Path, data: list[dict[str, Any]], place: Path, **how: Any) -> None:
        self._how = {"address": "none", **how}
        run = raycurv.fit(
            str(model), data, str(place), method="identity", quiet=True,
            **{"address": "none", "dtype": how["dtype"]},
        )  # fmt: skip
        given = GivenAgain("", (), "", "--fit-objective", False)
        self._fitted = open_fitted(run.path, Inputs(), given)
        self.blocks = fitted_blocks(self._fitted.store, self._fitted.network)

    def multiply(self, count: int) -> tuple[dict[str, Tensor], float]:
        """The products of drawn vectors, and processor seconds with the stages there."""
        fitted = self._fitted
        settings = InfluenceSettings(**self._how).resolved()
        kept, corpus = Kept(count), stored_corpus(fitted.store, "data")
        assert corpus is not None
        work = Pass("products", "product", gatherers=(kept,), directions=Drawn(count))
        with closing(
            Workers(
                settings, fitted.network, fitted.objective, self.blocks,
                getattr(torch, self._how["dtype"]), 0, Reporter(quiet=True), fitted.store,
            )
        ) as workers:  # fmt: skip
            if settings.schedule != "swept":
                workers.load(0)
            began = time.process_time()
            Multiplier(workers, fitted.manifest, workers.feed(corpus)).multiply(work, "products")
            seconds = time.process_time() - began
        fitted.store.delete_directory("work")
        return kept.found, seconds


def exact_products(model: Path, data: list[dict[str, Any]], products: Products) -> Tensor:
    """``[Q, P]`` by plain autograd, of whole examples, one after the other.

    ``J v`` is the derivative of ``Jᵀ w`` with respect to w, along v: going back twice, with no
    forward mode.
    """
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    if hasattr(network.config, "num_local_experts") or hasattr(network.config, "num_experts"):
        network.set_experts_implementation("eager")
    layout = BlockParameters(network, products.blocks)
    weights = [network.get_parameter(name) for name in layout.own]
    vectors = Drawn(2)
    tangents = layout.tangents({block.name: vectors.of(block) for block in products.blocks})
    total: list[Any] = [[0.0] * len(weights) for _ in range(vectors.count)]
    for row in data:
        tokens = torch.tensor([row["input_ids"]])
        with sdpa_kernel(SDPBackend.MATH):
            z = network(input_ids=tokens, use_cache=False).logits[0, :-1]
        p = z.detach().softmax(dim=1)
        w = torch.zeros_like(z, requires_grad=True)
        back = torch.autograd.grad(
            z, weights, w, create_graph=True, retain_graph=True, materialize_grads=True
        )
        for q in range(vectors.count):
            along = sum((g * tangents[n][q]).sum() for n, g in zip(layout.own, back, strict=True))
            (u,) = torch.autograd.grad(along, w, retain_graph=True, materialize_grads=True)
            c = p * u - p * (p * u).sum(dim=1, keepdim=True)
            found = torch.autograd.grad(z, weights, c, retain_graph=True, materialize_grads=True)
            total[q] = [a + b for a, b in zip(total[q], found, strict=True)]
    wanted = []
    for sums in total:
        matrices = layout.matrices(dict(zip(layout.own, sums, strict=True)))
        wanted.append(torch.cat([matrices[b.name].flatten() for b in products.blocks]))
    return torch.stack(wanted) / len(data)


def families(place: Path) -> list[list[str]]:
    """The largest difference of each family's products, on 1, 2 and 4 stages."""
    found, data = [], rows(LENGTHS, VOCAB)
    for name, sizes in FAMILIES.items():
        model = save(place / name, AutoConfig.for_model(name, **sizes))
        cells = [name]
        how = {"dtype": "float64", "batch_tokens": 24}
        want = None
        for number, more in enumerate(
            ({"stages": 1}, {"stages": 2}, {"stages": 4}, {"stages": 4, "schedule": "swept"})
        ):
            products = Products(model, data, place / f"{name}-{number}", **how, **more)
            if want is None:
                want = exact_products(model, data, products)
            kept, _ = products.multiply(2)
            got = torch.cat([kept[b.name].flatten(1) for b in products.blocks], dim=1)
            cells.append(f"{float((got - want).abs().max() / want.abs().max()):.1e}")
        found.append(cells)
        print(*cells, flush=True)
    return found


def measured(act: Callable[[], object], repeats: int) -> float:
    """The median of processor seconds."""
    seconds = []
    for _ in range(repeats):
        gc.collect()
        began = time.process_time()
        act()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


def costs(settings: Settings, place: Path) -> list[list[str]]:
    """A direction in forward-backwards, for several numbers of directions."""
    config = AutoConfig.for_model(
        "llama", hidden_size=settings.width, intermediate_size=settings.width * 8 // 3,
        num_hidden_layers=settings.layers, num_attention_heads=settings.width // 64,
        num_key_value_heads=settings.width // 128, vocab_size=settings.vocabulary,
    )  # fmt: skip
    model = save(place / "cost", config)
    data = rows((settings.tokens,) * settings.examples, settings.vocabulary)
    batch = settings.tokens * settings.examples
    products = Products(model, data, place / "fit", dtype="float32", stages=1, batch_tokens=batch)
    network: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    named = {f"{block.module}.{block.parameter}" for block in products.blocks}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in named)
    tokens = torch.tensor([row["input_ids"] for row in data])

    def forward_backward() -> None:
        network.zero_grad()
        network(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    forward_backward()
    products.multiply(settings.directions[0])
    found = []
    for count in settings.directions:
        pairs = []
        for _ in range(settings.repeats):
            # In turn, so that what else runs on the machine weighs on both.
            unit = measured(forward_backward, 1)
            pairs.append(products.multiply(count)[1] / count / unit)
        ratio = statistics.median(pairs)
        shown = ", ".join(f"{pair:.2f}" for pair in pairs)
        peak = resident("VmHWM") / 2**20
        found.append([str(count), f"{ratio:.2f}", shown, f"{peak:,.0f} MiB"])
        print(*found[-1], flush=True)
    return found


def main(settings: Settings) -> None:
    """Measure both, print and write the report."""
    torch.set_num_threads(settings.threads)
    with TemporaryDirectory() as directory:
        place = Path(directory)
        exact, cost = families(place), costs(settings, place)
    text = [
        f"# Products of the Gauss-Newton matrix, {date.today().isoformat()}", "",
        f"    {command_line('products.py', settings, Settings())}", "",
        f"- torch {torch.__version__}, transformers {transformers.__version__}; {processor()}, "
        f"{settings.threads} thread(s)",
        f"- raycurv's source: {source_state()}", "",
        "## Families: max |difference| over max |reference|, float64", "",
        "transformers computes some norms and softmaxes in float32 whatever the model's dtype.", "",
        *table(["family", "1 stage", "2 stages", "4 stages", "4 stages, swept"], exact), "",
        f"## Cost: Llama, {settings.layers} layers of {settings.width}, {settings.examples} x "
        f"{settings.tokens} tokens, vocabulary {settings.vocabulary}, float32", "",
        "A direction's processor seconds in forward-backwards of transformers' model with weight "
        "gradients of the same layers. Memory is the process's highest so far.", "",
        *table(["directions", "each, median", "of each pair", "peak memory"], cost), "",
    ]  # fmt: skip
    file = settings.results / f"{date.today().isoformat()}-products.md"
    file.write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main(tyro.cli(Settings))
