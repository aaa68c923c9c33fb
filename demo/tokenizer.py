"""A tokenizer whose tokens are bytes: a text's ids are its UTF-8 bytes, after one BOS."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, VOCAB_SIZE = 256, 257, 258
# Source code may well contain "<s>"; nothing contains these.
BOS_TOKEN, EOS_TOKEN = "<|raycurv-bos|>", "<|raycurv-eos|>"


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE without a single merge, its vocabulary ordered so that byte b has id b."""
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(), merges=[]))
    # Without the regex there are no words: what is split, and where, could not change an id.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [(BOS_TOKEN, BOS), (EOS_TOKEN, EOS)]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name, _ in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", special_tokens=specials
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _vocabulary() -> dict[str, int]:
    """The character by which byte-level BPE shows each byte, and the byte.

    Printing Latin-1 characters stand for themselves; U+0100 and on for the other bytes, in order.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = sorted(c for c in alphabet if ord(c) >= 256)
    shown = [chr(b) if chr(b) in alphabet else others.pop(0) for b in range(256)]
    return {c: b for b, c in enumerate(shown)}
