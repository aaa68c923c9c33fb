"""Writes a Llama-shaped checkpoint of random weights, of any size, in little memory; with experts
one that is shaped and named as Mixtral's.

    shape ─► tensors by name ─► shards ─► chunks of random numbers ─► safetensors, index, config

No model is ever built: a shard's tensors are known beforehand, and their numbers go to its file a
chunk at a time. A chunk's numbers depend on the seed, the tensor's name and the chunk alone, not on
threads or shards. Weights are Gaussian with standard deviation 0.02, norms one, and the two
matrices that add to the residual stream are divided by √(2 · layers) (GPT-2, section 2.3), so that
a forward is finite and gradients are alike in all layers.

Beside it: a tokenizer of bytes, and text for it (``--examples``).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import source_texts
import torch
import tyro
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig

from raycurv.errors import UserError
from raycurv.files.store import Store
from raycurv.models.checkpoint import DTYPES, INDEX, tensor_bytes

# The demo's scripts import each other as neighbours; behind our own, whose names come first.
sys.path.append(str(Path(__file__).parents[1] / "demo"))
from tokenizer import BOS, EOS, VOCAB_SIZE, byte_tokenizer

STANDARD_DEVIATION = 0.02  # HF's initializer_range
CHUNK = 1 << 22  # numbers made at once by one thread: 16 MiB of float32
RECIPE = "recipe.json"  # the settings that a directory's weights were made with


@dataclass(frozen=True)
class Settings:
    """Writes OUT: a Llama- or Mixtral-shaped checkpoint of random weights, a byte tokenizer, some
    text."""

    out: Path
    """Directory of the checkpoint."""
    width: int = 512
    """Size of the hidden state."""
    ff: int = 1408
    """Size of the hidden layer of an MLP."""
    heads: int = 8
    """Query heads; the width is a multiple of them."""
    kv_heads: int = 8
    """Key-value heads, a divisor of the query heads."""
    layers: int = 4
    """Decoder layers."""
    experts: int = 0
    """Experts of a layer; 0 for one MLP, without a router."""
    chosen: int = 2
    """Experts of a token."""
    vocab: int = 1024
    """Rows of the embedding and of the head, which are two matrices."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of all weights."""
    seed: int = 0
    """Of weights and text."""
    shard_gb: float = 4.0
    """Largest file, in 10⁹ bytes; a tensor is never cut."""
    max_positions: int = 8192
    """Longest sequence that the configuration allows."""
    threads: int = os.cpu_count() or 1
    """That make random numbers; the result does not depend on them."""
    examples: int = 0
    """Texts in OUT/train.jsonl; with 0 neither file is written."""
    queries: int = 2
    """Texts in OUT/queries.jsonl, none of them in OUT/train.jsonl."""
    tokens: int = 256
    """Of each text, BOS included."""

    def validate(self) -> None:
        """Refuse what makes no model, or none for the byte tokenizer.

        Raises:
            UserError: which flag, and what it should be.
        """
        for name in ("width", "ff", "heads", "kv_heads", "layers", "threads", "shard_gb"):
            if not getattr(self, name) > 0:
                raise _mistake(name, "a number above 0", getattr(self, name), "Raise it.")
        if self.width % self.heads or self.width // self.heads % 2:
            raise _mistake(
                "width", f"an even multiple of {self.heads} heads", self.width, "Change either."
            )
        if self.heads % self.kv_heads:
            raise _mistake(
                "kv_heads", f"a divisor of {self.heads} heads", self.kv_heads, "Change either."
            )
        if self.experts and not 1 <= self.chosen <= self.experts:
            raise _mistake("chosen", f"1 to {self.experts} experts", self.chosen, "Change either.")
        if self.vocab < VOCAB_SIZE:
            raise _mistake(
                "vocab", f"the byte tokenizer's {VOCAB_SIZE} or more", self.vocab, "Raise it."
            )
        if self.examples and not 2 <= self.tokens <= self.max_positions:
            raise _mistake(
                "tokens", f"2 to --max-positions, {self.max_positions}", self.tokens, "Change it."
            )

    def recipe(self) -> dict[str, Any]:
        """What decides the bytes of the weights' files."""
        others = {"out", "threads", "examples", "queries", "tokens"}
        return {name: value for name, value in asdict(self).items() if name not in others}


