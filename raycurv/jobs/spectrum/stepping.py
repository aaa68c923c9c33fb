"""A step from a model: which it is, whether it is all of it, and the model behind it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raycurv.errors import UserError, some_of, user_errors
from raycurv.jobs.inputs import Inputs
from raycurv.jobs.spectrum.spectrum_settings import SpectrumSettings
from raycurv.jobs.spectrum.vector_files import Difference, Update, Vectors
from raycurv.mathematics.blocks import Block
from raycurv.models.checkpoint import hashed, tensor_bytes
from raycurv.models.model import Model
from raycurv.models.opening import open_model
from raycurv.models.patched import Patched
from raycurv.models.stored import Patch


def open_step(
    settings: SpectrumSettings, network: Model, blocks: Sequence[Block], inputs: Inputs
) -> tuple[Vectors, dict[str, Any]]:
    """The step that ``--direction`` names, and what tells it from others.

    Args:
        network: the model that it leads from.
        blocks: those that the matrix is of, in which all of the step must be.

    Raises:
        UserError: it is none of this model's, or goes beyond the blocks.
    """
    place, flag = inputs.or_named("direction", settings), f"--direction {settings.direction}"
    keys = {p.key: p.whole for block in blocks for p in network.stored(block).places}
    if isinstance(place, str) and place.endswith(".safetensors") and Path(place).is_file():
        tensors = _tensors(place, flag)
        prints = {name: [list(t.shape), hashed(tensor_bytes(t))] for name, t in tensors.items()}
        changed = {name for name, tensor in tensors.items() if tensor.any()}
        wrong = [n for n in changed & keys.keys() if tuple(tensors[n].shape) != keys[n]]
        if wrong:
            raise UserError(
                flag, f"{wrong[0]} of shape {list(keys[wrong[0]])}",
                str(list(tensors[wrong[0]].shape)), "Give a step of this model's tensors.",
            )  # fmt: skip
        _refuse_beyond(flag, changed, keys)
        return Update(place, network), prints
    other = open_model(
        place, trust_remote_code=settings.trust_remote_code, ignored=settings.ignore_tensors,
        adapters=inputs.placed(settings.adapters()),
    )  # fmt: skip
    here, there = network.fingerprint(), other.fingerprint()
    alike = here.keys() == there.keys() and all(
        here[name]["shape"] == there[name]["shape"] for name in here
    )
    if not alike:
        odd = sorted(here.keys() ^ there.keys()) or [
            name for name in here if here[name]["shape"] != there[name]["shape"]
        ]
        raise UserError(
            flag, f"another checkpoint of {network.name}, with the same tensors",
            f"one that differs in {some_of(odd, 1, repr)}", "Give a checkpoint of this model.",
        )  # fmt: skip
    _refuse_beyond(flag, {name for name in here if here[name] != there[name]}, keys)
    return Difference(other, network), there


def _refuse_beyond(flag: str, changed: set[str], keys: dict[str, Any]) -> None:
    beyond = sorted(changed - keys.keys())
    if beyond:
        raise UserError(
            flag, "a step within the blocks that are measured",
            f"one that changes {some_of(beyond, 2, repr)} as well",
            "Give --blocks all (without --run, or of a fit of all blocks).",
        )  # fmt: skip


def stepped(network: Model, blocks: Sequence[Block], step: Vectors, mark: str) -> Patched:
    """The model behind a step; ``mark`` tells it from others."""
    return Patched(
        network,
        [
            Patch(block, partial(_weight, network, step, block), f"{mark} {block.name}", wide=True)
            for block in blocks
        ],
    )


def _weight(network: Model, step: Vectors, block: Block) -> Tensor:
    # In the dtype that the model is stored in, a small step would be rounded away.
    return network.block_weight(block).double() + step.read(block, torch.float64)[0]


def _tensors(place: str, flag: str) -> dict[str, Tensor]:
    with (
        user_errors(
            flag, "a safetensors file", "Give an update of the model's tensors, or a checkpoint.",
            SafetensorError, OSError,
        ),
        safe_open(place, "pt") as opened,
    ):  # fmt: skip
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
