"""What a directory is that holds no model to open: advice comes after a look at what is there."""

from __future__ import annotations

import os
from pathlib import Path

from raycurv.errors import UserError, shortened
from raycurv.jsonfile import read_json
from raycurv.models.adapter import ADAPTER, ADAPTER_CONFIG
from raycurv.models.checkpoint import INDEX, SINGLE
from raycurv.models.checkpoint_files import TOKENIZER_FILES
from raycurv.models.config_file import CONFIG

_EXPECTED = f"a directory with {CONFIG} and safetensors, or package.module:factory"
_OR_HUB = f"{_EXPECTED}, or org/name on the Hugging Face hub"
_SAVE = "save_pretrained of transformers writes them"


def check_directory(directory: Path) -> None:
    """Refuse a path that holds no model in HF's format, by what it is instead.

    Raises:
        UserError: nothing there, a file, or a directory of another kind.
    """
    if not directory.is_dir():
        got = "a file" if directory.exists() else "no such directory"
        remedy = "Give the directory that holds it." if directory.exists() else _CHECK
        raise UserError(f"model {directory}", _OR_HUB, got, remedy)
    check_names(f"model {directory}", directory, sorted(os.listdir(directory)))


def check_names(where: str, directory: Path, there: list[str], weights: bool = True) -> None:
    """As :func:`check_directory`, by the names of what is in it, sorted, or will be.

    Args:
        where: what it is, for the message.
        weights: whether they are wanted as well.
    """
    has_config = CONFIG in there
    if has_config and (not weights or SINGLE in there or INDEX in there):
        return
    got, remedy = _kind(directory, there, has_config)
    raise UserError(where, _EXPECTED, got, remedy)


def check_outline_directory(directory: Path) -> None:
    """As :func:`check_directory`, where ``config.json`` alone is enough."""
    if not (directory / CONFIG).exists():
        check_directory(directory)
    if (
        ADAPTER_CONFIG in os.listdir(directory)
        and not (directory / INDEX).exists() | (directory / SINGLE).exists()
    ):
        check_directory(directory)


_CHECK = "Check the path of the model."


def _kind(directory: Path, there: list[str], has_config: bool) -> tuple[str, str]:
    """What a directory without a model is, and what to do."""

    def any_of(*endings: str) -> str:
        return next((name for name in there if name.endswith(endings)), "")

    if not there:
        return "an empty directory", _CHECK
    if ADAPTER_CONFIG in there or ADAPTER in there:
        base = _said(directory / ADAPTER_CONFIG, "base_model_name_or_path")
        of = f" of {base}" if base else ""
        return f"an adapter{of} ({ADAPTER_CONFIG}), not a whole model", (
            "Give the directory of its base as --model, and this one as --adapter: a base that an "
            "adapter names is not looked for."
        )
    if "run.json" in there:
        job = _said(directory / "run.json", "job") or "a job"
        return f"results of {job} (run.json)", "Give the directory of the model itself."
    if "model_index.json" in there:
        return "a pipeline of several models (model_index.json)", (
            "Give the directory of one of its models below it, if it is a language model."
        )
    if "blobs" in there and (directory / "snapshots").is_dir():
        snapshots = sorted(os.listdir(directory / "snapshots"))
        last = snapshots[-1] if snapshots else "…"
        return "a repository in the hub's cache", f"Give a snapshot below it: snapshots/{last}."
    gguf = any_of(".gguf")
    if gguf:
        return f"a model in GGUF ({gguf})", "Use the checkpoint that it was converted from."
    pickled = any_of("pytorch_model.bin", "pytorch_model.bin.index.json", ".bin", ".pt", ".ckpt")
    original = any_of("consolidated.00.pth", "params.json", ".pth")
    lacking = f"neither {SINGLE} nor {INDEX}"
    if has_config and pickled:
        return f"{lacking}, but {pickled}", (
            "Open it with from_pretrained and save it with save_pretrained, which writes "
            "safetensors."
        )
    if original:
        return f"a checkpoint in a layout of its own ({original})", (
            "Use its version in HF's format, or convert it with transformers' script for the model."
        )
    if pickled:
        return f"{pickled} without {CONFIG}", f"{_SAVE.capitalize()} with their configuration."
    foreign = any_of(".h5", ".msgpack", ".onnx")
    if foreign:
        return f"weights of another library ({foreign})", "Use the checkpoint in safetensors."
    if any_of("dataset_info.json", "dataset_dict.json", ".parquet", ".jsonl", ".arrow"):
        return "a data set", "Give it as --data, and the directory of a model as --model."
    checkpoints = [name for name in there if name.startswith("checkpoint-")]
    if checkpoints:
        newest = max(checkpoints, key=lambda name: (len(name), name))
        return f"a directory of checkpoints, among them {newest}", f"Give one: {newest}."
    if has_config:
        weights = any_of(".safetensors")
        if weights:
            return f"{lacking}, but {weights}", (
                f"Name the one file {SINGLE}, or copy the index of several."
            )
        return lacking, f"Copy the weights; {_SAVE}."
    if SINGLE in there or INDEX in there:
        return f"weights without {CONFIG}", f"Copy {CONFIG}; {_SAVE}."
    if any(name in there for name in TOKENIZER_FILES):
        return f"a tokenizer without a model (no {CONFIG})", f"Copy the model; {_SAVE}."
    return f"no {CONFIG} among {', '.join(there[:4])}{', …' if len(there) > 4 else ''}", _CHECK


def _said(path: Path, key: str) -> str:
    """What a small JSON file says under a key, or nothing: it is only told to a person."""
    try:
        text = str(read_json(path, str(path), "a JSON object", "").get(key) or "")
    except UserError:
        return ""
    return shortened(text, 200) if text.isprintable() else ""
