"""Kronfluence's half of the comparison: reads a job, writes its factors and scores as tensors.

Runs in an environment of its own (README.md) and imports nothing of raycurv.
``against_kronfluence.py`` starts it as ``kronfluence_side.py JOB.json``. Of the job it wants:

    model, examples, out      the model's directory, an .npz, the file to write
    modules                   names of the linear layers
    dtype                     of everything: model, factors, eigenbases, Λ, products, scores
    rank, batch, threads      of low-rank queries; examples a batch
    absolute_damping          one number for all blocks, beside the default

and writes, as safetensors: ``lam/M`` and ``lam_count/M`` (the sum and what it is divided by),
``input_…/M`` and ``output_…/M`` (eigenvectors, eigenvalues, rows of the factor), ``scores/…``; the
metadata holds versions and seconds of each phase.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from clock import Clock
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.constants import ALL_MODULE_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

IGNORED = -100  # cross_entropy's own: a target that no loss is taken of
Rows = list[dict[str, Tensor]]


class NextToken(Task):
    """Next-token cross-entropy in nats of the data's own labels, summed over tokens and batch."""

    def __init__(self, modules: list[str]) -> None:
        self._modules = modules

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        assert not sample, "the comparison is of the empirical Fisher"
        # Padding comes last and attention is causal, so no position that counts sees it.
        logits_NTV = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        targets = batch["labels"][:, 1:].flatten()
        return cross_entropy(
            logits_NTV.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum"
        )

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self._modules

    def get_attention_mask(self, batch: Any) -> Tensor | None:
        return batch.get("mask")


def read_rows(ids_NT: np.ndarray, lengths_N: np.ndarray) -> Rows:
    """One dict an example; with a mask where any example is shorter than the rest."""
    ragged = bool((lengths_N < ids_NT.shape[1]).any())
    rows = []
    for ids_T, length in zip(torch.from_numpy(ids_NT), lengths_N, strict=True):
        there = torch.arange(len(ids_T)) < int(length)
        row = {"input_ids": ids_T, "labels": torch.where(there, ids_T, IGNORED)}
        rows.append(row | ({"mask": there.long()} if ragged else {}))
    return rows


def factor_arguments(strategy: str, dtype: torch.dtype) -> FactorArguments:
    """The empirical Fisher, with every step in one dtype and eigendecompositions in float64."""
    return FactorArguments(
        strategy=strategy,
        use_empirical_fisher=True,
        activation_covariance_dtype=dtype,
        gradient_covariance_dtype=dtype,
        eigendecomposition_dtype=torch.float64,
        per_sample_gradient_dtype=dtype,
        lambda_dtype=dtype,
    )


def score_arguments(dtype: torch.dtype, **chosen: Any) -> ScoreArguments:
    """Scores with every step in one dtype; damping 0.1 · mean(Λ) a block unless chosen."""
    return ScoreArguments(
        **({"damping_factor": None} | chosen),
        query_gradient_svd_dtype=dtype,
        per_sample_gradient_dtype=dtype,
        precondition_dtype=dtype,
        score_dtype=dtype,
    )


def pairwise(
    analyzer: Analyzer,
    factors: str,
    name: str,
    queries: Rows,
    train: Rows,
    batch: int,
    arguments: ScoreArguments,
) -> Tensor:
    """Scores ``[Q, N]``, summed over blocks."""
    analyzer.compute_pairwise_scores(
        name, factors, queries, train, len(queries), batch, score_args=arguments
    )
    scores: Tensor = analyzer.load_pairwise_scores(name)[ALL_MODULE_NAME]
    return scores


def main(job: dict[str, Any]) -> None:
    """Fit, score, write."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="kronfluence")
    dtype: torch.dtype = getattr(torch, job["dtype"])
    examples = np.load(job["examples"])
    train = read_rows(examples["train"], examples["train_lengths"])
    queries = read_rows(examples["queries"], examples["query_lengths"])
    model = LlamaForCausalLM.from_pretrained(
        job["model"], dtype=dtype, attn_implementation="eager"
    ).eval()
    task = NextToken(job["modules"])
    model = prepare_model(model, task)
    clock, batch = Clock(), job["batch"]
    with TemporaryDirectory() as directory:
        analyzer = Analyzer(
            "comparison",
            model,
            task,
            cpu=True,
            log_level=logging.ERROR,
            disable_tqdm=True,
            output_dir=directory,
        )
        fitted = factor_arguments("ekfac", dtype)
        with clock.phase("covariance"):
            analyzer.fit_covariance_matrices("ekfac", train, batch, factor_args=fitted)
        with clock.phase("eigendecomposition"):
            analyzer.perform_eigendecomposition("ekfac", factor_args=fitted)
        with clock.phase("lambda"):
            analyzer.fit_lambda_matrices("ekfac", train, batch, factor_args=fitted)
        scores = {}
        for name, chosen in {
            "full": {},
            "absolute": {"damping_factor": job["absolute_damping"]},
            "low": {"query_gradient_low_rank": job["rank"], "use_full_svd": True},
            "low_random": {"query_gradient_low_rank": job["rank"]},
        }.items():
            with clock.phase(f"pairwise {name}"):
                scored = score_arguments(dtype, **chosen)
                scores[name] = pairwise(analyzer, "ekfac", name, queries, train, batch, scored)
        with clock.phase("self"):
            analyzer.compute_self_scores(
                "self", "ekfac", train, batch, score_args=score_arguments(dtype)
            )
            scores["self"] = analyzer.load_self_scores("self")[ALL_MODULE_NAME]
        with clock.phase("kfac"):
            kfac = factor_arguments("kfac", dtype)
            analyzer.fit_all_factors("kfac", train, batch, factor_args=kfac)
            scored = score_arguments(dtype)
            scores["kfac"] = pairwise(analyzer, "kfac", "kfac", queries, train, batch, scored)
        factors = (
            analyzer.load_covariance_matrices("ekfac")
            | analyzer.load_eigendecomposition("ekfac")
            | analyzer.load_lambda_matrices("ekfac")
        )
    named = {
        "lam": "lambda_matrix",
        "lam_count": "num_lambda_processed",
        "input_vectors": "activation_eigenvectors",
        "output_vectors": "gradient_eigenvectors",
        "input_values": "activation_eigenvalues",
        "output_values": "gradient_eigenvalues",
        "input_count": "num_activation_covariance_processed",
        "output_count": "num_gradient_covariance_processed",
    }
    tensors = {
        f"{short}/{module}": tensor.contiguous()
        for short, long in named.items()
        for module, tensor in factors[long].items()
    } | {f"scores/{name}": tensor.contiguous() for name, tensor in scores.items()}
    versions = {name: version(name) for name in ("kronfluence", "torch", "transformers")}
    seconds = {name: cost.wall for name, cost in clock.phases.items()}
    save_file(
        tensors,
        job["out"],
        {"versions": json.dumps(versions), "seconds": json.dumps(seconds)},
    )


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
