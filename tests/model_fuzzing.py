"""Mutated model directories: headers, indices and configurations that no writer would have made."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from raycurv.errors import UserError
from raycurv.models.opening import open_model

# Values that code is seldom written for.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**53, 2**63, 10**30, 0.5, -0.0, 1e308, float("inf"),
    float("nan"), "", "x", "../x", "/etc/passwd", "\ud800", "a" * 5000, [], [[]], {}, {"a": {}},
    [1, 2], ["x"], [None], "F32", "U32", "F4",
)  # fmt: skip


def fuzz_model(good: Path, folder: Path, count: int, seed: int) -> Counter[str]:
    """Open mutated copies of a model directory.

    Args:
        good: a directory with ``config.json``, several safetensors files and their index.
        folder: where a copy lies, one at a time.
        count: how many copies.
        seed: of the mutations.

    Returns:
        how many were opened, and how many were a :class:`UserError`.

    Raises:
        AssertionError: whatever else an opening raised; names the mutation.
    """
    outcomes: Counter[str] = Counter()
    copy = folder / "fuzzed"
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(good, copy)
        said = _mutate(copy, rng)
        try:
            open_model(str(copy))
            outcomes["opened"] += 1
        except UserError as error:
            assert error.remedy and len(str(error)) < 4000, (number, seed, said, str(error)[:500])
            outcomes["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"mutation {number} of seed {seed}, {said}: {error!r}") from error
    return outcomes


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
                at[f"{key}_{rng.randrange(9)}"] = at[key]
            else:
                at[key] = rng.choice(ODD)
            said.append(f"{name}/{key} {act}")
            break
    return ", ".join(said)
