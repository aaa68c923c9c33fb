# ruff: noqa: E402
"""Bergson's half of the speed comparison: one run of all phases, in an environment of its own.

``speed.py`` starts it as ``bergson_speed.py JOB.json``; what a job holds and what comes back is as
for ``raycurv_speed.py``. Only Llama-shaped models: bergson reads causal language models alone.

It does what ``bergson ekfac`` does (gradients of the queries, factors, inverse, scores), twice. No
command of it gives self-influence with EK-FAC. As in its ``examples/self_influence.yaml``, training
examples are the queries then, with the factors of the first time, and the diagonal is kept.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Read when these libraries are imported.
CACHE = TemporaryDirectory()
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": CACHE.name, "TQDM_DISABLE": "1"}

import numpy as np
import torch
from bergson.config.config import (
    DataConfig,
    DistributedConfig,
    HessianConfig,
    HessianPipelineConfig,
    IndexConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
)
from bergson.data import load_scores
from bergson.hessians import hessian_approximations, pipeline
from clock import Clock, resident
from datasets import disable_progress_bars
from shapes import SHAPES, SpeedShape
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

WEIGHTS = "model.safetensors"


def open_place(shape: SpeedShape, place: Path, out: Path) -> None:
    """The prepared model and examples, as bergson takes them.

    It loads a tokenizer even where data are token ids, and refuses batches of more tokens than the
    longest sequence: hence one without words, and a longer sequence, which changes none of this
    architecture's numbers.
    """
    model = out / "model"
    model.mkdir()
    (model / WEIGHTS).symlink_to((place / "model" / WEIGHTS).resolve())
    config = json.loads((place / "model" / "config.json").read_text())
    config["max_position_embeddings"] = shape.batch * shape.length
    (model / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(model)
    examples = np.load(place / "examples.npz")
    for part in ("train", "queries"):
        rows = [json.dumps({"input_ids": ids.tolist()}) + "\n" for ids in examples[part]]
        (out / f"{part}.jsonl").write_text("".join(rows))


def watch(clock: Clock) -> None:
    """Have bergson's own steps tell the clock which phase begins; what they compute stays."""

    def watched(module: Any, name: str, begins: Callable[..., str | None], after: str = "") -> None:
        step = getattr(module, name)

        def run(*arguments: Any, **named: Any) -> Any:
            if phase := begins(**named):
                clock.begin(phase)
            made = step(*arguments, **named)
            if after:
                clock.begin(after)
            return made

        setattr(module, name, run)

    def collects(ev_correction: bool = False, **_: Any) -> str | None:
        return "lambda" if ev_correction else None

    watched(pipeline, "approximate_hessians", lambda **_: "covariance", after="pairwise")
    watched(hessian_approximations, "collect_hessians", collects)
    watched(hessian_approximations, "eigendecompose_owned", lambda **_: "eigendecomposition")


def score(shape: SpeedShape, place: Path, name: str, queries: str, resume: bool) -> np.ndarray:
    """Scores ``[Q, N]``, with the factors of the directory where they are there already."""
    run = place / name
    pipeline.hessian_pipeline(
        IndexConfig(
            run_path=str(run),
            model=str(place / "model"),
            model_kwargs="attn_implementation=eager",
            token_batch_size=shape.batch * shape.length,
            data=DataConfig(dataset=str(place / "train.jsonl")),
            distributed=DistributedConfig(nproc_per_node=1),
        ),
        HessianConfig(method="kfac", ev_correction=True, use_dataset_labels=True),
        ScoreConfig(),
        PreprocessConfig(),
        HessianPipelineConfig(
            query=QuerySetConfig(dataset=str(place / f"{queries}.jsonl")), resume=resume
        ),
    )
    stored = load_scores(run / "scores")
    return np.asarray(stored[:], dtype=np.float64).T


def main(job: dict[str, Any]) -> None:
    """Fit, score, write."""
    shape, place, clock = SHAPES[job["shape"]], Path(job["place"]), Clock()
    if shape.network != "llama" or job["mode"] != "float32":
        raise SystemExit(
            f"shape {job['shape']}, mode {job['mode']}: expected a Llama-shaped one in float32."
        )
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    disable_progress_bar()
    disable_progress_bars()
    logging.disable(logging.INFO)
    held = resident()
    with (
        TemporaryDirectory() as directory,
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
    ):
        out = Path(directory)
        with clock.phase("load"):
            open_place(shape, place, out)
        watch(clock)
        clock.begin("pairwise")
        scores = score(shape, out, "pairwise", "queries", resume=False)
        clock.begin("self")
        (out / "self").mkdir()
        shutil.move(out / "pairwise" / "hessian", out / "self" / "hessian")
        own = score(shape, out, "self", "train", resume=True).diagonal()
        clock.end()
    np.savez(job["out"], scores=scores, self=own)
    clock.write(Path(job["out"]).with_suffix(".json"), held, ("bergson", "torch", "transformers"))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
    CACHE.cleanup()
