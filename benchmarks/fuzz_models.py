"""Mutated model directories: headers, indices and configurations that no writer would have made."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from raycurv.models.opening import open_model

# Values that code is seldom written for.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**53, 2**63, 10**30, 0.5, -0.0, 1e308, float("inf"),
    float("nan"), "", "x", "../x", "/etc/passwd", "\ud800", "a" * 5000, [], [[]], {}, {"a": {}},
    [1, 2], ["x"], [None], "F32", "U32", "F4",
)  # fmt: skip


def model_cases(good: Path, folder: Path, seed: int) -> Callable[[int], str]:
    """Cases of mutated copies of a model directory that are opened: number -> ``opened``.

    Args:
        good: a directory with ``config.json``, several safetensors files and their index.
        folder: where a copy lies, one at a time.
        seed: of the mutations.
    """
    fuzzed = folder / "fuzzed"

    def case(number: int) -> str:
        shutil.rmtree(fuzzed, ignore_errors=True)
        shutil.copytree(good, fuzzed)
        _mutate(fuzzed, random.Random(f"{seed} {number}"))
        open_model(str(fuzzed))
        return "opened"

    return case


def whole_model(folder: Path) -> Path:
    """Write a tiny Llama in several files; gives its directory."""
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def _mutate(folder: Path, rng: random.Random) -> str:
    """Change one file of a directory; says which, and how."""
    kind = rng.choice(("config", "config", "index", "header", "header", "bytes", "file"))
    shards = sorted(folder.glob("*.safetensors"))
    shard = rng.choice(shards)
    if kind in ("config", "index"):
        path = folder / ("config.json" if kind == "config" else "model.safetensors.index.json")
        content = json.loads(path.read_text())
        said = _mutate_json(content, rng)
        path.write_text(json.dumps(content))
        return f"{path.name}: {said}"
    if kind == "header":
        data = shard.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        said = _mutate_json(header, rng)
        raw = json.dumps(header).encode()
        shard.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])
        return f"{shard.name}: {said}"
    if kind == "bytes":
        path = rng.choice((shard, folder / "config.json", folder / "model.safetensors.index.json"))
        changed = bytearray(path.read_bytes())
        for _ in range(rng.choice((1, 3, 30))):
            changed[rng.randrange(min(len(changed), 4000))] = rng.randrange(256)
        path.write_bytes(changed[: rng.choice((None, rng.randrange(len(changed))))])
        return f"{path.name}: other bytes"
    path = rng.choice((shard, folder / "config.json"))
    path.unlink()
    if rng.random() < 0.5:
        path.symlink_to(rng.choice(("/dev/zero", "/etc/hostname", "nowhere", path.name)))
    return f"{path.name}: gone, or a link"


def _mutate_json(content: Any, rng: random.Random) -> str:
    """Change some value below a JSON object in place; says where."""
    said = []
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, name = content, ""
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.8:
                at, name = at[key], f"{name}/{key}"
                continue
            act = rng.choice(("odd", "odd", "odd", "gone", "scaled", "added"))
            if act == "gone":
                del at[key]
            elif act == "scaled" and type(at[key]) in (int, float):
                at[key] = at[key] * rng.choice((-1, 2, 1000, 10**9)) + rng.choice((0, 1))
            elif act == "added" and isinstance(at, dict):
                at[f"{key}_{rng.randrange(9)}"] = copy.deepcopy(at[key])
            else:
                at[key] = copy.deepcopy(rng.choice(ODD))
            said.append(f"{name}/{key} {act}")
            break
    return ", ".join(said)