def _mistake(name: str, expected: str, got: Any, remedy: str) -> UserError:
    return UserError(f"--{name.replace('_', '-')}", expected, str(got), remedy)


@dataclass(frozen=True)
class Planned:
    """A tensor to be made; ``std`` is 0 where it is all ones."""

    name: str
    shape: tuple[int, ...]
    std: float

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def plan_tensors(settings: Settings) -> list[Planned]:
    """All tensors of the checkpoint, in the model's order."""
    width, std = settings.width, STANDARD_DEVIATION
    kv_width = width // settings.heads * settings.kv_heads
    residual = std / math.sqrt(2 * settings.layers)
    of_a_layer = (
        Planned("input_layernorm", (width,), 0),
        Planned("self_attn.q_proj", (width, width), std),
        Planned("self_attn.k_proj", (kv_width, width), std),
        Planned("self_attn.v_proj", (kv_width, width), std),
        Planned("self_attn.o_proj", (width, width), residual),
        Planned("post_attention_layernorm", (width,), 0),
        *_mlp(settings, std, residual),
    )
    return [
        Planned("model.embed_tokens.weight", (settings.vocab, width), std),
        *(
            Planned(f"model.layers.{layer}.{part.name}.weight", part.shape, part.std)
            for layer in range(settings.layers)
            for part in of_a_layer
        ),
        Planned("model.norm.weight", (width,), 0),
        Planned("lm_head.weight", (settings.vocab, width), std),
    ]


def _mlp(settings: Settings, std: float, residual: float) -> tuple[Planned, ...]:
    width, ff = settings.width, settings.ff
    if not settings.experts:
        return (
            Planned("mlp.gate_proj", (ff, width), std),
            Planned("mlp.up_proj", (ff, width), std),
            Planned("mlp.down_proj", (width, ff), residual),
        )
    matrices = (("w1", (ff, width), std), ("w2", (width, ff), residual), ("w3", (ff, width), std))
    return (
        Planned("block_sparse_moe.gate", (settings.experts, width), std),
        *(
            Planned(f"block_sparse_moe.experts.{expert}.{name}", shape, spread)
            for expert in range(settings.experts)
            for name, shape, spread in matrices
        ),
    )


def plan_shards(tensors: list[Planned], itemsize: int, limit: float) -> list[list[Planned]]:
    """The tensors in files of at most ``limit`` bytes, but for a file of one larger tensor."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.numel * itemsize > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.numel * itemsize
    return shards


def make_chunk(planned: Planned, start: int, seed: int, dtype: torch.dtype) -> Tensor:
    """The flat tensor's numbers from ``start``, ``CHUNK`` of them or what is left."""
    count = min(CHUNK, planned.numel - start)
    if not planned.std:
        return torch.ones(count, dtype=dtype)
    digest = hashlib.blake2b(f"{seed} {planned.name} {start}".encode(), digest_size=16).digest()
    # numpy's float32 Gaussians (ziggurat) come at 1.5 times the rate of torch's.
    random = np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))
    numbers = torch.from_numpy(random.standard_normal(count, dtype=np.float32))
    return numbers.mul_(planned.std).to(dtype)


def shard_header(shard: list[Planned], dtype: torch.dtype) -> bytes:
    """The head of a safetensors file that holds these tensors, in this order."""
    (code,) = (code for code, known in DTYPES.items() if known == dtype)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + tensor.numel * dtype.itemsize
        entries[tensor.name] = {
            "dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    encoded = json.dumps(entries).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def shard_bytes(
    shard: list[Planned], dtype: torch.dtype, seed: int, threads: int
) -> Iterator[bytes | memoryview]:
    """A file's bytes, made by threads that are at most two chunks each ahead of the reader."""
    yield shard_header(shard, dtype)
    chunks = ((tensor, start) for tensor in shard for start in range(0, tensor.numel, CHUNK))
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[Tensor]] = deque()
        for tensor, start in chunks:
            ahead.append(pool.submit(make_chunk, tensor, start, seed, dtype))
            if len(ahead) > 2 * threads:
                yield tensor_bytes(ahead.popleft().result())
        while ahead:
            yield tensor_bytes(ahead.popleft().result())


