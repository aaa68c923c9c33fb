"""Claims about run directories of strangers, and about bits that flip: they are read as they were
written, or refused in words.

``fuzz`` goes on for as long as is wanted: ``fuzz(folder, seed, count)`` makes a small run in the
folder and reads it back with so many files changed, one after the other.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from commands import EXACT_FIT, classified, classifier

import raycurv
from raycurv import RaycurvError
from raycurv.files.store import Store
from raycurv.files.tables import TIMELINE, read_table, write_table
from raycurv.files.tensorfile import open_tensors, write_tensors
from raycurv.jobs.timeline.lanes import read_lanes

ROWS = classified(9)
# What may stand in the place of any value of JSON; as text, since not all of it can be written.
HOSTILE = (
    "null", "true", "-5", "0", "1e999", "NaN", "-Infinity", "9" * 5000, "1" + "0" * 400, '""', "[]",
    "{}", '"../../etc/passwd"', '"/etc/passwd"', '"a\\u0000b"', '"\\ud800"', '"x" ,  "y": 0',
    "[" * 100_000, '{"a":' * 5000, "1.5", '"ekfac"', '"identity"', "[[1]]", '["a", 3]', "'", "",
)  # fmt: skip


def made(folder: Path) -> raycurv.Run:
    """A small run with every kind of file."""
    settings: dict[str, Any] = EXACT_FIT | {"keep_sums": True, "gradients": True, "stages": 2}
    return raycurv.fit(classifier, ROWS, folder, **settings)


def light(run: raycurv.Run) -> list[Any]:
    """What a run's readers give, as plain values."""
    found: list[Any] = [run.manifest.settings, run.manifest.facts, run.block_names()]
    tables = ("blocks", "spectrum", "examples", "gradients", "gradient_norms")
    found += [getattr(run, name)().to_pylist() for name in tables]
    for name in run.block_names():
        curvature, gradient = run.curvature(name), run.gradient(name)
        found += [curvature.eigenvalues.tolist(), curvature.diagonal(torch.sqrt).tolist()]
        found += [gradient.mean.tolist(), gradient.mean_square.tolist()]
    found.append(read_lanes(Store(run.path)).shares())
    return found


def scores(run: raycurv.Run, first: raycurv.Run, out: Path) -> Any:
    """Scores on a run, whose model is the one of the first."""
    run._inputs = first._inputs
    given: dict[str, Any] = {"address": "none", "rank": "full", "self_influence": True}
    return run.influence(ROWS[:2], ROWS, out, quiet=True, **given).matrix()[0].tolist()


# Changes of one file


def flip(path: Path, rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


def cut(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes()[: int(rng.integers(path.stat().st_size))])


def empty(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(b"")


def delete(path: Path, rng: np.random.Generator) -> None:
    path.unlink()


def noise(path: Path, rng: np.random.Generator) -> None:
    data, at = path.read_bytes(), int(rng.integers(path.stat().st_size))
    path.write_bytes(data[:at] + rng.bytes(int(rng.integers(1, 9))) + data[at:])


def folder(path: Path, rng: np.random.Generator) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path, rng: np.random.Generator) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path, rng: np.random.Generator) -> None:
    """The file lies elsewhere, and a link leads there."""
    outside = path.parents[3] / "elsewhere"
    path.rename(outside)
    path.symlink_to(outside)


def swap(path: Path, rng: np.random.Generator) -> None:
    """Another file of the same kind stands here."""
    others = sorted(p for p in path.parent.iterdir() if p != path and p.is_file())
    if others:
        shutil.copy(others[int(rng.integers(len(others)))], path)


def edit(path: Path, rng: np.random.Generator, seal: bool = False) -> None:
    """A value of a JSON file is another; with ``seal`` its checksum is right."""
    if path.suffix != ".json":
        flip(path, rng)
        return
    said = json.loads(path.read_text())
    if seal:
        said.pop("checksum", None)
    hostile = HOSTILE[int(rng.integers(len(HOSTILE)))]
    text = _edited(said, rng).replace('"\\u0001"', hostile)
    if seal:
        try:
            value = json.loads(text)
            Store(str(path.parent)).write_json(path.name, value)
            return
        except (ValueError, RecursionError, TypeError):
            pass
    path.write_text(text)


def _edited(said: Any, rng: np.random.Generator) -> str:
    """JSON with a mark in the place of one value at any depth."""
    place = said
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[int(rng.integers(len(keys)))]
        inner = place[key]
        if not (isinstance(inner, (dict, list)) and inner) or rng.random() < 0.2:
            place[key] = "\u0001"
            return json.dumps(said)
        place = inner


