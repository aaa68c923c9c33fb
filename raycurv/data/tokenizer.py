"""Text to token ids, by the tokenizer that the model's own directory carries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from raycurv.errors import UserError, user_errors
from raycurv.models.checkpoint_files import TOKENIZER_FILES
from raycurv.models.foreign_code import nothing_from_outside


class Tokenizer(Protocol):
    """What reading examples needs of a tokenizer."""

    def encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Token ids of each text; with ``special``, with the tokenizer's own special tokens."""


class LazyTokenizer:
    """The tokenizer of a model's directory, as transformers loads it when the first text is met.

    Nothing is fetched, and no code of the directory runs unless it is trusted.
    """

    def __init__(self, directory: str | Path, trust_remote_code: bool = False) -> None:
        self._directory = Path(directory)
        self._trusted = trust_remote_code
        self._loaded: Any = None

    def encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Token ids of each text, neither padded nor truncated; UserError if the directory has no
        tokenizer, or one that transformers cannot load."""
        if self._loaded is None:
            self._loaded = _load(self._directory, self._trusted)
        encoded = self._loaded(
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
        """What a run records: its class, its size, and the tokens that it puts before and after a
        text; empty when no text was met."""
        if self._loaded is None:
            return {}
        before, after = affixes(self)
        kind, size = type(self._loaded).__name__, len(self._loaded)
        return {"class": kind, "tokens": size, "before": before, "after": after}


def _load(directory: Path, trust_remote_code: bool) -> Any:
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            str(directory),
            f"a tokenizer, since the data is text ({', '.join(TOKENIZER_FILES[:3])}, ...)",
            "none of its files" if directory.is_dir() else "no such directory",
            "Save the model's tokenizer beside the model, or give the data as `input_ids`.",
        )
    # Imported here since it takes seconds, which data that is tokenised already need not wait for.
    from transformers import AutoTokenizer

    code = nothing_from_outside(directory / "tokenizer_config.json", trust_remote_code)
    with (
        user_errors(
            str(directory),
            "a tokenizer that transformers can load",
            "Try transformers.AutoTokenizer.from_pretrained on the directory, or give the data as "
            "`input_ids`.",
            Exception,  # transformers and its back ends raise whatever they meet
        ),
        code,
    ):
        return AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trust_remote_code
        )


def affixes(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text, such as BOS and EOS;
    UserError if they cannot be told from the text's."""
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
