"""Claim: whatever a model directory holds, it is a model or a mistake that is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from model_fuzzing import fuzz_model

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("good") / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def test_a_mutated_directory_is_a_model_or_a_named_mistake(good: Path, tmp_path: Path) -> None:
    outcomes = fuzz_model(good, tmp_path, count=150, seed=0)
    # Both happen, or the mutations would be too weak or too strong to say anything.
    assert outcomes["opened"] > 5 and outcomes["refused"] > 50, outcomes
