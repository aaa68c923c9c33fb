"""A run directory of which a file is another: read as it was written, or refused in words.

An accident (a bit that flips, a file that is cut, gone, or another one's) never gives another
answer, but for a part of the timeline that is gone, which is a log. What a stranger forges, with
checksums that are right, gives whatever it says, or is refused; it raises nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import raycurv
from raycurv.files.store import Store
from raycurv.files.tables import read_table, write_table
from raycurv.files.tensorfile import open_tensors, write_tensors
from raycurv.jobs.timeline.lanes import read_lanes

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from commands import EXACT_FIT, classified, classifier

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


def run_cases(place: Path, seed: int) -> Callable[[int], str]:
    """Cases of a finished run, or of scores on it, in which one file is changed and which is then
    read: number -> ``read``. Every tenth run is scored with, too.

    Args:
        place: an empty directory.
        seed: of all cases together.
    """
    first = made(place / "first")
    truth = scores(first, first, place / "scores")

    def read_run(copy: Path, again: bool) -> list[Any]:
        run = raycurv.open(copy)
        return [*light(run), scores(run, first, copy.parent / "out") if again else truth]

    def read_scores(copy: Path, again: bool) -> list[Any]:
        opened = raycurv.open_scores(copy)
        own = opened.self_influence().to_pylist()
        return [opened.matrix()[0].tolist(), opened.top("row 0").to_pylist(), own]

    sources = [
        (source, read, read(source, False))
        for source, read in ((Path(first.path), read_run), (place / "scores", read_scores))
    ]

    def case(number: int) -> str:
        rng = np.random.default_rng((seed, number))
        source, read, answer = sources[number % 2]
        shutil.rmtree(place / "a", ignore_errors=True)
        copy = place / "a" / "b" / "c" / "run"
        shutil.copytree(source, copy)
        names = [n for n in Store(str(source)).names() if not n.startswith(("data/", "labels/"))]
        if rng.random() < 0.3:
            names = [name for name in names if name in ("run.json", "blocks.json")]
        name = names[int(rng.integers(len(names)))]
        change = forge if rng.random() < 0.3 else DAMAGES[int(rng.integers(len(DAMAGES)))]
        change(copy / name, rng)
        found = read(copy, number % 20 == 0)
        free = change is forge or (change is delete and name.startswith("tables/timeline/"))
        assert free or found == answer, f"another answer after {change.__name__} of {name}"
        return "read"

    return case
