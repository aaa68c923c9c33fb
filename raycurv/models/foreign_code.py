"""Code and names of code that a model directory brings along: nothing of it runs unasked.

``auto_map`` in ``config.json`` and ``tokenizer_config.json`` names Python files of the directory
(or of a repository of the Hugging Face hub), and ``attn_implementation`` may name a compiled kernel
there. transformers would ask on the terminal, run the one and fetch the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raycurv.errors import UserError
from raycurv.jsonfile import read_json

_ATTENTIONS = (None, "eager", "sdpa")


@contextmanager
def nothing_from_outside(file: Path, trust_remote_code: bool) -> Iterator[None]:
    """While transformers reads a directory: nothing is fetched, whatever its files name.

    Args:
        file: of the directory, which may name code.
        trust_remote_code: whether that may run.

    Raises:
        UserError: what was read in the body cannot be without code that must not run.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:
        code = named_code(file)
        if code and not trust_remote_code:
            raise UserError(
                str(file),
                "a model that transformers knows by itself",
                f"one that needs code of its own ({', '.join(code)})",
                "Read that code: --trust-remote-code runs it, with all that you may do.",
            ) from error
        raise
    finally:
        constants.HF_HUB_OFFLINE = before


def named_code(file: Path) -> list[str]:
    """The classes that the ``auto_map`` of a file names, such as ``own.OwnForCausalLM``."""
    try:
        classes = read_json(file, str(file), "a JSON object", "").get("auto_map")
    except UserError:  # told by who needs what else it says
        return []
    values = classes.values() if isinstance(classes, dict) else [classes]
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return [one for one in flat if isinstance(one, str)]


def plain_implementations(config: Any) -> None:
    """Leave the choice of attention kernels to transformers where a configuration names others than
    its own, which compute the same and may have to be fetched."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    for part in (config, *parts):
        if getattr(part, "_attn_implementation", None) not in _ATTENTIONS:
            part._attn_implementation = None
