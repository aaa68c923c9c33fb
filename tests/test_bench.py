"""What `make bench` promises: verdicts that follow from figures, and no part that loses another."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import bench
from bench import Part, Settings
from growth import Curve
from reference import differences
from targets import SHAPES, judge

PHASES = ("covariance", "eigendecomposition", "lambda", "pairwise", "self")


def side(cpu: float, peak: float) -> dict[str, Any]:
    return {"cpu": cpu, "peak": peak, "phases": dict.fromkeys(PHASES, cpu / len(PHASES))}


def speed() -> dict[str, Any]:
    """Figures that reach every target."""
    shape = {
        "sides": {
            "raycurv float32": side(4.0, 6.0),
            "kronfluence float32": side(10.0, 10.0),
            "raycurv fast": side(1.0, 6.0),
            "kronfluence medium": side(9.0, 10.0),
        },
        "over floor": dict.fromkeys(PHASES, 1.2),
        "Pearson": 0.99999,
        "fastest": {"raycurv": "raycurv fast", "kronfluence": "kronfluence medium"},
    }
    return {"shapes": {name: json.loads(json.dumps(shape)) for name in SHAPES}}


def verdicts(figures: dict[str, Any]) -> dict[str, tuple[str, bool | None]]:
    return {t.title: (t.found, t.reached) for t in judge({"speed": figures}, None)}


def test_what_is_not_there_is_neither_reached_nor_missed() -> None:
    assert {target.reached for target in judge({}, None)} == {None}


def test_every_target_of_speed_can_be_reached() -> None:
    reached = [target.reached for target in judge({"speed": speed()}, 2399.0)]
    assert reached[:6] == [True] * 6 and reached[-1]
    assert judge({}, 2401.0)[-1].reached is False


def test_four_shapes_of_five_reach_nothing() -> None:
    figures = speed()
    del figures["shapes"]["e"]
    found = verdicts(figures)
    said, reached = found["CPU seconds, raycurv / kronfluence, float32"]
    assert reached is None and "without (e)" in said
    # Floors are asked of (b) and (c) alone.
    assert found["CPU seconds of a phase over its floor"][1] is True


@pytest.mark.parametrize(
    ("title", "change", "named"),
    [
        ("Pearson of scores with kronfluence's", {"Pearson": 0.9998}, "(b) 1 - 2e-04"),
        ("peak memory, raycurv / kronfluence", {"peak": 8.0}, "above: (b)"),
        ("CPU seconds of a phase, raycurv / kronfluence", {"self": 3.0}, "above: (b) self 1.50"),
        ("CPU seconds of a phase over its floor", {"floor": 1.6}, "above: (b) lambda 1.60"),
        ("CPU seconds, raycurv / kronfluence, float32", {"cpu": 40.0}, "(b) 4.00"),
    ],
)
def test_a_shape_that_misses_is_named(title: str, change: dict[str, float], named: str) -> None:
    figures = speed()
    shape = figures["shapes"]["b"]
    ours = shape["sides"]["raycurv float32"]
    shape["Pearson"] = change.get("Pearson", shape["Pearson"])
    shape["over floor"]["lambda"] = change.get("floor", 1.2)
    ours["peak"] = change.get("peak", ours["peak"])
    ours["cpu"] = change.get("cpu", ours["cpu"])
    ours["phases"]["self"] = change.get("self", ours["phases"]["self"])
    found = verdicts(figures)
    assert found[title][1] is False and named in found[title][0]
    assert [t for t, (_, reached) in found.items() if reached is False] == [title]


def test_an_exponent_is_that_of_a_power() -> None:
    sizes = (16, 32, 64, 128)
    assert np.isclose(Curve(sizes, tuple(3 * s**1.5 for s in sizes)).exponent, 1.5)
    bent = Curve(sizes, tuple(100 + s**2 for s in sizes))
    assert bent.exponent < bent.last < 2


# The whole, of parts that write at once

GOOD = """
import json, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
place = pathlib.Path(flags["--results"])
text = "# Title\\n\\n    command\\n\\n## Section\\n\\n![p](2000-01-01-good.png)\\n"
(place / "2000-01-01-good.md").write_text(text)
(place / "2000-01-01-good.png").write_bytes(b"picture")
pathlib.Path(flags["--figures"]).write_text(json.dumps({}))
with open(place.parent / "started", "a") as file:
    file.write("x")
"""
BAD = "raise SystemExit('no room in /home/somebody/place')"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of two parts: one that ends well and one that does not."""
    scripts = {"good": GOOD, "bad": BAD}
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text)
    parts = tuple(Part(name, str(tmp_path / f"{name}.py"), name.title()) for name in scripts)
    monkeypatch.setattr(bench, "PARTS", parts)
    monkeypatch.setattr(bench, "machine_slug", lambda: "machine")
    return Settings(
        kronfluence_python=Path(sys.executable), parts=("good", "bad"), keep=tmp_path / "keep",
        results=tmp_path / "results", date="2001-02-03",
    )  # fmt: skip


def test_a_part_that_fails_does_not_lose_the_others(settings: Settings) -> None:
    assert bench.main(settings) == 1
    text = (settings.results / "2001-02-03-machine.md").read_text()
    assert "## Good\n\n    command\n\n### Section\n\n![p](2001-02-03-machine-good.png)" in text
    assert (settings.results / "2001-02-03-machine-good.png").read_bytes() == b"picture"
    assert "**Failed** with exit code 1" in text and "no room in …/" in text
    assert "somebody" not in text and str(settings.keep) not in text


def test_a_rerun_makes_only_what_is_missing(settings: Settings) -> None:
    assert bench.main(settings) == 1
    (settings.results.parent / "bad.py").write_text(GOOD)
    assert bench.main(settings) == 0
    assert settings.keep is not None
    assert (settings.keep / "good" / "started").read_text() == "x"
    assert json.loads((settings.keep / "bad" / "outcome.json").read_text())["starts"] == 2


def test_parts_of_other_sizes_are_refused(settings: Settings) -> None:
    bench.main(settings)
    with pytest.raises(SystemExit, match="other modules"):
        bench.main(replace(settings, small=True))


def test_each_tensor_and_column_that_is_not_the_references_is_named() -> None:
    want = {"run": {"a": {"x": "float64 [2] 01", "y": "float64 [2] 02"}, "b": {}}}
    assert list(differences(want, want)) == []
    found = {"run": {"a": {"x": "float64 [2] 03", "z": "int32 4 05"}, "c": {}}}
    assert list(differences(want, found)) == [
        "run/a x: expected float64 [2] 01, got float64 [2] 03",
        "run/a y: expected float64 [2] 02, got nothing",
        "run/a z: expected nothing, got int32 4 05",
        "run/b: is missing",
        "run/c: is new",
    ]
