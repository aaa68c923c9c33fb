"""Every bit that fits and scores in float64 leave, as hashes: whether a change moved any number.

The same script runs on any two commits of raycurv, for it uses raycurv's public names alone:

    python benchmarks/reference.py --out FILE      # on the one
    python benchmarks/reference.py --check FILE    # on the other: names what differs, exits with 1

Everything else is fixed: texts, seeds, steps of training, one thread, no Ray. What remains is the
processor and the versions of torch and of its kernels, on which the last bits depend: both are
written down beside the hashes and compared first, as are the model's weights, which are trained
without raycurv.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import contextlib
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from result_file import processor
from safetensors.torch import load_file
from torch import Tensor

import raycurv

sys.path.append(str(Path(__file__).parents[1] / "demo"))

import train as demo

# The name of a run or of its scores: of each file (below its directory) the hash of each tensor,
# or of each column.
Hashes = dict[str, dict[str, str]]

TRAINED_STEPS = 30
LAYERS = 2  # of the demo's width, so that kernels take the same paths as at work

# Each fit's own settings. Between them they take every path that makes a number.
FITS: dict[str, dict[str, Any]] = {
    "ekfac": {"gradients": True, "keep_sums": True},
    "empirical": {"fisher": "empirical"},
    "signs": {"fisher": "signs", "draws": 2},
    "kfac": {"method": "kfac"},
    "diagonal": {"method": "diagonal"},
    "identity": {"method": "identity"},
    "mfac": {"method": "mfac", "rows": 8},
    "swept": {"stages": 2, "schedule": "swept", "gradients": True},
    "tiles": {"max_factor_dim": 40, "draws": 2},
    "float32": {"dtype": "float32"},
    "others": {"keep_sums": True},
}
EVERYTHING = {"per_block": True, "per_token": True, "self_influence": True, "ihvp": True}
# Scores of each: the fit they come from, and their own settings.
SCORES: dict[str, tuple[str, dict[str, Any]]] = {
    "ekfac-32": ("ekfac", EVERYTHING | {"rank": 32}),
    "ekfac-full": ("ekfac", EVERYTHING | {"rank": "full"}),
    "ekfac-2": ("ekfac", {"rank": 2, "ihvp": True}),
    "ekfac-best": ("ekfac", {"top_k": 3, "query_memory": 1}),
    "empirical-full": ("empirical", {"rank": "full"}),
    "kfac-32": ("kfac", EVERYTHING),
    "diagonal-full": ("diagonal", EVERYTHING | {"rank": "full"}),
    "identity-32": ("identity", EVERYTHING),
    "mfac-32": ("mfac", {"per_block": True, "ihvp": True, "self_influence": True}),
    "mfac-blocks": ("mfac", {"per_block": True, "inverse": "block", "rank": "full"}),
    "swept-32": ("swept", EVERYTHING | {"stages": 2, "schedule": "swept"}),
    "tiles-32": ("tiles", EVERYTHING),
    "float32-32": ("float32", EVERYTHING),
}
# Fits of the first half of the texts; this one is of the second, to be merged with the first.
OTHERS = "others"
# A few iterations are as telling as all, and take a tenth of the time.
PRUNED: dict[str, dict[str, Any]] = {
    "pruned": {"sparsity": 0.5, "iterations": 20, "measure": "none"},
    "pruned-2-4": {"structure": "2:4", "iterations": 20, "blocks": ("*down_proj",)},
}


@dataclass(frozen=True)
class Settings:
    """Hashes of every number that fits and scores of a small language model write."""

    out: Path | None = None
    """Where the hashes go, as JSON."""
    check: Path | None = None
    """Hashes that must be found again; each difference is named, and the exit code is 1."""
    keep: Path | None = None
    """Keep the runs in this directory, which must be new. Default: they are deleted."""


def texts(count: int) -> list[dict[str, Any]]:
    """Sentences of 30 to 90 bytes with ids, always the same, some sharing most of their words."""
    who = ("The keeper", "A sailor", "My neighbour", "Nobody", "The third clerk")
    does = ("counts", "paints", "hides from", "writes about", "mends", "has never seen", "sells")
    what = ("the lamp", "seven nets", "a letter from the north", "the harbour's only clock")
    when = (".", " at dawn.", ", and says so twice.", "; then it rains.", " (in 1887)!", "?\n")
    return [
        {
            "id": f"text {n}",
            "text": who[n % 5] + " " + does[n % 7] + " " + what[n % 4] + when[n * n % 6],
        }
        for n in range(count)
    ]


def save_model(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The demo's model, smaller, after a few steps on the rows: the same weights every time."""
    settings = demo.Settings(out=folder, layers=LAYERS)
    longest = 1 + max(len(row["text"].encode()) for row in rows)
    read = demo.Rows.of([row["text"] for row in rows[:16]])
    torch.manual_seed(settings.seed)
    model = demo.make_model(settings, longest)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    for step in range(TRAINED_STEPS):
        chosen = (torch.arange(settings.batch) + settings.batch * step) % len(read)
        total, count = read.take(chosen).loss(model)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    demo.save(model, folder, longest)


