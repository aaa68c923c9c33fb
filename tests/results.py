"""What a run left behind, and whether it is what another run left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from commands import snapshot
from safetensors.torch import load_file

# Between runs that add in another order, float64; max |difference| over max |reference|.
CLOSE = 1e-10


def tables(folder: Path) -> dict[str, pa.Table]:
    """Every table below a directory without the times that it took, rows in one order."""
    found = {}
    for name in (
        "tables/blocks", "tables/spectrum", "tables/examples", "tables/solver",
        "tables/certificate", "scores", "self",
    ):  # fmt: skip
        files = sorted((folder / name).glob("*.parquet"))
        if files:
            table = pa.concat_tables([pq.read_table(f) for f in files])
            table = table.replace_schema_metadata(None)
            table = table.drop([c for c in table.column_names if c == "eigh_seconds"])
            keys = [c for c in ("query_id", "train_id", "id") if c in table.column_names]
            found[name] = table.sort_by([(k, "ascending") for k in keys]) if keys else table
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the artefacts below a directory."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for key, tensor in load_file(path).items():
            found[f"{path.relative_to(folder)}/{key}"] = tensor
    return found


def assert_same(folder: Path, reference: Path) -> None:
    """The results of two directories are equal bit for bit, and no more lies there than that."""
    a, b = tables(folder), tables(reference)
    assert a.keys() == b.keys() and a
    for name in a:
        assert a[name].equals(b[name]), name
    x, y = tensors(folder), tensors(reference)
    assert x.keys() == y.keys() and x
    for name in x:
        assert torch.equal(x[name], y[name]), name
    assert not (folder / "work").exists()
    assert not list(folder.rglob("*.part"))


def assert_close(folder: Path, reference: Path) -> None:
    """The numbers of two directories agree, whatever the order of additions was."""
    a, b = tables(folder), tables(reference)
    assert a.keys() == b.keys() and a
    for name in a:
        assert a[name].num_rows == b[name].num_rows
        for column in b[name].column_names:
            mine, theirs = (t[name][column].to_pylist() for t in (a, b))
            if column == "stage":
                continue
            if isinstance(theirs[0], float) or column == "block_scores":
                x, y = np.array(mine), np.array(theirs)
                assert np.abs(x - y).max() <= CLOSE * np.abs(y).max(), (name, column)
            else:
                assert mine == theirs, (name, column)


def changed(before: dict[str, tuple[int, bytes]], folder: Path) -> set[str]:
    """Which files were written, deleted or made since a snapshot; apart from run.json, and the
    timeline, which every run carries on."""
    after = snapshot(folder)
    names = {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}
    return {n for n in names if n != "run.json" and not n.startswith("tables/timeline/")}
