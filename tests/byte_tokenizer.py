"""Byte-level tokenizers of 258 tokens, small enough to be made anew for a test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, VOCAB = 256, 257, 258


def byte_ids(text: str) -> list[int]:
    """What the tokenizer makes of a text, before its special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [alphabet.index(c) for c in _visible(text)]


def _visible(text: str) -> str:
    (piece,) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(
        text
    ) or [("", None)]
    return piece[0]


def save_byte_tokenizer(
    directory: Path,
    template: str = "$A",
    special: Sequence[str] = (),
    chat: str | None = None,
    merges: Sequence[tuple[str, str]] = (),
) -> Path:
    """Saves a tokenizer whose texts become ``template``, for instance ``<s> $A </s>``.

    Args:
        special: further special tokens, numbered from 258 on.
        chat: a chat template.
        merges: pairs of characters that are one token, as ``(" ", " ")``, numbered before those.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"<s>": BOS, "</s>": EOS}
    pairs = [(_visible(a), _visible(b)) for a, b in merges]
    vocab |= {a + b: VOCAB + i for i, (a, b) in enumerate(pairs)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    tokenizer.add_special_tokens([token for token in special if token not in ("<s>", "</s>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat
    fast.save_pretrained(str(directory))
    return directory
