"""Kronfluence's half of the speed comparison: one run of all phases, in an environment of its own.

``speed.py`` starts it as ``kronfluence_speed.py JOB.json``; what a job holds and what comes back is
as for ``raycurv_speed.py``.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from clock import Clock, resident
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.constants import ALL_MODULE_NAME
from kronfluence_side import (
    NextToken,
    Rows,
    factor_arguments,
    pairwise,
    read_rows,
    score_arguments,
)
from shapes import SHAPES, SpeedShape, load_network
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

HALF = torch.bfloat16


class Digits(Task):
    """Cross-entropy in nats of the data's own labels, summed over the batch."""

    def __init__(self, modules: list[str]) -> None:
        self._modules = modules

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        assert not sample, "the comparison is of the empirical Fisher"
        return cross_entropy(model(batch["inputs"]), batch["labels"], reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self._modules


def set_mode(mode: str, factors: FactorArguments, scores: ScoreArguments) -> None:
    """Change arguments from float32 to a faster mode.

    ``medium``: torch's own switch, float32 products of bf16 roundings. ``amp``: the network under
    autocast. ``bf16``: besides, per-example gradients, preconditioning and scores in bf16. All of
    them decompose in float32.
    """
    if mode == "float32":
        return
    factors.eigendecomposition_dtype = torch.float32
    if mode == "medium":
        torch.set_float32_matmul_precision("medium")
        return
    factors.amp_dtype = scores.amp_dtype = HALF
    if mode == "bf16":
        factors.activation_covariance_dtype = factors.gradient_covariance_dtype = HALF
        factors.per_sample_gradient_dtype = HALF
        scores.per_sample_gradient_dtype = scores.precondition_dtype = scores.score_dtype = HALF


def open_task(shape: SpeedShape, place: Path) -> tuple[nn.Module, Task, Rows, Rows]:
    """The network, what is asked of it, training examples and queries."""
    examples = np.load(place / "examples.npz")
    if shape.network == "llama":
        model: nn.Module = LlamaForCausalLM.from_pretrained(
            place / "model", dtype=torch.float32, attn_implementation="eager"
        )
        lengths = {key: np.full(len(examples[key]), shape.length) for key in ("train", "queries")}
        train, queries = (read_rows(examples[key], lengths[key]) for key in ("train", "queries"))
        return model.eval(), NextToken(shape.modules), train, queries
    model = load_network(shape.network, place / "weights.safetensors")

    def rows(images: str, labels: str) -> Rows:
        pairs = zip(examples[images], examples[labels], strict=True)
        return [{"inputs": torch.from_numpy(x), "labels": torch.tensor(y)} for x, y in pairs]

    train, queries = rows("train", "train_labels"), rows("queries", "query_labels")
    return model, Digits(shape.modules), train, queries


def main(job: dict[str, Any]) -> None:
    """Fit, score, write."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="kronfluence")
    shape, place, clock = SHAPES[job["shape"]], Path(job["place"]), Clock()
    fitted = factor_arguments("ekfac", torch.float32)
    scored = score_arguments(torch.float32)
    set_mode(job["mode"], fitted, scored)
    held, batch = resident(), shape.batch
    with TemporaryDirectory() as directory:
        with clock.phase("load"):
            model, task, train, queries = open_task(shape, place)
            analyzer = Analyzer(
                "speed",
                prepare_model(model, task),
                task,
                cpu=True,
                log_level=logging.ERROR,
                disable_tqdm=True,
                output_dir=directory,
            )
        with clock.phase("covariance"):
            analyzer.fit_covariance_matrices("ekfac", train, batch, factor_args=fitted)
        with clock.phase("eigendecomposition"):
            analyzer.perform_eigendecomposition("ekfac", factor_args=fitted)
        with clock.phase("lambda"):
            analyzer.fit_lambda_matrices("ekfac", train, batch, factor_args=fitted)
        with clock.phase("pairwise"):
            scores = pairwise(analyzer, "ekfac", "pairwise", queries, train, batch, scored)
        with clock.phase("self"):
            analyzer.compute_self_scores("self", "ekfac", train, batch, score_args=scored)
            own = analyzer.load_self_scores("self")[ALL_MODULE_NAME]
    np.savez(job["out"], scores=scores.double().numpy(), self=own.double().numpy())
    clock.write(
        Path(job["out"]).with_suffix(".json"), held, ("kronfluence", "torch", "transformers")
    )


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