def make_all(folder: Path) -> None:
    """The model, and each fit and its scores in a directory of its name."""
    rows = texts(24)
    fitted, later, queries = rows[:16], rows[16:], rows[14:18]
    save_model(folder / "model", rows)
    plain = {"address": "none", "quiet": True}
    fit = plain | {"fisher": "sampled", "dtype": "float64", "batch_tokens": 400, "seed": 3}
    runs: dict[str, raycurv.Run] = {}
    for name, own in FITS.items():
        with _told(name):
            data = later if name == OTHERS else fitted
            runs[name] = raycurv.fit(folder / "model", data, folder / name, **(fit | own))
    with _told("extended"):
        runs["ekfac"].extend(later, folder / "extended", **plain)
    with _told("merged"):
        runs["ekfac"].merge(runs[OTHERS], out=folder / "merged", **plain)
    for name, own in PRUNED.items():
        with _told(name):
            runs["ekfac"].prune(folder / name, **(plain | own))
    for name, (run, own) in SCORES.items():
        with _told(name):
            settings = plain | {"batch_tokens": 300} | own
            runs[run].influence(queries, fitted, folder / name, **settings)


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


def hashes_of(folder: Path) -> dict[str, Hashes]:
    """Of each directory in the folder, the hashes of its files."""
    return {
        place.name: {
            str(path.relative_to(place)): hashes_of_file(path)
            for path in sorted(place.rglob("*"))
            if path.suffix in (".safetensors", ".parquet") and "timeline" not in path.parts
        }
        for place in sorted(folder.iterdir())
    }


def hashes_of_file(path: Path) -> dict[str, str]:
    """Of each tensor its dtype, shape and hash; of each column its type, length and hash."""
    if path.suffix == ".safetensors":
        return {name: _tensor(tensor) for name, tensor in sorted(load_file(path).items())}
    table = pq.read_table(path)
    # Times differ from run to run.
    names = [name for name in table.column_names if not name.endswith("seconds")]
    return {name: _column(table.column(name)) for name in names}


def _tensor(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)} {_digest(tensor.flatten().view(torch.uint8).numpy())}"


def _column(column: pa.ChunkedArray) -> str:
    # Python shows every bit of a number.
    return f"{column.type} {len(column)} {_digest(repr(column.to_pylist()).encode())}"


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=6).hexdigest()


def differences(want: dict[str, Hashes], got: dict[str, Hashes]) -> Iterator[str]:
    """Each tensor or column that is there once, or twice with other bits."""
    for place in sorted(want.keys() | got.keys()):
        files, found = want.get(place, {}), got.get(place, {})
        for file in sorted(files.keys() | found.keys()):
            parts, others = files.get(file), found.get(file)
            if parts is None or others is None:
                yield f"{place}/{file}: {'is new' if parts is None else 'is missing'}"
                continue
            for part in sorted(parts.keys() | others.keys()):
                if parts.get(part) != others.get(part):
                    expected, now = parts.get(part, "nothing"), others.get(part, "nothing")
                    yield f"{place}/{file} {part}: expected {expected}, got {now}"


def about() -> dict[str, str]:
    """What bits depend on and raycurv does not choose."""
    return {
        "processor": processor().split(",")[0],
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def compare(path: Path, found: dict[str, Hashes]) -> int:
    """Print each difference from the file's hashes; gives the exit code."""
    said = json.loads(path.read_text())
    for name, here in about().items():
        if here != said["about"][name]:
            print(f"another {name}, so that bits may differ: {said['about'][name]}; here {here}")
    if "model" in said["hashes"] and said["hashes"]["model"] != found["model"]:
        print("the model's own weights differ: so will all else, whatever raycurv does")
    different = list(differences(said["hashes"], found))
    total = sum(len(parts) for files in found.values() for parts in files.values())
    print("\n".join([*different, f"{total} tensors and columns, {len(different)} differences"]))
    return 1 if different else 0


def write(path: Path, found: dict[str, Hashes]) -> None:
    """The hashes as JSON, a line a file."""
    lines = [
        f" {json.dumps(place)}: {{\n"
        + ",\n".join(f"  {json.dumps(f)}: {json.dumps(parts)}" for f, parts in files.items())
        + "\n }"
        for place, files in found.items()
    ]
    hashes = ",\n".join(lines)
    path.write_text(f'{{"about": {json.dumps(about())},\n"hashes": {{\n{hashes}\n}}}}\n')


def main(settings: Settings) -> int:
    torch.set_num_threads(1)
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        folder = settings.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=settings.keep is None)
        make_all(folder)
        found = hashes_of(folder)
    print(f"{Path(raycurv.__file__).parent}: {time.perf_counter() - started:.0f} s")
    if settings.out is not None:
        write(settings.out, found)
    return 0 if settings.check is None else compare(settings.check, found)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings)))
