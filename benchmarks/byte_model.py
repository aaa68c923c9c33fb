"""What both sides read: a small Llama-shaped model of bytes and sequences of Python source.

The text is the running Python's own standard library. The model is trained for some seconds, so
that gradients, factors and scores are those of a network that has learnt something.

Axis letters: N examples, T tokens.
"""

from __future__ import annotations

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

BOS = 256
VOCABULARY = 259  # 256 bytes, BOS, EOS, padding
MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
# 1.2 MB of them are in every supported Python, and differ between versions by little.
FILES = (
    "argparse.py", "ast.py", "calendar.py", "configparser.py", "csv.py", "dataclasses.py",
    "difflib.py", "enum.py", "fractions.py", "ftplib.py", "heapq.py", "inspect.py", "ipaddress.py",
    "pickle.py", "random.py", "shutil.py", "statistics.py", "subprocess.py", "tarfile.py",
    "textwrap.py", "threading.py", "tokenize.py", "typing.py", "uuid.py", "zipfile.py",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Of the model: grouped-query attention, three query heads on a key-value head."""

    hidden: int = 96
    intermediate: int = 256
    layers: int = 4
    heads: int = 6
    key_value_heads: int = 2

    def module_names(self) -> list[str]:
        """Every linear layer of the decoder, in the model's order."""
        return [f"model.layers.{n}.{m}" for n in range(self.layers) for m in MODULES]


@dataclass(frozen=True)
class Sequences:
    """Token ids ``[N, T]``, all of one length, in three parts that share no text."""

    train_NT: NDArray[np.int64]
    queries_NT: NDArray[np.int64]
    rest_NT: NDArray[np.int64]


def read_sequences(train: int, queries: int, length: int, seed: int) -> Sequences:
    """BOS and ``length - 1`` bytes each, in a seeded order.

    Raises:
        SystemExit: this Python's library has too little text.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_bytes() for name in FILES if (path := stdlib / name).is_file()]
    width = length - 1
    pieces = [t[i : i + width] for t in texts for i in range(0, len(t) - width + 1, width)]
    if len(pieces) < train + queries:
        raise SystemExit(
            f"{stdlib}: expected {train + queries} pieces of {width} bytes, got {len(pieces)}. "
            f"Lower --train or --queries."
        )
    bytes_NT = np.frombuffer(b"".join(pieces), dtype=np.uint8).reshape(len(pieces), width)
    ids_NT = np.concatenate([np.full((len(pieces), 1), BOS), bytes_NT], axis=1).astype(np.int64)
    ids_NT = ids_NT[np.random.default_rng(seed).permutation(len(ids_NT))]
    return Sequences(ids_NT[queries:][:train], ids_NT[:queries], ids_NT[queries + train :])


def llama_config(shape: Shape, length: int) -> LlamaConfig:
    """The model's configuration, with eager attention, for sequences of ``length`` tokens."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=length,
        bos_token_id=BOS,
        eos_token_id=BOS + 1,
        pad_token_id=BOS + 2,
        attn_implementation="eager",
    )


def train_model(
    shape: Shape, sequences: Sequences, out: Path, steps: int, batch: int, seed: int
) -> float:
    """Train on everything but the queries, save to ``out``; gives the last steps' loss.

    The loss is in nats a token, a mean over the last tenth of the steps. The configuration asks
    for eager attention, which whoever reads the directory then uses.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(shape, sequences.train_NT.shape[1]))
    ids_NT = torch.from_numpy(np.concatenate([sequences.train_NT, sequences.rest_NT]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(steps, 1))
    losses = []
    for _ in range(steps):
        inputs_NT = ids_NT[torch.randint(len(ids_NT), (batch,))]
        logits_NTV = model(input_ids=inputs_NT, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits_NTV.flatten(0, 1), inputs_NT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    disable_progress_bar()
    model.save_pretrained(out)
    said = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(said | {"attn_implementation": "eager"}, indent=2))
    return float(np.mean(losses[-max(1, steps // 10) :])) if losses else float("nan")
