"""Trains the demo's model: a byte-level language model, Llama-shaped, of two million parameters.

The time is what is fixed, not the steps, so that the demo takes as long on a slow machine as on a
fast one. The learning rate follows the share of the time that has gone by.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
import tyro
from tokenizer import BOS, EOS, VOCAB_SIZE, byte_tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

IGNORED = -100  # cross_entropy's own: a target that no loss is taken of


@dataclass(frozen=True)
class Settings:
    """Trains on OUT/train.parquet, reports the loss on OUT/queries.parquet, saves OUT/model."""

    out: Path
    """Directory with the passages; the model goes to its subdirectory `model`."""
    seconds: float = 130.0
    """Time to train for."""
    layers: int = 4
    """Decoder blocks."""
    width: int = 192
    """Size of the hidden state, a multiple of 32 (a head's size)."""
    batch: int = 4
    """Passages a step."""
    learning_rate: float = 2e-3
    """AdamW's, at its peak."""
    weight_decay: float = 0.1
    """AdamW's, on matrices."""
    threads: int | None = None
    """Threads of torch; by default torch's own choice."""
    seed: int = 0
    """Of the weights and of the passages' order."""


@dataclass(frozen=True)
class Rows:
    """Passages padded to one length; targets are the inputs one position on.

    N passages, T positions.
    """

    inputs_NT: Tensor
    targets_NT: Tensor

    @classmethod
    def of(cls, texts: list[str]) -> Rows:
        """BOS, then the text's bytes. Every byte is a target, nothing else is."""
        sequences = [[BOS, *text.encode()] for text in texts]
        longest = max(map(len, sequences))
        inputs_NT = torch.full((len(sequences), longest - 1), EOS)
        targets_NT = torch.full_like(inputs_NT, IGNORED)
        for n, sequence in enumerate(sequences):
            ids = torch.tensor(sequence)
            inputs_NT[n, : len(ids) - 1] = ids[:-1]
            targets_NT[n, : len(ids) - 1] = ids[1:]
        return cls(inputs_NT, targets_NT)

    def __len__(self) -> int:
        return len(self.inputs_NT)

    def take(self, index: Tensor) -> Rows:
        """Some of the rows, without the columns that none of them uses."""
        targets_NT = self.targets_NT[index]
        longest = int((targets_NT != IGNORED).sum(1).max())
        return Rows(self.inputs_NT[index, :longest], targets_NT[:, :longest])

    def loss(self, model: LlamaForCausalLM) -> tuple[Tensor, int]:
        """Loss in nats, summed over targets, and their number."""
        # Padding comes last and attention is causal, so no position that counts sees it.
        logits_NTV = model(input_ids=self.inputs_NT, use_cache=False).logits
        targets = self.targets_NT.flatten()
        total = cross_entropy(
            logits_NTV.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum"
        )
        return total, int((targets != IGNORED).sum())


def make_model(settings: Settings, max_length: int) -> LlamaForCausalLM:
    """A freshly initialised model in float32."""
    heads = settings.width // 32
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=settings.width,
            intermediate_size=3 * settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=max_length,
            initializer_range=settings.width**-0.5 / 2,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=EOS,
        )
    )


def learning_rate_factor(share: float) -> float:
    """Of the peak: linear warm-up over the first 4% of the time, then a cosine down to 2%."""
    if share < 0.04:
        return max(share, 0.002) / 0.04
    return 0.02 + 0.98 * (1 + math.cos(math.pi * min((share - 0.04) / 0.96, 1))) / 2


def train(model: LlamaForCausalLM, rows: Rows, settings: Settings) -> None:
    """Trains in place, for ``settings.seconds``, printing every ten seconds."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": gains, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
    )
    order = torch.Generator().manual_seed(settings.seed)
    queue = torch.empty(0, dtype=torch.long)
    batch = min(settings.batch, len(rows))
    start = printed = time.monotonic()
    steps, seen, loss_since, seen_since = 0, 0, 0.0, 0
    while (elapsed := time.monotonic() - start) < settings.seconds:
        for group in optimizer.param_groups:
            share = elapsed / settings.seconds
            group["lr"] = settings.learning_rate * learning_rate_factor(share)
        if len(queue) < batch:
            queue = torch.cat([queue, torch.randperm(len(rows), generator=order)])
        chosen, queue = queue[:batch], queue[batch:]
        total, count = rows.take(chosen).loss(model)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, seen = steps + 1, seen + count
        loss_since, seen_since = loss_since + total.item(), seen_since + count
        now = time.monotonic()
        if now - printed >= 10 or now - start >= settings.seconds:
            print(
                f"train {now - start:4.0f} of {settings.seconds:.0f} s  step {steps:5d}  "
                f"{loss_since / seen_since / math.log(2):5.2f} bits per byte  "
                f"{seen_since / (now - printed):6.0f} tokens/s",
                flush=True,
            )
            printed, loss_since, seen_since = now, 0.0, 0


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, rows: Rows) -> float:
    """Mean loss of a byte, in bits."""
    total, count = rows.loss(model)
    return total.item() / count / math.log(2)


def save(model: LlamaForCausalLM, directory: Path, max_length: int) -> None:
    """The model and its tokenizer: a whole directory or none."""
    part = directory.with_name(directory.name + ".part")
    for old in (part, directory):
        shutil.rmtree(old, ignore_errors=True)
    disable_progress_bar()  # a bar for one small file would only break up the output
    model.save_pretrained(part)
    byte_tokenizer(max_length).save_pretrained(part)
    part.rename(directory)


def read_texts(path: Path) -> list[str]:
    """The texts of a file that passages.py wrote.

    Raises:
        SystemExit: there is no such file.
    """
    if not path.is_file():
        raise SystemExit(
            f"{path}: expected passages, got no such file. "
            "Run passages.py with the same --out first."
        )
    texts: list[str] = pq.read_table(path, columns=["text"]).column("text").to_pylist()
    return texts


def main(settings: Settings) -> None:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    texts, held_out = (read_texts(settings.out / f"{n}.parquet") for n in ("train", "queries"))
    rows, held_out_rows = Rows.of(texts), Rows.of(held_out)
    max_length = 1 + max(len(text.encode()) for text in texts + held_out)
    torch.manual_seed(settings.seed)
    model = make_model(settings, max_length)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters:,} parameters, {settings.layers} layers; {len(rows)} passages, "
        f"{sum(len(text.encode()) for text in texts):,} bytes",
        flush=True,
    )
    train(model, rows, settings)
    sample = torch.linspace(0, len(rows) - 1, 64).long()
    directory = settings.out / "model"
    save(model, directory, max_length)
    print(
        f"held-out passages: {bits_per_byte(model, held_out_rows):.2f} bits per byte; "
        f"training passages: {bits_per_byte(model, rows.take(sample)):.2f}"
    )
    print(directory)


if __name__ == "__main__":
    main(tyro.cli(Settings))
