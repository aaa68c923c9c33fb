"""Text to token ids, by the tokenizer that the model's own directory carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raycurv.errors import UserError
from raycurv.models.checkpoint_files import TOKENIZER_FILES


class Tokenizer(Protocol):
    """What reading examples needs of a tokenizer."""

    def encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Token ids of each text; with ``special``, with the tokenizer's own special tokens."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-serialisable: what a run records of its tokenizer."""
        ...


@dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A tokenizer of the transformers library, asked for whole lists of texts at a time."""

    tokenizer: Any

    def encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Token ids of each text, neither padded nor truncated."""
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=special,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def describe(self) -> dict[str, Any]:
        """Its class, its size, and the tokens that it puts before and after a text."""
        before, after = affixes(self)
        return {
            "class": type(self.tokenizer).__name__,
            "tokens": len(self.tokenizer),
            "before": before,
            "after": after,
        }


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a model directory. Nothing is fetched, and no code of the directory runs.

    Raises:
        UserError: the directory has no tokenizer, or one that transformers cannot load.
    """
    directory = Path(directory)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            str(directory),
            f"a tokenizer, since the data is text ({', '.join(TOKENIZER_FILES[:3])}, ...)",
            "none of its files" if directory.is_dir() else "no such directory",
            "Save the model's tokenizer beside the model, or give the data as `input_ids`.",
        )
    # Imported here since it takes seconds, which data that is tokenised already need not wait for.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # transformers and its back ends raise whatever they meet
        raise UserError(
            str(directory),
            "a tokenizer that transformers can load",
            f"{type(error).__name__}: {error}",
            "Try transformers.AutoTokenizer.from_pretrained on the directory, or give the data as "
            "`input_ids`.",
        ) from error
    return HuggingFaceTokenizer(tokenizer)


class LazyTokenizer:
    """A model directory's tokenizer, loaded when the first text is met, and described if it was."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = directory
        self._loaded: Tokenizer | None = None

    def encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Token ids of each text."""
        if self._loaded is None:
            self._loaded = load_tokenizer(self._directory)
        return self._loaded.encode(texts, special=special)

    def describe(self) -> dict[str, Any]:
        """What a run records; empty when no text was met."""
        return {} if self._loaded is None else self._loaded.describe()


def affixes(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text, such as BOS and EOS.

    Raises:
        UserError: its special tokens cannot be told from the text's.
    """
    probe = "a"
    (plain,), (dressed,) = (tokenizer.encode([probe], special=special) for special in (False, True))
    for start in range(len(dressed) - len(plain) + 1):
        end = start + len(plain)
        if dressed[start:end] == plain:
            return dressed[:start], dressed[end:]
    raise UserError(
        "the model's tokenizer",
        "special tokens only before and after a text",
        f"{dressed} with them and {plain} without, for the text {probe!r}",
        "Give prompts and completions as `input_ids` with a `loss_mask`.",
    )
