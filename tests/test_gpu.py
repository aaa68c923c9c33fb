"""What ``benchmarks/gpu.py`` promises, tried on the CPU at tiny sizes, without Ray."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import gpu
from gpu import PARTS, Notes, Part, Place


def results(out: Path) -> dict[str, Any]:
    """What the JSON file says of each part."""
    said: dict[str, Any] = json.loads((out / "gpu.json").read_text())
    markdown = (out / "gpu.md").read_text()
    assert said["published"] == gpu.PUBLISHED and gpu.PUBLISHED in markdown
    parts: dict[str, Any] = said["parts"]
    assert all(f"## {found['title']}\n\n**{found['outcome']}**" in markdown
               for found in parts.values())  # fmt: skip
    return parts


def test_all_of_it_runs_on_a_cpu(tmp_path: Path) -> None:
    # Every part refuses to end well where Ray was imported.
    command = [sys.executable, gpu.__file__, "--out", tmp_path, "--device", "cpu", "--small"]
    subprocess.run(command, check=True, timeout=300)
    parts = results(tmp_path)
    assert list(parts) == [part.name for part in PARTS]
    assert {name: (p["outcome"], p["reason"]) for name, p in parts.items()} == dict.fromkeys(
        parts, ("done", "")
    )
    verdicts = [
        row["verdict"]
        for name in ("stages", "links")
        for rows in parts[name]["tables"].values()
        for row in rows
        if "verdict" in row
    ]
    assert len(verdicts) > 15 and set(verdicts) == {"kept"}
    for mode in ("float32", "tf32", "bfloat16"):
        phases = {row["phase"]: row for row in parts[mode]["tables"]["Phases"]}
        assert {"first pass: A and G", "eigendecompositions", "second pass: Λ", "scores"} <= set(
            phases
        )
        assert all(row["seconds"] >= 0 and row["peak GB (process)"] > 0 for row in phases.values())
        (whole,) = parts[mode]["tables"]["In all"]
        assert whole["blocks"] == 14 and whole["fit, s"] > 0 < whole["score, s"]
        assert whole["decomposed"] == "ok"
        assert whole.get("Pearson with float32", 1.0) > 0.99
    rates = parts["throughput"]["tables"]
    assert {row["kind"] for row in rates["Matrix products, the peaks"]} == {
        "bfloat16", "tf32", "float32",
    }  # fmt: skip
    assert all(row["error"] < 1e-4 for row in rates[list(rates)[1]])
    solved = parts["eigh"]["tables"]["Eigendecompositions"]
    assert {(row["size"], row["dtype"]) for row in solved} == {
        (size, dtype) for size in (32, 64) for dtype in ("float32", "float64")
    }
    assert all(row["residual"] < 1e-5 and row["seconds"] > 0 for row in solved)


def test_without_time_every_part_is_left_out_with_the_reason(tmp_path: Path) -> None:
    assert gpu.Run(tmp_path, "cpu", True, 0.0).go() == 0
    for found in results(tmp_path).values():
        assert found["outcome"] == "skipped" and "0 s were left, and it takes" in found["reason"]


class Kept:
    """Notes that a test looks at."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def row(self, table: str, **found: Any) -> None:
        self.rows.append(found)

    def at(self, text: str) -> None:
        pass


def test_results_that_are_too_far_apart_are_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_fits

    def numbers(model: str, settings: dict[str, Any], place: Place) -> dict[str, np.ndarray]:
        off = 1e-6 if "stages" in settings else 0.0
        return {"loss": np.ones(3), "scores": np.array([1.0, 2.0 + off])}

    monkeypatch.setattr(gpu_fits, "_numbers", numbers)
    kept: Any = Kept()
    with pytest.raises(AssertionError, match=r"scores of network float64, .* stages 3: 5e-07"):
        gpu_fits.stages(Place("cpu", True, 1.0, str(tmp_path)), kept)
    assert [row["verdict"] for row in kept.rows] == ["kept"] * 5 + ["MISSED"]


def fails(place: Place, notes: Notes) -> None:
    notes.row("Before", number=1)
    raise ValueError("no good")


def hangs(place: Place, notes: Notes) -> None:
    notes.row("Before", number=2)
    notes.at("a long thing")
    time.sleep(600)


def works(place: Place, notes: Notes) -> None:
    notes.row("It", seconds=place.seconds)


def test_what_becomes_of_a_part_is_its_own_business(tmp_path: Path) -> None:
    def part(name: str, most: float | None = None) -> Part:
        return Part(name, name, f"{__name__}:{name}", 0.1, most, ())

    lacking = Part("lacks", "lacks", f"{__name__}:works", 0.1, None, ("torch", "no_such_package"))
    parts = (part("fails"), part("hangs", 1.0), lacking, part("works"))
    assert gpu.Run(tmp_path, "cpu", True, 60.0, parts).go() == 1
    found = results(tmp_path)
    assert found["fails"]["outcome"] == "failed"
    assert found["fails"]["reason"] == "ValueError: no good"
    assert found["fails"]["tables"] == {"Before": [{"number": 1}]}
    assert found["hangs"]["outcome"] == "stopped"
    assert found["hangs"]["reason"] == "the time was over (1 s), at: a long thing"
    assert found["hangs"]["tables"] == {"Before": [{"number": 2}]}
    assert found["lacks"]["outcome"] == "lacking"
    assert "not installed: no-such-package" in found["lacks"]["reason"]
    assert found["works"]["outcome"] == "done" and found["works"]["tables"]


def test_fewer_layers_where_the_time_is_short(tmp_path: Path) -> None:
    run = gpu.Run(tmp_path, "cuda", False, 60.0)
    assert [run._layers(left)[0] for left in (400.0, 200.0, 90.0, 10.0)] == [24, 12, 6, 6]
    run.found["float32"] = gpu.Found("it", "done", "", 60.0, 24)
    assert run._layers(80.0)[0] == 24
    run.found["float32"] = gpu.Found("it", "stopped", "", 375.0, 24)
    assert run._layers(200.0)[0] == 6


def test_without_a_gpu_nothing_is_run_in_its_place(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main(["--out", str(tmp_path), "--parts", "machine", "links"]) == 1
    found = results(tmp_path)
    assert found["machine"]["outcome"] == "failed" and "no GPU" in found["machine"]["reason"]
    assert found["links"]["outcome"] == "skipped"
    assert "no GPU" in found["links"]["reason"]
