"""Byte-level tokenizers of 258 tokens, small enough to be made anew for a test."""

from __future__ import annotations

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


def save_byte_tokenizer(directory: Path, template: str = "$A") -> Path:
    """Saves a tokenizer whose texts become ``template``, for instance ``<s> $A </s>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"<s>": BOS, "</s>": EOS}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(str(directory))
    return directory
