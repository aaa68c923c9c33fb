"""Claims about the notebook: its cells run, one after the other, and show what they end in."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "quickstart.ipynb"


def run_cells(cells: Sequence[str]) -> list[Any]:
    """Run cells in one namespace, as a kernel does; gives what each one's last expression is."""
    names: dict[str, Any] = {}
    shown: list[Any] = []
    for number, source in enumerate(cells):
        tree, last = ast.parse(source), None
        if isinstance(tree.body[-1], ast.Expr):
            expression = ast.Expression(tree.body.pop().value)  # type: ignore[attr-defined]
            last = compile(expression, f"cell {number}", "eval")
        exec(compile(tree, f"cell {number}", "exec"), names)
        shown.append(None if last is None else eval(last, names))
    return shown


def code() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.usefixtures("quiet_transformers")
def test_the_quickstart_runs_from_model_to_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    *_, shape, top, by, _picture = run_cells(code())
    assert shape[0] == 4 and shape[1] > 150
    assert len(top) == 5 and top["normalised"].is_monotonic_decreasing and top["text"].all()
    assert by.shape == (4, 6) and by.notna().all().all()
    (figure,) = map(plt.figure, plt.get_fignums())
    bars, curves = figure.axes
    assert len(bars.patches) == 24 and len(curves.lines) >= 8
    plt.close(figure)


def test_a_cell_that_raises_is_seen_and_so_is_what_the_last_one_shows() -> None:
    assert run_cells(["a = 2", "a + 1"]) == [None, 3]
    with pytest.raises(NameError, match="'b'"):
        run_cells(["a = 2", "b"])


def test_the_notebook_holds_nothing_of_the_machine_it_was_made_on() -> None:
    text = NOTEBOOK.read_text()
    assert len(text) < 100_000
    for place in ("/tmp", "/home", "/root", "/work", "/usr", "site-packages", "Warning"):
        assert place not in text
    for cell in json.loads(text)["cells"]:
        for link in re.findall(r"\]\(([^)]+)\)", "".join(cell["source"])):
            assert (NOTEBOOK.parent / link).exists(), link
        assert all(one["output_type"] != "error" for one in cell.get("outputs", ()))