def make_config(settings: Settings) -> LlamaConfig | MixtralConfig:
    """What transformers builds the model from."""
    own: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
    if settings.experts:
        own = {
            "architectures": ["MixtralForCausalLM"], "num_local_experts": settings.experts,
            "num_experts_per_tok": settings.chosen,
        }  # fmt: skip
    return (MixtralConfig if settings.experts else LlamaConfig)(
        **own,
        vocab_size=settings.vocab,
        hidden_size=settings.width,
        intermediate_size=settings.ff,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.max_positions,
        initializer_range=STANDARD_DEVIATION,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
        dtype=settings.dtype,
    )


def _shards_there(store: Store) -> list[str]:
    """Files of weights in the directory itself; what others put into one below it is theirs."""
    return [name for name in store.names(ending=".safetensors") if "/" not in name]


def write_weights(settings: Settings, store: Store) -> None:
    """The shards that are not there yet, then the index.

    Raises:
        UserError: the directory holds a checkpoint that this script did not write.
    """
    dtype = getattr(torch, settings.dtype)
    tensors = plan_tensors(settings)
    shards = plan_shards(tensors, dtype.itemsize, settings.shard_gb * 1e9)
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    recipe = store.read_json(RECIPE)
    if recipe is None and (store.exists("config.json") or _shards_there(store)):
        raise UserError(
            store.path(),
            f"an empty directory, or one with {RECIPE}",
            "a checkpoint of something else",
            "Choose another --out.",
        )
    if recipe != settings.recipe():
        # In this order a directory whose settings change is never taken for a whole checkpoint.
        store.delete(INDEX)
        for name in _shards_there(store):
            store.delete(name)
        store.write_json(RECIPE, settings.recipe())
    parameters = sum(tensor.numel for tensor in tensors)
    begun, made = time.monotonic(), 0
    for n, (name, shard) in enumerate(zip(names, shards, strict=True)):
        count = sum(tensor.numel for tensor in shard)
        wanted = len(shard_header(shard, dtype)) + count * dtype.itemsize
        if store.size(name) == wanted:
            continue
        store.write(name, shard_bytes(shard, dtype, settings.seed, settings.threads))
        made += count
        rate = made / (time.monotonic() - begun)
        print(f"{name}: {n + 1} of {len(names)}, {rate / 1e6:.0f} million parameters/s", flush=True)
    if not store.exists(INDEX):
        places = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        total = {"total_size": parameters * dtype.itemsize, "total_parameters": parameters}
        store.write_json(INDEX, {"metadata": total, "weight_map": places})


def main(settings: Settings) -> None:
    settings.validate()
    settings.out.mkdir(parents=True, exist_ok=True)
    store = Store(str(settings.out.absolute()))
    if settings.examples:
        # Before the weights: a mistake in the numbers then shows within a second.
        texts = source_texts.choose(
            source_texts.standard_library(),
            settings.queries + settings.examples,
            settings.tokens,
            settings.seed,
        )
        source_texts.write(texts[: settings.queries], settings.out / "queries.jsonl")
        source_texts.write(texts[settings.queries :], settings.out / "train.jsonl")
    write_weights(settings, store)
    make_config(settings).save_pretrained(settings.out)
    byte_tokenizer(settings.max_positions).save_pretrained(settings.out)
    parameters = sum(tensor.numel for tensor in plan_tensors(settings))
    size = sum(store.size(name) or 0 for name in _shards_there(store))
    print(f"{settings.out}: {parameters:,} parameters, {size:,} bytes of {settings.dtype}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except ValueError as error:
        sys.exit(str(error))