DAMAGES = (flip, cut, empty, delete, noise, folder, pipe, link, swap, edit)


def forge(path: Path, rng: np.random.Generator) -> None:
    """Other content with right checksums: what a stranger may send."""
    store = Store(str(path.parent))
    if path.suffix == ".json":
        edit(path, rng, seal=True)
    elif path.suffix == ".safetensors":
        file = open_tensors(store, path.name)
        tensors, notes = file.read_all(), dict(file.metadata)
        key = list(tensors)[int(rng.integers(len(tensors)))]
        changes: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
            lambda t: torch.full_like(t.double(), torch.nan),
            lambda t: -t.double() - 1,
            lambda t: t[None],
            lambda t: t.reshape(-1)[:1],
            lambda t: t.to(torch.int32),
            lambda t: t.new_zeros(0),
            lambda t: torch.full_like(t.double(), torch.inf),
        )
        tensors[key] = changes[int(rng.integers(len(changes)))](tensors[key])
        if rng.random() < 0.2:
            del tensors[key]
        if notes and rng.random() < 0.3:
            notes[list(notes)[int(rng.integers(len(notes)))]] = "nan"
        write_tensors(store, path.name, tensors, notes, finite=False)
    else:
        table = read_table(store, path.name)
        column = table.column_names[int(rng.integers(table.num_columns))]
        changed = table.drop([column]) if rng.random() < 0.5 else table.slice(0, 0)
        write_table(store, path.name, changed)


def fuzz(place: Path, seed: int, count: int) -> Counter[str]:
    """Read a run, and scores on it, with one file changed, so many times each; gives how often that
    was refused and read.

    A change that is an accident never gives another answer (but for a part of the timeline that is
    gone, which is a log); and no change another exception.
    """
    rng = np.random.default_rng(seed)
    first = made(place / "first")
    truth = scores(first, first, place / "scores")

    def read_run(copy: Path, number: int) -> list[Any]:
        run = raycurv.open(copy)
        said = light(run)
        return [*said, scores(run, first, copy.parent / "out") if number % 10 == 0 else truth]

    def read_scores(copy: Path, number: int) -> list[Any]:
        opened = raycurv.open_scores(copy)
        own = opened.self_influence().to_pylist()
        return [opened.matrix()[0].tolist(), opened.top("row 0").to_pylist(), own]

    ended: Counter[str] = Counter()
    for source, read in ((Path(first.path), read_run), (place / "scores", read_scores)):
        ended += _changed(place, source, read, count, rng, seed)
    return ended


def _changed(
    place: Path,
    source: Path,
    read: Callable[[Path, int], list[Any]],
    count: int,
    rng: np.random.Generator,
    seed: int,
) -> Counter[str]:
    names = [n for n in Store(str(source)).names() if not n.startswith(("data/", "labels/"))]
    main = [name for name in names if name in ("run.json", "blocks.json")]
    truth = read(source, 1)
    ended: Counter[str] = Counter()
    for number in range(count):
        copy = place / "a" / "b" / "c" / "run"
        shutil.copytree(source, copy)
        some = main if rng.random() < 0.3 else names
        name = some[int(rng.integers(len(some)))]
        change = forge if rng.random() < 0.3 else DAMAGES[int(rng.integers(len(DAMAGES)))]
        said = f"{change.__name__} of {name}, {number} of seed {seed}"
        change(copy / name, rng)
        log = name.startswith("tables/timeline/")
        try:
            answer = read(copy, number)
            free = change is forge or (log and change is delete)
            assert free or answer == truth, said
            ended["read"] += 1
        except RaycurvError as error:
            assert all((error.where, error.expected, error.got)) and len(str(error)) < 3000, said
            ended["refused"] += 1
        except Exception as error:
            raise AssertionError(said) from error
        shutil.rmtree(place / "a")
    return ended


def test_a_changed_file_is_refused_or_says_what_it_said(tmp_path: Path) -> None:
    ended = fuzz(tmp_path, seed=20, count=90)
    assert ended["refused"] > 60
    # A change of what no reader looks at, such as sums that were kept, is none.
    assert ended["read"] > 5


def test_a_timeline_without_times_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    row = dict.fromkeys(TIMELINE.names)
    write_table(store, "tables/timeline/a.parquet", pa.Table.from_pylist([row], schema=TIMELINE))
    with pytest.raises(raycurv.errors.DamagedFile, match="phase"):
        read_lanes(store)
