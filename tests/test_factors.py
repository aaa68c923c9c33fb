"""A and G are what their definitions say, row by row, without padding."""

from __future__ import annotations

import pytest
import torch
from dense import worst
from networks import CASES, Case
from safetensors.torch import load_file

# Sums of some dozen float64 products of numbers near 1.
EXACT = 1e-10


def stored(run, factor: str) -> dict[str, torch.Tensor]:
    return load_file(f"{run.path}/factors/{factor}.safetensors")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_factors_are_means_of_outer_products_over_unpadded_rows(fits, case: Case) -> None:
    run, truth = fits.run(case), fits.truth(case)
    for row in run.blocks().to_pylist():
        name = row["block"]
        for factor, want in (
            (row["input_factor"], truth.input_factor(name)),
            (f"{name}.output", truth.output_factor(name)),
        ):
            file = stored(run, factor)
            count = max(1, int(file["count"]))  # none of an expert that no token met
            assert worst(file["sum"] / count, want) < EXACT, factor
        assert row["tokens"] == truth.rows(name)
