"""Claims about too little: a disk that is full, and memory for a quarter of the model."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import classified, classifier
from results import assert_same
from test_resume import FIT

import raycurv
from raycurv.errors import NoSpace
from raycurv.stages.stage import Stage

torch.set_num_threads(1)

# Forced: the plan would refuse what has no room before the disk does.
SWEPT: dict[str, Any] = {"schedule": "swept", "stages": 3, "force": True}


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of so many KiB; called again it is enlarged."""
    if os.geteuid():
        pytest.skip("only root may mount a small disk")
    place = tmp_path / "disk"
    place.mkdir()
    mounted: list[Path] = []

    def sized(kib: int) -> Path:
        options = f"size={kib}k" + (",remount" if mounted else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        mounted.append(place)
        return place

    yield sized
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


LONG = classified(400)


def test_a_full_disk_is_named_and_the_spool_goes_on_when_there_is_room(
    small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    settings = FIT | SWEPT | {"batch_tokens": 40}
    disk, out = small_disk(60), tmp_path / "run"
    with pytest.raises(NoSpace, match="run the same command again") as caught:
        raycurv.fit(classifier, LONG, out, spool_dir=str(disk), **settings)
    assert str(disk) in caught.value.where and "bytes are free" in caught.value.got
    assert not list(disk.rglob("*.part"))
    kept = [path for path in disk.rglob("*.safetensors")]
    assert kept
    before = {path: path.stat().st_mtime_ns for path in kept}
    small_disk(4000)
    forwards: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        forward = Stage.forward

        def count(self: Stage, batch: Any, hidden: Any) -> Any:
            forwards.append(batch.index)
            return forward(self, batch, hidden)

        patch.setattr(Stage, "forward", count)
        assert before == {path: path.stat().st_mtime_ns for path in kept}
        raycurv.fit(classifier, LONG, out, spool_dir=str(disk), **settings)
    raycurv.fit(classifier, LONG, tmp_path / "whole", **settings)
    assert_same(out, tmp_path / "whole")
    # 3 forwards a microbatch, and one less in the last stage; what was spooled was not done again.
    assert len(forwards) == 10 * (3 + 3 + 2) - len(kept)


def test_a_full_disk_leaves_every_finished_artefact_whole(
    small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    raycurv.fit(classifier, LONG, tmp_path / "whole", **FIT, **SWEPT)
    disk = small_disk(130)
    flags = {"out": disk / "run"}
    job = lambda: raycurv.fit(classifier, LONG, flags["out"], **FIT, **SWEPT)  # noqa: E731
    sizes = itertools.count(250, 120)
    failures = 0
    while True:
        try:
            job()
            break
        except NoSpace as error:
            failures += 1
            assert str(disk) in error.where
            assert not list(disk.rglob("*.part"))
        small_disk(next(sizes))
    assert failures >= 2
    assert_same(disk / "run", tmp_path / "whole")


# Memory


CAPPED = """
import gc, json, resource, sys
import raycurv

model, out, megabytes = sys.argv[1], sys.argv[2], float(sys.argv[3])
settings = json.loads(sys.argv[4])
rows = [{"id": str(n), "input_ids": [(7 * n + t) % 50 for t in range(8)]} for n in range(4)]
# The kernel watches; a plan, which may be a fifth above what is used, need not agree.
how = {"quiet": True, "address": "none", "batch_tokens": 32, "force": True}


def job(model, out):
    run = raycurv.fit(model, rows, out, **settings, **how)
    swept = {k: v for k, v in settings.items() if k in ("schedule", "stages")}
    run.influence(rows[:1], rows, out + "-scores", rank=1, **how, **swept)
    return run


def data_bytes():
    (line,) = [s for s in open("/proc/self/status") if s.startswith("VmData")]
    return int(line.split()[1]) * 1024


# An idle worker has its libraries loaded, and their kernels for a layer of this shape.
job(model + "-idle", out + "-idle")
gc.collect()
gc.freeze()  # libraries, which every stage's end would look through
cap = data_bytes() + int(megabytes * 2**20)
resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
print(job(model, out).blocks().num_rows)
"""


def capped(folder: Path, megabytes: float, **settings: Any) -> subprocess.CompletedProcess[str]:
    chosen = {
        "dtype": "bfloat16",
        "store_dtype": "bfloat16",
        "max_factor_dim": 64,
        "fisher": "empirical",
    } | settings
    return subprocess.run(
        [
            sys.executable, "-c", CAPPED, str(folder / "model"), str(folder / settings["schedule"]),
            str(megabytes), json.dumps(chosen),
        ],
        env=dict(os.environ) | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 256 MiB beside one of a single layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    shape = {
        "hidden_size": 640, "intermediate_size": 1920, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": 64,
    }  # fmt: skip
    for name, layers in (("model", 29), ("model-idle", 1)):
        config = LlamaConfig(num_hidden_layers=layers, **shape)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / name)
    return folder


# Slow: it loads 29 stages twice for the fit and twice for the scores.
def test_a_model_of_four_times_the_memory_is_fitted_and_scored(large: Path) -> None:
    weights = sum(path.stat().st_size for path in (large / "model").glob("*.safetensors"))
    assert weights >= 4 * 64 * 2**20
    made = capped(large, 64, schedule="swept")
    assert made.returncode == 0, made.stderr[-2000:]
    assert made.stdout.strip().endswith(str(29 * 7))


def test_the_memory_of_four_times_less_is_not_enough_without_sweeping(large: Path) -> None:
    made = capped(large, 64, schedule="pipelined")
    assert made.returncode != 0
    assert "memory" in made.stderr.lower() or "alloc" in made.stderr.lower()
