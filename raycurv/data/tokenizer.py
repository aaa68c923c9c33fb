"""Text to token ids, by the tokenizer that the model's own directory carries."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from raycurv.data.chat_template import ChatTemplate
from raycurv.data.masking import Masking
from raycurv.errors import UserError, user_errors
from raycurv.models.checkpoint_files import TOKENIZER_FILES, more_templates
from raycurv.models.foreign_code import nothing_from_outside
from raycurv.names import regular_file

# What transformers reads of a directory for a tokenizer; the largest in use has 35 MB.
_READ = (*TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template.jinja", "chat_template.json")  # fmt: skip
# Of these, what says how conversations are written, and what such a directory is called.
_BESIDE = (
    "chat_template.jinja", "chat_template.json", "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip
_MOST_BYTES = 64 << 20
# What a tokenizer may put around a text, in tokens, and make of one character by replacements.
_MOST_AFFIXES, _MOST_GROWTH = 1024, 256
# Under which a description has the hashes of the files that it was made of.
FILES = "directory_files"
# Of so many of its words a run records what a tokenizer makes.
_WORDS = 512


class Tokenizer(Protocol):
    """What reading examples needs of a tokenizer."""

    def encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Token ids of each text; with ``special``, with the tokenizer's own special tokens."""

    def encode_whole(
        self, texts: Sequence[str], second: Sequence[str] | None, limit: int | None
    ) -> Encoded:
        """Texts, each with its ``second`` if there are any, and with the tokenizer's own special
        tokens: those that have more than ``limit`` tokens cut so that these stay."""

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that a model is to make, with the special tokens of such."""

    @property
    def chat(self) -> ChatTemplate:
        """What writes conversations as texts."""


@dataclass(frozen=True)
class Encoded:
    """Texts as tokens.

    Attributes:
        ids: of each text.
        kinds: of each token, whether it is of the second text; empty where no tokenizer says.
        truncated: how many texts were cut.
    """

    ids: list[list[int]]
    kinds: list[list[int]]
    truncated: int


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
        tokenizer, or one that transformers cannot load; any exception for texts that it does not
        take."""
        with _panics_as_errors():
            encoded = self._tokenizer(
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

    def encode_whole(
        self, texts: Sequence[str], second: Sequence[str] | None, limit: int | None
    ) -> Encoded:
        """As :meth:`encode`, of texts that are taken as wholes; see :class:`Tokenizer`."""
        given = [list(texts)] if second is None else [list(texts), list(second)]
        options = {"return_attention_mask": False, "padding": False, "verbose": False}
        with _panics_as_errors():
            found = self._tokenizer(*given, truncation=False, **options)
            long = [len(ids) > limit for ids in found["input_ids"]] if limit is not None else []
            if any(long):
                found = self._tokenizer(*given, truncation=True, max_length=limit, **options)
        return Encoded(found["input_ids"], found.get("token_type_ids", []), sum(long))

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        """As :meth:`encode`, of texts that a model is to make; see :class:`Tokenizer`."""
        with _panics_as_errors():
            encoded = self._tokenizer(
                text_target=list(texts), padding=False, truncation=False, verbose=False
            )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def decode(self, ids: Sequence[int], special: bool = True) -> str:
        """The text of token ids, with special ones or without; UserError as for :meth:`encode`."""
        how = {"skip_special_tokens": not special, "clean_up_tokenization_spaces": False}
        with _panics_as_errors():
            return str(self._tokenizer.decode(list(ids), **how))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The part of the text that each of some token ids adds: together they are the text. Of
        several tokens that make one character the last one has it. UserError as for
        :meth:`encode`."""
        whole = self.decode(ids)
        pieces = [self.decode([token]) for token in ids]
        if "".join(pieces) == whole:
            return pieces
        # Some tokens say something else alone. Each is decoded behind the one before it.
        pieces, behind, start = [], 0, 0
        for stop in range(1, len(ids) + 1):
            before, text = self.decode(ids[behind:start]), self.decode(ids[behind:stop])
            if text.endswith("\ufffd") and stop < len(ids):
                pieces.append("")
                continue
            pieces.append(text[len(before) :])
            behind, start = start, stop
        return pieces

    @cached_property
    def chat(self) -> ChatTemplate:
        """What writes conversations as texts, with their special tokens."""
        return ChatTemplate(self._tokenizer, self._directory)

    def texts(self, ids: Sequence[int], alike: Sequence[Any]) -> list[tuple[str, Any]]:
        """Tokens as texts, those that follow each other and are ``alike`` together, each with what
        that is; empty if no text was met, for it takes seconds to load a tokenizer."""
        if self._loaded is None:
            return []
        pieces = groupby(zip(self.pieces(ids), alike, strict=True), key=lambda pair: pair[1])
        return [("".join(piece for piece, _ in run), kind) for kind, run in pieces]

    def masking(self, seed: int, vocab_size: int | None) -> Masking:
        """What hides tokens of the texts, by words that the model knows; UserError if there is no
        token that stands for others."""
        mask, words = self._tokenizer.mask_token_id, len(self._tokenizer)
        if mask is None or mask >= (vocab_size or words):
            raise UserError(
                f"the tokenizer of {self._directory}", "a mask token, for a masked language model",
                "none" if mask is None
                else f"token {mask}, which is none of the model's {vocab_size}",
                "Give `input_ids` in which tokens are hidden, with their `labels`.",
            )  # fmt: skip
        special = frozenset(self._tokenizer.all_special_ids)
        return Masking(mask, special, min(words, vocab_size or words), seed)

    @property
    def _tokenizer(self) -> Any:
        if self._loaded is None:
            self._loaded = _load(self._directory, self._trusted)
        return self._loaded

    def describe(self) -> dict[str, Any]:
        """What a run records: its class, its size, the tokens that it puts before and after a text
        (``None`` where these cannot be told), a hash of the files that make its tokens, one of what
        it makes of words of its own, which options beside these files decide, too, where
        conversations were met one of their template, and one of each file; empty when no text was
        met."""
        if self._loaded is None:
            return {}
        before: list[int] | None
        after: list[int] | None
        try:
            before, after = affixes(self)
        except UserError:
            before = after = None
        kind, size = type(self._loaded).__name__, len(self._loaded)
        found = tokenizer_print(self._directory).items()
        files = str([(name, own) for name, own in found if name not in _BESIDE])
        own = hashlib.blake2b(files.encode(), digest_size=16).hexdigest()
        said = {"class": kind, "tokens": size, "before": before, "after": after, "files": own}
        said |= {"words": self._words(), FILES: self.files()}
        return said | (self.chat.describe() if self.chat.used else {})

    def describe_as(self, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """What :meth:`describe` gives where such data was met as when a run recorded it; UserError
        as for :meth:`encode`."""
        self.chat.used = "chat_template" in recorded
        return self.describe()

    def files(self) -> dict[str, str]:
        """A hash of each of its files; empty where there is no tokenizer."""
        names = (*_READ, *sorted(more_templates(self._directory)))
        return hashes(self._directory, names) if has_tokenizer(self._directory) else {}

    def _words(self) -> str | None:
        """A hash of the tokens of words of its own, each as a text; ``None`` where it does not take
        them."""
        numbers = range(0, len(self._loaded), max(1, len(self._loaded) // _WORDS))
        try:
            words = self._loaded.convert_ids_to_tokens(list(numbers))
            with warnings.catch_warnings():
                # That a text which is a special token has it twice is no news to anybody.
                warnings.simplefilter("ignore")
                ids = self.encode([word for word in words if isinstance(word, str)], special=True)
        except Exception:  # whatever a tokenizer meets
            return None
        return hashlib.blake2b(str(ids).encode(), digest_size=16).hexdigest()


def tokenizer_print(directory: str | Path) -> dict[str, str]:
    """Tells a tokenizer from others: a hash of each of its files; UserError if there is none."""
    found = hashes(Path(directory), _READ)
    if not found:
        raise _no_tokenizer(Path(directory))
    return found


def hashes(directory: Path, names: Sequence[str]) -> dict[str, str]:
    """A hash of each file of these names that a directory has."""
    files = {name: directory / name for name in names}
    return {
        name: hashlib.blake2b(file.read_bytes()).hexdigest()[:32]
        for name, file in files.items()
        if file.is_file()
    }


def has_tokenizer(directory: str | Path) -> bool:
    """Whether there are files of a tokenizer in a directory."""
    return any((Path(directory) / name).is_file() for name in TOKENIZER_FILES)


def _no_tokenizer(directory: Path) -> UserError:
    return UserError(
        str(directory),
        f"a tokenizer, since the data is text ({', '.join(TOKENIZER_FILES[:3])}, ...)",
        "none of its files" if directory.is_dir() else "no such directory",
        "Save the model's tokenizer beside the model, give --tokenizer DIR, or give the data as "
        "`input_ids`.",
    )


def _load(directory: Path, trust_remote_code: bool) -> Any:
    if not has_tokenizer(directory):
        raise _no_tokenizer(directory)
    for name in (*_READ, *more_templates(directory)):
        path = directory / name
        if not path.exists() and not path.is_symlink():
            continue
        size = regular_file(directory, name, f"the tokenizer of {directory}").stat().st_size
        if size > _MOST_BYTES:
            raise UserError(
                str(path),
                f"at most {_MOST_BYTES:,} bytes",
                f"{size:,}",
                "No tokenizer is that large: check what the file is.",
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
        _panics_as_errors(),
    ):
        loaded = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trust_remote_code
        )
        put = loaded.num_special_tokens_to_add()
        grown = _growth(loaded)
    for got, most, what in (
        (put, _MOST_AFFIXES, "special tokens around a text"),
        (grown, _MOST_GROWTH, "characters that its normalizer makes of one"),
    ):
        if got > most:
            raise UserError(
                f"the tokenizer of {directory}",
                f"at most {most:,} {what}",
                f"{got:,}",
                "Correct tokenizer.json, or give the data as `input_ids`.",
            )
    return loaded


def _growth(tokenizer: Any) -> int:
    """How many characters the replacements of a tokenizer's normalizer may make of one."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    waiting = [] if normalizer is None else [json.loads(normalizer.__getstate__())]
    growth = 1
    while waiting:
        said = waiting.pop()
        waiting += said.get("normalizers") or ()
        if said["type"] in ("Replace", "Prepend"):
            growth *= max(1, len(said.get("content") or said.get("prepend") or ""))
    return growth


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Makes an exception of a panic of a tokenizer in Rust, which is none, so that it is handled as
    others are: a pattern that takes too long on some text, say."""
    try:
        yield
    except BaseException as panic:
        if type(panic).__name__ != "PanicException":
            raise
        raise RuntimeError(str(panic)) from panic


def affixes(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text, such as BOS and EOS;
    UserError if they cannot be told from the text's."""
    probe = "a"
    with user_errors(
        "the model's tokenizer",
        f"one that takes the text {probe!r}, to tell its special tokens",
        "Give prompts and completions as `input_ids` with a `loss_mask`.",
        Exception,  # as in loading it
    ):
        plain, dressed = (tokenizer.encode([probe], special=on)[0] for on in (False, True))
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
