"""Claim: whatever a model directory holds, it is a model or a mistake that is named."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from fuzz_models import model_cases, whole_model
from fuzzing import tried

torch.set_num_threads(1)


def test_a_mutated_directory_is_a_model_or_a_named_mistake(tmp_path: Path) -> None:
    outcome = tried(model_cases(whole_model(tmp_path / "good"), tmp_path, seed=0), range(150))
    assert not outcome.faults, "\n".join(outcome.faults.values())
    # Both happen, or the mutations would be too weak or too strong to say anything.
    assert outcome.ends["opened"] > 5 and outcome.ends["UserError"] > 50, outcome.ends
