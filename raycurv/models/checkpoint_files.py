"""The files that a model is saved as: each a name, and its bytes piece by piece when asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from raycurv.errors import UserError
from raycurv.models.adapter import ADAPTER_CONFIG
from raycurv.models.checkpoint import (
    INDEX,
    NAMES,
    SINGLE,
    Checkpoint,
    encode_header,
    header_entries,
    pieces,
    tensor_bytes,
)
from raycurv.models.config_file import CONFIG
from raycurv.names import regular_file

# What goes along with the weights: configurations, tokenizers, their code, licences.
ALONG = (".json", ".txt", ".model", ".spm", ".codes", ".jinja", ".tiktoken", ".py")
PLAIN = ("LICENSE", "NOTICE")
TEMPLATES = "additional_chat_templates"
# Any of these makes a directory one with a tokenizer. Asked before transformers is, which would
# build an empty tokenizer from a config.json alone.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


@dataclass(frozen=True)
class CheckpointFile:
    """One file of a checkpoint that is to be written, by its name below the directory; ``source``
    is the file that it is made from, if there is one."""

    name: str
    chunks: Callable[[], Iterator[bytes | memoryview]]
    source: Path | None = None


def hf_files(
    checkpoint: Checkpoint, replaced: Mapping[str, Callable[[], Tensor]]
) -> tuple[CheckpointFile, ...]:
    """The files of an HF checkpoint with other tensors in place of some, as in its ``chunks``.

    Weights keep their files, order, dtypes and headers. ``config.json`` is the last: nobody opens a
    directory without it.

    Raises:
        UserError: a file beside the weights is a link that leads out of the directory.
    """
    directory = checkpoint.directory
    weights = [
        CheckpointFile(name, partial(checkpoint.chunks, name, replaced), directory / name)
        for name in checkpoint.files
    ]
    along = [] if checkpoint.files == (SINGLE,) else [INDEX]
    along += sorted(_beside(directory, set(checkpoint.files)))
    return (*weights, *(_copied(directory, name) for name in (*along, CONFIG)))


def state_file(
    name: str, state: Mapping[str, Tensor], replaced: Mapping[str, Callable[[], Tensor]]
) -> CheckpointFile:
    """One safetensors file of a state dict, under its own names, with other tensors for some;
    UserError for an entry that such a file cannot hold."""
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in NAMES:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(
                f"model {name}, entry {key} of its state dict",
                "a tensor that a safetensors file can hold",
                str(got),
                "Keep what is no such tensor out of the state dict.",
            )

    def chunks() -> Iterator[bytes | memoryview]:
        # As transformers and other readers of tensors of PyTorch expect it.
        yield encode_header({"__metadata__": {"format": "pt"}} | header_entries(state))
        for key, tensor in state.items():
            yield tensor_bytes(replaced[key]() if key in replaced else tensor)

    return CheckpointFile(SINGLE, chunks)


def _beside(directory: Path, weights: Iterable[str]) -> Iterator[str]:
    """What lies beside the weights and goes along, apart from the index and ``config.json``."""
    for path in directory.iterdir():
        along = path.suffix in ALONG and not path.name.endswith(".index.json")
        # An adapter's configuration would make transformers look for its tensors there.
        apart = path.name in (CONFIG, ADAPTER_CONFIG, *weights)
        if path.is_file() and (along or path.name in PLAIN) and not apart:
            yield path.name
    yield from more_templates(directory)


def more_templates(directory: Path) -> Iterator[str]:
    """Names of the chat templates that a directory has beside its first."""
    for path in (directory / TEMPLATES).glob("*.jinja"):
        yield f"{TEMPLATES}/{path.name}"


def _copied(directory: Path, name: str) -> CheckpointFile:
    """A file as it is. What a link leads to outside must not be published with the weights."""
    path = regular_file(directory, name, f"model {directory}")
    chunks = partial(_all_of, str(path), name)
    return CheckpointFile(name, chunks, directory / name)


def _all_of(file: str, name: str) -> Iterator[memoryview]:
    return pieces(file, name, 0, os.stat(file).st_size)
