"""Damaged and hostile files of data give examples or a mistake that is told, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import fuzz_data
from fuzz_data import data_cases, whole_files
from fuzzing import tried

from raycurv.data.reading import ExampleReader

SEED, CASES = 20, 600


def test_whole_files_are_read(tmp_path: Path) -> None:
    """What is changed is right before: else nothing behind the first check would be tried."""
    for name, content in whole_files().items():
        path = tmp_path / name
        path.write_bytes(content)
        reader = ExampleReader(path, fuzz_data.ByteTokenizer(), fuzz_data.VOCABULARY, None)
        reader.looks_up = lambda inputs: None
        assert list(reader.examples())


def test_changed_files_give_examples_or_a_mistake(tmp_path: Path) -> None:
    outcome = tried(data_cases(tmp_path, SEED), range(CASES))
    assert not outcome.faults, "\n".join(outcome.faults.values())
    # Both ends come, so that neither is all that is tried.
    assert outcome.ends["examples"] > CASES // 30 and outcome.ends["UserError"] > CASES // 30


def test_a_fault_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(self: object) -> list[object]:
        raise KeyError("a fault")

    monkeypatch.setattr(ExampleReader, "examples", breaks)
    assert len(tried(data_cases(tmp_path, SEED), range(5)).faults) >= 3
