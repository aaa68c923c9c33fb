"""Seconds that reading data, opening a model and reading a run take, to compare commits.

    python benchmarks/loading.py --place DIR                   # makes its inputs in DIR once
    PYTHONPATH=OTHER python benchmarks/loading.py --place DIR  # the same by another checkout

The inputs are a Llama-shaped checkpoint of 100 MB, 40,000 rows of text and as many of token ids
(Parquet), and a fitted run of 56 blocks. Each figure is the least processor time of ``--times``
repetitions in one process, after one that is not counted. The machine's other work changes them
less than wall time, and still: run two checkouts in turn, and compare medians.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers

import raycurv
from raycurv.data.reading import ExampleReader
from raycurv.models.opening import open_model

ROWS, TOKENS = 40_000, 64


def prepare(place: Path) -> None:
    """Write the inputs where they are not there yet."""
    if (place / "ready").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    for name, layers, width in (("model", 8, 512), ("small", 8, 32)):
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=width, intermediate_size=2 * width,
            num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=512,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(place / name)
    ids = torch.randint(0, 256, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    pq.write_table(pa.table({"input_ids": ids.tolist()}), place / "ids.parquet")
    (place / "ids.jsonl").write_text(
        "".join(
            json.dumps({"id": f"r{n}", "input_ids": row}) + "\n"
            for n, row in enumerate(ids.tolist())
        )
    )
    raycurv.fit(
        str(place / "small"), [{"input_ids": row} for row in ids[:8].tolist()],
        out=str(place / "run"), address="none", quiet=True,
    )  # fmt: skip
    (place / "ready").touch()


def read(file: Path) -> int:
    """Read all examples of a file; gives their number."""
    reader = ExampleReader(str(file), None, 256, 512, token_inputs=True)
    return sum(1 for _ in reader.examples())


def load(directory: Path) -> Any:
    """Open a model, fingerprint it, and build its first and its last layer."""
    model = open_model(str(directory))
    model.fingerprint()
    for unit in (0, model.units - 1):
        model.build(range(unit, unit + 1), torch.float32, torch.device("cpu"))


def read_run(directory: Path) -> None:
    """Open a run, and read its tables and every block's curvature."""
    run = raycurv.open(str(directory))
    run.spectrum(), run.examples()
    for name in run.blocks()["block"].to_pylist():
        run.curvature(name).diagonal(lambda values: values)


def least(times: int, work: Callable[[], Any]) -> float:
    """The least processor seconds of some repetitions, the first left out."""
    work()
    found = []
    for _ in range(times):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return min(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--place", type=Path, required=True, help="directory of the inputs")
    parser.add_argument("--times", type=int, default=5, help="repetitions of each")
    given = parser.parse_args()
    torch.set_num_threads(1)
    prepare(given.place)
    print(
        json.dumps(
            {
                "parquet": least(given.times, lambda: read(given.place / "ids.parquet")),
                "jsonl": least(given.times, lambda: read(given.place / "ids.jsonl")),
                "model": least(given.times, lambda: load(given.place / "model")),
                "run": least(given.times, lambda: read_run(given.place / "run")),
            }
        )
    )


if __name__ == "__main__":
    main()
